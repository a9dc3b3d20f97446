import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from prune.connectivity import barrier, recalibrate_batch_norms, temporary_states
from tests.helpers.ranks import on_ranks


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(36, 5),
        nn.BatchNorm1d(5, affine=False), nn.BatchNorm1d(5, track_running_stats=False),
    )  # fmt: skip


def images(batches: int = 3) -> list[Any]:
    torch.manual_seed(2)
    return [(torch.randn(6 + i, 2, 5, 5), torch.zeros(6 + i)) for i in range(batches)]


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "memory": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "momenta": [getattr(module, "momentum", None) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_statistics_are_those_of_torch() -> None:
    ours, peers = net().eval(), net()
    update_bn(images(), peers)
    assert recalibrate_batch_norms(ours, images()) == 2
    for name, value in peers.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)


def test_nothing_but_statistics_changes_and_dropout_draws_nothing() -> None:
    model, shown = net(0.5), images()
    model[1].eval()
    before = everything(model)
    recalibrate_batch_norms(model, shown)
    first = everything(model)
    recalibrate_batch_norms(model, shown)
    assert_same(first, everything(model))
    assert not torch.equal(first["state"]["1.running_mean"], before["state"]["1.running_mean"])
    for state in (first["state"], before["state"]):
        for name in [name for name in state if "running" in name or "tracked" in name]:
            del state[name]
    assert_same(before, first)


def test_a_network_without_statistics_reads_no_batch() -> None:
    def never() -> Any:
        raise AssertionError("read")
        yield

    assert recalibrate_batch_norms(nn.Linear(2, 2), never()) == 0
    with pytest.raises(ValueError, match="the loader is empty"):
        recalibrate_batch_norms(net(), [])


class Scaled(nn.Module):
    """BatchNorm(w x): x for every w that the statistics belong to."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(1, affine=False, eps=1e-300).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.weight * x)


def test_the_barrier_that_interpolated_statistics_make_is_gone_with_statistics_estimated_anew() -> None:
    """Weights 1 and 3, variances 1 and 9: in the middle 2 and 5, and outputs 2 / sqrt 5 of what they should be."""
    x = torch.randn(50, 1, dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    a, b = Scaled(1.0), Scaled(3.0)
    for model in (a, b):
        recalibrate_batch_norms(model, [x])

    def error(model: nn.Module) -> float:
        return (model.eval()(x) - x).square().mean().item() / x.square().mean().item()

    with temporary_states(a) as load:
        stale = barrier(lambda state: error(load(state)), a.state_dict(), b.state_dict(), points=3)
    with temporary_states(a, recalibrate=[x]) as load:
        fresh = barrier(lambda state: error(load(state)), a.state_dict(), b.state_dict(), points=3)
    assert stale.heights == pytest.approx([0, (1 - 2 / 5**0.5) ** 2, 0], abs=1e-15)
    assert fresh.heights == pytest.approx([0, 0, 0], abs=1e-15)


@pytest.mark.parametrize("recalibrate", [None, images()], ids=["as it is", "estimated anew"])
def test_the_network_comes_back_also_after_an_exception(recalibrate: Any) -> None:
    model, other = net(), net()
    model[0].eval()
    with torch.no_grad():
        for value in other.state_dict().values():
            value.add_(1)
        model[0].bias[0] = torch.nan
    before, state = everything(model), copy.deepcopy(other.state_dict())
    with contextlib.suppress(KeyError), temporary_states(model, recalibrate) as load:
        assert load(state) is model
        assert torch.equal(model[0].weight, other[0].weight)
        assert torch.equal(model[1].running_var, other[1].running_var) == (recalibrate is None)
        model.eval()
        raise KeyError
    assert_same(before, everything(model))
    assert_same({"state": state}, {"state": dict(other.state_dict())})


def test_a_state_of_another_network_is_refused() -> None:
    model = net()
    before = everything(model)
    with pytest.raises(ValueError, match="the state does not fit Sequential"), temporary_states(model) as load:
        load({"weight": torch.ones(1)})
    assert_same(before, everything(model))


def parts(shared: list[Any]) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    model, rank = net(), torch.distributed.get_rank()
    recalibrate_batch_norms(model, shared[:1] if rank == 0 else shared[1:])
    return {name: value.tolist() for name, value in model.state_dict().items()}


def test_batches_of_all_ranks_count_alike() -> None:
    alone = net()
    recalibrate_batch_norms(alone, images())
    for found in on_ranks(parts, images()):
        for name in [name for name in found if "running" in name]:
            assert torch.tensor(found[name]) == pytest.approx(alone.state_dict()[name], rel=1e-5)
