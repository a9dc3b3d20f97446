"""A recipe from the first stage to the last: killed in every stage, and in two processes."""

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import forked, run_until_killed
from tests.helpers.ranks import on_ranks
from workbench.checkpoints.compact import find, read_index
from workbench.launcher.cli import main

RECIPE = """# a miniature of the main recipe
seed_everything: 3
data: {class_path: workbench.data.Digits, init_args: {batch_size: 64}}
trainer: {max_epochs: 4, accelerator: cpu}
teacher: {job: fit, model: {class_path: workbench.models.MLP, init_args: {hidden: [64]}}}
student: {job: distill, teacher: teacher, model: {class_path: workbench.models.MLP, init_args: {hidden: [24]}}}
answers: {job: cache, teacher: teacher, features: [layers.1]}
family:
  job: distill
  teacher: answers
  model:
    small: {class_path: workbench.models.MLP, init_args: {hidden: [16]}}
    tiny: {class_path: workbench.models.MLP, init_args: {hidden: [8]}}
  losses:
    soft: {loss: {class_path: distill.losses.DKD, init_args: {temperature: 2}}, weight: 0.5, warmup: 2ep}
    hard: {}
    hint: {loss: distill.losses.Hint, student: layers.1, decay: 3ep}
bought: {job: compare, teacher: teacher, students: [student, family/small, family/tiny]}
ticket: {job: hunt, start: student, levels: {count: 2, rate: 0.5}, rewind: 7it}
checkpoint: {job: export, of: ticket, formats: [torch, onnx]}
report: {job: report}
"""
STAGES = ["teacher", "student", "answers", "family", "bought", "ticket", "checkpoint", "report"]
TRAINED = ["teacher", "student", "family", "ticket"]


def arguments(folder: Path, *options: str) -> list[str]:
    """Command-line arguments that run the recipe in ``folder`` into ``folder/run``."""
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return ["run", str(folder / "recipe.yaml"), "--out", str(folder / "run"), *options]


def command(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> str:
    """What the command prints in a new interpreter; it has to succeed."""
    line = [sys.executable, "-m", *launcher, "workbench", *arguments(folder, *options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(line, cwd=folder, env=environment, timeout=240, check=False, **pipes)
    assert done.returncode == 0, done.stdout
    return done.stdout


def main_in_child(folder: Path) -> str:
    """What the command prints in a forked process; it has to succeed."""
    process = forked(main, "lightning", arguments(folder), output=folder / "output.txt")
    process.join(240)
    output = (folder / "output.txt").read_text(encoding="utf-8")
    assert process.exitcode == 0, output
    return output


def record(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "run" / stage / "record.json").read_text(encoding="utf-8"))


def status(folder: Path, stage: str) -> str:
    try:
        return record(folder, stage)["status"]
    except (FileNotFoundError, json.JSONDecodeError):
        return "absent"


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on how often the run was stopped."""
    found: dict[str, Any] = {}
    for stage in TRAINED:
        entry = record(folder, stage)
        parts = entry.get("students", {"": entry})
        found[stage] = [[part["metrics"], part["history"], part["size"]["nonzero"]] for part in parts.values()]
        found[f"{stage}, weights"] = [weights(folder / "run" / stage / name) for name in parts]
    found["comparison"] = record(folder, "bought")["comparison"]
    found["levels"] = [(entry["mask_hash"], entry["metrics"]) for entry in record(folder, "ticket")["levels"]]
    return {**found, "checkpoint": weights(folder / "run" / "checkpoint" / "compact")}


def weights(stage: Path) -> str:
    """Hash of the weights in a stage's checkpoint."""
    return read_index(find(stage))["weights"]["sha256"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, in this process: forked ones need not import what it has imported."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.raises(SystemExit) as ended:
        main("lightning", arguments(folder))
    assert not ended.value.code
    return folder


def test_the_run_leaves_what_it_says(whole: Path) -> None:
    run = whole / "run"
    assert [stage for stage in STAGES if status(whole, stage) == "finished"] == STAGES
    assert "<html" in (run / "report" / "index.html").read_text(encoding="utf-8")
    assert all(entry["same_predictions"] for entry in record(whole, "checkpoint")["exports"])
    assert record(whole, "checkpoint")["exports"][0]["largest_difference"] == 0
    assert not list(run.rglob("*.tmp"))
    level = record(whole, "ticket")["levels"][0]
    assert level["metrics"] == record(whole, "student")["metrics"], "level 0 is the student, trained again"


def test_a_second_run_keeps_everything(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "run").rglob("*") if path.is_file()}
    output = main_in_child(whole)
    assert output.count("kept") >= len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in (whole / "run").rglob("*") if path.is_file()} == before


def test_killed_in_every_stage_it_ends_as_undisturbed(whole: Path, tmp_path: Path) -> None:
    for stage in STAGES:
        inside = tmp_path / "run" / stage
        run_until_killed(lambda: main("lightning", arguments(tmp_path)), tmp_path, partial(_under_way, inside, stage))
        assert status(tmp_path, stage) == "running"
    main_in_child(tmp_path)
    assert outcome(tmp_path) == outcome(whole)
    assert not list((tmp_path / "run").rglob("last.ckpt.*"))


def _under_way(folder: Path, stage: str) -> bool:
    """Whether the stage has begun, and if it trains, has something to resume from."""
    if stage == "ticket":
        return (folder / "level_01" / "checkpoints" / "last.ckpt").exists()
    if stage in TRAINED:
        return (folder / "checkpoints" / "last.ckpt").exists()
    return (folder / "record.json").exists()


LAUNCHERS = {"lightning": (), "torchrun": ("torch.distributed.run", "--nproc_per_node=2", "-m")}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(tmp_path: Path, launcher: str) -> None:
    options = (
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--trainer.max_epochs",
        "2",
        "--data.batch_size",
        "32",
    )
    output = command(tmp_path, *options, launcher=LAUNCHERS[launcher])
    assert len(re.findall(r"^\w+ +[0-9.]+ s  test accuracy", output, re.MULTILINE)) == 4, "rank 0 alone speaks"
    for stage in TRAINED:
        assert record(tmp_path, stage)["world_size"] == 2
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == sorted(STAGES), "one set of files"
    assert sorted(path.name for path in (run / "ticket").glob("level_*")) == [
        "level_00",
        "level_01",
        "level_02",
    ]
    assert not list(run.rglob("*.tmp"))


def test_a_launcher_without_devices_is_refused(tmp_path: Path) -> None:
    """In processes as torchrun starts them, which `test_two_processes` runs itself."""

    def refused() -> str:
        text = io.StringIO()
        with redirect_stdout(text), redirect_stderr(text), pytest.raises(SystemExit) as ended:
            main("lightning", arguments(tmp_path))
        assert ended.value.code
        return text.getvalue()

    output = "".join(on_ranks(refused))
    assert "the launcher started 2 processes, but this stage's trainer has a world size of 1" in output
