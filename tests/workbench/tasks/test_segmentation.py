import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.modeling_outputs import SemanticSegmenterOutput

from tests.helpers.ranks import on_ranks
from tests.helpers.task_training import trained
from workbench.tasks import OutputType, Segmentation, scored
from workbench.tasks.segmentation import MeanIoU


def some(shape=(4, 5, 6), classes=3, ignore=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], classes, *shape[1:], generator=generator)
    labels = torch.randint(classes, shape, generator=generator)
    if ignore is not None:
        labels[torch.rand(shape, generator=generator) < 0.3] = ignore
    return logits, labels


def naive_iou(logits, labels, classes, ignore=None):
    """Pixel by pixel; classes last."""
    scores = []
    for c in range(classes):
        both = union = 0
        for z, y in zip(logits.reshape(-1, classes).tolist(), labels.flatten().tolist()):
            if y != ignore:
                p = z.index(max(z))
                both += p == c == y
                union += c in (p, y)
        if union:
            scores.append(both / union)
    return sum(scores) / len(scores)


def test_monitor_is_one_of_the_metrics():
    assert Segmentation(3).monitor == ("mean_iou", "max")
    assert set(Segmentation(3).metrics()) == {"mean_iou", "accuracy", "nll"}
    assert Segmentation(3).outputs == OutputType("classes", 1)


