"""What a report shows of comparisons."""

import html
import re

import pytest

from tests.helpers.report_records import MINUS, cells, compared, distilled, page_of, realistic, terminal, written
from workbench.evaluation import section
from workbench.records import read_run
from workbench.report.job import report, summary

PARTS = ("split", "baseline", "n", "unit", "teacher", "students", "per_class")


def test_every_number_of_a_comparison_is_in_its_record(tmp_path):
    entry = compared()
    found = entry["comparison"]
    page = page_of(tmp_path, distilled())
    assert page.count("<h2>What distillation gained</h2>") == 1
    rows = cells(page, "scores")
    assert rows[0] == ["teacher", "98.06%", "0.069", "0.031", "1.50%", "—", "—", "—"]
    assert [row[0] for row in rows[1:]] == ["alone baseline", "smoothing", "many/small", "many/tiny"]
    for row, told in zip(rows[1:], found["students"].values(), strict=True):
        shares, numbers = [row[i] for i in (1, 4, 5)], [row[i] for i in (2, 3, 6)]
        assert shares == [f"{100 * told[name]:.2f}%" for name in ("accuracy", "ece", "agreement")]
        assert numbers == [f"{told[name]:.3f}" for name in ("nll", "brier", "kl")]
        if "paired" in told:
            low, high = (f"{100 * told['paired']['interval'][end]:+.2f}".replace("-", MINUS) for end in ("low", "high"))
            gain = f"{100 * told['gain']:+.2f}".replace("-", MINUS).replace("+0.00", "0.00")
            assert row[7] == f"{gain} {low} to {high}, p = {told['paired']['p_holm']:.2g}"
        else:
            assert row[7] == "—"
    assert 'class="marked"' in page, "the baseline's row"
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert "Measured on the test split (n = 360 samples)." in text
    assert (
        "with its 95% interval; exact McNemar test, adjusted Wald interval, p adjusted for 3 comparisons (Holm)" in text
    )
    assert "not another seed" in text


def test_classes_that_move_are_drawn_and_told(tmp_path):
    entry = compared(classes=40)
    found = section.comparison_of(read_run(written(tmp_path / "a", [entry]))[0])
    assert found is not None
    shown = section.moves(found)
    by_class = entry["comparison"]["per_class"]["students"]
    assert len(shown) == 2 * section.MOST
    largest = [max(move.changes, key=abs) for move in shown]
    assert largest == sorted(largest, reverse=True)
    assert largest[section.MOST - 1] > 0 > largest[section.MOST]
    for move in shown:
        nets = [by_class[s]["gained"][move.index] - by_class[s]["lost"][move.index] for s in section.names(found)]
        assert move.changes == [net / 36 for net in nets]
        assert max(map(abs, nets)) >= section.LEAST
    unseen = [c for c in range(40) if c not in {move.index for move in shown}]
    worst = max(abs(by_class[s]["gained"][c] - by_class[s]["lost"][c]) for s in by_class for c in unseen) / 36
    assert worst <= min(map(abs, largest)), "nothing that moves more is left out"

    records = [*distilled()[:-1], entry]
    page = page_of(tmp_path / "b", records)
    rows = cells(page, "classes")
    assert [row[0] for row in rows] == [move.name for move in shown]
    first = shown[0].index
    told = by_class["smoothing"]
    assert rows[0][4] == f"{100 * told['recall'][first]:.2f}% +{told['gained'][first]} {MINUS}{told['lost'][first]}"
    assert (tmp_path / "b/run/report/figures/classes.svg").exists()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S)
    assert f"Recipe fingerprints: bought {entry['fingerprint'][:8]}." in captions[0]
    assert re.findall(r"<h3>(Figure \d\.)", page) == ["Figure 1.", "Figure 2.", "Figure 3."], "numbered throughout"


def test_classes_that_do_not_move_are_not_drawn(tmp_path):
    entry = compared()
    for told in entry["comparison"]["per_class"]["students"].values():
        told["gained"], told["lost"] = [1] * 10, [0] * 10
    page = page_of(tmp_path, [*distilled()[:-1], entry])
    assert "No class has 2 samples more or fewer right with any student than with alone." in page
    assert '<table class="classes">' not in page
    assert not (tmp_path / "run/report/figures/classes.svg").exists()


