"""What every policy has of its base, in a loop without a framework."""

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prune.policies import Dynamic, Fixed, Gradual, Iterative, Policy
from prune.pruner import Pruner
from prune.schedule import kept
from tests.helpers.bare_loop import ADAMW, SGD, TOTAL, alive, grads, net, train, values
from tests.helpers.policy_cases import CASES

POLICIES: dict[str, tuple[Callable[[], Policy], float]] = {
    name: (functools.partial(case.make, net()), case.density) for name, case in CASES.items() if name != "iterative"
}
EVERY = pytest.mark.parametrize("name", POLICIES)


@EVERY
@pytest.mark.parametrize("make", [SGD, ADAMW])
def test_a_loop_that_is_not_touched(name: str, make: Any) -> None:
    """Momentum and weight decay move weights without a gradient: they are zero after every step nevertheless."""
    model, (build, density) = net(), POLICIES[name]
    optimizer, policy = make(model.parameters()), build()
    with policy.follow(model, optimizer):
        for index in range(12):
            train(model, optimizer, index, index + 1)
            assert policy.masks is None or policy.masks.is_applied_to(model)
    assert policy.masks is not None
    assert policy.masks.density == kept(TOTAL, density) / TOTAL
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    train(model, optimizer, 0, 3)
    assert alive(model) > kept(TOTAL, density)


@EVERY
def test_resuming_is_as_if_nothing_had_happened(name: str) -> None:
    """Bit for bit, whenever it was broken off; through a file, as weights_only reads it."""
    build, _ = POLICIES[name]

    def made() -> tuple[nn.Module, Any, Policy]:
        model = net()
        return model, ADAMW(model.parameters()), build()

    model, optimizer, policy = made()
    policy.follow(model, optimizer)
    saved = []
    for index in range(12):
        saved.append(copy.deepcopy((model.state_dict(), optimizer.state_dict(), policy.state_dict())))
        train(model, optimizer, index, index + 1)
    for index in (0, 1, 3, 4, 5, 9, 10):
        again, stepper, other = made()
        other.load_state_dict(pickle.loads(pickle.dumps(saved[index][2])))
        assert other.state_dict().keys() == policy.state_dict().keys()
        again.load_state_dict(saved[index][0])
        stepper.load_state_dict(saved[index][1])
        with other.follow(again, stepper):
            train(again, stepper, index, 12)
        assert values(again) == values(model)
        assert other.masks == policy.masks
    assert policy.masks is not None


@EVERY
def test_hooks_vanish_after_an_exception(name: str) -> None:
    model = net()
    optimizer, policy = SGD(model.parameters()), POLICIES[name][0]()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), policy.follow(model, optimizer):
        model(torch.ones(2, 3))
    assert not optimizer._optimizer_step_post_hooks
    policy.follow(model, optimizer).remove()


@EVERY
def test_a_copy_of_one_at_work_is_free(name: str) -> None:
    model = net()
    optimizer, policy = SGD(model.parameters()), POLICIES[name][0]()
    with policy.follow(model, optimizer):
        train(model, optimizer, 0, 4)
        other = copy.deepcopy(policy)
        assert pickle.loads(pickle.dumps(policy)).masks == policy.masks
        assert other.masks == policy.masks
        twin = net()
        with other.follow(twin, SGD(twin.parameters())):
            pass
        train(model, optimizer, 4, 12)
    assert alive(model) == kept(TOTAL, POLICIES[name][1])


@EVERY
def test_what_is_no_state_is_refused_by_a_sentence(name: str) -> None:
    policy = POLICIES[name][0]()
    state = policy.state_dict()
    old = {key: value for key, value in state.items() if key not in ("settings", "parameters")}
    for given, missing in ((old, r"no \['parameters', 'settings'\], but 'masks'"), ({}, "no .*, but nothing")):
        with pytest.raises(ValueError, match=f"this is no state of a {type(policy).__name__}: it has {missing}"):
            policy.load_state_dict(given)
    policy.load_state_dict(state)


