"""What is kept of a teacher's answer to a batch: by name, sample by sample, without padding."""

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
from workbench.tasks import Task, find_logits


class Targets(NamedTuple):
    """What a teacher says about a batch, on the CPU.

    Args:
        values: By name, [B, ...].
        mask: bool [B, L], True at a sample's own positions, if the batch has an ``attention_mask``.
    """

    values: dict[str, Tensor]
    mask: Tensor | None


@dataclass(frozen=True)
class TargetExtractor:
    """A teacher, and what of its answers is kept.

    Args:
        teacher: Whom to ask.
        features: Submodules whose inputs or outputs are kept.
        task: Reads batches; see :func:`distill.cache.cache_teacher` for None.
        device: Where.
        draws: How many ids are drawn from the logits; 0 to keep them.
        dtype: Of what is kept; its own if None.
        seed: Of the draws.
    """

    teacher: Teacher
    features: tuple[str, ...]
    task: Task | None
    device: torch.device
    draws: int
    dtype: str | None
    seed: int

    def __call__(self, batch: Any, count: int) -> Targets:
        """Ask about a batch of ``count`` samples.

        Raises:
            ValueError: If an output has no row a sample, or no logits are there and no features are named.
        """
        args, kwargs = inputs_of(batch) if self.task is None else self.task.inputs(batch)
        args, kwargs = tree_map_only(Tensor, lambda value: value.to(self.device), (args, kwargs))
        raw, features = self.teacher.outputs(args, kwargs, self.features)
        logits = find_logits(raw)
        if logits is None and not features:
            raise ValueError(
                f"the teacher returned {type(raw).__name__} without logits: name features to keep, or wrap it to "
                "return a tensor"
            )
        if logits is not None and self.draws:
            # Of a padded lm head: what a student is not scored on is not drawn either.
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
        kept = {name: value.detach().cpu() for name, value in values.items()}
        return Targets(kept, None if mask is None else mask.cpu())

    def entries(self, answer: Targets) -> dict[str, Entry]:
        """How each of the values is stored, read off one answer."""
        return {name: self._entry(name, value, answer.mask) for name, value in answer.values.items()}

    def pack(
        self, answer: Targets, indices: Sequence[int], digests: Tensor, entries: Mapping[str, Entry]
    ) -> dict[str, Tensor]:
        """Tensors of the first ``len(indices)`` samples, for :func:`join`.

        Raises:
            ValueError: If a shape is not that of ``entries``, or a value does not fit into its dtype.
        """
        count, mask = len(indices), None if answer.mask is None else answer.mask[: len(indices)]
        packed = {"digest": digests[:count]}
        if mask is not None and any(entry.ragged for entry in entries.values()):
            packed["lengths"] = mask.sum(1)
        if (found := self.entries(answer)) != entries:
            odd = next(name for name in {**entries, **found} if entries.get(name) != found.get(name))
            raise ValueError(
                f"'{odd}' is {_said(found.get(odd))} in one batch and {_said(entries.get(odd))} in another: give "
                "samples of one shape, or of several lengths with an attention_mask of [batch, length] in the batch"
            )
        for name, entry in entries.items():
            value = answer.values[name][:count]
            if entry.draws:
                packed |= self._drawn(value, mask if entry.ragged else None, indices)._asdict()
                packed["log_probs"] = _narrowed(name, packed["log_probs"], entry.dtype)
            else:
                own = value[mask] if entry.ragged and mask is not None else value
                # A copy, for a view would keep the whole batch.
                packed[name] = _narrowed(name, own, entry.dtype).clone(memory_format=torch.contiguous_format)
        return packed

    def fingerprint(self) -> dict[str, Any]:
        """What of the teacher and of what is kept tells one cache from another."""
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

    def _drawn(self, logits: Tensor, mask: Tensor | None, indices: Sequence[int]) -> SampledIds:
        drawn = []
        for row, (index, value) in enumerate(zip(indices, logits)):
            own = value[mask[row]] if mask is not None else value.reshape(-1, value.shape[-1])
            drawn.append(draw(own, self.draws, generator_for(self.seed, int(index), getattr(index, "epoch", 0))))
        return SampledIds(*map(torch.cat, zip(*drawn)))


def join(packed: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a shard: those of its batches one after another, lengths as the places where they begin."""
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


def _said(entry: Entry | None) -> str:
    if entry is None:
        return "absent"
    return f"{entry.dtype} {'[length, ...]' if entry.ragged else ''}{list(entry.shape)} a sample"
