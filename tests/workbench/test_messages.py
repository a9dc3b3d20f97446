import pytest

from workbench.messages import difference, flatten


def test_nested_mappings_are_flattened_to_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}, 3: None}) == {"a.b": 1, "a.c.d": [2], "e": {}, "3": None}  # type: ignore[dict-item]
    assert flatten({}) == {}


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        ({}, {}, ""),
        ({"a": {"b": 1}}, {"a.b": 1}, ""),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a.b 1 instead of 2"),
        ({"a": {}}, {"a": {"b": 2}}, "a.b nothing instead of 2"),
        ({"a": None}, {}, "a null instead of nothing"),
        ({"a": ["x", True]}, {"a": {}}, "a [x, true] instead of {}"),
        ({"a": "x" * 100}, {"a": [1]}, f"a {'x' * 57}... instead of [1]"),
        (dict.fromkeys("abcde", 1), {}, f"{', '.join(f'{key} 1 instead of nothing' for key in 'abcd')} and more"),
    ],
)
def test_what_differs(before: dict, now: dict, text: str) -> None:
    assert difference(before, now) == text


def test_a_key_may_have_words_instead_of_values() -> None:
    assert difference({"hash": "ab", "b": 1}, {"hash": "cd", "b": 2}, {"hash": "other weights"}) == (
        "other weights, b 1 instead of 2"
    )
