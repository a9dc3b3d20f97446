import gzip
import hashlib
import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zlib

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.data import _replace_dunder_methods, _update_dataloader
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from workbench.data import Augment, Digits, IDXImages, ParquetImages
from workbench.data.augment import augmented, random_bits
from workbench.data.digits import digits
from workbench.data.idx import read_idx
from workbench.data.images import SPLIT_SEED, LabelledImages, channel_scale, stratified_split
from workbench.data.parquet import decode_image, find_parquet
from workbench.training.order import EpochIndex, with_epoch_order

# --- splitting


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_split_is_a_stratified_partition(data):
    labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=80)))
    first = data.draw(st.integers(1, len(labels) - 2))
    second = data.draw(st.integers(1, len(labels) - 1 - first))
    parts = stratified_split(labels, [first, second], seed=data.draw(st.integers(0, 99)))
    assert [len(part) for part in parts] == [len(labels) - first - second, first, second]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    for c in range(5):
        exact = (labels == c).sum() * first / len(labels)
        assert abs((labels[parts[1]] == c).sum() - exact) < 1


def test_split_depends_on_its_seed_alone():
    labels = np.arange(100) % 7
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    one = stratified_split(labels, [10], 0)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    assert all((a == b).all() for a, b in zip(one, stratified_split(labels, [10], 0)))
    assert (one[1] != stratified_split(labels, [10], 1)[1]).any()


@pytest.mark.parametrize("sizes", [[0], [-1, 3], [5, 5], [11]])
def test_split_refuses(sizes):
    with pytest.raises(ValueError, match="cannot split 10 samples"):
        stratified_split(np.zeros(10), sizes, 0)


# --- digits


def loaded(module, part):
    return [torch.cat(column) for column in zip(*getattr(module, f"{part}_dataloader")())]


def test_digits_sizes_and_types():
    module = Digits(batch_size=50)
    sizes = [len(loaded(module, part)[1]) for part in ("train", "val", "test")]
    assert sizes == [1257, 180, 360]
    x, y = next(iter(module.val_dataloader()))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((50, 64), torch.float32, (50,), torch.int64)
    assert (module.classes, module.input_shape) == (10, (64,))


def test_digits_as_images_are_the_same_digits():
    flat, image = Digits(), Digits(image=True)
    x, y = loaded(image, "test")
    assert x.shape == (360, *image.input_shape) == (360, 1, 8, 8)
    assert torch.equal(x.flatten(1), loaded(flat, "test")[0])
    assert torch.equal(y, loaded(flat, "test")[1])


def test_digits_split_never_changes():
    """Records of old runs are comparable only as long as this holds."""
    parts = stratified_split(digits()[1].numpy(), [180, 360], SPLIT_SEED)
    text = json.dumps([part.tolist() for part in parts])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3cbbb18a331b56d9"


def test_digits_split_is_stratified_and_free_of_the_seed():
    torch.manual_seed(1)
    one = {part: loaded(Digits(), part) for part in ("val", "test")}
    torch.manual_seed(2)
    two = {part: loaded(Digits(), part) for part in ("val", "test")}
    assert all(torch.equal(a, b) for part in one for a, b in zip(one[part], two[part]))
    assert one["test"][1].bincount().tolist() == pytest.approx([36] * 10, abs=1)
    assert one["val"][1].bincount().tolist() == pytest.approx([18] * 10, abs=1)


def test_digits_are_standardised_on_the_training_part():
    x = {part: loaded(Digits(), part)[0].double() for part in ("train", "val", "test")}
    assert float(x["train"].mean()) == pytest.approx(0, abs=1e-5)
    assert float(x["train"].square().mean()) == pytest.approx(1, abs=1e-5)
    assert abs(float(x["test"].mean())) > 1e-4
    grey, low = digits()[0], float(x["train"].min())
    steps = (torch.cat(list(x.values())) - low) / ((float(x["train"].max()) - low) / 16)
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert torch.equal(steps.round().long().flatten().bincount(), grey.long().flatten().bincount())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)
    with pytest.raises(ValueError, match=message):
        IDXImages(tmp_path, **arguments)


# --- order


def order(module):
    return loaded(module, "train")[1].tolist()


def test_training_order_follows_the_seed():
    torch.manual_seed(1)
    one = order(Digits())
    torch.rand(3)  # drawing numbers does not change it, unlike a new seed
    assert order(Digits()) == one
    torch.manual_seed(2)
    assert order(Digits()) != one
    train = Digits().train_dataloader()
    passes = [torch.cat([y for _, y in train]).tolist() for _ in range(2)]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1])


