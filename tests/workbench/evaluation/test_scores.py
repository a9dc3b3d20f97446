import math

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from workbench.evaluation import scores
from workbench.evaluation.scores import Scores


def drawn(n=200, classes=7, scale=2.0):
    labels = torch.randint(classes, (n,))
    logits = scale * torch.randn(n, classes)
    logits[torch.arange(n), labels] += 1.0
    return logits, labels, scale * torch.randn(n, classes)


def probabilities(row):
    high = max(row)
    weights = [math.exp(z - high) for z in row]
    return [w / sum(weights) for w in weights]


def naive(logits, labels, teacher, bins=15):
    """Every score by loops over Python numbers."""
    rows = [probabilities(row) for row in logits.tolist()]
    wanted = [probabilities(row) for row in teacher.tolist()]
    y, n = labels.tolist(), len(labels)
    best = [max(range(len(p)), key=p.__getitem__) for p in rows]
    right = [float(b == c) for b, c in zip(best, y)]
    told = [max(range(len(p)), key=p.__getitem__) for p in wanted]
    ece = 0.0
    for b in range(bins):
        inside = [i for i, p in enumerate(rows) if b / bins < max(p) <= (b + 1) / bins]
        if inside:
            share, sure = (sum(v[i] for i in inside) / len(inside) for v in (right, [max(p) for p in rows]))
            ece += len(inside) / n * abs(share - sure)
    return {
        "accuracy": sum(right) / n,
        "nll": -sum(math.log(p[c]) for p, c in zip(rows, y)) / n,
        "brier": sum(sum((q - (k == c)) ** 2 for k, q in enumerate(p)) for p, c in zip(rows, y)) / n,
        "ece": ece,
        "agreement": sum(a == b for a, b in zip(best, told)) / n,
        "kl": sum(sum(t * math.log(t / s) for t, s in zip(w, p)) for w, p in zip(wanted, rows)) / n,
    }


def by_functions(logits, labels, teacher, valid=None):
    own = (scores.accuracy, scores.nll, scores.brier, scores.ece)
    found = {f.__name__: f(logits, labels, valid) for f in own}
    found |= {f.__name__: f(logits, teacher, valid) for f in (scores.agreement, scores.kl)}
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_every_score_is_the_naive_one(scale):
    case = drawn(scale=scale)
    expected = naive(*case)
    assert by_functions(*case) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    whole = Scores()
    whole.update(*case)
    assert whole.compute() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert list(whole.compute()) == list(expected)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_that_of_torchmetrics(bins):
    logits, labels, _ = drawn(2000, 5)
    peer = MulticlassCalibrationError(num_classes=5, n_bins=bins, norm="l1")
    assert float(scores.ece(logits, labels, bins=bins)) == pytest.approx(float(peer(logits, labels)), abs=1e-6)


def test_a_bin_holds_its_upper_edge():
    """Confidence 1/2, wrong, is the upper edge of the first of two bins; the last one holds 1."""
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf], [2.0, 0.0, -math.inf]])
    labels = torch.tensor([1, 0, 0])
    sure = probabilities([2.0, 0.0])[0]
    assert float(scores.ece(logits, labels, bins=2)) == pytest.approx((0.5 + (1 - sure)) / 3)


def test_perfect_and_worst():
    labels = torch.tensor([0, 1, 2])
    right, wrong = 1e4 * torch.eye(3), 1e4 * torch.eye(3).roll(1, 1)
    assert by_functions(right, labels, right) == pytest.approx(
        {"accuracy": 1, "nll": 0, "brier": 0, "ece": 0, "agreement": 1, "kl": 0}
    )
    worst = by_functions(wrong, labels, right)
    assert worst == pytest.approx({"accuracy": 0, "nll": 1e4, "brier": 2, "ece": 1, "agreement": 0, "kl": 1e4})
    even = by_functions(torch.zeros(3, 3), labels, torch.zeros(3, 3))
    assert even == pytest.approx(
        {"accuracy": 1 / 3, "nll": math.log(3), "brier": 2 / 3, "ece": 0, "agreement": 1, "kl": 0}
    )


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_batches_do_not_matter(size, monkeypatch):
    logits, labels, teacher = drawn()
    valid = torch.rand(200) < 0.7
    expected = by_functions(logits, labels, teacher, valid)
    monkeypatch.setattr(scores, "_CHUNK", 5 * 7)
    pieces = Scores()
    for part in torch.arange(200).split(size):
        pieces.update(logits[part], labels[part], teacher[part], valid[part])
    assert pieces.count == int(valid.sum())
    assert pieces.compute() == pytest.approx(expected, rel=1e-12)
    assert by_functions(logits, labels, teacher, valid) == pytest.approx(expected, rel=1e-12), "nor chunks"


