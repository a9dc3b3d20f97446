"""The compact checkpoint: bit-packed masks and the values that were kept, in a folder of two files.

``checkpoint.json``, the index, one JSON object:

- ``format``: ``"compact-checkpoint"``; ``version``: 1.
- ``architecture``: how to build the module (:mod:`workbench.models.architecture`), or null.
- ``weights``: ``file``, the name of the weights file beside it, ``bytes`` and ``sha256``.
- ``tensors``: state dict name -> ``{"dtype", "shape"}``; ``"kept"``, the number of kept weights, if it is masked;
  ``"stored"``, a narrower type in which its values are stored; or only ``{"alias": name}`` of a tied weight.
- ``provenance``: JSON for people.
- ``sha256``: of all other fields, as JSON with sorted keys and without spaces.

``weights-HASH.safetensors``, HASH being the first 16 hexadecimal digits of its SHA-256. Of a tensor NAME:

- masked: ``mask/NAME``, uint8, one bit per weight (:mod:`workbench.checkpoints.bits`), and ``values/NAME``, the kept
  values in row-major order;
- not masked: ``dense/NAME``.

So a float32 layer at density d takes (d + 1/32) of its dense bytes. Pruned weights are read as exactly +0.0 and all
others bit for bit, unless ``stored`` is narrower.

Writing: the weights file is written under a temporary name, read back, compared and renamed; then the index is replaced
by one rename. A crash leaves the old checkpoint or the new one. Neither file has a name that transformers would open.

Reading needs torch and safetensors only. It runs no code from the folder, but calls the constructor of the class that
``architecture`` names. Both checksums, and every size, are checked before memory is allocated.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from workbench.checkpoints.bits import pack, unpack
from workbench.files import atomic_file, read_json, sha256, write_json
from workbench.models.architecture import build, describe, is_architecture
from workbench.models.resize import ResizeError
from workbench.models.wrappers import places, plain_names, plain_state, unwrap, without_prefixes

FORMAT = "compact-checkpoint"
VERSION = 1
FOLDER = "compact"
INDEX = "checkpoint.json"
_WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
_FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_INTEGERS = {
    f"{sign}int{bits}": f"{sign.upper()}{'' if sign else 'I'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_CODES = {**_FLOATS, **_INTEGERS, "bool": "BOOL"}


def save(
    model: nn.Module,
    path: str | Path,
    masks: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    architecture: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` as a compact checkpoint into the folder ``path``; it is read back and compared bit for bit.

    Args:
        model: The trained network, also in a wrapper, which leaves no trace. It is not changed.
        path: The folder, created if missing. A checkpoint in it stays valid until the new one is complete.
        masks: Parameter name -> bool tensor of the parameter's shape, True where the weight is kept; never inferred
            from zeros. A tied weight may be given by any of its names.
        dtype: Floating-point type in which wider parameters are stored, e.g. ``torch.float16``; loading restores
            their own. Buffers, such as BatchNorm's statistics, are stored as they are. None is lossless.
        architecture: How to build the model, ``{"class_path": ..., "init_args": {...}}``; by default that of
            :func:`describe`. Without any, :func:`load` needs a module to fill.
        provenance: JSON for people: recipe, fingerprints, metrics.
        state: The full state dict of a model that is sharded over ranks.

    Returns:
        The folder.

    Raises:
        ValueError: If a mask names no parameter, has another shape or type, or a pruned weight is not zero; if the
            model's state is not plain tensors, or does not fit into ``dtype``.
        OSError: If the disk is full or fails; the previous checkpoint is then unchanged.
    """
    path = Path(path)
    named = None if state is None else plain_state(model, state)
    model = unwrap(model)
    state, first = _tied_state(plain_state(model, model.state_dict()) if named is None else named)
    masks = _checked_masks(model, state, first, masks or {})
    stored, entries = _packed(model, state, first, masks, dtype)
    content = to_safetensors(stored)
    digest = hashlib.sha256(content).hexdigest()
    file = path / f"weights-{digest[:16]}.safetensors"
    index = _with_checksum(
        {
            "format": FORMAT,
            "version": VERSION,
            "architecture": describe(model) if architecture is None else dict(architecture),
            "weights": {"file": file.name, "bytes": len(content), "sha256": digest},
            "tensors": entries,
            "provenance": dict(provenance or {}),
        }
    )
    _check_index(index, path / INDEX)
    try:
        with atomic_file(file) as temporary:
            temporary.write_bytes(content)
            _check_written(temporary, index, state, masks)
        write_json(path / INDEX, index, indent=None)
    finally:
        _remove_leftovers(path)
    return path


