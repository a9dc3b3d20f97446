"""Teachers that are asked; the largest part is of weights spread over processes: FSDP2 on two of them, over gloo."""

import functools
import os
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from distill import DistillationCallback, Teacher, capture, losses
from distill.losses import Hint, SoftTarget
from distill.objective import Term
from distill.targets import as_teacher, targets_of
from distill.teacher import eval_mode
from tests.helpers.ranks import on_ranks

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
SIZE = 16


def network(seed: int, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))


def data() -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(SIZE, 6), torch.randint(0, 4, (SIZE,)))


def batches() -> DataLoader:
    """Those of this rank: with those of the others they are the batches of one process that is alone."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return DataLoader(Subset(data(), range(rank, SIZE, ranks)), 8 // ranks)


def sharded(module: nn.Module, mesh: Any) -> nn.Module:
    for layer in module:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def whole(module: nn.Module) -> list[Any]:
    return [getattr(each, "full_tensor", lambda each=each: each)().detach().tolist() for each in module.parameters()]


def looped(student: nn.Module, teacher: Teacher) -> None:
    optimizer = SGD(student.parameters())
    for _ in range(2):
        for x, y in batches():
            with capture(student, "2") as features:
                logits = student(x)
                mine = features.take()["2"]
            taught, theirs = teacher.outputs((x,), {}, ["2"])
            loss = losses.mix(losses.soft_target(logits, taught), nn.functional.cross_entropy(logits, y), 0.7)
            (loss + 0.1 * losses.hint(mine, theirs["2"])).backward()
            optimizer.step()
            optimizer.zero_grad()


def _averaged(apart: bool) -> Any:
    torch.distributed.init_process_group("gloo")
    student, teacher = network(1), Teacher(network(2))
    sharded(student, init_device_mesh("cpu", (2,)))
    if apart:
        sharded(teacher.module, DeviceMesh.from_group(torch.distributed.new_group(), "cpu"))
        assert all(isinstance(each, DTensor) for each in teacher.module.parameters())
    looped(student, teacher)
    assert all(each.to_local().numel() < each.numel() for each in student.parameters())
    return whole(student)


@pytest.mark.parametrize("apart", [False, True], ids=["teacher whole", "teacher sharded apart"])
def test_a_sharded_student_in_a_bare_loop(apart: bool) -> None:
    one, other = on_ranks(_averaged, apart)
    assert one == other
    alone = network(1)
    looped(alone, Teacher(network(2)))
    for found, expected in zip(one, alone.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(found), expected.detach())
    assert not torch.allclose(alone[0].weight, network(1)[0].weight, atol=1e-3)


class Theirs(lp.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = network(1, width=6)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            sharded(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters())


TERMS = {"soft": Term(SoftTarget(), 0.7), "hard": Term(None, 0.3), "hint": Term(Hint(), 0.1, "2")}


def _called(mesh: bool) -> Any:
    torch.manual_seed(3)
    teacher = Teacher(network(2))
    module, callback = Theirs(), DistillationCallback(teacher, losses=TERMS)
    options: dict[str, Any] = {}
    if mesh:
        options = {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "devices": 2}
        torch.distributed.init_process_group("gloo")
        sharded(teacher.module, DeviceMesh.from_group(torch.distributed.new_group(), "cpu"))
    names = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "use_distributed_sampler")
    quiet: dict[str, Any] = dict.fromkeys(names, False)
    trainer = lp.Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], **quiet, **options)
    trainer.fit(module, batches())
    assert all(isinstance(each, DTensor) == mesh for net in (module, teacher.module) for each in net.parameters())
    return whole(module) + whole(callback.objective)


def test_a_callback_with_model_parallelism() -> None:
    """Projectors too, which are not sharded."""
    one, other = on_ranks(_called, True)
    assert one == other
    for found, expected in zip(one, _called(False), strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_a_teacher_is_asked_without_labels_and_a_cache_recalls() -> None:
    given: list[Any] = []

    def ask(x: Tensor, **named: Any) -> dict[str, Tensor]:
        given.append(set(named))
        return {"logits": x}

    logits = torch.randn(2, 3, 4)
    live = targets_of(Teacher(ask), (logits,), {"mask": 1, "labels": 2}, score=lambda z: z[:, :-1])
    assert given == [{"mask"}]
    cached = targets_of(Teacher(ask), (), {}, {"logits": logits, "feature/a.0": logits}, score=lambda z: z[:, :-1])
    for found in (live, cached):
        assert found.logits is not None
        assert torch.equal(found.logits, logits[:, :-1])
    assert set(cached.features) == {"a.0"}
    sample = {name: logits + place for place, name in enumerate(("ids", "weights", "log_probs"))}
    drawn = targets_of(Teacher(ask), (), {}, sample, score=lambda z: z[:, :-1])
    assert drawn.logits is None
    assert drawn.sample is not None
    assert all(torch.equal(each, logits[:, :-1] + place) for place, each in enumerate(drawn.sample))
    assert len(given) == 1


def test_a_cache_without_what_is_wanted_is_told_from_one_with_it() -> None:
    teacher, feature = Teacher(network(1)), torch.randn(2, 8)
    kept = {"feature/2": feature}
    found = targets_of(teacher, (), {}, kept, ["2"], logits=False)
    assert found.logits is None
    assert torch.equal(found.features["2"], feature)
    with pytest.raises(ValueError, match=r"cache has no logits, .* only feature/2: cache a teacher that"):
        targets_of(teacher, (), {}, kept)
    logits = {"logits": torch.randn(2, 4)}
    with pytest.raises(
        ValueError, match=r"has features of nothing and not of '2': cache again with features: \['2', 'layer.\*'\]"
    ):
        targets_of(teacher, (), {}, logits, ["2", "layer.*"])
    # Of a module's output and its input one may be there and the other not.
    with pytest.raises(ValueError, match=r"has features of 2 and not of '2:input'"):
        targets_of(teacher, (), {}, logits | kept, ["2", "2:input"])
    assert set(targets_of(teacher, (), {}, logits | kept, ["*"]).features) == {"2"}


def test_what_is_no_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="the teacher returned list without logits"):
        targets_of(Teacher(list), (), {})


def test_modes_of_all_parts_come_back_also_after_an_exception() -> None:
    module = network(1)
    module[1].eval()
    before = [part.training for part in module.modules()]

    def fail() -> None:
        assert not any(part.training for part in module.modules())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), eval_mode(module):
        fail()
    assert [part.training for part in module.modules()] == before
    assert {True, False} == set(before)


def test_where_the_logits_are_is_said_once() -> None:
    given = Teacher(nn.Linear(3, 2))
    named = as_teacher(given, "scores")
    assert isinstance(named, Teacher)
    assert (named.logits, given.logits) == ("scores", None)
    assert as_teacher(named, "scores").logits == "scores"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="teacher_logits is 'other', and the teacher's own logits 'scores': give one"):
        as_teacher(named, "other")
