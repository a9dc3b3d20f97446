"""What a criterion is shown of a Trainer's data: a seeded, shuffled part on every rank."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler, WeightedRandomSampler
from transformers import Trainer

from prune import Pruner
from prune.criteria import CRITERIA
from prune.hf import GradualPruning
from prune.hf.calibration import trainer_calibration
from tests.helpers.transformers_training import arguments, bert, sentences, trained


class Numbers(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from range(12)


def shown(loader: DataLoader, batches: int = 2, rank: int = 0, ranks: int = 1, **options: Any) -> list[list[int]]:
    """The numbers that a criterion sees, batch by batch."""
    given = {"seed": 3, "data_seed": None, "train_batch_size": 3, "world_size": ranks, "process_index": rank}
    args: Any = SimpleNamespace(**{**given, **options})
    found = trainer_calibration(args, loader)(CRITERIA["wanda"], batches)["loader"]
    first, again = ([torch.as_tensor(batch).tolist() for batch in found] for _ in range(2))
    assert first == again, "the same at every reading"
    return first


def drawn(seed: int) -> list[int]:
    return torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("shuffle", [False, True])
def test_samples_are_drawn_at_random_by_the_seed(shuffle: bool) -> None:
    loader = DataLoader(Numbers(), 3, shuffle=shuffle)
    order = drawn(3)
    assert shown(loader) == [order[:3], order[3:6]]
    assert shown(loader, data_seed=5) == [drawn(5)[:3], drawn(5)[3:6]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_data(ranks: int) -> None:
    parts = [shown(DataLoader(Numbers(), 3), 4, rank, ranks) for rank in range(ranks)]
    assert sorted(number for part in parts for batch in part for number in batch) == list(range(12))
    assert [part[0] for part in parts] == [drawn(3)[rank::ranks][:3] for rank in range(ranks)]


def test_a_stream_is_read_in_its_order_and_shared() -> None:
    assert shown(DataLoader(Stream(), 3)) == [[0, 1, 2], [3, 4, 5]]
    assert [shown(DataLoader(Stream(), 3), 2, rank, 2) for rank in range(2)] == [
        [[0, 1, 2], [6, 7, 8]],
        [[3, 4, 5], [9, 10, 11]],
    ]


def test_a_sampler_of_ones_own_decides() -> None:
    weighted = WeightedRandomSampler([0.0] * 11 + [1.0], 12)
    assert shown(DataLoader(Numbers(), 3, sampler=weighted)) == [[11] * 3] * 2

    class Backwards(Sampler):
        def __iter__(self) -> Iterator[int]:
            yield from reversed(range(12))

    assert shown(DataLoader(Numbers(), 3, sampler=Backwards())) == [[11, 10, 9], [8, 7, 6]]
    assert shown(DataLoader(Numbers(), None, sampler=Backwards())) == [11, 10]
    assert shown(DataLoader(Numbers(), None, sampler=SequentialSampler(Numbers()))) == drawn(3)[:2]


def test_no_random_number_of_the_training_is_drawn() -> None:
    state = torch.get_rng_state()
    shown(DataLoader(Numbers(), 3, sampler=WeightedRandomSampler([1.0] * 12, 12)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("criterion", ["snip", "wanda"])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_criterion_that_looks_at_data_is_shown_shuffled_batches(
    criterion: str, sequential: bool, tmp_path: Path
) -> None:
    pruner, rows = Pruner(criterion, allocation="uniform"), sentences()
    sparse = GradualPruning(0.4, "0it", "1it", "1it", pruner, schedule="one_shot", batches=2)
    strategy = {"train_sampling_strategy": "sequential"} if sequential else {}
    trained(tmp_path, sparse, model=bert(), rows=rows, max_steps=2, seed=4, **strategy)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4)).tolist()
    parts = [[rows[i] for i in order[start : start + 4]] for start in (0, 4)]
    batches = [{name: torch.stack([row[name] for row in part]) for name in rows[0]} for part in parts]
    loss = {"loss": lambda model, batch: model(**batch).loss} if criterion == "snip" else {}
    assert sparse.masks == pruner(bert(), 0.4, loader=batches, **loss)


def test_a_model_without_a_loss_is_named(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in sentences()]
    sparse = GradualPruning(0.4, "0it", "1it", "1it", Pruner("grasp"), schedule="one_shot")
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=rows, callbacks=[sparse])
    with pytest.raises(ValueError, match=r"gives no loss for \['input_ids', 'attention_mask'\]"):
        trainer.train()