def load(path: str | Path, model: nn.Module | None = None, map_location: str | torch.device = "cpu") -> nn.Module:
    """The network of the compact checkpoint at ``path``, with dense weights of their original types, in eval mode.

    Args:
        path: The folder that :func:`save` wrote, or a finished stage's folder.
        model: A module to fill, if the checkpoint has no architecture; also in a wrapper.
        map_location: Device of the weights.

    Raises:
        ValueError: If the folder is not a compact checkpoint, is truncated, altered or of a newer version, or holds
            the weights of another model.
    """
    path = find(path)
    with _Reader(path) as reader:
        if model is None:
            model = _build(reader.index, path)
        inner = unwrap(model)
        held = inner.state_dict(keep_vars=True)
        target = plain_state(inner, held)
        _check_shapes(target, reader.entries, path)
        state = reader.state()
        for name, tensor in target.items():
            tensor.data = tensor.data.to(state[name].dtype)
        inner.load_state_dict(dict(zip(held, (state[name] for name in target))))
    for name, tensor in plain_state(inner, inner.state_dict()).items():
        if not _bitwise_equal(tensor, state[name]):
            raise ValueError(f"{path}: {type(model).__name__} did not load {name!r} as stored; does it tie weights?")
    return model.to(map_location).eval()


def find(path: str | Path) -> Path:
    """The folder of the compact checkpoint at ``path`` or in its ``compact/``.

    Raises:
        ValueError: If there is none.
    """
    for folder in (Path(path), Path(path) / FOLDER):
        if (folder / INDEX).is_file():
            return folder
    raise ValueError(f"{path} holds no compact checkpoint: expected {INDEX} there or in {FOLDER}/")


def read_index(path: Path) -> dict[str, Any]:
    """The contents of ``checkpoint.json`` in the folder ``path``, checked in every field but ``provenance``.

    Raises:
        ValueError: If it is missing, altered, of a newer version or another format.
    """
    file = path / INDEX
    index = read_json(file, "a compact checkpoint")
    _check_index(index, file)
    return index


def masks(path: str | Path) -> dict[str, Tensor]:
    """Parameter name -> bool mask, True where kept, of the compact checkpoint at ``path``."""
    with _Reader(find(path)) as reader:
        return {name: reader.mask(name) for name, entry in reader.entries.items() if "kept" in entry}


def tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict of the compact checkpoint at ``path``: dense tensors; tied names share one tensor."""
    with _Reader(find(path)) as reader:
        return reader.state()


class _Reader:
    """The open weights file of a checkpoint, whose tensors have been checked against the index.

    Args:
        path: The folder.
        file: The weights file, if it does not have its final name yet.
        index: Its checked index, if that is not written yet.
    """

    def __init__(self, path: Path, file: Path | None = None, index: dict[str, Any] | None = None) -> None:
        self.index = read_index(path) if index is None else index
        self.entries: dict[str, dict[str, Any]] = self.index["tensors"]
        weights = self.index["weights"]
        self.file = path / weights["file"] if file is None else file
        try:
            size, digest = self.file.stat().st_size, sha256(self.file)
        except OSError as error:
            raise ValueError(f"{self.file}, which {INDEX} names, cannot be read: {error}") from error
        if size != weights["bytes"]:
            raise ValueError(f"{self.file} has {size} bytes, {weights['bytes']} expected: truncated?")
        if digest != weights["sha256"]:
            raise ValueError(f"{self.file} was altered: its SHA-256 is not the one in {INDEX}")

    def __enter__(self) -> "_Reader":
        try:
            self._open = safe_open(self.file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file} is not a safetensors file: {error}") from error
        expected: dict[str, tuple[str, list[int]]] = {}
        for name, entry in self.entries.items():
            expected |= _expected_tensors(name, entry)
        slices = map(self._open.get_slice, keys := self._open.keys())
        stored = {key: (part.get_dtype(), part.get_shape()) for key, part in zip(keys, slices)}
        if wrong := [key for key in {**expected, **stored} if expected.get(key) != stored.get(key)]:
            details = "; ".join(f"{key!r} is {stored.get(key)} and not {expected.get(key)}" for key in wrong[:3])
            raise ValueError(f"{self.file} does not match {INDEX}: {details}")
        return self

    def __exit__(self, *_: object) -> None:
        del self._open

    def mask(self, name: str) -> Tensor:
        kept = self.entries[name]["kept"]
        mask = unpack(self._open.get_tensor(f"mask/{name}"), tuple(self.entries[name]["shape"]))
        if (count := int(mask.sum())) != kept:
            raise ValueError(f"{self.file}: the mask of {name!r} keeps {count} weights, {kept} expected")
        return mask

    def dense(self, name: str) -> Tensor:
        entry = self.entries[name]
        dtype = getattr(torch, entry["dtype"])
        if "kept" not in entry:
            return self._open.get_tensor(f"dense/{name}").to(dtype)
        full = torch.zeros(entry["shape"], dtype=dtype, device="cpu")
        full[self.mask(name)] = self._open.get_tensor(f"values/{name}").to(dtype)
        return full

    def state(self) -> dict[str, Tensor]:
        own = {name: self.dense(name) for name, entry in self.entries.items() if "alias" not in entry}
        return {name: own[entry.get("alias", name)] for name, entry in self.entries.items()}


def _tied_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's state on the CPU, tied names sharing one tensor; and name -> first name of the same tensor."""
    first: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        is_dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if not is_dense or _dtype_name(tensor.dtype) not in _CODES:
            kind = f"{tensor.dtype} {tensor.layout} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"{name!r} in the model's state is a {kind}: a compact checkpoint holds dense tensors of "
                f"{', '.join(_CODES)} that have values"
            )
        # Names with the same memory, shape and strides are one tied weight, stored once.
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first[name] = seen.setdefault(memory, name) if tensor.numel() else name
    own = {name: state[name].detach().cpu() for name in first if first[name] == name}
    return {name: own[first[name]] for name in state}, first


