"""What a report shows of job ``verdict``: sentences, tables and curves on whether tickets are tickets."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from workbench.records import (
    Against,
    Estimate,
    GroupDifference,
    LevelDifference,
    LevelVerdict,
    Paired,
    Stage,
    Verdict,
    VerdictResult,
)
from workbench.report.bands import Band, band, ends, number, sample, spread
from workbench.report.blocks import Chapter, Figure, Gallery, Grid, Part, Text
from workbench.report.cells import Cell, Line, Table, short, without_empty
from workbench.report.format import DASH, Metric, count, metric, percent
from workbench.report.section import Section, Summary

TICKET, DENSE, FIRST = "ticket", "dense", "level 0"
_KNOWN = {FIRST: "the dense network", DENSE: "the dense network trained as long"}
_TONES = {arm: tone for tone, arm in enumerate((TICKET, "reinit", "shuffled", "random", "other", DENSE, "twin"))}
_WORDS = {"above": "better", "below": "worse"}
_LEADS = {"no ticket": "Surely none", "inconclusive": "Open"}


def verdicts_of(stage: Stage) -> list[Verdict]:
    """The verdicts in the stage's record, one for each group of hunts."""
    return stage.result.verdicts if isinstance(stage.result, VerdictResult) else []


def differences_of(stage: Stage) -> list[GroupDifference]:
    """The differences of groups in the stage's record."""
    return stage.result.differences if isinstance(stage.result, VerdictResult) else []


def headline(stages: Sequence[Stage]) -> str:
    """What the only verdict says, or all of them by name."""
    every = [verdict for stage in stages for verdict in verdicts_of(stage)]
    return sentence(every[0]) if len(every) == 1 else " ".join(sentences(stages))


def sentences(stages: Sequence[Stage]) -> list[str]:
    """A sentence for every group of every verdict, and for every difference of two."""
    texts = []
    for stage in stages:
        verdicts = verdicts_of(stage)
        names = [f"{stage.name}, {verdict.name}" if verdict.name else stage.name for verdict in verdicts]
        texts += [f"{name}: {sentence(verdict)}" for name, verdict in zip(names, verdicts)]
        texts += [f"{pair(each)}: {contrast(each, verdicts[0])}" for each in differences_of(stage)]
    return texts


def chapters(stages: Sequence[Stage], summary: Summary) -> list[Chapter]:
    """One for each verdict, with a part for each group and each difference of two."""
    made: list[Chapter] = []
    drawn = 0
    for stage in stages:
        parts, verdicts = [], verdicts_of(stage)
        curves = [(scores(verdict), steps(verdict)) for verdict in verdicts]
        for place, verdict in enumerate(verdicts):
            blocks: list[Text | Grid | Gallery] = [Text(sentence(verdict))]
            blocks += [Text(text, "quiet")] if (text := rest(verdict)) else []
            if curves[place][0]:
                drawn += 1
                blocks.append(Gallery([_figure(stage, place, curves, f"-{drawn}" if drawn > 1 else "")]))
            blocks += [Grid(levels(verdict), "tickets"), Text(legend(verdict), "small")]
            parts.append(Part(blocks, name(stage, verdict) if len(verdicts) > 1 else ""))
        for each in differences_of(stage):
            table = Grid(differences(each, measure(verdicts[0])), "gaps")
            blocks = [Text(contrast(each, verdicts[0])), table]
            blocks += [Text(text, "small")] if (text := difference_family(each)) else []
            parts.append(Part(blocks, pair(each)))
        title = f"Are they tickets?{f' {stage.name}' if len(stages) > 1 else ''}"
        made.append(Chapter(title, parts))
    return made


def _figure(stage: Stage, place: int, curves: Sequence[tuple[list[Band], list[Band]]], suffix: str) -> Figure:
    """Scores of one group's tickets and controls against density, and beside them how soon they were best.

    All groups are drawn to one scale.
    """
    from workbench.report import figures  # matplotlib takes seconds to import, and a terminal shows no figure

    verdict = verdicts_of(stage)[place]
    own_scores, own_steps = curves[place]
    measured, split = measure(verdict), verdict.metric.partition("/")[0]
    title = f"{split} {measured.name}, {measured.direction}"
    limits = figures.reach([band for each, _ in curves for band in each], [each[0] for each, _ in curves if each])
    images = {f"tickets{suffix}": figures.over_seeds(f"tickets{suffix}", title, own_scores, measured, limits)}
    about = (
        f"Mean {split} {measured.name} over seeds against density, densest left; shaded, its interval; dashed, the "
        "dense level 0; ringed, levels judged tickets."
    )
    if own_steps:
        every = [band for _, each in curves for band in each]
        title, limits = "step of the lowest validation loss, lower learns sooner", figures.reach(every, every)
        images[f"steps{suffix}"] = figures.over_seeds(f"steps{suffix}", title, own_steps, None, limits)
        about += " Second, the early-stopping iteration: the step of the lowest validation loss."
    about += " What lies far off the tickets is cut by the axis."
    return Figure(f"Score against density, {name(stage, verdict)}", about, caption(stage, verdict), images)


