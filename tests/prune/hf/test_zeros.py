import pytest

from prune.hf import masks_of_zeros
from tests.helpers.transformers_training import TOTAL, bert, masks


def test_masks_of_zeros_are_those_of_the_zeros() -> None:
    given, model = masks(), bert()
    given.apply(model)
    assert masks_of_zeros(model) == given
    assert list(masks_of_zeros(model, include="bert.encoder*")) == [n for n in given if n.startswith("bert.encoder")]
    with pytest.raises(ValueError, match=rf"none of the {TOTAL} prunable weights .* is zero: it is dense"):
        masks_of_zeros(bert())
