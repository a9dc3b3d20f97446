import csv
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
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from workbench.data import SeriesClassification, SeriesForecast
from workbench.data.series.batches import Windows
from workbench.data.series.ts import read_ts
from workbench.data.series.values import fit_scale, parse_number
from workbench.models import Recurrent, Transformer
from workbench.tasks import Classification, Regression
from workbench.training.fit import fit
from workbench.training.module import TaskModule
from workbench.training.order import with_epoch_order

PARTS = ("train", "val", "test")
HEADER = "# a comment\n@problemName Made\n@missing true\n@univariate false\n@dimensions 2\n@equalLength false\n"
START = "@classLabel true up down\n@data\n"
PARALLEL = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def line(values, label):
    """A series [L, F], None where a value is missing, as a line of a .ts file."""
    return ":".join([*(",".join("?" if v is None else repr(v) for v in channel) for channel in zip(*values)), label])


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


def write_ts(path, rows, header=HEADER):
    path.write_text(header + START + "".join(f"{line(values, label)}\n" for values, label in rows))
    return path


@pytest.fixture
def pair(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    write_ts(folder / "Made_TRAIN.ts", waves(40, 0))
    write_ts(folder / "Made_TEST.ts", waves(10, 1))
    return folder


def loaded(module, part):
    return list(getattr(module, f"{part}_dataloader")())


# --- .ts files

FINITE = st.floats(-1e6, 1e6)


@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_what_was_written_is_read(tmp_path_factory, data):
    channels = data.draw(st.integers(1, 3))
    step = st.lists(st.none() | FINITE, min_size=channels, max_size=channels)
    rows = data.draw(
        st.lists(st.tuples(st.lists(step, min_size=1, max_size=4), st.sampled_from(["up", "down"])), min_size=1)
    )
    path = tmp_path_factory.mktemp("ts") / "x.ts"
    said = data.draw(st.booleans())
    write_ts(path, rows, f"@dimensions {channels}\n" if said else "")
    found = read_ts(path)
    assert found.classes == ("up", "down")
    for (values, label), (series, name) in zip(rows, found.rows, strict=True):
        expected = [[math.nan if v is None else v for v in step] for step in values]
        assert name == label
        np.testing.assert_array_equal(series, np.array(expected))


def test_lines_between_windows_ends_and_comments(tmp_path):
    path = tmp_path / "x.ts"
    path.write_bytes(
        b"\xef\xbb\xbf#c\r\n@univariate TRUE\r\n\r\n@CLASSLABEL true a b\r\n@Data\r\n# c\r\n 1, NaN ,2.5e1 : a \r\n"
    )
    (values, label) = read_ts(path).rows[0]
    assert (values[0].tolist(), values[2].tolist(), label) == ([1.0], [25.0], "a")
    assert math.isnan(values[1, 0])


OK = "1,2:3,4:up\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + START, "has no series after @data"),
        (HEADER, "has no line @data"),
        ("1,2:up\n", "line 1: '1,2:up' stands before @data"),
        (HEADER + "@data\n" + OK, "has no classes"),
        (HEADER + "@classLabel false\n@data\n" + OK, "has no classes"),
        (HEADER + "@classLabel true up up\n@data\n" + OK, "names up up: two classes or more"),
        (HEADER + "@classLabel true\n@data\n" + OK, "names none: two classes or more"),
        (HEADER + "@classLabel maybe\n@data\n" + OK, "says @classlabel maybe, expected true or false"),
        (HEADER + "@colour red\n" + START + OK, "line 7: the header has @colour, which is none of"),
        (HEADER + "@missing true\n" + START + OK, "line 7: the header has @missing, a second time"),
        (HEADER + "@seriesLength\n" + START + OK, "line 7: the header has @seriesLength without a value"),
        ("@timeStamps true\n" + START + OK, "has time stamps"),
        ("@dimensions 0\n" + START + OK, "says @dimensions 0, expected a number of at least 1"),
        (f"@dimensions {'9' * 5000}\n" + START + OK, "says @dimensions 99999999"),
        ("@dimensions ²\n" + START + OK, "says @dimensions ², expected a number"),
        ("@univariate true\n@dimensions 2\n" + START + OK, "says @univariate true and @dimensions 2"),
        ("@univariate true\n" + START + OK, "line 4: has 2 dimensions before the class, expected 1"),
        (START + OK + "1,2:up\n", "line 4: has 1 dimensions before the class, expected 2"),
        (HEADER + START + "up\n", "line 9: has 0 dimensions before the class, expected 2"),
        (START + "up\n", "line 3: has 0 dimensions before the class, expected 1"),
        (HEADER + START + OK + "1:2:left\n", "line 10: the class is 'left', and @classLabel names up down"),
        (HEADER + START + "1,2:3:up\n", "line 9: its dimensions have 1 to 2 numbers"),
        ("@equalLength true\n" + START + OK + "1:2:up\n", "line 5: has 1 steps, and by the header all have 2"),
        ("@equalLength true\n@seriesLength 3\n" + START + OK, "line 5: has 2 steps, and by the header all have 3"),
        (HEADER + START + "1,x:3,4:up\n", "line 9: 'x' is no finite number; mend that line"),
        (HEADER + START + "1,1e999:3,4:up\n", "line 9: '1e999' is no finite number"),
        (HEADER + START + "1,1_0:3,4:up\n", "line 9: '1_0' is no finite number"),
        (HEADER + START + "1,:3,4:up\n", "line 9: nothing stands between two commas or colons"),
        (HEADER + START + "1,2::up\n", "line 9: nothing stands between"),
        ("@missing false\n" + START + "1,?:3,4:up\n", "line 4: a value is missing, and the header says @missing false"),
        ("", "is empty"),
        ("\0", "has zero bytes"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "x.ts"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"x.ts.*{message.replace('?', '[?]')}"):
        read_ts(path)


def test_a_boastful_header_allocates_nothing(tmp_path):
    path = tmp_path / "x.ts"
    path.write_text(f"@dimensions {10**15}\n@equalLength true\n@seriesLength {10**15}\n" + START + OK)
    with pytest.raises(ValueError, match="line 6: has 2 dimensions before the class, expected 1000000000000000"):
        read_ts(path)


# --- labelled series


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


# --- forecasts


def write_table(path, rows, columns=("a", "b")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *columns])
        writer.writerows([f"day {i}", *row] for i, row in enumerate(rows))
    return path


