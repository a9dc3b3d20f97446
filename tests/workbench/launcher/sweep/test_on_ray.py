"""Runs on Ray: workers lost, runs that die, and the same records as in place."""

from pathlib import Path
from typing import Any

import pytest

from workbench import records
from workbench.launcher import recipe
from workbench.launcher.runner import StageError, run
from workbench.launcher.sweep.on_ray import Ray

pytestmark = pytest.mark.usefixtures("eager")
GRID = "grid: {job: sweep, run: {job: make}, over: {mood: [fine, lost, once], size: [1, 2]}, GIVEN}\n"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers give way to everything else on the machine, other tests too, if they are not told not to."""
    monkeypatch.setenv("RAY_worker_niceness", "0")


def execute(given: str, out: str, text: str = GRID) -> list[dict[str, Any]]:
    Path("r.yaml").write_text(text.replace("GIVEN", given))
    return run(recipe.read(Path("r.yaml")), Path(out))


@pytest.mark.parametrize(("name", "value"), [("cpus", -1), ("gpus", float("inf")), ("cpus", float("nan"))])
def test_what_no_run_can_have_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}: give a number from 0"):
        Ray(**{name: value})


@pytest.mark.slow
def test_a_lost_worker_costs_an_attempt_and_the_records_are_those_of_a_sweep_in_place(plugin: Any) -> None:
    pytest.importorskip("ray")
    (there,) = execute("ray: {cpus: 0.5}", "there")
    attempts = {row["name"]: row["attempts"] for row in there["runs"]}
    assert attempts == {
        f"mood-{mood}_size-{size}": 1 if mood == "fine" else 2 for mood in ("fine", "lost", "once") for size in (1, 2)
    }
    (here,) = execute("workers: 1", "here", GRID.replace("lost, ", ""))
    rows = {row["name"]: row for row in there["runs"]}
    for row in here["runs"]:
        assert {**row, "seconds": 0} == {**rows[row["name"]], "seconds": 0}
        mine, theirs = (records.read(Path(out) / "grid" / row["folder"]) or {} for out in ("here", "there"))
        for key in ("fingerprint", "given", "arguments", "metrics", "parents", "seed"):
            assert mine[key] == theirs[key]
    assert not list(Path("there/grid").glob("*/.*"))


@pytest.mark.slow
def test_what_fails_on_ray_is_said(plugin: Any) -> None:
    pytest.importorskip("ray")
    text = "grid: {job: sweep, run: {job: make}, over: {mood: [fine, bad]}, retries: 0, ray: {cpus: 0.5}}"
    with pytest.raises(StageError, match=r"1 of 2 runs failed.*\n  grid/mood-bad: ArithmeticError: as asked"):
        execute("", "out", text)
    with pytest.raises(StageError, match=r"each run wants 1000 CPU, this machine has \d+"):
        execute("", "out", text.replace("0.5", "1000"))
