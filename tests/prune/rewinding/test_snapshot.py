import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from prune.rewinding.snapshot import PARTS, Restored, Snapshot, random_state, set_random_state
from tests.helpers.ranks import on_ranks

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "adam, lr a tensor": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01), foreach=False),
    "adam, fused": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
    "adafactor": functools.partial(torch.optim.Adafactor, lr=0.01),
    "lbfgs": functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=2, history_size=2),
}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3))


def scheduler(optimizer: Any) -> LRScheduler:
    return CosineAnnealingLR(optimizer, 20)


class Loop:
    """A bare loop with everything that a snapshot holds."""

    def __init__(self, optimizer: Any = OPTIMIZERS["sgd"], scheduler: Any = scheduler, scale: bool = False) -> None:
        self.model = net()
        self.optimizer = optimizer(self.model.parameters())
        self.scheduler = scheduler(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, enabled=scale)

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.scheduler, self.scaler

    def run(self, steps: int) -> list[float]:
        losses: list[float] = []
        for _ in range(steps):
            x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
            x += random.random() + numpy.random.rand()  # noqa: NPY002 - the global one

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                self.optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.model(x), y)
                self.scaler.scale(loss).backward()
                return loss

            if self.scaler.is_enabled():
                losses.append(closure().item())
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                losses.append(self.optimizer.step(closure).item())
            plateau = isinstance(self.scheduler, ReduceLROnPlateau)
            self.scheduler.step(losses[-1]) if plateau else self.scheduler.step()
        return losses

    def bits(self) -> list[Tensor]:
        return [value.clone() for value in self.model.state_dict().values()]


def alike(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def equal(one: Any, other: Any) -> bool:
    """Nested containers of tensors and values."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_three_restores_in_a_row_give_the_same_bits(name: str, at: int) -> None:
    """Lightning's ModelPruning aliases its point: by the third reset its "initial" weights had drifted by 0.127."""
    loop = Loop(OPTIMIZERS[name])
    loop.run(at)
    snapshot, initial = Snapshot.take(*loop.parts()), loop.bits()
    runs = []
    for _ in range(4):
        assert alike(loop.bits(), initial)
        runs.append((loop.run(4), loop.bits()))
        assert not alike(loop.bits(), initial)
        assert snapshot.restore(*loop.parts()) == Restored(PARTS, ())
    assert all(losses == runs[0][0] and alike(bits, runs[0][1]) for losses, bits in runs)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: ReduceLROnPlateau(o, factor=0.5, patience=1),
        lambda o: OneCycleLR(o, 0.2, 20),
        lambda o: SequentialLR(o, [CosineAnnealingLR(o, 3), CosineAnnealingLR(o, 9)], [3]),
    ],
    ids=["plateau", "one cycle", "sequential"],
)
def test_schedulers_go_back(make: Any) -> None:
    loop = Loop(scheduler=make)
    loop.run(2)
    snapshot = Snapshot.take(*loop.parts())
    runs = []
    for _ in range(3):
        losses = loop.run(5)
        runs.append((losses, copy.deepcopy(loop.optimizer.state_dict()["param_groups"]), loop.bits()))
        snapshot.restore(*loop.parts())
    assert all(run[:2] == runs[0][:2] and alike(run[2], runs[0][2]) for run in runs)


def test_a_gradient_scaler_goes_back() -> None:
    loop = Loop(scale=True)
    loop.run(2)
    snapshot = Snapshot.take(*loop.parts())
    scale = loop.scaler.get_scale()
    first = (loop.run(3), loop.scaler.state_dict())
    assert loop.scaler.get_scale() != scale
    snapshot.restore(*loop.parts())
    assert loop.scaler.get_scale() == scale
    assert (loop.run(3), loop.scaler.state_dict()) == first


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_new_objects_go_on_like_the_old_ones(name: str) -> None:
    """Their optimizer has no state yet; and the state dict of one snapshot makes another."""
    loop = Loop(OPTIMIZERS[name])
    loop.run(3)
    snapshot = Snapshot.take(*loop.parts())
    losses, bits = loop.run(4), loop.bits()
    again = Snapshot()
    again.load_state_dict(snapshot.state_dict())
    assert again.what == PARTS
    for point in (snapshot, again):
        other = Loop(OPTIMIZERS[name])
        point.restore(*other.parts())
        assert other.run(4) == losses
        assert alike(other.bits(), bits)