def measure(verdict: Verdict) -> Metric:
    """The metric that was judged, without its split."""
    values = [estimate.mean for level in verdict.levels for estimate in level.means.values()]
    return metric(verdict.metric.partition("/")[2] or verdict.metric, verdict.mode, values)


def name(stage: Stage, verdict: Verdict) -> str:
    """What the group is called."""
    return verdict.name or stage.name


def sentence(verdict: Verdict) -> str:
    """Which levels are tickets, and what keeps the first that is not from being one."""
    n, failed = _n(verdict), _first_failed(verdict)
    why = "" if failed is None else _why(failed, verdict)
    if not (tickets := _spans(verdict.levels, TICKET)):
        where = f"at {percent(_shown(failed))} " if failed and not _alike(verdict) else ""
        return f"No level is judged a ticket ({n}){f': {where}{why}' if why else ''}."
    first = next(level for level in verdict.levels if level.verdict == TICKET)
    dense = _all([_KNOWN.get(arm, arm) for arm in first.matches])
    answers = [f"match {dense} within {_margin(verdict)}"] if first.matches else []
    answers += [f"beat {_all(list(first.beats))}"] if first.beats else []
    text = f"Tickets at {_all(tickets)}: they {' and '.join(answers) or 'are judged so'} ({n})."
    if failed is None or not why:
        return text
    return f"{text} {_LEADS[failed.verdict]} at {percent(_shown(failed))}: {why}."


def rest(verdict: Verdict) -> str:
    """Which other levels are no tickets, and which may be, and why; empty if the sentence has all of it."""
    failed = _first_failed(verdict)
    if failed is not None and failed.why and _alike(verdict):
        return ""
    told = failed if failed is not None and failed.why else None
    texts = []
    for kind, lead in _LEADS.items():
        reasons = list(dict.fromkeys(lv.why for lv in verdict.levels if lv.verdict == kind and lv is not told))
        spans = _ranges([(_shown(lv), lv.verdict == kind and lv is not told) for lv in verdict.levels])
        if spans:
            why = f": {reasons[0]}" if len(reasons) == 1 and reasons[0] else ""
            texts.append(f"{lead} at {_all(spans)}{why}.")
    return " ".join(texts)


def family(verdict: Verdict) -> str:
    """What is tested together, and how; empty if that is not recorded."""
    tested = verdict.family
    if tested is None or not tested.levels:
        return ""
    groups = f" in each of {tested.groups} groups" if tested.groups > 1 else ""
    levels = f"{len(tested.levels)} level{'s' if len(tested.levels) > 1 else ''}{groups}"
    how = "Holm over all of them"
    if tested.correction == "sequence":
        how = "tested from dense to sparse until the first that is not shown to be a ticket"
        how += ", Holm over groups" if tested.groups > 1 else ""
    return (
        f"Family: {levels}, {how}; the chance that any is falsely called a ticket is at most {percent(tested.alpha)}."
    )


def levels(verdict: Verdict, brief: bool = False) -> Table:
    """One line per level, tickets marked.

    Args:
        verdict: What was judged.
        brief: For a terminal's width: without intervals of differences and overlap.
    """
    measured = measure(verdict)
    against = list(dict.fromkeys(arm for level in verdict.levels for arm in (*level.matches, *level.beats)))
    lines = [
        Line(
            [
                Cell(count(level.level)),
                Cell(percent(level.model_density)),
                Cell(percent(level.density)),
                _mean(level.means.get(TICKET), measured),
                *(_difference({**level.matches, **level.beats}.get(arm), measured, brief) for arm in against),
                Cell(level.verdict or DASH, title=level.why),
                Cell(DASH) if brief else _overlap(level),
            ],
            marked=level.verdict == TICKET,
        )
        for level in verdict.levels
    ]
    headers = ["level", "model density", "density", f"ticket, {_split(verdict)}{measured.name}"]
    headers += [*(f"{measured.heading} vs {arm}" for arm in against), "verdict", "mask overlap"]
    return without_empty(Table(headers, [*[True] * (4 + len(against)), False, True], lines))


