"""A hunt whose process is killed, whose disk is full or read-only, whose checkpoints are damaged: nothing is lost."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prune.tickets.store import Store
from tests.helpers.processes import forked, run_until_killed
from workbench.launcher.cli import main

RECIPE = """
seed_everything: 3
ticket:
  job: hunt
  model: {class_path: workbench.models.MLP, init_args: {hidden: [12], norm: batch}}
  data: {class_path: workbench.data.Digits, init_args: {batch_size: 256}}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}
  trainer: {max_epochs: 3, accelerator: cpu}
  levels: {count: 3, rate: 0.5}
  rewind: 4it
  controls: [shuffled]
  checkpoint: 3it
"""
KEYS = ("metrics", "history", "mask_hash", "density", "rewind")


def run(folder: Path, *options: str) -> int:
    """What the command exits with, run in this process."""
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main("lightning", ["run", str(folder / "recipe.yaml"), "--out", str(folder / "run"), *options])
    return int(ended.value.code or 0)


def levels(folder: Path) -> dict[str, Any]:
    """Every training that is whole on disk: its results, and the hash of its weights."""
    found = {}
    for path in sorted((folder / "run" / "ticket").glob("level_*/**/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        index = json.loads((path.parent / "compact" / "checkpoint.json").read_text(encoding="utf-8"))
        name = str(path.parent.relative_to(folder))
        found[name] = {key: record[key] for key in KEYS} | {"weights": index["weights"]["sha256"]}
    return found


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in (folder / "run").rglob("*") if path.name.endswith((".tmp", ".part"))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return levels(folder)


def test_killed_at_random_moments_it_ends_as_undisturbed(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A moment is so many changes to the folder after the last kill, of the about 480 that a hunt makes."""
    draw = random.Random(5)
    for _ in range(3):
        changes, last = itertools.count(1), draw.randrange(3, 150)
        run_until_killed(lambda: run(tmp_path), tmp_path, lambda changes=changes, last=last: next(changes) == last)
    assert run(tmp_path) == 0
    assert levels(tmp_path) == whole
    assert not leftovers(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_twenty_times() -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "kills.py"
    done = subprocess.run([sys.executable, script, "--kills", "20"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 of 20 ended as the undisturbed run" in done.stdout


LAUNCHERS = {"lightning": (), "torchrun": ("torch.distributed.run", "--nproc_per_node=2", "-m")}


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_killed_together_end_as_undisturbed(tmp_path: Path, launcher: str, strategy: str) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for folder in (whole, pieces):
        folder.mkdir()
    assert started(whole, launcher, strategy).wait(1000) == 0, (whole / "log.txt").read_text()
    for level in ("level_00", "level_01/shuffled", "level_03"):
        process = started(pieces, launcher, strategy)
        last = pieces / "run" / "ticket" / level / "checkpoints" / "last.ckpt"
        while process.poll() is None and not last.exists():
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (pieces / "log.txt").read_text()
    assert started(pieces, launcher, strategy).wait(1000) == 0, (pieces / "log.txt").read_text()
    assert len(levels(whole)) == 7
    assert levels(pieces) == levels(whole)


def started(folder: Path, launcher: str, strategy: str) -> subprocess.Popen[bytes]:
    """The hunt in two processes, all of one group."""
    divided = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    }
    given = {"devices": 2, "strategy": divided if strategy == "fsdp2" else "ddp"}
    text = RECIPE.replace("norm: batch", "norm: layer").replace("cpu}", f"cpu, {json.dumps(given)[1:]}")
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "workbench", "run", "recipe.yaml", "--out", "run"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def failing(monkeypatch: pytest.MonkeyPatch, call: str, after: int, number: int) -> None:
    """Let the system call fail from the moment that it has been made so many times."""
    real, left = getattr(os, call), [after]

    def fail(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, fail)


def full_again_and_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, call: str, steps: Any, number: int = errno.ENOSPC
) -> int:
    """Run until it ends, each time with room for a few more writes; how often there was none."""
    for failures, room in enumerate(steps):
        with monkeypatch.context() as patch:
            failing(patch, call, room, number)
            status = run(folder)
        said = capfd.readouterr().err
        if status == 0:
            return failures
        assert status == 1
        assert os.strerror(number) in said
        assert "Traceback" not in said
        assert len(said.strip().splitlines()) <= 4, said
        assert not leftovers(folder)
        for path in (folder / "run").rglob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))
    raise AssertionError("it never ended")


