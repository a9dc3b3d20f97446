"""The record of a sweep: a row for each run, and means with intervals over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from workbench.evaluation import statistics

SEEDS = ("seed", "seed_everything")


def row(
    name: str,
    *,
    over: Mapping[str, Any],
    fingerprint: str,
    record: Mapping[str, Any] | None,
    attempts: int,
    failure: str | None,
) -> dict[str, Any]:
    """One run in the sweep's record; the rest is in the run's own record, in its folder.

    Args:
        name: The run's name and folder.
        over: Its point of the grid: values by dotted key.
        fingerprint: The run's fingerprint.
        record: The run's record if it is finished.
        attempts: How many attempts this sweep made; 0 if the run was finished before.
        failure: Why it is not finished.
    """
    results = {key: record[key] for key in ("seconds", "metrics", "monitor") if key in record} if record else {}
    status = {"status": "finished"} if record else {"status": "failed", "error": failure}
    identity = {"name": name, "folder": name, "over": dict(over), "fingerprint": fingerprint, "attempts": attempts}
    return {**identity, **status, **results}


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and t interval of each metric over the finished runs that differ in nothing but the seed.

    A metric that a run lacks, or that is not finite in one, has no mean. Without a seed in the grid there is no row.
    """
    groups: list[tuple[dict[str, Any], list[Mapping[str, Any]]]] = []
    for each in rows:
        setting = {key: value for key, value in each["over"].items() if key not in SEEDS}
        if len(setting) == len(each["over"]):
            return []
        if each["status"] == "finished":
            group = next((group for other, group in groups if other == setting), None)
            if group is None:
                groups.append((setting, [each]))
            else:
                group.append(each)
    return [{"over": setting, "n": len(group), "metrics": _means(group)} for setting, group in groups]


def _means(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metrics = [each.get("metrics") or {} for each in group]
    means: dict[str, Any] = {}
    for name in metrics[0]:
        values = [each.get(name) for each in metrics]
        numbers = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
        if len(numbers) == len(values):
            mean = asdict(statistics.mean(numbers))
            means[name] = {key: mean[key] for key in ("mean", "deviation", "interval")}
    return means
