"""Every policy in every framework: it trains to its density, resumes bit for bit, and survives a copy.

A policy without a row in the table of cases, or without a callback in a framework, fails.
"""

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import prune
import prune.callbacks
import prune.hf
import prune.policies
from prune.masks import Masks
from prune.policies import Iterative, Policy
from prune.rewinding.snapshot import Snapshot
from prune.schedule import kept
from tests.helpers import bare_loop, lightning_training, transformers_training
from tests.helpers.policy_cases import CASES, Case

pytestmark = pytest.mark.usefixtures("quick_collection")
BROKEN_OFF = 8  # of 16 updates; the end of an epoch, so that every framework goes on with the same batches


class Trained(NamedTuple):
    policy: Policy
    weights: dict[str, Tensor]
    masks: Masks


def trained(policy: Policy, model: nn.Module) -> Trained:
    assert policy.masks is not None
    assert policy.masks.is_applied_to(model)
    return Trained(policy, {name: value.detach().clone() for name, value in model.named_parameters()}, policy.masks)


def by_loop(case: Case, folder: Path, resume: bool) -> Trained:
    """Levels end after 9 updates, for which a callback stands in."""
    model = bare_loop.net()
    optimizer, policy, start = bare_loop.ADAMW(model.parameters()), case.make(model), 0
    if resume:
        stored = torch.load(folder / "last.pt", weights_only=False)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        policy.load_state_dict(stored["policy"])
        start = BROKEN_OFF
    with policy.follow(model, optimizer):
        for update in range(start, 16):
            if update == BROKEN_OFF and not resume:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "policy": policy.state_dict(),
                }
                torch.save(state, folder / "last.pt")
            if isinstance(policy, Iterative) and update == 2:
                policy.point = Snapshot.take(model, optimizer, rng=False)
            if isinstance(policy, Iterative) and update == 9:
                policy.end_level()
                policy.start_next_level(model, optimizers=optimizer)
            bare_loop.train(model, optimizer, update, update + 1)
        if isinstance(policy, Iterative):
            policy.end_level()
    return trained(policy, model)


def by_lightning(namespace: Any, case: Case, folder: Path, resume: bool) -> Trained:
    """Two epochs of eight batches, which for a ticket are those of a level."""
    module = lightning_training.user_module(namespace, lightning_training.ADAMW)
    callback = case.make(module.network, prune)
    path = folder / f"epoch=0-step={BROKEN_OFF}.ckpt" if resume else None
    keep = [] if resume else [namespace.callbacks.ModelCheckpoint(folder, save_top_k=-1, save_on_train_epoch_end=True)]
    lightning_training.fit(module, callback, *keep, namespace=namespace, max_epochs=2, ckpt_path=path)
    return trained(callback.policy, module.network)


def by_transformers(case: Case, folder: Path, resume: bool) -> Trained:
    """Two epochs of eight batches, which for a ticket are two levels of nine updates after the point at 2."""
    model = transformers_training.bert()
    callback = case.make(model, prune.hf)
    saving = {"save_strategy": "steps", "save_steps": BROKEN_OFF}
    path = str(folder / f"checkpoint-{BROKEN_OFF}") if resume else None
    transformers_training.trained(folder, callback, model=model, resume=path, **saving)
    return trained(callback.policy, model)


FRAMEWORKS: dict[str, Callable[[Case, Path, bool], Trained]] = {
    "loop": by_loop,
    "lightning.pytorch": lambda *given: by_lightning(lp, *given),
    "pytorch_lightning": lambda *given: by_lightning(pl, *given),
    "transformers": by_transformers,
}


def test_no_row_is_missing() -> None:
    public = {getattr(prune.policies, name) for name in prune.policies.__all__}
    policies = {each for each in public if issubclass(each, Policy) and not inspect.isabstract(each)}
    assert {case.policy for case in CASES.values()} == policies
    for namespace in (prune.callbacks, prune.hf):
        base = namespace.PolicyCallback
        classes = {name: each for name in namespace.__all__ if isinstance(each := getattr(namespace, name), type)}
        callbacks = {name for name, each in classes.items() if issubclass(each, base) and each is not base}
        assert callbacks == {case.callback for case in CASES.values()}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_it_trains_to_its_density_and_resumes_bit_for_bit(name: str, framework: str, tmp_path: Path) -> None:
    case, train = CASES[name], FRAMEWORKS[framework]
    whole = train(case, tmp_path, False)
    total = sum(mask.numel() for mask in whole.masks.values())
    assert sum(count for count, _ in whole.masks.counts().values()) == kept(total, case.density)
    assert whole.policy.shortfall() is None
    rest = train(case, tmp_path, True)
    assert rest.masks == whole.masks
    assert all(torch.equal(value, whole.weights[key]) for key, value in rest.weights.items())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("namespace", [None, prune, prune.hf], ids=["policy", "lightning", "transformers"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_a_copy_is_the_same(name: str, namespace: Any, copied: Callable[[Any], Any]) -> None:
    one = CASES[name].make(bare_loop.net(), namespace)
    other = copied(one)
    assert type(other) is type(one)
    assert other.masks == one.masks
    assert getattr(other, "state_key", None) == getattr(one, "state_key", None)
    policy, twin = (getattr(each, "policy", each) for each in (one, other))
    assert twin.state_dict().keys() == policy.state_dict().keys()
    twin.load_state_dict(policy.state_dict())
    assert twin.masks == policy.masks
