"""What the report tells of verdicts: every figure is the record's, and nothing is called a ticket that was not."""

import copy
import html
import re
from pathlib import Path

import pytest

from prune.tickets.sections import verdict as section
from prune.tickets.sections.hunt import Curve, hunts_of, sparsity
from prune.tickets.verdict import verdict as judge
from tests.helpers.lottery_records import (
    DELTA,
    DENSITIES,
    FEW,
    grouped,
    hunt_record,
    lottery,
    page_of,
    text_of,
    verdict_record,
    write_records,
)
from tests.helpers.report_records import MINUS, cells, realistic, record, terminal
from tests.prune.tickets.test_verdict import hunt as on_disk
from workbench import records
from workbench.records import Verdict, read_run
from workbench.report.format import percent
from workbench.report.job import report, summary
from workbench.report.summary import gather


def judged(tmp_path: Path, entry: dict) -> Verdict:
    return section.verdicts_of(read_run(write_records(tmp_path, entry))[0])[0]


def verdict_in(run: Path) -> Verdict:
    return next(verdicts[0] for stage in read_run(run) if (verdicts := section.verdicts_of(stage)))


def drawn_hunts(run: Path) -> list[Curve]:
    found = gather(read_run(run))
    return sparsity(hunts_of(found.stages("hunt"), found), found.covered)


def leveled(*verdicts: str, why="", **change) -> dict:
    """A verdict record of levels that were judged so, densities halving."""
    entry = verdict_record({"": [hunt_record(seed, FEW) for seed in range(3)]})
    found = entry["verdicts"][0]
    template = found["levels"][1]
    found["levels"] = [
        {**template, "level": i, "density": 0.5**i, "verdict": v, "why": why} for i, v in enumerate(verdicts)
    ]
    found.update(change)
    return entry


def points(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", MINUS).replace("+0.00", "0.00").replace(f"{MINUS}0.00", "0.00")


Written = tuple[Path, dict, str]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Written:
    """The run, the verdict's record and the page of one group of hunts."""
    run, entry = lottery(tmp_path_factory.mktemp("alone"))
    return run, entry, page_of(run)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Written:
    """The same of two groups, which are compared."""
    run, entry = grouped(tmp_path_factory.mktemp("two") / "run")
    return run, entry, page_of(run)


# Figures are the record's


def test_every_number_of_a_verdict_is_in_its_record(alone):
    _, entry, page = alone
    (found,) = entry["verdicts"]
    for told, row in zip(found["levels"], cells(page, "tickets"), strict=True):
        mean = told["means"]["ticket"]
        half = (mean["interval"]["high"] - mean["interval"]["low"]) / 2
        assert row[:3] == [
            str(told["level"]),
            percent(told["density"]),
            f"{100 * mean['mean']:.2f}% ± {100 * half:.2f}",
        ]
        for cell, arm in zip(row[3:6], ("level 0", "reinit", "shuffled"), strict=True):
            against = {**told["matches"], **told["beats"]}.get(arm)
            if against is None:
                assert (cell, told["level"]) == ("—", 0)
                continue
            said = {True: "yes", False: "no", None: "open"}[against["holds"]]
            low, high = (points(against["paired"]["interval"][end]) for end in ("low", "high"))
            assert cell == f"{points(against['paired']['mean'])} {low} to {high}, {said}"
        assert row[6] == told["verdict"]
        if told["level"]:
            overlap = told["overlap"]
            assert row[7] == f"{overlap['jaccard']:.3f} chance {overlap['chance']:.3f}"
    headers = re.findall(r"<th[^>]*>([^<]*)</th>", page.partition('class="tickets"')[2].partition("</thead>")[0])
    assert headers[2:6] == ["ticket, test accuracy", "points vs level 0", "points vs reinit", "points vs shuffled"]
    for told in found["levels"]:
        assert f'title="{html.escape(told["why"])}"' in page


def test_curves_are_the_means_of_the_record(tmp_path):
    found = judged(tmp_path, verdict_record({"": [hunt_record(seed, FEW) for seed in range(3)]}))
    bands = {each.name: each for each in section.scores(found)}
    assert list(bands) == ["ticket", "reinit", "shuffled"], "level 0 is a line, and no curve"
    for name, each in bands.items():
        told = [level for level in found.levels if name in level.means]
        assert each.x == [level.density for level in told] == sorted(each.x, reverse=True)
        assert each.y == [level.means[name].mean for level in told]
        assert each.low == [level.means[name].interval.low for level in told]
        assert each.high == [level.means[name].interval.high for level in told]
    assert bands["ticket"].marked == [level.verdict == "ticket" for level in found.levels]
    assert any(bands["ticket"].marked)
    assert not any(bands["reinit"].marked)
    assert bands["ticket"].dense == found.levels[0].means["ticket"].mean
    steps = {each.name: each for each in section.steps(found)}
    assert steps["reinit"].y == [level.best_step["reinit"].mean for level in found.levels[1:]]
    assert steps["ticket"].tone == bands["ticket"].tone != steps["reinit"].tone == bands["reinit"].tone


def test_the_figure_names_n_the_interval_delta_and_fingerprints(alone):
    run, entry, page = alone
    first = text_of(re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S)[0])
    assert "n = 3 seeds (0, 1, 2), 95% t intervals; delta 0.3 points." in first
    for name, fingerprint in zip(entry["verdicts"][0]["hunts"], entry["verdicts"][0]["fingerprints"]):
        assert f"{name} {fingerprint[:8]}" in first
    assert f"tickets {entry['fingerprint'][:8]}" in first
    drawn = sorted(path.name for path in (run / "report/figures").iterdir())
    assert drawn == ["seconds.svg", "steps.svg", "tickets.svg"]
    svg = (run / "report/figures/tickets.svg").read_text(encoding="utf-8")
    assert all(f">{arm}<" in svg for arm in ("ticket", "reinit", "shuffled"))


