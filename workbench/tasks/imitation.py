"""Tasks without labels: the output is compared with a teacher's for the same inputs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from workbench.tasks.base import Task
from workbench.tasks.outputs import OutputType

_TARGET = "target"
_LAGS = 8


class Imitation(Task, ABC):
    """A task whose targets are a teacher's outputs, which the distillation module puts into the batch."""

    @abstractmethod
    def with_target(self, batch: Any, target: Tensor) -> Any:
        """The batch, with what the output is compared with."""


@final
class Embedding(Imitation):
    """Embeddings [B, D] that point where a teacher's point. A batch is a mapping, given to the model by keyword.

    Loss: 1 - cos(output, target), mean over the batch. Metrics: ``cosine``, its mean in [-1, 1]; ``spearman``, the rank
    correlation of the cosines between samples here and there, over each sample of a split and the 8 that follow it.
    """

    @property
    def outputs(self) -> OutputType:
        """Embeddings."""
        return OutputType("embedding")

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Mean cosine, the higher the better."""
        return "cosine", "max"

    def with_target(self, batch: Any, target: Tensor) -> Any:
        """The batch with the teacher's embeddings."""
        return {**batch, _TARGET: target}

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """((), everything but the target)."""
        if not isinstance(batch, Mapping):
            raise ValueError(f"the batch is a {type(batch).__name__}: give a mapping of the model's arguments")
        return (), {str(name): value for name, value in batch.items() if name != _TARGET}

    def targets(self, batch: Any) -> Tensor:
        """The teacher's embeddings, [B, D]."""
        target = batch.get(_TARGET) if isinstance(batch, Mapping) else None
        if isinstance(target, Tensor):
            return target
        raise ValueError("the batch has no target, the teacher's embeddings: train by job distill, with a teacher")

    def valid(self, batch: Any) -> Tensor:
        """[B]: every sample counts."""
        first = next(value for value in batch.values() if isinstance(value, Tensor))
        return torch.ones(len(first), dtype=torch.bool, device=first.device)

    def output(self, raw: Any) -> Tensor:
        """The embeddings themselves."""
        if isinstance(raw, Tensor) and raw.ndim == 2:
            return raw
        form = f"a tensor {list(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
        raise ValueError(f"the model returned {form}: embeddings [B, D] are needed, as a SentenceEncoder gives")

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Mean of 1 - cos; [B, D] -> scalar."""
        return 1 - _cosines(output, self.targets(batch)).mean()

    def metrics(self, prefix: str = "") -> MetricCollection:
        """``cosine`` and ``spearman``."""
        return MetricCollection(
            {"cosine": MeanCosine(), "spearman": SpearmanOfPairs()}, compute_groups=False, prefix=prefix
        )


def _cosines(output: Tensor, target: Tensor) -> Tensor:
    if output.shape != target.shape:
        raise ValueError(
            f"the embeddings are {list(output.shape)} and the teacher's {list(target.shape)}: "
            "give the student an output as wide as the teacher's"
        )
    dtype = torch.promote_types(output.dtype, torch.float32)
    return torch.cosine_similarity(output.to(dtype), target.to(dtype), dim=-1)


@final
class MeanCosine(Metric):
    """Mean cosine of embeddings with their targets, both [B, D]; NaN over none."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self.total = self.total + _cosines(output, target).sum()
        self.count = self.count + len(output)

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.count


@final
class SpearmanOfPairs(Metric):
    """Rank correlation between the cosines of pairs of samples, here and in the targets; NaN below three samples.

    The pairs are each sample and the 8 that follow it, round the end: n times 8 instead of n squared.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    outputs: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("outputs", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Keep a batch."""
        self.outputs.append(output.detach().float())
        self.targets.append(target.detach().float())

    def compute(self) -> Tensor:
        """The correlation over all samples so far."""
        from scipy.stats import spearmanr
        from torchmetrics.utilities import dim_zero_cat

        if not len(self.outputs):
            return torch.tensor(float("nan"))
        output, target = dim_zero_cat(self.outputs), dim_zero_cat(self.targets)
        if len(output) < 3:
            return torch.tensor(float("nan"))
        lags = range(1, min(_LAGS, len(output) - 1) + 1)
        here, there = (
            torch.cat([torch.cosine_similarity(part, part.roll(-lag, 0), dim=-1) for lag in lags]).cpu().numpy()
            for part in (output, target)
        )
        correlation: Any = spearmanr(here, there)
        return torch.tensor(float(correlation.statistic), device=output.device)
