"""What the mask of a batch says; ``valid_tokens`` and ``shift`` are tested with the tasks that use them."""

from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from workbench.models.positions import tokens_of


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_mask_of_any_dtype_says_which_tokens_are_real(kind: Any) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    for given in (mask, mask.float(), mask.bool()):
        found = tokens_of(kind({"attention_mask": given}))
        assert found is not None
        assert found.dtype == torch.bool
        assert found.tolist() == mask.bool().tolist()


@pytest.mark.parametrize(
    "batch",
    [{}, {"attention_mask": None}, {"attention_mask": torch.ones(1, 1, 3, 3)}, (torch.ones(2, 3),), torch.ones(2)],
    ids=["nothing", "none", "of an attention", "tuple", "tensor"],
)
def test_what_has_no_mask_of_tokens_has_none(batch: Any) -> None:
    assert tokens_of(batch) is None