def test_no_step_is_below_zero(tmp_path):
    entry = verdict_record({"": [hunt_record(seed, FEW) for seed in range(3)]})
    for told in entry["verdicts"][0]["levels"]:
        interval = {"low": -900.0, "high": 1000.0, "confidence": 0.95}
        told["best_step"]["ticket"] = {"n": 3, "mean": 50.0 + 900 * (told["level"] % 2), "interval": interval}
    page_of(write_records(tmp_path, entry))
    assert ">-" not in (tmp_path / "report/figures/steps.svg").read_text(encoding="utf-8")


def test_without_steps_there_is_one_picture(tmp_path):
    entry = verdict_record({"": [hunt_record(seed, FEW) for seed in range(3)]})
    for told in entry["verdicts"][0]["levels"]:
        del told["best_step"]
    page = page_of(write_records(tmp_path, entry))
    assert not (tmp_path / "report/figures/steps.svg").exists()
    assert "early-stopping" not in page


def test_the_job_and_the_page_speak_of_the_same_record(tmp_path):
    hunts = [on_disk(tmp_path / f"seed{seed}", seed) for seed in range(4)]
    found = judge(hunts)
    records.write(tmp_path / "tickets", {**record("tickets", "verdict", 9), **found})
    page = page_of(tmp_path)
    assert [row[6] for row in cells(page, "tickets")] == ["dense", "ticket", "ticket"]
    assert "Tickets at 50% down to 25%: they match the dense network within 0.5 points and beat" in text_of(page)


def test_a_loss_is_judged_in_its_own_unit(tmp_path):
    hunts = [on_disk(tmp_path / f"seed{seed}", seed, "nll", "min") for seed in range(4)]
    records.write(tmp_path / "tickets", {**record("tickets", "verdict", 9), **judge(hunts, delta=0.02)})
    page = page_of(tmp_path)
    assert "match the dense network within 0.02 and beat reinit and shuffled (n = 4 seeds)" in text_of(page)
    assert "test nll, lower is better" in page
    assert cells(page, "tickets")[2][4].startswith("+0.2 "), "positive where the ticket is better"


# Sentences


@pytest.mark.parametrize(
    ("letters", "said", "rest"),
    [
        ("dtttt", "Tickets at 50% down to 6.25%: they match", ""),
        ("dtntt", "Tickets at 50% and 12.5% down to 6.25%: they match", "Surely none at 25%."),
        ("dtnti", "Tickets at 50% and 12.5%: they match", "Surely none at 25%. Open at 6.25%."),
        ("dnnni", "No level is judged a ticket (n = 3 seeds).", "Surely none at 50% down to 12.5%. Open at 6.25%."),
    ],
)
def test_neighbours_are_told_as_one(tmp_path, letters, said, rest):
    words = {"d": "dense", "t": "ticket", "n": "no ticket", "i": "inconclusive"}
    found = judged(tmp_path, leveled(*(words[v] for v in letters)))
    assert section.sentence(found).startswith(said)
    assert section.rest(found) == rest


