import html
import json
import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from workbench.records import read_run
from workbench.report import figures, headline
from workbench.report.format import count, duration, metric, percent, size, times
from workbench.report.job import report, summary
from workbench.report.sections import comparisons, stages
from workbench.report.summary import gather, learning, sparsity, stale

DENSE = 1_340_488
PARAMETERS, PRUNABLE = 335_122, 334_848


def sized(density=1.0, per_weight=4, parameters=PARAMETERS, prunable=PRUNABLE):
    kept = round(prunable * density)
    return {
        "parameters": parameters,
        "prunable": prunable,
        "kept": kept,
        "nonzero": kept + parameters - prunable,
        "dense_fp32_bytes": 4 * parameters,
        "checkpoint_bytes": round(kept * per_weight + prunable / 8 + 4 * (parameters - prunable) + 900),
    }


def scored(test, val=None):
    val = test + 0.002 if val is None else val
    return {"test/accuracy": test, "test/loss": 1 - test, "val/accuracy": val, "val/loss": 1 - val}


def epochs(count, final, rate=0.5):
    return [
        {
            "epoch": e,
            "step": 20 * (e + 1),
            "train/loss": 2.3 * rate**e,
            "val/loss": 2.4 * rate**e + 0.08,
            "val/accuracy": final - (final - 0.12) * rate ** (e + 1),
        }
        for e in range(count)
    ]


def record(name, job="fit", start=0, parents=(), **fields):
    fingerprint = sha256(repr(name).encode()).hexdigest()
    return {
        "format": 1,
        "stage": name,
        "job": job,
        "status": "finished",
        "fingerprint": fingerprint,
        "arguments": {},
        "seed": 0,
        "parents": {r: {"stage": p, "fingerprint": sha256(repr(p).encode()).hexdigest()} for r, p in parents},
        "versions": {"python": "3.11.7", "torch": "2.12.0", "lightning": "2.6.0", "distill-prune": "0.1.0"},
        "environment": {"platform": "Linux-6.1-x86_64", "cpus": 2, "device": "cpu"},
        "started": (datetime(2026, 11, 23, 12, tzinfo=UTC) + timedelta(seconds=start)).isoformat(),
        "seconds": 3.1,
        "monitor": ["accuracy", "max"],
        **fields,
    }


def network(activation, width=512):
    return {"class_path": "workbench.models.MLP", "init_args": {"width": width, "activation": activation}}


def level(number, density, test, val=None, **fields):
    return {
        "level": number,
        "density": density,
        "metrics": scored(test, val),
        "mask_hash": sha256(f"{number} {density}".encode()).hexdigest(),
        "seconds": 2.0 + 0.1 * number,
        "size": sized(density, parameters=101_386, prunable=101_120),
        "history": epochs(8, test),
        **fields,
    }


def hunt(name, start, tests, time):
    levels = [level(i, 0.49**i, test) for i, test in enumerate(tests)]
    last = levels[-1]
    return record(
        name, "hunt", time, [("start", start)], seconds=sum(lv["seconds"] for lv in levels), levels=levels,
        arguments={"start": start, "levels": len(tests), "rate": 0.51, "rewind": "1ep"},
        metrics=last["metrics"], size=last["size"],
    )  # fmt: skip


def exported(name, of, time, **bytes_):
    exports = [
        {
            "format": f,
            "path": f,
            "bytes": b,
            "largest_difference": 0.0 if f != "onnx" else 4e-6,
            "same_predictions": True,
        }
        for f, b in bytes_.items()
    ]
    return record(
        name,
        "export",
        time,
        [("of", of)],
        exports=exports,
        arguments={"of": of, "formats": list(bytes_)},
        seconds=1.4,
    )


GELU = [0.9778, 0.9806, 0.9778, 0.9750, 0.9722, 0.9639, 0.9333, 0.8417]
RELU = [0.9722, 0.9722, 0.9694, 0.9722, 0.9667, 0.9583, 0.9194, 0.8111]


def realistic():
    students = [
        record(
            f"student-{activation}", "distill", start, [("teacher", "teacher")], seconds=seconds,
            arguments={"teacher": "teacher", "model": network(activation, 256), "temperature": 4.0},
            metrics=scored(test), size=sized(parameters=101_386, prunable=101_120),
            history=epochs(15, test + 0.002, 0.52),
        )
        for activation, start, seconds, test in (("gelu", 10, 8.3, 0.9778), ("relu", 20, 8.1, 0.9722))
    ]  # fmt: skip
    return [
        record(
            "teacher", start=0, arguments={"model": network("gelu"), "trainer": {"max_epochs": 20}},
            seconds=9.7,
            metrics=scored(0.9806), size=sized(), history=epochs(20, 0.983, 0.55),
        ),
        *students,
        hunt("ticket-gelu", "student-gelu", GELU, 30),
        hunt("ticket-relu", "student-relu", RELU, 60),
        exported("checkpoint-gelu", "ticket-gelu", 90, compact=9_912, torch=1_342_210, onnx=1_341_874),
        exported("checkpoint-relu", "ticket-relu", 92, compact=9_874, onnx=1_341_874),
    ]  # fmt: skip


def written(run: Path, records) -> Path:
    for number, entry in enumerate(records):
        folder = run / f"{number:02d}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(entry), encoding="utf-8")
    return run


def known(tmp_path, records):
    return gather(read_run(written(tmp_path / "run", records)))