def _checked_masks(
    model: nn.Module, state: Mapping[str, Tensor], first: Mapping[str, str], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The masks on the CPU, each by the first name of its parameter."""
    parameters = set(places(model)) & set(state)
    checked: dict[str, Tensor] = {}
    in_model = plain_names(model)
    for given, mask in masks.items():
        name = next((n for n in (given, in_model.get(given), without_prefixes(given)) if n in parameters), None)
        if name is None:
            raise ValueError(f"mask {given!r} names no parameter of the model; it has {sorted(parameters)}")
        tensor, mask = state[name], mask.detach().cpu()
        if mask.dtype != torch.bool or mask.shape != tensor.shape:
            raise ValueError(f"mask {name!r} is {mask.dtype} {list(mask.shape)}: bool {list(tensor.shape)} is needed")
        if bool((tensor[~mask] != 0).any()):
            raise ValueError(f"weights of {name!r} that the mask prunes are not zero: apply the mask, then save")
        if not torch.equal(checked.setdefault(first[name], mask), mask):
            raise ValueError(f"{first[name]!r} and {name!r} are one tied weight with two masks: give one of them")
    return checked


def _packed(
    model: nn.Module,
    state: Mapping[str, Tensor],
    first: Mapping[str, str],
    masks: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors of the weights file, and the index's entry for every name in ``state``."""
    if dtype is not None and _dtype_name(dtype) not in _FLOATS:
        raise ValueError(f"dtype is {dtype}: store values as one of {', '.join(_FLOATS)}")
    parameters = set(places(model))
    stored: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        if first[name] != name:
            entries[name] = {"alias": first[name]}
            continue
        entry = entries[name] = {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        values, wide = tensor, tensor.is_floating_point() and name in parameters
        if dtype is not None and wide and dtype.itemsize < tensor.dtype.itemsize:
            values = tensor.to(dtype)
            entry["stored"] = _dtype_name(dtype)
            if not torch.equal(values.isfinite(), tensor.isfinite()):
                raise ValueError(f"{name!r} has values beyond the range of {dtype}: save in a wider type")
        if name in masks:
            entry["kept"] = int(masks[name].sum())
            stored[f"mask/{name}"] = pack(masks[name])
            stored[f"values/{name}"] = values[masks[name]]
        else:
            # A copy: safetensors refuses tensors that share memory.
            stored[f"dense/{name}"] = values.clone(memory_format=torch.contiguous_format)
    return stored, entries


def _check_written(file: Path, index: dict[str, Any], state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Read every tensor back from ``file`` and compare it bit for bit with the state to save."""
    with _Reader(file.parent, file, index) as reader:
        for name, entry in reader.entries.items():
            if "alias" in entry:
                continue
            expected = state[name]
            if "stored" in entry:
                expected = expected.to(getattr(torch, entry["stored"])).to(expected.dtype)
            if name in masks:
                expected = expected.masked_fill(~masks[name], 0)
            if not _bitwise_equal(reader.dense(name), expected):
                raise ValueError(f"{file.parent}: {name!r} changed between writing and reading; is the disk failing?")


def _remove_leftovers(path: Path) -> None:
    """Remove weights files that the index does not name, and temporary files of killed writers."""
    current = None
    if (path / INDEX).exists():
        try:
            current = read_index(path)["weights"]["file"]
        except ValueError:
            return  # the index is damaged: a weights file may be all that can be rescued
    for file in path.glob("*"):
        orphan = _WEIGHTS.fullmatch(file.name) and file.name != current
        if orphan or re.fullmatch(rf"\.({_WEIGHTS.pattern}|{re.escape(INDEX)})\..*\.tmp", file.name):
            with suppress(OSError):
                file.unlink()


def _build(index: Mapping[str, Any], path: Path) -> nn.Module:
    """The untrained module of a checkpoint, allocated only if its shapes match those of the stored tensors."""
    with torch.random.fork_rng(devices=[]):
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")
                skeleton = build(index["architecture"], path)
        except ResizeError:
            raise  # building it outside of meta would allocate the sizes from before it was shrunk
        except ValueError:
            pass  # some constructors fail on the meta device; building on the CPU gives the real error
        else:
            _check_shapes(skeleton.state_dict(), index["tensors"], path)
        with torch.device("cpu"):
            return build(index["architecture"], path)


def _check_shapes(state: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Refuse a model whose state has other names or shapes than the checkpoint's."""
    shapes = {name: entries[entry.get("alias", name)]["shape"] for name, entry in entries.items()}
    own = {name: list(tensor.shape) if isinstance(tensor, Tensor) else None for name, tensor in state.items()}
    if wrong := [name for name in {**shapes, **own} if shapes.get(name, 0) != own.get(name, 0)]:
        details = "; ".join(
            f"{name!r} is {own.get(name, 'missing')}, {shapes.get(name, 'none')} here" for name in wrong[:3]
        )
        raise ValueError(f"{path} holds the weights of another model: in the model {details}")


def _bitwise_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every bit."""
    if one.is_meta or one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = one.detach().cpu(), other.detach().cpu()
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expected_tensors(name: str, entry: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Names, types and shapes of the tensors in the weights file that the index's ``entry`` describes."""
    if "alias" in entry:
        return {}
    code, shape = _CODES[entry.get("stored", entry["dtype"])], entry["shape"]
    if "kept" not in entry:
        return {f"dense/{name}": (code, shape)}
    return {f"mask/{name}": ("U8", [-(-prod(shape) // 8)]), f"values/{name}": (code, [entry["kept"]])}


def _with_checksum(index: Mapping[str, Any]) -> dict[str, Any]:
    """The index with its checksum.

    Raises:
        ValueError: If it is not JSON.
    """
    try:
        plain = json.loads(json.dumps(index))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"architecture and provenance must be JSON: {error}") from error
    return {**plain, "sha256": _checksum(plain)}


def _checksum(index: Mapping[str, Any]) -> str:
    """SHA-256 of the index without its checksum, independent of key order and spacing; empty if nested too deep."""
    rest = {key: value for key, value in index.items() if key != "sha256"}
    try:
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def _check_index(index: Any, file: Path) -> None:
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{file} is not a compact checkpoint: its format is not {FORMAT!r}")
    version = index.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{file} has version {version!r}, this version reads {VERSION}: is a newer one needed?")
    checksum = _checksum(index)
    if not checksum or index.get("sha256") != checksum:
        raise ValueError(f"{file} was altered: its contents do not match its SHA-256")
    weights, entries, provenance = index.get("weights"), index.get("tensors"), index.get("provenance")
    if not (isinstance(weights, dict) and isinstance(entries, dict) and isinstance(provenance, dict)):
        raise ValueError(f"{file} is damaged: 'weights', 'tensors' or 'provenance' is missing")
    if type(weights.get("bytes")) is not int or not isinstance(weights.get("sha256"), str):
        raise ValueError(f"{file} is damaged: 'weights' lacks 'bytes' or 'sha256'")
    name = weights.get("file")
    if not (isinstance(name, str) and _WEIGHTS.fullmatch(name)):
        raise ValueError(f"{file} names the weights file {name!r}: allowed is weights-HASH.safetensors beside it")
    if "architecture" not in index or not is_architecture(index["architecture"]):
        raise ValueError(f"{file} is damaged: 'architecture' is not a class_path with init_args or config")
    for name, entry in entries.items():
        if not _is_valid_entry(entry, entries):
            raise ValueError(f"{file} is damaged: the entry of {name!r} is invalid, {str(entry)[:200]}")


def _is_valid_entry(entry: Any, entries: Mapping[str, Any]) -> bool:
    if not isinstance(entry, dict):
        return False
    if "alias" in entry:
        target = entries.get(entry["alias"]) if isinstance(entry["alias"], str) else None
        return len(entry) == 1 and isinstance(target, dict) and "alias" not in target
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if dtype not in list(_CODES) or not isinstance(shape, list) or len(shape) > 64:
        return False
    if not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        return False
    # Even if one size is 0, the product of the others must not overflow torch's strides.
    if prod(max(size, 1) for size in shape) >= 2**56:
        return False
    kept = entry.get("kept", 0)
    if type(kept) is not int or not 0 <= kept <= prod(shape):
        return False
    return "stored" not in entry or (dtype in list(_FLOATS) and entry["stored"] in list(_FLOATS))