def test_what_is_open_is_never_passed_off(tmp_path):
    alone = judged(tmp_path / "a", verdict_record({"": [hunt_record(0, FEW)]}))
    assert section.sentence(alone) == ("No level is judged a ticket (n = 1 seed): one seed has no spread: train more.")
    assert section.rest(alone) == "", "nothing is said twice"
    bare = judged(tmp_path / "b", verdict_record({"": [hunt_record(seed, FEW, controls=()) for seed in range(3)]}))
    assert section.sentence(bare).endswith("no control was trained: give the hunt controls.")
    assert not any(section.scores(bare)[0].marked)
    open_ = judged(tmp_path / "c", leveled("dense", "ticket", "inconclusive", why="whether it beats reinit is open"))
    assert section.sentence(open_).endswith(" Open at 25%: whether it beats reinit is open.")
    assert section.rest(open_) == "", "nothing is said twice"


def test_the_dense_network_trained_as_long_is_named(tmp_path):
    entry = leveled("dense", "ticket", delta=0.01)
    told = entry["verdicts"][0]["levels"][1]
    told["matches"]["dense"] = told["matches"]["level 0"]
    del told["beats"]["shuffled"]
    assert section.sentence(judged(tmp_path, entry)) == (
        "Tickets at 50%: they match the dense network and the dense network trained as long within 1 point and beat "
        "reinit (n = 3 seeds)."
    )


def test_a_level_that_is_no_ticket_is_told_with_the_comparison_that_failed_and_by_how_much(tmp_path):
    hunts = [hunt_record(seed, FEW) for seed in range(5)]
    for hunt, lost in zip(hunts, (0.02, 0.021, 0.019, 0.02, 0.021)):
        hunt["levels"][4]["metrics"]["test/accuracy"] -= lost
    found = judged(tmp_path, verdict_record({"": hunts}))
    assert [level.verdict for level in found.levels] == ["dense", "ticket", "ticket", "ticket", "no ticket"]
    told = found.levels[4]
    assert told.decided_by == ["level 0"]
    interval = told.matches["level 0"].paired.interval
    assert section.sentence(found).endswith(
        f" Surely none at {percent(told.density)}: it is more than delta below level 0 (against level 0 "
        f"{points(told.matches['level 0'].paired.mean)} points, {points(interval.low)} to {points(interval.high)}; "
        "delta 0.3 points)."
    )
    assert section.rest(found) == ""


def test_the_family_is_on_the_page(alone, two):
    _, entry, page = alone
    assert (
        "Family: 4 levels, Holm over all of them; the chance that any is falsely called a ticket is at most 5%."
    ) in text_of(page)
    assert entry["verdicts"][0]["family"]["levels"] == [1, 2, 3, 4]
    assert "Family: 5 comparisons of a level in two groups, each by two questions" in text_of(two[2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"correction": "holm", "groups": 2, "levels": [3]}, "Family: 1 level in each of 2 groups, Holm over all of "),
        ({"correction": "sequence", "groups": 2, "levels": [1, 2]},
         "Family: 2 levels in each of 2 groups, tested from dense to sparse until the "
         "first that is not shown to be a ticket, Holm over groups;"),
        ({"levels": []}, ""),
    ],
)  # fmt: skip
def test_every_family_is_told(tmp_path, change, said):
    entry = leveled("dense", "ticket")
    entry["verdicts"][0]["family"] |= change
    assert section.family(judged(tmp_path, entry)).startswith(said)


def test_a_sequence_that_ended_is_told_once(tmp_path):
    entry = leveled("dense", "inconclusive", "inconclusive", why="it is not shown to beat reinit")
    levels = entry["verdicts"][0]["levels"]
    levels[1]["decided_by"], levels[2]["why"] = ["reinit"], "not tested, as the sequence ended at level 1"
    found = judged(tmp_path, entry)
    said = "No level is judged a ticket (n = 3 seeds): at 50% it is not shown to beat reinit (against reinit "
    assert section.sentence(found).startswith(said)
    assert section.rest(found) == "Open at 25%: not tested, as the sequence ended at level 1."


def test_a_run_of_nothing_else_begins_with_the_verdict(alone):
    run, _, page = alone
    said = section.sentence(verdict_in(run))
    assert f'<p class="lead">{said}' in page.replace("\xa0", " ")
    assert "<h2>Stages</h2>" not in page
    shown = " ".join(terminal(summary(run)).split())
    assert said in shown
    assert "hunts: 3 of 3 runs finished." in shown
    assert "one seed" not in shown


