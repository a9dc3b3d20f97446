import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prune.criteria import CRITERIA
from prune.masks import Masks
from prune.policies import Dynamic, Fixed, Gradual, Iterative, Policy, Timestamp
from prune.policies.dynamic import cosine, rewired
from prune.pruner import Pruner
from prune.schedule import SCHEDULES, kept

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
TOTAL = 6 * 10 + 10 * 3  # prunable weights of `net`


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3))


POLICIES: dict[str, tuple[Callable[[], Policy], float]] = {  # and the density that each of them ends at
    "fixed": (lambda: Fixed(Pruner()(net(), 0.3)), 0.3),
    "gradual": (lambda: Gradual(0.2, "2it", "9it", "2it"), 0.2),
    "movement": (lambda: Gradual(0.2, "2it", "9it", "2it", Pruner("movement")), 0.2),
    "taylor": (lambda: Gradual(0.2, "2it", "9it", "2it", Pruner("taylor", allocation="uniform")), 0.2),
    "rigl": (lambda: Dynamic(0.3, "0it", "9it", "2it"), 0.3),
    "set": (lambda: Dynamic(0.3, "0it", "9it", "2it", "set", decay="constant"), 0.3),
}
EVERY = pytest.mark.parametrize("name", POLICIES)


def grads(model: nn.Module, index: int) -> None:
    generator = torch.Generator().manual_seed(index)
    x, y = torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer: Any, start: int, stop: int, before: Callable[[], Any] = lambda: None) -> None:
    for index in range(start, stop):
        grads(model, index)
        before()
        optimizer.step()


def alive(model: nn.Module) -> int:
    return sum(int(parameter.count_nonzero()) for name, parameter in model.named_parameters() if "weight" in name)


def values(model: nn.Module) -> list[list[float]]:
    return [parameter.flatten().tolist() for parameter in model.parameters()]


# In any loop


@EVERY
@pytest.mark.parametrize("make", [SGD, ADAMW])
def test_a_loop_that_is_not_touched(name: str, make: Any) -> None:
    """Momentum and weight decay move weights without a gradient: they are zero after every step nevertheless."""
    model, (build, density) = net(), POLICIES[name]
    optimizer, policy = make(model.parameters()), build()
    with policy.follow(model, optimizer):
        for index in range(12):
            train(model, optimizer, index, index + 1)
            assert policy.masks is None or policy.masks.obeyed_by(model)
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
            assert policy.masks is None or policy.masks.obeyed_by(model)
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
    with POLICIES["set"][0]().follow(model, optimizer):
        optimizer.step(lambda: model(torch.ones(6)).sum())


