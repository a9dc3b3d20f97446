"""Samples are recognised by a digest of their values; random data sets are refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.cache import CachedTeacher, cache_teacher
from distill.cache.samples import digests
from tests.helpers.cache_data import (
    WIDTH,
    N,
    Shaken,
    loader,
    samples,
)


def test_a_data_set_that_is_random_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Noisy(Dataset):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(WIDTH) + (torch.rand(()) < 0.5), 0

    def masking(items: list[Any]) -> Any:
        x = torch.stack([item[0] for item in items])
        return x * (torch.rand_like(x) < 0.5), 0

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"Noisy gives another sample \d+ each time.*attribute 'views'"):
        cache_teacher(nn.Identity(), loader(Noisy()), tmp_path)
    with pytest.raises(ValueError, match="collate_fn makes another batch of the same samples each time"):
        cache_teacher(nn.Identity(), loader(collate_fn=masking), tmp_path)
    with pytest.raises(ValueError, match=r"Shaken has views=0, new ones every epoch.*give it a number of views"):
        cache_teacher(nn.Identity(), loader(Shaken(0)), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(tmp_path.iterdir())


class Typed:
    """What a tokenizer of transformers looks like from here."""

    def __init__(self, *words: str, padding: Any = None) -> None:
        self.backend_tokenizer = self
        self.words, self.padding = words, padding

    def to_str(self) -> str:
        return json.dumps({"model": self.words, "padding": self.padding, "truncation": None})


def test_another_data_set_transform_tokenizer_or_collate_fn(tmp_path: Path) -> None:
    data: Any = samples()
    data.tokenizer = Typed("a", "b")
    cache_teacher(nn.Linear(WIDTH, 2), loader(data), tmp_path)
    cached = CachedTeacher(tmp_path)
    cached.attach(loader())
    data.tokenizer = Typed("a", "b", padding={"length": 3})
    cached.attach(loader(data))
    data.tokenizer = Typed("b", "a")
    with pytest.raises(ValueError, match="stale, it was made with another tokenizer"):
        cached.attach(loader(data))
    with pytest.raises(ValueError, match=r"another number of samples \(22 there, 21 here\)"):
        cached.attach(loader(samples(0, 21)))
    with pytest.raises(ValueError, match="another data set, transform or order of samples"):
        cached.attach(loader(samples(1)))
    with pytest.raises(ValueError, match="another collate_fn"):
        cached.attach(loader(collate_fn=lambda items: torch.stack([x for x, _ in items])))


def test_every_sample_is_compared_when_it_is_looked_up(tmp_path: Path) -> None:
    data = samples()
    cache_teacher(nn.Linear(WIDTH, 2), loader(data), tmp_path)
    attached = CachedTeacher(tmp_path).attach(loader(data))
    data.tensors[0][20] *= 1 + 1e-6
    with pytest.raises(ValueError, match="sample 20 is not what was cached"):
        list(attached)
    assert len(list(CachedTeacher(tmp_path, verify=False).attach(loader(data)))) == 6


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_digest_is_of_the_values_of_one_sample(kind: type) -> None:
    x, y = torch.randn(5, 3, dtype=torch.bfloat16), torch.arange(5)
    batch = {"x": x, "y": y} if kind is dict else (x, y)
    first = digests(batch, 5)
    assert len({tuple(row) for row in first.tolist()}) == 5
    x[3, 1] += 1
    changed = (digests(batch, 5) != first).any(1)
    assert changed.tolist() == [False, False, False, True, False]
    items = [{"ids": [1, 2], "text": "a", "more": [torch.ones(2), None]}, {"ids": [1, 2], "text": "b"}]
    one, other = digests(items, 2)
    assert not torch.equal(one, other)
    assert torch.equal(digests(copy.deepcopy(items), 2)[1], other)
