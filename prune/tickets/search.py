"""The loop of iterative magnitude pruning: train, prune, rewind, repeat."""

import time
from collections.abc import Mapping
from typing import Any

from prune.masks import Masks
from prune.tickets.arms import ARMS, Hunt, check_other
from prune.tickets.densities import enough
from prune.tickets.store import TICKET


def search(hunt: Hunt) -> list[dict[str, Any]]:
    """Train, prune, rewind, repeat: the records of the levels, each with those of its controls."""
    hunt.store.check()
    check_other(hunt)
    levels: list[dict[str, Any]] = []
    for level in range(len(hunt.densities)):
        done = {arm: trained(hunt, level, arm) for arm in (TICKET, *(hunt.controls if level else ()))}
        controls = {arm: record for arm, record in done.items() if arm != TICKET}
        levels.append({**done[TICKET], **({"controls": controls} if controls else {}), **_connected(hunt, level)})
        if enough(levels, hunt.fall, hunt.patience):
            break
    return levels


def trained(hunt: Hunt, level: int, arm: str) -> dict[str, Any]:
    """The record of one training of a level, which is trained unless it is whole on disk."""
    if (record := hunt.store.finished(level, arm)) is not None:
        return _told(record)
    began, folder = time.monotonic(), hunt.store.folder(level, arm)
    if level or arm != TICKET:
        _check_points(hunt)
    what = ARMS[arm](hunt, level)
    result = hunt.trainee.train(what, folder, hunt.part(level, arm), level)
    masks = Masks.ones(hunt.pruner.scope(hunt.trainee.network)) if what.masks is None else what.masks
    masks.apply(hunt.trainee.network)
    hunt.trainee.save(folder, result, masks)
    result |= {"diagnosis": hunt.study(masks)} if hunt.study else {}
    rewind = what.start.described(same_order=what.seed == hunt.trainee.seed)
    result |= {"seconds": round(time.monotonic() - began, 3), "rewind": rewind}
    points = {"points": hunt.trainee.points()} if what.leaves else {}
    return _told(hunt.store.keep(level, arm, {**result, **points}, masks))


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training's record belongs into the hunt's."""
    return {name: value for name, value in record.items() if name not in ("format", "settings", "fingerprint")}


def _connected(hunt: Hunt, level: int) -> dict[str, Any]:
    """The barriers of a level, ``orders`` to its twin and ``levels`` to the level before; nothing if nobody asks."""
    if hunt.connect is None:
        return {}
    if (found := hunt.store.noted(level, "connectivity")) is None:
        twin = trained(hunt, level, "twin")
        ticket = hunt.store.weights(level)
        found = {"orders": {**hunt.connect(ticket, hunt.store.weights(level, "twin")), "twin": twin["metrics"]}}
        if level:
            found["levels"] = hunt.connect(ticket, hunt.store.weights(level - 1))
        hunt.store.note(level, "connectivity", found)
    return {"connectivity": found}


def _check_points(hunt: Hunt) -> None:
    """Refuse moments of level 0 that are not those that it kept."""
    first = hunt.store.finished(0) or {}
    here = hunt.trainee.points()
    for name, digest in first.get("points", {}).items():
        if here.get(name) != digest:
            state = "was altered" if name in here else "is missing"
            raise ValueError(f"the rewind {name} {state}: move level_00 aside to train it anew, levels are kept")
