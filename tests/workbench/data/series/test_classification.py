import json
import math
import os
import pickle
import random

import datasets
import lightning.pytorch as lp
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from tests.helpers.time_series import PARALLEL, PARTS, write_ts
from workbench.data import SeriesClassification
from workbench.models import Recurrent, Transformer
from workbench.tasks import Classification
from workbench.training.module import TaskModule
from workbench.training.order import with_epoch_order


def waves(count, seed):
    """Series of two channels and 3 to 9 steps that rise or fall, one value in ten missing."""
    noise = random.Random(seed)
    made = []
    for i in range(count):
        up = 1 if i % 2 else -1
        steps = [[up * t + noise.gauss(0, 0.3), 100 + 10 * noise.random()] for t in range(3 + i % 7)]
        if i % 5 == 0:
            steps[1][0] = None
        made.append((steps, "up" if i % 2 else "down"))
    return made


@pytest.fixture
def pair(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    write_ts(folder / "Made_TRAIN.ts", waves(40, 0))
    write_ts(folder / "Made_TEST.ts", waves(10, 1))
    return folder


def loaded(module, part):
    return list(getattr(module, f"{part}_dataloader")())


def test_series_in_parts(pair):
    module = SeriesClassification(pair, batch_size=8)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 32, "val": 8, "test": 10}
    assert (module.classes, module.names, module.channels) == (2, ["up", "down"], 2)
    for part in PARTS:
        for batch in loaded(module, part):
            rows, steps, channels = batch["x"].shape
            assert list(batch) == ["x", "lengths", "labels"]
            assert channels == 2
            assert steps == batch["lengths"].max()
            assert batch["x"].dtype == torch.float32
            assert batch["lengths"].dtype == batch["labels"].dtype == torch.int64
            assert batch["lengths"].shape == batch["labels"].shape == (rows,)
    again = SeriesClassification(pair)
    assert torch.equal(module.parts["val"].values, again.parts["val"].values), "the same in every run"
    assert module.parts["val"].labels.bincount().tolist() == [4, 4], "stratified"


def test_values_are_standardised_by_training_and_missing_ones_are_its_mean(pair):
    module = SeriesClassification(pair, batch_size=100)
    raw = [[[math.nan if v is None else v for v in step] for step in values] for values, _ in waves(10, 1)]
    (batch,) = loaded(module, "test")
    for row, (values, length) in enumerate(zip(raw, batch["lengths"].tolist())):
        assert length == len(values)
        for t in range(batch["x"].shape[1]):
            for f in range(2):
                known = t < length and not math.isnan(values[t][f])
                expected = (values[t][f] - module.scale.mean[f]) / module.scale.std[f] if known else 0.0
                assert float(batch["x"][row, t, f]) == pytest.approx(expected, abs=1e-5)
    plain = SeriesClassification(pair, normalize=False)
    training = plain.parts["train"].values[:, 1].double()
    assert module.scale.mean[1] == pytest.approx(training.mean().item())
    assert module.scale.std[1] == pytest.approx(training.std(correction=0).item(), rel=1e-5)
    assert (plain.scale.mean.tolist(), plain.scale.std.tolist()) == ([0, 0], [1, 1])


def test_a_sample_is_the_same_alone_and_in_a_batch(pair):
    module = SeriesClassification(pair, batch_size=10)
    (batch,) = loaded(module, "test")
    data, collate = module.parts["test"], module.test_dataloader().collate_fn
    for row in range(10):
        alone = collate([data[row]])
        length = int(batch["lengths"][row])
        assert torch.equal(alone["x"][0], batch["x"][row, :length])
        assert not batch["x"][row, length:].any()
        assert alone["labels"][0] == batch["labels"][row]
    with pytest.raises(IndexError, match="no series 10 among 10"):
        data[10]
    assert pickle.loads(pickle.dumps(data)).views == 1, "for loader processes, and for a teacher's cache"


def test_a_mask_under_another_name(pair):
    module = SeriesClassification(pair, inputs="input_ids", mask=True, batch_size=10)
    (batch,), (other,) = loaded(module, "test"), loaded(SeriesClassification(pair, batch_size=10), "test")
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert torch.equal(batch["input_ids"], other["x"])
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (9 - n) for n in other["lengths"].tolist()]


