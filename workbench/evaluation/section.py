"""What a report shows of job ``compare``: scores, and the classes that move most."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from workbench.records import ClassScores, Comparison, ComparisonResult, Scored, Stage
from workbench.report.bands import ends
from workbench.report.blocks import Chapter, Figure, Gallery, Grid, Part, Text
from workbench.report.cells import Cell, Line, Table, short, without_empty
from workbench.report.format import DASH, Metric, count, metric
from workbench.report.section import Section, Summary

ACCURACY = Metric("accuracy", "max", True)
MOST = 5
"""Classes shown of those that move up, and of those that move down."""
LEAST = 2
"""Samples of a class that a student must have right beyond the baseline's, or less, for it to be shown."""


@dataclass(frozen=True)
class Move:
    """A class in which students differ: ``changes`` is each one's recall less the baseline's, in the table's order."""

    index: int
    name: str
    n: float
    changes: list[float]


def comparison_of(stage: Stage) -> Comparison | None:
    """The comparison in the stage's record."""
    return stage.result.comparison if isinstance(stage.result, ComparisonResult) else None


def chapters(stages: Sequence[Stage], summary: Summary) -> list[Chapter]:
    """One, with a part for each comparison."""
    comparisons = [(stage, comparison) for stage in stages if (comparison := comparison_of(stage)) is not None]
    parts: list[Part] = []
    drawn = 0
    for stage, comparison in comparisons:
        shown = moves(comparison)
        blocks: list[Text | Grid | Gallery] = [Grid(scores(comparison), "scores"), Text(about(comparison), "small")]
        if comparison.per_class.classes and not shown:
            blocks.append(Text(movement(comparison, shown), "small"))
        if shown:
            drawn += 1
            name = f"classes-{drawn}" if drawn > 1 else "classes"
            title = f"Classes that move{f', {stage.name}' if len(comparisons) > 1 else ''}"
            caption = "Recall by class, and samples gained and lost against the baseline"
            figure = Figure(
                title,
                movement(comparison, shown),
                f"n beside each class, no interval. Recipe fingerprints: {stage.name} {short(stage.fingerprint)}.",
                {name: draw_moves(name, "change of recall by class", shown, comparison, summary.colours)},
            )
            blocks.append(Gallery([figure], Grid(classes(comparison, shown), "classes", caption)))
        parts.append(Part(blocks, stage.name if len(comparisons) > 1 else ""))
    return [Chapter("What distillation gained", parts)]


def scores(comparison: Comparison) -> Table:
    """One line per network, the teacher first."""
    main = _main(comparison)
    columns: list[tuple[str, bool, Callable[[Scored], Cell]]] = [
        ("network", False, lambda s: Cell(s.name or "", _role(comparison, s))),
        (main.name, True, lambda s: Cell(main.show(s.score), title="" if s.score is None else str(s.score))),
        ("accuracy", True, lambda s: _share(s, "accuracy")),
        ("NLL", True, lambda s: _number(s, "nll")),
        ("Brier", True, lambda s: _number(s, "brier")),
        ("ECE", True, lambda s: _share(s, "ece")),
        ("agreement", True, lambda s: _share(s, "agreement")),
        ("KL", True, lambda s: _number(s, "kl")),
        (f"points vs {comparison.baseline or 'baseline'}", True, lambda s: _gain(comparison, s)),
    ]
    lines = [
        Line([cell(s) for _, _, cell in columns], s.name or "", s.name == comparison.baseline)
        for s in networks(comparison)
    ]
    return without_empty(Table([c[0] for c in columns], [c[1] for c in columns], lines))


def moves(comparison: Comparison) -> list[Move]:
    """The classes that move most, up first: at most `MOST` each way, each by at least `LEAST` samples of a student."""
    others = names(comparison)
    changes: list[tuple[float, Move]] = []
    for index, name in enumerate(class_names(comparison)):
        n = _at(comparison.per_class.n, index)
        nets = [_net(_by_class(comparison, student), index) for student in others]
        if not n or not nets or max(map(abs, nets)) < LEAST:
            continue
        largest = max(nets, key=abs)
        changes.append((largest / n, Move(index, name, n, [net / n for net in nets])))
    changes.sort(key=lambda pair: (-pair[0], pair[1].index))
    up, down = ([move for change, move in changes if sign * change > 0] for sign in (1, -1))
    return [*up[:MOST], *down[-MOST:]]


