"""Shift, padding and prompts of causal models."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.language import shift, valid_tokens
from tests.helpers.tiny_gpt2 import gpt2


def test_shift_is_what_a_causal_model_is_scored_on():
    model, ids = gpt2(), torch.randint(23, (3, 7))
    output = model(input_ids=ids, labels=ids)
    logits, labels = shift(output.logits, ids)
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), output.loss)
    with pytest.raises(ValueError, match=r"outputs are \[3, 6, 23\] and labels \[3, 7\].*before the shift"):
        shift(logits, ids)


def test_the_end_counts_where_padding_is_the_end_token_too():
    """The loss of a batch must not depend on which token pads it (huggingface/trl#6357)."""
    end = 2
    ids = torch.tensor([[5, 6, end, end, end], [5, 6, 7, 8, end]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    valid = valid_tokens(ids, mask)
    assert valid.tolist() == [[True, True, False, False], [True, True, True, True]]
    assert (ids[:, 1:][valid] == end).sum() == 2, "one true end a sequence"
    assert torch.equal(valid, valid_tokens(ids.masked_fill(mask == 0, 9), mask))


def naive_valid(tokens, mask, prompts, ignore, causal):
    rows = []
    for b, row in enumerate(tokens.tolist()):
        real = [True] * len(row) if mask is None else [m != 0 for m in mask[b].tolist()]
        answer = []
        for i in range(1 if causal else 0, len(row)):
            number = sum(real[:i])  # of real tokens before this one
            prompt = prompts is not None and number < prompts[b]
            answer.append(real[i] and row[i] != ignore and not prompt and (real[i - 1] or not causal))
        rows.append(answer)
    return rows


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_valid_tokens_position_by_position(data):
    size, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tokens = torch.randint(-1, 3, (size, length), generator=generator)
    real = torch.randint(1, length + 1, (size, 1), generator=generator)
    left = data.draw(st.booleans())
    mask = (torch.arange(length) >= length - real) if left else (torch.arange(length) < real)
    mask = data.draw(st.sampled_from([mask.long(), mask, None]))
    prompts = data.draw(st.sampled_from([None, torch.randint(length, (size,), generator=generator)]))
    for causal in (True, False):
        found = valid_tokens(tokens, mask, prompts, -1, causal)
        assert found.dtype == torch.bool
        assert found.tolist() == naive_valid(tokens, mask, prompts, -1, causal)


def test_padding_on_either_side_leaves_the_same_loss():
    model, ids = gpt2().eval(), torch.randint(23, (1, 5))
    losses = []
    for left, right in ((0, 0), (0, 3), (3, 0)):
        padded = F.pad(ids, (left, right), value=4)
        mask = F.pad(torch.ones_like(ids), (left, right))
        place = (mask.cumsum(1) - 1).clamp(min=0)
        logits, labels = shift(model(input_ids=padded, attention_mask=mask, position_ids=place).logits, padded)
        valid = valid_tokens(padded, mask)
        assert int(valid.sum()) == 4
        losses.append(F.cross_entropy(logits[valid], labels[valid]))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4),), r"tokens are \[4\]: give \[B, L\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 3)), r"attention_mask is \[2, 3\] for tokens \[2, 4\]"),
        ((torch.zeros(2, 4), None, torch.zeros(3)), r"prompt_lengths is \[3\] .* one length a sequence, \[2\]"),
    ],
)
def test_wrong_positions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        valid_tokens(*arguments)
