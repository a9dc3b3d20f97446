"""Masks: which weights of a model are kept, as validated data with a hash and a file.

A mask is never inferred from the zeros of a weight: a kept weight may be 0, and a masked one may have moved.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from prune.masks import enforce
from prune.masks.enforce import Handle
from prune.masks.memory import distributed, shared_memory
from prune.masks.overlap import Overlap, layer_overlaps, overlap, paired
from workbench.checkpoints.bits import pack, packed_bytes, unpack
from workbench.files import atomic_file
from workbench.messages import some

FORMAT = "prune.masks.masks"
VERSION = "1"


class StoredBytes(NamedTuple):
    """Bytes of a model's parameters.

    Args:
        dense: Every weight, in its dtype.
        sparse: Of masked parameters one bit per weight and the values that are kept, in their dtype; the others dense.
    """

    dense: int
    sparse: int


class Masks(Mapping[str, Tensor]):
    """Parameter name -> bool mask of the parameter's shape, in order: True where the weight is kept.

    Names are those of ``model.named_parameters()``; a weight that is shared is named once, by its first name.
    The masks are copied in; treat what comes out as read-only. Equality and ``hash()`` look at names, shapes
    and bits, not at order or device.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        """Check and copy.

        Raises:
            ValueError: if there is no mask, a name is not a non-empty string, or a mask is not a plain, non-empty
                bool tensor with values.
        """
        if not masks:
            raise ValueError("no masks given: a mask is needed for at least one parameter")
        for name, mask in masks.items():
            if not (isinstance(name, str) and name != ""):
                raise ValueError(f"mask name {name!r} is not a parameter name: give non-empty strings")
            if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
                actual = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"mask '{name}' is {actual}: give a torch.bool tensor, True where the weight is kept")
            if mask.is_meta or distributed(mask):
                kind = "on the meta device" if mask.is_meta else "a DTensor"
                raise ValueError(f"mask '{name}' is {kind}: give a plain tensor that holds the whole mask")
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

    def layer_densities(self) -> dict[str, float]:
        """Parameter name -> kept over total, in [0, 1]."""
        return {name: kept / total for name, (kept, total) in self.counts().items()}

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
        """Kept over total, over all parameters of ``model``: unmasked ones are kept, shared ones count once."""
        enforce.masked_parameters(self, model)
        total = sum(max(p.numel() for _, p in group) for group in shared_memory(model))
        kept, masked = self._totals()
        return (total - masked + kept) / total

    def stored_bytes(self, model: nn.Module) -> StoredBytes:
        """Bytes of the parameters of ``model`` on disk, shared ones once, dense and without masked weights."""
        dense = sum(max(p.numel() * p.element_size() for _, p in group) for group in shared_memory(model))
        pruned = sum(
            int((~self[name]).sum()) * parameter.element_size() - packed_bytes(parameter.shape)
            for name, parameter in enforce.masked_parameters(self, model).items()
        )
        return StoredBytes(dense, dense - pruned)

    def _totals(self) -> tuple[int, int]:
        counts = self.counts().values()
        return sum(kept for kept, _ in counts), sum(total for _, total in counts)

    # On a model

    def apply(self, model: nn.Module) -> None:
        """Set masked weights to +0.0 in place: :func:`prune.masks.enforce.apply`."""
        enforce.apply(self, model)

    def keep(self, optimizer: Any, model: nn.Module) -> Handle:
        """From now on masked weights are zero after every step of ``optimizer``: :func:`prune.masks.enforce.keep`."""
        return enforce.keep(self, optimizer, model)

    def mask_gradients(self, model: nn.Module) -> None:
        """Zero the gradients of masked weights, before clipping: :func:`prune.masks.enforce.mask_gradients`."""
        enforce.mask_gradients(self, model)

    def clear_state(self, optimizer: Any, model: nn.Module) -> None:
        """Zero the optimizer state of masked weights: :func:`prune.masks.enforce.clear_state`."""
        enforce.clear_state(self, optimizer, model)

    def is_applied_to(self, model: nn.Module) -> bool:
        """Whether masks fit ``model`` and masked weights are zero: :func:`prune.masks.enforce.is_applied_to`."""
        return enforce.is_applied_to(self, model)

    # Algebra

    def __and__(self, other: "Masks") -> "Masks":
        return Masks({name: mask & second for name, mask, second in paired(self, other)})

    def __or__(self, other: "Masks") -> "Masks":
        return Masks({name: mask | second for name, mask, second in paired(self, other)})

    def __sub__(self, other: "Masks") -> "Masks":
        """Kept here and not in ``other``: what was pruned from one level to the next."""
        return Masks({name: mask & ~second for name, mask, second in paired(self, other)})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        same = self.keys() == other.keys() and all(self[name].shape == other[name].shape for name in self)
        return same and all(torch.equal(mask, second) for _, mask, second in paired(self, other))

    __hash__ = None  # pyright: ignore[reportAssignmentType]  (tensors can be written to)

    def is_subset(self, other: "Masks") -> bool:
        """Whether these are nested in ``other``: every weight kept here is kept there."""
        return not any(bool((mask & ~second).any()) for _, mask, second in paired(self, other))

    def overlap(self, other: "Masks") -> Overlap:
        """What both keep, and what chance gives: ``.jaccard``, ``.hamming``, ``.chance``, ``.z`` and more."""
        return overlap(self, other)

    def layer_overlaps(self, other: "Masks") -> dict[str, Overlap]:
        """Parameter name -> ``overlap`` of its two masks."""
        return layer_overlaps(self, other)

    def to(self, device: torch.device | str) -> "Masks":
        """The same masks on ``device``."""
        return Masks({name: mask.to(device) for name, mask in self.items()})

    # Packed, one bit a weight

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Parameter name -> ``bits``, uint8 on the CPU, and ``shape``: for checkpoints and for other ranks."""
        return {name: {"bits": pack(mask).cpu(), "shape": list(mask.shape)} for name, mask in self.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Mapping[str, Any]]) -> "Masks":
        """The masks that ``state_dict`` packed.

        Raises:
            ValueError: if bits and shape do not belong together.
        """
        return cls({name: unpack(entry["bits"], entry["shape"]) for name, entry in state.items()})

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
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)

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
                    raise ValueError(f"tensors and shapes differ in {some(sorted(names ^ shapes.keys()))}")
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


def _shapes(metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """The shapes in a file's metadata, checked."""
    written = (metadata.get("format"), metadata.get("version"))
    if written != (FORMAT, VERSION):
        raise ValueError(f"its format and version are {written}, not {(FORMAT, VERSION)}")
    try:
        shapes = json.loads(metadata.get("shapes", ""))
    except RecursionError as error:
        raise ValueError("its shapes are nested too deeply") from error
    if not (isinstance(shapes, dict) and all(_is_shape(shape) for shape in shapes.values())):
        raise ValueError("its shapes are not lists of positive integers by name")
    return shapes


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
