"""What a model is given of a batch is the same everywhere: tasks, criteria, diagnostics and caches."""

from typing import Any

import pytest
import torch
from torch import nn

from workbench.models.forward import forward, inputs_of, keywords_of
from workbench.tasks import Classification, Regression

X, MASK, Y = torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, Y), (X,), {}),
        ([X, Y], (X,), {}),
        ((X,), (X,), {}),
        ((X, MASK, Y), (X, MASK), {}),
        ({"x": X, "labels": Y}, (), {"x": X}),
        ({"x": X, "label": Y}, (), {"x": X}),
        ({"x": X, "mask": MASK, "label_ids": Y}, (), {"x": X, "mask": MASK}),
    ],
)
def test_a_model_gets_a_batch_without_its_labels(batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert [id(value) for value in inputs_of(batch)[0]] == [id(value) for value in args]
    assert {name: id(value) for name, value in inputs_of(batch)[1].items()} == {n: id(v) for n, v in kwargs.items()}


def test_tasks_leave_out_every_name_of_labels() -> None:
    batch = {"x": X, "labels": Y, "label": Y, "label_ids": Y}
    assert Classification(2).inputs(batch)[1].keys() == {"x"}
    assert Regression().inputs(batch)[1].keys() == {"x"}


@pytest.mark.parametrize("batch", [3, "text", (), []])
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"a batch is \w+: give a mapping, a tuple or list of inputs"):
        inputs_of(batch)


def test_a_model_that_takes_other_inputs_is_named() -> None:
    with pytest.raises(ValueError, match="Linear cannot be called with 2 arguments of a batch"):
        forward(nn.Linear(3, 2), (X, MASK, Y))
    with pytest.raises(ValueError, match=r"Linear cannot be called with arguments \['x'\] of a batch"):
        forward(nn.Linear(3, 2), {"x": X, "labels": Y})


class Open(nn.Module):
    def forward(self, x: Any, **options: Any) -> Any:
        return x


class Named(nn.Module):
    main_input_name = "x"

    def forward(self, x: Any, mask: Any = None, *, scale: float = 1.0, **options: Any) -> Any:
        return x


def test_names_of_keyword_arguments() -> None:
    assert keywords_of(nn.Linear(1, 1)) == ("input",)
    assert keywords_of(Open()) is None
    assert keywords_of(Named()) == ("x", "mask", "scale")  # as models of transformers, whose **kwargs are options
    assert keywords_of(lambda x, /, y, *rest, z=1: x) == ("y", "z")
    assert keywords_of(lambda **batch: batch) is None
    assert keywords_of(min) is None