def legend(verdict: Verdict) -> str:
    """What the columns of the table are."""
    measured, known = measure(verdict), {arm for level in verdict.levels for arm in (*level.matches, *level.beats)}
    text = f"Ticket: mean over seeds and half its interval ({_sample(verdict)})."
    if known:
        text += (
            f" {measured.heading.capitalize()} vs: ticket less the arm within seeds, with its interval; positive where "
            "the ticket is better."
        )
    answers = []
    if any(level.matches for level in verdict.levels):
        answers.append(f"of a dense network, yes: no more than {_margin(verdict)} below it, no: more")
    if any(level.beats for level in verdict.levels):
        answers.append("of a control, yes: above it, no: below it")
    if answers:
        text += f" Surely (one-sided) {'; '.join(answers)}; else open."
    text += f" {said}" if (said := family(verdict)) else ""
    if any(level.overlap and level.overlap.jaccard is not None for level in verdict.levels):
        text += " Mask overlap: Jaccard index of two seeds' masks, mean over pairs, and what chance gives."
    return text


def scores(verdict: Verdict) -> list[Band]:
    """Ticket and every control against density; what is judged a ticket is marked."""
    arms = [
        TICKET,
        *dict.fromkeys(arm for level in verdict.levels for arm in level.means if arm not in (TICKET, FIRST)),
    ]
    first = next((level.means.get(TICKET) for level in verdict.levels if level.level == 0), None)
    bands = (
        band(
            arm,
            tone(arm, arms),
            ((lv.density, lv.means.get(arm), arm == TICKET and lv.verdict == TICKET) for lv in verdict.levels),
            first.mean if first and arm == TICKET else None,
        )
        for arm in arms
    )
    return [each for each in bands if each]


def steps(verdict: Verdict) -> list[Band]:
    """The step at which ticket and controls were best, against density."""
    arms = list(dict.fromkeys(arm for level in verdict.levels for arm in level.best_step))
    points = {arm: [(level.density, level.best_step.get(arm), False) for level in verdict.levels] for arm in arms}
    bands = (band(arm, tone(arm, arms), points[arm]) for arm in arms)
    return [each for each in bands if each]


def tone(arm: str, arms: Sequence[str]) -> int:
    """The number of an arm's colour: the same in every figure."""
    return _TONES.get(arm, (len(_TONES) + list(arms).index(arm)) % 8)


def caption(stage: Stage, verdict: Verdict) -> str:
    """n, the interval's kind, delta, and fingerprints."""
    fingerprints = [*zip(verdict.hunts, verdict.fingerprints), (stage.name, stage.fingerprint)]
    listed = ", ".join(f"{hunt} {short(fingerprint)}" for hunt, fingerprint in fingerprints)
    return f"{_sample(verdict)}; delta {_margin(verdict)}. Recipe fingerprints: {listed}."


def differences(difference: GroupDifference, measured: Metric) -> Table:
    """One line per level of the difference of two groups, marked where they differ."""
    lines = [
        Line(
            [
                Cell(count(level.level)),
                Cell(percent(level.model_density)),
                Cell(percent(level.density)),
                _change(level.paired, measured),
                *(
                    Cell(DASH if p is None else _p(p), title="" if p is None else str(p))
                    for p in (level.p_adjusted, level.p_equivalent)
                ),
                Cell(_word(level) or DASH),
            ],
            marked=level.verdict in _WORDS,
        )
        for level in difference.levels
    ]
    headers = ["level", "model density", "density", f"{measured.heading}, {pair(difference)}"]
    headers += ["p", "p, equivalent", "verdict"]
    return without_empty(Table(headers, [True] * 6 + [False], lines))


def difference_family(difference: GroupDifference) -> str:
    """For what p values are adjusted; empty if that is not recorded."""
    if difference.comparisons is None:
        return ""
    asked = f"{difference.comparisons} comparison{'' if difference.comparisons == 1 else 's'} of a level in two groups"
    return (
        f"Family: {asked}, each by two questions, whether they differ and whether they are within delta; p is adjusted "
        "for all of them (Shaffer)."
    )


def pair(difference: GroupDifference) -> str:
    """Which groups are compared."""
    return f"{difference.of or 'other hunts'} less {difference.less or 'other hunts'}"


def contrast(difference: GroupDifference, verdict: Verdict) -> str:
    """Where one group's tickets are better or worse than the other's."""
    texts = []
    for word in dict.fromkeys(("better", "worse", *map(_word, difference.levels))):
        spans = _ranges([(_shown(level), _word(level) == word) for level in difference.levels])
        within = f" within {_margin(verdict)}" if word == "equivalent" else ""
        texts += [f"{word}{within} at {_all(spans)}"] if spans and word else []
    n = number([len(difference.seeds)])
    return f"Tickets within seeds ({n}): {'; '.join(texts) or 'nothing is recorded'}."


