"""The records of a run, read."""

import pytest

from tests.helpers.report_records import gathered, realistic, record, written
from workbench.records import read_run
from workbench.report.job import report


def test_stages_that_start_in_the_same_second_follow_their_parents(tmp_path):
    records = [
        record("a", parents=[("start", "b")]),
        record("b", parents=[("start", "c")]),
        record("c"),
        record("0", start=9),
    ]
    assert [s.name for s in read_run(written(tmp_path / "run", records))] == ["c", "b", "a", "0"]
    loop = [record("a", parents=[("start", "b")]), record("b", parents=[("start", "a")])]
    assert gathered(tmp_path / "loop", loop).rows[0].activation is None, "a cycle ends"


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "\xff", '{"format": 3}',
        '{"format": 2, "metrics": [1]}', '{"format": 2, "job": "hunt", "levels": {"a": 1}}',
        '{"format": 2, "monitor": "accuracy"}', '{"format": 2, "history": [1]}',
        '{"format":2,"a":' + "[" * 100_000,
    ],
)  # fmt: skip
def test_a_malformed_record_is_named(tmp_path, text):
    run = written(tmp_path / "run", realistic()[:1])
    (run / "bad").mkdir()
    (run / "bad/record.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"bad.record\.json"):
        report(run / "report")


def test_two_stages_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a second stage called 'teacher'"):
        gathered(tmp_path, [record("teacher"), record("teacher")])
