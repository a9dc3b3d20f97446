"""Masks: which weights of a model are kept, as data with a name, a hash and a file.

A mask is never read off the zeros of a weight: a kept weight may be 0, and a masked one may have moved.
"""

import difflib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from prune.storage import memory_span, shared_memory
from workbench.bits import pack, packed_bytes, unpack

FORMAT = "prune.masks"
VERSION = "1"


class Masks(Mapping[str, Tensor]):
    """Parameter name -> bool mask of the parameter's shape, in order: True where the weight is kept.

    Names are those of ``model.named_parameters()``; a weight that is shared is named once, by its first name.
    The masks are copied in; treat what comes out as read-only. Equality and ``hash()`` look at names, shapes
    and bits, not at order or device.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        """Check and copy.

        Raises:
            ValueError: if there is no mask, a name is not a non-empty string, or a mask is not a non-empty
                bool tensor.
        """
        if not masks:
            raise ValueError("no masks given: a mask is needed for at least one parameter")
        for name, mask in masks.items():
            if not (isinstance(name, str) and name != ""):
                raise ValueError(f"mask name {name!r} is not a parameter name: give non-empty strings")
            if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
                given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"mask '{name}' is {given}: give a torch.bool tensor, True where the weight is kept")
            if not mask.numel():
                raise ValueError(f"mask '{name}' of shape {tuple(mask.shape)} has no entries: leave it out")
        self._masks = {n: m.detach().clone(memory_format=torch.contiguous_format) for n, m in masks.items()}

    @classmethod
    def ones(cls, of: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> "Masks":
        """Masks that keep everything, on the parameters' devices.

        Args:
            of: named parameters, taken as they are; or a model, for all its parameters, shared ones once.
        """
        if isinstance(of, nn.Module):
            of = dict(group[0] for group in shared_memory(of))
        return cls({n: torch.ones(p.shape, dtype=torch.bool, device=p.device) for n, p in dict(of).items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        kept, total = self._totals()
        return f"Masks({len(self)} parameters, {kept} of {total} weights kept)"

    # Numbers

    def counts(self) -> dict[str, tuple[int, int]]:
        """Parameter name -> (kept, total)."""
        return {name: (int(mask.sum()), mask.numel()) for name, mask in self.items()}

    @property
    def density(self) -> float:
        """Kept over total, counted over the masked parameters only; in [0, 1]."""
        kept, total = self._totals()
        return kept / total

    @property
    def prunable_density(self) -> float:
        """``density`` by the name of its denominator, for reports that also give ``model_density``."""
        return self.density

    def model_density(self, model: nn.Module) -> float:
        """Kept over total, counted over all parameters of ``model``: kept if unmasked, once if shared."""
        self._parameters(model)
        total = sum(max(p.numel() for _, p in group) for group in shared_memory(model))
        kept, masked = self._totals()
        return (total - masked + kept) / total

    def _totals(self) -> tuple[int, int]:
        counts = self.counts().values()
        return sum(kept for kept, _ in counts), sum(total for _, total in counts)

    # Acting on a model

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set masked weights to +0.0 in place, whatever they were (negative, infinite, NaN), on any device.

        Raises:
            ValueError: if a name or shape does not belong to ``model``.
        """
        for name, parameter in self._parameters(model).items():
            parameter.masked_fill_(~self[name].to(parameter.device), 0)

    def keep(self, optimizer: Any, model: nn.Module) -> "Handle":
        """From now on, multiply the weights by their masks after every step of ``optimizer``, in any loop.

        Masking gradients alone would not do: momentum and weight decay move weights without one. Call
        ``apply`` first; this acts only after a step. The masks are held in the weights' dtype and follow a
        model that changes device or dtype. A weight that the step made negative becomes -0.0, which equals 0;
        ``apply`` leaves +0.0. The model and its state dict get no new keys or hooks; a copy of the optimizer
        does not have this one.

        Args:
            optimizer: one optimizer, or a list of them; a wrapper with an ``optimizer`` attribute
                (accelerate's, Lightning's) is unwrapped.
            model: the model whose weights are masked. It is looked up by name at every step.

        Returns:
            A handle; ``handle.remove()`` or leaving ``with handle:`` ends it.

        Raises:
            TypeError: if something is not an optimizer.
            ValueError: if a name or shape does not belong to ``model``, or no optimizer holds any of the
                masked weights.
        """
        several = isinstance(optimizer, (list, tuple))
        optimizers = [_unwrapped(each) for each in (optimizer if several else [optimizer])]
        members = self._members(model)
        held = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
        if not any(id(member.parameter) in held for group in members.values() for member in group):
            raise ValueError(
                f"the optimizer holds none of the masked weights ({_some(self)}), so its steps do not move "
                "them: give the optimizer that trains this model"
            )
        cast: dict[str, Tensor] = {}

        @torch.no_grad()
        def mask_weights(*_: Any) -> None:
            weights: list[Tensor] = [model.get_parameter(name) for name in self]
            for name, weight in zip(self, weights):
                if name not in cast or cast[name].device != weight.device or cast[name].dtype != weight.dtype:
                    cast[name] = self[name].to(weight.device, weight.dtype)
            torch._foreach_mul_(weights, [cast[name] for name in self])  # pyright: ignore[reportPrivateImportUsage]

        return Handle([each.register_step_post_hook(mask_weights).remove for each in optimizers])

    @torch.no_grad()
    def mask_gradients(self, model: nn.Module) -> None:
        """Zero the gradients of masked weights: before clipping, so that the norm counts only live ones.

        Raises:
            ValueError: if a name or shape does not belong to ``model``.
        """
        for name, group in self._members(model).items():
            for member in group:
                if member.parameter.grad is not None:
                    _fill(member.parameter.grad, member.seen(self[name]))

    @torch.no_grad()
    def clear_state(self, optimizer: Any, model: nn.Module) -> None:
        """Zero what the optimizer remembers of masked weights, such as their momentum.

        Every state tensor of the parameter's shape is cleared; state of another shape (LBFGS keeps all
        parameters in one vector) is left alone.

        Raises:
            TypeError: if ``optimizer`` is not one.
            ValueError: if a name or shape does not belong to ``model``.
        """
        states = _unwrapped(optimizer).state
        for name, group in self._members(model).items():
            for member in group:
                for key, value in states.get(member.parameter, {}).items():
                    if key != "step" and isinstance(value, Tensor) and value.shape == member.parameter.shape:
                        _fill(value, member.seen(self[name]))

    def obeyed_by(self, model: nn.Module) -> bool:
        """Whether the masks fit ``model`` and everything they prune is zero in it."""
        known = dict(model.named_parameters(remove_duplicate=False))
        return all(
            name in known
            and known[name].shape == mask.shape
            and not known[name].detach()[~mask.to(known[name].device)].any()
            for name, mask in self.items()
        )

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The masked parameters by name, after checking that names and shapes belong."""
        known = dict(model.named_parameters(remove_duplicate=False))
        missing = [name for name in self if name not in known]
        if missing:
            first = missing[0]
            raise ValueError(
                f"{len(missing)} of {len(self)} masks name no parameter of this {type(model).__name__}: "
                f"{_some(missing)}. Nearest to '{first}': {_some(nearest(first, known))}. "
                "Give the model that the masks were made for"
            )
        for name, mask in self.items():
            if known[name].shape != mask.shape:
                raise ValueError(
                    f"mask '{name}' has shape {tuple(mask.shape)}, the parameter {tuple(known[name].shape)}: "
                    "give the model that the masks were made for"
                )
        return {name: known[name] for name in self}

    def _members(self, model: nn.Module) -> "dict[str, list[_Member]]":
        """Each masked name with all parameters in the same memory: a weight may be tied by storage alone."""
        parameters = self._parameters(model)
        groups = {name: group for group in shared_memory(model) for name, _ in group}
        members = {}
        for name, owner in parameters.items():
            unique = {id(parameter): parameter for _, parameter in groups[name]}
            members[name] = [_Member(owner, parameter) for parameter in unique.values()]
        return members

    # Algebra

    def __and__(self, other: "Masks") -> "Masks":
        return Masks({name: mask & theirs for name, mask, theirs in self._beside(other)})

    def __or__(self, other: "Masks") -> "Masks":
        return Masks({name: mask | theirs for name, mask, theirs in self._beside(other)})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        same = self.keys() == other.keys() and all(self[name].shape == other[name].shape for name in self)
        return same and all(torch.equal(mask, theirs) for _, mask, theirs in self._beside(other))

    __hash__ = None  # pyright: ignore[reportAssignmentType]  (tensors can be written to)

    def is_subset(self, other: "Masks") -> bool:
        """Whether these are nested in ``other``: every weight kept here is kept there."""
        return not any(bool((mask & ~theirs).any()) for _, mask, theirs in self._beside(other))

    def overlap(self, other: "Masks") -> float:
        """Jaccard index |A and B| / |A or B| of the kept weights, in [0, 1]; 1 if neither keeps any."""
        both, either = (self & other)._totals()[0], (self | other)._totals()[0]
        return both / either if either else 1.0

    def _beside(self, other: "Masks") -> Iterator[tuple[str, Tensor, Tensor]]:
        if self.keys() != other.keys():
            raise ValueError(
                f"the masks are for different parameters, such as "
                f"{_some(sorted(self.keys() ^ other.keys()))}: compare masks of one model"
            )
        for name, mask in self.items():
            if mask.shape != other[name].shape:
                raise ValueError(
                    f"mask '{name}' has shape {tuple(mask.shape)} here and {tuple(other[name].shape)} there: "
                    "compare masks of one model"
                )
            yield name, mask, other[name].to(mask.device)

    def to(self, device: torch.device | str) -> "Masks":
        """The same masks on ``device``."""
        return Masks({name: mask.to(device) for name, mask in self.items()})

    # On disk

    def hash(self) -> str:
        """SHA-256 in hex over names, shapes and packed bits: the same on every device, in every process."""
        names = sorted(self)
        digest = hashlib.sha256(json.dumps([[name, list(self[name].shape)] for name in names]).encode())
        for name in names:
            digest.update(pack(self[name]).cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one bit per weight as safetensors, with shapes and order in its metadata.

        The file appears whole or not at all: it is written under another name beside it, then renamed.
        """
        path = Path(path)
        shapes = {name: list(mask.shape) for name, mask in self.items()}
        metadata = {"format": FORMAT, "version": VERSION, "shapes": json.dumps(shapes)}
        content = to_safetensors({name: pack(mask).cpu() for name, mask in self.items()}, metadata)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Masks":
        """Read what ``save`` wrote, onto the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if it is truncated, of another format or version, or does not hold
                exactly the bits its shapes ask for. Nothing is unpacked before shapes and sizes agree.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                shapes = _shapes(file.metadata() or {})
                names = set(file.keys())
                if names != shapes.keys():
                    raise ValueError(f"tensors and shapes differ in {_some(sorted(names ^ shapes.keys()))}")
                for name, shape in shapes.items():
                    stored = file.get_slice(name)
                    if stored.get_dtype() != "U8" or stored.get_shape() != [packed_bytes(shape)]:
                        raise ValueError(
                            f"'{name}' of shape {shape} needs {packed_bytes(shape)} bytes of U8, the file has "
                            f"{stored.get_dtype()} {stored.get_shape()}"
                        )
                return cls({name: unpack(file.get_tensor(name), shape) for name, shape in shapes.items()})
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(path)} is not a file of masks: {error}. Give a file that Masks.save wrote"
            ) from error


class Handle:
    """What ``Masks.keep`` returns: takes its hooks off again, also after an exception in a ``with`` block."""

    def __init__(self, removers: Iterable[Callable[[], None]]):
        self._removers = list(removers)

    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""
        while self._removers:
            self._removers.pop()()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of ``known`` that look most like ``name``, best first; for error messages."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0)


class _Member(NamedTuple):
    """A parameter in the memory of ``owner``, the parameter that a mask is named after."""

    owner: nn.Parameter
    parameter: nn.Parameter

    def seen(self, mask: Tensor) -> Tensor:
        """The owner's mask as this parameter sees it, say transposed."""
        owner, parameter = self.owner, self.parameter
        if parameter is owner or (parameter.shape, parameter.stride()) == (owner.shape, owner.stride()):
            return mask
        if memory_span(parameter) != memory_span(owner) or parameter.numel() != owner.numel():
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} shares only part of the memory of a masked "
                f"one of shape {tuple(owner.shape)}: untie them"
            )
        memory = torch.empty_strided(owner.shape, owner.stride(), dtype=torch.bool, device=mask.device).copy_(mask)
        return memory.as_strided(parameter.shape, parameter.stride(), 0)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    inner = optimizer
    while (wrapped := getattr(inner, "optimizer", None)) is not None:
        inner = wrapped
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an optimizer: give a torch.optim.Optimizer or its wrapper")
    return inner


def _fill(values: Tensor, mask: Tensor) -> None:
    values.masked_fill_(~mask.to(values.device), 0)


def _shapes(metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """The shapes in a file's metadata, checked."""
    found = (metadata.get("format"), metadata.get("version"))
    if found != (FORMAT, VERSION):
        raise ValueError(f"its format and version are {found}, not {(FORMAT, VERSION)}")
    try:
        shapes = json.loads(metadata.get("shapes", ""))
    except RecursionError as error:
        raise ValueError("its shapes are nested too deeply") from error
    if not (isinstance(shapes, dict) and all(_is_shape(shape) for shape in shapes.values())):
        raise ValueError("its shapes are not lists of positive integers by name")
    return shapes


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
