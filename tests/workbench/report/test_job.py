"""What the job writes, and what it refuses."""

import json
import xml.etree.ElementTree as ET

import pytest

from tests.helpers.report_records import page_of, realistic, record, written
from workbench.report.job import report, summary


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


def test_own_record_is_ignored(tmp_path):
    run = written(tmp_path / "run", realistic()[:1])
    (run / "report").mkdir()
    (run / "report/record.json").write_text(json.dumps(record("report", "report", 99, status="running")))
    report(run / "report")
    assert "Not finished" not in (run / "report/index.html").read_text(encoding="utf-8")


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
