"""A recipe from the first stage to the last: killed in every stage, and in two processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from workbench.checkpoints.compact import find, read_index

RECIPE = """# a miniature of the main recipe
seed_everything: 3
data: {class_path: workbench.data.Digits, init_args: {batch_size: 64}}
trainer: {max_epochs: 12, accelerator: cpu}
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
    hint: {loss: distill.losses.Hint, student: layers.1, decay: 10ep}
bought: {job: compare, teacher: teacher, students: [student, family/small, family/tiny]}
ticket: {job: hunt, start: student, levels: 2, rate: 0.5, rewind: 7it}
checkpoint: {job: export, of: ticket, formats: [torch, onnx]}
report: {job: report}
"""
STAGES = ["teacher", "student", "answers", "family", "bought", "ticket", "checkpoint", "report"]
TRAINED = ["teacher", "student", "family", "ticket"]


def start(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The recipe in ``folder`` on its way to ``folder/run``, in a process group of its own."""
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    command = [sys.executable, "-m", *launcher, "workbench", "run", "recipe.yaml", "--out", "run", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
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
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder))
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
    output = finish(start(whole))
    assert output.count("kept") >= len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in (whole / "run").rglob("*") if path.is_file()} == before


def test_killed_in_every_stage_it_ends_as_undisturbed(whole: Path, tmp_path: Path) -> None:
    for stage in STAGES:
        process = start(tmp_path)
        inside = tmp_path / "run" / stage
        while process.poll() is None and not _under_way(inside, stage):
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
        assert status(tmp_path, stage) == "running"
    finish(start(tmp_path))
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
    output = finish(start(tmp_path, *options, launcher=LAUNCHERS[launcher]))
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
    process = start(tmp_path, launcher=LAUNCHERS["torchrun"])
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "the launcher started 2 processes, but this stage's trainer has a world size of 1" in output
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
