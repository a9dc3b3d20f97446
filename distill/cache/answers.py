"""What is stored of a teacher's outputs for a batch: by name, sample by sample, without padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from distill.cache.sampling import SampledIds, draw, generator_for
from distill.cache.store import Entry, dtype_name
from distill.teacher import Teacher
from workbench.models.forward import inputs_of
from workbench.models.positions import tokens_of
from workbench.tasks import OutputType, Task, find_logits


class Targets(NamedTuple):
    """A teacher's outputs for a batch, on the CPU.

    Args:
        values: By name, [B, ...].
        mask: bool [B, L], False at padding, if the batch has an ``attention_mask``.
    """

    values: dict[str, Tensor]
    mask: Tensor | None


@dataclass(frozen=True)
class TargetExtractor:
    """Runs a teacher on batches and selects what is stored of its outputs.

    Args:
        teacher: The teacher.
        features: Layers whose inputs or outputs are stored.
        task: Reads the model's inputs from a batch; :func:`workbench.models.forward.inputs_of` does if None.
        device: Where the teacher runs.
        draws: How many ids are sampled from the logits; 0 stores the logits.
        dtype: Of the stored values; the teacher's own if None.
        seed: Of the sampled ids.
    """

    teacher: Teacher
    features: tuple[str, ...]
    task: Task | None
    device: torch.device
    draws: int
    dtype: str | None
    seed: int

    def __call__(self, batch: Any, count: int) -> Targets:
        """The teacher's outputs for a batch of ``count`` samples.

        Raises:
            ValueError: If an output has no row a sample, or there are neither logits nor features.
        """
        args, kwargs = inputs_of(batch) if self.task is None else self.task.inputs(batch)
        args, kwargs = tree_map_only(Tensor, lambda value: value.to(self.device), (args, kwargs))
        if self.task is not None:
            self.teacher.check_outputs(self.task.outputs)
        raw, features = self.teacher.outputs(args, kwargs, self.features)
        logits = find_logits(raw) if self.teacher.logits is None else self.teacher.select(raw)
        if logits is None and not features:
            raise ValueError(
                f"the teacher returned {type(raw).__name__} without logits: name features to keep, or say "
                "by Teacher(..., logits=...) where they are"
            )
        if logits is not None and self.draws:
            outputs = OutputType("classes") if self.task is None else self.task.outputs
            if outputs != OutputType("classes") or logits.ndim > 3 or logits.shape[-1] < 2:
                raise ValueError(
                    f"logits are {list(logits.shape)}: only classes along the last axis, [B, C] or [B, L, C], can be "
                    "sampled; use store: full"
                )
            # The padding rows of an lm head are not scored, so their ids must not be sampled.
            logits = logits[..., : getattr(self.task, "vocabulary", None)]
        values = {} if logits is None else {"logits": logits}
        values |= {f"feature/{name}": value for name, value in features.items()}
        for name, value in values.items():
            if value.dim() == 0 or len(value) != count or not value.is_floating_point():
                raise ValueError(
                    f"'{name}' is {value.dtype} {list(value.shape)} for a batch of {count}: only numbers with a row a "
                    "sample can be kept"
                )
        mask = tokens_of(batch)
        on_cpu = {name: value.detach().cpu() for name, value in values.items()}
        return Targets(on_cpu, None if mask is None else mask.cpu())

    def entries(self, targets: Targets) -> dict[str, Entry]:
        """How each value is stored, from one example."""
        return {name: self._entry(name, value, targets.mask) for name, value in targets.values.items()}

    def pack(
        self, targets: Targets, indices: Sequence[int], digests: Tensor, entries: Mapping[str, Entry]
    ) -> dict[str, Tensor]:
        """The stored tensors of the first ``len(indices)`` samples, for :func:`join`.

        Raises:
            ValueError: If a shape is not that of ``entries``, or a value does not fit into its dtype.
        """
        count, mask = len(indices), None if targets.mask is None else targets.mask[: len(indices)]
        packed = {"digest": digests[:count]}
        if mask is not None and any(entry.ragged for entry in entries.values()):
            packed["lengths"] = mask.sum(1)
        if (actual := self.entries(targets)) != entries:
            name = next(name for name in {**entries, **actual} if entries.get(name) != actual.get(name))
            raise ValueError(
                f"'{name}' is {_described(actual.get(name))} in one batch and {_described(entries.get(name))} in "
                "another: give samples of one shape, or of several lengths with an attention_mask of [batch, length] "
                "in the batch"
            )
        for name, entry in entries.items():
            value = targets.values[name][:count]
            if entry.draws:
                packed |= self._sampled(value, mask if entry.ragged else None, indices)._asdict()
                packed["log_probs"] = _narrowed(name, packed["log_probs"], entry.dtype)
            else:
                own = value[mask] if entry.ragged and mask is not None else value
                # A copy, for a view would keep the whole batch.
                packed[name] = _narrowed(name, own, entry.dtype).clone(memory_format=torch.contiguous_format)
        return packed

    def fingerprint(self) -> dict[str, Any]:
        """The parts of a cache's fingerprint that depend on the teacher and on what is stored."""
        return {
            "precision": self.teacher.precision,
            "teacher": self.teacher.fingerprint(),
            "task": None if self.task is None else f"{type(self.task).__module__}.{type(self.task).__qualname__}",
            "features": sorted(self.features),
            "store": "sampled" if self.draws else "full",
            "draws": self.draws,
            "seed": self.seed if self.draws else 0,
            "dtype": self.dtype,
        }

    def _entry(self, name: str, value: Tensor, mask: Tensor | None) -> Entry:
        ragged = mask is not None and value.dim() >= 3 and value.shape[:2] == mask.shape
        shape = tuple(value.shape[2 if ragged else 1 :])
        if self.draws and name == "logits":
            return Entry(self.dtype or "float32", shape[:-1], ragged, self.draws, shape[-1])
        return Entry(self.dtype or dtype_name(value.dtype), shape, ragged)

    def _sampled(self, logits: Tensor, mask: Tensor | None, indices: Sequence[int]) -> SampledIds:
        drawn = []
        for row, (index, value) in enumerate(zip(indices, logits)):
            own = value[mask[row]] if mask is not None else value.reshape(-1, value.shape[-1])
            drawn.append(draw(own, self.draws, generator_for(self.seed, int(index), getattr(index, "epoch", 0))))
        return SampledIds(*map(torch.cat, zip(*drawn)))


def join(packed: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a shard: those of its batches concatenated, with lengths turned into offsets."""
    joined = {name: torch.cat([each[name] for each in packed]) for name in packed[0]}
    for lengths, cuts in (("lengths", "offsets"), ("sizes", "pointer")):
        if lengths in joined:
            joined[cuts] = torch.cat([torch.zeros(1, dtype=torch.int64), joined.pop(lengths).cumsum(0)])
    return joined


def _narrowed(name: str, value: Tensor, dtype: str) -> Tensor:
    narrow = value.to(getattr(torch, dtype))
    if narrow.dtype != value.dtype and not torch.equal(narrow.isfinite(), value.isfinite()):
        raise ValueError(f"'{name}' has values beyond the range of {dtype}: keep bfloat16 or float32")
    return narrow


def _described(entry: Entry | None) -> str:
    if entry is None:
        return "absent"
    return f"{entry.dtype} {'[length, ...]' if entry.ragged else ''}{list(entry.shape)} a sample"
