"""Networks and batches for tests of criteria."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune.criteria import CRITERIA, Criterion

WITH_DATA = [criterion for criterion in CRITERIA.values() if criterion.needs_loader]
WITH_LOSS = [criterion for criterion in WITH_DATA if criterion.needs_loss]
ONLINE = [criterion for criterion in WITH_LOSS if criterion.online]


def each_criterion(criteria: Iterable[Criterion]) -> Any:
    return pytest.mark.parametrize("criterion", list(criteria), ids=lambda criterion: criterion.name)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def scores_of(
    criterion: Criterion, model: nn.Module, loader: Iterable[Any], loss: Any = cross_entropy
) -> dict[str, Tensor]:
    return criterion.score(model, matrices(model), loader, *([loss] if criterion.needs_loss else []))


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def points(count: int, seed: int = 1, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, generator=noise).double(), torch.randint(2, (size,), generator=noise))
        for _ in range(count)
    ]


def image_net() -> nn.Module:
    """Everything that a forward in training mode changes: statistics of a batch norm, random state of a dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Flatten(), nn.Linear(64, 3)),
    )


def images(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(2)
    return [(torch.randn(size, 2, 4, 4, generator=noise), torch.arange(size) % 3) for _ in range(count)]


def bert(**options: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = BertConfig(vocab_size=11, max_position_embeddings=6, num_labels=2, **sizes, **options)
    return BertForSequenceClassification(config)


def sentences() -> dict[str, Tensor]:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([0, 1])}


def linear(model: nn.Module) -> dict[str, nn.Parameter]:
    kinds = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    return {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in kinds}


def linear_norms(inputs: list[Tensor]) -> list[float]:
    rows = [row for each in inputs for row in each.reshape(-1, each.shape[-1]).tolist()]
    return [sum(row[j] ** 2 for row in rows) ** 0.5 for j in range(len(rows[0]))]


class SharedWeight(nn.Module):
    """One weight in two layers, and a layer that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())
