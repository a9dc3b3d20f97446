"""A cached teacher says what the live one says, and nothing else: whatever happens to its files."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from distill.cache import CachedBatch, CachedTeacher, cache, cache_teacher, open_teacher, store
from distill.cache.samples import digests
from distill.cache.sampling import draw, generator_for
from distill.cache.writing import write
from distill.losses import soft_target
from distill.teacher import Teacher
from workbench.checkpoints import compact
from workbench.data import Digits
from workbench.launcher.jobs import find_jobs
from workbench.models import MLP
from workbench.records.source import Source
from workbench.tasks import LanguageModelling
from workbench.training.order import EpochIndex, with_epoch_order

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


# What it says


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_comes_with_what_the_live_teacher_says(tmp_path: Path, workers: int) -> None:
    teacher = Teacher(RowByRow())
    assert cache_teacher(teacher, loader(), tmp_path, shard_size=8) == tmp_path
    cached = CachedTeacher(tmp_path, teacher)
    seen = []
    shuffled = loader(shuffle=True, num_workers=workers, drop_last=True, generator=torch.Generator().manual_seed(1))
    for made in cached.attach(shuffled):
        assert isinstance(made, CachedBatch)
        (x, y), taught = made
        assert list(taught) == ["logits"]
        assert torch.equal(taught["logits"], teacher(x))
        seen += x[:, 0].tolist()
        assert len(y) == 4
    assert len(set(seen)) == 20


def test_batches_and_order_are_the_loaders_own(tmp_path: Path) -> None:
    cache_teacher(MLP(WIDTH, [8], CLASSES), loader(), tmp_path)
    cached = CachedTeacher(tmp_path)
    plain = [x for x, _ in loader(shuffle=True, generator=torch.Generator().manual_seed(5))]
    attached = cached.attach(loader(shuffle=True, generator=torch.Generator().manual_seed(5)))
    assert all(torch.equal(x, taught.batch[0]) for x, taught in zip(plain, attached, strict=True))
    batches = [[3, 1], [0], [21, 20, 19]]
    again = cached.attach(DataLoader(samples(), batch_sampler=batches))  # type: ignore[arg-type]
    assert [len(taught.cached_targets["logits"]) for taught in again] == [2, 1, 3]


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
        (x, _), taught = next(iter(cached.attach(made, split)))
        assert torch.equal(taught["logits"], teacher(x))


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


def test_the_last_batch_is_filled_up(tmp_path: Path) -> None:
    network = Counting()
    teacher = Teacher(network)
    cache_teacher(teacher, loader(samples(count=10)), tmp_path)
    assert set(teacher.module.asked) == {4}
    found = next(iter(CachedTeacher(tmp_path).attach(loader(samples(count=10), 10)))).cached_targets["logits"]
    assert found.shape == (10, CLASSES)
    assert torch.allclose(found, network(samples(count=10).tensors[0]), atol=1e-6)
    few = samples(count=3)
    cache_teacher(teacher, loader(few), tmp_path / "few")
    assert len(next(iter(CachedTeacher(tmp_path / "few").attach(loader(few)))).cached_targets["logits"]) == 3


def test_samples_of_several_lengths_are_stored_without_padding(tmp_path: Path) -> None:
    teacher, data = Teacher(Speaking()), Words()
    cache_teacher(teacher, loader(data, 3, collate_fn=pad), tmp_path, features=["embed"], shard_size=3)
    cached = CachedTeacher(tmp_path)
    stored = [
        store.Shard(tmp_path / "train", part, store.entries_of(cached.describe())) for part in store.parts(7, 1, 3)
    ]
    assert sum(len(shard.tensors["logits"]) for shard in stored) == sum(Words.lengths)
    for collate in (pad, pad_left):
        made = CachedTeacher(tmp_path, verify=False).attach(loader(data, 4, shuffle=True, collate_fn=collate))
        for batch, taught in made:
            own = batch["attention_mask"].bool()
            live = teacher(batch["input_ids"], batch["attention_mask"])["logits"]
            assert torch.allclose(taught["logits"][own], live[own], atol=1e-6)
            assert taught["logits"].shape == live.shape
            assert not taught["logits"][~own].any()
            embedded = teacher.module.embed(batch["input_ids"])  # type: ignore[operator]
            assert torch.equal(taught["feature/embed"][own], embedded[own])


def test_features_and_no_logits(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": self.layer(x)}

    teacher = Teacher(Encoder())
    cache_teacher(teacher, loader(), tmp_path, features=["layer", "layer:input"])
    for (x, _), taught in CachedTeacher(tmp_path).attach(loader(drop_last=True)):
        assert set(taught) == {"feature/layer", "feature/layer:input"}
        assert torch.equal(taught["feature/layer"], teacher(x)["hidden"])
        assert torch.equal(taught["feature/layer:input"], x)
    with pytest.raises(ValueError, match="returned dict without logits: name features to keep, or wrap it"):
        cache_teacher(teacher, loader(), tmp_path / "other")


def test_a_task_reads_batches_and_leaves_outputs_to_who_reads_them(tmp_path: Path) -> None:
    class Backwards:
        def inputs(self, batch: Any) -> Any:
            return (batch[0].flip(1),), {}

        def output(self, raw: Any) -> Tensor:
            return raw * 2

    network: Any = MLP(WIDTH, [8], CLASSES)
    cache_teacher(network, loader(), tmp_path, task=Backwards())  # type: ignore[arg-type]
    (x, _), taught = next(iter(CachedTeacher(tmp_path).attach(loader())))
    assert torch.equal(taught["logits"], network(x.flip(1)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_kept_in_another_dtype_and_read_as_at_least_float32(tmp_path: Path, dtype: str) -> None:
    teacher = Teacher(MLP(WIDTH, [8], CLASSES))
    cache_teacher(teacher, loader(), tmp_path, dtype=dtype)
    (x, _), taught = next(iter(CachedTeacher(tmp_path).attach(loader())))
    kept = teacher(x).to(getattr(torch, dtype))
    assert taught["logits"].dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(taught["logits"].to(kept.dtype), kept)


def test_values_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'logits' has values beyond the range of float16: keep bfloat16 or float32"):
        cache_teacher(lambda x: 1e6 * x, loader(), tmp_path, dtype="float16")
    assert not list(tmp_path.rglob("*.safetensors"))


# Views


def test_each_view_has_answers_of_its_own(tmp_path: Path) -> None:
    teacher, data = Teacher(RowByRow()), Shaken(3)
    cache_teacher(teacher, loader(data, 11), tmp_path, shard_size=11)
    cached = CachedTeacher(tmp_path)
    assert len(cached.describe()["shards"]) == 6
    attached = with_epoch_order(cached.attach(loader(data, 11, shuffle=True)), seed=0)
    seen = set()
    for epoch in (0, 1, 2, 4):
        attached.batch_sampler.sampler.set_epoch(epoch)
        for (x, _), taught in attached:
            assert torch.equal(taught["logits"], teacher(x))
            seen |= set(x[:, 0].tolist())
    assert len(seen) == 3 * N


def test_a_data_set_that_is_random_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Noisy(Dataset):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(WIDTH) + (torch.rand(()) < 0.5), 0

    def masking(items: list[Any]) -> Any:
        x = torch.stack([item[0] for item in items])
        return x * (torch.rand_like(x) < 0.5), 0

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"Noisy gives another sample \d+ each time.*attribute 'views'"):
        cache_teacher(nn.Identity(), loader(Noisy()), tmp_path)
    with pytest.raises(ValueError, match="collate_fn makes another batch of the same samples each time"):
        cache_teacher(nn.Identity(), loader(collate_fn=masking), tmp_path)
    with pytest.raises(ValueError, match=r"Shaken has views=0, new ones every epoch.*give it a number of views"):
        cache_teacher(nn.Identity(), loader(Shaken(0)), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(tmp_path.iterdir())


def test_views_that_the_cache_does_not_have(tmp_path: Path) -> None:
    cache_teacher(nn.Linear(WIDTH, 3), loader(Shaken(2)), tmp_path)
    with pytest.raises(ValueError, match=r"stale.*another number of views \(2 there, 5 here\): cache again"):
        CachedTeacher(tmp_path).attach(loader(Shaken(5)))


# Sampled


def test_drawn_ids_are_what_a_naive_loop_counts() -> None:
    logits = torch.randn(7, 11)
    logits[2, 3:] = -torch.inf
    found = draw(logits, 40, generator_for(1, 2, 3))
    uniform = torch.rand(7, 40, dtype=torch.float64, generator=generator_for(1, 2, 3))
    at = 0
    for row, draws in zip(logits.double(), uniform):
        p = row.softmax(0)
        counted: dict[int, int] = {}
        for u in draws.tolist():
            total = p.tolist()[index := 0]
            while total <= u:
                total += p.tolist()[index := index + 1]
            counted[index] = counted.get(index, 0) + 1
        size = len(counted)
        assert dict(zip(found.ids[at : at + size].tolist(), found.counts[at : at + size].tolist())) == counted
        assert found.ids[at : at + size].tolist() == sorted(counted)
        assert torch.allclose(found.log_probs[at : at + size].double(), row.log_softmax(0)[sorted(counted)], atol=1e-6)
        at += size
    assert at == len(found.ids)
    assert torch.allclose(found.log_z, logits.logsumexp(1))
    assert found.sizes.sum() == at


def test_the_estimate_is_unbiased_where_the_largest_alone_are_not() -> None:
    """Over many draws the mean estimate of the cross-entropy and its gradient meets the exact one."""
    teacher, student = torch.randn(1, 50), torch.randn(50)
    p, log_q = teacher.softmax(1)[0], student.log_softmax(0)
    exact = -(p * log_q).sum()
    estimates, weights = [], torch.zeros(50)
    for trial in range(600):
        found = draw(teacher, 10, generator_for(0, trial, 0))
        weight = found.counts / 10
        estimates.append(-(weight * log_q[found.ids]).sum())
        weights[found.ids] += weight / 600
    spread = torch.stack(estimates).std() / 600**0.5
    assert abs(torch.stack(estimates).mean() - exact) < 4 * spread
    assert (weights - p).abs().max() < 0.02  # of which the gradient of the cross-entropy is linear
    top = p.topk(10)
    biased = -(top.values / top.values.sum() * log_q[top.indices]).sum()
    assert abs(biased - exact) > 4 * spread


@pytest.mark.parametrize("ragged", [True, False])
def test_drawn_ids_come_back_at_their_positions(tmp_path: Path, ragged: bool) -> None:
    if ragged:
        network: Any = Speaking()
        given = loader(Words(), 3, collate_fn=pad)
    else:
        network, given = nn.Unflatten(1, (2, 3)), loader()
    teacher, draws = Teacher(network), 5
    cache_teacher(teacher, given, tmp_path, store="sampled", samples=draws, seed=9, shard_size=3)
    found = CachedTeacher(tmp_path).attach(DataLoader(given.dataset, 2, collate_fn=given.collate_fn))
    at = 0
    for batch, taught in found:
        if ragged:
            live, own = teacher(batch["input_ids"], batch["attention_mask"])["logits"], batch["attention_mask"].bool()
        else:
            live = teacher(batch[0])
            own = torch.ones(live.shape[:2], dtype=torch.bool)
        assert set(taught) == {"ids", "weights", "log_probs", "log_z"}
        assert taught["ids"].dtype == torch.int64
        assert taught["ids"].shape == taught["weights"].shape == taught["log_probs"].shape
        assert torch.allclose(taught["weights"].sum(-1), own.float())
        assert torch.allclose(taught["log_z"][own], live.logsumexp(-1)[own], atol=1e-5)
        exact = live.log_softmax(-1).gather(-1, taught["ids"])
        real = taught["weights"] > 0
        assert torch.allclose(taught["log_probs"][real], exact[real], atol=1e-5)
        for row in range(len(live)):
            expected = draw(live[row][own[row]], draws, generator_for(9, at, 0))
            mine = real[row][own[row]]
            assert torch.equal(taught["ids"][row][own[row]][mine], expected.ids.long())
            at += 1


def test_ids_are_drawn_from_the_vocabulary_of_the_task_and_not_from_padded_rows(tmp_path: Path) -> None:
    network, task = Speaking(), LanguageModelling(vocabulary=8)
    with torch.no_grad():
        network.head.bias[8:] += 20.0  # where every draw would fall
    teacher, given = Teacher(network), loader(Words(), 3, collate_fn=pad_unlabelled)
    cache_teacher(teacher, given, tmp_path, store="sampled", samples=5, task=task)
    for batch, taught in CachedTeacher(tmp_path).attach(given):
        own, real = batch["attention_mask"].bool(), taught["weights"] > 0
        live = teacher(batch["input_ids"], batch["attention_mask"])["logits"][..., :8].log_softmax(-1)
        assert taught["ids"].max() < 8
        assert torch.allclose(taught["log_probs"][real], live.gather(-1, taught["ids"])[real], atol=1e-5)
        assert torch.allclose(taught["weights"].sum(-1)[own], torch.ones(()))
    with pytest.raises(ValueError, match="holds a cache of other shapes"):
        cache_teacher(teacher, given, tmp_path, store="sampled", samples=5, task=LanguageModelling(vocabulary=11))


def test_the_sampled_store_is_small(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(8, 2), torch.zeros(8))
    network = nn.Linear(2, 5000)
    sizes = {
        kind: write(network, loader(data), tmp_path / kind, store=kind, samples=32).bytes  # type: ignore[arg-type]
        for kind in ("full", "sampled")
    }
    assert sizes["sampled"] < sizes["full"] / 20


# Writing again, and killed


def test_a_call_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    network = Counting()
    teacher = Teacher(network)
    asked = teacher.module.asked
    real, calls = teacher.outputs, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:  # the first batch is asked once more, to see what there will be
            raise KeyboardInterrupt
        return real(*args)

    teacher.outputs = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(teacher, loader(), tmp_path, shard_size=4)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    with pytest.raises(ValueError, match="is not complete, it has 3 of 6 shards: call cache_teacher again as before"):
        CachedTeacher(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    asked.clear()
    done = write(teacher, loader(), tmp_path, shard_size=4)
    assert (done.reused, asked) == (3, [4] * 4)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    asked.clear()
    assert write(teacher, loader(), tmp_path).reused == 6
    assert asked == [4]
    for (x, _), taught in CachedTeacher(tmp_path).attach(loader(drop_last=True)):
        assert torch.equal(taught["logits"], network(x))


def test_a_killed_process_leaves_whole_shards(tmp_path: Path) -> None:
    code = f"""
        import os, signal, torch
        from torch.utils.data import DataLoader, TensorDataset
        from distill.cache import cache_teacher
        from distill.cache import store
        real = store.write_shard
        def killing(file, tensors):
            known = real(file, tensors)
            if file.name == "shard-00002.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)  # it is there, and the index does not know
            return known
        store.write_shard = killing
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 2)
        data = TensorDataset(torch.arange(30.0).reshape(10, 3), torch.zeros(10))
        cache_teacher(network, DataLoader(data, 2), {str(tmp_path)!r}, shard_size=2)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    torch.manual_seed(0)
    network, data = nn.Linear(3, 2), TensorDataset(torch.arange(30.0).reshape(10, 3), torch.zeros(10))
    (tmp_path / "train" / ".shard-00003.safetensors.1-2.tmp").write_bytes(b"half")
    assert write(network, loader(data, 2), tmp_path, shard_size=2).reused == 2
    assert not list(tmp_path.rglob("*.tmp"))
    (x, _), taught = next(iter(CachedTeacher(tmp_path).attach(loader(data, 2))))
    assert torch.equal(taught["logits"], network(x))


