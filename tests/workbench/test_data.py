import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from workbench.data import Digits, IDXImages
from workbench.data.digits import digits
from workbench.data.images import SPLIT_SEED, LabelledImages, read_idx, stratified_split

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


@pytest.mark.parametrize(
    ("name", "arguments"), [("Digits", {"image": True}), ("IDXImages", {"root": "x", "validation": 9})]
)
def test_modules_from_a_config(name, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=pl.LightningDataModule)
    parsed = parser.parse_object({"data": {"class_path": f"workbench.data.{name}", "init_args": arguments}})
    assert type(parser.instantiate(parsed).data).__name__ == name


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
    assert (data.mean / 255, data.std / 255) == pytest.approx((0.1307, 0.3081), abs=5e-4)
    assert data.labels.bincount().tolist() == pytest.approx(
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], rel=0.09
    )
