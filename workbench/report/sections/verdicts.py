"""Whether tickets are tickets: a verdict's sentences, tables and curves. Before any markup."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from workbench.records import Against, Difference, Estimate, Gap, Judged, Stage, Verdict
from workbench.report.bands import Band, band, between, number, sample, spread
from workbench.report.cells import Cell, Line, Table, short, without_empty
from workbench.report.format import DASH, Metric, count, metric, percent

TICKET, DENSE, FIRST = "ticket", "dense", "level 0"
_KNOWN = {FIRST: "the dense network", DENSE: "the dense network trained as long"}
_TONES = {arm: tone for tone, arm in enumerate((TICKET, "reinit", "shuffled", "random", "other", DENSE, "twin"))}
_SAID = {"above": "better", "below": "worse"}


def measure(found: Verdict) -> Metric:
    """The metric that was judged, without its split."""
    values = [estimate.mean for level in found.levels for estimate in level.means.values()]
    return metric(found.metric.partition("/")[2] or found.metric, found.mode, values)


def name(stage: Stage, found: Verdict) -> str:
    """What the group is called."""
    return found.name or stage.name


def sentence(found: Verdict) -> str:
    """Which levels are tickets."""
    n = _n(found)
    if not (tickets := _spans(found.levels, TICKET)):
        reasons = _reasons(found, ("no ticket", "inconclusive"))
        return f"No level is judged a ticket ({n}){f': {reasons[0]}' if len(reasons) == 1 else ''}."
    first = next(level for level in found.levels if level.verdict == TICKET)
    dense = _all([_KNOWN.get(arm, arm) for arm in first.matches])
    told = [f"match {dense} within {_margin(found)}"] if first.matches else []
    told += [f"beat {_all(list(first.beats))}"] if first.beats else []
    return f"Tickets at {_all(tickets)}: they {' and '.join(told) or 'are judged so'} ({n})."


def rest(found: Verdict) -> str:
    """Which levels are no tickets, and which may be, and why; empty if there is none, or the sentence has said it."""
    kinds = {level.verdict for level in found.levels} - {DENSE}
    if len(kinds) == 1 and len(_reasons(found, list(kinds))) == 1:
        return ""
    told = []
    for verdict, said in (("no ticket", "Surely none"), ("inconclusive", "Open")):
        if spans := _spans(found.levels, verdict):
            reasons = _reasons(found, (verdict,))
            why = f": {reasons[0]}" if len(reasons) == 1 else ""
            told.append(f"{said} at {_all(spans)}{why}.")
    return " ".join(told)


def levels(found: Verdict, brief: bool = False) -> Table:
    """One line per level, tickets marked.

    Args:
        found: What was judged.
        brief: For a terminal's width: without intervals of differences and overlap.
    """
    measured = measure(found)
    against = list(dict.fromkeys(arm for level in found.levels for arm in (*level.matches, *level.beats)))
    lines = [
        Line(
            [
                Cell(count(level.level)),
                Cell(percent(level.density)),
                _mean(level.means.get(TICKET), measured),
                *(_difference({**level.matches, **level.beats}.get(arm), measured, brief) for arm in against),
                Cell(level.verdict or DASH, title=level.why),
                Cell(DASH) if brief else _overlap(level),
            ],
            marked=level.verdict == TICKET,
        )
        for level in found.levels
    ]
    headers = ["level", "density", f"ticket, {_split(found)}{measured.name}"]
    headers += [*(f"{measured.heading} vs {arm}" for arm in against), "verdict", "mask overlap"]
    return without_empty(Table(headers, [*[True] * (3 + len(against)), False, True], lines))


def legend(found: Verdict) -> str:
    """What the columns of the table are."""
    measured, known = measure(found), {arm for level in found.levels for arm in (*level.matches, *level.beats)}
    text = f"Ticket: mean over seeds and half its interval ({_sample(found)})."
    if known:
        text += (
            f" {measured.heading.capitalize()} vs: ticket less the arm within seeds, with its interval; positive where "
            "the ticket is better."
        )
    said = []
    if any(level.matches for level in found.levels):
        said.append(f"of a dense network, yes: no more than {_margin(found)} below it, no: more")
    if any(level.beats for level in found.levels):
        told = f"yes: above it, adjusted for their number (Holm), no: not above it by {_margin(found)}"
        said.append(f"of a control, {told}")
    if said:
        text += f" Surely (5%, one-sided) {'; '.join(said)}; else open."
    if any(level.overlap is not None for level in found.levels):
        text += " Mask overlap: Jaccard index of two seeds' masks, mean over pairs, and what chance gives."
    return text


def scores(found: Verdict) -> list[Band]:
    """Ticket and every control against density; what is judged a ticket is marked."""
    arms = [TICKET, *dict.fromkeys(arm for level in found.levels for arm in level.means if arm not in (TICKET, FIRST))]
    first = next((level.means.get(TICKET) for level in found.levels if level.level == 0), None)
    made = (
        band(
            arm,
            tone(arm, arms),
            ((lv.density, lv.means.get(arm), arm == TICKET and lv.verdict == TICKET) for lv in found.levels),
            first.mean if first and arm == TICKET else None,
        )
        for arm in arms
    )
    return [each for each in made if each]


def steps(found: Verdict) -> list[Band]:
    """The step at which ticket and controls were best, against density."""
    arms = list(dict.fromkeys(arm for level in found.levels for arm in level.steps))
    made = (band(arm, tone(arm, arms), ((lv.density, lv.steps.get(arm), False) for lv in found.levels)) for arm in arms)
    return [each for each in made if each]


def tone(arm: str, arms: Sequence[str]) -> int:
    """The number of an arm's colour: the same in every figure."""
    return _TONES.get(arm, (len(_TONES) + list(arms).index(arm)) % 8)