def test_beside_other_stages_it_is_one_line_of_the_terminal(tmp_path):
    run, _ = lottery(tmp_path)
    write_records(run, *realistic()[:2])
    said = section.sentence(verdict_in(run))
    shown = " ".join(terminal(summary(run)).split())
    assert f"tickets: {said}" in shown
    assert "Beside the means over seeds of tickets, hunts, every figure here comes from one seed (0)" in shown
    assert "Also finished" not in shown


# Several groups


def test_groups_have_a_figure_each_to_one_scale(two):
    run, _, page = two
    assert re.findall(r"<h3>(labels|taught|taught less labels)</h3>", page)[:3] == [
        "labels",
        "taught",
        "taught less labels",
    ]
    drawn = [(run / f"report/figures/{name}.svg").read_text() for name in ("tickets", "tickets-2")]
    ticks = [re.findall(r">(\d+\.?\d*%)<", svg) for svg in drawn]
    assert ticks[0] == ticks[1] != []
    assert "Figure 2. Score against density, taught" in page


def test_every_number_of_a_difference_is_in_the_record(two):
    run, entry, page = two
    (told,) = entry["differences"]
    for level, row in zip(told["levels"], cells(page, "gaps"), strict=True):
        paired = level["paired"]
        if paired["interval"] is None:
            assert row[2:] == ["0.00", "—", "—", "inconclusive"]
            continue
        low, high = (points(paired["interval"][end]) for end in ("low", "high"))
        assert row[:3] == [str(level["level"]), percent(level["density"]), f"{points(paired['mean'])} {low} to {high}"]
        assert row[3] == ("< 0.001" if level["p_adjusted"] < 0.001 else f"{level['p_adjusted']:.2g}")
        p_equivalent = level["p_equivalent"]
        assert row[4] == ("< 0.001" if p_equivalent < 0.001 else f"{p_equivalent:.2g}")
        assert row[5] == {"above": "better", "below": "worse"}.get(level["verdict"], level["verdict"])
    assert "taught less labels: Tickets within seeds (n = 4 seeds): better at 41% down to" in " ".join(
        terminal(summary(run)).split()
    )


def test_equivalence_is_told_with_its_margin(tmp_path):
    entry = grouped(tmp_path / "a")[1]
    for level, said in zip(entry["differences"][0]["levels"], ("inconclusive", "equivalent", "equivalent", "below")):
        level["verdict"] = said
    stage = read_run(write_records(tmp_path / "b", entry))[0]
    told = section.contrast(section.differences_of(stage)[0], section.verdicts_of(stage)[0])
    assert section.pair(section.differences_of(stage)[0]) == "taught less labels"
    assert "worse at 6.87%" in told
    assert f"equivalent within {100 * DELTA:g} points at 41% down to 16.8%" in told


# What a verdict tells of is not drawn again


def test_hunts_that_a_verdict_tells_of_are_not_drawn_one_by_one(tmp_path):
    hunts = [hunt_record(seed, FEW) for seed in range(3)]
    run = write_records(tmp_path / "a", *hunts)
    assert [curve.stage for curve in drawn_hunts(run)] == ["seed-0", "seed-1", "seed-2"]
    write_records(run, verdict_record({"": hunts}, of=("seed-0", "seed-1")))
    assert [curve.stage for curve in drawn_hunts(run)] == ["seed-2"], "it is of two of them"
    assert len(gather(read_run(run)).stages("hunt")) == 3, "but each has its table"
    write_records(run, {**verdict_record({"": hunts}, of=("seed-0",)), "status": "failed"})
    assert len(drawn_hunts(run)) == 3, "one that is not finished tells of nothing"


# Records that lack something, are hostile or broken


LEVEL = ("level", "density", "verdict", "why", "means", "matches", "beats", "best_step", "overlap", "p", "decided_by")
WHOLE = ("name", "hunts", "fingerprints", "seeds", "metric", "higher_is_better", "delta", "levels", "family")


@pytest.mark.parametrize("key", [*WHOLE, *(f"levels.{key}" for key in LEVEL)])
def test_any_part_of_a_verdict_may_be_missing(tmp_path, key):
    entry = verdict_record({"": [hunt_record(seed, FEW[:3]) for seed in range(2)]})
    (found,) = entry["verdicts"]
    *_, last = key.split(".")
    for place, part in enumerate(found["levels"] if "." in key else [found]):
        part[last] = None
        if place % 2:
            del part[last]
    run = write_records(tmp_path, entry)
    (stage,) = read_run(run)
    (told,) = section.verdicts_of(stage)
    section.scores(told), section.steps(told)
    assert section.legend(told)
    assert section.caption(stage, told)
    assert terminal(summary(run))