def _first_failed(verdict: Verdict) -> LevelVerdict | None:
    return next((level for level in verdict.levels if level.verdict in _LEADS), None)


def _alike(verdict: Verdict) -> bool:
    """Whether one reason, which is not a difference that was measured, holds for every level."""
    failed = [level for level in verdict.levels if level.verdict != DENSE]
    kinds = {(level.verdict, level.why) for level in failed}
    return len(kinds) == 1 and (len(failed) == 1 or not failed[0].decided_by)


def _why(level: LevelVerdict, verdict: Verdict) -> str:
    """What keeps the level from being a ticket, with the differences that decided it."""
    measured, both = measure(verdict), {**level.matches, **level.beats}
    texts = []
    for arm in level.decided_by:
        if arm in both and (paired := both[arm].paired) is not None:
            notes = filter(None, [f"{measured.change(paired.mean)}{measured.unit}", ends(paired.interval, measured)])
            texts.append(f"against {arm} {', '.join(notes)}")
    allowed = [f"delta {_margin(verdict)}"] if any(arm in level.matches for arm in level.decided_by) else []
    return f"{level.why} ({'; '.join([*texts, *allowed])})" if texts else level.why


def _word(level: LevelDifference) -> str:
    return _WORDS.get(level.verdict, level.verdict)


def _shown(level: LevelVerdict | LevelDifference) -> float | None:
    """The density in a sentence: the model's, where it is recorded."""
    return level.density if level.model_density is None else level.model_density


def _spans(levels: Sequence[LevelVerdict], verdict: str) -> list[str]:
    return _ranges([(_shown(level), level.verdict == verdict) for level in levels])


def _ranges(levels: Sequence[tuple[float | None, bool]]) -> list[str]:
    """Neighbouring levels that are chosen: ``34.3% down to 5.5%``, by density."""

    def spans() -> Iterator[str]:
        for chosen, group in groupby(levels, key=lambda level: level[1]):
            densities = [percent(density) for density, _ in group]
            if chosen:
                yield densities[0] if len(densities) == 1 else f"{densities[0]} down to {densities[-1]}"

    return list(spans())


def _all(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), *words[-1:]])


def _margin(verdict: Verdict) -> str:
    return measure(verdict).margin(verdict.delta)


def _split(verdict: Verdict) -> str:
    split, _, rest_ = verdict.metric.partition("/")
    return f"{split} " if rest_ else ""


def _n(verdict: Verdict) -> str:
    return number(_counts(verdict))


def _sample(verdict: Verdict) -> str:
    estimates = [estimate for level in verdict.levels for estimate in level.means.values()]
    return sample(_counts(verdict), [str(seed) for seed in verdict.seeds if seed is not None], estimates)


def _counts(verdict: Verdict) -> list[int | None]:
    return [estimate.n for level in verdict.levels for estimate in level.means.values()]


def _mean(estimate: Estimate | None, measured: Metric) -> Cell:
    return Cell(spread(estimate, measured), title="" if estimate is None else str(estimate.mean))


def _change(paired: Paired | None, measured: Metric, answer: str = "") -> Cell:
    if paired is None:
        return Cell(DASH)
    notes = filter(None, [ends(paired.interval, measured), answer])
    return Cell(measured.change(paired.mean), ", ".join(notes), str(paired.mean))


def _difference(against: Against | None, measured: Metric, brief: bool) -> Cell:
    if against is None or against.paired is None:
        return Cell(DASH)
    if brief:
        return Cell(measured.change(against.paired.mean))
    return _change(against.paired, measured, {True: "yes", False: "no", None: "open"}[against.holds])


def _overlap(level: LevelVerdict) -> Cell:
    overlap = level.overlap
    if overlap is None or overlap.jaccard is None or level.verdict == DENSE:
        return Cell(DASH)
    return Cell(f"{overlap.jaccard:.3f}", "" if overlap.chance is None else f"chance {overlap.chance:.3f}")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


SECTION = Section(
    order=20,
    shows=lambda stage: stage.finished and bool(verdicts_of(stage)),
    over_seeds=True,
    covers=lambda stage: [name for name, _ in stage.parents.values()],
    headline=headline,
    table=lambda stages: levels(verdicts_of(stages[0])[0], brief=True),
    sentences=sentences,
    chapters=chapters,
)
"""What job ``verdict`` brings to a report."""
