"""A cached teacher gives the outputs of the live one, whatever the order of the batches."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distill.cache import CachedBatch, CachedTeacher, cache_teacher
from distill.losses import soft_target
from distill.teacher import Teacher
from tests.helpers.cache_data import (
    CLASSES,
    WIDTH,
    N,
    RowByRow,
    Shaken,
    Words,
    loader,
    pad,
    samples,
)
from workbench.data import Digits
from workbench.models import MLP
from workbench.training.order import EpochIndex, with_epoch_order


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_has_the_outputs_of_the_live_teacher(tmp_path: Path, workers: int) -> None:
    teacher = Teacher(RowByRow())
    assert cache_teacher(teacher, loader(), tmp_path, shard_size=8) == tmp_path
    cached = CachedTeacher(tmp_path, teacher)
    seen = []
    shuffled = loader(shuffle=True, num_workers=workers, drop_last=True, generator=torch.Generator().manual_seed(1))
    for made in cached.attach(shuffled):
        assert isinstance(made, CachedBatch)
        (x, y), targets = made
        assert list(targets) == ["logits"]
        assert torch.equal(targets["logits"], teacher(x))
        seen += x[:, 0].tolist()
        assert len(y) == 4
    assert len(set(seen)) == 20


def test_batches_and_order_are_the_loaders_own(tmp_path: Path) -> None:
    cache_teacher(MLP(WIDTH, [8], CLASSES), loader(), tmp_path)
    cached = CachedTeacher(tmp_path)
    plain = [x for x, _ in loader(shuffle=True, generator=torch.Generator().manual_seed(5))]
    attached = cached.attach(loader(shuffle=True, generator=torch.Generator().manual_seed(5)))
    assert all(torch.equal(x, targets.batch[0]) for x, targets in zip(plain, attached, strict=True))
    batches = [[3, 1], [0], [21, 20, 19]]
    again = cached.attach(DataLoader(samples(), batch_sampler=batches))  # type: ignore[arg-type]
    assert [len(targets.cached_targets["logits"]) for targets in again] == [2, 1, 3]


def test_composes_with_the_order_of_seed_and_epoch(tmp_path: Path) -> None:
    teacher = Teacher(RowByRow())
    cache_teacher(teacher, loader(), tmp_path)
    plain = with_epoch_order(loader(shuffle=True, drop_last=True), seed=3)
    attached = with_epoch_order(CachedTeacher(tmp_path).attach(loader(shuffle=True, drop_last=True)), seed=3)
    assert type(attached) is not DataLoader
    for (x, _), made in zip(plain, attached, strict=True):
        assert torch.equal(x, made.batch[0])
        assert torch.equal(made.cached_targets["logits"], teacher(x))


def test_a_data_module_with_whole_batches(tmp_path: Path) -> None:
    teacher, data = Teacher(MLP(64, [8], 10)), Digits(batch_size=50)
    cache_teacher(teacher, data, tmp_path)
    cache_teacher(teacher, data, tmp_path, "val")
    cached = CachedTeacher(tmp_path, teacher)
    assert cached.splits == ["train", "val"]
    for split, made in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        (x, _), targets = next(iter(cached.attach(made, split)))
        assert torch.equal(targets["logits"], teacher(x))


def train(student: nn.Module, batches: Any, teach: Callable[[Any], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    for batch in batches:
        x, logits = teach(batch)
        optimizer.zero_grad()
        soft_target(student(x), logits).backward()
        optimizer.step()
    return student.state_dict()


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_student_ends_with_the_same_bits_as_beside_the_live_teacher(tmp_path: Path, kind: str) -> None:
    if kind == "mlp":
        data, network = TensorDataset(torch.randn(70, 40), torch.zeros(70)), MLP(40, [96, 96], 10)
    else:
        data = TensorDataset(torch.randn(70, 1, 10, 10), torch.zeros(70))
        layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Flatten()
        network = nn.Sequential(*layers, nn.Linear(32, 10))
    teacher = Teacher(RowByRow(network))
    cache_teacher(teacher, loader(data, 16), tmp_path, shard_size=16)
    student = nn.Sequential(nn.Flatten(), nn.Linear(40 if kind == "mlp" else 100, 10))
    live, cached = copy.deepcopy(student), copy.deepcopy(student)
    loaders = [loader(data, 16, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(2)) for _ in "ab"]
    one = train(live, loaders[0], lambda batch: (batch[0], teacher(batch[0])))
    attached = CachedTeacher(tmp_path).attach(loaders[1])
    other = train(cached, attached, lambda made: (made.batch[0], made.cached_targets["logits"]))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["1.weight"], student[1].weight)


def test_each_view_has_its_own_targets(tmp_path: Path) -> None:
    teacher, data = Teacher(RowByRow()), Shaken(3)
    cache_teacher(teacher, loader(data, 11), tmp_path, shard_size=11)
    cached = CachedTeacher(tmp_path)
    assert len(cached.describe()["shards"]) == 6
    attached = with_epoch_order(cached.attach(loader(data, 11, shuffle=True)), seed=0)
    seen = set()
    for epoch in (0, 1, 2, 4):
        attached.batch_sampler.sampler.set_epoch(epoch)
        for (x, _), targets in attached:
            assert torch.equal(targets["logits"], teacher(x))
            seen |= set(x[:, 0].tolist())
    assert len(seen) == 3 * N


def test_views_that_the_cache_does_not_have(tmp_path: Path) -> None:
    cache_teacher(nn.Linear(WIDTH, 3), loader(Shaken(2)), tmp_path)
    with pytest.raises(ValueError, match=r"stale.*another number of views \(2 there, 5 here\): cache again"):
        CachedTeacher(tmp_path).attach(loader(Shaken(5)))


def test_folders_without_a_cache(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"holds no teacher cache: write one with distill\.cache_teacher"):
            CachedTeacher(path)
    (tmp_path / "cache.json").write_text('{"name": "npm"}')
    with pytest.raises(ValueError, match=r"cache\.json is not a teacher cache: its format is not 'teacher-cache'"):
        CachedTeacher(tmp_path)


def test_another_teacher_or_split(tmp_path: Path) -> None:
    network = MLP(WIDTH, [8], CLASSES)
    cache_teacher(network, loader(), tmp_path)
    CachedTeacher(tmp_path, network)
    with torch.no_grad():
        network.layers[0].bias[0] += 1  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"is stale, it was made with another teacher \(.*there.*cache again into"):
        CachedTeacher(tmp_path, network)
    with pytest.raises(ValueError, match="has no split 'val': it has train"):
        CachedTeacher(tmp_path).attach(loader(), "val")


def test_a_sample_or_a_length_that_the_cache_does_not_have(cached_words: Path) -> None:
    def longer(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = pad(items, to=6)
        return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}

    cached = CachedTeacher(cached_words, verify=False)
    with pytest.raises(ValueError, match="sample 0 has 6 positions in the batch and 3 in the cache: truncate as when"):
        next(iter(cached.attach(loader(Words(), 2, collate_fn=longer))))
    with pytest.raises(ValueError, match="samples of several lengths: the batch needs an attention_mask"):
        next(iter(cached.attach(loader(Words(), 2, collate_fn=lambda items: items))))
    beyond = DataLoader(Words(), batch_sampler=[[EpochIndex(-1, 0)]], collate_fn=pad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no sample -1: it has 0 to 6"):
        next(iter(cached.attach(beyond)))


def test_a_loader_of_another_class_is_not_guessed_at(tmp_path: Path) -> None:
    cache_teacher(nn.Linear(WIDTH, 2), loader(), tmp_path)
    with pytest.raises(ValueError, match="the loader is a OrderedLoader, which cannot be made again"):
        CachedTeacher(tmp_path).attach(with_epoch_order(loader(), 0))


def test_can_be_copied_and_sent(tmp_path: Path) -> None:
    cache_teacher(nn.Linear(WIDTH, 2), loader(), tmp_path)
    cached = CachedTeacher(tmp_path)
    assert copy.deepcopy([cached])[0] is cached
    first = next(iter(cached.attach(loader()))).cached_targets["logits"]
    again = pickle.loads(pickle.dumps(cached))
    assert torch.equal(next(iter(again.attach(loader()))).cached_targets["logits"], first)
