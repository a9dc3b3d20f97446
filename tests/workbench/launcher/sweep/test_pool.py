"""Runs in processes of their own: killed, failing, stopped, orphaned; and the same results as without."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench import records
from workbench.checkpoints import compact
from workbench.launcher import recipe
from workbench.launcher.runner import StageError, run
from workbench.launcher.sweep import process
from workbench.launcher.sweep.progress import ProgressDisplay

LIGHT = """
import json, os, signal, sys, threading, time
from pathlib import Path
from workbench import records

def end():
    while os.read(0, 1): pass
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end, daemon=True).start()
task = json.loads(Path(sys.argv[1]).read_text())
folder, given = Path(task["out"]) / task["stage"], task["arguments"]
record = {"stage": task["stage"], "fingerprint": task["lineage"][task["stage"]][0]}
mood = given.get("mood", "fine")
print("I feel", mood, os.environ["OMP_NUM_THREADS"], os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RUN_ID"))
sys.stdout.flush()
first, told = not (folder / "tried").exists(), folder / ".progress.json"
attempt = json.loads(told.read_text())["attempt"] + 1 if told.exists() else 1
told.write_text(json.dumps({"attempt": attempt, "done": 1, "total": 3}))
records.write(folder, {**record, "status": "running"})
with (folder / "tried").open("a") as tried:
    print(os.getpid(), file=tried)
if mood == "waits" and first:
    time.sleep(600)
if mood == "dies" or (mood == "once" and first):
    os.kill(os.getpid(), signal.SIGKILL)
if mood == "fails":
    error = "Traceback\\n  somewhere\\nArithmeticError: as asked\\n"
    records.write(folder, {**record, "status": "failed", "error": error})
    sys.exit(3)
if mood == "leaves":
    sys.exit(0)
if mood == "crashes":
    raise ImportError("no such thing")
records.write(folder, {**record, "status": "finished", "metrics": {"test/loss": 1.0}, "seconds": 1.0})
"""


def execute(over: str, given: str = "workers: 2") -> list[dict[str, Any]]:
    Path("r.yaml").write_text(f"grid: {{job: sweep, run: {{job: make}}, over: {over}, {given}}}\n")
    return run(recipe.read(Path("r.yaml")), Path("out"))


@pytest.fixture
def light(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that import little and do as the run's mood says."""
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-c", LIGHT))
    monkeypatch.setattr("workbench.launcher.sweep.pool._POLL", 0.01)


def log(name: str) -> str:
    return (Path("out/grid") / name / "log.txt").read_text()


def test_one_that_dies_takes_no_other_with_it_and_is_tried_again(light: None) -> None:
    (grid,) = execute("{mood: [fine, once], size: [1, 2]}")
    assert [(row["status"], row["attempts"]) for row in grid["runs"]] == [("finished", 1)] * 2 + [("finished", 2)] * 2
    assert log("mood-once_size-1").count("--- 20") == 2
    assert not list(Path("out/grid").glob("*/.*")), "what was only for the time of the run is gone"


def test_what_became_of_each_that_failed_is_said(light: None) -> None:
    with pytest.raises(StageError) as caught:
        execute("{mood: [fails, dies, leaves, crashes, fine]}", "workers: 3, retries: 1")
    said = str(caught.value)
    assert "stage 'grid': 4 of 5 runs failed, the others are kept\n" in said
    assert "\n  grid/mood-fails: ArithmeticError: as asked\n" in said
    assert "\n  grid/mood-dies: its process was killed by SIGKILL; out/grid/mood-dies/log.txt ends with:" in said
    assert "\n    I feel dies 1 None None" in said
    assert "grid/mood-leaves: its process ended with exit code 0; out/grid/mood-leaves/log.txt ends" in said
    assert "grid/mood-crashes: its process ended with exit code 1;" in said
    assert "\n    ImportError: no such thing" in said
    rows = {row["name"]: row for row in (records.read(Path("out/grid")) or {})["runs"]}
    assert {name: (row["status"], row["attempts"]) for name, row in rows.items()} == {
        **{f"mood-{mood}": ("failed", 2) for mood in ("fails", "dies", "leaves", "crashes")},
        "mood-fine": ("finished", 1),
    }


def test_a_process_is_alone_whatever_started_this_one(light: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a launcher even one worker gets a process: one of several cannot train alone."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    execute("{size: [1]}", "workers: 1")
    assert "I feel fine 7 None None" in log("size-1")
    execute("{size: [2]}", "workers: 3")
    assert "I feel fine 2 None None" in log("size-2")


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.02)


def pids(name: str) -> list[int]:
    path = Path("out/grid") / name / "tried"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_when_stopped_it_stops_what_it_started_and_goes_on_later(light: None, stop: int) -> None:
    def end() -> None:
        until(lambda: bool(pids("mood-waits_size-1") and pids("mood-waits_size-2")))
        os.kill(os.getpid(), stop)

    before = signal.getsignal(signal.SIGTERM)
    theirs = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are born deaf to it
    stopper = threading.Thread(target=end)
    stopper.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            execute("{mood: [fine, waits], size: [1, 2]}")
    finally:
        signal.signal(signal.SIGINT, theirs)
    stopper.join()
    assert signal.getsignal(signal.SIGTERM) == before
    for name in ("mood-waits_size-1", "mood-waits_size-2"):
        assert gone(pids(name)[0])
        assert (records.read(Path("out/grid") / name) or {})["status"] == "running"
    assert (records.read(Path("out/grid")) or {})["status"] == "running"
    (grid,) = execute("{mood: [fine, waits], size: [1, 2]}")
    assert [row["attempts"] for row in grid["runs"]] == [0, 0, 1, 1]


def test_what_a_killed_sweep_started_ends_with_it_and_what_was_finished_is_kept(light: None) -> None:
    over = "{mood: [fine, waits], size: [1, 2]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork of a process with threads
        sweep = multiprocessing.get_context("fork").Process(target=execute, args=(over,))
        sweep.start()
    until(lambda: bool(pids("mood-waits_size-1") and pids("mood-waits_size-2")))
    sweep.kill()
    sweep.join()
    left = pids("mood-waits_size-1") + pids("mood-waits_size-2")
    until(lambda: all(map(gone, left)))
    assert (records.read(Path("out/grid")) or {})["status"] == "running"
    (grid,) = execute(over)
    assert [(row["status"], row["attempts"]) for row in grid["runs"]] == [("finished", 0)] * 2 + [("finished", 1)] * 2
    assert [len(pids(row["name"])) for row in grid["runs"]] == [1, 1, 2, 2]


def test_a_process_killed_before_it_left_a_record_is_no_stranger(light: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    with pytest.raises(StageError, match="its process was killed by SIGKILL"):
        execute("{size: [1]}", "workers: 2, retries: 0")
    assert [path.name for path in Path("out/grid/size-1").iterdir()] == ["log.txt"]
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-c", LIGHT))
    assert execute("{size: [1]}")[0]["status"] == "finished"


def test_the_runs_at_work_are_shown(light: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench import progress

    shown: list[tuple[int, int, str, dict[str, progress.RunProgress]]] = []

    class Bars(progress.Bars):
        def update(self, done: int, total: int, message: str) -> None:
            self.said = (done, total, message)

        def show_runs(self, runs: Any) -> None:
            if runs:
                shown.append((*self.said, dict(runs)))

    monkeypatch.setattr(progress, "Bars", Bars)
    refresh = ProgressDisplay.refresh

    def killing(self: ProgressDisplay) -> None:
        refresh(self)
        if shown and len(pids("mood-waits")) == 1 and not gone(pids("mood-waits")[0]):
            os.kill(pids("mood-waits")[0], signal.SIGKILL)

    monkeypatch.setattr(ProgressDisplay, "refresh", killing)
    execute("{mood: [fine, waits]}", "workers: 2, retries: 1")
    waiting = next(entry for entry in shown if "grid/mood-waits" in entry[3])
    assert waiting[1] == 2
    assert "running" in waiting[2]
    assert waiting[3]["grid/mood-waits"] == progress.RunProgress(1, 1, 3)


FIT = """
model: {class_path: workbench.models.MLP, init_args: {in_features: 64, hidden: [8], classes: 10}}
data: {class_path: workbench.data.Digits, init_args: {batch_size: 256}}
trainer: {max_epochs: 3, accelerator: cpu, callbacks: [{class_path: killer_of_runs.Kill}]}
seed_everything: 1
STAGE
"""
KILL = """
import os, signal
from pathlib import Path
from lightning.pytorch import Callback
class Kill(Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 2 and os.environ.get("KILLED") and not Path(os.environ["KILLED"]).exists():
            Path(os.environ["KILLED"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


GELU = "{job: sweep, run: {job: fit}, over: {model.init_args.activation: [gelu]}"


def made(stage: str, out: str) -> list[dict[str, Any]]:
    Path("r.yaml").write_text(FIT.replace("STAGE", stage))
    return run(recipe.read(Path("r.yaml")), Path(out))


def check_same(folder: Path, other: Path) -> None:
    one, two = records.finished(folder) or {}, records.finished(other) or {}
    assert all(one[key] == two[key] for key in ("fingerprint", "metrics", "history"))
    before, after = compact.tensors(folder), compact.tensors(other)
    assert all(before[name].equal(after[name]) for name in before)


def test_a_run_in_place_is_the_same_as_a_stage(plugin: Any, tmp_path: Path) -> None:
    (tmp_path / "site" / "killer_of_runs.py").write_text(KILL)
    made("alone: {job: fit}\n" + f"grid: {GELU}}}", "here")
    check_same(Path("here/alone"), Path("here/grid/activation-gelu"))


@pytest.mark.slow
def test_a_run_in_a_process_that_was_killed_in_between_is_the_same_as_in_place(
    plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site" / "killer_of_runs.py").write_text(KILL)
    monkeypatch.setattr("workbench.launcher.sweep.pool._POLL", 0.05)
    made(f"grid: {GELU}}}", "here")
    monkeypatch.setenv("KILLED", str(tmp_path / "killed"))
    (grid,) = made(f"grid: {GELU}, workers: 2}}", "there")
    assert (tmp_path / "killed").exists()
    assert grid["runs"][0]["attempts"] == 2
    folders = [Path("here/grid/activation-gelu"), Path("there/grid/activation-gelu")]
    check_same(*folders)
    here, there = (records.finished(folder) or {} for folder in folders)
    assert json.loads(json.dumps(here["arguments"])) == there["arguments"]