def test_where_files_may_lie(pair, monkeypatch, tmp_path):
    expected = SeriesClassification(pair).parts
    moved = tmp_path / "elsewhere.ts"
    monkeypatch.setenv("HERE", str(pair))
    for module in (
        SeriesClassification("$HERE/Made_TRAIN.ts"),
        SeriesClassification("$HERE"),
        SeriesClassification(pair / "Made_TRAIN.ts", test=write_ts(moved, waves(10, 1))),
    ):
        assert all(torch.equal(module.parts[part].values, expected[part].values) for part in PARTS)
    alone = SeriesClassification(moved, validation=0.2, testing=0.3)
    assert {part: len(data) for part, data in alone.parts.items()} == {"train": 5, "val": 2, "test": 3}
    write_ts(pair / "Other_TRAIN.ts", waves(10, 1))
    with pytest.raises(ValueError, match=r"has Made_TEST.ts, Made_TRAIN.ts, Other_TRAIN.ts, not one NAME_TRAIN.ts"):
        SeriesClassification(pair).setup()
    for name in ("Made_TRAIN.ts", "Made_TEST.ts"):
        (pair / name).unlink()
    with pytest.raises(ValueError, match=r"has Other_TRAIN\.ts without its _TEST\.ts"):
        SeriesClassification(pair).setup()
    with pytest.raises(ValueError, match="the environment variable NOT_SET is not set"):
        SeriesClassification("$NOT_SET/x").setup()
    with pytest.raises(ValueError, match=r"nowhere\.ts: no such file"):
        SeriesClassification("nowhere.ts").setup()


def table(count=20, seed=0):
    """Rows for a table, complete, steps first."""
    return [{"series": [[t, 2.0 * (i + t)] for t in range(1 + i % 3)], "label": i % 2 * 10} for i in range(count)]


@pytest.mark.parametrize("channels_first", [False, True])
def test_a_table(tmp_path, channels_first):
    rows = table()
    if channels_first:
        rows = [{**row, "series": [list(channel) for channel in zip(*row["series"])]} for row in rows]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"train": rows, "test": rows[:4]}))
    module = SeriesClassification(path, channels_first=channels_first, normalize=False, batch_size=4)
    assert module.names == ["0", "10"]
    (batch,) = loaded(module, "test")
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert batch["lengths"].tolist() == [1, 2, 3, 1]
    assert batch["x"][1].tolist() == [[0, 2], [1, 4], [0, 0]]


def test_a_table_of_one_channel_with_gaps(tmp_path):
    rows = [{"wave": [1, None, float(i)], "kind": "ab"[i % 2]} for i in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for channels_first in (False, True):
        module = SeriesClassification(
            tmp_path, series="wave", label="kind", normalize=False, channels_first=channels_first
        )
        assert (module.channels, module.names) == (1, ["a", "b"])
        assert module.parts["train"][0]["series"].tolist()[:2] == [[1], [0]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"series": "abc", "label": 1}], "row 1: 'abc' is no list of numbers: set series"),
        ([{"series": [], "label": 1}], r"row 1: '?\[\]'? is no list of numbers"),
        ([{"series": [[]], "label": 1}], r"row 1: a series has lists of \[0\] numbers"),
        ([{"series": [[1], [1, 2]], "label": 1}], r"row 1: a series has lists of \[1, 2\] numbers"),
        ([{"series": ["x"], "label": 1}], "row 1: 'x' is no finite number: set series"),
        ([{"series": [True], "label": 1}], "row 1: 'True' is no finite number"),
        ([{"series": [1], "label": 1.5}], "row 1: class 1.5 is no name or number"),
        ([{"series": [1], "label": True}], "row 1: class True is no name or number"),
        ([{"series": [1]}], "row 1: has no 'label', only 'series': name the columns"),
        ([*table(), {"series": [1], "label": 0}], "series 21: has 1 channels, the first one 2"),
        ([{"series": [1], "label": 0}] * 9, "training has the one class '0'"),
        ([{"series": [None], "label": i % 2} for i in range(9)], "channel 0 has no value in the training part"),
        ([{"series": [1], "label": 0}] * 2, "cannot split 2 samples"),
    ],
)
def test_broken_tables_are_named(tmp_path, rows, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=f"x.json.*{message}"):
        SeriesClassification(path).setup()


