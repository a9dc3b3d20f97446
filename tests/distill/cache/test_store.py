"""A damaged, truncated or altered cache is an error, never a wrong target."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.cache import CachedTeacher, store
from tests.helpers.cache_data import Words, loader, pad


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index of the cache, and seal it again as if that had been meant."""
    index = store.read_index(path / "train")
    change(index)
    plain = {name: value for name, value in index.items() if name != "sha256"}
    (path / "train" / "cache.json").write_text(json.dumps({**plain, "sha256": store._checksum(plain)}))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def test_a_shard_that_is_gone_or_cut_or_altered(cached_words: Path) -> None:
    file = cached_words / "train" / "shard-00001.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in (0, 12, header - 2, header, (header + len(content)) // 2, len(content) - 1):
        flip(file, place)
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors was altered: its SHA-256.*call cache_teacher"):
            CachedTeacher(cached_words)
        file.write_bytes(content)
    for size in (0, 7, header, len(content) - 1):
        file.write_bytes(content[:size])
        for verify in (True, False):
            with pytest.raises(ValueError, match=f"has {size} bytes, {len(content)} expected: truncated"):
                CachedTeacher(cached_words, verify=verify)
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing, and cache.json names it"):
        CachedTeacher(cached_words)


def test_without_verifying_a_damaged_header_is_still_an_error(cached_words: Path) -> None:
    file = cached_words / "train" / "shard-00000.safetensors"
    content = file.read_bytes()
    for place in (0, 3, 7, 9, 30, 60):
        flip(file, place)
        attached = CachedTeacher(cached_words, verify=False).attach(loader(Words(), 3, collate_fn=pad))
        with pytest.raises(
            ValueError, match=r"shard-00000.safetensors is not (a shard of a teacher cache|what cache.json says)"
        ):
            next(iter(attached))
        file.write_bytes(content)


def test_every_byte_of_the_index_counts(cached_words: Path) -> None:
    file = cached_words / "train" / "cache.json"
    content = file.read_bytes()
    for place in range(0, len(content) - 1, 7):
        if content[place : place + 1].isspace():
            continue
        flip(file, place)
        with pytest.raises(
            ValueError, match=r"cache.json (cannot be read|is not a|has version|was altered|is damaged)"
        ):
            CachedTeacher(cached_words)
        file.write_bytes(content)
    for size in range(0, len(content) - 2, 50):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cannot be read as a teacher cache"):
            CachedTeacher(cached_words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format="safetensors"), "is not a teacher cache: its format is not"),
        (lambda index: index.update(version=2), "has version 2, this version reads 1: is a newer one needed"),
        (lambda index: index.update(shards={}), "'shards' is not a list"),
        (lambda index: index["fingerprint"].update(samples=10**13), "the number of samples is 10000000000000"),
        (lambda index: index["fingerprint"].update(views=-1), "the number of views is -1"),
        (lambda index: index.update(shard_size=0), "shard_size is 0"),
        (lambda index: index["shards"].pop(), "it has 2 of 3 shards and is marked complete"),
        (lambda index: index["shards"][0].update(file="../../secret"), "is none of its shards"),
        (lambda index: index["shards"][0].update(bytes="many"), "lacks 'bytes' or 'sha256'"),
        (lambda index: index["entries"]["logits"].update(shape=[2**39, 2**39]), "out of range"),
        (lambda index: index["entries"]["logits"].update(shape=[-1]), "out of range"),
        (lambda index: index["entries"]["logits"].update(dtype="object"), "no known dtype"),
        (lambda index: index["entries"].update(logits=3), "is no entry"),
    ],
)
def test_an_index_that_makes_no_sense(
    cached_words: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite(cached_words, change)
    with pytest.raises(ValueError, match=message):
        CachedTeacher(cached_words)


def test_shards_of_another_shape_than_the_index_says(cached_words: Path) -> None:
    rewrite(cached_words, lambda index: index["entries"]["logits"].update(shape=[12]))
    attached = CachedTeacher(cached_words).attach(loader(Words(), 3, collate_fn=pad))
    with pytest.raises(ValueError, match=r"does not match cache.json: 'logits' is \('F32', \(10, 11\)\) and not"):
        next(iter(attached))


def test_cuts_that_do_not_cut(cached_words: Path) -> None:
    from safetensors.torch import load_file

    file = cached_words / "train" / "shard-00000.safetensors"
    tensors = load_file(file)
    tensors["offsets"][1] = 99

    def known(index: dict[str, Any]) -> None:
        index["shards"][0] = store.write_shard(file, tensors)

    rewrite(cached_words, known)
    with pytest.raises(ValueError, match="'offsets' does not cut up the 10 rows of 'logits'"):
        next(iter(CachedTeacher(cached_words).attach(loader(Words(), 3, collate_fn=pad))))
