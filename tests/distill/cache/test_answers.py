"""What is stored of the teacher: logits, features, sampled ids, at every valid position."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distill.cache import CachedTeacher, cache_teacher, store
from distill.cache.sampling import draw, generator_for
from distill.cache.writing import write
from distill.teacher import Teacher
from tests.helpers.cache_data import CLASSES, WIDTH, Speaking, Words, loader, pad, pad_left, pad_unlabelled
from workbench.models import MLP
from workbench.tasks import Binary, LanguageModelling, OutputType


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
        for batch, targets in made:
            own = batch["attention_mask"].bool()
            live = teacher(batch["input_ids"], batch["attention_mask"])["logits"]
            assert torch.allclose(targets["logits"][own], live[own], atol=1e-6)
            assert targets["logits"].shape == live.shape
            assert not targets["logits"][~own].any()
            embedded = teacher.module.embed(batch["input_ids"])  # type: ignore[operator]
            assert torch.equal(targets["feature/embed"][own], embedded[own])


def test_features_and_no_logits(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": self.layer(x)}

    teacher = Teacher(Encoder())
    cache_teacher(teacher, loader(), tmp_path, features=["layer", "layer:input"])
    for (x, _), targets in CachedTeacher(tmp_path).attach(loader(drop_last=True)):
        assert set(targets) == {"feature/layer", "feature/layer:input"}
        assert torch.equal(targets["feature/layer"], teacher(x)["hidden"])
        assert torch.equal(targets["feature/layer:input"], x)
    with pytest.raises(ValueError, match="returned dict without logits: name features to keep, or say by"):
        cache_teacher(teacher, loader(), tmp_path / "other")


def test_a_task_reads_batches_and_leaves_outputs_to_the_reader(tmp_path: Path) -> None:
    class Backwards:
        outputs = OutputType("classes")

        def inputs(self, batch: Any) -> Any:
            return (batch[0].flip(1),), {}

        def output(self, raw: Any) -> Tensor:
            return raw * 2

    network: Any = MLP(WIDTH, [8], CLASSES)
    cache_teacher(network, loader(), tmp_path, task=Backwards())  # type: ignore[arg-type]
    (x, _), targets = next(iter(CachedTeacher(tmp_path).attach(loader())))
    assert torch.equal(targets["logits"], network(x.flip(1)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_kept_in_another_dtype_and_read_as_at_least_float32(tmp_path: Path, dtype: str) -> None:
    teacher = Teacher(MLP(WIDTH, [8], CLASSES))
    cache_teacher(teacher, loader(), tmp_path, dtype=dtype)
    (x, _), targets = next(iter(CachedTeacher(tmp_path).attach(loader())))
    kept = teacher(x).to(getattr(torch, dtype))
    assert targets["logits"].dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(targets["logits"].to(kept.dtype), kept)


def test_values_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'logits' has values beyond the range of float16: keep bfloat16 or float32"):
        cache_teacher(lambda x: 1e6 * x, loader(), tmp_path, dtype="float16")
    assert not list(tmp_path.rglob("*.safetensors"))


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
    for batch, targets in found:
        if ragged:
            live, own = teacher(batch["input_ids"], batch["attention_mask"])["logits"], batch["attention_mask"].bool()
        else:
            live = teacher(batch[0])
            own = torch.ones(live.shape[:2], dtype=torch.bool)
        assert set(targets) == {"ids", "weights", "log_probs", "log_z"}
        assert targets["ids"].dtype == torch.int64
        assert targets["ids"].shape == targets["weights"].shape == targets["log_probs"].shape
        assert torch.allclose(targets["weights"].sum(-1), own.float())
        assert torch.allclose(targets["log_z"][own], live.logsumexp(-1)[own], atol=1e-5)
        exact = live.log_softmax(-1).gather(-1, targets["ids"])
        real = targets["weights"] > 0
        assert torch.allclose(targets["log_probs"][real], exact[real], atol=1e-5)
        for row in range(len(live)):
            expected = draw(live[row][own[row]], draws, generator_for(9, at, 0))
            mine = real[row][own[row]]
            assert torch.equal(targets["ids"][row][own[row]][mine], expected.ids.long())
            at += 1


def test_ids_are_drawn_from_the_vocabulary_of_the_task_and_not_from_padded_rows(tmp_path: Path) -> None:
    network, task = Speaking(), LanguageModelling(vocabulary=8)
    with torch.no_grad():
        network.head.bias[8:] += 20.0  # where every draw would fall
    teacher, given = Teacher(network), loader(Words(), 3, collate_fn=pad_unlabelled)
    cache_teacher(teacher, given, tmp_path, store="sampled", samples=5, task=task)
    for batch, targets in CachedTeacher(tmp_path).attach(given):
        own, real = batch["attention_mask"].bool(), targets["weights"] > 0
        live = teacher(batch["input_ids"], batch["attention_mask"])["logits"][..., :8].log_softmax(-1)
        assert targets["ids"].max() < 8
        assert torch.allclose(targets["log_probs"][real], live.gather(-1, targets["ids"])[real], atol=1e-5)
        assert torch.allclose(targets["weights"].sum(-1)[own], torch.ones(()))
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


def test_outputs_that_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'logits' is torch.float32 \[\] for a batch of 4: only numbers with a row"):
        cache_teacher(lambda x: x.sum(), loader(), tmp_path)
    with pytest.raises(ValueError, match=r"'logits' is torch.int64 \[4\]"):
        cache_teacher(lambda x: x.argmax(1), loader(), tmp_path)
    growing = iter(range(2, 100))
    with pytest.raises(ValueError, match=r"'logits' is float32 \[\d\] a sample in one batch and float32 \[2\] a"):
        cache_teacher(lambda x: torch.zeros(len(x), next(growing)), loader(), tmp_path)


def test_logits_of_a_form_of_its_own_are_stored(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.layer(x)}

    network = Named()
    cache_teacher(Teacher(network, logits="scores"), loader(), tmp_path)
    for (x, _), targets in CachedTeacher(tmp_path).attach(loader(drop_last=True)):
        assert torch.equal(targets["logits"], network(x)["scores"])


@pytest.mark.parametrize(("outputs", "task"), [(1, None), (5, Binary())])
def test_only_classes_are_sampled(tmp_path: Path, outputs: int, task: Any) -> None:
    with pytest.raises(ValueError, match="only classes along the last axis"):
        cache_teacher(nn.Linear(WIDTH, outputs), loader(), tmp_path, store="sampled", task=task)
