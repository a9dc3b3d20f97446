"""Running stages: kept, resumed, refused, moved aside, failed, awaited."""

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributions import write_metadata
from workbench import records
from workbench.launcher import recipe
from workbench.launcher import runner as running
from workbench.launcher.recipe import RecipeError
from workbench.launcher.runner import StageError, run, score

PLUGIN = """
from pathlib import Path
from workbench.records.source import Source

calls = []
answer = {}

def make(size: int = 1, fail: bool = False, out: Path = Path()) -> dict:
    '''Make something.'''
    calls.append(out.name)
    (out / "made.txt").write_text(str(size))
    if fail:
        raise ArithmeticError("as asked")
    return answer or {"metrics": {"test/loss": float(size)}}

def use(of: Source, out: Path = Path()) -> dict:
    '''Use it.'''
    calls.append(out.name)
    return {"read": (Path(of) / "made.txt").read_text()}

def look(out: Path = Path()) -> None:
    '''Look around.'''
    calls.append(out.name)
"""
CHAIN = "first: {job: make}\nsecond: {job: use, of: first}\nlast: {job: look}\n"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of a package that offers three jobs; `calls` says which stages ran."""
    name = "plugin_for_running"
    folder = tmp_path / "site"
    jobs = "\n".join(f"{job} = {name}:{job}" for job in ("make", "use", "look"))
    write_metadata(folder, name, f"[workbench.jobs]\n{jobs}\n")
    (folder / f"{name}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(folder)
    yield __import__(name)
    del sys.modules[name]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def execute(out: Path, text: str = CHAIN, replace: bool = False) -> list[dict[str, Any]]:
    path = out.parent / "r.yaml"
    path.write_text(text)
    return run(recipe.read(path), out, replace)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_stages_run_in_order_and_leave_records(plugin: Any, out: Path) -> None:
    found = execute(out)
    assert plugin.calls == ["first", "second", "last"]
    assert [records.read(out / name) for name in plugin.calls] == [{"format": 2, **record} for record in found]
    first, second, _ = found
    assert second["read"] == "1"
    assert second["parents"] == {"of": {"stage": "first", "fingerprint": first["fingerprint"]}}
    assert first["arguments"] == {"size": 1, "fail": False}
    assert (first["given"], first["job"], first["status"]) == ({}, "make", "finished")
    assert first["ended"] >= first["started"]


def test_the_line_of_a_stage_has_the_time_of_its_record(
    plugin: Any, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a job tells the time of its trainings, which is another."""
    monkeypatch.setattr(plugin, "answer", {"seconds": 24.6})
    monkeypatch.setattr(running.time, "monotonic", iter([0.0, 48.8]).__next__)
    (record,) = execute(out, "first: {job: make}\n")
    assert (record["seconds"], record["took"]) == (24.6, 48.8)
    assert capsys.readouterr().err.split() == ["first", "48.8", "s"]


def test_a_part_of_a_stage_is_named_by_a_slash(plugin: Any, out: Path) -> None:
    """As one student of a family: the folder inside the stage's own."""
    execute(out, "first: {job: make}\n")
    (out / "first" / "small").mkdir()
    (out / "first" / "small" / "made.txt").write_text("part")
    found = execute(out, "first: {job: make}\nsecond: {job: use, of: first/small}\n")
    assert found[1]["read"] == "part"
    assert found[1]["parents"] == {"of": {"stage": "first/small", "fingerprint": found[0]["fingerprint"]}}
    again = execute(out, "first: {job: make}\nthird: {job: use, of: first}\n")
    assert again[1]["fingerprint"] != found[1]["fingerprint"]
    with pytest.raises(RecipeError, match="stage 'first' is named before it exists"):
        execute(out, "second: {job: use, of: first/small}\nfirst: {job: make}\n")
    with pytest.raises(RecipeError, match="cycle: a -> b -> a"):
        execute(out, "a: {job: use, of: b/c}\nb: {job: use, of: a/c}\n")
    with pytest.raises(RecipeError, match="the stage names itself"):
        execute(out, "a: {job: use, of: a/c}\n")


