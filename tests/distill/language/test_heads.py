"""Vocabularies and output layers."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, Gemma2Config, Gemma2ForCausalLM

from distill.language import check_vocabulary, chunked_soft_target, headless, pad_vocabulary, shared_vocabulary, shift
from distill.losses import soft_target
from tests.helpers.tiny_gpt2 import ENDS, gpt2


def test_vocabularies_are_compared_token_by_token():
    tokens = {"a": 0, "b": 1, "c": 4}
    assert check_vocabulary(tokens, dict(reversed(tokens.items()))) == 5
    with pytest.raises(
        ValueError, match=r"differ in 2 of 3 tokens \('a' is 0 to the student and 1 to the teacher; 'b'"
    ):
        check_vocabulary(tokens, {"a": 1, "b": 0, "c": 4})
    with pytest.raises(ValueError, match="'d' is unknown to the student and 5 to the teacher"):
        check_vocabulary(tokens, {**tokens, "d": 5})
    with pytest.raises(ValueError, match="is empty"):
        check_vocabulary({}, tokens)


def test_vocabularies_share_what_is_the_same_token_to_both():
    student, teacher = {"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1, "c": 2, "d": 3}
    assert shared_vocabulary(student, teacher) == 3
    assert shared_vocabulary({**student, "[PAD]": 3}, {"a": 0, "b": 1, "c": 2}, padding="[PAD]") == 3
    with pytest.raises(ValueError, match="does not know 1 of the student's tokens, the first 'd' with id 3"):
        shared_vocabulary(teacher, student)
    with pytest.raises(
        ValueError, match="2 ids are other tokens to the teacher, the first 1: 'b' to the student and 'c'"
    ):
        shared_vocabulary(student, {"a": 0, "c": 1, "b": 2})
    assert shared_vocabulary({}, teacher) == 0


def test_padded_rows_take_no_probability():
    student, teacher = torch.randn(3, 8, requires_grad=True), torch.randn(3, 10)
    wide = [pad_vocabulary(logits, 7, 10) for logits in (student, teacher)]
    assert [logits.shape for logits in wide] == [(3, 10), (3, 10)]
    assert (wide[1].softmax(-1)[:, 7:] == 0).all()
    loss = soft_target(*wide, 2.0)
    torch.testing.assert_close(loss, soft_target(student[:, :7], teacher[:, :7], 2.0))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    assert (gradient[:, 7:] == 0).all()
    assert (gradient[:, :7] != 0).all()
    assert pad_vocabulary(teacher, 10) is not None
    assert torch.equal(pad_vocabulary(teacher, 10), teacher)
    for vocabulary, size in ((11, None), (8, 7), (0, None)):
        with pytest.raises(ValueError, match=f"vocabulary={vocabulary} with 10 rows"):
            pad_vocabulary(teacher, vocabulary, size)


@pytest.mark.parametrize("tied", [True, False])
def test_headless_training_is_training_with_the_head(tied):
    student, teacher = gpt2(tie_word_embeddings=tied), gpt2().eval()
    twin = copy.deepcopy(student)
    ids = torch.randint(23, (2, 6))
    with torch.no_grad():
        targets = teacher(input_ids=ids).logits[:, :-1]
    soft_target(twin(input_ids=ids).logits[:, :-1], targets, 2.0).backward()
    with headless(teacher) as teacher_head, headless(student) as head:
        hidden, _ = shift(student(input_ids=ids).logits, ids)
        assert hidden.shape == (2, 5, 16)
        with torch.no_grad():
            theirs = teacher(input_ids=ids).logits[:, :-1]
        loss = chunked_soft_target(hidden, head.weight, theirs, teacher_head.weight, 2.0, chunk=4)
    loss.backward()
    for (name, mine), other in zip(student.named_parameters(), twin.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    torch.testing.assert_close(student(input_ids=ids).logits, twin(input_ids=ids).logits, rtol=0, atol=0)


def test_the_head_is_back_also_after_an_error():
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    for model in (gpt2(), BertForMaskedLM(config), nn.ModuleDict({"module": gpt2()})):
        before = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
        keys = list(model.state_dict())
        with headless(model) as head:
            assert isinstance(head, nn.Linear)
            assert head not in set(model.modules())
        with pytest.raises(IndexError), headless(model):
            _ = [][0]
        assert {name: id(module) for name, module in model.named_modules(remove_duplicate=False)} == before
        assert list(model.state_dict()) == keys


def test_models_that_cannot_go_without_their_head_are_named():
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    gemma = Gemma2Config(vocab_size=20, num_key_value_heads=2, head_dim=4, pad_token_id=0, **config, **ENDS)
    cases = [
        (nn.Linear(2, 2), "Linear names no output layer"),
        (BertModel(BertConfig(vocab_size=20, **config)), "BertModel names no output layer"),
        (Gemma2ForCausalLM(gemma), r"changes its logits after the head \(final_logit_softcapping"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message), headless(model):
            pass
