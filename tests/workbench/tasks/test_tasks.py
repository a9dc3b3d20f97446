import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput
from transformers.tokenization_utils_base import BatchEncoding

from workbench.tasks import NLL, Accuracy, Classification, LanguageModelling, Task, cross_entropy


def naive(logits, targets, smoothing=0.0, ignore=None):
    """Position by position, class by class, in python floats."""
    values = []
    classes = logits.shape[-1]
    for z, y in zip(logits.reshape(-1, classes).tolist(), targets.flatten().tolist()):
        if y == ignore:
            continue
        top = max(z)
        log_sum = top + math.log(sum(math.exp(v - top) for v in z))
        q = [(1 - smoothing) * (c == y) + smoothing / classes for c in range(classes)]
        values.append(-sum(weight * (v - log_sum) for weight, v in zip(q, z)))
    return sum(values) / max(len(values), 1)


@pytest.mark.parametrize("shape", [(6,), (2, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("ignore", [None, -100, 2])
def test_loss_is_the_formula(shape, smoothing, ignore):
    torch.manual_seed(0)
    logits = 3 * torch.randn(*shape, 4, dtype=torch.float64)
    targets = torch.randint(4, shape)
    if ignore == -100:
        targets.flatten()[::3] = -100
    loss = Classification(4, smoothing, ignore).loss(logits, (None, targets))
    assert loss.item() == pytest.approx(naive(logits, targets, smoothing, ignore), rel=1e-12)


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_loss_in_pieces_weighed_by_valid_positions_is_the_whole(data):
    seed = data.draw(st.integers(0, 1000))
    cuts = sorted(data.draw(st.lists(st.integers(1, 7), max_size=3, unique=True)))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 3, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (8, 3), generator=generator)
    targets[torch.rand(8, 3, generator=generator) < 0.5] = -100
    task = Classification(5, 0.1, -100)
    whole = task.loss(logits, (None, targets))
    parts = [(a, b) for a, b in zip([0, *cuts], [*cuts, 8])]
    counts = [task.valid((None, targets[a:b])).sum() for a, b in parts]
    losses = [task.loss(logits[a:b], (None, targets[a:b])) for a, b in parts]
    total = sum(counts).clamp(min=1)
    torch.testing.assert_close(sum(n * x for n, x in zip(counts, losses)) / total, whole)


def test_all_ignored_is_zero_with_its_graph():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = Classification(4, 0.1, ignore_index=-100).loss(logits, {"labels": torch.full((2, 3), -100)})
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_gradient():
    targets = torch.tensor([0, 2, -100])
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets, 0.2, -100), (logits,))


def test_half_precision_is_scored_in_float32():
    logits = torch.randn(64, 10).bfloat16()
    targets = torch.randint(10, (64,))
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), targets), rtol=0, atol=0)


def test_a_padding_label_that_was_not_announced_is_an_error():
    with pytest.raises(ValueError, match="labels go from -100 to 1"):
        Classification(4).loss(torch.randn(2, 4), (None, torch.tensor([1, -100])))


@pytest.mark.parametrize("ignore", [None, -100])
@pytest.mark.parametrize("shape", [(16,), (4, 6)])
def test_metrics_are_exact_over_uneven_batches(shape, ignore):
    torch.manual_seed(1)
    logits, targets = torch.randn(*shape, 5), torch.randint(5, shape)
    if ignore is not None:
        targets[torch.rand(shape) < 0.4] = ignore
    metrics = Classification(5, label_smoothing=0.2, ignore_index=ignore).metrics("val/")
    for a, b in [(0, 1), (1, 3), (3, len(logits))]:
        metrics.update(logits[a:b], targets[a:b])
    values = metrics.compute()
    assert set(values) == {"val/accuracy", "val/nll"}
    theirs = MulticlassAccuracy(5, average="micro", ignore_index=ignore)(logits.flatten(0, -2), targets.flatten())
    assert values["val/accuracy"].item() == pytest.approx(theirs.item())
    assert values["val/nll"].item() == pytest.approx(naive(logits, targets, 0.0, ignore), rel=1e-5)
    metrics.reset()
    metrics.update(logits[:1], logits[:1].argmax(-1))
    assert metrics.compute()["val/accuracy"].item() == 1.0


def test_metrics_over_nothing_are_nan():
    metrics = Classification(3, ignore_index=-1).metrics()
    metrics.update(torch.randn(2, 3), torch.tensor([-1, -1]))
    assert all(value.isnan() for value in metrics.compute().values())