def test_what_is_finished_is_kept_untouched(plugin: Any, out: Path) -> None:
    before = execute(out)
    files = tree(out)
    plugin.calls.clear()
    after = execute(out)
    assert plugin.calls == []
    assert tree(out) == files
    assert [record["fingerprint"] for record in after] == [record["fingerprint"] for record in before]


def test_an_unfinished_stage_goes_on_in_its_folder_and_keeps_its_start(plugin: Any, out: Path) -> None:
    execute(out)
    record = records.read(out / "second") or {}
    (out / "second" / "progress").write_text("half")
    records.write(out / "second", {**record, "status": "running", "started": "2001-01-01T00:00:00+00:00"})
    plugin.calls.clear()
    assert execute(out)[1]["started"] == "2001-01-01T00:00:00+00:00"
    assert plugin.calls == ["second"]
    assert (out / "second" / "progress").exists()


def test_a_run_killed_while_it_wrote_its_first_record_goes_on(plugin: Any, out: Path) -> None:
    (out / "first").mkdir(parents=True)
    (out / "first" / ".record.json.123.tmp").write_text('{"sta')
    assert len(execute(out)) == 3


def test_other_arguments_are_refused_by_name_before_anything_runs(plugin: Any, out: Path) -> None:
    execute(out)
    files = tree(out)
    plugin.calls.clear()
    with pytest.raises(RecipeError) as caught:
        execute(out, CHAIN.replace("make}", "make, size: 2}"))
    said = "holds a finished stage made with size 1 instead of 2: choose another --out, or --replace to move it aside"
    assert str(caught.value) == f"{out.parent / 'r.yaml'}, stage 'first': {out / 'first'} {said}"
    assert (plugin.calls, tree(out)) == ([], files)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CHAIN.replace("make}", "look}"), "made with job make instead of look"),
        (CHAIN.replace("look}", "make}"), "made with job look instead of make"),
        (
            CHAIN.replace("last", "more: {job: make}\nlast"),
            "last holds a finished stage made with other stages above it",
        ),
    ],
)
def test_what_else_makes_a_stage_another_one(plugin: Any, out: Path, text: str, said: str) -> None:
    execute(out)
    with pytest.raises(RecipeError, match=said):
        execute(out, text)


def test_a_parent_made_anew_is_named(plugin: Any, out: Path) -> None:
    execute(out)
    (out / "first").rename(out / "elsewhere")
    with pytest.raises(RecipeError, match=r"second holds a finished stage made with another 'first' as of:"):
        execute(out, CHAIN.replace("make}", "make, size: 2}"))


USED = """
class Scale:
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def apply(self, x):
        return x * self.factor
"""
JOB_OF_MINE = """
from pathlib import Path
from scale_of_mine import Scale

def work(by: Scale, out: Path = Path()) -> dict:
    'Work.'
    return {"metrics": {"test/loss": by.apply(2.0)}}
"""
WORK = (
    "one: {job: work, by: {class_path: scale_of_mine.Scale}}\ntwo: {job: work, by: {class_path: scale_of_mine.Scale}}\n"
)


