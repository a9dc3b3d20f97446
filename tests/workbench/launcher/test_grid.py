"""Points of a grid and their names."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from workbench.launcher.grid import settings


def names(over: Any) -> list[str]:
    return [setting.name for setting in settings(over)]


def test_every_combination_in_the_order_written() -> None:
    found = settings({"model.init_args.activation": ["relu", "gelu"], "seed": [0, 1]})
    assert [setting.name for setting in found] == [
        "activation-relu_seed-0",
        "activation-relu_seed-1",
        "activation-gelu_seed-0",
        "activation-gelu_seed-1",
    ]
    assert found[1].values == {"model.init_args.activation": "relu", "seed": 1}


def test_a_list_of_settings_is_taken_as_it_is() -> None:
    found = settings([{"density": 0.1, "rate": 0.2}, {"density": 0.05}])
    assert [setting.name for setting in found] == ["density-0.1_rate-0.2", "density-0.05"]
    assert found[1].values == {"density": 0.05}


def test_longer_keys_may_be_mappings_in_mappings_as_the_command_line_writes_them() -> None:
    over = {"model.init_args.width": [1, 2], "model": {"init_args": {"width": [3]}}, "seed": [0]}
    assert names(over) == ["width-3_seed-0"]


@pytest.mark.parametrize(
    ("over", "name"),
    [
        ({"lr": [1e-3]}, "lr-0.001"),
        ({"x": [-2]}, "x--2"),
        ({"x": [None]}, "x-null"),
        ({"x": [True]}, "x-true"),
        ({"x": ["true"]}, "x-true-18d10c7d"),
        ({"x": ["gelu_tanh"]}, "x-gelu_tanh"),
        ({"seed_everything": [3]}, "seed-3"),
        ({"a.width": [1], "b.width": [2]}, "a-width-1_b-width-2"),
        ({"a.width": [1], "width": [2]}, "a-width-1_width-2"),
        ({"x": [[1, 2]]}, "x-1-2-3a316d6d"),
        ({"data": ["configs/data/digits.yaml"]}, "data-digits-ee4fa6e9"),
        ({"model": [{"class_path": "a.b.MLP", "init_args": {"x": 1}}]}, "model-MLP-"),
        ({"x": ["../../etc/passwd"]}, "x-passwd-"),
        ({"x": ["ж"]}, "x-"),
        ({"x": ["long" * 30]}, "x-longlonglonglonglonglonglonglong-"),
    ],
)
def test_names_can_be_read_and_are_a_folders(over: Any, name: str) -> None:
    (found,) = names(over)
    assert found == name or (name.endswith("-") and found.startswith(name) and len(found) <= len(name) + 9)
    assert Path(found).name == found


VALUES = st.one_of(st.text(max_size=40), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none())


@tries(max_examples=50, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=8, unique_by=lambda value: (type(value), value)), VALUES)
def test_different_values_have_different_names_and_each_keeps_its_own(values: list[Any], other: Any) -> None:
    alone = [names({"x": [value]})[0] for value in values]
    assert names({"x": values}) == alone, "whatever else is in the grid"
    assert len(set(alone)) == len(values)
    for name in alone:
        assert Path(name).name == name
        assert len(name.encode()) <= 120
        assert not name.startswith((".", "-"))


def test_names_of_many_keys_stay_short_and_different() -> None:
    over = {f"number_{n}": [0, 1] for n in range(8)} | {"text": ["x" * 32]}
    found = names(over)
    assert len(set(found)) == 256
    assert max(map(len, found)) <= 120


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (None, "is null: give lists of values by key, e.g. {seed: [0, 1, 2]}, or a list of settings"),
        ({}, "is {}: give lists"),
        ([], "is []: give lists"),
        ("seed", "is seed: give lists"),
        ({"seed": 3}, "has seed: 3: give a list of values, e.g. {seed: [0, 1, 2]}"),
        ({"seed": []}, "has seed: []: give a list"),
        ({"seed": [0, 1, 0]}, "has 'seed-0' twice"),
        ([{"seed": 1}, {"seed": 1}], "has 'seed-1' twice"),
        ([{}], "has the setting {}: give values by key"),
        ([1], "has the setting 1: give values by key"),
    ],
)
def test_what_is_no_grid_is_said(over: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what it says is checked
        settings(over)
    assert said in str(caught.value)