def test_a_class_that_training_never_saw(tmp_path, pair):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"train": table(), "test": [{"series": [[1, 1]], "label": 7}]}))
    with pytest.raises(ValueError, match="test has the class '7', which training never saw"):
        SeriesClassification(path).setup()
    content = (pair / "Made_TEST.ts").read_text().replace("down", "sideways")
    (pair / "Made_TEST.ts").write_text(content)
    with pytest.raises(ValueError, match="test has the class 'sideways', which training never saw"):
        SeriesClassification(pair).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"validation": 0.0}, "validation=0.0"),
        ({"validation": 0.5, "testing": 0.5}, "leave something for training"),
        ({"inputs": "labels"}, "inputs='labels': give the name of an argument"),
        ({"inputs": "a b"}, "inputs='a b'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SeriesClassification("x", **arguments)


def test_a_name_is_asked_of_the_hub(monkeypatch, tmp_path, tmp_path_factory):
    """The hub's own code, given a folder in place of a name."""
    datasets.Dataset.from_list(table(20)).to_parquet(tmp_path / "train.parquet")
    datasets.Dataset.from_list(table(6)).to_parquet(tmp_path / "test.parquet")
    load, cache = datasets.load_dataset, str(tmp_path_factory.mktemp("cache"))
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: asked.append(name) or load(str(tmp_path), cache_dir=cache)
    )
    module, here = SeriesClassification("someone/waves"), SeriesClassification(tmp_path)
    for part in PARTS:
        assert torch.equal(module.parts[part].values, here.parts[part].values)
        assert torch.equal(module.parts[part].labels, here.parts[part].labels)
    assert asked == ["someone/waves"]
    with pytest.raises(ValueError, match="someone/waves, 'train', row 1: has no 'kind', only 'series'"):
        SeriesClassification("someone/waves", label="kind").setup()


def test_loaders_are_plain_and_follow_the_seed(pair):
    module = SeriesClassification(pair, batch_size=4)
    assert type(module.train_dataloader()) is DataLoader
    assert type(module.train_dataloader().sampler) is RandomSampler
    assert type(module.val_dataloader().sampler) is SequentialSampler
    order = [batch["labels"].tolist() for batch in with_epoch_order(module.train_dataloader(), 3)]
    assert order == [batch["labels"].tolist() for batch in with_epoch_order(module.train_dataloader(), 3)]
    state = torch.get_rng_state()
    list(module.train_dataloader())
    assert torch.equal(state, torch.get_rng_state())


class GRU(nn.Module):
    """PyTorch's own, over the steps that count."""

    def __init__(self, channels, classes):
        super().__init__()
        self.gru, self.head = nn.GRU(channels, 8, batch_first=True), nn.Linear(8, classes)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.gru(packed)[1][-1])


def test_a_recurrent_network_learns_from_ts_files(pair):
    data = SeriesClassification(pair, batch_size=8)
    module = TaskModule(GRU(2, 2), Classification(data.classes), lambda p: torch.optim.Adam(p, lr=0.02))
    trainer = lp.Trainer(**PARALLEL, max_epochs=10, enable_checkpointing=False)
    trainer.fit(module, data)
    (row,) = trainer.test(module, data, verbose=False)
    assert row["test/accuracy"] >= 0.9


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        (Recurrent(2, 2, hidden=4), {}),
        (Recurrent(2, 2, hidden=4), {"mask": True}),
        (Transformer(features=2, classes=2, width=8, layers=1, heads=2), {"inputs": "input_ids", "mask": True}),
    ],
)
def test_the_bundled_networks_take_these_batches_and_see_no_padding(pair, network, arguments):
    module, task = SeriesClassification(pair, batch_size=10, **arguments), Classification(2)
    (batch,) = loaded(module, "test")
    _, kwargs = task.inputs(batch)
    together = network.eval()(**kwargs)
    for row in range(10):
        _, kwargs = task.inputs(module.test_dataloader().collate_fn([module.parts["test"][row]]))
        torch.testing.assert_close(network(**kwargs)[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SeriesClassification", {"path": "$DATA/x", "channels_first": True}),
        ("SeriesForecast", {"path": "x.csv", "columns": ["a"], "split": [8640, 2880, 2880]}),
    ],
)
def test_modules_from_a_config(name, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=lp.LightningDataModule)
    parsed = parser.parse_object({"data": {"class_path": f"workbench.data.{name}", "init_args": arguments}})
    assert type(parser.instantiate(parsed).data).__name__ == name


@pytest.mark.data
def test_japanese_vowels():
    folder = os.path.join(os.environ["DATA"], "japanese_vowels")
    module = SeriesClassification(folder)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 216, "val": 54, "test": 370}
    assert (module.classes, module.channels, module.names) == (9, 12, list("123456789"))
    assert module.parts["train"].labels.bincount().tolist() == [24] * 9
    assert module.parts["test"].labels.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    lengths = [batch["lengths"] for part in PARTS for batch in loaded(module, part)]
    assert (int(torch.cat(lengths).min()), int(torch.cat(lengths).max())) == (7, 29)
    with open(os.path.join(folder, "JapaneseVowels_TEST.ts")) as file:
        last = file.read().split("@data\n")[1].split("\n")[369]
    numbers = [[float(v) for v in channel.split(",")] for channel in last.split(":")[:-1]]
    found = module.parts["test"][369]["series"].double().numpy() * module.scale.std + module.scale.mean
    np.testing.assert_allclose(found, np.array(numbers).T, atol=1e-5)
