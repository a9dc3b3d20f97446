import math
import pickle
import subprocess
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.data import _replace_dunder_methods, _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from tests.helpers.images import loaded
from workbench.data import Augment, Digits, IDXImages, ParquetImages
from workbench.data.images import LabelledImages, channel_scale, stratified_split
from workbench.training.order import EpochIndex, with_epoch_order


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