def test_a_file_carries_it(tmp_path: Any) -> None:
    """Tensors and plain values only: ``weights_only`` reads them."""
    loop = Loop(OPTIMIZERS["adamw"])
    loop.run(2)
    torch.save(Snapshot.take(*loop.parts()).state_dict(), tmp_path / "point")
    losses, bits = loop.run(3), loop.bits()
    snapshot = Snapshot()
    snapshot.load_state_dict(torch.load(tmp_path / "point", weights_only=True))
    snapshot.restore(*loop.parts())
    assert loop.run(3) == losses
    assert alike(loop.bits(), bits)


def test_state_that_was_not_there_is_removed() -> None:
    loop = Loop(OPTIMIZERS["adamw"])
    fresh = copy.deepcopy(loop.optimizer.state_dict())
    snapshot = Snapshot.take(*loop.parts())
    loop.run(3)
    loop.optimizer.param_groups[0]["extra"] = 1
    snapshot.restore(*loop.parts())
    assert loop.optimizer.state_dict() == fresh
    assert not loop.optimizer.state


def test_tensors_stay_where_they_are() -> None:
    """What holds a reference (a graph, a fused step, a data-parallel wrapper) sees the values that come back."""
    loop = Loop(OPTIMIZERS["adamw"])
    loop.run(2)
    snapshot = Snapshot.take(*loop.parts())
    held = [*loop.model.parameters(), *loop.model.buffers()]
    held += [value for state in loop.optimizer.state.values() for value in state.values()]
    places, values = [t.data_ptr() for t in held], [t.detach().clone() for t in held]
    loop.run(2)
    snapshot.restore(*loop.parts())
    assert [t.data_ptr() for t in held] == places
    assert alike([t.detach() for t in held], values)
    kept = {t.data_ptr() for t in snapshot.state_dict()["weights"].values()}
    assert not kept & set(places)


def test_every_random_number_comes_again() -> None:
    snapshot = Snapshot.take(net())

    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(0, 1), float(numpy.random.randn()), float(torch.rand(()))  # noqa: NPY002

    first = draw()
    snapshot.restore(net())
    assert draw() == first
    without = Snapshot.take(net(), rng=False)
    assert without.what == ("weights", "buffers")
    state = random_state()
    without.restore(net())
    drawn = draw()
    set_random_state(state)
    assert draw() != first
    assert drawn != first


@given(st.sets(st.sampled_from(PARTS)))
@settings(max_examples=25, deadline=None)
def test_parts_are_restored_and_no_others(parts: set[str]) -> None:
    loop = Loop(OPTIMIZERS["adamw"], scale=True)
    loop.run(1)
    before = Snapshot.take(*loop.parts())
    loop.run(2)
    after = Snapshot.take(*loop.parts())
    done = before.restore(*loop.parts(), parts=parts)
    assert done.rewound == tuple(part for part in PARTS if part in parts)
    assert done.kept == tuple(part for part in PARTS if part not in parts)
    now = Snapshot.take(*loop.parts()).state_dict()
    for part in PARTS:
        assert equal(now[part], (before if part in parts else after).state_dict()[part]), part


def test_what_is_not_given_is_said_to_be_kept() -> None:
    loop = Loop()
    snapshot = Snapshot.take(*loop.parts(), rng=False)
    assert repr(snapshot) == "Snapshot(weights, buffers, optimizers, schedulers, scaler)"
    assert snapshot.restore(loop.model, loop.optimizer) == Restored(
        ("weights", "buffers", "optimizers"), ("schedulers", "scaler", "random")
    )


def test_several_optimizers_and_schedulers() -> None:
    model = net()
    optimizers = [OPTIMIZERS["sgd"](model[0].parameters()), OPTIMIZERS["adamw"](model[4].parameters())]
    schedulers = [scheduler(each) for each in optimizers]

    def step() -> None:
        model(torch.randn(4, 5)).square().mean().backward()
        for each in (*optimizers, *schedulers):
            each.step()

    step()
    snapshot = Snapshot.take(model, optimizers, schedulers)
    runs = []
    for _ in range(3):
        step()
        runs.append([value.clone() for value in model.state_dict().values()])
        model.zero_grad()
        snapshot.restore(model, optimizers, schedulers)
    assert all(alike(run, runs[1]) for run in runs[1:])  # the first had gradients of before


