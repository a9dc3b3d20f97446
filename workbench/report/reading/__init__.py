"""Records into typed data, by what they are of: `stages` reads those of a run, with what the other files read."""

from workbench.report.reading.comparison import Comparison, Scored
from workbench.report.reading.estimates import Estimate
from workbench.report.reading.levels import Barrier, Level
from workbench.report.reading.stages import Export, Member, Stage, covered, expand, read
from workbench.report.reading.sweep import OverSeeds, Run
from workbench.report.reading.verdict import Against, Difference, Gap, Judged, Verdict

__all__ = [
    "Against",
    "Barrier",
    "Comparison",
    "Difference",
    "Estimate",
    "Export",
    "Gap",
    "Judged",
    "Level",
    "Member",
    "OverSeeds",
    "Run",
    "Scored",
    "Stage",
    "Verdict",
    "covered",
    "expand",
    "read",
]
