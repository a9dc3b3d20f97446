"""Records, ``record.json``: written by jobs, read back whole or as typed data by what they are of."""

from workbench.records.comparison import Comparison, Scored
from workbench.records.estimates import Estimate
from workbench.records.levels import Barrier, Level
from workbench.records.record import FORMAT, environment, fingerprint, finished, now, read, versions, write
from workbench.records.stages import Export, Member, Stage, covered, expand, read_run
from workbench.records.sweep import OverSeeds, Run
from workbench.records.verdict import Against, Difference, Gap, Judged, Verdict

__all__ = [
    "FORMAT",
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
    "environment",
    "expand",
    "fingerprint",
    "finished",
    "now",
    "read",
    "read_run",
    "versions",
    "write",
]