def page_of(tmp_path, records, **arguments) -> str:
    run = written(tmp_path / "run", records)
    assert report(run / "report", **arguments) == {"page": "index.html"}
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def cells(page: str, table: str) -> list[list[str]]:
    """The text of a table's body rows, by cell."""
    body = re.search(rf'<table class="{table}">.*?<tbody>(.*?)</tbody>', page, re.S)
    assert body, f"no table {table}"
    rows = re.findall(r"<tr.*?>(.*?)</tr>", body[1], re.S)
    strip = re.compile(r"<[^>]*>")
    return [[html.unescape(strip.sub("", c)) for c in re.findall(r"<t[hd][ >].*?</t[hd]>", r, re.S)] for r in rows]


def terminal(table) -> str:
    console = Console(file=StringIO(), width=220, color_system=None)
    console.print(table)
    return console.file.getvalue()  # type: ignore[union-attr]


# The page as a whole


def test_same_records_give_the_same_bytes(tmp_path):
    first = page_of(tmp_path / "a", realistic())
    assert first == page_of(tmp_path / "b", list(reversed(realistic()))), "the order of folders is no matter"
    drawn = [sorted((tmp_path / side / "run/report/figures").iterdir()) for side in "ab"]
    assert [p.name for p in drawn[0]] == ["bytes.svg", "density.svg", "learning.svg", "seconds.svg"]
    assert [p.read_bytes() for p in drawn[0]] == [p.read_bytes() for p in drawn[1]]
    assert not list((tmp_path / "a/run/report").rglob("*.tmp")), "nothing temporary stays"


def test_page_refers_to_nothing_outside_itself(tmp_path):
    page = page_of(tmp_path, realistic())
    named = re.sub(r"aria-label=|data-label=", "", page)
    assert not re.search(r"""\s(?:src|href|action|data|srcset|poster)\s*=\s*(?!["']?#)""", named)
    assert not re.search(r"""url\(\s*["']?(?!#)""", page)
    assert not re.search(r"https?:|@import|<script|<link|<iframe|javascript:", page)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "inlined figures share no identifier"
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_figures_are_files_of_their_own_and_stale_ones_go(tmp_path):
    page_of(tmp_path, realistic())
    folder = tmp_path / "run/report/figures"
    for path in folder.iterdir():
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme:dark" in path.read_text()
    (folder / "density-2.svg").write_text("<svg/>")
    report(tmp_path / "run/report")
    assert not (folder / "density-2.svg").exists()


def test_title_is_given_or_the_folder(tmp_path):
    assert "<h1>run</h1>" in page_of(tmp_path / "a", realistic()[:1])
    assert "<h1>Digits, &lt;small&gt;</h1>" in page_of(tmp_path / "b", realistic()[:1], title="Digits, <small>")


def test_another_run_can_be_reported_on(tmp_path):
    run = written(tmp_path / "run", realistic()[:1])
    assert report(tmp_path / "elsewhere", run=run) == {"page": "index.html"}
    assert "teacher" in (tmp_path / "elsewhere/index.html").read_text(encoding="utf-8")


def test_hostile_text_is_escaped_everywhere(tmp_path):
    evil = "<script>alert(1)</script>\"'&$x_1$ {{ 7*7 }} [red] \x1b[31m\x00\u202e --> \ud800 語"
    records = realistic()
    for entry in (records[0], records[3]):
        entry["parents"] = {evil: {"stage": evil, "fingerprint": evil}}
        entry["arguments"] = {"activation": evil, evil: [evil]}
        entry["versions"] = entry["environment"] = {evil: evil}
        entry.update(job=evil, fingerprint=evil)
        entry["levels"] = [{**lv, "mask_hash": evil} for lv in entry.get("levels", [])]
    records[0]["stage"], records[3]["stage"] = evil, evil + "2"
    records.append({**record(evil + "3"), "status": evil})
    page = page_of(tmp_path, records, title=evil.replace("\x00", "").replace("\ud800", ""))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7*7 }}" in page, "text is never a template"
    assert "$x_1$" in page, "nor mathematics"
    for path in (tmp_path / "run/report/figures").iterdir():
        ET.parse(path)
    shown = terminal(summary(tmp_path / "run"))
    assert "\x1b" not in shown
    assert "[red]" in re.sub(r"\s", "", shown)


# Every figure is a record's


def test_every_number_of_the_main_table_is_in_a_record(tmp_path):
    records = realistic()
    rows = cells(page_of(tmp_path, records), "stages")
    assert [row[0] for row in rows] == [entry["stage"] for entry in records]
    for entry, row in zip(records, rows):
        if entry["job"] == "export":
            smallest = min(entry["exports"], key=lambda e: e["bytes"])
            assert row[4:9] == ["—", "—", "—", f"same as {entry['arguments']['of']}", "—"]
            assert row[9] == f"{size(smallest['bytes'])} {smallest['format']}"
            stored = smallest["bytes"]
        else:
            assert row[4] == f"{entry['size']['parameters']:,}"
            assert row[5] == f"{entry['size']['kept']:,}"
            assert row[6] == f"{100 * entry['size']['kept'] / entry['size']['prunable']:.3g}%"
            assert row[7] == f"{100 * entry['metrics']['test/accuracy']:.2f}%"
            stored = entry["size"]["checkpoint_bytes"]
            assert row[9] == size(stored)
        assert row[10] == f"{DENSE / stored:.1f}\N{MULTIPLICATION SIGN}"
        assert row[11] == duration(entry["seconds"])
    assert [row[8] for row in rows[:5]] == [
        "—",
        "\N{MINUS SIGN}0.28 vs teacher",
        "\N{MINUS SIGN}0.84 vs teacher",
        "\N{MINUS SIGN}13.61 vs level 0",
        "\N{MINUS SIGN}16.11 vs level 0",
    ]
    assert [row[2] for row in rows] == ["gelu", "gelu", "relu", "gelu", "relu", "gelu", "relu"]
    assert [row[3] for row in rows][2:6] == [
        "teacher",
        "student-gelu start",
        "student-relu start",
        "ticket-gelu of",
    ]
    assert rows[3][1] == "hunt level 7"


