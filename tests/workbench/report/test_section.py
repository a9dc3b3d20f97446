"""A job of another package brings its record and its part of the report; nothing here knows it."""

import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.distributions import write_metadata
from tests.helpers.report_records import cells, page_of, realistic, record, terminal, written
from workbench import records
from workbench.records import read_run
from workbench.report.job import report, summary
from workbench.report.section import sections_of

PLUGIN = '''
from dataclasses import dataclass, field

from workbench.records import Size
from workbench.report.blocks import Chapter, Grid, Part, Text
from workbench.report.cells import Cell, Line, Table
from workbench.report.rows import Outcome
from workbench.report.section import Section


@dataclass(frozen=True)
class Scale:
    """One scale.

    Attributes:
        grams: What it shows, in grams.
    """

    grams: float


@dataclass(frozen=True)
class WeighResult:
    """Of job ``weigh``.

    Attributes:
        scales: Name -> scale.
    """

    scales: dict[str, Scale] = field(default_factory=dict)


def weigh(out):
    """Weigh it."""


def chapters(stages, run):
    rows = [Line([Cell(name), Cell(f"{s.grams:g} g")]) for stage in stages for name, s in stage.result.scales.items()]
    table = Table(["scale", "weight"], [False, True], rows)
    return [Chapter("What it weighs", [Part([Text("Weighed <twice>."), Grid(table, "weights")])])]


SECTION = Section(
    order=15,
    outcome=lambda stage: Outcome(stage.metrics, stage.size or Size(), label="weighed"),
    sentences=lambda stages: [f"{stage.name}: weighed {len(stage.result.scales)} times." for stage in stages],
    chapters=chapters,
)
NO_SECTION = 3
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that offers the job, its record and its section."""
    name = "package_that_weighs"
    write_metadata(
        tmp_path / "site",
        name,
        f"[workbench.jobs]\nweigh = {name}:weigh\n[workbench.records]\nweigh = {name}:WeighResult\n"
        f"[workbench.sections]\nweigh = {name}:SECTION\nwrong = {name}:NO_SECTION\nlost = {name}:missing\n",
    )
    (tmp_path / "site" / f"{name}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield name
    sys.modules.pop(name, None)


def weighed(**fields):
    return record("kitchen", "weigh", 100, metrics={"test/accuracy": 0.5}, scales={"old": {"grams": 3}}, **fields)


def test_a_job_of_another_package_is_on_page_and_terminal(tmp_path: Path, package: str) -> None:
    entry = weighed()
    page = page_of(tmp_path, [*realistic()[:2], entry])
    assert "<h2>What it weighs</h2>" in page
    assert page.index("What it weighs") < page.index("<h2>Figures</h2>")
    assert "<p>Weighed &lt;twice&gt;.</p>" in page
    assert cells(page, "weights") == [["old", "3 g"]]
    assert cells(page, "stages")[-1][:2] == ["kitchen", "weigh weighed"]
    assert "kitchen: weighed 1 times." in terminal(summary(tmp_path / "run"))
    assert records.violations(entry | {"ended": entry["started"]}) == []


def test_its_record_is_typed_tolerant_and_described(tmp_path: Path, package: str) -> None:
    entry = weighed()
    entry["scales"] |= {"new": {"grams": "heavy"}, "other": {}}
    (stage,) = read_run(written(tmp_path / "a", [entry]))
    assert {name: scale.grams for name, scale in stage.result.scales.items()} == {"old": 3}, "no weight, no scale"
    assert records.violations(entry) == [
        "record.scales['new'].grams is str, not float",
        "record.scales['other'].grams is missing",
    ]
    with pytest.raises(ValueError, match=r'record.json: "scales" is int; a record holds an object there'):
        report(written(tmp_path / "b", [entry | {"scales": 3}]) / "report")
    schema = records.json_schema("weigh")
    assert schema["properties"]["scales"]["additionalProperties"] == {"$ref": "#/$defs/Scale"}
    assert schema["$defs"]["Scale"]["properties"]["grams"] == {
        "type": "number", "description": "What it shows, in grams.",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("job", "message"), [("wrong", "is int: name a workbench.report.section.Section"), ("lost", "cannot be imported")]
)
def test_a_section_that_is_none_is_named(package: str, job: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"section of job '{job}' \({package}:\w+\) {message}"):
        sections_of([job])


def test_sections_are_loaded_for_the_jobs_of_the_run_only(tmp_path: Path, package: str) -> None:
    page = page_of(tmp_path, realistic()[:1])
    assert package not in sys.modules
    assert "What it weighs" not in html.unescape(re.sub("<[^>]*>", "", page))