def test_damaged_and_missing_shards_are_written_again(tmp_path: Path) -> None:
    network = MLP(WIDTH, [8], CLASSES)
    cache_teacher(network, loader(), tmp_path, shard_size=4)
    files = sorted(tmp_path.rglob("*.safetensors"))
    content = [file.read_bytes() for file in files]
    files[0].write_bytes(content[0][:-1])
    files[1].write_bytes(content[1][:-1] + bytes([content[1][-1] ^ 1]))
    files[2].unlink()
    assert write(network, loader(), tmp_path).reused == 3
    assert [file.read_bytes() for file in files] == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": MLP(WIDTH, [8], CLASSES)}, "another teacher"),
        ({"precision": "bf16"}, r"the teacher's precision \(none there, bf16 here\)"),
        ({"data": samples(1)}, "another data set, transform or order of samples"),
        ({"data": samples(0, N - 1)}, r"another number of samples \(22 there, 21 here\)"),
        ({"batch_size": 5}, r"another batch size \(4 there, 5 here\)"),
        ({"features": ["layers.0"]}, "other features"),
        ({"store": "sampled"}, "another kind of store"),
        ({"dtype": "float16"}, r"another dtype \(none there, float16 here\)"),
        ({"collate_fn": lambda items: torch.utils.data.default_collate(items[::-1])}, "another collate_fn"),
    ],
)
def test_the_folder_of_another_cache_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    network = MLP(WIDTH, [8], CLASSES)
    cache_teacher(network, loader(), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    options = dict(change)
    teacher = Teacher(options.pop("teacher", network), options.pop("precision", None))
    given = loader(options.pop("data", None), collate_fn=options.pop("collate_fn", None))
    with pytest.raises(ValueError, match=f"holds a cache made with {message}.*choose another folder, or remove it"):
        cache_teacher(teacher, given, tmp_path, **options)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_another_sample_in_the_middle_is_noticed_when_going_on(tmp_path: Path) -> None:
    data = samples()
    cache_teacher(nn.Linear(WIDTH, 2), loader(data), tmp_path / "one", shard_size=4)
    torch.manual_seed(0)
    teacher = Teacher(nn.Linear(WIDTH, 2))
    cache_teacher(teacher, loader(data), tmp_path, shard_size=4)
    data.tensors[0][N - 1, 0] += 1
    with pytest.raises(ValueError, match="holds a cache made with another sample 21: choose another folder"):
        cache_teacher(teacher, loader(data), tmp_path, shard_size=4)


def test_a_function_is_known_by_what_it_answers(tmp_path: Path) -> None:
    scale = torch.ones(())

    def function(x: Tensor) -> Tensor:
        return x * scale

    cache_teacher(function, loader(), tmp_path)
    assert write(function, loader(), tmp_path).reused == 1
    scale += 1
    with pytest.raises(ValueError, match="a function that answers otherwise"):
        cache_teacher(function, loader(), tmp_path)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard-00000.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds other files and no cache.json: choose an empty folder"):
        cache_teacher(nn.Linear(WIDTH, 2), loader(), tmp_path)


# Stale, damaged and foreign


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A cache of words, so that it has everything that a cache can have."""
    cache_teacher(Speaking(), loader(Words(), 3, collate_fn=pad), tmp_path / "made", features=["embed"], shard_size=3)
    return tmp_path / "made"


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index of the cache, and seal it again as if that had been meant."""
    index = store.read_index(path / "train")
    change(index)
    plain = {name: value for name, value in index.items() if name != "sha256"}
    (path / "train" / "cache.json").write_text(json.dumps({**plain, "sha256": store._checksum(plain)}))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def test_a_shard_that_is_gone_or_cut_or_altered(made: Path) -> None:
    file = made / "train" / "shard-00001.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in (0, 12, header - 2, header, (header + len(content)) // 2, len(content) - 1):
        flip(file, place)
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors was altered: its SHA-256.*call cache_teacher"):
            CachedTeacher(made)
        file.write_bytes(content)
    for size in (0, 7, header, len(content) - 1):
        file.write_bytes(content[:size])
        for verify in (True, False):
            with pytest.raises(ValueError, match=f"has {size} bytes, {len(content)} expected: truncated"):
                CachedTeacher(made, verify=verify)
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing, and cache.json names it"):
        CachedTeacher(made)


def test_without_verifying_a_damaged_header_is_still_an_error(made: Path) -> None:
    file = made / "train" / "shard-00000.safetensors"
    content = file.read_bytes()
    for place in (0, 3, 7, 9, 30, 60):
        flip(file, place)
        attached = CachedTeacher(made, verify=False).attach(loader(Words(), 3, collate_fn=pad))
        with pytest.raises(
            ValueError, match=r"shard-00000.safetensors is not (a shard of a teacher cache|what cache.json says)"
        ):
            next(iter(attached))
        file.write_bytes(content)


def test_every_byte_of_the_index_counts(made: Path) -> None:
    file = made / "train" / "cache.json"
    content = file.read_bytes()
    for place in range(0, len(content) - 1, 7):
        if content[place : place + 1].isspace():
            continue
        flip(file, place)
        with pytest.raises(
            ValueError, match=r"cache.json (cannot be read|is not a|has version|was altered|is damaged)"
        ):
            CachedTeacher(made)
        file.write_bytes(content)
    for size in range(0, len(content) - 2, 50):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cannot be read as a teacher cache"):
            CachedTeacher(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format="safetensors"), "is not a teacher cache: its format is not"),
        (lambda index: index.update(version=2), "has version 2, this version reads 1: is a newer one needed"),
        (lambda index: index.update(shards={}), "'shards' is not a list"),
        (lambda index: index["fingerprint"].update(samples=10**13), "the number of samples is 10000000000000"),
        (lambda index: index["fingerprint"].update(views=-1), "the number of views is -1"),
        (lambda index: index.update(shard_size=0), "shard_size is 0"),
        (lambda index: index["shards"].pop(), "it has 2 of 3 shards and says that it is complete"),
        (lambda index: index["shards"][0].update(file="../../secret"), "is none of its shards"),
        (lambda index: index["shards"][0].update(bytes="many"), "lacks 'bytes' or 'sha256'"),
        (lambda index: index["entries"]["logits"].update(shape=[2**39, 2**39]), "out of range"),
        (lambda index: index["entries"]["logits"].update(shape=[-1]), "out of range"),
        (lambda index: index["entries"]["logits"].update(dtype="object"), "no known dtype"),
        (lambda index: index["entries"].update(logits=3), "is no entry"),
    ],
)
def test_an_index_that_makes_no_sense(made: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    rewrite(made, change)
    with pytest.raises(ValueError, match=message):
        CachedTeacher(made)


def test_shards_of_another_shape_than_the_index_says(made: Path) -> None:
    rewrite(made, lambda index: index["entries"]["logits"].update(shape=[12]))
    attached = CachedTeacher(made).attach(loader(Words(), 3, collate_fn=pad))
    with pytest.raises(ValueError, match=r"is not what cache.json says: 'logits' is \('F32', \(10, 11\)\) and not"):
        next(iter(attached))


def test_cuts_that_do_not_cut(made: Path) -> None:
    from safetensors.torch import load_file

    file = made / "train" / "shard-00000.safetensors"
    tensors = load_file(file)
    tensors["offsets"][1] = 99

    def known(index: dict[str, Any]) -> None:
        index["shards"][0] = store.write_shard(file, tensors)

    rewrite(made, known)
    with pytest.raises(ValueError, match="'offsets' does not cut up the 10 rows of 'logits'"):
        next(iter(CachedTeacher(made).attach(loader(Words(), 3, collate_fn=pad))))


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


class Typed:
    """What a tokenizer of transformers looks like from here."""

    def __init__(self, *words: str, padding: Any = None) -> None:
        self.backend_tokenizer = self
        self.words, self.padding = words, padding

    def to_str(self) -> str:
        return json.dumps({"model": self.words, "padding": self.padding, "truncation": None})


def test_another_data_set_transform_tokenizer_or_collate_fn(tmp_path: Path) -> None:
    data: Any = samples()
    data.tokenizer = Typed("a", "b")
    cache_teacher(nn.Linear(WIDTH, 2), loader(data), tmp_path)
    cached = CachedTeacher(tmp_path)
    cached.attach(loader())
    data.tokenizer = Typed("a", "b", padding={"length": 3})
    cached.attach(loader(data))
    data.tokenizer = Typed("b", "a")
    with pytest.raises(ValueError, match="stale, it was made with another tokenizer"):
        cached.attach(loader(data))
    with pytest.raises(ValueError, match=r"another number of samples \(22 there, 21 here\)"):
        cached.attach(loader(samples(0, 21)))
    with pytest.raises(ValueError, match="another data set, transform or order of samples"):
        cached.attach(loader(samples(1)))
    with pytest.raises(ValueError, match="another collate_fn"):
        cached.attach(loader(collate_fn=lambda items: torch.stack([x for x, _ in items])))


def test_every_sample_is_compared_when_it_is_looked_up(tmp_path: Path) -> None:
    data = samples()
    cache_teacher(nn.Linear(WIDTH, 2), loader(data), tmp_path)
    attached = CachedTeacher(tmp_path).attach(loader(data))
    data.tensors[0][20] *= 1 + 1e-6
    with pytest.raises(ValueError, match="sample 20 is not what the teacher was asked about"):
        list(attached)
    assert len(list(CachedTeacher(tmp_path, verify=False).attach(loader(data)))) == 6


def test_a_sample_or_a_length_that_the_cache_does_not_have(made: Path) -> None:
    def longer(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = pad(items, to=6)
        return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}

    cached = CachedTeacher(made, verify=False)
    with pytest.raises(ValueError, match="sample 0 has 6 positions in the batch and 3 in the cache: truncate as when"):
        next(iter(cached.attach(loader(Words(), 2, collate_fn=longer))))
    with pytest.raises(ValueError, match="samples of several lengths: the batch needs an attention_mask"):
        next(iter(cached.attach(loader(Words(), 2, collate_fn=lambda items: items))))
    beyond = DataLoader(Words(), batch_sampler=[[EpochIndex(-1, 0)]], collate_fn=pad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no sample -1: it has 0 to 6"):
        next(iter(cached.attach(beyond)))


# What is given to it


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([loader()], {}, "there are several loaders"),
        (samples(), {}, "the loader is a TensorDataset: give a LightningDataModule or a torch DataLoader"),
        (DataLoader(Endless()), {}, "Endless cannot be read by index"),
        (DataLoader(samples(), None), {}, r"does not make batches \(batch_size=None\)"),
        (DataLoader(samples(), batch_sampler=[[0]]), {}, "list does not say how large a batch is: give batch_size"),  # type: ignore[arg-type]
        (loader(samples(0, 0)), {}, "the train split is empty"),
        (Digits(), {"split": "training"}, "split is 'training': a data module has train, val, test"),
        (loader(), {"store": "top-k"}, "store is 'top-k': choose from full, sampled"),
        (loader(), {"store": "sampled", "samples": 0}, "samples is 0: draw at least 1"),
        (loader(), {"dtype": "int8"}, "dtype is 'int8': choose from float16"),
        (loader(), {"shard_size": 0}, "shard_size is 0: give at least 1"),
        (loader(), {"batch_size": -1}, "batch_size is -1: give at least 1"),
    ],
)
def test_wrong_arguments(tmp_path: Path, given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_teacher(nn.Linear(WIDTH, 2), given, tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_a_data_module_that_changes_batches_later_is_refused(tmp_path: Path, hook: str) -> None:
    """The teacher would be asked about other batches than the student gets."""

    def normalised(self: Any, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] / 16, batch[1])

    data: Any = type("Later", (Digits,), {hook: normalised})()
    with pytest.raises(ValueError, match=rf"Later changes batches in {hook}, .* data set or in collate_fn, or ask"):
        cache_teacher(nn.Linear(64, 10), data, tmp_path)
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'logits' is torch.float32 \[\] for a batch of 4: only numbers with a row"):
        cache_teacher(lambda x: x.sum(), loader(), tmp_path)
    with pytest.raises(ValueError, match=r"'logits' is torch.int64 \[4\]"):
        cache_teacher(lambda x: x.argmax(1), loader(), tmp_path)
    growing = iter(range(2, 100))
    with pytest.raises(ValueError, match=r"'logits' is float32 \[\d\] a sample in one batch and float32 \[2\] a"):
        cache_teacher(lambda x: torch.zeros(len(x), next(growing)), loader(), tmp_path)


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


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_digest_is_of_the_values_of_one_sample(kind: type) -> None:
    x, y = torch.randn(5, 3, dtype=torch.bfloat16), torch.arange(5)
    batch = {"x": x, "y": y} if kind is dict else (x, y)
    first = digests(batch, 5)
    assert len({tuple(row) for row in first.tolist()}) == 5
    x[3, 1] += 1
    changed = (digests(batch, 5) != first).any(1)
    assert changed.tolist() == [False, False, False, True, False]
    items = [{"ids": [1, 2], "text": "a", "more": [torch.ones(2), None]}, {"ids": [1, 2], "text": "b"}]
    one, other = digests(items, 2)
    assert not torch.equal(one, other)
    assert torch.equal(digests(copy.deepcopy(items), 2)[1], other)


# The job


def test_a_stage_writes_a_cache_that_another_names_as_its_teacher(tmp_path: Path) -> None:
    network, data = MLP(64, [8], 10), Digits(batch_size=100)
    compact.save(network, tmp_path / "teacher" / "compact")
    out = tmp_path / "cached"
    result = cache(Source(tmp_path / "teacher"), data, splits=["train", "val"], precision="bf16", out=out)
    assert json.loads(json.dumps(result)) == result
    assert result["samples"] == 1257 + 180
    assert result["bytes"] == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert result["rate"] > 0
    assert sorted(os.listdir(out / "cache")) == ["train", "val"]
    opened = open_teacher(Source(out))
    assert isinstance(opened, CachedTeacher)
    (x, _), taught = next(iter(opened.attach(data.train_dataloader())))
    assert torch.allclose(taught["logits"], network(x), atol=0.3)
    assert F.cosine_similarity(taught["logits"], network(x)).min() > 0.99
    assert isinstance(open_teacher(tmp_path / "teacher", precision="int8"), Teacher)
    with pytest.raises(ValueError, match=r"precision is given, but .* is a cache: give it where the cache is made"):
        open_teacher(out, precision="bf16")
    with pytest.raises(ValueError, match="is a cache, not a network"):
        Teacher(out)


def test_the_job_is_found_and_described() -> None:
    job = find_jobs()["cache"]
    assert [parameter.name for parameter in job.parameters if not parameter.description] == []
    assert {parameter.name for parameter in job.parameters} >= {"teacher", "data", "features", "store", "splits"}
