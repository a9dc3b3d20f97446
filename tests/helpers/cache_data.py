"""Teachers, data sets and collate functions for tests of cached targets."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from workbench.models import MLP

N, WIDTH, CLASSES = 22, 6, 3


class Counting(nn.Module):
    """A teacher that counts how many samples it was asked about."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or MLP(WIDTH, [8], CLASSES)
        self.asked: list[int] = []

    def forward(self, x: Tensor) -> Any:
        self.asked.append(len(x))
        return self.network(x)


class RowByRow(nn.Module):
    """A network asked about one sample at a time, so that the bits of an answer do not depend on the batch.

    Matrix kernels may round a row differently in a batch of another size, or at another place in the batch.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or MLP(WIDTH, [8], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.network(row.clone()) for row in x.split(1)])


def samples(seed: int = 0, count: int = N) -> TensorDataset:
    drawn = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, WIDTH, generator=drawn), torch.arange(count) % CLASSES)


def loader(dataset: Any = None, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(samples() if dataset is None else dataset, batch_size, **options)


class Words(Dataset):
    """Token ids of several lengths."""

    lengths = (3, 5, 2, 4, 5, 1, 3)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = torch.Generator().manual_seed(int(index))
        ids = torch.randint(1, 11, (self.lengths[index],), generator=drawn).tolist()
        return {"input_ids": ids, "labels": int(index) % 2}


def pad(items: list[dict[str, Any]], left: bool = False, to: int = 0) -> dict[str, Tensor]:
    longest = max(to, *(len(item["input_ids"]) for item in items))
    ids, mask = torch.zeros(len(items), longest, dtype=torch.int64), torch.zeros(len(items), longest, dtype=torch.int64)
    for row, item in enumerate(items):
        own = len(item["input_ids"])
        place = slice(longest - own, longest) if left else slice(0, own)
        ids[row, place], mask[row, place] = torch.tensor(item["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([item["labels"] for item in items])}


def pad_left(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    return pad(items, left=True, to=7)


def pad_unlabelled(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: value for name, value in pad(items).items() if name != "labels"}


class Speaking(nn.Module):
    """Logits [B, L, 11] of token ids alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embed(input_ids))}


class Shaken(Dataset):
    """Samples with a number of views, each a function of index and epoch."""

    def __init__(self, views: int) -> None:
        self.views = views

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        view = getattr(index, "epoch", 0) % max(self.views, 1)
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 * view + int(index))), int(index) % 3
