"""What the report tells of sweeps: every run, failed ones with the reason, hunts as means over seeds."""

import json
import re
from pathlib import Path

import pytest
from scipy import stats

from tests.helpers.lottery_records import (
    FEW,
    hunt_record,
    page_of,
    sweep_record,
    text_of,
    verdict_record,
    write_records,
)
from tests.helpers.report_records import cells, realistic, record, terminal
from workbench.launcher.sweep import section
from workbench.records import FORMAT, read_run
from workbench.report.format import duration
from workbench.report.job import report, summary
from workbench.report.summary import stale

ERROR = "ArithmeticError: the loss is nan at step 120: lower the learning rate"


def grid() -> tuple[dict, dict]:
    """A sweep of hunts over two activations and four seeds, of which one failed; and its runs' records."""
    hunts = [
        {**hunt_record(seed, FEW, lift=0.001 * (activation == "gelu")), "stage": f"activation-{activation}_seed-{seed}"}
        for activation in ("relu", "gelu")
        for seed in (0, 1, 2, 10)
    ]
    for hunt in hunts:
        hunt["fingerprint"] = hunt["stage"][-1::-1] + "0" * 40
    entry = sweep_record(hunts, "grid", lambda h: {"model.init_args.activation": h["stage"][11:15], "seed": h["seed"]})
    failed = entry["runs"][2]
    failed.update(status="failed", error=ERROR, attempts=2)
    for key in ("metrics", "monitor", "seconds"):
        del failed[key]
    return entry, {"grid": hunts}


def laid_out(run: Path, change=lambda entry, runs: None) -> Path:
    entry, runs = grid()
    change(entry, runs)
    return write_records(run, entry, runs=runs)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict, str]:
    """A run whose sweep failed, its record, and the page."""
    run = laid_out(tmp_path_factory.mktemp("grid") / "run", lambda entry, _: entry.update(status="failed"))
    return run, json.loads((run / "grid/record.json").read_text()), page_of(run)


def test_every_run_is_told_and_failed_ones_say_why(written):
    _, entry, page = written
    for told, row in zip(entry["runs"], cells(page, "runs"), strict=True):
        activation, seed = told["over"].values()
        assert row[:4] == [told["name"], activation, str(seed), told["status"]]
        if told["status"] == "failed":
            assert row[4:] == ["—", "—", "2", told["fingerprint"][:8], ERROR]
        else:
            test = f"{100 * told['metrics']['test/accuracy']:.2f}%"
            assert row[4:] == [test, duration(told["seconds"]), "1", told["fingerprint"][:8], "—"]
    said = text_of(page)
    assert f"7 of 8 runs finished. Not finished: activation-relu_seed-2 ({ERROR})." in said
    assert "Not finished, but for some runs: grid (failed)." in said


def test_means_over_seeds_are_the_records(written):
    _, entry, page = written
    for told, row in zip(entry["summary"], cells(page, "means"), strict=True):
        mean = told["metrics"]["test/accuracy"]
        half = (mean["interval"]["high"] - mean["interval"]["low"]) / 2
        assert row[:2] == [told["over"]["model.init_args.activation"], str(told["n"])]
        assert row[3] == f"{100 * mean['mean']:.2f}% ± {100 * half:.2f}"


def test_hunts_are_drawn_as_means_over_their_seeds(written):
    """Oracle: mean and t interval by hand, of the test accuracies that the hunts' own records have."""
    run, entry, page = written
    (stage,) = read_run(run)
    told = section.curves(stage, section.levels_of(stage))
    assert told is not None
    measured, bands = told
    assert (measured.name, measured.share) == ("accuracy", True)
    assert [band.name for band in bands] == ["activation relu", "activation gelu"]
    for band in bands:
        own = [r["name"] for r in entry["runs"] if r["name"][11:15] == band.name[-4:] and r["status"] == "finished"]
        levels = [json.loads((run / "grid" / name / "record.json").read_text())["levels"] for name in own]
        assert band.x == [round(level["density"], 6) for level in levels[0]]
        for place, (mean, low, high) in enumerate(zip(band.y, band.low, band.high)):
            values = [each[place]["metrics"]["test/accuracy"] for each in levels]
            assert mean == pytest.approx(sum(values) / len(values))
            ends = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
            assert (low, high) == pytest.approx(ends)
        assert band.dense == band.y[0]
    caption = text_of(re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S)[0])
    assert "n = 3 to 4 seeds (0, 1, 2, 10), 95% t intervals." in caption
    assert "activation-relu_seed-2" not in caption
    assert f"activation-gelu_seed-1 {entry['runs'][5]['fingerprint'][:8]}" in caption
    svg = (run / "report/figures/sweep.svg").read_text()
    assert [svg.count(f">{band.name}<") for band in bands] == [1, 1], "two curves, not eight"


