"""The format of cached targets on disk, version 1.

::

    <split>/cache.json                  the index: fingerprint, entries, shards, checksum of itself
    <split>/shard-NNNNN.safetensors     samples start..stop of one view
        digest     uint8 [samples, 8]   identifies each sample
        NAME       [samples, ...]       values of one shape a sample, or
        NAME       [positions, ...]     values of samples of several lengths, concatenated without padding, with
        offsets    int64 [samples + 1]  the positions of sample i are offsets[i]..offsets[i + 1]
        ids, counts, log_probs [N], log_z [positions]     ids sampled from the logits, concatenated, with
        pointer    int64 [positions + 1]                  the ids of position p are pointer[p]..pointer[p + 1]

Invariants:

- Shards partition the samples of every view in order: shard and row of a sample follow from its index alone.
- The index lists the size and the SHA-256 of every shard. A shard is renamed into place before the index lists it, so a
  killed writer leaves whole shards, of which at most the last is not listed, and ``complete: false``.
- ``offsets`` and ``pointer`` start at 0, never decrease, and end at the number of rows they divide.

A cache is refused if the index is incomplete, altered, of another version or out of range; if a shard is missing, has
another size or SHA-256, or other tensors than its entries; if a part of the fingerprint (:data:`PARTS`) differs from
that of the teacher, data set or collate_fn in use; or if the digest of a sample differs when it is looked up.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.cache.samples import DIGEST
from workbench.files import atomic_file, read_json, sha256, write_json

FORMAT, VERSION = "teacher-cache", 1
INDEX = "cache.json"
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
# The parts of a fingerprint, in the order in which they are compared, and what a difference means.
PARTS = {
    "precision": "the teacher's precision",
    "teacher": "another teacher",
    "task": "another task",
    "samples": "another number of samples",
    "views": "another number of views",
    "tokenizer": "another tokenizer",
    "columns": "other columns",
    "items": "another data set, transform or order of samples",
    "batch": "another collate_fn",
    "answers": "a function that answers otherwise",
    "batch_size": "another batch size",
    "features": "other features",
    "store": "another kind of store",
    "draws": "another number of draws",
    "seed": "another seed of the draws",
    "dtype": "another dtype",
}
_FIELDS = {"complete": bool, "split": str, "fingerprint": dict, "entries": dict, "shards": list, "shard_size": int}


@dataclass(frozen=True)
class Entry:
    """What is stored of every sample under one name.

    Args:
        dtype: Of the values, e.g. "float32".
        shape: Of a sample or, if ``ragged``, of one of its positions.
        ragged: Whether samples have as many rows as they have positions.
        draws: How many ids were sampled at every position, prod(shape) of them; 0 if the values themselves are stored.
        classes: Size of the vocabulary, if ids were sampled.
    """

    dtype: str
    shape: tuple[int, ...]
    ragged: bool
    draws: int = 0
    classes: int = 0

    def as_json(self) -> dict[str, Any]:
        """The entry as the index stores it."""
        return {**vars(self), "shape": list(self.shape)}

    @classmethod
    def parse(cls, raw: Any) -> "Entry":
        """The entry of an index; raises ValueError if it is invalid."""
        sizes = raw.get("shape") if isinstance(raw, dict) else None
        if not isinstance(sizes, list) or raw.keys() != {"dtype", "shape", "ragged", "draws", "classes"}:
            raise ValueError(f"{str(raw)[:100]} is no entry")
        numbers = [*sizes, raw["draws"], raw["classes"]]
        whole = all(type(size) is int and 0 <= size < 2**40 for size in numbers)
        if not whole or prod(max(size, 1) for size in sizes) > 2**48:
            raise ValueError(f"sizes {str(numbers)[:100]} are out of range")
        if raw["dtype"] not in list(CODES) or type(raw["ragged"]) is not bool:
            raise ValueError(f"{str(raw)[:100]} has no known dtype")
        return cls(raw["dtype"], tuple(sizes), raw["ragged"], raw["draws"], raw["classes"])


@dataclass(frozen=True)
class Part:
    """The samples of a shard: ``start`` to ``stop`` of a view."""

    number: int
    view: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """The shard's name."""
        return f"shard-{self.number:05d}.safetensors"

    def __len__(self) -> int:
        return self.stop - self.start