@pytest.mark.parametrize("shape", [(4, 7), (4, 5, 6), (2, 3, 4, 5)])
@pytest.mark.parametrize("ignore", [None, 255, -100])
@pytest.mark.parametrize("weights", [None, [1.0, 5.0, 0.2]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_that_of_torch(shape, ignore, weights, smoothing):
    logits, labels = some(shape, ignore=ignore)
    task, batch = Segmentation(3, smoothing, ignore, weights), (None, labels)
    output = task.output(logits)
    assert output.shape == (*shape, 3)
    expected = F.cross_entropy(
        logits,
        labels,
        weight=None if weights is None else torch.tensor(weights),
        ignore_index=-1 if ignore is None else ignore,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(task.loss(output, batch), expected)
    torch.testing.assert_close(task.loss(output.contiguous(), batch), expected)
    assert task.valid(batch).shape == shape


def test_what_a_network_may_return():
    task, logits = Segmentation(3), some()[0]
    expected = task.output(logits)
    auxiliary = torch.zeros(4, 3, 5, 6)
    for raw in ({"out": logits, "aux": auxiliary}, {"logits": logits}, SemanticSegmenterOutput(logits=logits)):
        assert torch.equal(task.output(raw), expected)


@pytest.mark.parametrize("ignore", [None, 255, 1])
def test_mean_iou_is_counted_over_the_split(ignore):
    logits, labels = some((6, 5, 4), ignore=ignore)
    output = logits.movedim(1, -1)
    metric = MeanIoU(3, ignore)
    for a, b in ((0, 1), (1, 1), (1, 6)):
        metric.update(output[a:b], labels[a:b])
    expected = MulticlassJaccardIndex(3, ignore_index=ignore)(logits, labels)
    assert metric.compute().item() == pytest.approx(expected.item())
    if ignore != 1:
        assert metric.compute().item() == pytest.approx(naive_iou(output, labels, 3, ignore))
    parts = [MeanIoU(3, ignore)(output[a:b], labels[a:b]) for a, b in ((0, 1), (1, 6))]
    assert metric.compute().item() != pytest.approx(sum(parts).item() / 2), "not a mean of batches"


def test_a_class_that_never_occurs_is_left_out():
    labels = torch.tensor([[[0, 1, 1, 0]]])
    output = F.one_hot(torch.tensor([[[0, 1, 0, 0]]]), 3).float()
    assert MeanIoU(3)(output, labels).item() == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_metrics_over_nothing_are_nan():
    metrics = Segmentation(3, ignore_index=255).metrics()
    metrics.update(torch.randn(2, 4, 4, 3), torch.full((2, 4, 4), 255))
    assert all(value.isnan() for value in metrics.compute().values())


def segformer(classes: int = 3) -> SegformerForSemanticSegmentation:
    torch.manual_seed(0)
    config = SegformerConfig(
        num_labels=classes,
        depths=[1, 1],
        num_encoder_blocks=2,
        hidden_sizes=[8, 8],
        decoder_hidden_size=8,
        num_attention_heads=[1, 1],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        semantic_loss_ignore_index=255,
    )
    return SegformerForSemanticSegmentation(config).eval()


@pytest.mark.parametrize("size", [(32, 32), (30, 37)])
def test_logits_at_a_quarter_are_scored_as_transformers_does(size):
    model, (_, labels) = segformer(), some((2, *size), ignore=255)
    batch = {"pixel_values": torch.randn(2, 3, *size), "labels": labels}
    task = Segmentation(3, ignore_index=255)
    args, kwargs = task.inputs(batch)
    raw, expected = model(*args, **kwargs), model(**batch).loss
    assert raw.logits.shape[-2:] != size
    torch.testing.assert_close(task.loss(scored(task, raw, batch), batch), expected)
    torch.testing.assert_close(task.loss(task.output(raw), batch), expected)
    upsampled = F.interpolate(raw.logits, size=size, mode="bilinear", align_corners=False)
    for output in (scored(task, raw, batch), task.output(raw)):
        metrics = task.metrics()
        metrics.update(output, labels)
        values = metrics.compute()
        assert values["nll"].item() == pytest.approx(expected.item())
        assert values["mean_iou"].item() == pytest.approx(
            MulticlassJaccardIndex(3, ignore_index=255)(upsampled, labels).item()
        )
        assert values["accuracy"] == (upsampled.argmax(1) == labels)[labels != 255].float().mean()


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((2, 4, 5, 6), (2, 5, 6), r"logits are \[2, 4, 5, 6\]: give \[B, 3, H, W\]"),
        ((2, 5, 6, 3), (2, 5, 6), r"the classes at axis 1"),
        ((2, 3), (2,), r"logits are \[2, 3\]"),
        ((2, 3, 5, 6), (2, 1, 5, 6), r"for labels \[2, 1, 5, 6\]: give one class number for each position"),
        ((2, 3, 5, 6), (4, 5, 6), r"for labels \[4, 5, 6\]"),
    ],
)
def test_wrong_shapes_are_named(logits, labels, message):
    task, batch = Segmentation(3), (None, torch.zeros(labels, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        task.loss(task.output(torch.zeros(logits)), batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 1}, "classes=1: give at least 2; one logit a pixel is for Binary"),
        ({"classes": 3, "label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"classes": 3, "class_weights": [1.0, 2.0]}, r"class_weights are \[2\] for classes=3"),
        ({"classes": 2, "class_weights": [1.0, -2.0]}, "finite numbers of at least 0"),
        ({"classes": 2, "class_weights": [0.0, 0.0]}, "not all 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Segmentation(**arguments)


def test_labels_that_are_no_classes_are_named():
    logits, labels = some(ignore=255)
    with pytest.raises(ValueError, match="labels go from 0 to 255 and logits score 3 classes"):
        Segmentation(3).loss(Segmentation(3).output(logits), (None, labels))
    with pytest.raises(ValueError, match=r"labels are torch\.float32"):
        Segmentation(3).targets((None, labels.float()))


def _rank(parts):
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    metrics = Segmentation(3, ignore_index=255).metrics()
    metrics.update(*parts[rank])
    return {name: float(value) for name, value in metrics.compute().items()}


def test_two_ranks_are_one():
    logits, labels = some(ignore=255)
    output = logits.movedim(1, -1).contiguous()
    metrics = Segmentation(3, ignore_index=255).metrics()
    metrics.update(output, labels)
    expected = {name: float(value) for name, value in metrics.compute().items()}
    for found in on_ranks(_rank, [(output[:1], labels[:1]), (output[1:], labels[1:])]):
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_with_class_weights(accumulate):
    """Its loss is one weighted mean over the split, however it is put into batches."""
    torch.manual_seed(0)
    x, labels = torch.randn(9, 2, 6, 5), some((9, 6, 5), ignore=255)[1]
    task, network = Segmentation(3, ignore_index=255, class_weights=[0.01, 0.05, 0.002]), nn.Conv2d(2, 3, 1)
    whole = nn.Conv2d(2, 3, 1)
    whole.load_state_dict(network.state_dict())
    logged = trained(task, network, x, labels, accumulate_grad_batches=accumulate)
    if accumulate == 2:
        task.loss(task.output(whole(x)), (None, labels)).backward()
        for mine, theirs in zip(network.parameters(), whole.parameters()):
            torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad)
    loss = task.loss(task.output(network(x)), (None, labels))
    assert logged["val/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["val/nll"] != pytest.approx(logged["val/loss"], rel=1e-3)
