"""Rows and means of a sweep's record, without running one."""

from dataclasses import replace
from typing import Any

import pytest

from workbench.launcher.sweep.summary import over_seeds, row
from workbench.records import Run

RECORD = {"metrics": {"loss": 1.0}, "monitor": ["loss", "min"], "seconds": 2.0, "history": []}


def finished(over: dict[str, Any], **metrics: float | None) -> Run:
    record = {"metrics": metrics}
    return row("a", over=over, fingerprint="f", record=record, attempts=1, failure=None)


def test_a_row_has_what_tells_runs_apart_and_how_they_ended() -> None:
    entry = row("size-1", over={"size": 1}, fingerprint="f", record=RECORD, attempts=2, failure=None)
    run = Run("size-1", "size-1", {"size": 1}, "f", attempts=2)
    results: dict[str, Any] = {"metrics": {"loss": 1.0}, "monitor": ("loss", "min"), "seconds": 2.0}
    assert entry == replace(run, status="finished", **results)
    entry = row("size-1", over={"size": 1}, fingerprint="f", record=None, attempts=2, failure="it broke")
    assert entry == replace(run, status="failed", error="it broke")


def test_means_are_over_the_seeds_of_one_setting() -> None:
    rows = [finished({"size": size, "seed": seed}, loss=size + seed) for size in (1, 2) for seed in (0, 2)]
    failed = row("b", over={"size": 2, "seed": 9}, fingerprint="f", record=None, attempts=1, failure="no")
    first, second = over_seeds([*rows, failed])
    assert (first.over, first.n, first.metrics["loss"].mean) == ({"size": 1}, 2, 2.0)
    assert (second.over, second.n, second.metrics["loss"].mean) == ({"size": 2}, 2, 3.0)
    assert over_seeds([finished({"size": 1}, loss=1.0)]) == [], "no seed in the grid"


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_metric_that_one_run_lacks_has_no_mean(value: float | None) -> None:
    rows = [finished({"seed": 0}, loss=1.0, accuracy=0.5), finished({"seed": 1}, loss=2.0, accuracy=value)]
    assert over_seeds(rows)[0].metrics.keys() == {"loss"}