def test_only_levels_that_all_have_are_averaged(tmp_path):
    def shorten(_, runs):
        runs["grid"][0]["levels"] = runs["grid"][0]["levels"][:2]
        runs["grid"][1]["levels"][1]["metrics"]["test/accuracy"] = float("nan")

    (stage,) = read_run(laid_out(tmp_path, shorten))
    relu, gelu = section.curves(stage, section.levels_of(stage))[1]
    assert relu.x == [1.0]
    assert len(gelu.x) == len(FEW)


def test_a_run_that_was_made_anew_since_is_not_drawn(tmp_path):
    (stage,) = read_run(laid_out(tmp_path, lambda _, runs: runs["grid"][0].update(fingerprint="other")))
    levels = section.levels_of(stage)
    assert [len(levels.get(run.name, ())) for run in section.runs_of(stage)[:2]] == [0, len(FEW)]


@pytest.mark.parametrize("folder", ["../grid", "..", "/etc", "a/b", "", None, 3])
def test_only_folders_of_the_sweep_are_read(tmp_path, folder):
    run = laid_out(tmp_path, lambda entry, _: entry["runs"][0].update(folder=folder))
    (stage,) = read_run(run)
    assert section.runs_of(stage)[0].name not in section.levels_of(stage)


def test_a_malformed_run_is_named(tmp_path):
    run = laid_out(tmp_path)
    (run / "grid/activation-gelu_seed-1/record.json").write_text('{"format": 2, "job": "hunt", "levels": 3}')
    fingerprint = read_fingerprint(run)
    (run / "grid/activation-gelu_seed-1/record.json").write_text(
        json.dumps({"format": FORMAT, "job": "hunt", "levels": 3, "fingerprint": fingerprint})
    )
    with pytest.raises(ValueError, match=r"activation-gelu_seed-1.record\.json.*levels"):
        report(run / "report")


def read_fingerprint(run: Path) -> str:
    entry = json.loads((run / "grid/record.json").read_text())
    return next(each["fingerprint"] for each in entry["runs"] if each["name"] == "activation-gelu_seed-1")


def test_a_sweep_that_a_verdict_tells_of_is_not_drawn_again(tmp_path):
    hunts = [hunt_record(seed, FEW[:2]) for seed in range(2)]
    run = write_records(tmp_path, sweep_record(hunts), verdict_record({"": hunts}), runs={"hunts": hunts})
    damaged = {"format": FORMAT, "job": "hunt", "levels": 3, "fingerprint": hunts[0]["fingerprint"]}
    (run / "hunts" / hunts[0]["stage"] / "record.json").write_text(json.dumps(damaged))
    page_of(run)  # nor read
    assert not (run / "report/figures/sweep.svg").exists()
    assert (run / "report/figures/tickets.svg").exists()


def test_many_settings_are_left_to_the_table(tmp_path):
    hunts = [{**hunt_record(seed, FEW[:2]), "stage": f"rate-{seed}"} for seed in range(25)]
    entry = sweep_record(hunts, "rates", lambda hunt: {"rate": 0.1 + hunt["seed"] / 100})
    assert entry["summary"] == []
    run = write_records(tmp_path, entry, runs={"rates": hunts})
    page = page_of(run)
    assert not (run / "report/figures/sweep.svg").exists()
    assert "<summary>All 25 runs</summary>" in page
    assert '<table class="means">' not in page
    few = {"rates": hunts[: section.MOST]}
    (stage,) = read_run(
        write_records(tmp_path / "few", sweep_record(few["rates"], "rates", lambda h: {"rate": h["seed"]}), runs=few)
    )
    _, bands = section.curves(stage, section.levels_of(stage))
    assert [band.name for band in bands] == [f"rate {seed}" for seed in range(section.MOST)]
    assert section.caption(stage, section.levels_of(stage)).startswith("n = 1 seed, no interval.")


