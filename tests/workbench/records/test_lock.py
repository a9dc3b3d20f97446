"""One process in a folder: refused at once, free again however the owner ends."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import FORK, holder
from workbench.records import lock
from workbench.records.lock import locked


def test_the_second_process_is_told_who_is_there_and_gets_in_when_the_owner_was_killed(tmp_path: Path) -> None:
    with holder(tmp_path / "run", child=True) as (owner, children):
        with pytest.raises(ValueError, match="is in use by process") as caught, locked(tmp_path / "run"):
            pass
        said = str(caught.value)
        assert said.startswith(f"{tmp_path / 'run'} is in use by process {owner.pid} on {os.uname().nodename} since 20")
        assert f"wait until it is done, stop it (kill {owner.pid}), or choose another folder" in said
        owner.kill()
        owner.join()
        os.kill(children[0], 0)  # its forked child lives on, and does not keep the lock
        with locked(tmp_path / "run"):
            pass


def test_what_is_done_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []
    with pytest.raises(ArithmeticError), locked(folder):
        raise ArithmeticError
    with holder(folder) as (other, _):
        assert other.is_alive(), "it could lock what was let go"


def test_a_process_may_enter_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with locked(tmp_path / "run"):
        with locked(Path("run")):
            pass
        assert (tmp_path / "run" / ".lock").exists(), "the outer one still holds it"
        with locked(tmp_path / "run" / "stage"):
            pass
        script = "import sys; from pathlib import Path; from workbench.records.lock import locked\n"
        script += "with locked(Path(sys.argv[1])): pass"
        other = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True)
        assert (other.returncode, "in use by process" in other.stderr) == (1, True)


def test_a_forked_child_neither_holds_nor_ends_its_parents_lock(tmp_path: Path) -> None:
    def child() -> None:
        assert lock._held == {}
        with pytest.raises(ValueError, match=f"in use by process {os.getppid()}"), locked(tmp_path):
            pass

    with locked(tmp_path):
        process = FORK.Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert (tmp_path / ".lock").exists()


def test_other_ranks_do_not_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with holder(tmp_path) as (other, _), locked(tmp_path):
        assert other.is_alive()


def test_a_lock_removed_by_its_holder_at_the_last_moment_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening of the file and its locking, the holder removed it and let go."""
    assert lock.fcntl is not None
    flock, removed = lock.fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with locked(tmp_path):
        assert removed
        assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"pid": 1}'])
def test_an_owner_that_has_not_signed_is_just_another_process(text: bytes) -> None:
    assert "run is in use by another process" in lock._in_use(Path("run"), text)


def test_an_owner_elsewhere_is_named_with_its_host() -> None:
    text = json.dumps({"pid": 7, "host": "far", "since": "2026-01-01"}).encode()
    assert "stop it there (kill 7 on far)" in lock._in_use(Path("run"), text)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    def fail(*_: object) -> int:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "open" if fault == errno.EROFS else "pwrite", fail)
    with pytest.raises(ValueError, match=f"cannot be locked: {os.strerror(fault)}; make it"), locked(tmp_path):
        pass
    monkeypatch.undo()
    with locked(tmp_path):
        pass


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match="run: cannot be locked: File exists"), locked(tmp_path / "run"):
        pass


def test_many_at_once_and_never_two(tmp_path: Path) -> None:
    """Processes that take and leave the lock as fast as they can: whoever is inside is alone."""

    def work(seed: int) -> None:
        entered = 0
        while entered < 20:
            try:
                with locked(tmp_path):
                    os.close(os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL))
                    (tmp_path / "inside").unlink()
                    entered += 1
            except ValueError:
                time.sleep(0.0005 * seed)

    processes = [FORK.Process(target=work, args=(seed,)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