def test_loaders_are_plain_so_that_a_trainer_can_rebuild_them():
    """Distributed splitting and resuming inside an epoch replace the sampler, and only one they know."""
    samplers = {"train": RandomSampler, "val": SequentialSampler, "test": SequentialSampler}
    for part, sampler in samplers.items():
        data_loader = getattr(Digits(), f"{part}_dataloader")()
        assert type(data_loader) is DataLoader
        assert type(data_loader.sampler) is sampler
        with _replace_dunder_methods(DataLoader, "dataset"):
            data_loader = getattr(Digits(), f"{part}_dataloader")()
        again = _update_dataloader(data_loader, DistributedSampler(data_loader.dataset, 2, 0))
        assert len(again.sampler) == math.ceil(len(data_loader.dataset) / 2)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_loading_leaves_the_global_random_state(part):
    torch.manual_seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    loaded(Digits(), part)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_only_training_is_shuffled():
    for part in ("val", "test"):
        data_loader = getattr(Digits(), f"{part}_dataloader")()
        assert torch.equal(torch.cat([y for _, y in data_loader]), data_loader.dataset.labels)
    data_loader = Digits().train_dataloader()
    assert not torch.equal(torch.cat([y for _, y in data_loader]), data_loader.dataset.labels)


def test_workers_load_the_same():
    torch.manual_seed(0)
    for part in ("train", "val"):
        here, there = loaded(Digits(), part), loaded(Digits(num_workers=1), part)
        assert all(torch.equal(a, b) for a, b in zip(here, there))


def test_a_batch_is_its_samples():
    data = LabelledImages(torch.arange(12, dtype=torch.uint8).reshape(6, 2), torch.arange(6), 3.0, 2.0)
    x, y = data.__getitems__([4, 1])
    for row, index in enumerate([4, 1]):
        assert torch.equal(x[row], data[index][0])
        assert torch.equal(y[row], data[index][1])
    assert x.tolist() == [[2.5, 3.0], [-0.5, 0.0]]


# --- idx files


def idx(array, kind=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def write(path, array):
    content = idx(array)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@given(data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_idx_round_trip_and_every_truncation(tmp_path, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    array = np.random.RandomState(data.draw(st.integers(0, 99))).randint(256, size=shape).astype(np.uint8)
    content = idx(array)
    zipped = gzip.compress(content)
    for whole in (content, zipped):
        (tmp_path / "a").write_bytes(whole)
        assert torch.equal(read_idx(tmp_path / "a", array.ndim), torch.from_numpy(array))
        cut = data.draw(st.integers(0, len(whole) - 1))
        (tmp_path / "a").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"/a: "):
            read_idx(tmp_path / "a", array.ndim)
        (tmp_path / "a").write_bytes(whole + b"\1")
        with pytest.raises(ValueError, match=r"/a: "):
            read_idx(tmp_path / "a", array.ndim)
    (tmp_path / "a").write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(ValueError, match=r"found only|cannot hold|ends inside"):
        read_idx(tmp_path / "a", array.ndim)
    (tmp_path / "a").write_bytes(gzip.compress(content + b"\1"))
    with pytest.raises(ValueError, match="found more"):
        read_idx(tmp_path / "a", array.ndim)


def test_idx_spanning_chunks(tmp_path):
    array = np.random.RandomState(0).randint(256, size=(3, 700, 701)).astype(np.uint8)
    for name in ("plain", "zipped.gz"):
        write(tmp_path / name, array)
        assert torch.equal(read_idx(tmp_path / name, 3), torch.from_numpy(array))


def test_a_flipped_bit_in_gzip_is_found(tmp_path):
    broken = bytearray(gzip.compress(idx(np.arange(200, dtype=np.uint8)), compresslevel=0))
    broken[60] ^= 1
    (tmp_path / "a.gz").write_bytes(broken)
    with pytest.raises(ValueError, match=r"a\.gz: broken gzip stream .*fetch the file again"):
        read_idx(tmp_path / "a.gz", 1)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(2**32 - 1, 2**32 - 1, 2**32 - 1), (60_000, 28, 28)])
def test_a_boastful_header_allocates_nothing(tmp_path, pack, shape):
    path = tmp_path / "boast"
    path.write_bytes(pack(struct.pack(">BBBB3I", 0, 0, 8, 3, *shape) + bytes(100)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"boast: shape .* needs \d+ bytes of elements, the file"):
        read_idx(path, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with bytes none, expected 00 00 08 03"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "starts with bytes 89 50 4e 47"),
        (idx(np.zeros((2, 3), np.uint8)), "expected 00 00 08 03"),
        (idx(np.zeros((2, 3, 3), np.float32), 0x0D), "starts with bytes 00 00 0d 03"),
        (idx(np.zeros((2, 3, 3), np.uint8))[:10], "ends inside its header, expected 16 bytes"),
        (idx(np.zeros((0, 3, 3), np.uint8)), "at least 1 long"),
    ],
)
def test_foreign_files_are_named(tmp_path, content, message):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(ValueError, match=rf"images: .*{message}"):
        read_idx(tmp_path / "images", 3)


