import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from tests.helpers.tasks import naive
from workbench.tasks import NLL, Accuracy, LanguageModelling, cross_entropy


def sequences(causal=True, left=False):
    """Two sequences of 5 and 3 tokens, padded by a token that also stands inside."""
    ids = torch.tensor([[3, 1, 4, 1, 2], [2, 5, 2, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    if left:
        ids, mask = ids.flip(1), mask.flip(1)
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch if causal else {**batch, "labels": ids.masked_fill(torch.rand(2, 5) < 0.5, -100)}


def test_a_causal_model_is_scored_on_the_next_token():
    task, batch = LanguageModelling(7), sequences()
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    nlls, right = [], []
    for b, length in enumerate((5, 3)):
        for i in range(length - 1):
            target = int(batch["input_ids"][b, i + 1])
            nlls.append(naive(logits[b, i][None], torch.tensor([target])))
            right.append(int(logits[b, i].argmax()) == target)
    output = task.output(CausalLMOutput(logits=logits))
    assert task.loss(output, batch).item() == pytest.approx(sum(nlls) / 6)
    assert task.valid(batch).tolist() == [[True] * 4, [True, True, False, False]]
    metrics = task.metrics("val/")
    for half in (slice(0, 1), slice(1, 2)):
        metrics.update(output[half], task.targets({name: value[half] for name, value in batch.items()}))
    values = {name: value.item() for name, value in metrics.compute().items()}
    expected = {"nll": sum(nlls) / 6, "perplexity": math.exp(sum(nlls) / 6), "accuracy": sum(right) / 6}
    assert values == {f"val/{name}": pytest.approx(value) for name, value in expected.items()}


def test_the_loss_is_the_models_own():
    """Of transformers, which shifts and ignores -100 itself."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=1)
    ).eval()
    task, batch = LanguageModelling(7), sequences()
    args, kwargs = task.inputs({**batch, "labels": batch["input_ids"], "prompt_lengths": torch.tensor([0, 0])})
    assert kwargs.keys() == {"input_ids", "attention_mask"}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    theirs = model(**batch, labels=labels).loss
    torch.testing.assert_close(task.loss(task.output(model(*args, **kwargs)), batch), theirs)
    assert torch.equal(task.targets({**batch, "labels": labels}), task.targets(batch))


def test_the_end_token_counts_where_it_pads_too():
    targets = LanguageModelling(7).targets(sequences())
    assert targets.tolist() == [[1, 4, 1, 2], [5, 2, -100, -100]]
    assert LanguageModelling(7).targets(sequences(left=True)).tolist() == [[1, 4, 1, 3], [-100, -100, 5, 2]]


def test_prompts_do_not_count():
    batch = {**sequences(), "prompt_lengths": torch.tensor([2, 1])}
    assert LanguageModelling(7).valid(batch).tolist() == [[False, True, True, True], [True, True, False, False]]


def test_a_model_of_masked_tokens_is_scored_in_place():
    task, batch = LanguageModelling(7, causal=False), sequences(causal=False)
    logits = torch.randn(2, 5, 7)
    assert task.output(logits).shape == (2, 5, 7)
    expected = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    assert torch.equal(task.targets(batch), expected)
    torch.testing.assert_close(task.loss(logits, batch), cross_entropy(logits, expected, ignore_index=-100))
    with pytest.raises(ValueError, match="a model of masked tokens needs 'labels'"):
        task.targets(sequences())


def test_rows_that_name_no_token_take_no_probability():
    task, batch = LanguageModelling(7), sequences()
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 16)
    assert task.output(student).shape == task.output(teacher).shape == (2, 4, 7)
    torch.testing.assert_close(task.loss(task.output(student), batch), task.loss(student[:, :-1, :7], batch))
    assert torch.equal(task.aligned(teacher), teacher[:, :-1])


def test_language_loss_smoothed():
    task, batch, logits = LanguageModelling(7, label_smoothing=0.2), sequences(), torch.randn(2, 5, 7)
    expected = naive(logits[:, :-1], task.targets(batch), 0.2, -100)
    assert task.loss(task.output(logits), batch).item() == pytest.approx(expected, rel=1e-5)


def test_language_monitor_is_one_of_the_metrics():
    task = LanguageModelling(3)
    name, direction = task.monitor
    metrics = task.metrics("val/")
    assert metrics[name].higher_is_better == (direction == "max")
    assert {type(metric) for metric in metrics.values()} > {NLL, Accuracy}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": 1}, "vocabulary=1: give at least 2"),
        ({"vocabulary": 3, "label_smoothing": 1.0}, "label_smoothing=1.0"),
    ],
)
def test_wrong_language_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelling(**arguments)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2), torch.zeros(2)), "the batch is a tuple, without a tensor of 'input_ids'"),
        ({"ids": torch.zeros(2)}, r"a mapping of \['ids'\]"),
        ({"input_ids": torch.zeros(2, 3)}, "labels are torch.float32"),
        ({"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 2, dtype=torch.int64)}, r"labels are \[2, 2\] for"),
    ],
)
def test_wrong_language_batches_are_named(batch, message):
    task = LanguageModelling(3)
    for read in (task.inputs, task.targets, task.valid):
        with pytest.raises(ValueError, match=message):
            read(batch)


def test_wrong_language_outputs_are_named():
    task = LanguageModelling(7)
    with pytest.raises(ValueError, match=r"\[2, 7\]: a language model returns \[B, L, 7\]"):
        task.output(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="too narrow for vocabulary=7"):
        task.output(torch.zeros(2, 5, 6))
    with pytest.raises(ValueError, match="without logits"):
        task.output(BaseModelOutput(last_hidden_state=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"logits are \[2, 5, 7\] for targets \[2, 4\], expected \[2, 4, 7\]"):
        task.loss(torch.zeros(2, 5, 7), sequences())