def test_code_that_has_changed_is_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a job and of a class that is named, in a project that is installed editable."""
    write_metadata(out.parent / "metadata", "job_of_mine", "[workbench.jobs]\nwork = job_of_mine:work\n")
    files = {"scale_of_mine": USED, "job_of_mine": JOB_OF_MINE}
    (out.parent / "src").mkdir()
    for folder in ("metadata", "src"):
        monkeypatch.syspath_prepend(out.parent / folder)

    def attempt(file: str = "", old: str = "", new: str = "", text: str = WORK) -> list[dict[str, Any]]:
        for name, code in files.items():
            (out.parent / "src" / f"{name}.py").write_text(code.replace(old, new) if name == file else code)
        try:
            return execute(out, text)
        finally:
            for name in files:
                sys.modules.pop(name, None)

    first, _ = attempt()
    assert sorted(first["code"]["scale_of_mine"]) == ["Scale", "Scale.__init__", "Scale.apply"]
    assert list(first["code"]["job_of_mine"]) == ["work"]
    assert attempt()[0] == {"format": 2, **first}
    said = (
        r"holds a finished stage made with other code \(scale_of_mine\.py has changed: Scale\.apply\): choose another"
    )
    with pytest.raises(RecipeError, match=said):
        attempt("scale_of_mine", "return x *", "return x +")
    with pytest.raises(RecipeError, match=r"other code \(job_of_mine\.py has changed: work\)"):
        attempt("job_of_mine", "2.0", "3.0")
    other = WORK.replace("scale_of_mine.Scale}", "scale_of_mine.Scale, init_args: {factor: 2}}")
    with pytest.raises(RecipeError, match=r"made with by\.init_args\.factor 1\.0 instead of 2\.0: choose"):
        attempt(text=other)
    assert [record["status"] for record in attempt()] == ["finished"] * 2


def test_replace_moves_aside_what_differs_and_what_depends_on_it(plugin: Any, out: Path) -> None:
    execute(out, "other: {job: make}\n" + CHAIN)
    files = tree(out)
    plugin.calls.clear()
    text = "other: {job: make}\n" + CHAIN.replace("make}\ns", "make, size: 2}\ns")
    found = execute(out, text, replace=True)
    assert plugin.calls == ["first", "second", "last"]
    assert found[2]["read"] == "2"
    for name in ("first", "second", "last"):
        assert tree(out / "replaced" / f"{name}-1") == {
            file.removeprefix(f"{name}/"): content for file, content in files.items() if file.startswith(f"{name}/")
        }
    assert not (out / "replaced" / "other-1").exists()
    execute(out, text.replace("size: 2", "size: 3"), replace=True)
    assert (out / "replaced" / "first-2").is_dir()


def test_a_folder_that_no_recipe_wrote_is_refused_and_never_lost(plugin: Any, out: Path) -> None:
    (out / "second").mkdir(parents=True)
    (out / "second" / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match="second exists and was not written by a recipe"):
        execute(out)
    assert tree(out) == {"second/thesis.tex": b"years of work"}
    execute(out, replace=True)
    assert (out / "replaced" / "second-1" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', "\x00\xff"])
def test_a_record_that_cannot_be_read_is_refused_or_moved_aside(plugin: Any, out: Path, text: str) -> None:
    (out / "first").mkdir(parents=True)
    (out / "first" / "record.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"stage 'first': .*record\.json"):
        execute(out)
    assert plugin.calls == []
    assert execute(out, replace=True)[0]["status"] == "finished"
    assert (out / "replaced" / "first-1" / "record.json").read_bytes() == text.encode("latin-1")


def test_a_run_of_an_earlier_version_is_refused_in_a_sentence(plugin: Any, out: Path) -> None:
    (out / "first").mkdir(parents=True)
    earlier = {"format": 1, "status": "finished", "versions": {"distill-prune": "0.0.9"}}
    (out / "first" / "record.json").write_text(json.dumps(earlier))
    with pytest.raises(RecipeError, match=r"written by an earlier version \(distill-prune 0.0.9, .* another --out"):
        execute(out)
    assert plugin.calls == []


def test_a_failing_stage_stops_the_run_and_is_tried_again(plugin: Any, out: Path, monkeypatch: Any) -> None:
    plugin.answer["metrics"] = {1, 2}
    with pytest.raises(StageError, match="stage 'first': ValueError: the job returned 'metrics', which is not JSON"):
        execute(out)
    record = records.read(out / "first") or {}
    assert (record["status"], plugin.calls) == ("failed", ["first"])
    assert "Traceback" in record["error"]
    assert not (out / "second").exists()
    plugin.answer.clear()
    assert "error" not in execute(out)[0]


def test_what_a_job_raises_is_said_and_recorded(plugin: Any, out: Path) -> None:
    with pytest.raises(StageError) as caught:
        execute(out, CHAIN.replace("make}", "make, fail: true}"))
    assert str(caught.value).startswith("stage 'first': ArithmeticError: as asked\n")
    assert str(out / "first" / "record.json") in str(caught.value)
    assert "in make" in (records.read(out / "first") or {})["error"]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1], "returned list: a job returns a dict"),
        ({"status": "fine"}, "returned 'status', which every record has"),
        ({"x": object()}, "returned 'x', which is not JSON"),
    ],
)
def test_a_result_must_fit_into_a_record(plugin: Any, out: Path, monkeypatch: Any, returned: Any, said: str) -> None:
    monkeypatch.setattr(plugin, "answer", returned)
    with pytest.raises(StageError, match=said):
        execute(out)
    assert (records.read(out / "first") or {})["status"] == "failed"


@pytest.mark.parametrize(
    ("stop", "raised"),
    [("raise KeyboardInterrupt", KeyboardInterrupt), ("raise SIGTERMException", SystemExit), (
        "\n try: raise KeyboardInterrupt\n except KeyboardInterrupt: raise SystemExit(1)", KeyboardInterrupt
    )],
)  # fmt: skip
def test_a_stopped_stage_is_unfinished_and_not_failed(
    plugin: Any, out: Path, monkeypatch: Any, stop: str, raised: type[BaseException]
) -> None:
    scope: dict[str, Any] = {}
    exec(f"from lightning.pytorch.utilities.exceptions import SIGTERMException\ndef stop(*_):{stop}", scope)
    monkeypatch.setattr(plugin, "calls", type("Stop", (), {"append": scope["stop"]})())
    with pytest.raises(raised) as caught:
        execute(out)
    assert raised is not SystemExit or caught.value.code == 128 + 15, "as of a process that SIGTERM ended"  # type: ignore[attr-defined]
    assert (records.read(out / "first") or {})["status"] == "running"
    monkeypatch.undo()


def test_a_job_that_exits_has_failed(plugin: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: object) -> None:
        sys.exit(3)

    monkeypatch.setattr(plugin, "calls", type("Leave", (), {"append": leave})())
    with pytest.raises(StageError, match="stage 'first': SystemExit: 3"):
        execute(out)
    assert (records.read(out / "first") or {})["status"] == "failed"


@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk_is_said_and_loses_nothing(plugin: Any, out: Path, monkeypatch: Any, at: int) -> None:
    execute(out, "first: {job: make}\n")
    files, write, count = tree(out), records.write, 0

    def full(folder: Path, record: Any) -> None:
        nonlocal count
        count += 1
        if count >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, record)

    monkeypatch.setattr(records, "write", full)
    with pytest.raises(
        StageError, match=r"second: cannot be written: No space left on device\. What is there is whole"
    ):
        execute(out, CHAIN)
    assert {name: content for name, content in tree(out).items() if name in files} == files
    monkeypatch.setattr(records, "write", write)
    assert execute(out)[1]["status"] == "finished"


def test_an_out_that_is_a_file_is_said(plugin: Any, out: Path) -> None:
    out.write_text("a file")
    with pytest.raises((RecipeError, StageError), match=r"Not a directory|File exists"):
        execute(out)
    assert out.read_text() == "a file"


def test_what_a_stage_names_must_be_there(plugin: Any, out: Path) -> None:
    (out.parent / "owner").mkdir()
    for text, said in {
        "second: {job: use, of: first}\nfirst: {job: make}\n": "stage 'first' is named before it exists",
        "a: {job: use, of: b}\nb: {job: use, of: a}\n": "in a cycle: a -> b -> a",
        "a: {job: use, of: a}\n": "the stage names itself",
        "first: {job: make}\na: {job: use, of: frist}\n": "neither a stage above nor a folder; did you mean 'first'?",
        "a: {job: use, of: owner/typo}\n": "'owner/typo' is neither a stage above nor a folder",
    }.items():
        with pytest.raises(RecipeError) as caught:
            execute(out, text)
        assert said in str(caught.value)
    assert not out.exists()


def test_a_folder_from_outside_the_run_is_a_parent_by_its_path(plugin: Any, out: Path) -> None:
    outside = out.parent / "outside"
    outside.mkdir()
    (outside / "made.txt").write_text("from outside")
    (record,) = execute(out, f"a: {{job: use, of: {outside}}}\n")
    assert record["read"] == "from outside"
    assert record["parents"] == {"of": {"stage": str(outside), "fingerprint": None}}


def test_other_ranks_write_nothing_and_wait(plugin: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = execute(out)
    final = {name: (out / name / "record.json").read_text() for name in ("first", "second", "last")}
    for name in final:
        records.write(out / name, {**json.loads(final[name]), "status": "running"})
    files = tree(out)
    plugin.calls.clear()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(running, "_POLL", 0.001)
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.extend(execute(out)))
    other.start()
    time.sleep(0.05)
    assert (other.is_alive(), found, tree(out)) == (True, [], files)
    for name, text in final.items():
        records.write(out / name, json.loads(text))
    other.join(10)
    assert [record["fingerprint"] for record in found] == [record["fingerprint"] for record in done]
    assert plugin.calls == []


def test_a_failure_is_passed_on_unless_it_is_from_an_earlier_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_POLL", 0.001)
    records.write(out, {"status": "failed", "ended": records.now(), "fingerprint": "f"})
    with pytest.raises(StageError, match="rank 0 failed in"):
        running._wait_for_rank_zero(out, "f")
    records.write(out, {"status": "failed", "ended": "2001-01-01T00:00:00+00:00", "fingerprint": "f"})
    threading.Timer(0.05, lambda: records.write(out, {"status": "finished", "fingerprint": "f"})).start()
    assert running._wait_for_rank_zero(out, "f")["status"] == "finished"


def test_an_orphan_does_not_wait_for_ever(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_POLL", 0.001)
    parents = iter([1, 1, 2])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with pytest.raises(StageError, match="rank 0 is gone before"):
        running._wait_for_rank_zero(out, "f")


FIT = """
only:
  job: fit
  model: {class_path: workbench.models.MLP, init_args: {in_features: 64, hidden: [4], classes: 10}}
  data: {class_path: workbench.data.Digits, init_args: {batch_size: 512}}
  trainer: {max_steps: 2, accelerator: cpu, limit_test_batches: 1, limit_val_batches: 1, callbacks: CALLBACKS}
