"""Records, ``record.json``: one dataclass for what each job records, used by who writes and by who reads.

`record` writes and reads whole records, `codec` turns dataclasses into JSON and back, `schemas` finds the dataclass of
a job and describes it as JSON Schema, `stages` reads the records of a run.
"""

from workbench.records.codec import encode
from workbench.records.comparison import ClassScores, Comparison, ComparisonResult, PerClass, Scored
from workbench.records.estimates import AccuracyDifference, Equivalence, Estimate, Interval, Paired
from workbench.records.export import Export, ExportResult
from workbench.records.hunt import (
    Barrier,
    Best,
    Connectivity,
    Diagnosis,
    HuntResult,
    Level,
    Training,
    TransferResult,
)
from workbench.records.network import (
    CacheResult,
    CacheSplit,
    FitResult,
    Network,
    ReportResult,
    ShrinkResult,
    Size,
)
from workbench.records.record import FORMAT, environment, fingerprint, finished, now, read, versions, write
from workbench.records.schemas import jobs, json_schema, violations
from workbench.records.stages import Stage, expand, read_run, read_stage
from workbench.records.sweep import SEEDS, OverSeeds, Run, SweepResult
from workbench.records.verdict import (
    Against,
    Family,
    GroupDifference,
    LevelDifference,
    LevelVerdict,
    Overlap,
    Verdict,
    VerdictResult,
)

__all__ = [
    "FORMAT",
    "SEEDS",
    "AccuracyDifference",
    "Against",
    "Barrier",
    "Best",
    "CacheResult",
    "CacheSplit",
    "ClassScores",
    "Comparison",
    "ComparisonResult",
    "Connectivity",
    "Diagnosis",
    "Equivalence",
    "Estimate",
    "Export",
    "ExportResult",
    "Family",
    "FitResult",
    "GroupDifference",
    "HuntResult",
    "Interval",
    "Level",
    "LevelDifference",
    "LevelVerdict",
    "Network",
    "OverSeeds",
    "Overlap",
    "Paired",
    "PerClass",
    "ReportResult",
    "Run",
    "Scored",
    "ShrinkResult",
    "Size",
    "Stage",
    "SweepResult",
    "Training",
    "TransferResult",
    "Verdict",
    "VerdictResult",
    "encode",
    "environment",
    "expand",
    "fingerprint",
    "finished",
    "jobs",
    "json_schema",
    "now",
    "read",
    "read_run",
    "read_stage",
    "versions",
    "violations",
    "write",
]
