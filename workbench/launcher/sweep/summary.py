"""The record of a sweep: a row for each run, and means with intervals over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from workbench.evaluation import statistics
from workbench.records import SEEDS, Estimate, OverSeeds, Run


def row(
    name: str,
    *,
    over: Mapping[str, Any],
    fingerprint: str,
    record: Mapping[str, Any] | None,
    attempts: int,
    failure: str | None,
) -> Run:
    """One run in the sweep's record; the rest is in the run's own record, in its folder.

    Args:
        name: The run's name and folder.
        over: Its point of the grid: values by dotted key.
        fingerprint: The run's fingerprint.
        record: The run's record if it is finished.
        attempts: How many attempts this sweep made; 0 if the run was finished before.
        failure: Why it is not finished.
    """
    run = Run(name, name, dict(over), fingerprint, attempts, "finished" if record else "failed", failure)
    if not record:
        return run
    measured = {key: record[key] for key in ("seconds", "metrics") if key in record}
    return replace(run, **measured, monitor=tuple(record.get("monitor", run.monitor)))


def over_seeds(runs: Sequence[Run]) -> list[OverSeeds]:
    """Mean and t interval of each metric over the finished runs that differ in nothing but the seed.

    A metric that a run lacks, or that is not finite in one, has no mean. Without a seed in the grid there is no row.
    """
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        setting = {key: value for key, value in run.over.items() if key not in SEEDS}
        if len(setting) == len(run.over):
            return []
        if run.status == "finished":
            group = next((group for seen, group in groups if seen == setting), None)
            if group is None:
                groups.append((setting, [run]))
            else:
                group.append(run)
    return [OverSeeds(setting, len(group), _means(group)) for setting, group in groups]


def _means(group: Sequence[Run]) -> dict[str, Estimate]:
    means: dict[str, Estimate] = {}
    for name in group[0].metrics:
        values = [run.metrics.get(name) for run in group]
        numbers = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
        if len(numbers) == len(values):
            means[name] = statistics.mean(numbers)
    return means