class Wrapped(nn.Module):
    """As torch.compile wraps a module, for which it would import half of torch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


@EVERY
def test_wrapped_models_and_averages(name: str) -> None:
    """An average follows weights that have gone to zero only slowly, so it is masked whenever the masks change."""
    model, policy = net(), POLICIES[name][0]()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = SGD(model.parameters())
    with policy.follow(Wrapped(model), optimizer, averages=[average]):
        for index in range(12):
            train(model, optimizer, index, index + 1)
            average.update_parameters(model)
            assert policy.masks is None or policy.masks.obeyed_by(average.module)
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
    Gradual(0.5, "0it", "2it", "1it").follow(model, optimizer).remove()


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


# Fixed


def test_another_mask_is_not_resumed() -> None:
    mine, other = Fixed(Pruner()(net(), 0.3)), Fixed(Pruner()(net(), 0.4))
    assert mine.masks is not None
    assert other.masks is not None
    said = f"trained under mask {mine.masks.hash()[:12]}, but mask {other.masks.hash()[:12]} is given"
    with pytest.raises(ValueError, match=said):
        other.load_state_dict(mine.state_dict())
    assert other.masks == Pruner()(net(), 0.4)


def test_an_empty_layer_is_named_once() -> None:
    model, nothing = net(), Fixed({"0.weight": torch.ones(10, 6) > 0, "2.weight": torch.ones(3, 10) < 0})
    with pytest.warns(UserWarning, match=r"layer collapse: '2\.weight' keeps none of its 30") as caught:
        nothing.follow(model, SGD(model.parameters())).remove()
    assert len(caught) == 1
    assert nothing.densities() == {"density": 60 / 90, "density/0.weight": 1.0, "density/2.weight": 0.0}


# Gradual


@pytest.mark.parametrize("name", [*SCHEDULES, "own"])
def test_gradual_follows_its_schedule(name: str) -> None:
    """Pruned after the update that reaches 4, at multiples of 5, and at 24; masks are nested."""

    def own(progress: float, density: float, initial: float) -> float:
        return initial if progress < 0.5 else density

    schedule = SCHEDULES.get(name, own)
    model, policy = net(), Gradual(0.2, "4it", "24it", "5it", initial=0.8, schedule=own if name == "own" else name)
    optimizer, seen, before = SGD(model.parameters()), [], Masks.ones(net())
    times = [4] + [5] * 5 + [10] * 5 + [15] * 5 + [20] * 4 + [24] * 6
    with policy.follow(model, optimizer):
        train(model, optimizer, 0, 3)
        assert policy.masks is None
        for index in range(3, 29):
            train(model, optimizer, index, index + 1)
            masks = policy.masks
            assert masks is not None
            assert all(not (mask & ~before[layer]).any() for layer, mask in masks.items())
            before = masks
            seen.append(alive(model))
    assert seen == [kept(TOTAL, schedule((t - 4) / 20, 0.2, 0.8)) for t in times]


def test_a_structure_that_allows_nothing_near_1_is_pruned_to_what_it_allows_first() -> None:
    model = nn.Linear(8, 6)
    optimizer, seen = SGD(model.parameters()), []
    policy = Gradual(0.25, "2it", "10it", "1it", Pruner(structure="2:4"), schedule="linear")
    with policy.follow(model, optimizer):
        for _ in range(10):
            model(torch.randn(2, 8)).square().sum().backward()
            optimizer.step()
            seen.append(int(model.weight.count_nonzero()))
            assert policy.masks is None or max(policy.masks["weight"].view(6, 2, 4).sum(-1).flatten()) <= 2
    way = [SCHEDULES["linear"](i / 8, 0.25, 1.0) for i in range(1, 9)]
    assert seen == [48, 48, *(kept(48, min(density, 0.5)) for density in way)]
    assert Pruner(structure="1:3").densest(nn.Linear(9, 1)) == 1 / 3
    assert Pruner().densest(model) == 1


@pytest.mark.parametrize("name", ["movement", "taylor", "snip"])
def test_scores_are_summed_over_all_updates(name: str) -> None:
    """Sanh et al. 2020, section 3: S = - sum_t dL/dw_t w_t, and not from zero again once weights have gone."""
    added = {"movement": lambda w, g: -w * g, "taylor": lambda w, g: (w * g) ** 2, "snip": lambda w, g: (w * g).abs()}
    model, policy = net(), Gradual(0.3, "3it", "8it", "5it", Pruner(name))
    optimizer = SGD(model.parameters())
    sums = {key: torch.zeros_like(model.get_parameter(key)) for key in ("0.weight", "2.weight")}

    def add() -> None:
        for key in sums:
            weight = model.get_parameter(key)
            assert weight.grad is not None
            sums[key] += added[name](weight.detach(), weight.grad)

    with policy.follow(model, optimizer):
        within = None
        for last, density in ((3, 1.0), (5, SCHEDULES["cubic"](0.4, 0.3, 1.0)), (8, 0.3)):
            train(model, optimizer, {3: 0, 5: 3, 8: 5}[last], last, before=add)
            if density < 1:
                ranked = sorted(
                    ((-float(v), i, j) for i, key in enumerate(sums) for j, v in enumerate(sums[key].flatten())
                     if within is None or within[key].flatten()[j])
                )  # fmt: skip
                best = {(i, j) for _, i, j in ranked[: kept(TOTAL, density)]}
                assert policy.masks is not None
                for i, key in enumerate(sums):
                    found = policy.masks[key].flatten().tolist()
                    assert found == [(i, j) in best for j in range(len(found))]
                within = policy.masks
    assert not policy.state_dict()["scores"]


@pytest.mark.parametrize("name", ["magnitude", "movement"])
def test_a_penalty_without_a_gradient_at_0_prunes_on(name: str) -> None:
    """That of sqrt|w| is NaN there, which neither weights nor scores keep."""
    model, policy = net(), Gradual(0.2, "2it", "9it", "2it", Pruner(name))
    optimizer = ADAMW(model.parameters())
    with policy.follow(model, optimizer):
        for index in range(12):
            grads(model, index)
            (1e-3 * sum(layer.weight.abs().sqrt().sum() for layer in (model[0], model[2]))).backward()  # type: ignore[union-attr]
            before = policy.state_dict()["scores"]
            optimizer.step()
            assert policy.masks is None or policy.masks.obeyed_by(model)
            if name == "movement" and 0 < index < 8:
                scores = policy.state_dict()["scores"]
                assert all(score.isfinite().all() and not torch.equal(score, before[n]) for n, score in scores.items())
    assert alive(model) == kept(TOTAL, 0.2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_criteria_that_training_does_not_feed_want_to_be_shown_data_at_once() -> None:
    refused = [name for name, criterion in CRITERIA.items() if criterion.needs_loader and criterion.online is None]
    assert {"grasp", "synflow", "wanda"} <= set(refused)
    model = net()
    optimizer = SGD(model.parameters())
    late = [(name, {}) for name in refused] + [("movement", {"initial": 0.5})]
    for name, options in late:
        policy = Gradual(0.2, "0it", "9it", "2it", Pruner(name, allocation="uniform"), **options)
        with pytest.raises(ValueError, match=rf"'{name}' needs data, and its policy has none.*prune once"):
            policy.attach(model, optimizer)
    loader = [torch.randn(4, 6)]
    policy = Gradual(0.2, "0it", "9it", "2it", Pruner("wanda", allocation="uniform"), initial=0.5)
    policy.attach(model, optimizer, calibration=lambda criterion, batches: {"loader": loader[:batches]})
    assert policy.masks == Pruner("wanda", allocation="uniform")(net(), 0.5, loader=loader)
    policy.detach()


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
        makes[name](**scope).follow(model, optimizer, steps_per_epoch=5).remove()
    asked = [Iterative(2, pruner=Pruner("snip")), Gradual(0.2, "2it", "9it", "2it", Pruner("grasp"))]
    for policy in asked:
        with pytest.raises(
            ValueError, match=r"'0\.weight': frozen, so criterion '(snip|grasp)' finds no gradient there"
        ):
            policy.attach(model, optimizer, calibration=lambda criterion, batches: {})


# Dynamic


def naive_rewiring(mask: list[bool], weight: list[float], scores: list[float], share: float) -> list[bool]:
    """Evci et al. 2020, Algorithm 1: ArgTopK(-|theta|) of the active go, ArgTopK of the scores of the others come."""
    active = [i for i in range(len(mask)) if mask[i]]
    n = int(len(active) * share)
    stay = sorted(active, key=lambda i: (-abs(weight[i]), i))[: len(active) - n]
    come = sorted((i for i in range(len(mask)) if i not in stay), key=lambda i: (-scores[i], i))[:n]
    return [i in stay or i in come for i in range(len(mask))]


_VALUES = st.lists(st.tuples(st.booleans(), st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(_VALUES, st.floats(0, 1))
def test_rewiring_is_the_algorithm_of_the_paper(rows: list[tuple[bool, int, int]], share: float) -> None:
    mask, weight, scores = (list(column) for column in zip(*rows))
    tensors = torch.tensor(mask), torch.tensor(weight) * 1.0, torch.tensor(scores) * 1.0
    found = rewired(*tensors, share).tolist()
    assert found == naive_rewiring(mask, weight, scores, share)
    assert sum(found) == sum(mask)


def test_cosine_decay_is_equation_1() -> None:
    alpha, end = 0.3, 750
    for t in (0, 100, 375, 700, 750):
        f_decay = alpha / 2 * (1 + math.cos(t * math.pi / end))
        assert alpha * cosine(t / end) == pytest.approx(f_decay, abs=1e-15)


@pytest.mark.parametrize("growth", ["rigl", "set"])
@pytest.mark.parametrize("make", [SGD, ADAMW])
def test_one_update_of_the_connections(growth: Any, make: Any) -> None:
    """By hand: what grew is 0 and has no past, what stayed has its own, and the gradients are the new masks'."""
    model, policy = net(), Dynamic(0.3, "0it", "40it", "4it", growth, fraction=0.5, seed=3)
    optimizer = make(model.parameters())
    with policy.follow(model, optimizer):
        train(model, optimizer, 0, 4)
    policy.attach(model, optimizer, Timestamp(4, 0.0))
    old, weights = policy.masks, {name: p.detach().clone() for name, p in model.named_parameters()}
    assert old is not None
    grads(model, 4)
    dense = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    policy.before_step(Timestamp(4, 0.0))
    new, moved = policy.masks, 0
    assert new is not None
    for name, mask in new.items():
        weight, state = model.get_parameter(name), optimizer.state[model.get_parameter(name)]
        if growth == "rigl":
            share = 0.25 * (1 + math.cos(math.pi * 0.1))
            lists = (t.flatten().tolist() for t in (old[name], weights[name], dense[name].abs()))
            assert mask.flatten().tolist() == naive_rewiring(*lists, share)
        changed, stayed = mask ^ old[name], mask & old[name]
        moved += int(changed.sum())
        assert mask.sum() == old[name].sum()
        assert not weight[~stayed].any()
        assert torch.equal(weight[stayed], weights[name][stayed])
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            assert not state.get(key, torch.zeros_like(weight))[changed].any()
            assert state.get(key, torch.ones_like(weight))[stayed].any()
        assert weight.grad is not None
        assert torch.equal(weight.grad, dense[name] * mask)
    assert moved
    policy.detach()