@pytest.mark.parametrize("call", ["fsync", pytest.param("replace", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_again_and_again(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: Any, call: str
) -> None:
    """Each attempt has room for more writes than the last; what was whole before stays so."""
    steps = (7, 12, 19, 30, 200, 1000)
    assert full_again_and_again(tmp_path, monkeypatch, capfd, call, steps) >= 3
    assert levels(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_every_write(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: Any, call: str
) -> None:
    for room in range(1000):
        folder = tmp_path / str(room)
        folder.mkdir()
        failures = full_again_and_again(folder, monkeypatch, capfd, call, (room, 10_000))
        assert levels(folder) == whole
        if not failures:
            break
    assert room > 40


def test_files_that_do_not_fit(tmp_path: Path, whole: dict[str, Any]) -> None:
    """The system itself breaks off writing in the middle of a file."""
    log = tmp_path / "log.txt"

    def limited() -> None:
        sys.stderr = log.open("w", encoding="utf-8", buffering=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
        os._exit(run(tmp_path))

    process = forked(limited)
    process.join()
    said = log.read_text()
    assert process.exitcode == 1
    assert "OSError: [Errno 27] File too large: '" in said
    assert ".ckpt'" in said
    assert "Traceback" not in said
    assert not leftovers(tmp_path)
    assert run(tmp_path) == 0
    assert levels(tmp_path) == whole


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Root may write anywhere, so that the system is made to say what it says to others."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if str(path).startswith(str(tmp_path / "run")) and flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *rest, **options)

    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert run(tmp_path) == 2
    said = capfd.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "Permission denied" in said
    assert list((tmp_path / "run").iterdir()) == []
    with monkeypatch.context() as patch:
        failing(patch, "replace", 0, errno.EROFS)
        assert run(tmp_path) == 1
    assert "Read-only file system" in capfd.readouterr().err


class Stop(RuntimeError):
    pass


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], None]:
    """Gives a folder in which a hunt was stopped: in level 0, or at the end of level 2, when it was to be kept."""
    found: dict[str, Path] = {}
    keep = Store.keep

    def stop(self: Store, level: int, *rest: Any) -> Any:
        if level == 2:
            raise Stop
        return keep(self, level, *rest)

    for where in ("level_00", "level_02"):
        folder = found[where] = tmp_path_factory.mktemp(where)
        with pytest.MonkeyPatch.context() as patch:
            if where == "level_00":
                failing(patch, "replace", 4, errno.ENOSPC)
            else:
                patch.setattr(Store, "keep", stop)
            assert run(folder) == 1

    def give(folder: Path, where: str) -> None:
        shutil.copytree(found[where] / "run", folder / "run")

    return give


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def emptied(_: bytes) -> bytes:
    return b""


def other(_: bytes) -> bytes:
    return b"\x80\x02not a checkpoint"


@pytest.mark.parametrize("harm", [half, flipped, *(pytest.param(e, marks=pytest.mark.slow) for e in (emptied, other))])
def test_a_damaged_checkpoint_is_named(
    tmp_path: Path, whole: dict[str, Any], stopped: Any, harm: Callable[[bytes], bytes], capfd: Any
) -> None:
    """It is left where it is; without it the level is trained anew, and the others are kept."""
    stopped(tmp_path, "level_02")
    path = tmp_path / "run" / "ticket" / "level_02" / "checkpoints" / "ended.ckpt"
    path.write_bytes(harm(path.read_bytes()))
    before, kept = path.read_bytes(), levels(tmp_path)
    assert run(tmp_path) == 1
    said = capfd.readouterr().err
    assert f"{path} is damaged" in said
    assert "remove it to train this from the start; what is finished is kept" in said
    assert "Traceback" not in said
    assert path.read_bytes() == before
    assert levels(tmp_path) == kept
    if harm is not half:
        return
    path.unlink()
    last = path.with_name("last.ckpt")
    last.write_bytes(harm(last.read_bytes()))
    assert run(tmp_path) == 1
    assert f"{last} is damaged" in capfd.readouterr().err
    last.unlink()
    assert run(tmp_path) == 0
    assert levels(tmp_path) == whole


def test_a_rewind_point_that_is_damaged_or_missing_before_level_0_is_done(
    tmp_path: Path, whole: dict[str, Any], stopped: Any, capfd: Any
) -> None:
    stopped(tmp_path, "level_00")
    level = tmp_path / "run" / "ticket" / "level_00"
    point = tmp_path / "run" / "ticket" / "checkpoints" / "rewind.ckpt"
    assert (level / "checkpoints" / "last.ckpt").is_file()
    moved = point.rename(tmp_path / "moved")
    assert run(tmp_path) == 1
    assert f"{point} is missing" in capfd.readouterr().err
    moved.rename(point)
    point.write_bytes(flipped(point.read_bytes()))
    assert run(tmp_path) == 1
    said = capfd.readouterr().err
    assert f"{point} is damaged" in said
    assert f"move {level} aside to train it anew" in said
    level.rename(tmp_path / "aside")
    assert run(tmp_path) == 0
    assert levels(tmp_path) == whole