def classes(comparison: Comparison, shown: Sequence[Move]) -> Table:
    """One line per class shown: its samples, and every network's recall."""
    every = networks(comparison)
    lines = [
        Line([Cell(move.name), Cell(count(move.n)), *(_recall(comparison, s, move.index) for s in every)])
        for move in shown
    ]
    headers = ["class", comparison.unit, *(s.name or "" for s in every)]
    return without_empty(Table(headers, [False, *[True] * (len(headers) - 1)], lines))


def names(comparison: Comparison) -> list[str]:
    """The students that are compared with the baseline, in order."""
    return [name for name in comparison.students if name != comparison.baseline]


def networks(comparison: Comparison) -> list[Scored]:
    """All, the teacher first, each with its name."""
    students = [replace(scored, name=name) for name, scored in comparison.students.items()]
    if comparison.teacher is None:
        return students
    return [replace(comparison.teacher, name=comparison.teacher.name or "teacher"), *students]


def class_names(comparison: Comparison) -> list[str]:
    """Of the classes listed: the data module's, or their numbers."""
    per_class = comparison.per_class
    return per_class.names or ["" if number is None else str(number) for number in per_class.classes]


def sentence(stage: Stage) -> str:
    """The gains in one line, for a terminal."""
    comparison = comparison_of(stage)
    if comparison is None:
        return ""
    text = f"{stage.name}: what distillation gained"
    students = [(name, comparison.students[name]) for name in names(comparison)]
    gains = [f"{name} {ACCURACY.change(s.gain)}{_range(s, ' (', ')')}" for name, s in students if s.gain is not None]
    baseline = comparison.students.get(comparison.baseline or "")
    if baseline is None or not gains:
        return f"{text} is not known, it has one student only."
    text += f" over {comparison.baseline}, {_accuracy(baseline)} {comparison.split} accuracy: {', '.join(gains)} points"
    teacher = f"; teacher {_accuracy(comparison.teacher)}{_sample(comparison)}" if comparison.teacher else ""
    return f"{text}{teacher}."


def about(comparison: Comparison) -> str:
    """What the table's columns and intervals mean."""
    text = (
        f"Measured on the {comparison.split} split{_sample(comparison)}. NLL (nats), Brier (0 to 2), ECE (15 bins) and "
        "KL to the teacher (nats, temperature 1): lower is better. Agreement: same prediction as the teacher."
    )
    tested = [s.paired for s in comparison.students.values() if s.paired and s.paired.p is not None]
    if not tested:
        return text
    confidence = tested[0].interval.confidence if tested[0].interval else 0.95
    text += f" Points: with its {100 * confidence:g}% interval; {tested[0].method or 'paired test'}"
    text += f", p adjusted for {len(tested)} comparisons (Holm)" if len(tested) > 1 else ""
    return f"{text}. Interval and p cover other samples, not another seed."


def movement(comparison: Comparison, shown: Sequence[Move]) -> str:
    """What the figure of classes shows."""
    unit, baseline, every = comparison.unit, comparison.baseline, count(comparison.per_class.of)
    if not shown:
        return f"No class has {LEAST} {unit} more or fewer right with any student than with {baseline}."
    return (
        f"Recall of a class less that of {baseline}: the {len(shown)} classes of {every} that move "
        f"most, each by at least {LEAST} {unit} of some student."
    )