@pytest.mark.parametrize("growth", ["rigl", "set"])
def test_connections_move_when_they_are_to(growth: Any) -> None:
    """At multiples of 3 from 4 to 13 updates, every layer of the same count, as ERK gives it."""
    model, policy = net(), Dynamic(0.3, "4it", "13it", "3it", growth, decay="constant")
    optimizer, seen = SGD(model.parameters()), []
    with policy.follow(model, optimizer):
        first = policy.masks
        assert first == Pruner("random", allocation="erk")(net(), 0.3)
        for index in range(18):
            train(model, optimizer, index, index + 1)
            assert policy.masks is not None
            assert policy.masks.counts() == first.counts()
            seen.append(policy.masks != first)
            first = policy.masks
    assert [index for index, changed in enumerate(seen) if changed] == [6, 9, 12]


def test_what_set_grows_depends_on_its_seed_alone() -> None:
    found = []
    for noise, seed in ((0, 0), (1, 0), (0, 1)):
        model, policy = net(), Dynamic(0.3, "0it", "9it", "2it", "set", seed=seed)
        optimizer = SGD(model.parameters())
        torch.manual_seed(noise)
        with policy.follow(model, optimizer):
            train(model, optimizer, 0, 9)
        found.append(policy.masks)
    assert found[0] == found[1] != found[2]