def test_positions_that_do_not_count_are_not_read():
    logits, labels, teacher = drawn(24)
    valid = torch.arange(24) % 3 > 0
    expected = by_functions(logits[valid], labels[valid], teacher[valid])
    logits[~valid], teacher[~valid], labels[~valid] = math.nan, math.inf, -100
    shaped = (logits.view(4, 6, 7), labels.view(4, 6), teacher.view(4, 6, 7))
    assert by_functions(*shaped, valid.view(4, 6)) == pytest.approx(expected, rel=1e-12)
    streamed = Scores()
    streamed.update(*shaped, valid.view(4, 6))
    assert streamed.compute() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(scores.recall(*shaped[:2], valid.view(4, 6)).isnan(), streamed.per_class()[0] == 0)


def test_classes_that_the_teacher_rules_out_add_nothing():
    student, teacher = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[2.0, 1.0, -math.inf]])
    assert float(scores.kl(student, teacher)) == pytest.approx(float(scores.kl(student[:, :2], teacher[:, :2])))
    assert float(scores.kl(student, torch.tensor([[2.0, 1.0, 0.0]]))) == math.inf


def test_recall_by_class():
    logits, labels, _ = drawn()
    labels[labels == 6] = 5
    right = logits.argmax(-1) == labels
    expected = [float(right[labels == c].double().mean()) for c in range(6)]
    found = scores.recall(logits, labels)
    assert found[:6].tolist() == pytest.approx(expected)
    assert found[6].isnan(), "a class without samples has none"
    streamed = Scores()
    streamed.update(logits[:90], labels[:90])
    streamed.update(logits[90:], labels[90:])
    count, hits = streamed.per_class()
    assert torch.equal(count, torch.bincount(labels, minlength=7).double())
    assert (hits[:6] / count[:6]).tolist() == pytest.approx(expected)


def test_sums_are_in_double_precision():
    """Half precision logits, and more positions than a float32 sum of ones can hold apart."""
    logits, labels, teacher = drawn(300)
    half = [logits.half(), labels, teacher.bfloat16()]
    assert by_functions(*half) == pytest.approx(naive(half[0].double(), labels, half[2].double()), rel=1e-12)
    assert scores.nll(logits, labels).dtype == torch.float64
    streamed = Scores()
    streamed._sums = {"accuracy": 2.0**24, "nll": 0.0, "brier": 0.0}
    streamed.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert streamed._sums["accuracy"] == 2**24 + 1


def test_logits_keep_no_graph_and_are_not_changed():
    logits, labels, teacher = drawn(10)
    logits.requires_grad_()
    before = logits.detach().clone()
    streamed = Scores()
    streamed.update(logits, labels, teacher)
    assert not scores.brier(logits, labels).requires_grad
    assert torch.equal(logits, before)


def test_nothing_is_not_a_number():
    logits, labels, teacher = drawn(4)
    none = torch.zeros(4, dtype=torch.bool)
    assert all(math.isnan(value) for value in by_functions(logits, labels, teacher, none).values())
    empty = Scores()
    empty.update(logits, labels, valid=none)
    with pytest.raises(ValueError, match="no valid position was seen"):
        empty.compute()
    empty.update(logits, labels)
    assert set(empty.compute()) == {"accuracy", "nll", "brier", "ece"}, "without a teacher nothing is said of one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels are \[3\] for logits \[4, 7\]: give \[4\]"),
        ({"labels": torch.tensor([0, 7, -1, 0])}, "labels -1, 7 are no classes, which are 0 to 6"),
        ({"teacher_logits": torch.zeros(4, 8)}, r"the teacher's logits are \[4, 8\], the student's \[4, 7\]"),
        ({"valid": torch.ones(4, 7, dtype=torch.bool)}, r"valid are \[4, 7\] for logits \[4, 7\]"),
        ({"logits": torch.tensor(1.0)}, r"logits are \[\]: give \[\.\.\., C\]"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    logits, labels, teacher = drawn(4)
    given = {"logits": logits, "labels": labels, "teacher_logits": teacher, **change}
    with pytest.raises(ValueError, match=message):
        Scores().update(**given)


def test_batches_that_do_not_fit_together():
    logits, labels, teacher = drawn(4)
    streamed = Scores()
    streamed.update(logits, labels, teacher)
    with pytest.raises(ValueError, match="teacher_logits came with some batches and not with others"):
        streamed.update(logits, labels)
    with pytest.raises(ValueError, match="logits have 3 classes, earlier batches had 7"):
        streamed.update(logits[:, :3], labels.clamp(max=2), teacher[:, :3])
    with pytest.raises(ValueError, match="bins is 0: give at least 1"):
        Scores(bins=0)