def test_following_anew_ends_what_was_followed() -> None:
    model, other, policy = net(), net(), POLICIES["gradual"][0]()
    first, second = SGD(model.parameters()), SGD(other.parameters())
    old = policy.follow(model, first)
    train(model, first, 0, 3)
    with policy.follow(other, second):
        old.remove()
        assert not first._optimizer_step_post_hooks
        train(other, second, 0, 9)
    assert alive(other) == kept(TOTAL, 0.2)


@EVERY
def test_several_optimizers(name: str) -> None:
    """An update is a step of the first that holds one of the weights; all are kept masked."""
    model, strange = net(), nn.Linear(2, 2)
    strangers, one = SGD(strange.parameters()), SGD(model[0].parameters())
    two, policy = ADAMW(model[2].parameters()), POLICIES[name][0]()
    with policy.follow(model, [strangers, one, two]):
        strange(torch.ones(2)).sum().backward()
        for index in range(12):
            grads(model, index)
            strangers.step()
            one.step()
            two.step()
            assert policy.masks is None or policy.masks.is_applied_to(model)
    assert policy.state_dict()["updates"] == 12
    assert alive(model) == kept(TOTAL, POLICIES[name][1])


@EVERY
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_are_none(name: str, fused: bool) -> None:
    """Scaled gradients that are not finite are not looked at, and the result is that of a loop without them."""
    found = []
    for bad in ((), (1, 4, 5)):
        model, policy = net(), POLICIES[name][0]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6, backoff_factor=0.5)
        with policy.follow(model, optimizer):
            for index in range(12 + len(bad)):
                model.zero_grad()
                batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(index - sum(b < index for b in bad)))
                loss = nn.functional.cross_entropy(model(batch), torch.tensor([0, 1, 2, 0]))
                scaler.scale(loss * math.inf if index in bad else loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert policy.state_dict()["updates"] == 12
        found.append((values(model), policy.masks))
    assert found[0] == found[1]


def test_epochs_need_their_length() -> None:
    model, policy = net(), Gradual(0.2, "1ep", "3ep", "1ep")
    optimizer = SGD(model.parameters())
    with pytest.raises(ValueError, match="steps_per_epoch is None, but times of this Gradual are in epochs"):
        policy.follow(model, optimizer)
    with policy.follow(model, optimizer, steps_per_epoch=3):
        train(model, optimizer, 0, 8)
        assert policy.shortfall() == "density 0.3, not 0.2: it was to be reached at 3ep"
        train(model, optimizer, 8, 9)
        assert policy.shortfall() is None
    assert alive(model) == kept(TOTAL, 0.2)


def test_a_closure_hides_the_gradients() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        POLICIES["rigl"][0]().follow(model, optimizer),
        pytest.raises(ValueError, match="given a closure, and this Dynamic looks at gradients before the step"),
    ):
        optimizer.step(lambda: model(torch.ones(6)).sum())
    with POLICIES["set"][0]().follow(model, optimizer, anew=True):
        optimizer.step(lambda: model(torch.ones(6)).sum())


@EVERY
def test_wrapped_models_and_averages(name: str) -> None:
    """An average follows weights that have gone to zero only slowly, so it is masked whenever the masks change."""
    model, policy = net(), POLICIES[name][0]()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = SGD(model.parameters())
    with policy.follow(nn.DataParallel(model), optimizer, averages=[average]):
        for index in range(12):
            train(model, optimizer, index, index + 1)
            average.update_parameters(model)
            assert policy.masks is None or policy.masks.is_applied_to(average.module)
    assert alive(average.module) == kept(TOTAL, POLICIES[name][1])


