"""Byte code tells functions apart by what they do, wherever they stand."""

from typing import Any

import pytest

from workbench.definitions.bytecode import code_of, functions_of, names_in


def function(text: str, above: int = 0) -> Any:
    scope: dict[str, Any] = {}
    exec("\n" * above + text, scope)
    return scope["f"]


def test_lines_do_not_count() -> None:
    assert code_of(function("def f(x): return x + 1").__code__) == code_of(
        function("def f(x): return x + 1", 9).__code__
    )


@pytest.mark.parametrize(
    "other", ["return x + 2", "return x - 1", "return y + 1", "return (lambda z: z + 3)(x)", "return x in {1, 2}"]
)
def test_everything_else_does(other: str) -> None:
    assert code_of(function("def f(x): return x + 1").__code__) != code_of(function(f"def f(x): {other}").__code__)


def test_sets_are_in_order() -> None:
    text = code_of(function("def f(x): return x in {'c', 'a', 'b'}").__code__)
    assert "[\"'a'\", \"'b'\", \"'c'\"]" in text


def test_functions_of_a_class_are_all_of_its_kinds() -> None:
    class Net:
        width = 3

        def plain(self) -> None: ...

        @classmethod
        def of_class(cls) -> None: ...

        @staticmethod
        def static() -> None: ...

        @property
        def read(self) -> int:
            return helper(lambda: other(1))

    assert [each.__name__ for each in functions_of(Net)] == ["plain", "of_class", "static", "read"]
    assert names_in(functions_of(Net)[-1].__code__) >= {"helper", "other"}


def helper(value: Any) -> Any:
    return value


other = helper