def parts(samples: int, views: int, shard_size: int) -> list[Part]:
    """The shards of a cache, in order."""
    cuts = [(view, start) for view in range(views) for start in range(0, samples, shard_size)]
    return [Part(i, view, start, min(start + shard_size, samples)) for i, (view, start) in enumerate(cuts)]


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write ``cache.json`` with its checksum, atomically."""
    plain = {"format": FORMAT, "version": VERSION, **{name: index[name] for name in _FIELDS}}
    write_json(folder / INDEX, {**plain, "sha256": _checksum(plain)})


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of ``cache.json``, checked in every field.

    Raises:
        ValueError: If it is missing, altered, of a newer version or another format.
    """
    file = folder / INDEX
    again = f"remove {folder} and cache again"
    index = read_json(file, "a teacher cache", again)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{file} is not a teacher cache: its format is not {FORMAT!r}; choose another folder")
    if type(version := index.get("version")) is not int or version != VERSION:
        raise ValueError(f"{file} has version {version!r}, this version reads {VERSION}: is a newer one needed?")
    if index.get("sha256") != _checksum({name: value for name, value in index.items() if name != "sha256"}):
        raise ValueError(f"{file} was altered: its contents do not match its SHA-256; {again}")
    if wrong := [name for name, kind in _FIELDS.items() if type(index.get(name)) is not kind]:
        raise ValueError(f"{file} is damaged: {wrong[0]!r} is not a {_FIELDS[wrong[0]].__name__}; {again}")
    try:
        entries_of(index)
        _check_shards(index)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; {again}") from error
    return index