def test_clipping_does_not_hide_what_could_grow() -> None:
    """Masking the gradients for a norm comes after looking at them; norms count only live weights."""
    found, norms = [], []
    for clip in (False, True):
        model, policy = net(), POLICIES["rigl"][0]()
        optimizer = SGD(model.parameters())

        def clipped(model: nn.Module = model, policy: Policy = policy) -> None:
            policy.mask_gradients()
            assert policy.masks is not None
            dead = [model.get_parameter(name).grad[~mask] for name, mask in policy.masks.items()]  # type: ignore[index]
            norms.append(float(torch.cat(dead).norm()))

        with policy.follow(model, optimizer):
            train(model, optimizer, 0, 9, before=clipped if clip else lambda: None)
        found.append((policy.masks, values(model)))
    assert found[0] == found[1]
    assert norms == [0.0] * 9


def test_a_layer_without_gradients_stays() -> None:
    model, policy = net(), Dynamic(0.3, "0it", "9it", "1it", decay="constant")
    optimizer = SGD(model.parameters())
    with policy.follow(model, optimizer):
        first = policy.masks

        def forget() -> None:
            model[0].weight.grad = None

        train(model, optimizer, 0, 6, before=forget)
        assert first is not None
        assert policy.masks is not None
        assert torch.equal(policy.masks["0.weight"], first["0.weight"])
        assert not torch.equal(policy.masks["2.weight"], first["2.weight"])


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
