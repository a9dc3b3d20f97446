"""Iterative magnitude pruning with rewinding: train, prune, rewind, repeat.

Everything here is idempotent: a training whose record is on disk is not trained again, so a search that was stopped at
any moment goes on when called again.
"""

import time
from collections.abc import Mapping
from typing import Any

from prune.masks import Masks
from prune.tickets.arms import ARMS, Hunt, check_other
from prune.tickets.scores import has_dropped
from prune.tickets.store import TICKET


def search(hunt: Hunt) -> list[dict[str, Any]]:
    """Train level 0 dense, then prune, rewind and train until the last density, or the score has dropped.

    Returns:
        The record of every level, with those of its ``controls`` and its ``connectivity``.
    """
    hunt.store.check()
    check_other(hunt)
    levels: list[dict[str, Any]] = []
    for level in range(len(hunt.densities)):
        record = train_arm(hunt, level, TICKET)
        if level and hunt.controls.names:
            record["controls"] = {arm: train_arm(hunt, level, arm) for arm in hunt.controls.names}
        if hunt.barrier is not None:
            record["connectivity"] = _connectivity(hunt, level)
        levels.append(record)
        if has_dropped(levels, hunt.max_drop, hunt.patience):
            break
    return levels


def train_arm(hunt: Hunt, level: int, name: str) -> dict[str, Any]:
    """Train one arm of a level and write its record, unless that is on disk already; return the record."""
    if (record := hunt.store.finished(level, name)) is not None:
        return _without_identity(record)
    started, folder, trainee = time.monotonic(), hunt.store.folder(level, name), hunt.trainee
    if level or name != TICKET:
        _check_rewind_point(hunt)
    arm = ARMS[name](hunt, level)
    result = trainee.train(arm, folder, hunt.part(level, name), level)
    masks = Masks.ones(hunt.pruner.scope(trainee.network)) if arm.masks is None else arm.masks
    masks.apply(trainee.network)
    trainee.save(folder, result, masks)
    if hunt.diagnose:
        result["diagnosis"] = hunt.diagnose(masks)
    result["seconds"] = round(time.monotonic() - started, 3)
    result["rewind"] = arm.start.described(same_order=arm.seed == trainee.seed)
    if arm.saves:
        result["points"] = trainee.point_hashes()
    return _without_identity(hunt.store.keep(level, name, result, masks))


def _without_identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """A training's record without what all trainings of the hunt have in common."""
    return {name: value for name, value in record.items() if name not in ("format", "settings", "fingerprint")}


def _connectivity(hunt: Hunt, level: int) -> dict[str, Any]:
    """The error barriers of a level by split, ``orders`` to its ``twin``, ``levels`` to the level before."""
    line = hunt.controls.interpolation
    assert hunt.barrier is not None
    assert line is not None, "asked for"
    barriers = hunt.store.measurement(level, "connectivity")
    if barriers is None or not line.measured(barriers["orders"]):
        twin, ticket = train_arm(hunt, level, "twin"), hunt.store.weights(level)
        barriers = {"orders": hunt.barrier(ticket, hunt.store.weights(level, "twin")), "twin": twin["metrics"]}
        if level:
            barriers["levels"] = hunt.barrier(ticket, hunt.store.weights(level - 1))
        hunt.store.save_measurement(level, "connectivity", barriers)
    return barriers


def _check_rewind_point(hunt: Hunt) -> None:
    """Refuse checkpoints of level 0 that are not those that it saved."""
    first = hunt.store.finished(0) or {}
    on_disk = hunt.trainee.point_hashes()
    for name, digest in first.get("points", {}).items():
        if on_disk.get(name) != digest:
            state = "was altered" if name in on_disk else "is missing"
            raise ValueError(f"the rewind {name} {state}: move level_00 aside to train it anew, levels are kept")
