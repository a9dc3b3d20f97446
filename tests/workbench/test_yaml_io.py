"""YAML in and out."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workbench.yaml_io import dump, inline, load

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_1e", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@example("\x85")
@example("1e3")
@given(PLAIN)
def test_what_is_written_reads_back_the_same(data: object) -> None:
    assert load(dump(data)) == data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2E+4", 2e4),
        ("1_000", 1000),
        ("0x1f", 31),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("0", 0),
        ("017", "017"),
        ("12:30:00", "12:30:00"),
        ("2026-01-01", "2026-01-01"),
        ("500it", "500it"),
        ("true", True),
        ("~", None),
        ("", None),
    ],
)
def test_scalars_are_what_a_person_means(text: str, value: object) -> None:
    found = load(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"line 2, column 1: not valid YAML: key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "line 1, column 11: .*'b' is given twice"),
        ("a: [1", "line 1, column 6: not valid YAML"),
        ("? [1]\n: 2", "a key must be a name"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("!!set {x}", "a set is not plain data"),
        ("&a [*a]", "nested too deeply, or in itself"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_not_plain_yaml_is_an_error_of_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(text)
    assert "\n" not in str(caught.value)


def test_a_mapping_may_be_merged_into_another() -> None:
    assert load("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}")["b"] == {"x": 1, "y": 3}


def test_inline_is_one_line() -> None:
    assert inline({"a": [1, "x"], "b": {"c": None}}) == "{a: [1, x], b: {c: null}}"
    assert inline("4ep") == "4ep"
