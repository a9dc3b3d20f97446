import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prune.masks import Masks
from prune.masks.masks import pack, unpack


def mlp(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3))


# Validated data


def test_what_is_refused():
    good = torch.ones(2, dtype=torch.bool)
    cases = [
        ({}, "no masks given"),
        ({"": good}, "mask name ''"),
        ({3: good}, "mask name 3"),
        ({"w": torch.ones(2)}, r"'w' is torch\.float32"),
        ({"w": [True]}, "'w' is list"),
        ({"w": good.to("meta")}, "'w' is on the meta device: give a plain tensor"),
        ({"v": good, "w": good[:0]}, r"'w' of shape \(0,\) has no entries"),
    ]
    for masks, message in cases:
        with pytest.raises(ValueError, match=message):
            Masks(masks)  # pyright: ignore[reportArgumentType]


def test_masks_are_copied_in_and_keep_their_order():
    given_ = {"b": torch.tensor([True, False]), "a": torch.tensor([[True]])}
    masks = Masks(given_)
    given_["b"].zero_()
    assert masks["b"].tolist() == [True, False]
    assert list(masks) == ["b", "a"]
    assert "3 weights" in repr(masks)
    with pytest.raises(TypeError):
        hash(masks)


class Tied(nn.Module):
    """One weight under two names, and a third that has it transposed in its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3, bias=False)
        self.same = nn.Linear(4, 3, bias=False)
        self.back = nn.Linear(3, 4, bias=False)
        self.same.weight = self.first.weight
        self.back.weight = nn.Parameter(self.first.weight.data.t())


def test_ones_of_a_model_names_shared_memory_once():
    """Pitfall 6: keyed by storage."""
    assert list(Masks.ones(Tied())) == ["first.weight"]
    model = mlp()
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(Masks.ones(model)) == list(Masks.ones(model.named_parameters())) == names
    assert list(Masks.ones({"w": model[0].weight})) == ["w"]
    assert Masks.ones(model).density == 1


# Numbers


def test_the_denominators_by_name():
    """Pitfall 8."""
    model = mlp()
    mask = torch.zeros(10, 6, dtype=torch.bool)
    mask[:3] = True
    masks = Masks({"0.weight": mask, "2.weight": torch.ones(3, 10, dtype=torch.bool)})
    assert masks.counts() == {"0.weight": (18, 60), "2.weight": (30, 30)}
    assert masks.density == masks.prunable_density == 48 / 90
    assert masks.layer_densities() == {"0.weight": 0.3, "2.weight": 1}
    assert masks.model_density(model) == (48 + 13) / (90 + 13)
    assert masks.stored_bytes(model) == (4 * 103, 4 * (48 + 13) + 8 + 4)
    assert masks.stored_bytes(model.bfloat16()).sparse == 2 * (48 + 13) + 8 + 4


def test_model_density_counts_shared_weights_once():
    masks = Masks({"first.weight": torch.eye(3, 4, dtype=torch.bool)})
    assert masks.model_density(Tied()) == 3 / 12
    assert masks.stored_bytes(Tied()) == (4 * 12, 4 * 3 + 2)
    with pytest.raises(ValueError, match="name no parameter"):
        masks.model_density(mlp())


# Algebra

bits = st.lists(st.booleans(), min_size=17, max_size=17)


def of(values: list[bool]) -> Masks:
    whole = torch.tensor(values)
    return Masks({"a": whole[:12].view(3, 4), "b": whole[12:]})


def positions(masks: Masks) -> set[tuple[str, int]]:
    return {(n, i) for n, mask in masks.items() for i, on in enumerate(mask.flatten().tolist()) if on}


@settings(deadline=None)
@given(bits, bits)
def test_algebra_is_that_of_sets(a: list[bool], b: list[bool]):
    one, two = of(a), of(b)
    x, y = positions(one), positions(two)
    assert positions(one & two) == x & y
    assert positions(one | two) == x | y
    assert positions(one - two) == x - y
    assert one.is_subset(two) == (x <= y)
    assert one.overlap(two).jaccard == (len(x & y) / len(x | y) if x | y else 1.0)
    for name, overlap in one.layer_overlaps(two).items():
        u, v = ({place for place in places if place[0] == name} for places in (x, y))
        assert overlap.jaccard == (len(u & v) / len(u | v) if u | v else 1.0)
    sizes = {"a": 12, "b": 5}
    assert one.overlap(two).hamming == len(x ^ y) / 17
    chance = sum(sum(p[0] == n for p in x) * sum(p[0] == n for p in y) / size for n, size in sizes.items())
    assert one.overlap(two).chance == pytest.approx(chance / (len(x) + len(y) - chance) if x | y else 1.0)
    assert (one == two) == (x == y) == (one.hash() == two.hash())


def test_overlap_by_chance_is_that_of_masks_drawn_apart():
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Masks:
        shares = {"a": (40, 50, 0.3), "b": (1000, 1, 0.8)}
        counts = {n: int(rows * columns * share) for n, (rows, columns, share) in shares.items()}
        flat = {n: torch.zeros(rows * columns, dtype=torch.bool) for n, (rows, columns, _) in shares.items()}
        for name, mask in flat.items():
            mask[torch.randperm(len(mask), generator=generator)[: counts[name]]] = True
        return Masks(flat)

    pairs = [(drawn(), drawn()) for _ in range(20)]
    mean = sum(one.overlap(two).jaccard for one, two in pairs) / len(pairs)
    assert pairs[0][0].overlap(pairs[0][1]).chance == pytest.approx(mean, abs=0.005)


def test_different_masks_cannot_be_combined():
    one = of([True] * 17)
    fewer = Masks({"a": one["a"]})
    flat = Masks({"a": one["a"].flatten(), "b": one["b"]})
    for act in (
        Masks.__and__,
        Masks.__or__,
        Masks.__sub__,
        Masks.is_subset,
        Masks.overlap,
        Masks.layer_overlaps,
    ):
        with pytest.raises(ValueError, match="different parameters, such as 'b'"):
            act(one, fewer)
        with pytest.raises(ValueError, match=r"'a' has shape \(3, 4\) here and \(12,\) there"):
            act(one, flat)
    assert one != fewer
    assert one != flat
    assert one != 1


def test_hash_and_equality_ignore_order_but_nothing_else():
    a, b = torch.tensor([True, False]), torch.tensor([[False]])
    masks = Masks({"a": a, "b": b})
    assert masks == Masks({"b": b, "a": a})
    assert masks.hash() == Masks({"b": b, "a": a}).hash() == masks.to("cpu").hash()
    others = [{"a": ~a, "b": b}, {"a": a, "c": b}, {"a": a[:, None], "b": b}, {"a": a}, {"a": b[0], "b": a}]
    hashes = {masks.hash()} | {Masks(other).hash() for other in others}
    assert len(hashes) == 6


def test_hash_is_the_same_in_another_process():
    code = "import torch; from prune.masks.masks import Masks; print(Masks({'w': torch.arange(19) % 3 == 0}).hash())"
    env = os.environ | {"PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert there.stdout.strip() == Masks({"w": torch.arange(19) % 3 == 0}).hash()


# On disk


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_packing_is_numpys(values: list[bool]):
    mask = torch.tensor(values, dtype=torch.bool)
    packed = pack(mask)
    assert packed.numpy().tobytes() == np.packbits(mask.numpy()).tobytes()
    assert torch.equal(unpack(packed, [len(values)]), mask)


def test_packing_any_shape_and_layout():
    mask = torch.arange(30).view(5, 6).t() % 4 == 1
    assert torch.equal(unpack(pack(mask), mask.shape), mask)
    assert torch.equal(unpack(pack(torch.tensor(True)), []), torch.tensor(True))
    with pytest.raises(ValueError, match=r"give torch\.bool"):
        pack(torch.ones(3))


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(1, dtype=torch.uint8), "needs 2 bytes"),
        (torch.zeros(3, dtype=torch.uint8), "needs 2 bytes"),
        (torch.zeros(1, 2, dtype=torch.uint8), "needs 2 bytes"),
        (torch.zeros(2), r"torch\.float32"),
        (torch.tensor([0, 1], dtype=torch.uint8), "padding after the 9 bits"),
    ],
)
def test_unpacking_what_does_not_fit(packed: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        unpack(packed, [3, 3])


@settings(deadline=None, max_examples=30)
@given(bits)
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, values: list[bool]):
    folder = tmp_path_factory.mktemp("masks")
    masks = Masks(dict(reversed(list(of(values).items()))))
    masks.save(folder / "m.safetensors")
    loaded = Masks.load(str(folder / "m.safetensors"))
    assert loaded == masks
    assert loaded.hash() == masks.hash()
    assert list(loaded) == list(masks) == ["b", "a"]
    assert [p.name for p in folder.iterdir()] == ["m.safetensors"]


def test_one_bit_per_weight_on_disk(tmp_path: Path):
    Masks({"w": torch.ones(800, 1000, dtype=torch.bool)}).save(tmp_path / "m")
    assert 100_000 <= (tmp_path / "m").stat().st_size < 100_500


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "m"
    masks = of([True] * 17)
    masks.save(file)

    def full(*_: object) -> None:
        raise OSError("no space left")

    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, full)
            with pytest.raises(OSError, match="no space left"):
                of([False] * 17).save(file)
        assert Masks.load(file) == masks
        assert list(tmp_path.iterdir()) == [file]


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path):
    of([True] * 17).save(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        (tmp_path / "part").write_bytes(content[:length])
        with pytest.raises(ValueError, match="part is not a file of masks"):
            Masks.load(tmp_path / "part")


def test_no_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "nothing")


GOOD = {"w": torch.tensor([0b10100000], dtype=torch.uint8)}
META = {"format": "prune.masks.masks", "version": "1", "shapes": '{"w": [3]}'}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (GOOD, None, "its format and version"),
        (GOOD, META | {"format": "pt"}, "its format and version"),
        (GOOD, META | {"version": "2"}, "its format and version"),
        (GOOD, {k: v for k, v in META.items() if k != "shapes"}, "not a file of masks"),
        (GOOD, META | {"shapes": "{"}, "not a file of masks"),
        (GOOD, META | {"shapes": "[" * 100_000}, "nested too deeply"),
        (GOOD, META | {"shapes": "[3]"}, "not lists of positive integers"),
        *(
            (GOOD, META | {"shapes": json.dumps({"w": shape})}, "not lists of positive integers")
            for shape in (3, None, [3.0], [True], [-3], [0], ["3"])
        ),
        (GOOD, META | {"shapes": '{"v": [3]}'}, "differ in 'v', 'w'"),
        (GOOD, META | {"shapes": '{"w": [3], "v": [3]}'}, "differ in 'v'"),
        (GOOD | {"v": GOOD["w"].clone()}, META, "differ in 'v'"),
        ({}, META | {"shapes": "{}"}, "no masks given"),
        (GOOD, META | {"shapes": '{"w": [9]}'}, "needs 2 bytes of U8"),
        (GOOD, META | {"shapes": '{"w": [99999999999, 99999999999]}'}, "bytes of U8"),
        ({"w": GOOD["w"][None]}, META, r"has U8 \[1, 1\]"),
        ({"w": GOOD["w"].bool()}, META, r"has BOOL \[1\]"),
        ({"w": GOOD["w"] | 1}, META, "padding after the 3 bits"),
    ],
)
def test_a_foreign_file_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None, message: str
):
    save_file(tensors, tmp_path / "file", metadata)
    with pytest.raises(ValueError, match=message) as caught:
        Masks.load(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def test_the_file_that_is_refused_above_is_otherwise_good(tmp_path: Path):
    save_file(GOOD, tmp_path / "file", META)
    assert Masks.load(tmp_path / "file")["w"].tolist() == [True, False, True]
    Masks.load(tmp_path / "file").save(tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again")["w"], GOOD["w"])
