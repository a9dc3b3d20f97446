import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from prune.accounting import Comparison, Latency, account, compare_latency, latency

BATCH = 3


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4, bias=False))


def measured() -> list[Any]:
    return [
        lambda model: account(model, torch.zeros(BATCH, 8)),
        lambda model: latency(model, torch.zeros(BATCH, 8), min_run_time=1e-3),
        lambda model: compare_latency(model, mlp(), torch.zeros(BATCH, 8), min_run_time=1e-3, pairs=2),
    ]


@pytest.mark.parametrize("measure", measured(), ids=["account", "latency", "compare"])
def test_the_model_runs_in_eval_mode_without_gradients_and_stays_as_it_was(measure: Any):
    model, seen, threads = mlp(), set(), torch.get_num_threads()
    model[2].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    model[1].register_forward_hook(lambda module, args, output: seen.add((module.training, output.requires_grad)))
    measure(model)
    assert seen == {(False, False)}
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model[3] = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure(model)
    assert model.training
    assert torch.get_num_threads() == threads


def test_latency_says_median_and_quartiles():
    found = latency(mlp(), torch.zeros(BATCH, 8), min_run_time=0.01)
    assert 0 < found.low <= found.median <= found.high
    assert str(Latency(0.0012345, 0.001, 0.002, 7)) == "1.234 ms a call (quartiles 1 to 2, 7 calls)"


def test_a_comparison_takes_turns():
    """Who is measured, runs of one name taken together: to warm up, then ab ba ab ba."""
    order: list[str] = []
    models = {name: mlp() for name in "ab"}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    found = compare_latency(models["a"], models["b"], torch.zeros(BATCH, 8), min_run_time=1e-9, pairs=4)
    assert "".join(name for name, _ in itertools.groupby(order)) == "ab" + "ababa"
    assert (found.a.runs, found.b.runs) == (4, 4)
    assert 0 < found.low <= found.ratio <= found.high
    same = Latency(1.0, 1.0, 1.0, 1)
    assert str(Comparison(2.0, 1.5, 2.5, same, same)).startswith("2 times (quartiles 1.5 to 2.5): 1000 ms a call")


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"min_run_time": 0}, {"min_run_time": float("nan")}])
def test_measuring_without_threads_or_time_is_refused(wrong: dict[str, Any]):
    for measure in (
        lambda **o: latency(mlp(), torch.zeros(1, 8), **o),
        lambda **o: compare_latency(mlp(), mlp(), torch.zeros(1, 8), **o),
    ):
        with pytest.raises(ValueError, match=r"threads is .* and min_run_time .*: give"):
            measure(**wrong)
    with pytest.raises(ValueError, match="pairs is 0"):
        compare_latency(mlp(), mlp(), torch.zeros(1, 8), pairs=0)
