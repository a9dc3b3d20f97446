"""What the report tells of a hunt's levels: controls, dead units, gradient flow, barriers."""

import re
from pathlib import Path

import pytest

from prune.tickets.sections import hunt as section
from prune.tickets.sections.hunt import Hunt
from tests.helpers.lottery_records import FEW, hunt_record, write_records
from tests.helpers.report_records import cells, page_of, realistic, record
from workbench.records import read_run
from workbench.report import headline
from workbench.report.format import percent
from workbench.report.job import report
from workbench.report.summary import gather


def hunts_of(run: Path) -> list[Hunt]:
    """The hunts of a run on disk."""
    found = gather(read_run(run))
    return section.hunts_of(found.stages("hunt"), found)


def test_every_control_and_measurement_is_in_the_records(tmp_path):
    entry = hunt_record(0, FEW)
    run = write_records(tmp_path, entry)
    report(run / "report")
    page = (run / "report/index.html").read_text(encoding="utf-8")
    headers = re.findall(r"<th[^>]*>([^<]*)</th>", page.partition('class="levels"')[2].partition("</thead>")[0])
    assert headers[7:] == [
        "test reinit", "test shuffled", "dead units", "gradient flow", "val barrier, other order",
        "val barrier, last level", "mask distance", "took", "mask",
    ]  # fmt: skip
    for level, row in zip(entry["levels"], cells(page, "levels"), strict=True):
        for cell, arm in zip(row[7:9], ("reinit", "shuffled")):
            control = level.get("controls", {}).get(arm)
            assert cell == (f"{100 * control['metrics']['test/accuracy']:.2f}%" if control else "—")
        told, barriers = level["diagnosis"], level["connectivity"]
        assert row[9] == f"{100 * told['dead'] / told['units']:.3g}%"
        assert row[10] == f"{told['gradient_flow']:.3g}"
        orders = barriers["orders"]["val"]
        assert row[11] == f"{100 * orders['barrier']:.2f}" + (" stable" if orders["stable"] else "")
        assert row[12] == ("0.40 stable" if level["level"] else "—")
        assert row[13] == f"{level['mask_distances'][-1]:.3g}"
    legend = section.columns(hunts_of(run)[0])
    assert legend.startswith("Test reinit, shuffled: the accuracy of what was trained beside the ticket; dead units")
    assert legend in re.sub(r"<[^>]*>", "", page)


def test_controls_are_drawn_thin_beside_their_ticket(tmp_path):
    entry = hunt_record(0, FEW)
    run = write_records(tmp_path, entry)
    (curve,) = section.sparsity(hunts_of(run))
    for arm, (x, y) in curve.controls.items():
        assert x == [level["density"] for level in entry["levels"][1:]]
        assert y == [level["controls"][arm]["metrics"]["test/accuracy"] for level in entry["levels"][1:]]
    report(run / "report")
    drawn = (run / "report/figures/density.svg").read_text(encoding="utf-8")
    assert [drawn.count(f">seed-0, {arm}<") for arm in curve.controls] == [1, 1]
    assert drawn.count("stroke-width: 0.8") > 0
    assert "Thin, its controls." in (run / "report/index.html").read_text(encoding="utf-8")


def test_a_hunt_by_itself_is_compared_with_its_dense_level(tmp_path):
    entry = hunt_record(0, FEW)
    found = gather(read_run(write_records(tmp_path, entry)))
    first, last = entry["levels"][0], entry["levels"][-1]
    dense, sparse = (level["metrics"]["test/accuracy"] for level in (first, last))
    validation = first["metrics"]["val/accuracy"]
    said = headline.headline(found)
    assert f"Within 1 point of the dense seed-0's {100 * validation:.2f}% validation accuracy, the smallest" in said
    assert f"is seed-0 (level {last['level']})" in said
    assert f"its test accuracy is {100 * sparse:.2f}%, {100 * (dense - sparse):.2f} points below the dense" in said


def winning(level: int, tolerance: float = 0.005) -> dict:
    """A hunt that recommends a level; its own network is that of the last level."""
    return {**hunt_record(0, FEW), "winning": level, "tolerance": tolerance}


def test_the_page_recommends_the_level_that_exports_take(tmp_path):
    entry = winning(2)
    entry["levels"][3]["metrics"]["val/accuracy"] = 0.96
    files = [{"format": "compact", "bytes": 900, "largest_difference": 0.0, "same_predictions": True}]
    chosen = {name: entry["levels"][2][name] for name in ("metrics", "size")}
    exported = record("small", "export", 900, [("of", "seed-0")], exports=files, level=2, **chosen)
    run = write_records(tmp_path, entry, exported)
    (hunt,) = hunts_of(run)
    said = section.sparsest(hunt)
    assert said.startswith(
        "Sparsest level within 0.5 points of level 0 on validation data: level 2, 17% of the model, density 16.8%"
    )
    lost = 100 * (entry["levels"][0]["metrics"]["val/accuracy"] - entry["levels"][3]["metrics"]["val/accuracy"])
    assert said.endswith(f"; level 3 is {lost:.2f} points below level 0 on validation data.")
    assert [line.marked for line in section.levels(hunt).lines] == [False, False, True, False, False]
    found = gather(read_run(run))
    assert [each.label for each in found.rows[0].outcome.checkpoints] == ["level 2"], "no other level is picked"
    row = found.row("small")
    assert (row.outcome.label, row.against, row.change) == ("level 2", "seed-0, level 2", 0), (
        "not the last level's score"
    )
    assert "the smallest checkpoint is small (compact)" in headline.headline(found)


