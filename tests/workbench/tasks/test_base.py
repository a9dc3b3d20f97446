from collections import namedtuple
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from workbench.tasks import select_logits

ONE, OTHER = torch.zeros(2, 3), torch.ones(2, 3)
Heads = namedtuple("Heads", ["depth", "classes"])


@pytest.mark.parametrize(
    ("raw", "spec"),
    [
        (ONE, None),
        ({"logits": ONE, "out": OTHER}, None),
        ({"out": ONE, "aux": OTHER}, "out"),
        ({"out": ONE, "aux": OTHER}, None),
        ((OTHER, ONE), 1),
        ([OTHER, ONE], -1),
        (Heads(OTHER, ONE), "classes"),
        (SequenceClassifierOutput(loss=OTHER, logits=ONE), 1),  # type: ignore[arg-type]
        ({"heads": [OTHER, ONE]}, lambda raw: raw["heads"][1]),
    ],
)
def test_logits_are_found_where_one_says(raw: Any, spec: Any) -> None:
    assert select_logits(raw, spec) is ONE


@pytest.mark.parametrize(
    ("raw", "spec", "message"),
    [
        ({"main": ONE}, None, "the teacher returned dict without logits"),
        (
            {"out": ONE},
            "main",
            "logits of the teacher are 'main', which is NoneType and no tensor, in a mapping of out",
        ),
        ((ONE, [OTHER]), 1, "are 1, which is list and no tensor, in tuple of 2"),
        ((ONE,), 2, "are 2, which is NoneType"),
        (ONE, 0, "are 0, which is NoneType and no tensor, in Tensor"),
        ({"out": ONE}, lambda raw: raw, "are what the function returned, which is dict"),
    ],
)
def test_and_missed_where_there_are_none(raw: Any, spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_logits(raw, spec, "the teacher")
