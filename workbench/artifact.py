"""The compact checkpoint: a folder of one JSON file and one safetensors file.

Masked weights are stored as one bit per weight plus the kept values in index order; everything else is dense. So
a float32 layer at density d takes (d + 1/32) of its dense bytes. Pruned weights come back as exactly +0.0 and kept
ones bit for bit. ``artifact.json`` names the weights file by its content, so replacing a checkpoint is one atomic
rename. Neither file has a name that transformers would mistake for a model of its own.

Reading needs torch and safetensors only, runs no code from the folder, and checks every size before it allocates.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.files import replacing, sha256, write_json

FORMAT = "compact-checkpoint"
VERSION = 1
_INDEX = "artifact.json"
_SHIFTS = torch.arange(7, -1, -1, dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """Bits of a bool tensor of any shape, eight to a byte, the first in the highest bit: uint8 [ceil(n / 8)]."""
    bits = mask.detach().flatten().to("cpu", torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << _SHIFTS).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of ``shape`` that :func:`pack` made ``packed`` of."""
    return ((packed[:, None] >> _SHIFTS) & 1).flatten()[: prod(shape)].bool().view(shape)


def save(
    model: nn.Module,
    path: str | Path,
    masks: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    architecture: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` as a compact checkpoint into the folder ``path`` and read it back to prove it equal.

    Args:
        model: The trained network. It is not changed.
        path: The folder; made if missing. A checkpoint already there is replaced atomically.
        masks: Parameter name -> bool tensor of the parameter's shape, True where the weight is kept. Stored data,
            never inferred from zeros.
        dtype: Floating-point type of the stored values, e.g. ``torch.float16``; None keeps each tensor's own and
            is lossless. Loading restores the tensor's own type.
        architecture: How to build the model again, ``{"class_path": ..., "init_args": {...}}``. By default taken
            from the model: a transformers configuration, or its ``init_args``. Without any, :func:`load` needs
            the module to fill.
        provenance: JSON kept in the folder for people: recipe, fingerprints, metrics.

    Returns:
        The folder.

    Raises:
        ValueError: If a mask names no parameter, has another shape or type, or a pruned weight is not zero.
    """
    path = Path(path)
    state = model.state_dict()
    masks = dict(masks or {})
    _check_masks(state, masks)
    stored: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        # The same memory seen the same way is one tensor under two names: a tied weight, stored once.
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and memory in seen:
            entries[name] = {"alias": seen[memory]}
            continue
        seen[memory] = name
        entries[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        values = tensor.detach().cpu()
        if dtype is not None and tensor.is_floating_point():
            values = values.to(dtype)
            if bool((values.isinf() & ~tensor.detach().cpu().isinf()).any()):
                raise ValueError(f"{name!r} has values beyond the range of {dtype}: save in a wider type")
        if name in masks:
            mask = masks[name].cpu()
            stored[f"mask/{name}"] = pack(mask)
            stored[f"values/{name}"] = values[mask].contiguous()
            entries[name]["kept"] = int(mask.sum())
        else:
            stored[f"dense/{name}"] = values.contiguous().clone()
    path.mkdir(parents=True, exist_ok=True)
    digest = _digest(stored)
    file = path / f"weights-{digest[:16]}.safetensors"
    with replacing(file) as temporary:
        save_file(stored, temporary)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": dict(architecture) if architecture else describe(model),
        "weights": {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)},
        "tensors": entries,
        "provenance": dict(provenance or {}),
    }
    before = read_index(path)["weights"]["file"] if (path / _INDEX).exists() else file.name
    write_json(path / _INDEX, index)
    if before != file.name:
        (path / before).unlink(missing_ok=True)
    _verify(path, state, dtype)
    return path


def load(path: str | Path, model: nn.Module | None = None, map_location: str | torch.device = "cpu") -> nn.Module:
    """The network in the compact checkpoint at ``path``, with plain dense weights, in eval mode.

    Args:
        path: The folder that :func:`save` wrote, or a finished stage's folder that has one.
        model: A module to fill, where the checkpoint does not say how to build it.
        map_location: The device the weights go to.

    Raises:
        ValueError: If the folder is not a compact checkpoint, or is truncated, altered or of a newer version.
    """
    path = find(path)
    index = read_index(path)
    if model is None:
        with torch.random.fork_rng(devices=[]):
            model = build(index["architecture"], path)
    try:
        model.load_state_dict(tensors(path), assign=False)
    except RuntimeError as error:
        raise ValueError(f"{path} holds the weights of another model: {error}") from error
    return model.to(map_location).eval()


def find(path: str | Path) -> Path:
    """The folder of the compact checkpoint at ``path`` or in its ``artifact/``.

    Raises:
        ValueError: If there is none.
    """
    for folder in (Path(path), Path(path) / "artifact"):
        if (folder / _INDEX).is_file():
            return folder
    raise ValueError(f"{path} holds no compact checkpoint: expected {_INDEX} there or in artifact/")


def read_index(path: Path) -> dict[str, Any]:
    """The checked contents of ``artifact.json`` in the folder ``path``."""
    file = path / _INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a compact checkpoint: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{file} is not a compact checkpoint: its format is not {FORMAT!r}")
    if index.get("version") != VERSION:
        raise ValueError(f"{file} has version {index.get('version')!r}; this version reads {VERSION}")
    weights, entries = index.get("weights"), index.get("tensors")
    if not isinstance(weights, dict) or not isinstance(entries, dict) or "architecture" not in index:
        raise ValueError(f"{file} is damaged: 'weights', 'tensors' or 'architecture' is missing")
    name = weights.get("file")
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{file} names the weights file {name!r}: a plain file name in the same folder is allowed")
    return index


def masks(path: str | Path) -> dict[str, Tensor]:
    """Parameter name -> bool mask, True where kept, of the compact checkpoint at ``path``."""
    path = find(path)
    with _Weights(path) as weights:
        return {name: weights.mask(name) for name, entry in weights.entries.items() if "kept" in entry}


def tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict in the compact checkpoint at ``path``: dense tensors, tied names sharing one tensor."""
    path = find(path)
    with _Weights(path) as weights:
        state = {name: weights.dense(name) for name, entry in weights.entries.items() if "alias" not in entry}
        for name, entry in weights.entries.items():
            if "alias" in entry:
                if entry["alias"] not in state:
                    raise ValueError(f"{path}: {name!r} is an alias of {entry['alias']!r}, which is not stored")
                state[name] = state[entry["alias"]]
        return {name: state[name] for name in weights.entries}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """How to build ``model`` again, as JSON, or None if it does not say.

    A transformers model is described by its configuration, any other by its class and its ``init_args`` (what its
    constructor was given), with the activation that was swapped in afterwards.
    """
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        return {"class_path": name, "config": json.loads(model.config.to_json_string(use_diff=False))}  # type: ignore[union-attr, operator]
    arguments = getattr(model, "init_args", None)
    if arguments is None:
        return None
    found: dict[str, Any] = {"class_path": name, "init_args": dict(arguments)}  # type: ignore[arg-type]
    if swapped := getattr(model, "swapped_activation", None):
        found["activation"] = swapped
    return json.loads(json.dumps(found))


def build(architecture: Mapping[str, Any] | None, path: Path) -> nn.Module:
    """The untrained module that ``architecture`` describes; ``path`` is named in errors."""
    if architecture is None:
        raise ValueError(f"{path} does not say how to build its model: pass one, load(path, model=...)")
    module, _, qualname = str(architecture.get("class_path", "")).rpartition(".")
    try:
        cls = getattr(import_module(module), qualname)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} needs the class {architecture.get('class_path')!r}, which cannot be imported ({error}): "
            "install the package that has it, or pass the model, load(path, model=...)"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"{path} names {architecture['class_path']!r}, which is not a torch.nn.Module class")
    try:
        if "config" in architecture:
            return cls(cls.config_class.from_dict(architecture["config"]))  # type: ignore[attr-defined]
        model = cls(**architecture.get("init_args", {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {architecture['class_path']} does not take its stored arguments: {error}") from error
    if "activation" in architecture:
        from workbench.activations import swap_activation

        swap_activation(model, architecture["activation"])
    return model


class _Weights:
    """The open weights file of a checkpoint; every read is checked against the index before it allocates."""

    def __init__(self, path: Path) -> None:
        index = read_index(path)
        self.path = path / index["weights"]["file"]
        self.entries: dict[str, dict[str, Any]] = index["tensors"]
        if not self.path.is_file():
            raise ValueError(f"{path} is incomplete: {self.path.name} is missing")
        size = self.path.stat().st_size
        if size != index["weights"].get("bytes"):
            raise ValueError(f"{self.path} has {size} bytes, {index['weights'].get('bytes')} expected: truncated?")
        if sha256(self.path) != index["weights"].get("sha256"):
            raise ValueError(f"{self.path} was altered: its SHA-256 is not the one in {_INDEX}")

    def __enter__(self) -> "_Weights":
        try:
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.path} is not a safetensors file: {error}") from error
        self._keys = set(self._file.keys())
        return self

    def __exit__(self, *_: object) -> None:
        del self._file

    def _read(self, key: str, shape: tuple[int, ...]) -> Tensor:
        if key not in self._keys:
            raise ValueError(f"{self.path} lacks {key!r}")
        found = tuple(self._file.get_slice(key).get_shape())
        if found != shape:
            raise ValueError(f"{self.path}: {key!r} has shape {list(found)}, {list(shape)} expected")
        return self._file.get_tensor(key)

    def _entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...], int | None]:
        entry = self.entries[name]
        dtype = getattr(torch, str(entry.get("dtype")), None) if isinstance(entry, dict) else None
        shape = entry.get("shape") if isinstance(entry, dict) else None
        sizes = shape if isinstance(shape, list) else [None]
        if not isinstance(dtype, torch.dtype) or not all(isinstance(n, int) and n >= 0 for n in sizes):
            raise ValueError(f"{self.path.parent / _INDEX}: {name!r} has no valid dtype and shape: {entry!r}")
        return dtype, tuple(sizes), entry.get("kept")

    def mask(self, name: str) -> Tensor:
        _, shape, kept = self._entry(name)
        mask = unpack(self._read(f"mask/{name}", (-(-prod(shape) // 8),)), shape)
        if int(mask.sum()) != kept:
            raise ValueError(f"{self.path}: the mask of {name!r} keeps {int(mask.sum())} weights, {kept} expected")
        return mask

    def dense(self, name: str) -> Tensor:
        dtype, shape, kept = self._entry(name)
        if kept is None:
            return self._read(f"dense/{name}", shape).to(dtype)
        mask = self.mask(name)
        full = torch.zeros(shape, dtype=dtype)
        full[mask] = self._read(f"values/{name}", (kept,)).to(dtype)
        return full


def _check_masks(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        if name not in state:
            raise ValueError(f"mask {name!r} names no parameter of the model; it has {sorted(state)}")
        tensor = state[name]
        if mask.dtype != torch.bool or mask.shape != tensor.shape:
            raise ValueError(
                f"mask {name!r} is {mask.dtype} {list(mask.shape)}: bool {list(tensor.shape)} is needed"
            )
        if torch.count_nonzero(tensor[~mask.to(tensor.device)]):
            raise ValueError(f"weights of {name!r} that the mask prunes are not zero: apply the mask, then save")


def _digest(stored: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(stored):
        digest.update(f"{name}{stored[name].dtype}{list(stored[name].shape)}".encode())
        digest.update(stored[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _verify(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    for name, back in tensors(path).items():
        expected = state[name].detach().cpu()
        if dtype is not None and expected.is_floating_point():
            expected = expected.to(dtype).to(expected.dtype)
        equal = (back == expected) | ((back != back) & (expected != expected))  # NaN equals NaN here
        if back.dtype != expected.dtype or not bool(equal.all()):
            raise ValueError(f"{path}: {name!r} did not survive the disk; is the disk full or failing?")
