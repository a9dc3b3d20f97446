import pytest
import torch
from torch import nn

from prune.criteria import CRITERIA
from prune.masks import Masks
from prune.policies import Gradual
from prune.pruner import Pruner
from prune.schedule import SCHEDULES, kept
from tests.helpers.bare_loop import ADAMW, SGD, TOTAL, alive, grads, net, train


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
            assert policy.masks is None or policy.masks.is_applied_to(model)
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
