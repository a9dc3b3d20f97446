import copy
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.types import _Stateful
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.helpers.trainers import Stop, StopAt
from workbench.data import Augment
from workbench.data.images import ImageModule
from workbench.duration import Duration
from workbench.models import MLP
from workbench.training.fit import module_for
from workbench.training.loop import train
from workbench.training.order import EpochIndex, EpochOrder, OrderedLoader, with_epoch_order

SIZES = st.integers(1, 40)
WORLDS = st.integers(1, 5)
SEEDS = st.integers(-(2**40), 2**70)


class Numbers(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class Noise(Numbers):
    def __getitem__(self, index: int) -> Any:
        return torch.rand(())


def indices(size: int, seed: int, epoch: int = 0, **options: Any) -> list[int]:
    order = EpochOrder(size, seed, **options)
    order.set_epoch(epoch)
    found = list(order)
    assert len(found) == len(order)
    return found


def loader(
    size: int = 23, batch: int = 4, shuffle: bool = True, seed: int = 0, rank: int = 0, world: int = 1, **options: Any
) -> Any:
    return with_epoch_order(DataLoader(Numbers(size), batch, shuffle=shuffle, **options), seed, rank, world)


def batches(made: Any, epoch: int = 0) -> list[list[int]]:
    made.batch_sampler.sampler.set_epoch(epoch)
    return [batch.tolist() for batch in made]


@given(st.integers(0, 2**62), st.integers(0, 10**6))
def test_an_index_with_its_epoch_is_an_int(index: int, epoch: int) -> None:
    at = EpochIndex(index, epoch)
    assert at == index
    assert hash(at) == hash(index)
    assert (str(at), json.dumps(at), f"{at:04d}") == (str(index), str(index), f"{index:04d}")
    for again in (pickle.loads(pickle.dumps(at)), copy.copy(at), copy.deepcopy(at)):
        assert (type(again), int(again), again.epoch) == (EpochIndex, index, epoch)
    assert type(at + 1) is int, "what is computed from it is another sample's, or none's"


def test_every_kind_of_data_set_takes_it() -> None:
    import datasets

    at = [EpochIndex(3, 1), EpochIndex(0, 1)]
    assert [torch.arange(5)[each].item() for each in at] == [3, 0]
    assert torch.arange(5)[at].tolist() == torch.as_tensor(at).tolist() == [3, 0]
    assert np.arange(5)[at].tolist() == [3, 0]
    assert np.arange(5)[at[0]] == [0, 1, 2, 3][at[0]] == {3: 3}[at[0]] == 3
    table = datasets.Dataset.from_dict({"a": list("abcde")})
    assert table[at[0]] == {"a": "d"}
    assert table.__getitems__(at) == [{"a": "d"}, {"a": "a"}]


class Epochs(Numbers):
    """Gives the epoch of the index."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, getattr(index, "epoch", -1)])


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "persistent_workers": True}])
def test_the_data_set_knows_the_epoch(options: dict[str, Any]) -> None:
    made = with_epoch_order(DataLoader(Epochs(6), 2, shuffle=True, **options), 0)
    for epoch in (0, 3):
        made.batch_sampler.sampler.set_epoch(epoch)
        found = torch.cat(list(made))
        assert found[:, 0].tolist() == indices(6, 0, epoch)
        assert found[:, 1].tolist() == [epoch] * 6
    kept = iter(made.batch_sampler.sampler)
    made.batch_sampler.sampler.set_epoch(9)
    assert {index.epoch for index in kept} == {3}, "an order that was begun keeps its epoch"
    assert torch.cat(list(DataLoader(Epochs(6), 2)))[:, 1].tolist() == [-1] * 6


@given(SIZES, SEEDS, st.integers(0, 100))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(indices(size, seed, epoch)) == list(range(size))
    assert indices(size, seed, epoch) == indices(size, seed, epoch)
    assert indices(size, seed, epoch, shuffle=False) == list(range(size))


def test_every_epoch_and_every_seed_has_its_own() -> None:
    found = [tuple(indices(50, seed, epoch)) for seed in range(6) for epoch in range(6)]
    assert len(set(found)) == len(found)


@given(SIZES, SEEDS, WORLDS, st.integers(1, 6), st.booleans(), st.booleans())
def test_ranks_together_are_one_rank_with_a_larger_batch(
    size: int, seed: int, world: int, batch: int, shuffle: bool, drop_last: bool
) -> None:
    whole = indices(size, seed, 3, shuffle=shuffle)
    ranks = [
        list(
            BatchSampler(
                indices(size, seed, 3, shuffle=shuffle, rank=r, world=world, drop_last=drop_last), batch, drop_last
            )
        )
        for r in range(world)
    ]
    expected = list(BatchSampler(whole, world * batch, drop_last))
    assert {len(found) for found in ranks} == {len(expected)}, "every rank takes as many steps"
    for step, together in enumerate(expected):
        found = [found[step] for found in ranks]
        assert len({len(part) for part in found}) == 1
        samples = [sample for turn in zip(*found, strict=True) for sample in turn]
        assert samples[: len(together)] == together
        wrapped = samples[len(together) :]
        assert len(wrapped) < world
        assert wrapped == (whole * world)[: len(wrapped)], "the tail wraps round to the front"


def test_an_empty_data_set_has_an_empty_order() -> None:
    assert indices(0, 1) == []
    assert indices(0, 1, world=3) == []
    assert indices(2, 1, world=3, drop_last=True) == []


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank} of {world}"):
        EpochOrder(3, 0, rank=rank, world=world)


@settings(max_examples=40)
@given(SIZES, st.integers(1, 7), st.integers(0, 40), st.booleans(), st.booleans(), WORLDS)
def test_resuming_after_k_batches_gives_the_rest(
    size: int, batch: int, k: int, drop_last: bool, shuffle: bool, world: int
) -> None:
    options = {"shuffle": shuffle, "drop_last": drop_last, "rank": world - 1, "world": world}
    whole = batches(loader(size, batch, **options), epoch=2)
    k = min(k, len(whole))
    stopped = loader(size, batch, **options)
    stopped.batch_sampler.sampler.set_epoch(2)
    iterator = iter(stopped)
    assert [next(iterator).tolist() for _ in range(k)] == whole[:k]
    resumed = loader(size, batch, **options)
    resumed.load_state_dict(stopped.state_dict())
    assert batches(resumed, epoch=2) == whole[k:]
    assert batches(resumed, epoch=3) == batches(loader(size, batch, **options), epoch=3), "the next epoch is whole"
    assert len(resumed) == len(whole), "Lightning counts the batches of the whole epoch"


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_resuming_with_workers(drop_last: bool, persistent: bool) -> None:
    options = {"num_workers": 2, "drop_last": drop_last, "prefetch_factor": 3, "persistent_workers": persistent}
    whole = batches(loader(drop_last=drop_last), epoch=1)
    stopped = loader(**options)
    stopped.batch_sampler.sampler.set_epoch(1)
    iterator = iter(stopped)
    assert [next(iterator).tolist() for _ in range(2)] == whole[:2]
    state = stopped.state_dict()
    assert state == {"epoch": 1, "seen": 2}, "handed out, not fetched ahead"
    del iterator
    resumed = loader(**options)
    resumed.load_state_dict(state)
    assert batches(resumed, epoch=1) == whole[2:]
    assert batches(resumed, epoch=2) == batches(loader(drop_last=drop_last), epoch=2)


def test_the_state_is_right_at_every_moment() -> None:
    made = loader()
    assert made.state_dict() == {"epoch": 0, "seen": 0}
    made.load_state_dict({"epoch": 1, "seen": 3})
    assert made.state_dict() == {"epoch": 1, "seen": 3}, "loaded and saved again before the first batch"
    made.batch_sampler.sampler.set_epoch(1)
    iterator = iter(made)
    assert made.state_dict() == {"epoch": 1, "seen": 3}
    seen = []
    for _ in iterator:
        seen.append(made.state_dict()["seen"])
    assert seen == [4, 5, 6]
    assert made.state_dict() == {"epoch": 1, "seen": 6}
    again = loader()
    again.load_state_dict(made.state_dict())
    assert batches(again, epoch=1) == [], "the epoch is over"
    again.load_state_dict(made.state_dict())
    assert len(batches(again, epoch=2)) == 6


def test_lightning_takes_it_for_resumable() -> None:
    assert isinstance(loader(), _Stateful)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_generator_moves(workers: int) -> None:
    made = loader(num_workers=workers)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    batches(made)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_workers_draw_by_seed_and_epoch() -> None:
    def noise(seed: int, epoch: int) -> list[float]:
        made = with_epoch_order(DataLoader(Noise(4), 2, shuffle=True, num_workers=2), seed)
        made.batch_sampler.sampler.set_epoch(epoch)
        return torch.cat(list(made)).tolist()

    first = noise(0, 0)
    torch.manual_seed(99)
    assert noise(0, 0) == first
    assert noise(0, 1) != first
    assert noise(1, 0) != first


def collate(items: list[Any]) -> Any:
    return torch.tensor(items)


def start_worker(_: int) -> None:
    return None


def test_every_option_is_kept() -> None:
    given = {
        "num_workers": 2,
        "collate_fn": collate,
        "timeout": 30,
        "worker_init_fn": start_worker,
        "multiprocessing_context": "fork",
        "prefetch_factor": 3,
        "persistent_workers": True,
        "in_order": False,
    }
    plain = DataLoader(Numbers(9), 4, shuffle=True, drop_last=True, **given)
    made = with_epoch_order(plain, 0)
    assert type(made) is OrderedLoader
    assert made.dataset is plain.dataset
    for name in [*given, "pin_memory", "pin_memory_device"]:
        assert getattr(made, name) == getattr(plain, name), name
    assert len(made) == len(plain) == 2
    assert with_epoch_order(DataLoader(Numbers(9), 4, pin_memory=True), 0).pin_memory


def test_options_of_the_loader_that_are_neither_kept_nor_replaced_do_not_exist() -> None:
    import inspect

    from workbench.training.order import _OPTIONS

    replaced = {"self", "dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator"}
    assert set(inspect.signature(DataLoader.__init__).parameters) == {*_OPTIONS, *replaced}


def test_sequential_stays_sequential() -> None:
    assert batches(loader(10, 4, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


class Mine(DataLoader):
    pass


class MyBatches(BatchSampler):
    pass


DATA = Numbers(8)
LEFT_ALONE = {
    "iterable": lambda: DataLoader(Stream(), 2),
    "subset sampler": lambda: DataLoader(DATA, 2, sampler=SubsetRandomSampler([1, 2])),
    "weighted sampler": lambda: DataLoader(DATA, 2, sampler=WeightedRandomSampler([1.0] * 8, 8)),
    "replacement": lambda: DataLoader(DATA, 2, sampler=RandomSampler(DATA, replacement=True)),
    "fewer samples": lambda: DataLoader(DATA, 2, sampler=RandomSampler(DATA, num_samples=3)),
    "part in order": lambda: DataLoader(DATA, 2, sampler=SequentialSampler(range(3))),
    "list of indices": lambda: DataLoader(DATA, 2, sampler=[3, 1]),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=MyBatches(SequentialSampler(DATA), 2, False)),
    "no batches": lambda: DataLoader(DATA, batch_size=None),
    "own class": lambda: Mine(DATA, 2, shuffle=True),
    "not a loader": lambda: range(3),
    "ordered already": lambda: loader(),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_the_user_made_is_left_alone(case: str) -> None:
    given = LEFT_ALONE[case]()
    assert with_epoch_order(given, 0) is given


def test_tensors_come_out_as_from_the_plain_loader() -> None:
    data = TensorDataset(torch.arange(6.0), torch.arange(6))
    made = with_epoch_order(DataLoader(data, 4, shuffle=True), 5)
    order = indices(6, 5)
    (x, y), (tail, _) = list(made)
    assert y.tolist() == order[:4]
    assert x.tolist() == [float(index) for index in order[:4]]
    assert tail.tolist() == [float(index) for index in order[4:]]


def test_several_loaders_are_all_ordered() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=2, shuffle=True)
    assert isinstance(with_epoch_order({"a": loader}, 0)["a"], OrderedLoader)
    assert all(isinstance(each, OrderedLoader) for each in with_epoch_order([loader, loader], 0))


def test_a_sampler_that_knows_no_ranks_is_refused_where_there_are_some() -> None:
    """Lightning would split it; left as it is, every rank would train on the same samples in silence."""
    data = TensorDataset(torch.arange(10))
    weighted = DataLoader(data, batch_size=2, sampler=WeightedRandomSampler(torch.ones(10), 10))
    assert with_epoch_order(weighted, 0) is weighted
    with pytest.raises(ValueError, match="WeightedRandomSampler would give each of the 2 processes the same samples"):
        with_epoch_order(weighted, 0, rank=1, world=2)
    split = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, num_replicas=2, rank=1))
    assert with_epoch_order(split, 0, rank=1, world=2) is split


class Varied(ImageModule):
    """Images that are augmented, and nothing else that is random."""

    def __init__(self, workers: int) -> None:
        super().__init__(8, 8, workers, True, 3, Augment(2), 0)

    def read(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (48, 1, 8, 8), dtype=torch.uint8, generator=generator)
        return (images, torch.arange(48) % 3), (images, torch.arange(48) % 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_stopped_in_the_middle_of_an_epoch_sees_the_same_views(tmp_path: Path, workers: int) -> None:
    def run(out: Path, *stops: int | None) -> dict[str, torch.Tensor]:
        for stop in (*stops, None):
            lp.seed_everything(5, verbose=False)
            module = module_for(MLP(64, [16], 3), data := Varied(workers))
            callbacks = [] if stop is None else [StopAt(stop)]
            options = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False}
            try:
                train(module, data, trainer=options, seed=5, out=out, checkpoint=Duration(2, "it"), callbacks=callbacks)
            except Stop:
                continue
            return module.state_dict()
        raise AssertionError("never finished")

    whole, pieces = run(tmp_path / "whole"), run(tmp_path / "pieces", 3, 8)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
