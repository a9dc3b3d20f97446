"""What a job brings to a report: its section, stated beside the job by entry point.

Group ``workbench.sections``, under the job's name, a `Section`. Sections are imported when a report is made, and only
those of jobs that the run has. So a job of another package touches that package only::

    [project.entry-points."workbench.jobs"]
    probe = "mypackage.probe:probe"
    [project.entry-points."workbench.records"]
    probe = "mypackage.probe:ProbeResult"
    [project.entry-points."workbench.sections"]
    probe = "mypackage.probe:SECTION"
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from workbench.records import Stage
from workbench.report.blocks import Chapter, Figure
from workbench.report.cells import Table
from workbench.report.format import Metric
from workbench.report.rows import Outcome, Pick, Row

GROUP = "workbench.sections"
FIGURES = 50
"""Position of the figures of all stages among the sections' chapters."""


@dataclass(frozen=True)
class Section:
    """What a report shows of the stages of one job. Each part is a function of these stages, and may be left out.

    Functions are given typed stages: ``stage.result`` is an object of the dataclass that the job states as its record,
    in which any value may be missing. Their texts are plain; markup in them is escaped.

    Attributes:
        order: Of its chapters and sentences among those of other jobs; the figures of all stages are at 50.
        shows: Whether there is something to show of a stage; others of the job are listed by name. By default, of any
            that is finished.
        unfinished: How stages are listed that are not finished and shown all the same, e.g. "Not finished, but for some
            runs".
        over_seeds: Whether what it shows are means over seeds.
        seeded: Whether the job draws random numbers, so that figures of it depend on a seed.
        outcome: A finished stage -> what its row of the main table says; None for no row. By default the metrics, size
            and history that it recorded, if there are any.
        covers: A stage -> names of other stages that it tells about, and that are not drawn again.
        runs: A stage -> name and fingerprint of what later stages can name as ``STAGE/NAME``.
        headline: The run in one or more sentences, where it has no row; the first section that has one speaks.
        table: What a terminal shows then.
        sentences: For the terminal, below the table: a line each.
        remark: A stage without row and chapter -> what it left, in a few words each.
        colours: Names that its figures draw beside the rows': each has one colour in all figures.
        figures: Among those of all stages.
        chapters: Of the page.
    """

    order: int = 40
    shows: Callable[[Stage], bool] = lambda stage: stage.finished
    unfinished: str = ""
    over_seeds: bool = False
    seeded: bool = True
    outcome: Callable[[Stage], Outcome | None] | None = None
    covers: Callable[[Stage], Collection[str]] = lambda stage: ()
    runs: Callable[[Stage], Mapping[str, str | None]] = lambda stage: {}
    headline: Callable[[Sequence[Stage]], str] = lambda stages: ""
    table: Callable[[Sequence[Stage]], Table] | None = None
    sentences: Callable[[Sequence[Stage]], Sequence[str]] = lambda stages: ()
    remark: Callable[[Stage], Sequence[str]] = lambda stage: ()
    colours: Callable[[Sequence[Stage]], Sequence[str]] = lambda stages: ()
    figures: Callable[[Sequence[Stage], Summary], Sequence[Figure]] = lambda stages, summary: ()
    chapters: Callable[[Sequence[Stage], Summary], Sequence[Chapter]] | None = None


@dataclass(frozen=True)
class Summary:
    """A run as a report shows it.

    Attributes:
        rows: Of the main table.
        others: Finished stages without a row, such as a cache or a comparison.
        unfinished: Stages that are not finished.
        reference: The teacher, or else the first stage with a size; of a hunt its dense level.
        pick: The checkpoint to recommend.
        sections: In the order of the page, each with the stages that it shows.
        covered: Names of stages that another one's section tells about, so that they are not drawn again.
        metrics: Name and mode of a main metric -> how it is shown.
        colours: Name of a stage -> number of its colour and marker, of those that draw a line.
    """

    rows: list[Row]
    others: list[Stage]
    unfinished: list[Stage]
    reference: Row | None
    pick: Pick | None
    sections: list[tuple[Section, list[Stage]]]
    covered: set[str]
    metrics: dict[tuple[str, str], Metric]
    colours: dict[str, int] = field(default_factory=dict)

    def row(self, stage: str) -> Row | None:
        """The row of the stage of this name."""
        return next((row for row in self.rows if row.stage.name == stage), None)

    def stages(self, job: str) -> list[Stage]:
        """The stages of a job that its section shows."""
        return [stage for _, stages in self.sections for stage in stages if stage.job == job]


def sections_of(jobs: Iterable[str | None]) -> dict[str, Section]:
    """The sections of those jobs that state one, by job, in the order of the page.

    Raises:
        ValueError: If one cannot be imported, or is no `Section`.
    """
    wanted, loaded = set(jobs), {}
    for entry in entry_points(group=GROUP):
        if entry.name not in wanted or entry.name in loaded:
            continue
        try:
            section = entry.load()
        except Exception as error:  # an import may raise anything
            raise ValueError(
                f"the report's section of job {entry.name!r} ({entry.value}) cannot be imported: {error}"
            ) from error
        if not isinstance(section, Section):
            raise ValueError(
                f"the report's section of job {entry.name!r} ({entry.value}) is {type(section).__name__}: name a "
                "workbench.report.section.Section in its entry point"
            )
        loaded[entry.name] = section
    return dict(sorted(loaded.items(), key=lambda item: (item[1].order, item[0])))
