"""What a report shows of job ``cache``: how much it left."""

from workbench.records import CacheResult, Stage
from workbench.report.format import count, size
from workbench.report.section import Section


def remark(stage: Stage) -> list[str]:
    """Bytes and samples."""
    if not isinstance(stage.result, CacheResult):
        return []
    result = stage.result
    return [
        "" if result.bytes is None else size(result.bytes),
        "" if result.samples is None else f"{count(result.samples)} samples",
    ]


SECTION = Section(remark=remark)
"""What job ``cache`` brings to a report."""
