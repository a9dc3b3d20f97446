"""What distillation bought: a comparison's table, its classes that move, and its sentences. Before any markup."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workbench.records import Comparison, Scored
from workbench.report.cells import Cell, Line, Table, without_empty
from workbench.report.format import DASH, Metric, count

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


def scores(found: Comparison) -> Table:
    """One line per network, the teacher first."""
    columns: list[tuple[str, bool, Callable[[Scored], Cell]]] = [
        ("network", False, lambda s: Cell(s.name, _role(found, s))),
        ("accuracy", True, lambda s: _share(s, "accuracy")),
        ("NLL", True, lambda s: _number(s, "nll")),
        ("Brier", True, lambda s: _number(s, "brier")),
        ("ECE", True, lambda s: _share(s, "ece")),
        ("agreement", True, lambda s: _share(s, "agreement")),
        ("KL", True, lambda s: _number(s, "kl")),
        (f"points vs {found.baseline or 'baseline'}", True, lambda s: _gain(found, s)),
    ]
    networks = [*([found.teacher] if found.teacher else []), *found.students]
    lines = [Line([cell(s) for _, _, cell in columns], s.name, s.name == found.baseline) for s in networks]
    return without_empty(Table([c[0] for c in columns], [c[1] for c in columns], lines))


def moves(found: Comparison) -> list[Move]:
    """The classes that move most, up first: at most `MOST` each way, each by at least `LEAST` samples of a student."""
    others = _others(found)
    made: list[tuple[float, Move]] = []
    for index, name in enumerate(found.classes):
        n = _at(found.counts, index)
        nets = [_net(student, index) for student in others]
        if not n or not nets or max(map(abs, nets)) < LEAST:
            continue
        largest = max(nets, key=abs)
        made.append((largest / n, Move(index, name, n, [net / n for net in nets])))
    made.sort(key=lambda pair: (-pair[0], pair[1].index))
    up, down = ([move for change, move in made if sign * change > 0] for sign in (1, -1))
    return [*up[:MOST], *down[-MOST:]]


def classes(found: Comparison, shown: Sequence[Move]) -> Table:
    """One line per class shown: its samples, and every network's recall."""
    networks = [*([found.teacher] if found.teacher else []), *found.students]
    lines = [
        Line([Cell(move.name), Cell(count(move.n)), *(_recall(found, s, move.index) for s in networks)])
        for move in shown
    ]
    headers = ["class", found.unit, *(s.name for s in networks)]
    return without_empty(Table(headers, [False, *[True] * (len(headers) - 1)], lines))


def names(found: Comparison) -> list[str]:
    """The students that are compared with the baseline, in order."""
    return [student.name for student in _others(found)]


def sentence(stage: str, found: Comparison) -> str:
    """The gains in one line, for a terminal."""
    told = [f"{s.name} {ACCURACY.change(s.gain)}{_range(s, ' (', ')')}" for s in _others(found) if s.gain is not None]
    base = next((s for s in found.students if s.name == found.baseline), None)
    text = f"{stage}: what distillation bought"
    if base is None or not told:
        return f"{text} is not told, it has one student only."
    text += f" over {base.name}, {_accuracy(base)} {found.split} accuracy: {', '.join(told)} points"
    return f"{text}; teacher {_accuracy(found.teacher)}{_sample(found)}." if found.teacher else f"{text}."


def about(found: Comparison) -> str:
    """What the table's columns are, and what its intervals say."""
    text = (
        f"Measured on the {found.split} split{_sample(found)}. NLL (nats), Brier (0 to 2), ECE (15 bins) and KL to the "
        "teacher (nats, temperature 1): lower is better. Agreement: same prediction as the teacher."
    )
    tested = [s for s in found.students if "p" in s.paired]
    if not tested:
        return text
    text += f" Points: with its {_confidence(tested[0])} interval; {found.method or 'paired test'}"
    text += f", p adjusted for {len(tested)} comparisons (Holm)" if len(tested) > 1 else ""
    return f"{text}. Interval and p say what other samples would change, not what another seed would."


def movement(found: Comparison, shown: Sequence[Move]) -> str:
    """What the figure of classes shows."""
    if not shown:
        return f"No class has {LEAST} {found.unit} more or fewer right with any student than with {found.baseline}."
    return (
        f"Recall of a class less that of {found.baseline}: the {len(shown)} classes of {count(found.of)} that move "
        f"most, each by at least {LEAST} {found.unit} of some student."
    )


def _others(found: Comparison) -> list[Scored]:
    return [student for student in found.students if student.name != found.baseline]


def _role(found: Comparison, network: Scored) -> str:
    if network is found.teacher:
        return "" if network.name == "teacher" else "teacher"
    return "baseline" if network.name == found.baseline else ""


def _accuracy(network: Scored | None) -> str:
    return ACCURACY.show(network.scores.get("accuracy") if network else None)


def _sample(found: Comparison) -> str:
    return "" if found.n is None else f" (n = {count(found.n)} {found.unit})"


def _share(network: Scored, score: str) -> Cell:
    value = network.scores.get(score)
    return Cell(ACCURACY.show(value), title="" if value is None else str(value))


def _number(network: Scored, score: str) -> Cell:
    value = network.scores.get(score)
    text = DASH if value is None else f"{value:.3f}" if math.isfinite(value) else str(value)
    return Cell(text, title="" if value is None else str(value))


def _gain(found: Comparison, network: Scored) -> Cell:
    if network.gain is None or network.name == found.baseline or network is found.teacher:
        return Cell(DASH)
    notes = list(filter(None, [_range(network)]))
    p = network.paired.get("p_holm", network.paired.get("p"))
    if p is not None:
        notes.append("p < 0.001" if p < 0.001 else f"p = {p:.2g}")
    return Cell(ACCURACY.change(network.gain), ", ".join(notes), str(network.gain))


def _range(network: Scored, before: str = "", after: str = "") -> str:
    """The interval of a student's gain; empty if there is none."""
    low, high = (network.paired.get(end) for end in ("low", "high"))
    return "" if low is None or high is None else f"{before}{ACCURACY.change(low)} to {ACCURACY.change(high)}{after}"


def _confidence(network: Scored) -> str:
    return f"{100 * network.paired.get('confidence', 0.95):g}%"


def _recall(found: Comparison, network: Scored, index: int) -> Cell:
    value = _at(network.recall, index)
    note = ""
    if network in _others(found):
        note = f"+{count(_at(network.gained, index))} \N{MINUS SIGN}{count(_at(network.lost, index))}"
    return Cell(ACCURACY.show(value), note)


def _net(network: Scored, index: int) -> float:
    """Samples of a class that the network has right beyond the baseline's."""
    return (_at(network.gained, index) or 0) - (_at(network.lost, index) or 0)


def _at(values: Sequence[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None