def test_monitor_is_one_of_the_metrics():
    task = Classification(3)
    metrics = task.metrics("val/")
    name, direction = task.monitor
    assert f"val/{name}" in metrics.keys()  # noqa: SIM118 - keys() has the prefix
    assert metrics[name].higher_is_better == (direction == "max")
    assert task.metrics() is not task.metrics()


def test_batches():
    task, x, y = Classification(3), torch.randn(2, 4), torch.tensor([0, 1])
    assert task.inputs((x, y)) == ((x,), {})
    assert task.inputs([x, y]) == ((x,), {})
    assert task.inputs((x, x, y)) == ((x, x), {})
    for batch in ({"input_ids": x, "labels": y}, BatchEncoding({"input_ids": x, "labels": y})):
        assert task.inputs(batch) == ((), {"input_ids": x})
        assert task.targets(batch) is y
    assert task.targets((x, y.int())).dtype == torch.int64
    assert task.valid((x, y)).tolist() == [True, True]
    assert Classification(3, ignore_index=1).valid((x, y)).tolist() == [True, False]


def test_outputs():
    task, logits = Classification(3), torch.randn(2, 3)
    for raw in (logits, SequenceClassifierOutput(logits=logits), {"logits": logits}):
        assert task.output(raw) is logits


def test_a_step_as_documented():
    torch.manual_seed(0)
    task, model = Classification(3), nn.Linear(4, 3)
    metrics = task.metrics("train/")
    batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    args, kwargs = task.inputs(batch)
    output = task.output(model(*args, **kwargs))
    task.loss(output, batch).backward()
    metrics.update(output, task.targets(batch))
    assert model.weight.grad.abs().sum() > 0
    assert metrics.compute()["train/nll"].item() == pytest.approx(task.loss(output, batch).item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 1}, "classes=1: give at least 2"),
        ({"classes": 3, "label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"classes": 3, "label_smoothing": -0.1}, "label_smoothing=-0.1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Classification(**arguments)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2), "the batch is a Tensor"),
        ((torch.zeros(2),), "the batch is a tuple"),
        ({"x": torch.zeros(2)}, "a mapping of x"),
        ({"labels": [1, 2]}, "without a tensor of labels"),
        ((torch.zeros(2), torch.zeros(2)), "labels are torch.float32"),
        ((torch.zeros(2), torch.zeros(2) > 0), "labels are torch.bool"),
    ],
)
def test_wrong_batches_are_named(batch, message):
    task = Classification(3)
    for read in (task.inputs, task.targets, task.valid):
        with pytest.raises(ValueError, match=message):
            read(batch)


@pytest.mark.parametrize(("logits", "labels"), [((2, 4), (2,)), ((2, 3), (3,)), ((2, 3), (2, 3)), ((2, 3, 5), (2, 5))])
def test_wrong_shapes_are_named(logits, labels):
    with pytest.raises(ValueError, match=r"logits are \[.*expected \[.*classes=3"):
        Classification(3).loss(torch.zeros(logits), (None, torch.zeros(labels, dtype=torch.int64)))


@pytest.mark.parametrize("raw", [BaseModelOutput(last_hidden_state=torch.zeros(1)), (torch.zeros(1),), {}, None])
def test_wrong_outputs_are_named(raw):
    with pytest.raises(ValueError, match=f"{type(raw).__name__} without logits"):
        Classification(3).output(raw)


def test_a_task_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Task()
    assert all(getattr(vars(Task)[name], "__isabstractmethod__", False) for name in vars(Task) if name[0] != "_")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_stands_at_ignored_positions_does_not_matter(bad: float) -> None:
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, -100, 2], [4, 0, -100]])
    clean = logits.clone().requires_grad_()
    logits[labels == -100] = bad
    logits.requires_grad_()
    losses = [cross_entropy(z, labels, label_smoothing=0.1, ignore_index=-100) for z in (clean, logits)]
    assert torch.equal(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, z)[0] for loss, z in zip(losses, (clean, logits))]
    assert torch.equal(*gradients)
    assert not gradients[0][labels == -100].any()


# --- language


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


def test_a_label_that_is_no_class_is_named():
    with pytest.raises(ValueError, match="labels go from 0 to 6 and logits score 3 classes"):
        cross_entropy(torch.randn(3, 3), torch.tensor([0, 6, -1]), ignore_index=-1)
