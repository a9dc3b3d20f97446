import functools
import math
import os

import lightning.pytorch as lp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

from tests.helpers.ranks import on_ranks
from tests.helpers.trainers import QUIET
from workbench.models import MLP
from workbench.tasks import Regression, Task
from workbench.tasks.regression import R2
from workbench.training.module import TaskModule

NAN = float("nan")


def naive(output, targets, kind, delta):
    """Element by element, in python floats (Huber 1964)."""
    values = []
    for a, b in zip(output.flatten().tolist(), targets.flatten().tolist()):
        if not math.isnan(b):
            e = abs(a - b)
            huber = e * e / 2 if e <= delta else delta * e - delta * delta / 2
            values.append({"mse": e * e, "mae": e, "huber": huber}[kind])
    return sum(values) / max(len(values), 1)


def some(shape, gaps=True, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    output, targets = (2 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return output, targets.masked_fill(torch.rand(shape, generator=generator) < 0.3, NAN) if gaps else targets


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 4, 3)])
@pytest.mark.parametrize("kind", ["mse", "mae", "huber"])
@pytest.mark.parametrize("gaps", [True, False])
def test_loss_is_the_formula(shape, kind, gaps):
    output, targets = some(shape, gaps)
    task = Regression(kind, delta=0.7)
    expected = pytest.approx(naive(output, targets, kind, 0.7), rel=1e-12)
    assert task.loss(output, (None, targets)).item() == expected
    assert task.loss(output, {"x": None, "labels": targets}).item() == expected
    assert int(task.valid((None, targets)).sum()) == sum(not math.isnan(v) for v in targets.flatten().tolist())


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_loss_in_pieces_weighed_by_valid_elements_is_the_whole(data):
    output, targets = some((8, 3), seed=data.draw(st.integers(0, 1000)))
    cuts = sorted(data.draw(st.lists(st.integers(1, 7), max_size=3, unique=True)))
    task = Regression(data.draw(st.sampled_from(["mse", "mae", "huber"])))
    parts = list(zip([0, *cuts], [*cuts, 8]))
    counts = [task.valid((None, targets[a:b])).sum() for a, b in parts]
    losses = [task.loss(output[a:b], (None, targets[a:b])) for a, b in parts]
    whole = task.loss(output, (None, targets))
    torch.testing.assert_close(sum(n * x for n, x in zip(counts, losses)) / sum(counts).clamp(min=1), whole)


@pytest.mark.parametrize("kind", ["mse", "mae", "huber"])
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_what_stands_where_no_target_is_does_not_matter(kind, bad):
    output, targets = some((6, 2))
    gone = targets.isnan()
    clean = output.clone().requires_grad_()
    dirty = output.masked_fill(gone, bad).requires_grad_()
    losses = [Regression(kind).loss(each, (None, targets)) for each in (clean, dirty)]
    torch.stack(losses).sum().backward()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(clean.grad, dirty.grad)
    assert not dirty.grad[gone].any()
    assert dirty.grad[~gone].all()


def test_no_target_at_all_is_zero_with_its_graph():
    output = torch.randn(3, 2, requires_grad=True)
    loss = Regression().loss(output, (None, torch.full((3, 2), NAN)))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(output.grad, torch.zeros(3, 2))


def test_half_precision_is_scored_in_float32():
    output, targets = some((64, 3), dtype=torch.float32)
    loss = Regression().loss(output.bfloat16(), (None, targets))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, Regression().loss(output.bfloat16().float(), (None, targets)), rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_metrics_are_exact_over_uneven_batches(offset):
    """Also where the mean is large: single precision squares it beyond what the variance is."""
    output, targets = some((50, 2), dtype=torch.float32)
    output, targets = output / 4 + targets.nan_to_num() + offset, targets + offset
    metrics = Regression().metrics("val/")
    for a, b in ((0, 1), (1, 20), (20, 20), (20, 50)):
        metrics.update(output[a:b], targets[a:b])
    known = ~targets.isnan()
    for name, reference in (("mse", MeanSquaredError()), ("mae", MeanAbsoluteError()), ("r2", R2Score())):
        reference.set_dtype(torch.float64)
        reference.update(output[known].double(), targets[known].double())
        assert metrics.compute()[f"val/{name}"].item() == pytest.approx(reference.compute().item(), rel=1e-4)
    assert 0.5 < metrics.compute()["val/r2"] < 1
    metrics.reset()
    metrics.update(output[:9], targets[:9])
    assert metrics.compute()["val/mse"].item() == pytest.approx(Regression().loss(output[:9], (0, targets[:9])).item())


def test_metrics_over_nothing_are_nan():
    metrics = Regression().metrics()
    metrics.update(torch.zeros(2), torch.full((2,), NAN))
    assert all(value.isnan() for value in metrics.compute().values())
    metrics.update(torch.zeros(2), torch.ones(2))
    found = metrics.compute()
    assert (found["mse"], found["mae"]) == (1, 1)
    assert found["r2"].isnan(), "targets that do not vary"