def caption(stage: Stage, found: Verdict) -> str:
    """n, the interval's kind, delta, and fingerprints."""
    prints = [*zip(found.hunts, found.fingerprints), (stage.name, stage.fingerprint)]
    listed = ", ".join(f"{hunt} {short(print_)}" for hunt, print_ in prints)
    return f"{_sample(found)}; delta {_margin(found)}. Recipe fingerprints: {listed}."


def gaps(found: Difference, measured: Metric) -> Table:
    """One line per level of the difference of two groups, marked where they differ."""
    lines = [
        Line(
            [
                Cell(count(gap.level)),
                Cell(percent(gap.density)),
                _change(gap.difference, measured),
                Cell(DASH if gap.p is None else _p(gap.p), title="" if gap.p is None else str(gap.p)),
                Cell(_said(gap) or DASH),
            ],
            marked=gap.said in _SAID,
        )
        for gap in found.levels
    ]
    headers = ["level", "density", f"{measured.heading}, {pair(found)}", "p (Holm)", "verdict"]
    return without_empty(Table(headers, [True, True, True, True, False], lines))


def pair(found: Difference) -> str:
    """Which groups are compared."""
    return f"{found.of or 'other hunts'} less {found.less or 'other hunts'}"


def contrast(found: Difference, judged: Verdict) -> str:
    """Where one group's tickets are better or worse than the other's."""
    told = []
    for said in dict.fromkeys(("better", "worse", *map(_said, found.levels))):
        spans = _ranges([(gap.density, _said(gap) == said) for gap in found.levels])
        within = f" within {_margin(judged)}" if said == "equivalent" else ""
        told += [f"{said}{within} at {_all(spans)}"] if spans and said else []
    return f"Tickets within seeds ({number([len(found.seeds)])}): {'; '.join(told) or 'nothing is recorded'}."


def _reasons(found: Verdict, verdicts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(level.why for level in found.levels if level.verdict in verdicts and level.why))


def _said(gap: Gap) -> str:
    return _SAID.get(gap.said, gap.said)


def _spans(levels: Sequence[Judged], verdict: str) -> list[str]:
    return _ranges([(level.density, level.verdict == verdict) for level in levels])


def _ranges(levels: Sequence[tuple[float | None, bool]]) -> list[str]:
    """Neighbouring levels that are chosen: ``34.3% down to 5.5%``, by density."""

    def found() -> Iterator[str]:
        for chosen, group in groupby(levels, key=lambda level: level[1]):
            densities = [percent(density) for density, _ in group]
            if chosen:
                yield densities[0] if len(densities) == 1 else f"{densities[0]} down to {densities[-1]}"

    return list(found())


def _all(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), *words[-1:]])


def _margin(found: Verdict) -> str:
    share = measure(found).share
    text = f"{100 * found.delta if share else found.delta:g}"
    return f"{text} point{'' if text == '1' else 's'}" if share else text


def _split(found: Verdict) -> str:
    split, _, rest_ = found.metric.partition("/")
    return f"{split} " if rest_ else ""


def _n(found: Verdict) -> str:
    return number(_counts(found))


def _sample(found: Verdict) -> str:
    return sample(_counts(found), found.seeds, [e for level in found.levels for e in level.means.values()])


def _counts(found: Verdict) -> list[int | None]:
    return [estimate.n for level in found.levels for estimate in level.means.values()]


def _mean(found: Estimate | None, measured: Metric) -> Cell:
    return Cell(spread(found, measured), title="" if found is None else str(found.mean))


def _change(found: Estimate | None, measured: Metric, said: str = "") -> Cell:
    if found is None:
        return Cell(DASH)
    notes = filter(None, [between(found, measured), said])
    return Cell(measured.change(found.mean), ", ".join(notes), str(found.mean))


def _difference(found: Against | None, measured: Metric, brief: bool) -> Cell:
    if found is None or found.difference is None:
        return Cell(DASH)
    if brief:
        return Cell(measured.change(found.difference.mean))
    return _change(found.difference, measured, {True: "yes", False: "no", None: "open"}[found.holds])


def _overlap(level: Judged) -> Cell:
    if level.overlap is None or level.verdict == DENSE:
        return Cell(DASH)
    return Cell(f"{level.overlap:.3f}", "" if level.chance is None else f"chance {level.chance:.3f}")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"
