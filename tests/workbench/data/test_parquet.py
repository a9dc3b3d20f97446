import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.images import loaded
from workbench.data import Augment, IDXImages, ParquetImages
from workbench.data.images import SPLIT_SEED, stratified_split
from workbench.data.parquet import decode_image, find_parquet


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
