"""Set-ups of people whose labels are a yes or no, several at once, or a class for each pixel."""

import functools
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distill import DistillModule, SoftTargets
from prune import GradualPruning
from tests.helpers.trainers import QUIET
from tests.setups.base import Setup
from workbench import TaskModule
from workbench.tasks import Binary, MultiLabel, Segmentation, Task
from workbench.training.module import SupervisedModule

SGD = functools.partial(torch.optim.SGD, lr=0.3)
TEMPERATURE, ALPHA = 2.0, 0.7


def _fitted(module: SupervisedModule, x: Tensor, y: Tensor, *callbacks: lp.Callback) -> dict[str, float]:
    """Three epochs of two batches of unlike sizes."""
    data: Any = DataLoader(TensorDataset(x, y), batch_size=len(x) - len(x) // 3)
    trainer = lp.Trainer(**QUIET, max_epochs=3, callbacks=[*callbacks])
    trainer.fit(module, data, data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _trained_distilled_and_pruned(
    task: Task, teacher: nn.Module, student: nn.Module, x: Tensor, y: Tensor
) -> tuple[float, dict[str, float]]:
    """The soft loss of the untrained student for the whole of x, and what the pruned one's last epoch logs."""
    before = task.loss(task.output(teacher(x)), (x, y)).item()
    after = _fitted(TaskModule(teacher, task, SGD), x, y)
    assert after["val/loss"] < before
    module = DistillModule(student, teacher, task, SoftTargets(TEMPERATURE, ALPHA), SGD)
    step = module.step((x, y))
    values = {name: value.item() for name, value in step.logged.items()}
    own = task.loss(task.output(student(x)), (x, y)).item()
    assert values["hard"] == pytest.approx(own, rel=1e-5)
    assert values["loss"] == pytest.approx(ALPHA * values["soft"] + (1 - ALPHA) * own, rel=1e-5)
    sparse = GradualPruning(density=0.5, begin="1it", end="4it", every="1it")
    logged = _fitted(module, x, y, sparse)
    weights = [p for name, p in student.named_parameters() if p.ndim > 1 and name.removesuffix(".weight") != name]
    assert sum(int((p != 0).sum()) for p in weights) <= sum(p.numel() for p in weights) * 0.5 + 1
    assert logged["val/loss"] == pytest.approx(task.loss(task.output(student(x)), (x, y)).item(), rel=1e-4)
    return values["soft"], logged


def _bernoulli(teacher: Tensor, student: Tensor) -> float:
    """T^2 KL of yes and no, label by label."""
    t, s = torch.sigmoid(teacher.double() / TEMPERATURE), torch.sigmoid(student.double() / TEMPERATURE)
    return float(TEMPERATURE**2 * (t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()).mean())


def _binary() -> None:
    """Spam or not, one logit in a column, some rows not labelled."""
    torch.manual_seed(0)
    x = torch.randn(24, 20)
    y = (x[:, 0] + x[:, 1] > 0).float()
    y[::7] = float("nan")
    teacher, student = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 1)), nn.Linear(20, 1)
    start = student(x).detach()[:, 0]
    soft, logged = _trained_distilled_and_pruned(Binary(), teacher, student, x, y)
    known = ~y.isnan()
    assert soft == pytest.approx(_bernoulli(teacher(x).detach()[known, 0], start[known]), rel=1e-4)
    right = (student(x)[:, 0] > 0) == y.bool()
    assert logged["val/accuracy"] == pytest.approx(float(right[known].float().mean()))
    pairs = [(a, b) for a in student(x)[known & (y == 1), 0] for b in student(x)[known & (y == 0), 0]]
    assert logged["val/auroc"] == pytest.approx(sum(float(a > b) for a, b in pairs) / len(pairs))


def _multi_label() -> None:
    """Tags of a document, some of which nobody looked for."""
    torch.manual_seed(0)
    x = torch.randn(24, 20)
    y = (x[:, :4] > 0.3).long()
    y[::5, 2] = -1
    task = MultiLabel(4, pos_weight=[1.0, 2.0, 1.0, 3.0], ignore_index=-1)
    teacher, student = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)), nn.Linear(20, 4)
    start = student(x).detach()
    soft, logged = _trained_distilled_and_pruned(task, teacher, student, x, y)
    known = y >= 0
    assert soft == pytest.approx(_bernoulli(teacher(x).detach()[known], start[known]), rel=1e-4)
    yes, told = (y == 1) & known, (student(x) > 0) & known
    assert logged["val/f1"] == pytest.approx(float(2 * (yes & told).sum() / (yes.sum() + told.sum())))
    assert logged["val/nll"] == pytest.approx(
        F.binary_cross_entropy_with_logits(student(x)[known], y[known].float()).item(), rel=1e-4
    )


class _Segmenter(nn.Module):
    """Logits at half the resolution, in a dict, as torchvision has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(x)}


def _segmentation() -> None:
    """Bright and dark stripes on a ground, with a border that nobody labelled."""
    torch.manual_seed(0)
    y = torch.randint(3, (9, 1, 9)).expand(9, 8, 9).clone()
    x = y[:, None].float() - 1 + 0.1 * torch.randn(9, 1, 8, 9)
    y[:, :, 0] = 255
    task = Segmentation(3, ignore_index=255, class_weights=[0.5, 1.0, 1.0])
    teacher, student = _Segmenter(8), _Segmenter(4)

    def enlarged(network: nn.Module) -> Tensor:
        return F.interpolate(network(x)["out"].detach(), size=(8, 9), mode="bilinear")

    start = enlarged(student)
    soft, logged = _trained_distilled_and_pruned(task, teacher, student, x, y)
    known = y != 255
    t, s = ((z.double() / TEMPERATURE).log_softmax(1) for z in (enlarged(teacher), start))
    kl = (t.exp() * (t - s)).sum(1)[known].mean()
    assert soft == pytest.approx(float(TEMPERATURE**2 * kl), rel=1e-4)
    predicted = enlarged(student).argmax(1)
    scores = []
    for c in range(3):
        both = ((predicted == c) & (y == c) & known).sum()
        union = (((predicted == c) | (y == c)) & known).sum()
        scores += [float(both / union)] if union else []
    assert logged["val/mean_iou"] == pytest.approx(sum(scores) / len(scores), rel=1e-4)
    assert logged["val/accuracy"] == pytest.approx(float((predicted == y)[known].float().mean()), rel=1e-4)


SETUPS: list[Setup] = [
    Setup("tasks", "Binary", _binary),
    Setup("tasks", "MultiLabel", _multi_label),
    Setup("tasks", "Segmentation", _segmentation),
]