def test_no_file_no_tensor(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="no such file; give the path"):
            read_idx(path, 3)


# --- image sets


@pytest.fixture
def folder(tmp_path):
    random = np.random.RandomState(0)
    for part, mark, suffix, n in [("train", "-", ".gz", 120), ("t10k", ".", "", 30)]:
        labels = np.arange(n, dtype=np.uint8) % 4
        images = (40 * labels[:, None, None] + random.randint(100, size=(n, 6, 5))).astype(np.uint8)
        write(tmp_path / f"{part}-images{mark}idx3-ubyte{suffix}", images)
        write(tmp_path / f"{part}-labels{mark}idx1-ubyte{suffix}", labels)
    return tmp_path


def test_images_in_parts(folder):
    module = IDXImages(folder, batch_size=7, validation=20, classes=4)
    assert module.input_shape == (1, 6, 5)
    parts = {part: loaded(module, part) for part in ("train", "val", "test")}
    assert {part: len(y) for part, (_, y) in parts.items()} == {"train": 100, "val": 20, "test": 30}
    assert parts["val"][1].bincount().tolist() == [5] * 4
    x, y = next(iter(module.train_dataloader()))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((7, 1, 6, 5), torch.float32, (7,), torch.int64)
    assert float(parts["train"][0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(parts["train"][0].square().mean()) == pytest.approx(1, abs=1e-5)


def test_images_as_stored(folder):
    module = IDXImages(str(folder), validation=20, classes=4, normalize=False)
    x, y = loaded(module, "test")
    assert torch.equal((x * 255).round().byte().squeeze(1), read_idx(folder / "t10k-images.idx3-ubyte", 3))
    assert torch.equal(y.byte(), read_idx(folder / "t10k-labels.idx1-ubyte", 1))
    train, val = (loaded(module, part)[0] for part in ("train", "val"))
    whole = read_idx(folder / "train-images-idx3-ubyte.gz", 3)
    found = (torch.cat([train, val]) * 255).round().byte().squeeze(1)
    assert sorted(found.flatten(1).tolist()) == sorted(whole.flatten(1).tolist())


def test_blank_images_are_not_divided_by_zero(tmp_path):
    for part in ("train", "t10k"):
        write(tmp_path / f"{part}-images-idx3-ubyte", np.full((4, 2, 2), 7, np.uint8))
        write(tmp_path / f"{part}-labels-idx1-ubyte", np.zeros(4, np.uint8))
    assert torch.equal(loaded(IDXImages(tmp_path, validation=1), "train")[0], torch.zeros(3, 1, 2, 2))


def test_root_may_hold_variables(folder, monkeypatch):
    monkeypatch.setenv("SOMEWHERE", str(folder.parent))
    assert IDXImages(f"$SOMEWHERE/{folder.name}", validation=5).input_shape == (1, 6, 5)


def test_missing_things_are_named(folder):
    with pytest.raises(ValueError, match="nowhere: no such folder; set root to the folder"):
        IDXImages(folder / "nowhere").setup()
    (folder / "t10k-labels.idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"found none of t10k-labels-idx1-ubyte, t10k-labels\.idx1-ubyte, .*\.gz"):
        IDXImages(folder, validation=5).setup()


def test_sets_that_do_not_fit_are_named(folder):
    with pytest.raises(ValueError, match="label 3, but classes=3"):
        IDXImages(folder, validation=5, classes=3).setup()
    with pytest.raises(ValueError, match="cannot split 120 samples"):
        IDXImages(folder, validation=120).setup()
    write(folder / "t10k-images.idx3-ubyte", np.zeros((30, 5, 6), np.uint8))
    with pytest.raises(ValueError, match=r"training images are \(6, 5\), test images \(5, 6\)"):
        IDXImages(folder, validation=5).setup()
    write(folder / "t10k-images.idx3-ubyte", np.zeros((29, 6, 5), np.uint8))
    with pytest.raises(ValueError, match=r"29 images, .* 30 labels"):
        IDXImages(folder, validation=5).setup()
    for arguments in ({"validation": 0}, {"classes": 0}):
        with pytest.raises(ValueError, match="both must be at least 1"):
            IDXImages(folder, **arguments)


def test_plain_wins_over_zipped(folder):
    write(folder / "train-images-idx3-ubyte", np.zeros((120, 6, 5), np.uint8))
    assert float(loaded(IDXImages(folder, validation=5, normalize=False), "train")[0].max()) == 0


# --- augmentation


def splitmix64(state):
    """Vigna's splitmix64.c: the next number, and the state after it."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = state
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31), state


@given(st.integers(-(2**70), 2**70), st.integers(0, 9), st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 500))))
@settings(deadline=None, max_examples=50)
def test_random_bits_are_a_function_of_seed_view_and_index(seed, views, samples):
    bits = random_bits([EpochIndex(index, epoch) for index, epoch in samples], views, seed, 3)
    assert bits.shape == (3, len(samples))
    for column, (index, epoch) in enumerate(samples):
        view = epoch % views if views else epoch
        key = splitmix64(seed % 2**64)[0]
        key = splitmix64((key + view) % 2**64)[0]
        state = splitmix64((key + index) % 2**64)[0]
        for row in range(3):
            expected, _ = splitmix64((state + 0x9E3779B97F4A7C15 * (row + 1)) % 2**64)
            assert int(bits[row, column]) == expected


def test_splitmix64_is_the_published_one():
    """The first numbers of seed 1234567, from Rosetta Code."""
    state, found = 1234567, []
    for _ in range(3):
        number, state = splitmix64(state)
        found.append(number)
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_bits_are_evenly_distributed():
    """Over indices, views and seeds alike; 9 places and a coin, chi squared below its 1 - 1e-6 quantile."""
    many = 9000
    for bits in (
        random_bits([EpochIndex(i, 0) for i in range(many)], 0, 0, 3),
        random_bits([EpochIndex(5, epoch) for epoch in range(many)], 0, 0, 3),
        np.concatenate([random_bits([EpochIndex(5, 0)], 0, seed, 3) for seed in range(many)], 1),
    ):
        places = np.bincount((bits[0] >> np.uint64(32)) * np.uint64(9) >> np.uint64(32), minlength=9)
        assert ((places - many / 9) ** 2 / (many / 9)).sum() < 42.7
        assert abs((bits[2] >> np.uint64(63)).sum() - many / 2) < 5 * (many / 4) ** 0.5
        ones = np.unpackbits(bits.view(np.uint8)).reshape(-1, 64).mean(0)
        assert np.abs(ones - 0.5).max() < 5 * (1 / 4 / (3 * many)) ** 0.5


def crop(image, padding, row, column, mirrored):
    """One image, by the book."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                y, x = i + row - padding, (width - 1 - j if mirrored else j) + column - padding
                if 0 <= y < height and 0 <= x < width:
                    out[c, i, j] = image[c, y, x]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("augment", [Augment(), Augment(2, False), Augment(0, True), Augment(7)])
def test_augmented_by_the_book(augment, dtype):
    images = torch.randint(1, 256, (12, 2, 5, 6)).to(dtype)
    before = images.clone()
    bits = random_bits([EpochIndex(i, 3) for i in range(12)], 0, 1, 3)
    found = augmented(images, augment, bits)
    assert torch.equal(images, before)
    assert (found.dtype, found.shape) == (dtype, images.shape)
    for n, image in enumerate(images):
        row, column = (int(bits[k, n]) // 2**32 * (2 * augment.padding + 1) // 2**32 for k in (0, 1))
        mirrored = augment.flip and int(bits[2, n]) >= 2**63
        assert torch.equal(found[n], crop(image, augment.padding, row, column, mirrored))


def test_augmentation_reaches_every_place():
    image = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    image[0, 0, 1, 1] = 1
    found = augmented(
        image.expand(500, -1, -1, -1), Augment(1), random_bits([EpochIndex(i, 0) for i in range(500)], 0, 0, 3)
    )
    assert found.flatten(1).sum(1).tolist() == [1] * 500, "the middle is never lost"
    assert (found.sum(0) > 30).all(), "and seen everywhere"


@pytest.fixture
def varied():
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    return LabelledImages(images, torch.arange(40), 3.0, 2.0, Augment(), views=4, seed=5)


def test_views_repeat_and_differ(varied):
    def at(epoch, data=varied):
        return data.__getitems__([EpochIndex(i, epoch) for i in range(40)])[0]

    assert varied.views == 4
    assert torch.equal(at(1), at(5)), "view = epoch % views"
    assert len({tuple(at(epoch).flatten().tolist()) for epoch in range(9)}) == 4
    unbounded = LabelledImages(varied.images, varied.labels, 3.0, 2.0, Augment(), seed=5)
    assert unbounded.views == 0
    assert torch.equal(at(3, unbounded), at(3))
    assert not torch.equal(at(1, unbounded), at(5, unbounded))
    other = LabelledImages(varied.images, varied.labels, 3.0, 2.0, Augment(), views=4, seed=6)
    assert not torch.equal(at(1, other), at(1))
    for plain in (None, Augment(0, False)):
        data = LabelledImages(varied.images, varied.labels, augment=plain, views=4)
        assert data.views == 1
        assert torch.equal(at(1, data), varied.images.float())


def test_an_augmented_sample_is_the_same_alone_in_any_batch_and_elsewhere(varied):
    whole = varied.__getitems__([EpochIndex(i, 2) for i in range(40)])[0]
    elsewhere = pickle.loads(pickle.dumps(varied))
    order = torch.randperm(40).tolist()
    torch.rand(7)
    for found in (
        varied.__getitems__([EpochIndex(i, 2) for i in order])[0],
        elsewhere.__getitems__([EpochIndex(i, 2) for i in order])[0],
    ):
        assert torch.equal(found, whole[order])
    assert torch.equal(torch.stack([varied[EpochIndex(i, 2)][0] for i in range(40)]), whole)


def test_without_an_epoch_the_global_generator_decides(varied):
    torch.manual_seed(1)
    one, two = varied.__getitems__([0, 1, 2])[0], varied.__getitems__([0, 1, 2])[0]
    assert not torch.equal(one, two)
    torch.manual_seed(1)
    assert torch.equal(varied.__getitems__([0, 1, 2])[0], one)
    state = torch.get_rng_state()
    varied.__getitems__([EpochIndex(0, 1)])
    assert torch.equal(torch.get_rng_state(), state)


def test_views_of_a_module(folder):
    def epochs(seed, **arguments):
        torch.manual_seed(seed)
        module = IDXImages(folder, validation=20, classes=4, **arguments)
        data = module.train_dataloader().dataset
        assert data.images is module.parts["train"].images, "not copied"
        assert module.parts["val"].augment is module.parts["test"].augment is None
        return [data.__getitems__([EpochIndex(i, epoch) for i in range(100)])[0] for epoch in range(4)]

    bounded, again = epochs(1, augment=True, views=2), epochs(2, augment=True, views=2)
    assert all(torch.equal(a, b) for a, b in zip(bounded, again)), "kept outputs of a teacher fit any run"
    assert torch.equal(bounded[0], bounded[2])
    assert not torch.equal(bounded[0], bounded[1])
    fresh, again, other = (epochs(seed, augment=True) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(fresh, again))
    assert not any(torch.equal(a, b) for a, b in zip(fresh, other))
    assert not any(torch.equal(fresh[0], each) for each in fresh[1:])
    plain = epochs(1)
    assert torch.equal(plain[0], plain[3])
    mirrored = epochs(1, augment=Augment(padding=0, flip=True))[0]
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(mirrored, plain[0])]
    assert 25 < sum(flipped) < 75
    assert all(flip or torch.equal(a, b) for flip, a, b in zip(flipped, mirrored, plain[0]))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_in_the_middle_of_an_epoch_augmentation_goes_on(folder, workers):
    def made():
        torch.manual_seed(3)
        module = IDXImages(folder, batch_size=16, validation=20, classes=4, num_workers=workers, augment=True)
        found = with_epoch_order(module.train_dataloader(), 7)
        found.batch_sampler.sampler.set_epoch(2)
        return found

    whole = list(made())
    stopped = made()
    first = [batch for batch, _ in zip(stopped, range(3))]
    resumed = made()
    resumed.load_state_dict({"epoch": 2, "seen": 3})
    torch.rand(5)
    pieces = [*first, *resumed]
    assert len(pieces) == len(whole) == 7
    assert all(torch.equal(a, b) for one, two in zip(pieces, whole) for a, b in zip(one, two))


def test_ranks_see_the_same_views_as_one(folder):
    def batches(rank, world, size):
        torch.manual_seed(3)
        module = IDXImages(folder, batch_size=size, validation=20, classes=4, augment=True)
        found = with_epoch_order(module.train_dataloader(), 7, rank, world)
        found.batch_sampler.sampler.set_epoch(1)
        return torch.cat([x for x, _ in found])

    one, ranks = batches(0, 1, 20), [batches(rank, 2, 10) for rank in (0, 1)]
    assert torch.equal(one[0::2], ranks[0])
    assert torch.equal(one[1::2], ranks[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"views": -1, "augment": True}, "views=-1: give a number of views, or 0"),
        ({"views": 2}, "views=2 without augmentation"),
        ({"views": 2, "augment": Augment(0, False)}, "views=2 without augmentation"),
    ],
)
def test_wrong_views_are_named(arguments, message, tmp_path):
    for cls in (IDXImages, ParquetImages):
        with pytest.raises(ValueError, match=message):
            cls(tmp_path, **arguments)
    with pytest.raises(ValueError, match="padding=-1"):
        Augment(-1)


def test_channels_are_scaled_each_by_its_own():
    images = torch.randint(256, (30, 3, 4, 5), dtype=torch.uint8)
    images[:, 2] = 9
    mean, std = channel_scale(images)
    assert mean.shape == std.shape == (3, 1, 1)
    torch.testing.assert_close(mean.flatten(), images.double().mean((0, 2, 3)).float())
    expected = images.double().transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(std.flatten(), expected.clamp(min=1).float())
    x, _ = LabelledImages(images, torch.zeros(30), mean, std).__getitems__(list(range(30)))
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert x.square().mean((0, 2, 3)).tolist() == pytest.approx([1, 1, 0], abs=1e-5)


# --- parquet


def encoded(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def write_parquet(path, images, labels, names=("image", "label"), wrap=True):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    column = [{"bytes": each, "path": None} for each in images] if wrap else images
    pq.write_table(pa.table({names[0]: column, names[1]: labels, "more": [0.5] * len(labels)}), path)


def pictures(n, seed, shape=(6, 5, 3)):
    return np.random.RandomState(seed).randint(256, size=(n, *shape)).astype(np.uint8)


@pytest.fixture
def parquet(tmp_path):
    for part, n, seed in (("train", 60, 0), ("test", 12, 1)):
        write_parquet(tmp_path / f"{part}.parquet", [encoded(a) for a in pictures(n, seed)], [i % 4 for i in range(n)])
    return tmp_path


def parts_of(module):
    module.setup()
    return {name: (data.images, data.labels) for name, data in module.parts.items()}


def test_parquet_images_in_parts(parquet, monkeypatch):
    module = ParquetImages(parquet, batch_size=7, validation=20, classes=4)
    assert module.input_shape == (3, 6, 5)
    parts = parts_of(module)
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {"train": 40, "val": 20, "test": 12}
    train, val = map(torch.from_numpy, stratified_split([i % 4 for i in range(60)], [20], SPLIT_SEED))
    stored = torch.from_numpy(pictures(60, 0)).permute(0, 3, 1, 2)
    for name, chosen in (("train", train), ("val", val)):
        assert torch.equal(parts[name][0], stored[chosen])
        assert torch.equal(parts[name][1], chosen % 4)
    assert torch.equal(parts["test"][0], torch.from_numpy(pictures(12, 1)).permute(0, 3, 1, 2))
    x, y = next(iter(module.train_dataloader()))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((7, 3, 6, 5), torch.float32, (7,), torch.int64)
    x = loaded(module, "train")[0]
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert x.square().mean((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    monkeypatch.setenv("SOMEWHERE", str(parquet.parent))
    again = parts_of(ParquetImages(f"$SOMEWHERE/{parquet.name}", validation=20, classes=4))
    assert all(torch.equal(again[name][0], parts[name][0]) for name in parts)
    plain = ParquetImages(parquet, validation=20, classes=4, normalize=False)
    assert torch.equal((loaded(plain, "test")[0] * 255).round().byte(), parts["test"][0])


def test_parquet_true_means_the_published_augmentation(parquet):
    assert ParquetImages(parquet, augment=True).augment == Augment(padding=4, flip=True)
    assert IDXImages(parquet, augment=True).augment == Augment(padding=2, flip=False)
    assert ParquetImages(parquet).augment is IDXImages(parquet).augment is None


def test_parquet_in_other_forms(tmp_path, parquet):
    """Shards below data/, columns of other names, bare bytes, JPEG, a palette, paths, grey levels."""
    expected = parts_of(ParquetImages(parquet, validation=20, classes=4))
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    images, labels = [encoded(a) for a in pictures(60, 0)], [i % 4 for i in range(60)]
    for shard, chosen in enumerate((slice(0, 35), slice(35, 60))):
        path = other / "data" / f"train-{shard:05d}-of-00002.parquet"
        write_parquet(path, images[chosen], labels[chosen], ("img", "fine"), wrap=False)
    (other / "data" / "pictures").mkdir()
    paths = []
    for i, picture in enumerate(pictures(12, 1)):
        paths.append(f"pictures/{i}.png")
        (other / "data" / paths[-1]).write_bytes(encoded(picture))
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = [{"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.table({"img": column, "fine": labels[:12]}), other / "data" / "test-00000-of-00001.parquet")
    found = parts_of(ParquetImages(other, "img", "fine", validation=20, classes=4))
    assert all(torch.equal(a, b) for name in expected for a, b in zip(expected[name], found[name]))
    grey = ParquetImages(other, "img", "fine", validation=20, classes=4, channels=1)
    assert grey.input_shape == (1, 6, 5)
    by_hand = np.array(Image.fromarray(pictures(12, 1)[3]).convert("L"))
    assert torch.equal(parts_of(grey)["test"][0][3, 0], torch.from_numpy(by_hand))


def test_images_are_decoded_from_any_file():
    flat = np.full((8, 9, 3), (10, 200, 30), np.uint8)
    assert np.abs(decode_image(encoded(flat, "JPEG"), "RGB").astype(int) - flat).max() < 4
    palette = Image.fromarray(flat).convert("P")
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert (decode_image(file.getvalue(), "RGB") == np.array(palette.convert("RGB"))).all()
    assert decode_image(encoded(flat[..., 0]), "L").tolist() == flat[..., 0].tolist()


def test_a_data_set_of_the_hub(parquet, monkeypatch, tmp_path_factory):
    """The hub's own code, given a folder in place of a name."""
    import datasets

    load, cache = datasets.load_dataset, str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: load(str(parquet), cache_dir=cache))
    found = parts_of(ParquetImages("somebody/pictures", validation=20, classes=4))
    expected = parts_of(ParquetImages(parquet, validation=20, classes=4))
    assert all(torch.equal(a, b) for name in expected for a, b in zip(expected[name], found[name]))
    with pytest.raises(ValueError, match="somebody/pictures: has no column 'img', only 'image', 'label', 'more'"):
        ParquetImages("somebody/pictures", image="img").setup()
    with pytest.raises(ValueError, match=r"somebody/pictures, train, row 3: label 3 is not in 0 \.\. 2"):
        ParquetImages("somebody/pictures", classes=3).setup()
    monkeypatch.setattr(datasets, "load_dataset", lambda name, part: load(str(parquet), part, cache_dir=cache))
    found = parts_of(ParquetImages("somebody/pictures:default", validation=20, classes=4, channels=1))
    assert torch.equal(found["train"][1], expected["train"][1])
    assert found["train"][0].shape[1:] == (1, 6, 5)
    with pytest.raises(ValueError, match=r"pictures:other: neither a path here .*other.*default.*; set root to the"):
        ParquetImages("somebody/pictures:other", classes=4).setup()
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"validation": None})
    with pytest.raises(ValueError, match="somebody/pictures: has no split 'train', only validation"):
        ParquetImages("somebody/pictures").setup()


def test_the_hub_offline_is_named():
    with pytest.raises(ValueError, match=r"nobody/nothing: neither a path here nor a data set .*; set root to"):
        ParquetImages("nobody/nothing").setup()


def test_missing_parquet_is_named(parquet, tmp_path):
    with pytest.raises(ValueError, match="environment variable NOT_SET is not set: put NOT_SET="):
        ParquetImages("$NOT_SET/cifar")
    for root in ("./nowhere", str(parquet / "train.parquet")):
        with pytest.raises(ValueError, match=r"no such folder; set root to the folder that holds train\.parquet"):
            ParquetImages(root).setup()
    (parquet / "test.parquet").unlink()
    with pytest.raises(ValueError, match=r"found neither test\.parquet nor test-00000-of"):
        ParquetImages(parquet, classes=4).setup()
    for number in (0, 2):
        (tmp_path / f"x-0000{number}-of-00003.parquet").touch()
    with pytest.raises(ValueError, match=r"has only x-00000-of-00003\.parquet, .*; fetch the others"):
        find_parquet(tmp_path, "x")


PICTURES = [encoded(a) for a in pictures(5, 2)]
BROKEN = {
    "no image": ([*PICTURES[:2], b"hello"], [0, 1, 2], "row 2: the image cannot be decoded .*mend or drop"),
    "truncated": ([PICTURES[0], PICTURES[1][:-30]], [0, 1], "row 1: the image cannot be decoded"),
    "missing": ([PICTURES[0], None], [0, 1], "row 1: the image is NoneType, expected the bytes"),
    "size": ([PICTURES[0], encoded(pictures(1, 0, (7, 5, 3))[0])], [0, 1], "row 1: the image is 5x7 pixels, .* 5x6"),
    "label": (PICTURES[:2], [1, 10], r"row 1: label 10 is not in 0 \.\. 9"),
    "negative": (PICTURES[:2], [1, -1], r"row 1: label -1 is not in 0 \.\. 9"),
    "no label": (PICTURES[:2], [None, 1], "row 0: label None is not in"),
    "text": (PICTURES[:2], ["cat", "dog"], "row 0: label 'cat' is not in"),
    "fraction": (PICTURES[:2], [0.0, 1.0], "row 0: label 0.0 is not in"),
    "empty": ([], [], "has no rows"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_named(case, parquet):
    images, labels, message = BROKEN[case]
    write_parquet(parquet / "train.parquet", images, labels, wrap=case != "empty")
    with pytest.raises(ValueError, match=rf"train\.parquet.*{message}"):
        ParquetImages(parquet, validation=1).setup()


def test_a_missing_picture_file_is_named(parquet):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [{"bytes": None, "path": "gone.png"}], "label": [0]})
    pq.write_table(table, parquet / "train.parquet")
    with pytest.raises(ValueError, match=r"row 0: the image file gone\.png cannot be read \(No such file"):
        ParquetImages(parquet).setup()


def test_a_huge_picture_is_not_decoded(parquet):
    """Told by its header: 9,000 x 9,000 pixels would be 243 MB."""
    huge = bytearray(encoded(np.zeros((1, 1, 3), np.uint8)))
    huge[16:24] = struct.pack(">II", 9_000, 9_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    write_parquet(parquet / "train.parquet", [PICTURES[0], bytes(huge)], [0, 1])
    tracemalloc.start()
    with pytest.raises(ValueError, match="row 1: the image is 9000x9000 pixels, the first one 5x6"):
        ParquetImages(parquet).setup()
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_broken_parquet_is_named(parquet):
    whole = (parquet / "train.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], b"x" * 500):
        (parquet / "train.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"train\.parquet: cannot be read as parquet .*; fetch the file again"):
            ParquetImages(parquet).setup()
    write_parquet(parquet / "train.parquet", PICTURES, [0] * 5, ("img", "label"))
    with pytest.raises(ValueError, match=r"no column 'image', only 'img', 'label', 'more': set image and label"):
        ParquetImages(parquet).setup()
    write_parquet(parquet / "train.parquet", [encoded(a) for a in pictures(5, 2, (8, 8, 3))], [0] * 5)
    with pytest.raises(ValueError, match=r"training images are \(8, 8\), test images \(6, 5\)"):
        ParquetImages(parquet, classes=4).setup()
    with pytest.raises(ValueError, match="channels=2: give 3 for colours or 1"):
        ParquetImages(parquet, channels=2)


def test_shards_of_several_sizes_are_named(tmp_path):
    for number, shape in enumerate(((6, 5, 3), (5, 6, 3))):
        path = tmp_path / f"train-0000{number}-of-00002.parquet"
        write_parquet(path, [encoded(a) for a in pictures(3, 0, shape)], [0] * 3)
    with pytest.raises(ValueError, match="the train shards have images of several sizes"):
        ParquetImages(tmp_path).setup()


# --- all of them


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Digits", {"image": True}),
        ("IDXImages", {"root": "x", "validation": 9}),
        ("IDXImages", {"root": "x", "augment": True, "views": 8}),
        ("ParquetImages", {"root": "owner/name", "augment": {"padding": 2, "flip": False}}),
        ("ParquetImages", {"root": "~/x", "augment": False, "channels": 1}),
    ],
)
def test_modules_from_a_config(name, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=pl.LightningDataModule)
    parsed = parser.parse_object({"data": {"class_path": f"workbench.data.{name}", "init_args": arguments}})
    made = parser.instantiate(parsed).data
    assert type(made).__name__ == name
    if isinstance(arguments.get("augment"), dict):
        assert made.augment == Augment(padding=2, flip=False)


def test_the_package_is_lazy():
    code = "import sys, workbench.data as d; print(*{'torch', 'lightning'} & {*sys.modules}, 'Digits' in dir(d))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"
    with pytest.raises(ImportError):
        from workbench.data import Nothing  # noqa: F401


@pytest.mark.data
def test_mnist():
    module = IDXImages(os.path.join(os.environ["DATA"], "mnist"))
    module.setup()
    assert {part: len(data) for part, data in module.parts.items()} == {
        "train": 55_000,
        "val": 5_000,
        "test": 10_000,
    }
    assert module.input_shape == (1, 28, 28)
    data = module.parts["train"]
    assert (float(data.mean) / 255, float(data.std) / 255) == pytest.approx((0.1307, 0.3081), abs=5e-4)
    assert data.labels.bincount().tolist() == pytest.approx(
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], rel=0.09
    )


@pytest.mark.data
def test_cifar10():
    module = ParquetImages(os.path.join(os.environ["DATA"], "cifar10-jpeg-24k"), augment=True)
    assert module.input_shape == (3, 32, 32)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 18_000, "val": 2_000, "test": 4_000}
    for data in module.parts.values():
        assert data.labels.bincount().tolist() == [len(data) // 10] * 10
    data = module.parts["train"]
    assert (data.mean / 255).flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-3)
    assert (data.std / 255).flatten().tolist() == pytest.approx([0.247, 0.243, 0.261], abs=5e-3)
