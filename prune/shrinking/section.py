"""What a report shows of job ``shrink``: a row like any other's, whose figures depend on no seed."""

from workbench.report.section import Section

SECTION = Section(seeded=False)
"""What job ``shrink`` brings to a report."""
