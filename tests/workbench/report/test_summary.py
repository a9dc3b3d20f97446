"""Rows, curves and the pick."""

import html
from itertools import pairwise

import pytest

from prune.tickets.sections import hunt
from tests.helpers.report_records import (
    DENSE,
    cells,
    distilled,
    exported,
    gathered,
    level,
    page_of,
    realistic,
    record,
    scored,
    written,
)
from workbench.records import read_run
from workbench.report import headline, tables
from workbench.report.format import size, times
from workbench.report.summary import learning, stale


def hunts_of(found):
    return hunt.hunts_of(found.stages("hunt"), found)


def test_curves_are_the_records_points(tmp_path):
    records = realistic()
    found = gathered(tmp_path, records)
    curves = {curve.stage: curve for curve in learning(found)}
    assert list(curves) == [entry["stage"] for entry in records[:5]]
    assert curves["teacher"].y == [e["val/accuracy"] for e in records[0]["history"]]
    assert curves["teacher"].x == list(range(1, 21))
    assert curves["ticket-gelu"].y == [e["val/accuracy"] for e in records[3]["levels"][0]["history"]], "level 0"
    gelu = hunt.sparsity(hunts_of(found))[0]
    assert gelu.y == [lv["metrics"]["test/accuracy"] for lv in records[3]["levels"]]
    assert all(a > b for a, b in pairwise(gelu.x)), "densest first"
    assert gelu.dense == gelu.y[0]


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
    found = gathered(tmp_path, records)
    assert found.pick is not None
    assert (found.pick.row.stage.name, found.pick.checkpoint.label) == ("ticket", "level 2")
    pick = hunts_of(found)[0].pick
    assert pick is not None
    assert pick.level.level == 2
    stored = levels[2]["size"]["checkpoint_bytes"]
    assert headline.headline(found) == (
        "Within 1 point of teacher's 98.26% validation accuracy, the smallest checkpoint is ticket "
        f"(level 2): {size(stored)}, {times(DENSE / stored)} smaller than "
        "teacher's 1.3 MB in dense fp32; its test accuracy is 90.00%, 8.06 points below teacher's 98.06%."
    )
    assert hunt.sparsest(hunts_of(found)[0]).endswith(
        "density 20%; its test accuracy is 90.00%, 8.00 points below level 0's; level 3 is 8.00 points below level 0 "
        "on validation data."
    )


def test_pick_of_an_export_says_whose_figures_it_has(tmp_path):
    records = [*realistic()[:2], exported("small", "student-gelu", 30, compact=20_000, onnx=500_000)]
    found = gathered(tmp_path, records)
    assert headline.headline(found).endswith(
        "the smallest checkpoint is small (compact): 20.0 kB, 67.0\N{MULTIPLICATION SIGN} smaller than "
        "teacher's 1.3 MB in dense fp32; student-gelu, whose predictions it reproduces, has test accuracy "
        "97.78%, 0.28 points below teacher's 98.06%."
    )
    records[2]["exports"][1]["same_predictions"] = False
    assert "is student-gelu:" in headline.headline(gathered(tmp_path / "b", records)), (
        "an unverified export is not picked"
    )


def test_nothing_is_picked_without_grounds(tmp_path):
    teacher, student = realistic()[:2]
    student["metrics"] = scored(0.5)
    assert headline.headline(gathered(tmp_path / "a", [teacher, student])).startswith(
        "No checkpoint of this run is both"
    )
    assert "No checkpoint" in headline.headline(gathered(tmp_path / "b", [teacher])), (
        "the teacher is not its own saving"
    )
    del teacher["metrics"]["val/accuracy"]
    assert "records no validation accuracy" in headline.headline(gathered(tmp_path / "c", [teacher, student]))
    del teacher["size"], student["size"]
    assert "2 stages finished; no stage records the size" in headline.headline(
        gathered(tmp_path / "d", [teacher, student])
    )


def test_a_loss_has_no_points_and_is_better_when_lower(tmp_path):
    records = realistic()[:2]
    for entry, loss in zip(records, (2.0, 2.019)):
        entry.update(monitor=["perplexity", "min"], metrics={"val/perplexity": loss, "test/perplexity": loss})
        entry["history"] = [{"epoch": 0, "val/perplexity": loss}]
    found = gathered(tmp_path, records)
    assert found.pick is not None, "0.95% worse is within 1%"
    said = headline.headline(found)
    assert said.startswith("Within 1% of teacher's 2 validation perplexity")
    assert said.endswith("its test perplexity is 2.019, 0.019 above teacher's 2.")
    assert "change" in tables.main(found).headers
    records[1]["metrics"]["val/perplexity"] = 2.021
    assert gathered(tmp_path / "b", records).pick is None


def test_a_hunt_without_figures_of_its_own_shows_its_last_level(tmp_path):
    records = realistic()[:4]
    del records[3]["metrics"], records[3]["size"]
    row = gathered(tmp_path, records).rows[3]
    assert (row.outcome.label, row.test, row.outcome.size.kept) == (
        "level 7",
        0.8417,
        records[3]["levels"][7]["size"]["kept"],
    )


def test_figures_that_are_not_numbers_are_shown_and_never_picked(tmp_path):
    records = realistic()[:2]
    records[1]["metrics"] = {"val/accuracy": float("nan"), "test/accuracy": float("inf")}
    records[1]["seconds"] = float("nan")
    records[1]["history"][3]["val/accuracy"] = float("nan")
    found = gathered(tmp_path, records)
    assert found.pick is None
    row = cells(page_of(tmp_path / "b", records), "stages")[1]
    assert row[8] == "inf"
    assert row[-1] == "—"


def test_finished_reports_are_not_stages(tmp_path):
    found = gathered(tmp_path, [realistic()[0], record("page", "report", 99)])
    assert [row.stage.name for row in found.rows] == ["teacher"]


def test_a_parent_run_anew_is_told(tmp_path):
    records = realistic()[:2]
    assert stale(read_run(written(tmp_path / "a", records))) == []
    records[0]["fingerprint"] = "0" * 64
    assert stale(read_run(written(tmp_path / "b", records))) == [("student-gelu", "teacher")]
    assert "student-gelu was made from an earlier teacher" in page_of(tmp_path / "c", records)


def test_members_of_a_family_are_rows_of_their_own(tmp_path):
    records = distilled()
    found = gathered(tmp_path, records)
    assert [row.stage.name for row in found.rows] == ["teacher", "alone", "many/small", "many/tiny", "smoothing"]
    rows = {row.stage.name: row for row in found.rows}
    for member, told in records[4]["students"].items():
        row = rows[f"many/{member}"]
        assert (row.test, row.stored.bytes) == (told["metrics"]["test/accuracy"], told["size"]["checkpoint_bytes"])
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


def test_a_member_can_be_a_parent(tmp_path):
    records = [*distilled(), exported("shipped", "many/tiny", 300, compact=9_000)]
    records[-1]["parents"]["of"]["fingerprint"] = records[4]["fingerprint"]
    found = gathered(tmp_path, records)
    row = found.rows[-1]
    assert (row.stage.name, row.reproduces) == ("shipped", "many/tiny")
    assert stale(read_run(tmp_path / "run")) == []
    records[4]["fingerprint"] = "0" * 64
    assert ("shipped", "many/tiny") in stale(read_run(written(tmp_path / "b", records)))
    early = [exported("shipped", "many/tiny", 0, compact=9_000), *distilled()]
    names = [stage.name for stage in read_run(written(tmp_path / "c", early))]
    assert names.index("shipped") > names.index("many")
