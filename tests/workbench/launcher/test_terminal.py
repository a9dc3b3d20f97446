"""The end of a run, as the terminal shows it."""

import io
from pathlib import Path
from typing import Any

import pytest

from workbench import records
from workbench.launcher import terminal

LONG = "a_stage_with_a_long_name_that_has_to_fit"


def written(out: Path, **more: Any) -> dict[str, Any]:
    record = {
        "stage": LONG,
        "job": "fit",
        "status": "finished",
        "fingerprint": "f",
        "arguments": {},
        "parents": {},
        "metrics": {"val/accuracy": 0.91, "test/accuracy": 0.9},
        "monitor": ["accuracy", "max"],
        "size": {"parameters": 1234567, "checkpoint_bytes": 4_000_000, "dense_fp32_bytes": 4_938_268},
        "seconds": 12.0,
        "started": records.now(),
        **more,
    }
    records.write(out / LONG, record)
    return record


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")


def test_a_pipe_gets_whole_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_summary([written(tmp_path)], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert any(LONG in line and "90.0" in line for line in lines)
    assert max(map(len, lines)) <= 120


def test_checkpoints_and_the_page_are_named_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = written(tmp_path, exports=[{"format": "compact", "path": "compact"}], page="index.html")
    terminal.print_summary([record], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert f"checkpoint  {tmp_path / LONG / 'compact'}" in lines
    assert f"page        {tmp_path / LONG / 'index.html'}" in lines


def test_names_are_not_taken_for_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = written(tmp_path, page="[red]:smile:.html")
    terminal.print_summary([record], tmp_path)
    assert "[red]:smile:.html" in capsys.readouterr().out


@pytest.mark.parametrize("record", [{"metrics": {}, "size": {}}, {"metrics": None, "size": None, "seconds": None}])
def test_a_run_without_numbers_does_not_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record: dict[str, Any]
) -> None:
    terminal.print_summary([written(tmp_path, **record)], tmp_path)
    assert capsys.readouterr().out


def test_a_foreign_folder_among_the_stages_does_not_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = written(tmp_path, page="index.html")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "record.json").write_text("not JSON")
    terminal.print_summary([record], tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("no summary: ")
    assert "index.html" in out


def test_other_ranks_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    terminal.print_summary([written(tmp_path)], tmp_path)
    assert capsys.readouterr().out == ""


def test_a_terminal_keeps_its_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdout", screen := Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    terminal.print_summary([written(tmp_path)], tmp_path)
    assert max(map(len, screen.getvalue().splitlines())) <= 100