def steps(count, begin=0):
    """Numbers that tell which step they are of."""
    return [[float(i), i + 0.5] for i in range(begin, begin + count)]


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_windows_by_the_book(data):
    total, length, horizon, stride = (data.draw(st.integers(1, high)) for high in (40, 8, 8, 5))
    assume(length + horizon <= total)
    values = np.array(steps(total), dtype=np.float32)
    windows = Windows(values, [1], length, horizon, stride)
    expected = [begin for begin in range(0, total, stride) if begin + length + horizon <= total]
    assert len(windows) == len(expected)
    for begin, (x, y) in zip(expected, (windows[i] for i in range(len(windows)))):
        assert x.tolist() == values[begin : begin + length].tolist()
        assert y.tolist() == values[begin + length : begin + length + horizon, 1:].tolist()
    with pytest.raises(IndexError, match="no window"):
        windows[len(windows)]


def test_a_forecast_without_a_task_is_a_regression(tmp_path):
    data = SeriesForecast(write_table(tmp_path / "x.csv", steps(60)), ["a", "b"], ["b"], 4, 3)
    model = Recurrent(2, 1, horizon=3, hidden=4)
    found = fit(model, data, trainer={"max_epochs": 1, "accelerator": "cpu"}, out=tmp_path / "out")
    assert found["monitor"] == ["mse", "min"]
    assert math.isfinite(found["metrics"]["test/mse"])


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_nothing_leaks_between_the_parts(tmp_path_factory, data):
    length, horizon, stride = (data.draw(st.integers(1, 5)) for _ in range(3))
    sizes = [data.draw(st.integers(low, 30)) for low in (length + horizon, horizon, horizon)]
    spare = data.draw(st.integers(0, 5))
    path = write_table(tmp_path_factory.mktemp("csv") / "x.csv", steps(sum(sizes) + spare))
    module = SeriesForecast(path, ["a", "b"], ["b"], length, horizon, stride, tuple(sizes), normalize=False)
    begin = 0
    for part, size in zip(PARTS, sizes):
        samples = [module.parts[part][i] for i in range(len(module.parts[part]))]
        seen = {int(v) for x, _ in samples for v in x[:, 0]}
        foretold = {int(v) for _, y in samples for v in y[:, 0]}
        assert foretold <= set(range(begin, begin + size)), "each step is foretold in its own part"
        assert max(seen) < begin + size, "and nothing of a later part is seen"
        if part == "train":
            assert seen | foretold <= set(range(size))
        if stride == 1:
            first = length if part == "train" else begin
            assert foretold == set(range(first, begin + size)), "and every step is, but for what training begins with"
        begin += size


