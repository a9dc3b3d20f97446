"""The page as a whole."""

import html
import re
import xml.etree.ElementTree as ET

import pytest

from tests.helpers.report_records import cells, distilled, page_of, realistic, record, terminal
from workbench.report.job import summary


def test_same_records_give_the_same_bytes(tmp_path):
    first = page_of(tmp_path / "a", realistic())
    assert first == page_of(tmp_path / "b", list(reversed(realistic()))), "the order of folders is no matter"
    drawn = [sorted((tmp_path / side / "run/report/figures").iterdir()) for side in "ab"]
    assert [p.name for p in drawn[0]] == ["bytes.svg", "density.svg", "learning.svg", "seconds.svg"]
    assert [p.read_bytes() for p in drawn[0]] == [p.read_bytes() for p in drawn[1]]
    assert not list((tmp_path / "a/run/report").rglob("*.tmp")), "nothing temporary stays"


def test_comparisons_and_families_give_the_same_bytes_too(tmp_path):
    first = page_of(tmp_path / "a", distilled())
    assert first == page_of(tmp_path / "b", list(reversed(distilled())))
    assert not re.search(r"https?:|@import|<script|<link|<iframe|javascript:", first)
    ids = re.findall(r'\sid="([^"]+)"', first)
    assert len(ids) == len(set(ids))


def test_page_refers_to_nothing_outside_itself(tmp_path):
    page = page_of(tmp_path, realistic())
    named = re.sub(r"aria-label=|data-label=", "", page)
    assert not re.search(r"""\s(?:src|href|action|data|srcset|poster)\s*=\s*(?!["']?#)""", named)
    assert not re.search(r"""url\(\s*["']?(?!#)""", page)
    assert not re.search(r"https?:|@import|<script|<link|<iframe|javascript:", page)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "inlined figures share no identifier"
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_hostile_text_is_escaped_everywhere(tmp_path):
    evil = "<script>alert(1)</script>\"'&$x_1$ {{ 7*7 }} [red] \x1b[31m\x00\u202e --> \ud800 語"
    records = realistic()
    for entry in (records[0], records[3]):
        entry["parents"] = {evil: {"stage": evil, "fingerprint": evil}}
        entry["arguments"] = {"activation": evil, evil: [evil]}
        entry["versions"] = entry["environment"] = {evil: evil}
        entry.update(job=evil, fingerprint=evil)
        entry["levels"] = [{**lv, "mask_hash": evil} for lv in entry.get("levels", [])]
    records[0]["stage"], records[3]["stage"] = evil, evil + "2"
    records.append({**record(evil + "3"), "status": evil})
    page = page_of(tmp_path, records, title=evil.replace("\x00", "").replace("\ud800", ""))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7*7 }}" in page, "text is never a template"
    assert "$x_1$" in page, "nor mathematics"
    for path in (tmp_path / "run/report/figures").iterdir():
        ET.parse(path)
    shown = terminal(summary(tmp_path / "run"))
    assert "\x1b" not in shown
    assert "[red]" in re.sub(r"\s", "", shown)


def test_each_figure_names_n_interval_and_fingerprints(tmp_path):
    records = realistic()
    page = page_of(tmp_path, records)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S)
    assert len(captions) == 3
    for caption in captions:
        assert "n = 1 seed (0), no interval." in caption
        assert f"ticket-gelu {records[3]['fingerprint'][:8]}" in caption
    assert all(entry["fingerprint"] in page for entry in records), "whole in the provenance"


def test_provenance_can_be_run_again(tmp_path):
    page = html.unescape(page_of(tmp_path, realistic()))
    assert "lightning run recipe.yaml --out run" in page
    assert "student-gelu:\n  job: distill\n  teacher: teacher\n" in page
    assert "torch</small> 2.12.0" in page
    assert page.count("every stage") == 2, "shared versions and machines are told once"
    records = realistic()[:3]
    records[0]["versions"] = {"torch": "2.11.0"}
    del records[2]["versions"]
    other = page_of(tmp_path / "b", records)
    assert re.findall("<dt>(.*?)</dt>", other) == ["teacher", "student-gelu", "every stage"]


def test_metrics_of_two_kinds_get_a_figure_each(tmp_path):
    records = realistic()[:2]
    records[1].update(monitor=["loss", "min"])
    page = page_of(tmp_path, records)
    assert (tmp_path / "run/report/figures/learning-2.svg").exists()
    assert "validation loss, lower is better" in page
    assert cells(page, "stages")[1][8:10] == ["0.0222 loss", "419.1 kB"], "no change between two metrics"


@pytest.mark.parametrize("key", sorted({*record(""), "metrics", "size", "levels", "history", "exports"} - {"format"}))
def test_any_key_may_be_missing(tmp_path, key):
    records = realistic()
    for number, entry in enumerate(records[3:] if key == "status" else records):
        entry[key] = None
        if number % 2:
            del entry[key]
    assert page_of(tmp_path, records).count("<h2>") >= 3


def test_unfinished_stages_are_named_and_not_shown(tmp_path):
    records = realistic()[:4]
    records[2]["status"], records[3]["status"] = "failed", "running"
    page = page_of(tmp_path, records)
    assert "Not finished, and in no figure or table: student-relu (failed), ticket-gelu (running)." in page
    assert [row[0] for row in cells(page, "stages")] == ["teacher", "student-gelu"]
    assert "student-relu (failed)" in terminal(summary(tmp_path / "run"))
