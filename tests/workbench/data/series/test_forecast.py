import csv
import math
import os

import datasets
import lightning.pytorch as lp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.time_series import PARALLEL, PARTS, steps
from workbench.data import SeriesForecast
from workbench.data.series.batches import Windows
from workbench.models import Recurrent
from workbench.tasks import Regression
from workbench.training.fit import fit
from workbench.training.module import TaskModule


def write_table(path, rows, columns=("a", "b")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *columns])
        writer.writerows([f"day {i}", *row] for i, row in enumerate(rows))
    return path


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