def test_tables_are_standardised_by_training_alone(tmp_path):
    rows = [[math.sin(i), float(i % 7)] for i in range(60)]
    other = rows[:30] + [[1e4 * a, -1e4 * b] for a, b in rows[30:]]
    arguments = {"columns": ["b", "a"], "length": 4, "horizon": 2, "split": (0.5, 0.25, 0.25)}
    one = SeriesForecast(write_table(tmp_path / "x.csv", rows), **arguments)
    two = SeriesForecast(write_table(tmp_path / "y.csv", other), **arguments)
    assert all(np.array_equal(a, b) for a, b in zip(one.scale, two.scale))
    assert {part: len(data) for part, data in one.parts.items()} == {"train": 25, "val": 14, "test": 14}
    training = torch.tensor(rows[:30], dtype=torch.float64)[:, [1, 0]]
    torch.testing.assert_close(torch.from_numpy(one.scale.mean), training.mean(0))
    torch.testing.assert_close(torch.from_numpy(one.scale.std), training.std(0, correction=0))
    x, y = next(iter(one.val_dataloader()))
    back = x.double() * torch.from_numpy(one.scale.std) + torch.from_numpy(one.scale.mean)
    torch.testing.assert_close(back[0], torch.tensor(rows[26:30])[:, [1, 0]].double(), atol=1e-5, rtol=0)
    assert (x.dtype, y.dtype, list(x.shape), list(y.shape)) == (torch.float32, torch.float32, [14, 4, 2], [14, 2, 2])


def test_missing_numbers_are_the_mean_where_seen_and_not_counted_where_foretold(tmp_path):
    rows = [[float(i), "" if i == 5 else 3.0] for i in range(20)]
    module = SeriesForecast(write_table(tmp_path / "x.csv", rows), ["a", "b"], ["b"], 3, 2, split=(10, 5, 5))
    data = module.parts["train"]
    assert [float(x[-1, 1]) for x, _ in (data[i] for i in range(5))] == [0] * 5
    gaps = {(i, t) for i in range(len(data)) for t in range(2) if data[i][1][t].isnan()}
    assert gaps == {(1, 1), (2, 0)}
    batch = next(iter(module.val_dataloader()))
    assert Regression().valid(batch).all()
    assert module.scale.std[1] == 1, "a channel that never varies"