def test_every_number_of_a_level_table_is_in_a_record(tmp_path):
    entry = realistic()[3]
    rows = cells(page_of(tmp_path, realistic()), "levels")
    dense = entry["levels"][0]["metrics"]["test/accuracy"]
    for lv, row in zip(entry["levels"], rows, strict=True):
        measured = lv["metrics"]
        change = 100 * (measured["test/accuracy"] - dense)
        assert row == [
            str(lv["level"]),
            percent(lv["density"]),
            f"{lv['size']['kept']:,}",
            f"{100 * measured['val/accuracy']:.2f}%",
            f"{100 * measured['test/accuracy']:.2f}%",
            f"{change:+.2f}".replace("-", "\N{MINUS SIGN}").replace("+0.00", "0.00"),
            f"{lv['seconds']:.1f} s",
            lv["mask_hash"][:8],
        ]


def test_exports_say_whether_they_were_verified(tmp_path):
    records = realistic()[:1]
    records.append(exported("small", "teacher", 5, compact=1000, onnx=2000))
    records[1]["exports"][1].update(same_predictions=False, largest_difference=0.25)
    page = page_of(tmp_path, records)
    assert cells(page, "exports") == [
        ["small", "compact", "teacher", "1.0 kB", "1,340.5\N{MULTIPLICATION SIGN}", "0", "yes, verified"],
        ["small", "onnx", "teacher", "2.0 kB", "670.2\N{MULTIPLICATION SIGN}", "0.25", "NO"],
    ]
    assert cells(page, "stages")[1][5] == "—", "a stage with one export that differs is not called the same"


def test_curves_are_the_records_points(tmp_path):
    records = realistic()
    found = known(tmp_path, records)
    curves = {curve.stage: curve for curve in learning(found)}
    assert list(curves) == [entry["stage"] for entry in records[:5]]
    assert curves["teacher"].y == [e["val/accuracy"] for e in records[0]["history"]]
    assert curves["teacher"].x == list(range(1, 21))
    assert curves["ticket-gelu"].y == [e["val/accuracy"] for e in records[3]["levels"][0]["history"]], "level 0"
    gelu = sparsity(found)[0]
    assert gelu.y == [lv["metrics"]["test/accuracy"] for lv in records[3]["levels"]]
    assert all(a > b for a, b in pairwise(gelu.x)), "densest first"
    assert gelu.dense == gelu.y[0]


def test_each_figure_names_n_interval_and_fingerprints(tmp_path):
    records = realistic()
    page = page_of(tmp_path, records)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S)
    assert len(captions) == 3
    for caption in captions:
        assert "n = 1 seed (0), no interval." in caption
        assert f"ticket-gelu {records[3]['fingerprint'][:8]}" in caption
    assert all(entry["fingerprint"] in page for entry in records), "whole in the provenance"


def test_provenance_can_be_run_again(tmp_path):
    page = html.unescape(page_of(tmp_path, realistic()))
    assert "lightning run recipe.yaml --out run" in page
    assert "student-gelu:\n  job: distill\n  teacher: teacher\n" in page
    assert "torch</small> 2.12.0" in page
    assert page.count("every stage") == 2, "shared versions and machines are told once"
    records = realistic()[:3]
    records[0]["versions"] = {"torch": "2.11.0"}
    del records[2]["versions"]
    other = page_of(tmp_path / "b", records)
    assert re.findall("<dt>(.*?)</dt>", other) == ["teacher", "student-gelu", "every stage"]


# The pick


def test_pick_looks_at_validation_and_not_at_test(tmp_path):
    """Level 3 passes on test data and fails on validation data, level 2 the reverse: 2 is picked."""
    records = realistic()[:2]
    levels = [
        level(0, 1.0, test=0.980, val=0.980),
        level(1, 0.5, test=0.975, val=0.990),
        level(2, 0.2, test=0.900, val=0.976),
        level(3, 0.1, test=0.990, val=0.900),
    ]
    records.append(
        record(
            "ticket",
            "hunt",
            30,
            [("start", "student-gelu")],
            levels=levels,
            metrics=levels[3]["metrics"],
            size=levels[3]["size"],
        )
    )
    found = known(tmp_path, records)
    assert found.pick is not None
    assert (found.pick.row.stage.name, found.pick.level) == ("ticket", 2)
    pick = found.hunts[0].pick
    assert pick is not None
    assert pick.level.level == 2
    stored = levels[2]["size"]["checkpoint_bytes"]
    assert headline.headline(found) == (
        "Within 1 point of teacher's 98.26% validation accuracy, the smallest checkpoint is ticket "
        f"(level 2): {size(stored)}, {times(DENSE / stored)} smaller than "
        "teacher's 1.3 MB in dense fp32; its test accuracy is 90.00%, 8.06 points below teacher's 98.06%."
    )
    assert stages.sparsest(found.hunts[0]).endswith(
        "density 20%; its test accuracy is 90.00%, 8.00 points below level 0's."
    )


