import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune.criteria import CRITERIA, Criterion
from prune.topk import keep_top_k
from tests.helpers.criteria_models import (
    ONLINE,
    WITH_LOSS,
    SharedWeight,
    bert,
    cross_entropy,
    each_criterion,
    linear,
    linear_norms,
    matrices,
    points,
    scores_of,
    sentences,
    small,
)

EPSILON = 1e-5


def each_weight(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, weight in matrices(model).items():
        for place in itertools.product(*map(range, weight.shape)):
            yield name, place


@torch.no_grad()
def with_weight(model: nn.Module, name: str, place: tuple[int, ...], scale: float, value: Callable[[], float]) -> float:
    """``value()`` while one weight is multiplied by ``scale``."""
    weight = model.get_parameter(name)
    before = weight[place].item()
    weight[place] = before * scale
    try:
        with torch.enable_grad():
            return value()
    finally:
        weight[place] = before


def slope(model: nn.Module, name: str, place: tuple[int, ...], value: Callable[[], float]) -> float:
    """The derivative of ``value`` by the connection c of the weight c * w, at c = 1, by central differences."""
    above = with_weight(model, name, place, 1 + EPSILON, value)
    return (above - with_weight(model, name, place, 1 - EPSILON, value)) / (2 * EPSILON)


def mean_loss(model: nn.Module, batches: list[Any]) -> float:
    return sum(cross_entropy(model, batch).item() for batch in batches) / len(batches)


def test_snip_is_the_sensitivity_to_the_connection():
    """Lee et al., equation 4: |dL(c * w) / dc| at c = 1, over all data; without the normalisation of equation 5."""
    model, batches = small(), points(3)
    scores = scores_of(CRITERIA["snip"], model, batches)
    for name, place in each_weight(model):
        expected = abs(slope(model, name, place, lambda: mean_loss(model, batches)))
        assert scores[name][place].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_taylor_is_the_mean_square_and_movement_minus_the_mean():
    """Molchanov et al., I^(1)_m = (g_m w_m)^2, mean over minibatches; Sanh et al., Table 1: -sum_t g_t w_t."""
    model, batches = small(), points(3)
    taylor, movement = (scores_of(CRITERIA[name], model, batches) for name in ("taylor", "movement"))
    for name, place in each_weight(model):
        slopes = [slope(model, name, place, lambda: cross_entropy(model, each).item()) for each in batches]  # noqa: B023
        assert taylor[name][place].item() == pytest.approx(sum(s * s for s in slopes) / 3, rel=1e-4, abs=1e-9)
        assert movement[name][place].item() == pytest.approx(-sum(slopes) / 3, rel=1e-4, abs=1e-9)


def squared_gradient(model: nn.Module, batches: list[Any]) -> float:
    loss = torch.stack([cross_entropy(model, batch) for batch in batches]).mean()
    return sum(grad.square().sum().item() for grad in torch.autograd.grad(loss, list(matrices(model).values())))


def test_grasp_keeps_what_the_gradient_would_miss():
    """Wang et al.: pruning a bit of w_q changes |g|^2 by -2 w_q (Hg)_q; the weights whose loss shrinks it are kept."""
    model, batches = small(), points(3)
    scores = scores_of(CRITERIA["grasp"], model, batches)
    for name, place in each_weight(model):
        expected = slope(model, name, place, lambda: squared_gradient(model, batches)) / 2
        assert scores[name][place].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert any((score < 0).any() for score in scores.values())


def test_grasp_is_the_explicit_hessian_times_the_gradient():
    """Algorithm 2 against the Hessian of the flat parameters, of all batches together."""
    model, batches = small(3), points(2)
    names, shapes = zip(*((name, weight.shape) for name, weight in matrices(model).items()))
    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        state = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        return torch.stack([F.cross_entropy(torch.func.functional_call(model, state, x), y) for x, y in batches]).mean()

    at = flat.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(each, at, retain_graph=True)[0] for each in gradient])
    expected = flat * (hessian @ gradient.detach())
    scores = scores_of(CRITERIA["grasp"], model, batches)
    torch.testing.assert_close(torch.cat([scores[name].flatten() for name in names]), expected)


