import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune.policies import Dynamic, Policy, Timestamp
from prune.policies.dynamic import cosine, rewired
from prune.pruner import Pruner
from tests.helpers.bare_loop import ADAMW, SGD, grads, net, train, values


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
        model, policy = net(), Dynamic(0.3, "0it", "9it", "2it")
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


def test_after_the_training_nothing_holds_the_model() -> None:
    model, policy = net(), Dynamic(0.5, "0it", "9it", "2it")
    optimizer = SGD(model.parameters())
    with policy.follow(model, optimizer):
        train(model, optimizer, 0, 3)
        while_at_work = pickle.dumps(policy)
    held = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert held() is None
    assert b"nn.modules" not in while_at_work
    assert b"nn.modules" not in pickle.dumps(policy)