def test_pick_of_an_export_says_whose_figures_it_has(tmp_path):
    records = [*realistic()[:2], exported("small", "student-gelu", 30, compact=20_000, onnx=500_000)]
    found = known(tmp_path, records)
    assert headline.headline(found).endswith(
        "the smallest checkpoint is small (compact): 20.0 kB, 67.0\N{MULTIPLICATION SIGN} smaller than "
        "teacher's 1.3 MB in dense fp32; student-gelu, whose predictions it reproduces, has test accuracy "
        "97.78%, 0.28 points below teacher's 98.06%."
    )
    records[2]["exports"][1]["same_predictions"] = False
    assert "is student-gelu:" in headline.headline(known(tmp_path / "b", records)), "an unverified export is not picked"


def test_nothing_is_picked_without_grounds(tmp_path):
    teacher, student = realistic()[:2]
    student["metrics"] = scored(0.5)
    assert headline.headline(known(tmp_path / "a", [teacher, student])).startswith("No checkpoint of this run is both")
    assert "No checkpoint" in headline.headline(known(tmp_path / "b", [teacher])), "the teacher is not its own saving"
    del teacher["metrics"]["val/accuracy"]
    assert "records no validation accuracy" in headline.headline(known(tmp_path / "c", [teacher, student]))
    del teacher["size"], student["size"]
    assert "2 stages finished; no stage records the size" in headline.headline(
        known(tmp_path / "d", [teacher, student])
    )


def test_one_seed_is_never_passed_off_as_more(tmp_path):
    records = realistic()[:2]
    assert "comes from one seed (0), so no interval" in headline.caveat(known(tmp_path / "a", records))
    records[1]["seed"] = 7
    found = known(tmp_path / "b", records)
    assert "one seed per stage (0, 7)" in headline.caveat(found)
    assert stages.sample(found, ["teacher", "student-gelu"]).startswith("n = 1 seed each (0, 7), no interval.")
    del records[1]["seed"]
    assert "(0, not recorded)" in headline.caveat(known(tmp_path / "c", records))


def test_a_loss_has_no_points_and_is_better_when_lower(tmp_path):
    records = realistic()[:2]
    for entry, loss in zip(records, (2.0, 2.019)):
        entry.update(monitor=["perplexity", "min"], metrics={"val/perplexity": loss, "test/perplexity": loss})
        entry["history"] = [{"epoch": 0, "val/perplexity": loss}]
    found = known(tmp_path, records)
    assert found.pick is not None, "0.95% worse is within 1%"
    said = headline.headline(found)
    assert said.startswith("Within 1% of teacher's 2 validation perplexity")
    assert said.endswith("its test perplexity is 2.019, 0.019 above teacher's 2.")
    assert "change" in stages.stages(found).headers
    records[1]["metrics"]["val/perplexity"] = 2.021
    assert known(tmp_path / "b", records).pick is None


# What is missing, unfinished or broken


def test_missing_keys_are_dashes(tmp_path):
    bare = {"format": 1, "status": "finished"}
    page = page_of(tmp_path, [realistic()[0], bare])
    assert cells(page, "stages")[1] == ["01", *["—"] * 9], "the column that nobody fills is not there"
    assert "01" in terminal(summary(tmp_path / "run"))


@pytest.mark.parametrize("key", sorted({*record(""), "metrics", "size", "levels", "history", "exports"} - {"format"}))
def test_any_key_may_be_missing(tmp_path, key):
    records = realistic()
    for number, entry in enumerate(records[3:] if key == "status" else records):
        entry[key] = None
        if number % 2:
            del entry[key]
    assert page_of(tmp_path, records).count("<h2>") >= 3


def test_a_hunt_without_figures_of_its_own_shows_its_last_level(tmp_path):
    records = realistic()[:4]
    del records[3]["metrics"], records[3]["size"]
    row = known(tmp_path, records).rows[3]
    assert (row.level, row.test, row.kept) == (7, 0.8417, records[3]["levels"][7]["size"]["kept"])


def test_figures_that_are_not_numbers_are_shown_and_never_picked(tmp_path):
    records = realistic()[:2]
    records[1]["metrics"] = {"val/accuracy": float("nan"), "test/accuracy": float("inf")}
    records[1]["seconds"] = float("nan")
    records[1]["history"][3]["val/accuracy"] = float("nan")
    found = known(tmp_path, records)
    assert found.pick is None
    row = cells(page_of(tmp_path / "b", records), "stages")[1]
    assert row[7] == "inf"
    assert row[-1] == "—"


def test_unfinished_stages_are_named_and_not_shown(tmp_path):
    records = realistic()[:4]
    records[2]["status"], records[3]["status"] = "failed", "running"
    page = page_of(tmp_path, records)
    assert "Not finished, and in no figure or table: student-relu (failed), ticket-gelu (running)." in page
    assert [row[0] for row in cells(page, "stages")] == ["teacher", "student-gelu"]
    assert "student-relu (failed)" in terminal(summary(tmp_path / "run"))


