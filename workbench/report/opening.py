"""What a report says first, on the page and in the terminal."""

from workbench.report import comparisons, sweeps, tables, tickets
from workbench.report.facts import Facts


def headline(found: Facts) -> str:
    """The run in one sentence; of a run that has no row of its own, what its verdicts say, or its sweeps."""
    if found.rows:
        return tables.headline(found)
    verdicts = [each for stage in found.verdicts for each in stage.verdicts]
    if len(verdicts) == 1:
        return tickets.sentence(verdicts[0])
    return " ".join(judged(found) or swept(found))


def table(found: Facts) -> tables.Table:
    """The table of a terminal: the main one, or the first verdict's or sweep's where that has no row."""
    if found.rows:
        return tables.stages(found, brief=True)
    return tickets.levels(found.verdicts[0].verdicts[0], brief=True) if found.verdicts else sweeps.runs(found.sweeps[0])


def lines(found: Facts) -> list[str]:
    """What stands below it."""
    bought = [comparisons.sentence(stage.name, stage.comparison) for stage in found.aside if stage.comparison]
    more = [*judged(found), *swept(found)] if found.rows else swept(found) if found.verdicts else []
    told = [headline(found), *bought, *more, tables.caveat(found), tables.aside(found), tables.unfinished(found)]
    return [line for line in told if line]


def judged(found: Facts) -> list[str]:
    """A sentence for every group of every verdict, and for every difference of two."""
    told = []
    for stage in found.verdicts:
        whose = {each.name: f"{stage.name}{', ' if each.name else ''}{each.name}" for each in stage.verdicts}
        told += [f"{whose[each.name]}: {tickets.sentence(each)}" for each in stage.verdicts]
        told += [f"{tickets.pair(each)}: {tickets.contrast(each, stage.verdicts[0])}" for each in stage.differences]
    return told


def swept(found: Facts) -> list[str]:
    """A sentence for every sweep."""
    return [f"{stage.name}: {sweeps.sentence(stage)}" for stage in found.sweeps]