def test_a_hunt_that_recommends_its_dense_level_recommends_nothing(tmp_path):
    (hunt,) = hunts_of(write_records(tmp_path, winning(0)))
    assert section.sparsest(hunt).startswith("No sparser level stays within 0.5 points of level 0 on validation data")


def test_hunts_without_any_of_it_are_told_as_before(tmp_path):
    run = write_records(tmp_path, *realistic()[:4])
    (hunt,) = hunts_of(run)
    told = section.levels(hunt)
    assert told.headers[:4] == ["level", "model density", "density", "kept"]
    assert told.headers[4:] == ["val accuracy", "test accuracy", "points", "took", "mask"]
    assert section.columns(hunt) == ""
    assert section.sparsity([hunt])[0].controls == {}


def test_a_control_decides_too_whether_the_metric_is_a_share(tmp_path):
    entry = hunt_record(0, FEW)
    entry["levels"][1]["controls"]["reinit"]["metrics"]["test/accuracy"] = 97.0
    (hunt,) = hunts_of(write_records(tmp_path, entry))
    assert not hunt.metric.share


def test_barriers_of_losses_are_in_their_unit(tmp_path):
    entry = hunt_record(0, FEW)
    entry["levels"][1]["connectivity"]["orders"]["val"] = {"barrier": 0.01234, "stable": None}
    entry["levels"][2]["connectivity"]["orders"]["val"] = {"barrier": float("nan"), "stable": False}
    (hunt,) = hunts_of(write_records(tmp_path, entry))
    at = section.levels(hunt).headers.index("val barrier, other order")
    told = [line.cells[at] for line in section.levels(hunt).lines]
    assert [(cell.text, cell.note) for cell in told[1:3]] == [("0.0123", ""), ("nan", "")]


def test_every_split_of_a_barrier_has_its_columns(tmp_path):
    entry = hunt_record(0, FEW)
    for level in entry["levels"]:
        orders = level["connectivity"]["orders"]["val"]
        level["connectivity"]["orders"] = {"train": orders, "test": {**orders, "barrier": 0.0301, "stable": False}}
        level["connectivity"].pop("levels", None)
    (hunt,) = hunts_of(write_records(tmp_path, entry))
    told = section.levels(hunt)
    at = [place for place, header in enumerate(told.headers) if "barrier" in header]
    assert [told.headers[place] for place in at] == ["train barrier, other order", "test barrier, other order"]
    assert [told.lines[1].cells[place].text for place in at] == ["0.10", "3.01"]
    assert "; train and test barrier: how far the straight line" in section.columns(hunt)


@pytest.mark.parametrize("key", ["controls", "diagnosis", "connectivity", "mask_distances", "history", "size"])
def test_any_of_it_may_be_missing(tmp_path, key):
    entry = hunt_record(0, FEW)
    for place, level in enumerate(entry["levels"]):
        level[key] = None
        if place % 2:
            del level[key]
    (hunt,) = hunts_of(write_records(tmp_path, entry))
    assert len(section.levels(hunt).lines) == len(FEW)


@pytest.mark.parametrize(
    "wrong",
    [
        {"controls": 1}, {"controls": {"reinit": 1}}, {"controls": {"reinit": {"metrics": 1}}}, {"diagnosis": [1]},
        {"connectivity": [1]}, {"connectivity": {"orders": 1}},
    ],
)  # fmt: skip
def test_a_malformed_level_is_named(tmp_path: Path, wrong):
    entry = hunt_record(0, FEW)
    entry["levels"][1].update(wrong)
    with pytest.raises(ValueError, match=r"seed-0.record\.json"):
        read_run(write_records(tmp_path, entry))


def test_diagnoses_that_are_no_numbers_are_dashes(tmp_path):
    entry = hunt_record(0, FEW)
    entry["levels"][1]["diagnosis"] = {"units": 0, "dead": 0, "gradient_flow": "much"}
    entry["levels"][2]["diagnosis"] = {"units": 400, "dead": None, "gradient_flow": float("inf")}
    (hunt,) = hunts_of(write_records(tmp_path, entry))
    told = section.levels(hunt)
    dead, flow = told.headers.index("dead units"), told.headers.index("gradient flow")
    assert [(line.cells[dead].text, line.cells[flow].text) for line in told.lines[1:3]] == [("—", "—"), ("—", "inf")]


def test_every_number_of_a_level_table_is_in_a_record(tmp_path):
    entry = realistic()[3]
    rows = cells(page_of(tmp_path, realistic()), "levels")
    dense = entry["levels"][0]["metrics"]["test/accuracy"]
    for lv, row in zip(entry["levels"], rows, strict=True):
        measured = lv["metrics"]
        change = 100 * (measured["test/accuracy"] - dense)
        assert row == [
            str(lv["level"]),
            percent(1 - (lv["size"]["prunable"] - lv["size"]["kept"]) / lv["size"]["parameters"]),
            percent(lv["density"]),
            f"{lv['size']['kept']:,}",
            f"{100 * measured['val/accuracy']:.2f}%",
            f"{100 * measured['test/accuracy']:.2f}%",
            f"{change:+.2f}".replace("-", "\N{MINUS SIGN}").replace("+0.00", "0.00"),
            f"{lv['seconds']:.1f} s",
            lv["mask_hash"][:8],
        ]