def test_own_record_is_ignored(tmp_path):
    run = written(tmp_path / "run", realistic()[:1])
    (run / "report").mkdir()
    (run / "report/record.json").write_text(json.dumps(record("report", "report", 99, status="running")))
    report(run / "report")
    assert "Not finished" not in (run / "report/index.html").read_text(encoding="utf-8")


def test_finished_reports_are_not_stages(tmp_path):
    found = known(tmp_path, [realistic()[0], record("page", "report", 99)])
    assert [row.stage.name for row in found.rows] == ["teacher"]


def test_a_parent_run_anew_is_told(tmp_path):
    records = realistic()[:2]
    assert stale(read_run(written(tmp_path / "a", records))) == []
    records[0]["fingerprint"] = "0" * 64
    assert stale(read_run(written(tmp_path / "b", records))) == [("student-gelu", "teacher")]
    assert "student-gelu was made from an earlier teacher" in page_of(tmp_path / "c", records)


def test_stages_that_start_in_the_same_second_follow_their_parents(tmp_path):
    records = [
        record("a", parents=[("start", "b")]),
        record("b", parents=[("start", "c")]),
        record("c"),
        record("0", start=9),
    ]
    assert [s.name for s in read_run(written(tmp_path / "run", records))] == ["c", "b", "a", "0"]
    loop = [record("a", parents=[("start", "b")]), record("b", parents=[("start", "a")])]
    assert known(tmp_path / "loop", loop).rows[0].activation is None, "a cycle ends"


@pytest.mark.parametrize("records", [[], [record("teacher", status="failed")], [record("page", "report")]])
def test_nothing_finished_says_what_to_do(tmp_path, records):
    run = written(tmp_path / "run", records)
    run.mkdir(exist_ok=True)
    for call in (lambda: report(run / "report"), lambda: summary(run)):
        with pytest.raises(ValueError, match=r"run a recipe into it|run the recipe again"):
            call()