def test_one_weight_has_one_policy() -> None:
    model = net()
    optimizer, rest = SGD(model.parameters()), Gradual(0.5, "0it", "2it", "1it", Pruner(include="2*"))
    with Fixed({"0.weight": torch.ones(10, 6, dtype=torch.bool)}).follow(model, optimizer):
        with pytest.raises(ValueError, match=r"'0\.weight' is pruned by a Fixed and a Gradual at once"):
            Gradual(0.5, "0it", "2it", "1it").follow(model, optimizer)
        with rest.follow(model, optimizer):
            train(model, optimizer, 0, 2)
    assert (alive(model), model[2].weight.count_nonzero()) == (60 + 15, 15)
    Gradual(0.5, "0it", "2it", "1it").follow(model, optimizer, anew=True).remove()


def test_what_cannot_be_driven() -> None:
    model = net()
    elsewhere = SGD(nn.Linear(2, 2).parameters())
    for build, _ in POLICIES.values():
        with pytest.raises(ValueError, match=r"no optimizer holds a weight that is to be pruned, such as '0\.weight'"):
            build().follow(model, elsewhere)
    model[0].weight.requires_grad_(False)
    for name in ("movement", "rigl"):
        with pytest.raises(ValueError, match=r"'0\.weight': frozen, so this \w+ finds no gradient there"):
            POLICIES[name][0]().follow(model, SGD(model.parameters()))


@pytest.mark.parametrize("name", ["set", "gradual", "levels"])
def test_frozen_weights_are_pruned_only_where_that_is_said(name: str) -> None:
    """Levels too, and a gradient criterion refuses them before training."""
    makes = {
        "set": lambda **scope: Dynamic(0.3, "0it", "9it", "2it", "set", **scope),
        "gradual": lambda **scope: Gradual(0.2, "2it", "9it", "2it", Pruner(**scope)),
        "levels": lambda **scope: Iterative(2, pruner=Pruner(**scope)),
    }
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = SGD(model[2].parameters())
    with pytest.warns(UserWarning, match=r"^'0\.weight': frozen, and pruned like the others"):
        makes[name]().follow(model, optimizer, steps_per_epoch=5).remove()
    for scope in ({"exclude": "0.*"}, {"include": "*"}):
        makes[name](**scope).follow(model, optimizer, steps_per_epoch=5, anew=True).remove()
    asked = [Iterative(2, pruner=Pruner("snip")), Gradual(0.2, "2it", "9it", "2it", Pruner("grasp"))]
    model = net()
    model[0].weight.requires_grad_(False)
    for policy in asked:
        with pytest.raises(
            ValueError, match=r"'0\.weight': frozen, so criterion '(snip|grasp)' finds no gradient there"
        ):
            policy.attach(model, SGD(model[2].parameters()), calibration=lambda criterion, batches: {})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Dynamic(0.0, "0it", "9it", "1it"), "density is 0.0"),
        (lambda: Dynamic(0.5, "0it", "9it", "1it", "best"), "growth is 'best': give 'rigl'"),
        (lambda: Dynamic(0.5, "0it", "9it", "1it", fraction=0.0), "fraction is 0.0"),
        (lambda: Dynamic(0.5, "0it", "9it", "1it", decay="cubic"), r"unknown decay 'cubic': give one of \['cosine'"),
        (lambda: Dynamic(0.5, "9it", "9it", "1it"), "the end comes after the beginning"),
        (lambda: Dynamic(0.5, "9it", "20it", "1it").check_budget(9, math.inf), "begin is 9it, but training has 9it"),
        (lambda: Gradual(0.5, "0it", "9it", "1it", schedule="steep"), r"unknown schedule 'steep': give one of"),
        (lambda: Gradual(0.5, "0it", "9it", "0it"), "every is 0it"),
        (lambda: Gradual(0.5, "1ep", "9it", "1it"), "begin is 1ep and end 9it: give both"),
        (lambda: Gradual(0.5, "0it", "9it", "1it", initial=0.4), "initial density 0.4 is below"),
        (lambda: Gradual(0.5, "0it", "9it", "1it").check_budget(8, math.inf), "end is 9it, but training has 8it only"),
        (lambda: Fixed({}), "no masks given"),
        (lambda: Iterative("3"), "levels is '3': give how many times to prune, an integer"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
