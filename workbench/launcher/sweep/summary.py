"""What the runs of a sweep come to: a row for each run, and means over its seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from workbench.evaluation import statistics

SEEDS = ("seed", "seed_everything")


def row(
    name: str,
    over: Mapping[str, Any],
    fingerprint: str,
    record: Mapping[str, Any] | None,
    attempts: int,
    failure: str | None,
) -> dict[str, Any]:
    """One run, for the sweep's record; everything else is in the run's own, in its folder.

    Args:
        name: Of the run, which is its folder's.
        over: The values that make it this run, by key.
        fingerprint: Of the run.
        record: The run's, if it is finished.
        attempts: That it took this time; none if it was finished before.
        failure: Why it is not finished.
    """
    told = {key: record[key] for key in ("seconds", "metrics", "monitor") if key in record} if record else {}
    status = {"status": "finished"} if record else {"status": "failed", "error": failure}
    found = {"name": name, "folder": name, "over": dict(over), "fingerprint": fingerprint, "attempts": attempts}
    return {**found, **status, **told}


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every setting but the seed, what its runs' metrics are on average, and the t interval of that.

    A metric that a run lacks, or that is not finite in one, has no mean. Without a seed in the grid there is no row.
    """
    groups: list[tuple[dict[str, Any], list[Mapping[str, Any]]]] = []
    for each in rows:
        setting = {key: value for key, value in each["over"].items() if key not in SEEDS}
        if len(setting) == len(each["over"]):
            return []
        if each["status"] == "finished":
            found = next((group for known, group in groups if known == setting), None)
            if found is None:
                groups.append((setting, [each]))
            else:
                found.append(each)
    return [{"over": setting, "n": len(group), "metrics": _means(group)} for setting, group in groups]


def _means(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metrics = [each.get("metrics") or {} for each in group]
    found: dict[str, Any] = {}
    for name in metrics[0]:
        values = [each.get(name) for each in metrics]
        numbers = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
        if len(numbers) == len(values):
            told = asdict(statistics.mean(numbers))
            found[name] = {key: told[key] for key in ("mean", "deviation", "interval")}
    return found
