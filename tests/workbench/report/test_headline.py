"""What a report says first."""

import re

from tests.helpers.report_records import cells, distilled, gathered, page_of, realistic, record, terminal
from workbench.report import headline, tables
from workbench.report.job import summary


def test_one_seed_is_never_passed_off_as_more(tmp_path):
    records = realistic()[:2]
    assert "comes from one seed (0), so no interval" in headline.caveat(gathered(tmp_path / "a", records))
    records[1]["seed"] = 7
    found = gathered(tmp_path / "b", records)
    assert "one seed per stage (0, 7)" in headline.caveat(found)
    assert tables.sample(found, ["teacher", "student-gelu"]).startswith("n = 1 seed each (0, 7), no interval.")
    del records[1]["seed"]
    assert "(0, not recorded)" in headline.caveat(gathered(tmp_path / "c", records))


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
    assert "Also finished: cache: nothing to tell." in headline.others(gathered(tmp_path / "b", [realistic()[0], bare]))
