"""What a report says first, on the page and in the terminal."""

from collections.abc import Sequence

from workbench.report import cells
from workbench.report.format import count, duration, plural, size, times
from workbench.report.sections import comparisons, stages, sweeps, verdicts
from workbench.report.sections.stages import _known_seeds, _level, _list
from workbench.report.summary import TOLERANCE, Facts, Row, dense_bytes


def headline(found: Facts) -> str:
    """The run in one sentence; of a run that has no row of its own, what its verdicts say, or its sweeps."""
    if found.rows:
        return picked(found)
    every = [each for stage in found.verdicts for each in stage.verdicts]
    if len(every) == 1:
        return verdicts.sentence(every[0])
    return " ".join(judged(found) or swept(found))


def table(found: Facts) -> cells.Table:
    """The table of a terminal: the main one, or the first verdict's or sweep's where that has no row."""
    if found.rows:
        return stages.stages(found, brief=True)
    return (
        verdicts.levels(found.verdicts[0].verdicts[0], brief=True) if found.verdicts else sweeps.runs(found.sweeps[0])
    )


def lines(found: Facts) -> list[str]:
    """What stands below it."""
    bought = [comparisons.sentence(stage.name, stage.comparison) for stage in found.aside if stage.comparison]
    more = [*judged(found), *swept(found)] if found.rows else swept(found) if found.verdicts else []
    told = [headline(found), *bought, *more, caveat(found), aside(found), unfinished(found)]
    return [line for line in told if line]


def judged(found: Facts) -> list[str]:
    """A sentence for every group of every verdict, and for every difference of two."""
    told = []
    for stage in found.verdicts:
        whose = {each.name: f"{stage.name}{', ' if each.name else ''}{each.name}" for each in stage.verdicts}
        told += [f"{whose[each.name]}: {verdicts.sentence(each)}" for each in stage.verdicts]
        told += [f"{verdicts.pair(each)}: {verdicts.contrast(each, stage.verdicts[0])}" for each in stage.differences]
    return told


def swept(found: Facts) -> list[str]:
    """A sentence for every sweep."""
    return [f"{stage.name}: {sweeps.sentence(stage)}" for stage in found.sweeps]


def picked(found: Facts) -> str:
    """The run in one sentence; it picks by validation data and then says what the pick has on test data."""
    reference, pick = found.reference, found.pick
    done = plural(len(found.rows), "stage")
    if reference is None:
        return f"{done} finished; no stage records the size of its weights, so none is named the smallest."
    name, measured = reference.stage.name, reference.metric
    name = f"the dense {name}" if reference.level == 0 else name
    if reference.validation is None:
        return f"{done} finished; {name} records no validation {measured.name}, so no checkpoint is picked."
    margin = f"{measured.tolerance(TOLERANCE)} of {name}'s {measured.show(reference.validation)} "
    margin += f"validation {measured.name}"
    if pick is None:
        return f"No checkpoint of this run is both within {margin} and smaller than {name} in dense fp32."
    dense = dense_bytes(reference) or 0
    kind = [pick.form or "", _level(pick.level)]
    what = pick.row.stage.name + (f" ({', '.join(k for k in kind if k)})" if any(kind) else "")
    text = (
        f"Within {margin}, the smallest checkpoint is {what}: {size(pick.bytes)}, "
        f"{times(dense / pick.bytes)} smaller than {name}'s {size(dense)} in dense fp32"
    )
    if pick.test is None:
        return f"{text}; it records no test {measured.name}."
    whose = "its" if pick.source == pick.row.stage.name else f"{pick.source}, whose predictions it reproduces, has"
    text += f"; {whose} test {measured.name} {'is ' if whose == 'its' else ''}{measured.show(pick.test)}"
    if reference.test is None:
        return f"{text}."
    return f"{text}, {measured.distance(pick.test - reference.test)} {name}'s {measured.show(reference.test)}."


def caveat(found: Facts) -> str:
    """What the headline must not be read as."""
    last = "test figures are those of the last epoch."
    if not found.rows:
        return f"Figures are means over seeds where n says so; {last}"
    elsewhere = ", ".join(stage.name for stage in (*found.verdicts, *found.sweeps))
    seeds = _seeds(found.rows)
    seeds = f"Beside the means over seeds of {elsewhere}, {seeds[0].lower()}{seeds[1:]}" if elsewhere else seeds
    return (
        f"{seeds}, so no interval over seeds can be given and small differences may be noise. "
        f"Picks are made on validation data alone; {last}"
    )


def aside(found: Facts) -> str:
    """Finished stages that are told of nowhere else, and what they left."""
    told = []
    for stage in found.aside:
        if not (stage.comparison or stage.verdicts or stage.runs):
            left = [
                "" if stage.bytes is None else size(stage.bytes),
                "" if stage.samples is None else f"{count(stage.samples)} samples",
                "" if stage.seconds is None else f"took {duration(stage.seconds)}",
            ]
            job = "" if stage.job == stage.name else f" ({stage.job})"
            told.append(f"{stage.name}{job}: {', '.join(filter(None, left)) or 'nothing to tell'}")
    return f"Also finished: {'; '.join(told)}." if told else ""


def unfinished(found: Facts) -> str:
    """Which stages the tables leave out, and why, and which sweeps lack runs; empty if none."""
    told = []
    for said, runs in (("Not finished, and in no figure or table", False), ("Not finished, but for some runs", True)):
        listed = [f"{s.name} ({s.status or 'no status'})" for s in found.unfinished if bool(s.runs) == runs]
        told += [f"{said}: {', '.join(listed)}."] if listed else []
    return " ".join(told)


def _seeds(rows: Sequence[Row]) -> str:
    seeds = _known_seeds(rows)
    if len(seeds) == 1:
        return f"Every figure here comes from one seed ({_list(seeds)})"
    return f"Every figure here comes from one seed per stage ({_list(seeds)})"
