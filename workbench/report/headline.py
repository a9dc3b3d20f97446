"""The headline of a report, on the page and in the terminal."""

from workbench.report import tables
from workbench.report.cells import Table
from workbench.report.format import duration, plural, size, times
from workbench.report.section import Section, Summary
from workbench.report.summary import TOLERANCE


def headline(summary: Summary) -> str:
    """The run in one sentence; of a run that has no row of its own, what its first section with a headline says."""
    if summary.rows:
        return picked(summary)
    _, text = _speaker(summary)
    return text


def table(summary: Summary) -> Table:
    """The table of a terminal: the main one, or where that has no row, that of the section that has the headline."""
    section, _ = _speaker(summary)
    if summary.rows or section is None or section.table is None:
        return tables.main(summary, brief=True)
    return section.table(next(stages for each, stages in summary.sections if each is section))


def lines(summary: Summary) -> list[str]:
    """The text below the headline."""
    speaker = None if summary.rows else _speaker(summary)[0]
    more = [text for each, stages in summary.sections if each is not speaker for text in each.sentences(stages)]
    return [line for line in (headline(summary), *more, caveat(summary), others(summary), unfinished(summary)) if line]


def picked(summary: Summary) -> str:
    """The run in one sentence; it picks by validation data and then says what the pick has on test data."""
    reference, pick = summary.reference, summary.pick
    done = plural(len(summary.rows), "stage")
    if reference is None:
        return f"{done} finished; no stage records the size of its weights, so none is named the smallest."
    name, measured = reference.stage.name, reference.metric
    name = f"the dense {name}" if reference.is_dense else name
    if reference.validation is None:
        return f"{done} finished; {name} records no validation {measured.name}, so no checkpoint is picked."
    margin = f"{measured.tolerance(TOLERANCE)} of {name}'s {measured.show(reference.validation)} "
    margin += f"validation {measured.name}"
    if pick is None:
        return f"No checkpoint of this run is both within {margin} and smaller than {name} in dense fp32."
    dense = reference.dense_bytes or 0
    what = pick.row.stage.name + (f" ({pick.checkpoint.label})" if pick.checkpoint.label else "")
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


def caveat(summary: Summary) -> str:
    """What the headline must not be read as."""
    last = "test figures are those of the last epoch."
    if not summary.rows:
        return f"Figures are means over seeds where n says so; {last}"
    seeds = tables.known_seeds(summary.rows)
    each = "one seed" if len(seeds) == 1 else "one seed per stage"
    text = f"very figure here comes from {each} ({tables.list_seeds(seeds)})"
    elsewhere = [stage.name for section, stages in summary.sections if section.over_seeds for stage in stages]
    text = f"Beside the means over seeds of {', '.join(elsewhere)}, e{text}" if elsewhere else f"E{text}"
    return (
        f"{text}, so no interval over seeds can be given and small differences may be noise. "
        f"Picks are made on validation data alone; {last}"
    )


def others(summary: Summary) -> str:
    """Finished stages that nothing else shows, and what they left."""
    shown = [stage for section, stages in summary.sections if section.chapters for stage in stages]
    remarks = {stage.name: section.remark(stage) for section, stages in summary.sections for stage in stages}
    texts = []
    for stage in summary.others:
        if stage not in shown:
            left = [*remarks.get(stage.name, ()), "" if stage.spent is None else f"took {duration(stage.spent)}"]
            job = "" if stage.job == stage.name else f" ({stage.job})"
            texts.append(f"{stage.name}{job}: {', '.join(filter(None, left)) or 'nothing to tell'}")
    return f"Also finished: {'; '.join(texts)}." if texts else ""


def unfinished(summary: Summary) -> str:
    """Stages that are not finished: those that nothing shows, and those of which a section shows what there is."""
    shown = {stage.name: section.unfinished for section, stages in summary.sections for stage in stages}
    groups: dict[str, list[str]] = {}
    for stage in sorted(summary.unfinished, key=lambda each: each.name in shown):
        heading = shown.get(stage.name) or "Not finished, and in no figure or table"
        groups.setdefault(heading, []).append(f"{stage.name} ({stage.status or 'no status'})")
    return " ".join(f"{heading}: {', '.join(stages)}." for heading, stages in groups.items())


def _speaker(summary: Summary) -> tuple[Section | None, str]:
    """The first section with a headline, and that."""
    for section, stages in summary.sections:
        if text := section.headline(stages):
            return section, text
    return None, ""
