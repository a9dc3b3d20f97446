"""Cross-entropy of independent labels and its metrics, against naive ones and torchmetrics."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryF1Score,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from tests.helpers.ranks import on_ranks
from workbench.tasks.labels import (
    F1,
    LabelAccuracy,
    LabelNLL,
    auroc,
    average_precision,
    binary_cross_entropy,
    check_pos_weight,
)

NAN = float("nan")


def naive(logits, labels, smoothing=0.0, ignore=None, weights=None):
    """Label by label, in python floats."""
    values = []
    for index, (z, y) in enumerate(zip(logits.flatten().tolist(), labels.flatten().tolist())):
        if y == ignore or math.isnan(y):
            continue
        q = (1 - smoothing) * y + smoothing / 2
        p = 1 / (1 + math.exp(-z))
        w = 1.0 if weights is None else weights[index % len(weights)]
        values.append(-(w * q * math.log(p) + (1 - q) * math.log(1 - p)))
    return sum(values) / max(len(values), 1)


def some(*shape, gaps=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = (torch.rand(shape, generator=generator) < torch.sigmoid(logits)).double()
    return logits, labels.masked_fill(torch.rand(shape, generator=generator) < 0.3, NAN) if gaps else labels


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 4, 3)])
@pytest.mark.parametrize(("smoothing", "weights"), [(0.0, None), (0.2, None), (0.0, [1.0, 5.0, 0.5]), (0.1, [3.0])])
def test_loss_is_the_formula(shape, smoothing, weights):
    logits, labels = some(*shape, gaps=True)
    if weights is not None and len(weights) > 1 and shape[-1] != len(weights):
        weights = weights[:1]
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    loss = binary_cross_entropy(logits, labels, smoothing, None, given)
    assert loss.item() == pytest.approx(naive(logits, labels, smoothing, None, weights), rel=1e-12)


def test_loss_without_gaps_is_that_of_torch():
    logits, labels = some(6, 3)
    weight = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)
    torch.testing.assert_close(binary_cross_entropy(logits, labels, pos_weight=weight), expected)
    torch.testing.assert_close(
        binary_cross_entropy(logits, 0.8 * labels), F.binary_cross_entropy_with_logits(logits, 0.8 * labels)
    )


def test_integers_with_a_mark_are_floats_with_nan():
    logits, labels = some(9, 4, gaps=True)
    marked = labels.nan_to_num(-100).long()
    assert binary_cross_entropy(logits, marked, ignore_index=-100) == binary_cross_entropy(logits, labels)
    for metric in (LabelAccuracy, LabelNLL, lambda mark=None: F1(ignore_index=mark), auroc):
        assert metric(-100)(logits, marked) == metric()(logits, labels)


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_what_stands_where_no_label_counts_does_not_matter(bad):
    logits, labels = some(6, 2, gaps=True)
    clean, dirty = logits.clone().requires_grad_(), logits.masked_fill(labels.isnan(), bad).requires_grad_()
    losses = [binary_cross_entropy(z, labels, pos_weight=torch.tensor(2.0)) for z in (clean, dirty)]
    gradients = [torch.autograd.grad(loss, z)[0] for loss, z in zip(losses, (clean, dirty))]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(*gradients)
    assert not gradients[0][labels.isnan()].any()


def test_no_label_at_all_is_zero_with_its_graph_and_nan_in_metrics():
    logits = torch.randn(3, 2, requires_grad=True)
    labels = torch.full((3, 2), NAN)
    loss = binary_cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 2))
    for metric in (LabelAccuracy(), LabelNLL(), F1(), F1("macro", 2), auroc(), average_precision(2)):
        metric.update(logits, labels)
        assert metric.compute().isnan()


def test_half_precision_is_scored_in_float32():
    logits, labels = some(64)
    loss = binary_cross_entropy(logits.bfloat16(), labels.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, binary_cross_entropy(logits.bfloat16().float(), labels), rtol=0, atol=0)


@pytest.mark.parametrize("gaps", [False, True])
def test_metrics_over_uneven_batches_are_those_of_torchmetrics(gaps):
    logits, labels = some(60, 3, gaps=gaps)
    mine = {
        "f1": F1(),
        "macro": F1("macro", 3),
        "map": average_precision(3),
        "auroc": auroc(),
        "accuracy": LabelAccuracy(),
        "nll": LabelNLL(),
    }
    for a, b in ((0, 1), (1, 25), (25, 25), (25, 60)):
        for metric in mine.values():
            metric.update(logits[a:b], labels[a:b])
    probabilities, marked = logits.sigmoid(), labels.nan_to_num(-1).long()
    known = ~labels.isnan()
    expected = {
        "f1": BinaryF1Score(ignore_index=-1)(probabilities, marked),
        "macro": MultilabelF1Score(3, ignore_index=-1)(probabilities, marked),
        "map": MultilabelAveragePrecision(3, ignore_index=-1)(probabilities, marked),
        "auroc": BinaryAUROC(ignore_index=-1)(probabilities, marked),
        "accuracy": ((logits > 0) == (labels > 0.5))[known].double().mean(),
        "nll": torch.tensor(naive(logits, labels)),
    }
    for name, metric in mine.items():
        assert metric.compute().item() == pytest.approx(expected[name].item(), abs=1e-6), name
        metric.reset()
        metric.update(logits[:9], labels[:9])


def test_labels_at_another_axis():
    logits, labels = some(4, 3, 5, 6)
    for build in (lambda **form: F1("macro", 3, **form), lambda **form: average_precision(3, **form)):
        first, last = build(label_dim=1), build()
        first.update(logits, labels)
        last.update(logits.movedim(1, -1), labels.movedim(1, -1))
        assert first.compute() == last.compute()


def test_ranks_of_large_logits_are_not_ties():
    """A sigmoid in single precision makes 20, 30 and 40 one number."""
    logits, labels = torch.tensor([20.0, 30.0, 40.0, -5.0]), torch.tensor([0, 1, 1, 0])
    assert auroc()(logits, labels) == 1
    assert auroc()(torch.tensor([0.0, 0.0]), torch.tensor([0, 1])) == 0.5


def test_scores_that_are_not_defined_are_nan_without_a_warning():
    logits = torch.randn(5)
    assert auroc()(logits, torch.ones(5)).isnan()
    assert auroc()(logits, torch.zeros(5)).isnan()
    logits, labels = torch.randn(3, 2), torch.tensor([[1, 0], [1, 0], [0, 0]])
    assert average_precision(2)(logits, labels) == average_precision(1)(logits[:, :1], labels[:, :1])


def _rank(parts):
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    metrics = {"f1": F1("macro", 3), "map": average_precision(3), "auroc": auroc(), "nll": LabelNLL()}
    for metric in metrics.values():
        metric.update(*parts[rank])
    return {name: metric.compute().item() for name, metric in metrics.items()}


def test_two_ranks_are_one():
    logits, labels = some(20, 3, gaps=True)
    one = {"f1": F1("macro", 3), "map": average_precision(3), "auroc": auroc(), "nll": LabelNLL()}
    expected = {name: metric(logits, labels).item() for name, metric in one.items()}
    for found in on_ranks(_rank, [(logits[:7], labels[:7]), (logits[7:], labels[7:])]):
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 255]), "labels hold 255: give 0 and 1, or probabilities, and name .* ignore_index"),
        (torch.tensor([0.0, -1.0]), "labels hold -1"),
        (torch.zeros(2, 1), r"logits are \[2\] for labels \[2, 1\]"),
    ],
)
def test_wrong_labels_are_named(labels, message):
    for call in (binary_cross_entropy, auroc().update, F1().update, LabelAccuracy().update):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(2), labels)


@pytest.mark.parametrize(
    ("weight", "message"),
    [(0.0, "pos_weight=0.0: give"), ([1.0, 2.0], "2 numbers for labels=3"), ([1.0, 2.0, NAN], "give finite")],
)
def test_wrong_weights_are_named(weight, message):
    with pytest.raises(ValueError, match=message):
        check_pos_weight(weight, 3)


def test_bytes_are_marked_as_other_integers_are():
    logits, labels = torch.tensor([1.0, -1.0, 3.0]), torch.tensor([1, 0, 255])
    assert binary_cross_entropy(logits, labels.byte(), ignore_index=255) == binary_cross_entropy(logits[:2], labels[:2])
    with pytest.raises(ValueError, match="labels hold 156"):
        binary_cross_entropy(logits, torch.tensor([1, 0, 156]).byte(), ignore_index=-100)
