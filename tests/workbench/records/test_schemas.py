"""The record of every job: its dataclass, its JSON Schema, and records that do not have it."""

import json
import subprocess
import sys

import pytest

from tests.helpers.lottery_records import FEW, hunt_record, verdict_record
from tests.helpers.report_records import compared, distilled, realistic
from workbench import records
from workbench.launcher.jobs import find_jobs
from workbench.records.codec import decode, encode, problems


def test_every_job_states_what_it_records() -> None:
    assert set(records.jobs()) == {name for name, job in find_jobs().items() if job.entry.dist.name == "distill-prune"}
    for job in records.jobs():
        schema = records.json_schema(job)
        assert json.loads(json.dumps(schema)) == schema
        references = set(json.dumps(schema).split('"#/$defs/')[1:])
        assert {text.partition('"')[0] for text in references} <= set(schema["$defs"])


def test_a_job_that_states_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"no job 'bake' states what it records: choose from cache, compare, "):
        records.json_schema("bake")


def test_the_schemas_can_be_printed() -> None:
    command = [sys.executable, "-m", "workbench.records", "verdict", "export"]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert printed == {job: records.json_schema(job) for job in ("verdict", "export")}
    wrong = subprocess.run([*command, "bake"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr.startswith("error: no job 'bake'")) == (1, True)


@pytest.mark.parametrize(
    "entry", [*realistic(), *distilled(), compared(), hunt_record(0, FEW)], ids=lambda e: e["stage"]
)
def test_made_up_records_have_their_jobs_types(entry: dict) -> None:
    assert records.violations(entry) == []


def test_what_is_written_is_what_is_read() -> None:
    entry = verdict_record({"one": [hunt_record(seed, FEW) for seed in range(2)]})
    result = decode(records.VerdictResult, entry, None)
    assert encode(result) == {key: entry[key] for key in ("verdicts", "differences")}


def test_a_record_of_other_types_is_told_where() -> None:
    assert problems(records.Estimate, {"n": 3, "mean": "high", "spread": 1}, "mean") == [
        "mean.spread is not in Estimate",
        "mean.mean is str, not float",
    ]
