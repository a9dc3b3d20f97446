import json
import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench import records

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.printable, max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def turned(value: Any) -> Any:
    """The same data with the keys of every mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(list(value))}
    return [turned(item) for item in value] if isinstance(value, list) else value


@given(VALUES)
def test_a_fingerprint_knows_no_order_of_keys(data: Any) -> None:
    assert records.fingerprint(data) == records.fingerprint(turned(data))
    assert records.fingerprint(data) == records.fingerprint(json.loads(json.dumps(data)))


@pytest.mark.parametrize(
    ("one", "other"), [({"a": 1}, {"a": 2}), ([1, 2], [2, 1]), (1, "1"), (None, {}), ({"a": None}, {}), (0, False)]
)
def test_other_data_has_another_fingerprint(one: Any, other: Any) -> None:
    assert records.fingerprint(one) != records.fingerprint(other)


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    data = {"b": [1, 2.5], "a": {"ä": None, "\ud800": True}, "set": sorted({"x", "y"})}
    code = (
        "from workbench import records\n"
        r"print(records.fingerprint({'set': ['x', 'y'], 'a': {'\ud800': True, 'ä': None}, 'b': [1, 2.5]}))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        assert found.stdout.strip() == records.fingerprint(data)


@pytest.mark.parametrize("data", [{"a": object()}, {1, 2}, {"a": 1, 2: 3}, Path("x")])
def test_only_json_has_a_fingerprint(data: Any) -> None:
    with pytest.raises(ValueError, match="only JSON has a fingerprint"):
        records.fingerprint(data)


def test_a_record_round_trips(tmp_path: Path) -> None:
    assert records.read(tmp_path) is None
    assert records.finished(tmp_path) is None
    records.write(tmp_path / "stage", {"status": "running", "metrics": {"a": 0.1}})
    assert records.read(tmp_path / "stage") == {"format": records.FORMAT, "status": "running", "metrics": {"a": 0.1}}
    assert records.finished(tmp_path / "stage") is None
    records.write(tmp_path / "stage", {"status": "finished"})
    assert records.finished(tmp_path / "stage") == {"format": records.FORMAT, "status": "finished"}
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"format": 2',
        "\xff",
        "[]",
        "3",
        '{"format": 1}',
        '{"format": 3}',
        '{"format": "1"}',
        "{}",
        "[" * 100_000,
    ],
)
def test_a_damaged_or_foreign_record_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"record\.json"):
        records.finished(tmp_path)


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    records.write(tmp_path, {"status": "finished"})
    with pytest.raises(TypeError):
        records.write(tmp_path, {"status": object()})
    assert records.finished(tmp_path) is not None


def test_the_environment_is_json() -> None:
    found = {**records.versions(), **records.environment(), "now": records.now()}
    assert json.loads(json.dumps(found)) == found
    assert {"python", "torch", "distill-prune", "world_size"} <= set(found)
    assert found["now"].endswith("+00:00")


def test_a_record_of_an_earlier_version_says_what_to_do(tmp_path: Path) -> None:
    earlier = {"format": 1, "versions": {"distill-prune": "0.0.9"}}
    (tmp_path / "record.json").write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="earlier version") as caught:
        records.read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'record.json'} was written by an earlier version (distill-prune 0.0.9, record format 1) and this "
        f"version reads format {records.FORMAT} only: choose another --out, or move {tmp_path} aside"
    )
    (tmp_path / "record.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"written by a later version \(record format 99\)"):
        records.read(tmp_path)