def test_a_snapshot_elsewhere() -> None:
    loop = Loop()
    loop.run(1)
    snapshot = Snapshot.take(*loop.parts(), device=None)
    bits = loop.bits()
    loop.run(1)
    snapshot.restore(*loop.parts())
    assert alike(loop.bits(), bits)


def test_wrapped_optimizers_are_unwrapped() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    loop = Loop(OPTIMIZERS["adamw"])
    loop.run(1)
    snapshot = Snapshot.take(loop.model, Wrapper(loop.optimizer))
    loop.run(1)
    snapshot.restore(loop.model, Wrapper(loop.optimizer))
    assert float(loop.optimizer.state[loop.model[0].weight]["step"]) == 1


def test_mistakes_are_named_before_anything_is_written() -> None:
    loop = Loop()
    loop.run(1)
    snapshot = Snapshot.take(loop.model, loop.optimizer, rng=False)
    loop.run(1)
    bits = loop.bits()
    wider = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Dropout(0.3), nn.Linear(9, 3))
    two_groups = torch.optim.SGD([{"params": p} for p in loop.model.parameters()], lr=0.1)
    mistakes: list[tuple[Callable[[], Any], str]] = [
        (lambda: snapshot.restore(wider), r"'0\.weight' has shape \(8, 5\) in the snapshot and \(9, 5\) in the model"),
        (
            lambda: snapshot.restore(loop.model[:4]),
            r"only the snapshot has '4\.bias' \(nearest .*1\.bias",
        ),
        (lambda: snapshot.restore(nn.Sequential(*loop.model, nn.Linear(3, 1))), "only the model has '5.bias'"),
        (
            lambda: snapshot.restore(loop.model, [loop.optimizer] * 2),
            "2 optimizers are given, but the snap",
        ),
        (lambda: snapshot.restore(loop.model, two_groups), r"SGD has groups of \[1, 1, 1, 1, 1, 1\] parameters"),
        (lambda: snapshot.restore(loop.model, None, loop.scheduler), "the snapshot holds no schedulers, only"),
        (lambda: snapshot.restore(loop.model, parts=["weight"]), r"parts has \['weight'\], but the snapshot holds"),
        (lambda: snapshot.restore(loop.model, parts="optimizers"), "was not given any"),
        (lambda: Snapshot().load_state_dict({"model": {}}), r"a state of \['model'\] is not that of a Snapshot"),
        (lambda: Snapshot.take(nn.Linear(2, 2, device="meta")), "'weight' has no values yet"),
        (lambda: Snapshot.take(nn.LazyLinear(2)), "'weight' has no values yet"),
    ]
    for mistake, said in mistakes:
        with pytest.raises(ValueError, match=said):
            mistake()
    with pytest.raises(TypeError, match="Linear is not an optimizer"):
        Snapshot.take(loop.model, loop.model[0])
    loop.optimizer.state["global"] = {"k": 1}
    with pytest.raises(ValueError, match="SGD keeps state under 'global', which is none of its parameters"):
        Snapshot.take(loop.model, loop.optimizer)
    assert alike(loop.bits(), bits)


def sharded() -> list[list[float]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(4, 5)

    def step() -> list[float]:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return [float(loss), *model[0].weight.full_tensor().flatten().tolist()]

    step()
    snapshot = Snapshot.take(model, optimizer)
    runs = []
    for made in (optimizer, optimizer, torch.optim.AdamW(model.parameters(), lr=0.1)):
        snapshot.restore(model, made)
        optimizer = made
        step()
        runs.append(step())
    assert snapshot.state_dict()["weights"]["0.weight"].shape == model[0].weight.to_local().shape
    return runs


def test_every_rank_holds_its_shards() -> None:
    one, other = on_ranks(sharded)
    assert one == other
    assert one[0] == one[1] == one[2]
