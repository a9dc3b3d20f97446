from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.duration import Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"), [("3ep", 3, "ep"), ("500it", 500, "it"), ("0it", 0, "it"), (" 2 ep ", 2, "ep")]
)
def test_parse(text: str, value: int, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)  # type: ignore[arg-type]


@given(st.integers(0, 10**15 - 1), st.sampled_from(["ep", "it"]))
def test_what_is_written_is_read_back(value: int, unit: Any) -> None:
    duration = Duration(value, unit)
    assert Duration.parse(str(duration)) == duration
    assert Duration.parse(duration) is duration


@pytest.mark.parametrize(
    "text", ["", "ep", "3", "-1ep", "1.5ep", "1e3it", "3 epochs", "3EP", "ep3", "٣ep", "9" * 5000 + "ep", None, 3, 3.0]
)
def test_anything_else_is_refused_with_the_forms_allowed(text: Any) -> None:
    with pytest.raises(ValueError, match=r"write epochs as '3ep' or optimizer steps as '500it'"):
        Duration.parse(text)


def test_steps() -> None:
    assert Duration(3, "ep").steps(7) == 21
    assert Duration(3, "it").steps(7) == 3
    assert Duration(0, "ep").steps(7) == 0