def test_classes_go_by_their_names(tmp_path):
    entry = compared()
    entry["comparison"]["per_class"]["names"] = [f"<kind {c}>" for c in range(10)]
    page = page_of(tmp_path, [*distilled()[:-1], entry])
    assert re.fullmatch(r"<kind \d>", cells(page, "classes")[0][0])
    assert "<kind" not in page


def test_the_terminal_says_in_one_line_what_distillation_gained(tmp_path):
    run = written(tmp_path / "run", distilled())
    students = {name: s for name, s in compared()["comparison"]["students"].items() if name != "alone"}

    def points(share: float) -> str:
        return f"{100 * share:+.2f}".replace("-", MINUS).replace("+0.00", "0.00")

    ends = {name: s["paired"]["interval"] for name, s in students.items()}
    told = [
        f"{name} {points(s['gain'])} ({points(ends[name]['low'])} to {points(ends[name]['high'])})"
        for name, s in students.items()
    ]
    line = (
        f"bought: what distillation gained over alone, 90.00% test accuracy: {', '.join(told)} points; "
        "teacher 98.06% (n = 360 samples)."
    )
    assert len(told) == 3
    assert line in " ".join(terminal(summary(run)).split())


def test_two_comparisons_have_a_part_each(tmp_path):
    page = page_of(tmp_path, [*distilled(), compared("again", 300, students=("smoothing", "alone"))])
    assert re.findall(r"<h3>(bought|again)</h3>", page) == ["bought", "again"]
    figures_ = sorted(p.name for p in (tmp_path / "run/report/figures").glob("classes*"))
    assert figures_ == ["classes-2.svg", "classes.svg"]
    assert "Figure 2. Classes that move, again" in page


def test_a_comparison_of_one_student_has_no_gain(tmp_path):
    records = [*distilled()[:-1], compared(students=("alone",))]
    page = page_of(tmp_path, records)
    assert cells(page, "scores")[1][:2] == ["alone baseline", "90.00%"]
    assert "points vs alone" not in page
    assert "it has one student only" in terminal(summary(tmp_path / "run"))


def test_scores_that_are_not_numbers_are_shown(tmp_path):
    entry = compared()
    entry["comparison"]["students"]["many/tiny"].update(kl=float("inf"), nll=float("nan"))
    row = cells(page_of(tmp_path, [*distilled()[:-1], entry]), "scores")[-1]
    assert (row[2], row[6]) == ("nan", "inf")


@pytest.mark.parametrize(
    "key", [*PARTS, *(f"per_class.{key}" for key in ("of", "classes", "n", "teacher", "students"))]
)
def test_any_part_of_a_comparison_may_be_missing(tmp_path, key):
    entry = compared()
    *outer, last = key.split(".")
    part = entry["comparison"]
    for name in outer:
        part = part[name]
    del part[last]
    run = written(tmp_path / "run", [realistic()[0], entry])
    assert "What distillation gained" in page_of(tmp_path / "again", [realistic()[0], entry])
    assert "bought" in terminal(summary(run))


@pytest.mark.parametrize("wrong", [[1], {"students": [1]}, {"students": {"a": 1}}, {"per_class": 1}, {"teacher": "a"}])
def test_a_malformed_comparison_is_named(tmp_path, wrong):
    run = written(tmp_path / "run", [realistic()[0], {**compared(), "comparison": wrong}])
    with pytest.raises(ValueError, match=r"01.record\.json"):
        report(run / "report")


def test_a_main_metric_beside_accuracy_has_its_column(tmp_path):
    entry = compared()
    entry["comparison"]["monitor"] = ["mean_iou", "max"]
    entry["comparison"]["teacher"]["score"] = 0.61234
    for place, student in enumerate(entry["comparison"]["students"].values()):
        student["score"] = 0.5 + place / 100
    stages = [entry if each.get("comparison") else each for each in distilled()]
    rows = cells(page_of(tmp_path, stages), "scores")
    assert [row[1] for row in rows] == ["61.23%", "50.00%", "51.00%", "52.00%", "53.00%"]
    assert rows[0][2] == "98.06%"