def test_grasp_orders_as_the_published_code_and_a_temperature_belongs_into_the_loss():
    """https://github.com/alecwangcq/GraSP: z = <stopped gradient, gradient>, score -w * dz/dw, the largest pruned."""
    model, batches = small(4), points(2)

    def cooler(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]) / 200, batch[1])

    theirs = copy.deepcopy(model)
    weights = list(matrices(theirs).values())
    stopped = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        stopped = [sum_ + grad for sum_, grad in zip(stopped, torch.autograd.grad(cooler(theirs, batch), weights))]
    for batch in batches:
        grads = torch.autograd.grad(cooler(theirs, batch), weights, create_graph=True)
        sum((s.data * g).sum() for s, g in zip(stopped, grads)).backward()
    published = torch.cat([(-weight.data * weight.grad).flatten() for weight in weights])
    scores = torch.cat([score.flatten() for score in scores_of(CRITERIA["grasp"], model, batches, cooler).values()])
    torch.testing.assert_close(scores, -published / len(batches) ** 2)


def test_a_loss_without_curvature_has_no_gradient_signal():
    model = nn.Linear(3, 2).double()
    scores = scores_of(CRITERIA["grasp"], model, points(2), lambda model, batch: model(batch[0]).mean())
    assert not scores["weight"].any()


@each_criterion(WITH_LOSS)
def test_a_transformer_is_differentiated_once_and_twice(criterion: Criterion):
    model = bert(attention_probs_dropout_prob=0.0).eval()  # where attention could be fused
    scores = criterion.score(model, linear(model), [sentences()], lambda model, batch: model(**batch).loss)
    assert scores.keys() == linear(model).keys()
    assert all(score.isfinite().all() and score.any() for score in scores.values())
    assert not any(module.training for module in model.modules())


@each_criterion(ONLINE)
def test_online_and_offline_agree_on_one_batch(criterion: Criterion):
    model, (batch,) = small(), points(1)
    cross_entropy(model, batch).backward()
    for name, score in scores_of(criterion, model, [batch]).items():
        weight = model.get_parameter(name)
        torch.testing.assert_close(criterion.online(weight, weight.grad), score)
    half = criterion.online(torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 1e-3, dtype=torch.bfloat16))
    assert half.dtype == torch.float32


def test_a_tied_weight_is_scored_by_all_that_it_does():
    torch.manual_seed(0)
    model, batches = SharedWeight().double(), points(2)
    weights = {"first.weight": model.first.weight}
    for criterion in WITH_LOSS:
        scores = criterion.score(model, weights, batches, cross_entropy)["first.weight"]
        for place in itertools.product(range(3), range(3)):
            at = [slope(model, "first.weight", place, lambda: cross_entropy(model, each).item()) for each in batches]  # noqa: B023
            expected = {"snip": abs(sum(at)) / 2, "taylor": sum(a * a for a in at) / 2, "movement": -sum(at) / 2}
            if criterion.name in expected:
                assert scores[place].item() == pytest.approx(expected[criterion.name], rel=1e-4, abs=1e-8)
    inner = [model.first(x).tanh().detach() for x, _ in batches]
    norms = torch.tensor(linear_norms([*(x for x, _ in batches), *inner])).double()
    found = CRITERIA["wanda"].score(model, weights, batches)["first.weight"]
    torch.testing.assert_close(found, model.first.weight.detach().abs() * norms)


def test_a_weight_that_the_loss_does_not_use_is_worth_nothing():
    model = SharedWeight().double()
    weights = {name: model.get_parameter(name) for name in ("first.weight", "idle.weight")}
    for criterion in WITH_LOSS:
        scores = criterion.score(model, weights, points(1), cross_entropy)
        assert scores["first.weight"].any()
        assert not scores["idle.weight"].any()
    with pytest.raises(ValueError, match=r"layers of 'idle.weight' were never called.*exclude"):
        CRITERIA["wanda"].score(model, weights, points(1))
    scores = CRITERIA["synflow"].score(model, weights, points(1))
    assert not scores["idle.weight"].any()