"""
STOPPER = """
from lightning.pytorch import Callback
class Stop(Callback):
    done = False
    def on_train_batch_end(self, *_):
        if not Stop.done:
            Stop.done = True
            raise KeyboardInterrupt
"""


def test_ctrl_c_in_a_training_is_ctrl_c_and_the_training_goes_on(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out.parent / "stopper_of_training.py").write_text(STOPPER)
    monkeypatch.syspath_prepend(out.parent)
    text = FIT.replace("CALLBACKS", "[{class_path: stopper_of_training.Stop}]")
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            execute(out, text)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (records.read(out / "only") or {})["status"] == "running"
    (record,) = execute(out, text)
    assert record["status"] == "finished"
    assert record["arguments"]["trainer"]["max_steps"] == 2
    sys.modules.pop("stopper_of_training")


@pytest.mark.parametrize(
    ("monitor", "value", "text"),
    [
        (["accuracy", "max"], 0.98056, "test accuracy 98.1%"),
        (["mean_iou", "max"], 0.885, "test mean_iou 88.5%"),
        (["nll", "min"], 0.0691, "test nll 0.0691"),
        (["cosine", "max"], 0.5, "test cosine 0.5"),
        (["accuracy", "max"], float("nan"), "test accuracy nan%"),
    ],
)
def test_the_score_of_a_stage_reads_as_in_its_report(monitor: list[str], value: float, text: str) -> None:
    name = monitor[0]
    assert score({"monitor": monitor, "metrics": {f"test/{name}": value}}) == text
