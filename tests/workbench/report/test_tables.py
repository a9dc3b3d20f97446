"""Every number of the main table is a record's."""

from tests.helpers.report_records import DENSE, cached, cells, gathered, page_of, realistic, terminal
from workbench.records import FORMAT
from workbench.report import tables
from workbench.report.format import duration, size
from workbench.report.job import summary


def test_every_number_of_the_main_table_is_in_a_record(tmp_path):
    records = realistic()
    rows = cells(page_of(tmp_path, records), "stages")
    assert [row[0] for row in rows] == [entry["stage"] for entry in records]
    for entry, row in zip(records, rows):
        if entry["job"] == "export":
            smallest = min(entry["exports"], key=lambda e: e["bytes"])
            assert row[4:10] == ["—", "—", "—", "—", f"same as {entry['arguments']['of']}", "—"]
            assert row[10] == f"{size(smallest['bytes'])} {smallest['format']}"
            stored = smallest["bytes"]
        else:
            assert row[4] == f"{entry['size']['parameters']:,}"
            assert row[5] == f"{entry['size']['kept']:,}"
            pruned = entry["size"]["prunable"] - entry["size"]["kept"]
            assert row[6] == f"{100 - 100 * pruned / entry['size']['parameters']:.3g}%"
            assert row[7] == f"{100 * entry['size']['kept'] / entry['size']['prunable']:.3g}%"
            assert row[8] == f"{100 * entry['metrics']['test/accuracy']:.2f}%"
            stored = entry["size"]["checkpoint_bytes"]
            assert row[10] == size(stored)
        assert row[11] == f"{DENSE / stored:.1f}\N{MULTIPLICATION SIGN}"
        assert row[12] == duration(entry["seconds"])
    assert [row[9] for row in rows[:5]] == [
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


def test_the_time_is_that_of_the_stage_and_that_of_its_trainings_is_named(tmp_path):
    entry = {**realistic()[0], "seconds": 24.6, "took": 48.8}
    found = gathered(tmp_path, [entry, {**realistic()[1], "seconds": 24.6, "took": 24.61}])
    cells = [line.cells[12] for line in tables.main(found).lines]
    assert [(cell.text, cell.note) for cell in cells] == [("48.8 s", "training 24.6 s"), ("24.6 s", "")]


def test_missing_keys_are_dashes(tmp_path):
    bare = {"format": FORMAT, "status": "finished"}
    page = page_of(tmp_path, [realistic()[0], bare])
    assert cells(page, "stages")[1] == ["01", *["—"] * 10], "the column that nobody fills is not there"
    assert "01" in terminal(summary(tmp_path / "run"))


def test_several_teachers_are_all_named(tmp_path):
    records = [realistic()[0], {**realistic()[0], "stage": "second"}, realistic()[1]]
    records[2]["parents"] = {f"teacher[{i}]": {"stage": name} for i, name in enumerate(("second", "teacher"))}
    found = gathered(tmp_path, records)
    row = found.rows[2]
    assert (row.parent, row.against) == (("teacher[0]", "second"), "second"), "compared with the first"
    assert (tables.main(found).lines[2].cells[3].text, row.activation) == ("second, teacher", "gelu")
    assert found.reference is not None
    assert found.reference.stage.name in ("second", "teacher")


def test_a_run_of_nothing_but_such_stages_is_still_told(tmp_path):
    page = page_of(tmp_path, [cached()])
    assert cells(page, "stages")[0][:2] == ["store", "cache"]