def test_no_run_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="is not a folder: give the folder that a recipe was run into"):
        summary(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "\xff", '{"format": 2}',
        '{"format": 1, "metrics": [1]}', '{"format": 1, "levels": {"a": 1}}',
        '{"format": 1, "monitor": "accuracy"}', '{"format": 1, "history": [1]}',
        '{"format":1,"a":' + "[" * 100_000,
    ],
)  # fmt: skip
def test_a_malformed_record_is_named(tmp_path, text):
    run = written(tmp_path / "run", realistic()[:1])
    (run / "bad").mkdir()
    (run / "bad/record.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"bad.record\.json"):
        report(run / "report")


def test_two_stages_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a second stage called 'teacher'"):
        known(tmp_path, [record("teacher"), record("teacher")])


# Wording and drawing


def test_numbers_in_words():
    assert [size(v) for v in (None, 0, 999, 1000, 104_488, 2.5e6, 3e9)] == [
        "—", "0 B", "999 B", "1.0 kB", "104.5 kB", "2.5 MB", "3.0 GB",
    ]  # fmt: skip
    assert [duration(v) for v in (None, 0, 59.94, 59.96, 125, 3600, 7199.9)] == [
        "—", "0.0 s", "59.9 s", "1 min 00 s", "2 min 05 s", "1 h 00 min", "2 h 00 min",
    ]  # fmt: skip
    assert [percent(v) for v in (None, 1, 0.343, 0.00678)] == ["—", "100%", "34.3%", "0.678%"]
    assert (count(None), count(26122), times(None), times(7)) == (
        "—",
        "26,122",
        "—",
        "7.0\N{MULTIPLICATION SIGN}",
    )


def test_a_share_is_called_one_and_lies_in_the_unit_interval():
    share = metric("accuracy", "max", [0.5, 1.0, None, float("nan")])
    assert share.share
    assert (share.show(0.98061), share.change(-0.0028), share.change(0.00001)) == (
        "98.06%",
        "\N{MINUS SIGN}0.28",
        "0.00",
    )
    assert not metric("accuracy", "max", [0.5, 98.0]).share, "already in percent"
    assert not metric("cosine", "max", [0.5]).share
    assert not metric("accuracy", "min", [0.5]).share
    cosine = metric("cosine", "max", [0.5])
    assert (cosine.show(-0.5), cosine.change(0.25), cosine.unit) == ("\N{MINUS SIGN}0.5", "+0.25", "")


def test_labels_are_spread_without_crossing():
    assert figures.spread([0.1, 0.9], 0.1) == [0.1, 0.9]
    moved = figures.spread([0.5, 0.52, 0.51, 1.0, 1.0], 0.1)
    order = sorted(range(5), key=lambda i: moved[i])
    assert order == [0, 2, 1, 3, 4]
    assert all(moved[b] - moved[a] >= 0.1 - 1e-9 for a, b in pairwise(order))
    assert min(moved) >= 0
    assert max(moved) <= 1


def test_density_ticks():
    assert figures.ticks(0.01, 1.0) == pytest.approx([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
    assert figures.ticks(0.3, 0.4) == [0.2], "the nearest one where none lies between"


def test_axis_leaves_out_the_first_epochs_only_where_they_would_hide_the_rest():
    low, high = figures.window([[0.1, 0.5, 0.9, 0.95, 0.96, 0.97, 0.97, 0.98, 0.98, 0.98]])
    assert 0.8 < low < 0.9
    assert high > 0.98
    assert figures.window([[0.1, 0.2, 0.3, 0.4, 0.5]])[0] < 0.1
    assert figures.window([[0.5]])[0] < 0.5


def test_metrics_of_two_kinds_get_a_figure_each(tmp_path):
    records = realistic()[:2]
    records[1].update(monitor=["loss", "min"])
    page = page_of(tmp_path, records)
    assert (tmp_path / "run/report/figures/learning-2.svg").exists()
    assert "validation loss, lower is better" in page
    assert cells(page, "stages")[1][7:9] == ["0.0222 loss", "419.1 kB"], "no change between two metrics"


# What distillation bought


def compared(name="bought", time=200, classes=10, students=("alone", "smoothing", "many/small", "many/tiny"), **fields):
    """A compare stage of a teacher and students; the first student is the baseline."""
    told, by_class = {}, {}
    for place, student in enumerate(students):
        gained = [(3 * c * place) % 5 for c in range(classes)]
        lost = [(2 * c + 5 * place) % 4 if place else 0 for c in range(classes)]
        gain = (sum(gained) - sum(lost)) / (36 * classes)
        told[student] = {
            "accuracy": 0.90 + gain, "nll": 0.4 - 0.03 * place, "brier": 0.2 - 0.01 * place, "ece": 0.19 - 0.04 * place,
            "agreement": 0.9 + 0.01 * place, "kl": 0.39 - 0.05 * place, "gain": gain,
        }  # fmt: skip
        if place:
            interval = {"low": gain - 0.013, "high": gain + 0.0131, "confidence": 0.95}
            told[student]["paired"] = {
                "n": 36 * classes, "gained": sum(gained), "lost": sum(lost), "difference": gain, "interval": interval,
                "p": 0.1 / place, "p_holm": 0.2 / place, "method": "exact McNemar test, adjusted Wald interval",
            }  # fmt: skip
        recall = [0.8 + (g - x) / 36 for g, x in zip(gained, lost)]
        by_class[student] = {"recall": recall, "gained": gained, "lost": lost}
    found = {
        "split": "test",
        "baseline": students[0],
        "n": 36 * classes,
        "unit": "samples",
        "teacher": {"name": "teacher", "accuracy": 0.9806, "nll": 0.069, "brier": 0.031, "ece": 0.015},
        "students": told,
        "per_class": {
            "of": classes,
            "classes": list(range(classes)),
            "n": [36] * classes,
            "teacher": [0.98] * classes,
            "students": by_class,
        },
    }
    entry = record(name, "compare", time, [("teacher", "teacher")], comparison=found, seed=None, seconds=0.2, **fields)
    del entry["monitor"]
    return entry


def family(name="many", start=10):
    """A distill stage that trained two students on one teacher pass."""
    members = {
        member: {
            "metrics": scored(test),
            "size": sized(parameters=parameters, prunable=parameters - 280),
            "history": epochs(15, test + 0.002, 0.52),
        }
        for member, test, parameters in (("small", 0.9778, 101_386), ("tiny", 0.9611, 20_010))
    }
    models = {"small": network("gelu", 256), "tiny": network("relu", 64)}
    return record(
        name, "distill", start, [("teacher", "store")], seconds=9.5, students=members,
        arguments={"teacher": "store", "model": models, "temperature": 4.0},
    )  # fmt: skip


def cached(name="store", time=5):
    entry = record(
        name, "cache", time, [("teacher", "teacher")], seconds=0.8, bytes=12_345_678, samples=1437, seed=None
    )
    del entry["monitor"]
    return entry


def distilled():
    """A teacher, its cache, two fits, a family, a comparison."""
    alone, smoothing = realistic()[1:3]
    for entry, name in ((alone, "alone"), (smoothing, "smoothing")):
        entry.update(stage=name, job="fit", parents={})
    return [realistic()[0], cached(), alone, smoothing, family(), compared()]


MINUS = "\N{MINUS SIGN}"


def test_every_number_of_a_comparison_is_in_its_record(tmp_path):
    entry = compared()
    found = entry["comparison"]
    page = page_of(tmp_path, distilled())
    assert page.count("<h2>What distillation bought</h2>") == 1
    rows = cells(page, "bought")
    assert rows[0] == ["teacher", "98.06%", "0.069", "0.031", "1.50%", "—", "—", "—"]
    assert [row[0] for row in rows[1:]] == ["alone baseline", "smoothing", "many/small", "many/tiny"]
    for row, told in zip(rows[1:], found["students"].values(), strict=True):
        shares, numbers = [row[i] for i in (1, 4, 5)], [row[i] for i in (2, 3, 6)]
        assert shares == [f"{100 * told[name]:.2f}%" for name in ("accuracy", "ece", "agreement")]
        assert numbers == [f"{told[name]:.3f}" for name in ("nll", "brier", "kl")]
        if "paired" in told:
            low, high = (f"{100 * told['paired']['interval'][end]:+.2f}".replace("-", MINUS) for end in ("low", "high"))
            gain = f"{100 * told['gain']:+.2f}".replace("-", MINUS).replace("+0.00", "0.00")
            assert row[7] == f"{gain} {low} to {high}, p = {told['paired']['p_holm']:.2g}"
        else:
            assert row[7] == "—"
    assert 'class="marked"' in page, "the baseline's row"
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert "Measured on the test split (n = 360 samples)." in text
    assert (
        "with its 95% interval; exact McNemar test, adjusted Wald interval, p adjusted for 3 comparisons (Holm)" in text
    )
    assert "not what another seed would" in text


def test_classes_that_move_are_drawn_and_told(tmp_path):
    entry = compared(classes=40)
    found = read_run(written(tmp_path / "a", [entry]))[0].comparison
    assert found is not None
    shown = comparisons.moves(found)
    by_class = entry["comparison"]["per_class"]["students"]
    assert len(shown) == 2 * comparisons.MOST
    largest = [max(move.changes, key=abs) for move in shown]
    assert largest == sorted(largest, reverse=True)
    assert largest[comparisons.MOST - 1] > 0 > largest[comparisons.MOST]
    for move in shown:
        nets = [by_class[s]["gained"][move.index] - by_class[s]["lost"][move.index] for s in comparisons.names(found)]
        assert move.changes == [net / 36 for net in nets]
        assert max(map(abs, nets)) >= comparisons.LEAST
    unseen = [c for c in range(40) if c not in {move.index for move in shown}]
    worst = max(abs(by_class[s]["gained"][c] - by_class[s]["lost"][c]) for s in by_class for c in unseen) / 36
    assert worst <= min(map(abs, largest)), "nothing that moves more is left out"

    records = [*distilled()[:-1], entry]
    page = page_of(tmp_path / "b", records)
    rows = cells(page, "classes")
    assert [row[0] for row in rows] == [move.name for move in shown]
    first = shown[0].index
    told = by_class["smoothing"]
    assert rows[0][4] == f"{100 * told['recall'][first]:.2f}% +{told['gained'][first]} {MINUS}{told['lost'][first]}"
    assert (tmp_path / "b/run/report/figures/classes.svg").exists()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S)
    assert f"Recipe fingerprints: bought {entry['fingerprint'][:8]}." in captions[0]
    assert re.findall(r"<h3>(Figure \d\.)", page) == ["Figure 1.", "Figure 2.", "Figure 3."], "numbered throughout"


def test_classes_that_do_not_move_are_not_drawn(tmp_path):
    entry = compared()
    for told in entry["comparison"]["per_class"]["students"].values():
        told["gained"], told["lost"] = [1] * 10, [0] * 10
    page = page_of(tmp_path, [*distilled()[:-1], entry])
    assert "No class has 2 samples more or fewer right with any student than with alone." in page
    assert '<table class="classes">' not in page
    assert not (tmp_path / "run/report/figures/classes.svg").exists()


def test_classes_go_by_their_names(tmp_path):
    entry = compared()
    entry["comparison"]["per_class"]["names"] = [f"<kind {c}>" for c in range(10)]
    page = page_of(tmp_path, [*distilled()[:-1], entry])
    assert re.fullmatch(r"<kind \d>", cells(page, "classes")[0][0])
    assert "<kind" not in page


def test_the_terminal_says_in_one_line_what_distillation_bought(tmp_path):
    run = written(tmp_path / "run", distilled())
    students = {name: s for name, s in compared()["comparison"]["students"].items() if name != "alone"}

    def points(share: float) -> str:
        return f"{100 * share:+.2f}".replace("-", MINUS).replace("+0.00", "0.00")

    ends = {name: s["paired"]["interval"] for name, s in students.items()}
    told = [
        f"{name} {points(s['gain'])} ({points(ends[name]['low'])} to {points(ends[name]['high'])})"
        for name, s in students.items()
    ]
    line = (
        f"bought: what distillation bought over alone, 90.00% test accuracy: {', '.join(told)} points; "
        "teacher 98.06% (n = 360 samples)."
    )
    assert len(told) == 3
    assert line in " ".join(terminal(summary(run)).split())


def test_two_comparisons_have_a_part_each(tmp_path):
    page = page_of(tmp_path, [*distilled(), compared("again", 300, students=("smoothing", "alone"))])
    assert re.findall(r"<h3>(bought|again)</h3>", page) == ["bought", "again"]
    figures_ = sorted(p.name for p in (tmp_path / "run/report/figures").glob("classes*"))
    assert figures_ == ["classes-2.svg", "classes.svg"]
    assert "Figure 2. Classes that move, again" in page


def test_a_comparison_of_one_student_has_no_gain(tmp_path):
    records = [*distilled()[:-1], compared(students=("alone",))]
    page = page_of(tmp_path, records)
    assert cells(page, "bought")[1][:2] == ["alone baseline", "90.00%"]
    assert "points vs alone" not in page
    assert "it has one student only" in terminal(summary(tmp_path / "run"))


def test_scores_that_are_not_numbers_are_shown(tmp_path):
    entry = compared()
    entry["comparison"]["students"]["many/tiny"].update(kl=float("inf"), nll=float("nan"))
    row = cells(page_of(tmp_path, [*distilled()[:-1], entry]), "bought")[-1]
    assert (row[2], row[6]) == ("nan", "inf")


PARTS = ("split", "baseline", "n", "unit", "teacher", "students", "per_class")


@pytest.mark.parametrize(
    "key", [*PARTS, *(f"per_class.{key}" for key in ("of", "classes", "n", "teacher", "students"))]
)
def test_any_part_of_a_comparison_may_be_missing(tmp_path, key):
    entry = compared()
    *outer, last = key.split(".")
    part = entry["comparison"]
    for name in outer:
        part = part[name]
    del part[last]
    run = written(tmp_path / "run", [realistic()[0], entry])
    assert "What distillation bought" in page_of(tmp_path / "again", [realistic()[0], entry])
    assert "bought" in terminal(summary(run))


@pytest.mark.parametrize("wrong", [[1], {"students": [1]}, {"students": {"a": 1}}, {"per_class": 1}, {"teacher": "a"}])
def test_a_malformed_comparison_is_named(tmp_path, wrong):
    run = written(tmp_path / "run", [realistic()[0], {**compared(), "comparison": wrong}])
    with pytest.raises(ValueError, match=r"01.record\.json"):
        report(run / "report")


# Stages that trained several networks, or none


def test_members_of_a_family_are_rows_of_their_own(tmp_path):
    records = distilled()
    found = known(tmp_path, records)
    assert [row.stage.name for row in found.rows] == ["teacher", "alone", "many/small", "many/tiny", "smoothing"]
    rows = {row.stage.name: row for row in found.rows}
    for member, told in records[4]["students"].items():
        row = rows[f"many/{member}"]
        assert (row.test, row.bytes) == (told["metrics"]["test/accuracy"], told["size"]["checkpoint_bytes"])
        assert (row.stage.job, row.stage.seed, row.parent) == ("distill", 0, ("teacher", "store"))
        assert (row.against, row.change) == ("teacher", pytest.approx(row.test - 0.9806)), "the cache is the teacher's"
    assert [rows[f"many/{m}"].activation for m in ("small", "tiny")] == ["gelu", "relu"], "each has its own model"
    assert found.reference is rows["teacher"]
    assert [c.stage for c in learning(found)][2:4] == ["many/small", "many/tiny"]
    page = page_of(tmp_path / "b", records)
    assert next(row for row in cells(page, "stages") if row[0] == "many/tiny")[-1] == "9.5 s all together"
    drawn = (tmp_path / "b/run/report/figures/seconds.svg").read_text()
    assert drawn.count(">many<") == 1, "one bar: they were trained together"
    assert "many/" not in drawn
    text = html.unescape(page)
    assert "many:\n  job: distill\n" in text, "and one stage of the recipe"
    assert [row[0] for row in cells(page, "prints")].count("many") == 1


def test_several_teachers_are_all_named(tmp_path):
    records = [realistic()[0], {**realistic()[0], "stage": "second"}, realistic()[1]]
    records[2]["parents"] = {f"teacher[{i}]": {"stage": name} for i, name in enumerate(("second", "teacher"))}
    found = known(tmp_path, records)
    row = found.rows[2]
    assert (row.parent, row.against) == (("teacher[0]", "second"), "second"), "compared with the first"
    assert (stages.stages(found).lines[2].cells[3].text, row.activation) == ("second, teacher", "gelu")
    assert found.reference is not None
    assert found.reference.stage.name in ("second", "teacher")


def test_a_member_can_be_a_parent(tmp_path):
    records = [*distilled(), exported("shipped", "many/tiny", 300, compact=9_000)]
    records[-1]["parents"]["of"]["fingerprint"] = records[4]["fingerprint"]
    found = known(tmp_path, records)
    row = found.rows[-1]
    assert (row.stage.name, row.reproduces) == ("shipped", "many/tiny")
    assert stale(read_run(tmp_path / "run")) == []
    records[4]["fingerprint"] = "0" * 64
    assert ("shipped", "many/tiny") in stale(read_run(written(tmp_path / "b", records)))
    early = [exported("shipped", "many/tiny", 0, compact=9_000), *distilled()]
    names = [stage.name for stage in read_run(written(tmp_path / "c", early))]
    assert names.index("shipped") > names.index("many")


def test_a_family_that_is_not_finished_is_one_stage(tmp_path):
    records = distilled()[:5]
    records[4] = {**records[4], "status": "running", "students": None}
    assert "Not finished, and in no figure or table: many (running)." in page_of(tmp_path, records)


def test_stages_that_measure_nothing_are_told_and_not_tabled(tmp_path):
    records = distilled()
    page = page_of(tmp_path, records)
    assert {"store", "bought"}.isdisjoint(row[0] for row in cells(page, "stages"))
    assert "test accuracy" in re.sub("<[^>]*>", "", page), "the one metric of all rows"
    line = "Also finished: store (cache): 12.3 MB, 1,437 samples, took 0.8 s."
    assert line in page
    assert line in terminal(summary(tmp_path / "run"))
    drawn = (tmp_path / "run/report/figures/seconds.svg").read_text()
    assert ">store<" in drawn
    assert {"store", "bought"} <= {row[0] for row in cells(page, "prints")}
    bare = record("cache", "cache", 9, seconds=None)
    assert "Also finished: cache: nothing to tell." in headline.aside(known(tmp_path / "b", [realistic()[0], bare]))


def test_a_run_of_nothing_but_such_stages_is_still_told(tmp_path):
    page = page_of(tmp_path, [cached()])
    assert cells(page, "stages")[0][:2] == ["store", "cache"]


def test_comparisons_and_families_give_the_same_bytes_too(tmp_path):
    first = page_of(tmp_path / "a", distilled())
    assert first == page_of(tmp_path / "b", list(reversed(distilled())))
    assert not re.search(r"https?:|@import|<script|<link|<iframe|javascript:", first)
    ids = re.findall(r'\sid="([^"]+)"', first)
    assert len(ids) == len(set(ids))
