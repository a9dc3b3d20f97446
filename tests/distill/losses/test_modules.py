import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import losses
from distill.losses import FeatureLoss, LogitLoss
from tests.helpers.loss_table import FEATURE, LOGIT, Feature, Logit

LOGIT_LOSSES = [
    losses.SoftTarget,
    losses.ReverseKL,
    losses.JSD,
    losses.LogitMSE,
    losses.DKD,
    losses.DIST,
    losses.LabelSmoothing,
    losses.ShuffledOffClass,
]
# Of labels, numbers and embeddings: test_elementwise.py has their rows.
OTHER_LOSSES = [
    losses.AttentiveImitation,
    losses.BernoulliTarget,
    losses.EmbeddingCosine,
    losses.SquaredError,
    losses.TeacherBounded,
]
FEATURE_LOSSES = [
    losses.Hint,
    losses.Cosine,
    losses.AttentionTransfer,
    losses.AttentionRelation,
    losses.SimilarityPreserving,
    losses.RKD,
]


def some(*shape: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(*shape, dtype=torch.float64), 3 * torch.randn(*shape, dtype=torch.float64)


def test_every_loss_is_in_the_table_and_exported() -> None:
    """A new loss needs its row, or nothing above holds for it."""
    for kind, found in ((LogitLoss, LOGIT_LOSSES + OTHER_LOSSES), (FeatureLoss, FEATURE_LOSSES)):
        assert set(kind.__subclasses__()) == set(found)
        assert all(getattr(losses, loss.__name__) is loss for loss in found)
    assert {type(row.module(2.0)) for row in LOGIT.values()} == set(LOGIT_LOSSES)
    assert {type(row.module) for row in FEATURE.values()} == set(FEATURE_LOSSES)
    assert set(losses.__all__) <= set(dir(losses))


@pytest.mark.parametrize("loss", LOGIT.values(), ids=LOGIT)
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_a_module_on_logits_is_its_function(loss: Logit, temperature: float) -> None:
    student, teacher = some(4, 6)
    y, valid = torch.randint(6, (4,)), torch.tensor([True, False, True, True])
    module = loss.module(temperature)
    torch.manual_seed(3)  # what the row's generator draws
    found = module(student, teacher, valid, y)
    assert torch.equal(found, loss.call(student, teacher, temperature, valid, y))
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.parametrize("loss", FEATURE.values(), ids=FEATURE)
def test_a_module_on_features_is_its_function(loss: Feature) -> None:
    student, teacher = some(4, 5, 6)
    valid = torch.rand(4, 5) < 0.6
    assert torch.equal(loss.module(student, teacher, valid), loss.call(student, teacher, valid))
    assert torch.equal(loss.module(student, teacher), loss.call(student, teacher, None))


@pytest.mark.parametrize("kind", LOGIT_LOSSES)
def test_labels_and_teacher_are_asked_for_where_needed(kind: type[LogitLoss]) -> None:
    student, teacher = some(4, 6)
    loss: Any = kind()
    assert kind.needs_labels == (kind in (losses.DKD, losses.LabelSmoothing, losses.ShuffledOffClass))
    assert kind.needs_teacher == (kind is not losses.LabelSmoothing)
    if kind.needs_labels:
        with pytest.raises(ValueError, match=f"{kind.__name__} needs labels"):
            loss(student, teacher)
    else:
        assert torch.equal(loss(student, teacher), loss(student, teacher, None, torch.tensor([-100] * 4)))
    if not kind.needs_teacher:
        y = torch.randint(6, (4,))
        assert torch.equal(loss(student, None, labels=y), loss(student, teacher, labels=y))


def test_every_loss_says_which_outputs_it_compares() -> None:
    assert {kind for loss in OTHER_LOSSES for kind in loss.kinds} == {"labels", "numbers", "embedding"}
    assert losses.LogitMSE.kinds == {"classes", "labels", "numbers", "embedding"}
    assert all(loss.kinds == {"classes"} for loss in LOGIT_LOSSES if loss is not losses.LogitMSE)


def test_projectors_are_for_what_compares_number_by_number() -> None:
    assert {loss for loss in FEATURE_LOSSES if loss.projects} == {losses.Hint, losses.Cosine}


@pytest.mark.parametrize("kind", [kind for kind in LOGIT_LOSSES if kind is not losses.LabelSmoothing])
def test_standardised_logits_are_blind_to_shift_and_scale(kind: Any) -> None:
    """Sun et al. 2024: any loss takes z-scores."""
    student, teacher = some(4, 6)
    y, valid = torch.randint(6, (4,)), torch.tensor([True, False, True, True])
    loss = kind(standardize=True)
    values = []
    for s, t in ((student, teacher), (2 * student + 3, teacher / 5 - 1)):
        torch.manual_seed(0)
        values.append(loss(s, t, valid, y))
    assert torch.allclose(*values)
    torch.manual_seed(0)
    expected = kind()(losses.standardize(student), losses.standardize(teacher), valid, y)
    assert torch.allclose(values[0], expected)


@pytest.mark.parametrize("kind", [kind for kind in LOGIT_LOSSES if kind is not losses.LabelSmoothing])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_standardised_logits_and_masked_junk(kind: Any, junk: float) -> None:
    student, teacher = some(4, 6)
    y, valid = torch.randint(6, (4,)), torch.tensor([True, False, True, True])
    student[1], teacher[1] = junk, junk
    teacher[0, 5] = teacher[2, 5] = teacher[3, 5] = -float("inf")
    student.requires_grad_()
    value = kind(standardize=True)(student, teacher.requires_grad_(), valid, y % 5)
    (grad,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert not grad[1].any()


@pytest.mark.parametrize("kind", LOGIT_LOSSES + FEATURE_LOSSES)
def test_shows_its_numbers_and_survives_pickling(kind: Any) -> None:
    loss = kind()
    numbers = {
        name: parameter.default
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    assert repr(loss) == f"{kind.__name__}({', '.join(f'{name}={value}' for name, value in numbers.items())})"
    assert repr(pickle.loads(pickle.dumps(loss))) == repr(loss)


@pytest.mark.parametrize("kind", [LogitLoss, FeatureLoss])
def test_the_base_is_abstract(kind: Any) -> None:
    assert issubclass(kind, nn.Module)
    with pytest.raises(TypeError, match="abstract"):
        kind()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: losses.SoftTarget(0), "temperature is 0"),
        (lambda: losses.ReverseKL(-1), "temperature is -1"),
        (lambda: losses.JSD(float("nan")), "temperature is nan"),
        (lambda: losses.JSD(1.0, 2.0), "beta is 2"),
        (lambda: losses.DKD(0), "temperature is 0"),
        (lambda: losses.DKD(beta=-1), "beta is -1"),
        (lambda: losses.DIST(0), "temperature is 0"),
        (lambda: losses.DIST(intra=-1), "intra is -1"),
        (lambda: losses.LabelSmoothing(1), "smoothing is 1"),
        (lambda: losses.ShuffledOffClass(0), "temperature is 0"),
        (lambda: losses.AttentionRelation(0), "heads is 0"),
        (lambda: losses.RKD(-1), "distance is -1"),
        (lambda: losses.RKD(0, 0), "both 0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_training(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