def test_runs_of_other_jobs_have_a_table_and_no_figure(tmp_path):
    fits = [{**realistic()[0], "stage": f"seed-{seed}", "seed": seed} for seed in range(3)]
    fits[1]["monitor"] = ["loss", "min"]
    entry = sweep_record(fits, "fits", lambda fit: {"seed_everything": fit["seed"], "a.size": 1, "b.size": {"c": None}})
    run = write_records(tmp_path, realistic()[0], entry, runs={"fits": fits})
    page = page_of(run)
    rows = cells(page, "runs")
    assert rows[0][:4] == ["seed-0", "0", "1", "{c: null}"]
    assert [row[5] for row in rows] == ["98.06% accuracy", "0.0194 loss", "98.06% accuracy"]
    headers = re.findall(r"<th[^>]*>([^<]*)</th>", page.partition('class="runs"')[2].partition("</thead>")[0])
    assert headers[:4] == ["run", "seed_everything", "a.size", "b.size"], "in full where the last part is no name"
    assert not (run / "report/figures/sweep.svg").exists()
    assert [row[0] for row in cells(page, "stages")] == ["teacher"]
    shown = " ".join(terminal(summary(run)).split())
    assert "fits: 3 of 3 runs finished." in shown
    assert "Beside the means over seeds of fits, every figure here comes from one seed (0)" in shown


def test_a_run_that_was_finished_before_took_no_attempt(tmp_path):
    run = laid_out(tmp_path, lambda entry, _: [each.update(attempts=0) for each in entry["runs"]])
    (stage,) = read_run(run)
    assert "attempts" not in section.runs(stage).headers


def test_only_some_failures_are_named_in_the_sentence(tmp_path):
    def fail(entry, _):
        for each in entry["runs"]:
            each.update(status="failed", error="x" * 1000)

    (stage,) = read_run(laid_out(tmp_path, fail))
    said = section.sentence(stage)
    assert said.startswith("0 of 8 runs finished. Not finished: activation-relu_seed-0 (xxx")
    assert said.endswith("; and 3 more.")
    assert len(said) < 1200


def test_a_stage_of_an_earlier_run_is_stale(tmp_path):
    export = record("shipped", "export", 900, [("of", "grid/activation-gelu_seed-1")])
    run = laid_out(tmp_path)
    export["parents"]["of"]["fingerprint"] = read_fingerprint(run)
    assert stale(read_run(write_records(run, export))) == []
    export["parents"]["of"]["fingerprint"] = "0" * 64
    assert stale(read_run(write_records(run, export))) == [("shipped", "grid/activation-gelu_seed-1")]
    names = [stage.name for stage in read_run(run)]
    assert names.index("shipped") > names.index("grid")


@pytest.mark.parametrize("key", sorted([*grid()[0]["runs"][0], "error"]))
def test_any_part_of_a_run_may_be_missing(tmp_path, key):
    def lose(entry, _):
        for place, each in enumerate(entry["runs"]):
            each[key] = None
            if place % 2:
                del each[key]

    run = laid_out(tmp_path, lose)
    (stage,) = read_run(run)
    assert len(section.runs(stage).lines) == 8
    assert section.curves(stage, section.levels_of(stage)) is None or section.caption(stage, section.levels_of(stage))
    assert terminal(summary(run))


@pytest.mark.parametrize("key", ["over", "n", "metrics"])
def test_any_part_of_a_mean_may_be_missing(tmp_path, key):
    (stage,) = read_run(laid_out(tmp_path, lambda entry, _: [each.pop(key) for each in entry["summary"]]))
    assert section.means(stage) is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"runs": 1}, {"runs": [1]}, {"runs": [{"over": 1}]}, {"runs": [{"metrics": [1]}]},
        {"runs": [{"monitor": "accuracy"}]}, {"summary": {"a": 1}}, {"summary": [{"metrics": {"test/loss": 1}}]},
    ],
)  # fmt: skip
def test_a_malformed_sweep_is_named(tmp_path, wrong):
    run = write_records(tmp_path, {**grid()[0], **wrong})
    with pytest.raises(ValueError, match=r"grid.record\.json"):
        report(run / "report")


def test_hostile_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&$x_1$ {{ 7*7 }} [red] \x1b[31m\x00\u202e --> \ud800 語"

    def spoil(entry, _):
        for place, each in enumerate(entry["runs"]):
            each.update(name=f"{evil}{place}", error=evil, over={evil: evil, "seed": place})
        entry["runs"][0]["status"] = evil
        entry["summary"][0]["over"] = {evil: evil}

    run = laid_out(tmp_path, spoil)
    page = page_of(run)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in terminal(summary(run))