def entries_of(index: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries by name, as objects."""
    return {name: Entry.parse(raw) for name, raw in index["entries"].items()}


def plan_of(index: Mapping[str, Any]) -> list[Part]:
    """All shards of the cache that the index describes, written or not."""
    return parts(index["fingerprint"]["samples"], index["fingerprint"]["views"], index["shard_size"])


def difference(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first part of the fingerprint that differs, in words; None if all parts that both have are equal."""
    for name, words in PARTS.items():
        if name in stored and name in expected and stored[name] != expected[name]:
            return f"{words} ({_short(stored[name])} there, {_short(expected[name])} here)"
    return None


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a shard atomically; its entry for the index."""
    with atomic_file(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        return {"file": file.name, "bytes": temporary.stat().st_size, "sha256": sha256(temporary)}


def check_shard(folder: Path, listed: Mapping[str, Any], thorough: bool) -> None:
    """Compare a shard with its entry in the index.

    Raises:
        ValueError: If it is missing, has another size or, where ``thorough``, another SHA-256.
    """
    file = folder / listed["file"]
    remedy = "call cache_teacher again as before, it writes what is missing; of a recipe, remove the stage's folder"
    if not file.is_file():
        raise ValueError(f"{file} is missing, and {INDEX} names it: {remedy}")
    if (size := file.stat().st_size) != listed["bytes"]:
        raise ValueError(f"{file} has {size} bytes, {listed['bytes']} expected: truncated? {remedy.capitalize()}")
    if thorough and sha256(file) != listed["sha256"]:
        raise ValueError(f"{file} was altered: its SHA-256 is not the one in {INDEX}; {remedy}")


class Shard:
    """An open shard, memory-mapped.

    Args:
        folder: The cache's.
        part: The samples that it holds.
        entries: What is stored of each sample.

    Raises:
        ValueError: If its tensors are others.
    """

    def __init__(self, folder: Path, part: Part, entries: Mapping[str, Entry]) -> None:
        self.file, self.entries = folder / part.file, entries
        try:
            with safe_open(self.file, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                shapes = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
                self._check(shapes, len(part))
                self.tensors = {name: file.get_tensor(name) for name in shapes}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file} is not a shard of a teacher cache: {error}") from error
        for name, entry in entries.items():
            if entry.ragged:
                self._check_cuts("offsets", "log_z" if entry.draws else name)
            for other in ("ids", "counts", "log_probs") if entry.draws else ():
                self._check_cuts("pointer", other)

    def span(self, entry: Entry, sample: int) -> tuple[int, int]:
        """The rows, or positions, of a sample: first and last + 1."""
        if entry.ragged:
            offsets = self.tensors["offsets"]
            return int(offsets[sample]), int(offsets[sample + 1])
        size = prod(entry.shape) if entry.draws else 1
        return sample * size, (sample + 1) * size

    def _check(self, shapes: Mapping[str, tuple[str, tuple[int, ...]]], count: int) -> None:
        expected: dict[str, tuple[str, tuple[Any, ...]]] = {"digest": ("U8", (count, DIGEST))}
        if any(entry.ragged for entry in self.entries.values()):
            expected["offsets"] = ("I64", (count + 1,))
        for name, entry in self.entries.items():
            lead = None if entry.ragged else count
            if not entry.draws:
                expected[name] = (CODES[entry.dtype], (lead, *entry.shape))
                continue
            positions = None if lead is None else lead * prod(entry.shape)
            expected |= {
                "pointer": ("I64", (None if positions is None else positions + 1,)),
                "log_z": ("F32", (positions,)),
                "ids": ("I32", (None,)),
                "counts": ("I32", (None,)),
                "log_probs": (CODES[entry.dtype], (None,)),
            }
        for name in sorted({*expected, *shapes}):
            if not _fits(shapes.get(name), expected.get(name)):
                raise ValueError(
                    f"{self.file} does not match {INDEX}: {name!r} is {shapes.get(name)} and not {expected.get(name)}"
                )

    def _check_cuts(self, marks: str, name: str) -> None:
        cuts, rows = self.tensors[marks], len(self.tensors[name])
        if int(cuts[0]) != 0 or int(cuts[-1]) != rows or bool((cuts.diff() < 0).any()):
            raise ValueError(f"{self.file} is damaged: {marks!r} does not cut up the {rows} rows of {name!r}")


def _fits(actual: tuple[str, tuple[int, ...]] | None, expected: tuple[str, tuple[Any, ...]] | None) -> bool:
    if actual is None or expected is None or actual[0] != expected[0] or len(actual[1]) != len(expected[1]):
        return False
    return all(size is None or size == other for other, size in zip(actual[1], expected[1]))


def _check_shards(index: Mapping[str, Any]) -> None:
    fingerprint = index["fingerprint"]
    for name in ("samples", "views"):
        if type(fingerprint.get(name)) is not int or not 0 < fingerprint[name] < 2**40:
            raise ValueError(f"the number of {name} is {fingerprint.get(name)!r}")
    if index["shard_size"] < 1 or fingerprint["views"] * -(-fingerprint["samples"] // index["shard_size"]) > 2**20:
        raise ValueError(f"shard_size is {index['shard_size']}")
    names = {part.file for part in plan_of(index)}
    for listed in index["shards"]:
        if not isinstance(listed, dict) or listed.get("file") not in names:
            raise ValueError(f"{str(listed)[:100]} is none of its shards")
        if type(listed.get("bytes")) is not int or not isinstance(listed.get("sha256"), str):
            raise ValueError(f"{listed['file']!r} lacks 'bytes' or 'sha256'")
    if index["complete"] and {listed["file"] for listed in index["shards"]} != names:
        raise ValueError(f"it has {len(index['shards'])} of {len(names)} shards and is marked complete")


def _checksum(index: Mapping[str, Any]) -> str:
    text = json.dumps(index, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