def test_called_as_a_metric_too():
    output, targets = some((9,), gaps=False)
    metric = R2()
    for a, b in ((0, 4), (4, 9)):
        assert metric(output[a:b], targets[a:b]).item() == pytest.approx(R2Score()(output[a:b], targets[a:b]).item())
    assert metric.compute().item() == pytest.approx(R2Score()(output, targets).item())


def test_monitor_is_one_of_the_metrics():
    name, better = Regression().monitor
    assert (name, better) == ("mse", "min")
    assert name in Regression().metrics()
    assert isinstance(Regression(), Task)


def test_batches():
    x, y = torch.zeros(4, 3), torch.zeros(4)
    args, kwargs = Regression().inputs((x, x, y))
    assert (len(args), kwargs) == (2, {})
    args, kwargs = Regression().inputs({"x": x, "lengths": y, "labels": y})
    assert (args, list(kwargs)) == ((), ["x", "lengths"])
    assert Regression().targets((x, torch.tensor([1, 2]))).dtype == torch.float32


@pytest.mark.parametrize(("given", "shape"), [((4, 6), [3, 2]), ((4, 1), []), ((4,), []), ((4, 3, 2), [6])])
def test_outputs_are_brought_to_the_shape(given, shape):
    raw = torch.arange(math.prod(given)).reshape(given).float()
    output = Regression(shape=shape).output({"logits": raw})
    assert output.shape == (4, *shape)
    assert torch.equal(output.flatten(), raw.flatten())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "mean"}, "kind='mean': use one of mse, mae, huber"),
        ({"delta": 0.0}, r"delta=0\.0: give a finite number above 0"),
        ({"delta": math.inf}, "delta=inf"),
        ({"delta": NAN}, "delta=nan"),
        ({"shape": [2, 0]}, r"shape=\[2, 0\]: give sizes of at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Regression(**arguments)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3), "the batch is a Tensor, without a tensor of labels"),
        ((torch.zeros(3),), "the batch is a tuple"),
        ({"x": torch.zeros(3)}, "a mapping of x, without a tensor of labels"),
        ((torch.zeros(3), torch.zeros(3, dtype=torch.bool)), r"labels are torch\.bool: give numbers"),
        ((torch.zeros(3), torch.zeros(3, dtype=torch.complex64)), r"labels are torch\.complex64"),
    ],
)
def test_wrong_batches_are_named(batch, message):
    for look in (Regression().targets, Regression().valid):
        with pytest.raises(ValueError, match=message):
            look(batch)


def test_wrong_shapes_are_named():
    """[B, 1] and [B] would be broadcast to [B, B], and learnt is the mean."""
    expected = r"the output is \[4, 1\] for targets \[4\]: .* by shape=\[\]"
    with pytest.raises(ValueError, match=expected):
        Regression().loss(torch.zeros(4, 1), (None, torch.zeros(4)))
    for metric in Regression().metrics().values():
        with pytest.raises(ValueError, match=expected):
            metric.update(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match=r"the output is \[4, 5\], which is not 6 numbers a sample for shape=\[3, 2\]"):
        Regression(shape=[3, 2]).output(torch.zeros(4, 5))
    with pytest.raises(ValueError, match="returned str without logits"):
        Regression().output("x")


# --- the gradient of an update is a mean over all its elements

OPTIONS = {**QUIET, "use_distributed_sampler": False}


def trained(order, size, **options):
    """Weights after an update of SGD, and what was logged, over rows of which few or many elements count."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
    y = y.masked_fill(torch.rand(16, 3, generator=generator) < torch.arange(16)[:, None] / 16, NAN)
    torch.manual_seed(1)
    network = MLP(6, [5], 3)
    module = TaskModule(network, Regression(), functools.partial(torch.optim.SGD, lr=0.5))
    trainer = lp.Trainer(**OPTIONS, max_epochs=1, **options)
    loader = DataLoader(TensorDataset(x[order], y[order]), size)
    trainer.fit(module, loader, loader)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return nn.utils.parameters_to_vector(network.parameters()).tolist(), logged


def test_the_same_rows_in_pieces_give_the_same_gradient_and_scores():
    weights, logged = trained(range(16), 16)
    assert set(logged) == {"train/loss", "val/loss", "val/mse", "val/mae", "val/r2"}
    found, scores = trained(range(16), 4, accumulate_grad_batches=4)
    assert found == pytest.approx(weights, abs=1e-6)
    assert scores == pytest.approx(logged, rel=1e-5)
    untouched, _ = trained(range(16), 16, limit_train_batches=0)
    assert max(abs(a - b) for a, b in zip(weights, untouched)) > 1e-3


def _ranked():
    rank = int(os.environ["RANK"])
    return trained(range(8 * rank, 8 * rank + 8), 4, accumulate_grad_batches=2, devices=2, strategy="ddp")


def test_the_same_rows_on_two_ranks_give_the_same_gradient_and_scores():
    weights, logged = trained(range(16), 16)
    for found, scores in on_ranks(_ranked):
        assert found == pytest.approx(weights, abs=1e-6)
        assert scores == pytest.approx(logged, rel=1e-5)