def test_a_page_is_drawn_of_whatever_is_left(tmp_path):
    entry = verdict_record(
        {"one": [hunt_record(seed) for seed in range(2)], "two": [hunt_record(seed) for seed in range(2)]}
    )
    first, second = entry["verdicts"]
    for level, key in zip(first["levels"], LEVEL):
        del level[key]
    for key in WHOLE:
        del second[key]
    for level, key in zip(entry["differences"][0]["levels"], ("level", "density", "paired", "p_adjusted", "verdict")):
        del level[key]
    entry["differences"].append({})
    page = page_of(write_records(tmp_path, entry))
    assert len(cells(page, "tickets")) == len(DENSITIES)
    assert "other hunts less other hunts" in page


@pytest.mark.parametrize(
    "wrong",
    [
        {"verdicts": {"a": 1}}, {"verdicts": [1]}, {"verdicts": [{"levels": 1}]}, {"verdicts": [{"levels": [1]}]},
        {"verdicts": [{"levels": [{"means": [1]}]}]}, {"verdicts": [{"levels": [{"means": {"ticket": 1}}]}]},
        {"verdicts": [{"levels": [{"beats": {"reinit": 1}}]}]}, {"verdicts": [{"levels": [{"overlap": 1}]}]},
        {"verdicts": [{"levels": [{"means": {"ticket": {"mean": 1, "interval": [0, 1]}}}]}]},
        {"differences": [{"levels": [{"paired": 1}]}]},
    ],
)  # fmt: skip
def test_a_malformed_verdict_is_named(tmp_path, wrong):
    run = write_records(tmp_path, {**record("tickets", "verdict"), **wrong})
    with pytest.raises(ValueError, match=r"tickets.record\.json.*(object|objects)"):
        report(run / "report")


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    entry = verdict_record({"": [hunt_record(seed, FEW) for seed in range(3)]})
    level = entry["verdicts"][0]["levels"][2]
    level["means"]["ticket"]["mean"], level["density"] = float("nan"), "half"
    level["beats"]["reinit"]["paired"]["mean"] = None
    rows = cells(page_of(write_records(tmp_path, entry)), "tickets")
    assert (rows[2][1], rows[2][2], rows[2][4]) == ("—", "—", "—")


def test_hostile_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&$x_1$ {{ 7*7 }} [red] \x1b[31m\x00\u202e --> \ud800 語"
    entry = grouped(tmp_path / "a")[1]
    for found in entry["verdicts"]:
        found.update(name=evil + found["name"], hunts=[evil], seeds=[evil], metric=f"test/{evil}")
        for level in found["levels"]:
            level.update(why=evil, verdict=evil)
            level["means"][evil] = level["means"]["ticket"]
            level["beats"][evil] = level["matches"].get("level 0", {})
    entry["differences"][0].update(of=evil, less=evil)
    entry["differences"][0]["levels"][1]["verdict"] = evil
    run = write_records(tmp_path / "b", entry)
    page = page_of(run)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7*7 }}" in page
    assert "\x1b" not in terminal(summary(run))


def test_the_page_stands_alone_and_is_the_same_again(tmp_path):
    one, two = (page_of(grouped(tmp_path / side / "run")[0]) for side in "ab")
    assert one == two
    assert not re.search(r"https?:|@import|<script|<link|<iframe|javascript:", one)
    ids = re.findall(r'\sid="([^"]+)"', one)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', one)) <= set(ids)
    assert len(re.findall(r'<svg[^>]*role="img"[^>]*aria-label="[^"]+"', one)) == one.count("<svg")


def test_two_verdicts_share_no_file(tmp_path):
    run, entry = lottery(tmp_path)
    write_records(run, {**copy.deepcopy(entry), "stage": "again", "started": "2027-01-01T00:00:00+00:00"})
    page = page_of(run)
    assert "<h2>Are they tickets? again</h2>" in page
    drawn = {path.name for path in (run / "report/figures").iterdir()}
    assert {"tickets.svg", "tickets-2.svg", "steps.svg", "steps-2.svg"} <= drawn
    assert re.findall(r"<h3>(Figure \d)\.", page) == ["Figure 1", "Figure 2", "Figure 3"]
