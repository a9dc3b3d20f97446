"""Scores summed up over training steps: of weights bit for bit as one after the other, of units by their gates."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prune.allocation import Global
from prune.criteria import CRITERIA
from prune.policies import Gradual
from prune.policies.online import OnlineScores
from prune.pruner import Pruner
from prune.schedule import kept
from prune.structures import Channel
from tests.helpers.bare_loop import SGD, net, train
from tests.helpers.ranks import on_ranks

ONLINE = ("movement", "taylor", "snip")
NAMES = ("0.weight", "2.weight")


def steps(count: int = 4, dtype: torch.dtype = torch.float32) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Weights and gradients of some updates."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (10, 6), "2.weight": (3, 10)}
    return [
        tuple({n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()} for _ in range(2))  # type: ignore[misc]
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ONLINE)
def test_all_weights_at_once_have_the_bits_of_one_after_the_other(name: str, dtype: torch.dtype) -> None:
    online = CRITERIA[name].online
    assert online is not None
    given = steps(dtype=dtype)
    scores, other = (OnlineScores(each, given[0][0]) for each in (online, lambda w, g: online(w, g)))
    expected = {key: torch.zeros(weight.shape) for key, weight in given[0][0].items()}
    for weights, grads in given:
        scores.add(weights, grads)
        other.add(weights, grads)
        expected = {key: expected[key] + online(weights[key], grads[key]) for key in NAMES}
    for found in (scores.arguments(given[0][0]), other.arguments(given[0][0])):
        assert all(torch.equal(found["scores"][key], expected[key]) for key in NAMES)


def test_a_state_is_a_copy_and_is_gone_on_from() -> None:
    first, second, *_ = steps()
    scores = OnlineScores(CRITERIA["taylor"].online, first[0])  # type: ignore[arg-type]
    assert scores.arguments(first[0]) == scores.state(first[0]) == {}
    scores.add(*first)
    state = scores.state(first[0])
    before = {name: score.clone() for name, score in state.items()}
    again = OnlineScores(CRITERIA["taylor"].online, first[0], stored=state)  # type: ignore[arg-type]
    for each in (scores, again):
        each.add(*second)
    assert all(torch.equal(state[name], before[name]) for name in NAMES)
    assert all(torch.equal(scores.state(first[0])[name], again.state(first[0])[name]) for name in NAMES)


def test_a_weight_without_a_gradient_competes_with_0() -> None:
    (weights, grads), *_ = steps()
    scores = OnlineScores(CRITERIA["snip"].online, weights)  # type: ignore[arg-type]
    scores.add(weights, {})
    assert scores.arguments(weights) == {}
    scores.add(weights, {"0.weight": grads["0.weight"]})
    assert not scores.arguments(weights)["scores"]["2.weight"].any()


@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.parametrize("name", ONLINE)
def test_units_are_pruned_by_the_sums_of_their_gates(name: str) -> None:
    """Molchanov et al. 2019: (sum_S g w)^2 of every update, here summed over updates; Michel et al.: |sum_S g w|."""
    of_gate = {"movement": lambda z: -z, "taylor": lambda z: z * z, "snip": abs}[name]
    model = net()
    policy = Gradual(0.4, "7it", "8it", "1it", Pruner(name, Channel(), Global(0)), schedule="one_shot")
    optimizer, sums = SGD(model.parameters()), {key: [0.0] * len(model.get_parameter(key)) for key in NAMES}

    def add() -> None:
        for key, totals in sums.items():
            weight = model.get_parameter(key)
            assert weight.grad is not None
            for row, products in enumerate((weight.detach().double() * weight.grad.double()).tolist()):
                totals[row] += of_gate(sum(products))

    with policy.follow(model, optimizer):
        train(model, optimizer, 0, 6, before=add)
        state = pickle.loads(pickle.dumps(policy.state_dict()))
        assert {key: len(score) for key, score in state["scores"].items()} == {"0.weight": 10, "2.weight": 3}
        train(model, optimizer, 6, 7, before=add)
    ranked = sorted((-total, key, row) for key, totals in sums.items() for row, total in enumerate(totals))
    best = {(key, row) for _, key, row in ranked[: kept(13, 0.4)]}
    assert policy.masks is not None
    found = {(key, row) for key in NAMES for row, on in enumerate(policy.masks[key].any(1).tolist()) if on}
    assert found == best


@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.parametrize("name", ONLINE)
def test_the_mean_of_weights_is_kept_by_name(name: str) -> None:
    added = {"movement": lambda p: -p, "taylor": lambda p: p**2, "snip": abs}[name]
    model = net()
    pruner = Pruner(name, Channel(), Global(0), group="mean")
    policy, optimizer = Gradual(0.4, "4it", "5it", "1it", pruner, schedule="one_shot"), SGD(model.parameters())
    sums: dict[str, Tensor] = {key: torch.zeros_like(model.get_parameter(key)) for key in NAMES}

    def add() -> None:
        for key in NAMES:
            weight = model.get_parameter(key)
            assert weight.grad is not None
            sums[key] += added(weight.detach() * weight.grad)

    with policy.follow(model, optimizer):
        train(model, optimizer, 0, 4, before=add)
    expected = Pruner("magnitude", Channel(), Global(0))(model, 0.4, scores=sums)
    assert policy.masks == expected


def sharded() -> Any:
    """Rows over ranks, then columns, of which a row's weights are on both."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo")
    mesh, given, found = init_device_mesh("cpu", (2,)), steps(2), []
    for structure in ("unstructured", Channel()):
        for axis in (0, 1):
            model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.GELU(), nn.Linear(10, 3, bias=False))
            layout = Pruner("taylor", structure).gates(model)
            whole, parts = (OnlineScores(CRITERIA["taylor"].online, given[0][0], layout) for _ in range(2))  # type: ignore[arg-type]
            held: dict[str, Any] = {}
            for step in given:
                whole.add(*step)
                held, grads = (
                    {name: distribute_tensor(value, mesh, [Shard(axis)]) for name, value in of.items()} for of in step
                )
                parts.add(held, grads)
            one, two = whole.state(given[0][0]), parts.state(held)
            found.append(all(torch.equal(one[name], two[name]) for name in NAMES))
            found.append(*parts.arguments(held))
    return found


def test_a_unit_divided_over_ranks_is_summed_before_it_is_squared() -> None:
    assert on_ranks(sharded) == [[*(True, "scores") * 2, *(True, "unit_scores") * 2]] * 2