@each_criterion(WITH_LOSS)
def test_frozen_weights_are_refused_where_a_gradient_is_needed(criterion: Criterion):
    model = small()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.weight' are frozen.*set requires_grad, or exclude"):
        scores_of(criterion, model, points(1))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), r"shape \(5,\).*scalar"),
        (lambda model, batch: 1.5, "the loss is a float.*scalar tensor"),
        (lambda model, batch: model(batch[0]).mean().detach(), "no graph.*without no_grad"),
        (lambda model, batch: nn.Linear(3, 1).double()(batch[0]).mean(), "depends on none of the 2 weights"),
    ],
)
@each_criterion(WITH_LOSS)
def test_losses_that_are_none_are_refused(criterion: Criterion, loss: Any, message: str):
    with pytest.raises(ValueError, match=message):
        scores_of(criterion, small(), points(1), loss)


@each_criterion(WITH_LOSS)
def test_scores_that_are_nan_are_named_by_selection(criterion: Criterion):
    batches = [(x.log(), y) for x, y in points(1)]  # of negative numbers
    with pytest.raises(ValueError, match=r"scores of '0.weight' are NaN.*the data"):
        keep_top_k(scores_of(criterion, small(), batches), 3)


# Units of several weights


def rows_of(values: Any) -> dict[str, Tensor]:
    """The sums of the rows of every matrix, as the structure ``channel`` has them."""
    return {name: value.sum(1) for name, value in values.items()}


@torch.no_grad()
def gate_slope(model: nn.Module, name: str, row: int, value: Callable[[], float]) -> float:
    """The derivative of ``value`` by a gate z of the unit z * w_S, at z = 1, by central differences."""
    weight, found = model.get_parameter(name), []
    before = weight[row].clone()
    for scale in (1 + EPSILON, 1 - EPSILON):
        weight[row] = before * scale
        found.append(value())
    weight[row] = before
    return (found[0] - found[1]) / (2 * EPSILON)


def test_a_unit_is_scored_by_its_gate():
    """Molchanov et al., section 3: I^(1)_S = (sum_S g w)^2 = (dL/dz)^2, mean over minibatches; Michel et al., equation
    2: |dL/dz|, of the loss over all data as in SNIP; movement: -dL/dz."""
    model, batches = small(), points(3)
    found = {
        name: CRITERIA[name].score(model, matrices(model), batches, cross_entropy, units=rows_of)
        for name in ("snip", "taylor", "movement")
    }
    for name, weight in matrices(model).items():
        for row in range(len(weight)):
            at = [gate_slope(model, name, row, lambda: cross_entropy(model, each).item()) for each in batches]  # noqa: B023
            expected = {"snip": abs(sum(at)) / 3, "taylor": sum(a * a for a in at) / 3, "movement": -sum(at) / 3}
            for criterion, scores in found.items():
                assert scores[name].shape == (len(weight),)
                assert scores[name][row].item() == pytest.approx(expected[criterion], rel=1e-4, abs=1e-9), criterion
    assert all(score.dtype == torch.float64 for scores in found.values() for score in scores.values())


def test_the_square_of_a_sum_is_no_sum_of_squares():
    """What two weights of a unit do may cancel, or add up: neither the mean nor the sum of their scores tells."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -3.0], [1.0, 1.0]]))
    batches = [(torch.ones(1, 2).double(), None)]
    loss = lambda model, batch: model(batch[0]).sum()  # noqa: E731
    for name, alone, together in (("taylor", [18.0, 2.0], [0.0, 4.0]), ("snip", [6.0, 2.0], [0.0, 2.0])):
        score = CRITERIA[name].score
        weights = matrices(model)
        assert score(model, weights, batches, loss)["weight"].sum(1).tolist() == alone
        assert score(model, weights, batches, loss, units=rows_of)["weight"].tolist() == together


def test_the_gate_of_a_unit_that_the_loss_does_not_use_is_worth_nothing():
    model = SharedWeight().double()
    weights = {name: model.get_parameter(name) for name in ("first.weight", "idle.weight")}
    for criterion in (CRITERIA["snip"], CRITERIA["taylor"], CRITERIA["movement"]):
        scores = criterion.score(model, weights, points(1), cross_entropy, units=rows_of)
        assert scores["first.weight"].any()
        assert not scores["idle.weight"].any()
