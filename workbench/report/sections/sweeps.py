"""What the runs of a sweep came to: its sentence, tables and curves. Before any markup."""

import math
from collections.abc import Callable
from dataclasses import asdict

from workbench.records import Estimate, Run, Stage
from workbench.report.bands import Band, band, sample, spread
from workbench.report.cells import Cell, Line, Table, short, without_empty
from workbench.report.format import DASH, Metric, count, duration, metric, plural

SEEDS = ("seed", "seed_everything")
MOST = 8
"""Settings drawn in one figure; more are left to the table."""
NAMED = 5
"""Failed runs named in a sentence."""
_LONGEST = 160


def sentence(stage: Stage) -> str:
    """How many runs finished, and which failed, why."""
    failed = [run for run in stage.runs if run.status != "finished"]
    text = f"{len(stage.runs) - len(failed)} of {plural(len(stage.runs), 'run')} finished"
    if not failed:
        return f"{text}."
    told = "; ".join(f"{run.name} ({_cut(run.error or run.status)})" for run in failed[:NAMED])
    more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    return f"{text}. Not finished: {told}{more}."


def runs(stage: Stage) -> Table:
    """One line per run, failed ones with the reason."""
    measured = _metrics(stage)
    first = next((measured[run.monitor] for run in stage.runs if run.monitor in measured), None)
    alike = len(measured) <= 1
    keys = dict.fromkeys(key for run in stage.runs for key in run.over)
    columns: list[tuple[str, bool, Callable[[Run], Cell]]] = [
        ("run", False, lambda r: Cell(r.name)),
        *((label, False, lambda r, key=key: Cell(r.over.get(key, DASH))) for key, label in _labels(keys).items()),
        ("status", False, lambda r: Cell(r.status)),
        (f"test {first.name}" if alike and first else "test", True, lambda r: _test(r, measured, alike)),
        ("took", True, lambda r: Cell(duration(r.seconds), title="" if r.seconds is None else f"{r.seconds} s")),
        ("attempts", True, lambda r: Cell(count(r.attempts) if r.attempts else DASH)),
        ("fingerprint", False, lambda r: Cell(short(r.fingerprint), title=r.fingerprint or "")),
        ("why", False, lambda r: Cell(_cut(r.error or "") or DASH, title=r.error or "")),
    ]
    lines = [Line([cell(run) for _, _, cell in columns], marked=run.status != "finished") for run in stage.runs]
    return without_empty(Table([c[0] for c in columns], [c[1] for c in columns], lines))


def means(stage: Stage) -> Table | None:
    """One line per setting, the mean over its seeds; None without seeds, or with a metric of several kinds."""
    measured = _metrics(stage)
    if not stage.over_seeds or len(measured) != 1:
        return None
    shown = next(iter(measured.values()))
    keys = dict.fromkeys(key for row in stage.over_seeds for key in row.over)
    lines = [
        Line(
            [
                *([Cell(row.over.get(key, DASH)) for key in keys] or [Cell("all runs")]),
                Cell(count(row.n)),
                *(Cell(spread(row.metrics.get(f"{split}/{shown.name}"), shown)) for split in ("val", "test")),
            ]
        )
        for row in stage.over_seeds
    ]
    headers = [*(_labels(keys).values() or ["setting"]), "seeds", f"val {shown.name}", f"test {shown.name}"]
    return without_empty(Table(headers, [*[False] * (len(headers) - 3), True, True, True], lines))


def settings(stage: Stage) -> dict[str, list[Run]]:
    """The runs that are hunts whose levels are known, by what they are beside their seed."""
    groups: dict[str, list[Run]] = {}
    keys = dict.fromkeys(key for run in stage.runs for key in run.over if key not in SEEDS)
    labels = _labels(keys)
    for run in stage.runs:
        if run.levels:
            told = ", ".join(f"{labels[key]} {run.over[key]}" for key in keys if key in run.over)
            groups.setdefault(told or stage.name, []).append(run)
    return groups


def curves(stage: Stage) -> tuple[Metric, list[Band]] | None:
    """The mean test metric over seeds against density, one curve a setting; None if there is nothing to draw.

    A level counts where every run of its setting has it.
    """
    groups = settings(stage)
    monitors = {run.monitor for found in groups.values() for run in found}
    if len(monitors) != 1 or len(groups) > MOST:
        return None
    (monitor,) = monitors
    key = f"test/{monitor[0]}"
    values = [level.metrics.get(key) for found in groups.values() for run in found for level in run.levels]
    made = []
    for tone, (name, found) in enumerate(groups.items()):
        points = _points(found, key)
        dense = next((estimate.mean for density, estimate in points if density == 1), None)
        made.append(band(name, tone, ((density, estimate, False) for density, estimate in points), dense))
    bands = [each for each in made if each]
    return (metric(*monitor, values), bands) if bands else None


def caption(stage: Stage) -> str:
    """n, the interval's kind, and fingerprints."""
    groups = settings(stage)
    drawn = [run for found in groups.values() for run in found]
    key = f"test/{drawn[0].monitor[0]}" if drawn else ""
    found = [estimate for runs_ in groups.values() for _, estimate in _points(runs_, key)]
    seeds = {run.over[key] for run in drawn for key in SEEDS if key in run.over}
    listed = ", ".join(f"{run.name} {short(run.fingerprint)}" for run in drawn)
    text = sample([len(runs_) for runs_ in groups.values()], sorted(seeds, key=lambda seed: (len(seed), seed)), found)
    return f"{text}. Recipe fingerprints: {listed}."


def _points(found: list[Run], key: str) -> list[tuple[float, Estimate]]:
    """Density and mean over the runs of every level that all of them have."""
    from workbench.evaluation import statistics

    scores = [
        {round(lv.density, 6): lv.metrics[key] for lv in run.levels if lv.density and key in lv.metrics}
        for run in found
    ]
    shared = [density for density in scores[0] if all(density in each for each in scores)]
    made = []
    for density in shared:
        values = [each[density] for each in scores]
        if all(map(math.isfinite, values)):
            told = asdict(statistics.mean(values))
            ends = told["interval"] or {"low": None, "high": None, "confidence": None}
            made.append((density, Estimate(told["n"], told["mean"], **ends)))
    return made


def _metrics(stage: Stage) -> dict[tuple[str, str], Metric]:
    """One metric per monitor of the runs that measured something."""
    values: dict[tuple[str, str], list[float | None]] = {}
    for run in stage.runs:
        if run.metrics:
            found = [run.metrics.get(f"{split}/{run.monitor[0]}") for split in ("val", "test")]
            values.setdefault(run.monitor, []).extend(found)
    return {monitor: metric(*monitor, found) for monitor, found in values.items()}


def _test(run: Run, measured: dict[tuple[str, str], Metric], alike: bool) -> Cell:
    shown, value = measured.get(run.monitor), run.metrics.get(f"test/{run.monitor[0]}")
    if shown is None or value is None:
        return Cell(DASH)
    return Cell(shown.show(value), "" if alike else shown.name, str(value))


def _labels(keys: dict[str, None]) -> dict[str, str]:
    """Each key by its last part, or in full where two have the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last)}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
