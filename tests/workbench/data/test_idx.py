import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.images import idx, loaded, write
from workbench.data import IDXImages
from workbench.data.idx import read_idx


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
