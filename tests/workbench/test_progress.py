import contextvars
import re
from io import StringIO

import pytest

from workbench import progress
from workbench.messages import elapsed, printable
from workbench.progress import RunProgress, bars, count_attempts, current, progress_file, read_progress, update

LINE = re.compile(r"^(\S+) +(?:failed after )?\d+\.\d s(?:  .*)?$")


class Screen(StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def rank_zero(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def recipe(file):
    with bars(2, ["teacher", "student"], file=file) as b:
        with b.stage("teacher"):
            for done in range(3):
                update(done + 1, 3, "level 3, density 34.3%")
            b.note("val accuracy 98.1%")
        with b.stage("student"):
            update(5, 5)


def test_one_plain_line_per_stage_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = StringIO()
    recipe(file)
    lines = file.getvalue().splitlines()
    assert [LINE.match(line)[1] for line in lines] == ["teacher", "student"]  # type: ignore[index]
    assert lines[0].endswith("val accuracy 98.1%")
    assert not lines[1].endswith("98.1%"), "a note is of its own stage"
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    file = Screen()
    recipe(file)
    assert len(file.getvalue().splitlines()) == 2
    assert "\x1b" not in file.getvalue()


def test_bars_and_lines_on_a_terminal():
    file = Screen()
    with bars(2, ["teacher", "student"], file=file) as b:
        with b.stage("teacher"):
            update(1, 4, "level 3, [red]density 34.3%")
            progress = b._progress
            assert progress is not None
            progress.refresh()
            whole, stage = progress.tasks
            assert (whole.completed, whole.total) == (0, 2)
            assert (stage.completed, stage.total, stage.visible) == (1, 4, True)
            update(4, 4, "level 3, [red]density 34.3%")
            assert stage.completed == 4
            update(1, 6)
            assert (stage.completed, stage.total) == (1, 6), "a full bar starts again"
            assert stage.fields["message"] == "", "a message is of its own step"
            update(1, 4, "level 3, [red]density 34.3%")
        assert (whole.completed, stage.visible) == (1, False)
        with b.stage("student"):
            assert (stage.completed, stage.total, stage.description) == (0, None, "student")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "recipe" in plain
    assert "1/4" in plain
    assert "[red]density" in plain
    assert re.search(r"teacher  \d\.\d s", plain)


def test_a_failed_stage_says_so_and_the_exception_passes():
    file = StringIO()

    def run():
        with bars(1, ["teacher"], file=file) as b, b.stage("teacher"):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert re.fullmatch(r"teacher  failed after \d\.\d s\n", file.getvalue())
    assert current() is None


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("file", [StringIO, Screen])
def test_only_rank_zero_writes(monkeypatch, name, file):
    monkeypatch.setenv(name, "1")
    stream = file()
    recipe(stream)
    assert stream.getvalue() == ""
    monkeypatch.setenv(name, "0")
    recipe(stream)
    assert stream.getvalue() != ""


def test_current_is_set_only_inside():
    assert current() is None
    update(1, 2, "no bars are open")
    with bars(0, [], file=StringIO()) as b:
        assert current() is b
        assert contextvars.copy_context().run(current) is b
    assert current() is None


@pytest.mark.parametrize("file", [StringIO, Screen])
def test_bars_inside_bars_are_silent(file):
    outer = file()
    with bars(1, ["sweep"], file=outer) as b, b.stage("sweep"):
        inner = file()
        recipe(inner)
        assert inner.getvalue() == ""
        assert current() is b


def test_names_must_be_as_many_as_stages():
    with (
        pytest.raises(ValueError, match="total_stages is 2 but 1 names were given: name every stage"),
        bars(2, ["a"]),
    ):
        pass


def test_hostile_names_and_long_lines():
    file, name = StringIO(), "a\x1b[31m\nb" + "x" * 200
    with bars(1, [name], file=file) as b, b.stage(name):
        b.note("[bold]not markup[/bold]\x07")
    assert file.getvalue().count("\n") == 1, "a line is one line at any width"
    assert "\x1b" not in file.getvalue()
    assert "[bold]not markup[/bold]" in file.getvalue()


def test_words():
    assert [elapsed(s) for s in (0.04, 59.94, 59.96, 3599.6, 5400)] == [
        "0.0 s", "59.9 s", "1 min 00 s", "1 h 00 min", "1 h 30 min",
    ]  # fmt: skip
    assert printable("a\tb\n\u202ec") == "a b \N{REPLACEMENT CHARACTER}c"


def test_bars_of_runs_below_the_stage():
    file = Screen()
    with bars(1, ["grid"], file=file) as b:
        with b.stage("grid"):
            b.show_runs({"grid/a": RunProgress(1, 2, 4, "level 1"), "grid/b": RunProgress()})
            assert b._progress is not None
            _, _, first, second = b._progress.tasks
            assert (first.description, first.completed, first.total) == ("  grid/a", 2, 4)
            assert first.fields["message"] == "level 1"
            assert second.total is None
            b.show_runs({"grid/b": RunProgress(1, 1, 3)})
            assert [task.description for task in b._progress.tasks[2:]] == ["  grid/b"]
            b.line("grid/a", "1.0 s", "", "test accuracy\n98%")
        assert len(b._progress.tasks) == 2, "they end with the stage"
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "grid/a  1.0 s  test accuracy 98%" in plain


def test_runs_are_not_drawn_where_there_is_no_terminal():
    file = StringIO()
    with bars(1, ["grid"], file=file) as b, b.stage("grid"):
        b.show_runs({"grid/a": RunProgress(1, 2, 4, "level 1")})
    assert "grid/a" not in file.getvalue()


def test_a_progress_file_is_written_and_read(tmp_path, monkeypatch):
    path, looked = tmp_path / ".progress.json", []
    monkeypatch.setattr(progress, "_INTERVAL", 0)
    assert (read_progress(path), count_attempts(path)) == (None, 0)
    with progress_file(path, lambda: looked.append(read_progress(path))):
        assert current() is not None, "so that nobody else draws bars"
        assert read_progress(path) == RunProgress(1, 0, 0, "")
        update(3, 10, "level 3")
        with bars(1, ["inner"]) as inner, inner.stage("inner"):
            update(9, 9)
    assert looked == [RunProgress(1, 3, 10, "level 3")]
    with progress_file(path):
        assert count_attempts(path) == 2
    assert current() is None


def test_a_progress_file_is_written_rarely_and_never_fails(tmp_path, monkeypatch):
    path = tmp_path / "gone" / "progress.json"
    with progress_file(path):
        update(1, 2)
    path = tmp_path / "progress.json"
    with progress_file(path):
        for done in range(1000):
            update(done, 1000)
        assert read_progress(path).done == 0, "within half a second"
    monkeypatch.setenv("RANK", "1")
    with progress_file(path):
        assert (current(), count_attempts(path)) == (None, 1)
    path.write_text("{")
    assert read_progress(path) is None
    path.write_text('{"other": 1}')
    assert read_progress(path) is None