@pytest.mark.parametrize("own", [True, False])
def test_tables_of_the_hub(monkeypatch, tmp_path, own):
    parts = {"train": steps(20), "validation": steps(8, 20), "test": steps(9, 28)} if own else {"train": steps(40)}
    made = {
        name: datasets.Dataset.from_dict({"a": [r[0] for r in rows], "b": [r[1] for r in rows]})
        for name, rows in parts.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(made))
    module = SeriesForecast("someone/table", ["a"], None, 3, 2, normalize=False)
    expected = [16, 4, 5] if own else [24, 3, 7]
    assert [len(module.parts[part]) for part in PARTS] == expected
    assert module.parts["val"][0][1].flatten().tolist() == ([23, 24] if own else [28, 29])
    with pytest.raises(ValueError, match=r"someone/table, .*, row 1: has no 'c', only 'a'"):
        SeriesForecast("someone/table", ["a", "c"]).setup()
    made.pop("test", None)
    made["more"] = made["train"]
    with pytest.raises(ValueError, match=r"has the parts train, .*more, where one table is needed"):
        SeriesForecast("someone/table", ["a"]).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": []}, r"columns=\[\]: give a list of names"),
        ({"columns": "ab"}, "columns='ab': give a list of names"),
        ({"columns": ["a", "a"]}, "each once"),
        ({"targets": ["c"]}, "'c' is none of the columns a, b"),
        ({"targets": []}, "'none' is none of the columns a, b"),
        ({"length": 0}, "length=0, horizon=24, stride=1: each must be at least 1"),
        ({"stride": 0}, "stride=0"),
        ({"split": (0.5, 0.5, 0.5)}, "three fractions with a sum of at most 1"),
        ({"split": (0.5, 0.5)}, "three fractions"),
        ({"split": (10, 0.5, 0.5)}, "three fractions"),
        ({"split": (10, 5.5, 5)}, "three numbers of rows"),
        ({"split": (-1, 5, 5)}, "three numbers of rows"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_arguments_of_a_forecast_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SeriesForecast("x.csv", **{"columns": ["a", "b"], **arguments})


def test_broken_forecasts_are_named(tmp_path):
    path = write_table(tmp_path / "x.csv", steps(30))
    with pytest.raises(ValueError, match=r"x\.csv, 'all', row 1: 'day 0' is no finite number: choose from date, a"):
        SeriesForecast(path, ["date", "a"]).setup()
    with pytest.raises(ValueError, match=r"x\.csv, row 1: has no 'c', only 'date', 'a', 'b'"):
        SeriesForecast(path, ["c"]).setup()
    with pytest.raises(ValueError, match=r"has 30 rows, and split=\[20, 10, 1\] takes 31"):
        SeriesForecast(path, ["a"], split=(20, 10, 1)).setup()
    with pytest.raises(ValueError, match=r"the part val has 8 steps, fewer than length \+ horizon = 9"):
        SeriesForecast(path, ["a"], None, 5, 4).setup()
    with pytest.raises(ValueError, match="the part train has 21 steps, fewer than"):
        SeriesForecast(path, ["a"]).setup()
    with pytest.raises(ValueError, match="channel 0 has no value in the training part"):
        SeriesForecast(write_table(path, [["", 1]] * 30), ["a"], None, 2, 1).setup()


def test_numbers():
    assert [parse_number(value) for value in ("1.5", " -2 ", 3, np.float32(0.5), "1e3")] == [1.5, -2, 3, 0.5, 1000]
    assert all(math.isnan(parse_number(value)) for value in (None, "", " ? ", "NaN", "na", float("nan")))
    for beyond in ("1e39", -1e308, "inf"):
        with pytest.raises(ValueError, match="no finite number"):
            parse_number(beyond)


def test_a_constant_channel_is_not_blown_up():
    scale = fit_scale([np.full((7, 1), 0.1), np.full((3, 1), 0.1)], "x")
    assert scale.std.tolist() == [1]
    assert np.abs(scale(np.full((2, 1), 0.1))).max() < 1e-12


def test_a_network_learns_to_forecast(tmp_path):
    rows = [[math.sin(0.5 * i), math.cos(0.5 * i)] for i in range(200)]
    data = SeriesForecast(write_table(tmp_path / "x.csv", rows), ["a", "b"], length=6, horizon=3, batch_size=16)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    module = TaskModule(network, Regression(shape=[3, 2]), lambda p: torch.optim.Adam(p, lr=0.02))
    trainer = lp.Trainer(**PARALLEL, max_epochs=15, enable_checkpointing=False)
    trainer.fit(module, data)
    (row,) = trainer.test(module, data, verbose=False)
    assert row["test/mse"] == pytest.approx(row["test/loss"], rel=1e-5)
    assert row["test/r2"] > 0.95


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


# --- the real ones


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


@pytest.mark.data
def test_etth1():
    columns = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    path = os.path.join(os.environ["DATA"], "ett", "ETTh1.csv")
    module = SeriesForecast(path, columns, split=(8640, 2880, 2880))
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 8521, "val": 2857, "test": 2857}
    assert module.scale.mean.tolist() == pytest.approx([7.938, 2.021, 5.080, 0.746, 2.782, 0.788, 17.128], abs=1e-3)
    assert {part: len(data) for part, data in SeriesForecast(path, columns, ["OT"]).parts.items()} == {
        "train": 12_194 - 119,
        "val": 1742 - 23,
        "test": 3484 - 23,
    }
