"""Records of verdicts that lack something, are hostile or broken, and pages of several of them."""

import copy
import re

import pytest

from tests.helpers.lottery_records import (
    DENSITIES,
    FEW,
    grouped,
    hunt_record,
    lottery,
    page_of,
    verdict_record,
    write_records,
)
from tests.workbench.report.test_report import cells, record, terminal
from workbench.records import read_run
from workbench.report.job import report, summary
from workbench.report.sections import verdicts

LEVEL = ("level", "density", "verdict", "why", "means", "matches", "beats", "best_step", "overlap")
WHOLE = ("name", "hunts", "fingerprints", "seeds", "metric", "higher_is_better", "delta", "levels")


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
    (told,) = stage.verdicts
    verdicts.scores(told), verdicts.steps(told)
    assert verdicts.legend(told)
    assert verdicts.caption(stage, told)
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
    for level, key in zip(entry["differences"][0]["levels"], ("level", "density", "paired", "p_holm", "said")):
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
    entry["differences"][0]["levels"][1]["said"] = evil
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
