import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from workbench.files import atomic_file, atomic_files, read_json, sha256, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stopped(path: Path, error: BaseException) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Any:
    old = os.umask(0o027)
    yield 0o640
    os.umask(old)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename across file systems is a copy"
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError, match="stop"):
        stopped(path, RuntimeError("stop"))
    with pytest.raises(KeyboardInterrupt):
        stopped(path, KeyboardInterrupt())
    assert path.read_text() == "one"
    assert names(path.parent) == ["file.txt"]


def test_nothing_written_is_an_error_and_not_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file"):
        pass
    assert names(tmp_path) == []


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match=r"No space left on device: '.*file'") as caught:
        stopped(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failing_system_call_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="Input/output"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["file.json"]


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"a": 1})
    code = (
        "import os, sys; from pathlib import Path; from workbench.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as t:\n    t.write_text('half'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file.json")], check=False)
    assert done.returncode == -9
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": 1}


def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    with atomic_file(tmp_path / "a.safetensors") as temporary:
        save_file({"x": torch.ones(2)}, temporary)
        assert mode(temporary) == 0o600, "what this is for"
    assert mode(tmp_path / "a.safetensors") == umask
    with atomic_files(tmp_path / "folder") as part:
        save_file({"x": torch.ones(2)}, part / "b.safetensors")
    assert mode(tmp_path / "folder" / "b.safetensors") == umask


def test_json_of_what_cannot_be_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"a": object()})
    assert names(tmp_path) == []


def test_json_with_and_without_indent_is_the_same(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, None], "ä": {"b": True}}
    write_json(tmp_path / "wide.json", data)
    write_json(tmp_path / "narrow.json", data, indent=None)
    wide, narrow = ((tmp_path / name).read_text(encoding="utf-8") for name in ("wide.json", "narrow.json"))
    assert json.loads(wide) == json.loads(narrow) == data
    assert len(wide.splitlines()) > 1
    assert narrow.count("\n") == 1
    assert " " not in narrow


def test_a_folder_is_filled_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    with atomic_files(folder) as part:
        (part / "a").write_text("1")
        (part / "b").write_text("1")
        assert not folder.exists()
    (folder / "other").write_text("kept")
    with pytest.raises(RuntimeError), atomic_files(folder) as part:
        stopped(part / "a", RuntimeError())
    assert (folder / "a").read_text() == "1"
    with atomic_files(folder) as part:
        (part / "a").write_text("3")
    assert {name: (folder / name).read_text() for name in names(folder)} == {"a": "3", "b": "1", "other": "kept"}
    assert names(folder.parent) == ["folder"]


def test_a_folder_half_filled_before_is_started_anew(tmp_path: Path) -> None:
    (tmp_path / ".folder.part").mkdir()
    (tmp_path / ".folder.part" / "stale").write_text("half")
    with atomic_files(tmp_path / "folder") as part:
        (part / "a").write_text("1")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["a"]


def test_sha256_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_that_cannot_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(ValueError, match=r"file\.json cannot be read as a list of toys: .*; write it again$"):
        read_json(path, "a list of toys", "write it again")
    write_json(path, {"a": 1})
    assert read_json(path, "a list of toys") == {"a": 1}
    path.write_text("{")
    with pytest.raises(ValueError, match=r"file\.json cannot be read as a list of toys: Expecting property name"):
        read_json(path, "a list of toys")