def draw_moves(name: str, title: str, shown: Sequence[Move], comparison: Comparison, colours: Mapping[str, int]) -> str:
    """Each student's change of recall by class as SVG, one row a class and one marker a student, the baseline at 0."""
    from matplotlib.axes import Axes  # seconds to import, and a terminal shows no figure
    from matplotlib.ticker import MaxNLocator

    from workbench.report.figures import cut, line
    from workbench.report.svg import LIGHT, drawn

    students = names(comparison)
    lane = 0.64 / len(students)
    lines = (len(students) + 2) // 3

    def draw(axes: Axes) -> None:
        for row in range(1, len(shown)):
            axes.axhline(row - 0.5, color=LIGHT["grid"], lw=0.8)
        for place, student in enumerate(students):
            x = [100 * move.changes[place] for move in shown]
            y = [row + lane * (place - (len(students) - 1) / 2) for row in range(len(shown))]
            tone = LIGHT[f"series-{colours[student]}"]
            axes.hlines(y, 0, x, color=tone, lw=1.2, alpha=0.6)
            axes.plot(x, y, **{**line(colours[student]), "ls": ""}, markersize=5.5, label=cut(student))
        axes.axvline(0, color=LIGHT["muted"], lw=1)
        labels = [f"{cut(move.name)}  (n = {move.n:,.0f})" for move in shown]
        axes.set_yticks(range(len(shown)), labels, color=LIGHT["ink"])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel(f"recall less that of {cut(comparison.baseline or '')}, points")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
        axes.grid(visible=False, axis="y")
        axes.set_title(title, pad=8 + 15 * lines)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, frameon=False, fontsize=9)

    height = 1.0 + 0.2 * lines + len(shown) * max(0.26, 0.15 * len(students))
    return drawn(name, title, (5.6, height), draw)


def _main(comparison: Comparison) -> Metric:
    """The task's main metric beside accuracy."""
    name, mode = comparison.monitor or ("", "max")
    return metric(name, mode, [network.score for network in networks(comparison)])


def _role(comparison: Comparison, network: Scored) -> str:
    if network.name in comparison.students:
        return "baseline" if network.name == comparison.baseline else ""
    return "" if network.name == "teacher" else "teacher"


def _accuracy(network: Scored | None) -> str:
    return ACCURACY.show(network.accuracy if network else None)


def _sample(comparison: Comparison) -> str:
    return "" if comparison.n is None else f" (n = {count(comparison.n)} {comparison.unit})"


def _share(network: Scored, score: str) -> Cell:
    value = getattr(network, score)
    return Cell(ACCURACY.show(value), title="" if value is None else str(value))


def _number(network: Scored, score: str) -> Cell:
    value = getattr(network, score)
    text = DASH if value is None else f"{value:.3f}" if math.isfinite(value) else str(value)
    return Cell(text, title="" if value is None else str(value))


def _gain(comparison: Comparison, network: Scored) -> Cell:
    if network.gain is None or network.name not in names(comparison):
        return Cell(DASH)
    notes = list(filter(None, [_range(network)]))
    p = None if network.paired is None else network.paired.p_holm
    if p is None and network.paired is not None:
        p = network.paired.p
    if p is not None:
        notes.append("p < 0.001" if p < 0.001 else f"p = {p:.2g}")
    return Cell(ACCURACY.change(network.gain), ", ".join(notes), str(network.gain))


def _range(network: Scored, before: str = "", after: str = "") -> str:
    """The interval of a student's gain; empty if there is none."""
    text = ends(network.paired.interval if network.paired else None, ACCURACY)
    return f"{before}{text}{after}" if text else ""


def _recall(comparison: Comparison, network: Scored, index: int) -> Cell:
    if network.name not in comparison.students:
        return Cell(ACCURACY.show(_at(comparison.per_class.teacher, index)))
    student = _by_class(comparison, network.name)
    note = ""
    if network.name in names(comparison):
        gained, lost = (count(_at(values, index)) for values in (student.gained, student.lost))
        note = f"+{gained} \N{MINUS SIGN}{lost}"
    return Cell(ACCURACY.show(_at(student.recall, index)), note)


def _by_class(comparison: Comparison, student: str) -> ClassScores:
    return comparison.per_class.students.get(student, ClassScores([], [], []))


def _net(student: ClassScores, index: int) -> float:
    """Samples of a class that the student has right beyond the baseline's."""
    return (_at(student.gained, index) or 0) - (_at(student.lost, index) or 0)


def _at(values: Sequence[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None


SECTION = Section(
    order=10,
    shows=lambda stage: stage.finished and comparison_of(stage) is not None,
    sentences=lambda stages: [sentence(stage) for stage in stages],
    colours=lambda stages: [
        name for stage in stages if (comparison := comparison_of(stage)) for name in names(comparison)
    ],
    chapters=chapters,
)
"""What job ``compare`` brings to a report."""
