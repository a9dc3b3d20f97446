import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.compact_checkpoints import assert_same_state, names
from workbench import load, save
from workbench.checkpoints import compact
from workbench.models import MLP


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Extra(2, 2), r"_extra_state.*is a dict"),
        (lambda: MLP(4, (4,), 2).to("meta"), "that have values"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
    ],
)
def test_a_state_that_is_not_plain_tensors_is_refused(
    tmp_path: Path, make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save(make(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"nowhere": torch.ones(1, dtype=torch.bool)}, "names no parameter"),
        ({"layers.1.running_mean": torch.ones(24, dtype=torch.bool)}, "names no parameter"),
        ({"layers.0.weight": torch.ones(24, 16)}, r"is torch\.float32"),
        ({"layers.0.weight": torch.ones(16, 24, dtype=torch.bool)}, r"bool \[24, 16\] is needed"),
        ({"layers.0.weight": torch.zeros(24, 16, dtype=torch.bool)}, "are not zero: apply the mask"),
    ],
)
def test_a_wrong_mask_is_refused(tmp_path: Path, masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save(MLP(16, (24,), 5, norm="batch"), tmp_path / "a", masks)
    assert not (tmp_path / "a").exists()


def test_a_pruned_nan_is_not_zero(tmp_path: Path) -> None:
    model = MLP(4, (4,), 2)
    model.layers[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="are not zero"):
        save(model, tmp_path, {"layers.0.weight": torch.zeros(4, 4, dtype=torch.bool)})


@pytest.mark.parametrize(
    "extra",
    [
        {"provenance": {"a": object()}},
        {"architecture": {"class_path": 3}},
        {"architecture": {"class_path": "a.B"}},
        {"architecture": {"class_path": "a.B", "init_args": []}},
        {"architecture": {"class_path": "a.B", "init_args": {}, "config": {}}},
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"JSON|architecture"):
        save(MLP(4, (4,), 2), tmp_path / "a", **extra)
    assert not (tmp_path / "a").exists()


# Replacing


def test_replacing_leaves_one_checkpoint(tmp_path: Path) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = MLP(4, (4,), 2)
        save(model, tmp_path)
        save(model, tmp_path)
        assert len(names(tmp_path)) == 2
        assert_same_state(load(tmp_path), model)


CALLS: dict[str, tuple[Any, str]] = {
    "os.replace": (os, "replace"),
    "os.fsync": (os, "fsync"),
    "write_bytes": (Path, "write_bytes"),
    "write_text": (Path, "write_text"),
    "touch": (Path, "touch"),
    "_check_written": (compact, "_check_written"),
    "write_json": (compact, "write_json"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "key"]
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_save_that_fails_anywhere_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException, existing: bool
) -> None:
    path = tmp_path / "a"
    old = MLP(4, (4,), 2)
    if existing:
        save(old, path)
    before = {name: (path / name).read_bytes() for name in names(path)} if existing else {}
    owner, name = CALLS[call]
    original = getattr(owner, name)
    for fatal in range(5):
        count = 0

        def fail(*args: Any, fatal: int = fatal, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == fatal + 1:
                raise error
            return original(*args, **kwargs)

        new = MLP(4, (4,), 2)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            raised = None
            try:
                save(new, path)
            except type(error) as caught:
                raised = caught
        if raised is None:
            break
        if isinstance(error, OSError):
            assert "No space left on device" in str(raised)
        left = {found.name: found.read_bytes() for found in path.iterdir()} if path.exists() else {}
        if call == "os.fsync" and fatal > 1:
            continue  # the index is renamed before its folder is flushed
        assert left == before, "nothing is changed and nothing is left behind"
        if existing:
            assert_same_state(load(path), old)
    assert fatal > 0, "the call was reached"
    save(new, path)
    assert_same_state(load(path), new)
    assert len(names(path)) == 2


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    save(MLP(4, (4,), 2), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "weights-of-mine.safetensors").write_text("mine")
    for name in (
        "weights-0123456789abcdef.safetensors",
        ".weights-0123456789abcdef.safetensors.77-12.tmp",
        ".checkpoint.json.77-12.tmp",
    ):
        (tmp_path / name).write_text("half")
    model = MLP(4, (4,), 2)
    save(model, tmp_path)
    index = compact.read_index(tmp_path)
    assert set(names(tmp_path)) == {
        "checkpoint.json",
        index["weights"]["file"],
        "notes.txt",
        "weights-of-mine.safetensors",
    }
    assert_same_state(load(tmp_path), model)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}'])
def test_a_damaged_checkpoint_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint.json").write_text(text)
    model = MLP(4, (4,), 2)
    save(model, tmp_path)
    assert_same_state(load(tmp_path), model)


def test_a_disk_that_loses_bits_is_noticed_before_the_old_checkpoint_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = MLP(4, (4,), 2)
    save(old, tmp_path)
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: write(self, data[:-1] + bytes([data[-1] ^ 1])))
    with pytest.raises(ValueError, match="altered"):
        save(MLP(4, (4,), 2), tmp_path)
    monkeypatch.undo()
    assert_same_state(load(tmp_path), old)
    assert len(names(tmp_path)) == 2
