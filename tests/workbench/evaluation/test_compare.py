import json
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from workbench import records
from workbench.checkpoints import compact
from workbench.evaluation import compare as comparison
from workbench.evaluation import scores, statistics
from workbench.evaluation.compare import compare
from workbench.launcher import recipe
from workbench.launcher.runner import run
from workbench.models import MLP
from workbench.records.source import Source
from workbench.tasks import Binary, Classification, Embedding, MultiLabel, Regression, Segmentation

IGNORED = -100


class Points(pl.LightningDataModule):
    """[N, 4] points in three classes; the split "val" is half of the one for the test."""

    classes = 3

    def __init__(self, batch_size: int = 7, n: int = 45) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(n, 4, generator=generator)
        self.y = torch.randint(3, (n,), generator=generator)
        self.batch_size = batch_size
        self.stages: list[str | None] = []

    def setup(self, stage: str | None = None) -> None:
        self.stages.append(stage)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.x, self.y), 16)

    def val_dataloader(self) -> DataLoader:
        half = len(self.x) // 2
        return DataLoader(TensorDataset(self.x[:half], self.y[:half]), self.batch_size)

    def test_dataloader(self) -> list[DataLoader]:
        cut = 30
        parts = (TensorDataset(self.x[:cut], self.y[:cut]), TensorDataset(self.x[cut:], self.y[cut:]))
        return [DataLoader(part, self.batch_size) for part in parts]


class Tagger(nn.Module):
    """Token ids [B, L] -> logits [B, L, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.init_args: dict = {}
        self.table = nn.Embedding(11, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class Texts(pl.LightningDataModule):
    """Token ids and labels [N, 6]; padding at the end of every other row."""

    classes = 3

    def __init__(self, n: int = 20) -> None:
        super().__init__()
        self.ids = torch.randint(11, (n, 6), generator=torch.Generator().manual_seed(6))
        self.labels = self.ids % 3
        self.labels[::2, 3:] = IGNORED

    def test_dataloader(self) -> DataLoader:
        rows = [{"ids": i, "labels": y} for i, y in zip(self.ids, self.labels)]
        return DataLoader(rows, 4)  # type: ignore[arg-type]


def stored(folder: Path, seed: int, make: Callable[[], nn.Module] = lambda: MLP(4, (6,), 3)) -> Source:
    """A compact checkpoint where a finished stage has it."""
    torch.manual_seed(seed)
    compact.save(make(), folder / "compact")
    return Source(folder)


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Source]:
    """A teacher and three students, one of them a member of a family."""
    return {name: stored(tmp_path / name, seed) for seed, name in enumerate(("teacher", "alone", "soft", "many/small"))}


def answers(source: Source, x: Tensor) -> Tensor:
    with torch.no_grad():
        return compact.load(source)(x)


def run_it(family: dict[str, Source], tmp_path: Path, **options):
    students = [source for name, source in family.items() if name != "teacher"]
    options = {"data": Points(), **options}
    return compare(family["teacher"], students, out=tmp_path / "bought", **options)["comparison"]


def test_scores_are_those_of_the_whole_split_at_once(family, tmp_path):
    found, data = run_it(family, tmp_path), Points()
    teacher = answers(family["teacher"], data.x)
    assert (found["split"], found["n"], found["unit"]) == ("test", 45, "samples")
    assert found["teacher"].pop("name") == "teacher"
    assert set(found["teacher"]) == {"accuracy", "nll", "brier", "ece"}
    assert list(found["students"]) == ["alone", "soft", "many/small"], "in the order given, named as in the recipe"
    for name, told in [("teacher", found["teacher"]), *found["students"].items()]:
        logits = answers(family[name], data.x)
        for score in ("accuracy", "nll", "brier", "ece"):
            assert told[score] == pytest.approx(float(getattr(scores, score)(logits, data.y)), rel=1e-6), (name, score)
        if name != "teacher":
            assert told["agreement"] == float(scores.agreement(logits, teacher))
            assert told["kl"] == pytest.approx(float(scores.kl(logits, teacher)), rel=1e-6)
    json.dumps(found, allow_nan=False)


def test_gains_are_paired_over_samples(family, tmp_path):
    found, data = run_it(family, tmp_path, baseline="soft"), Points()
    right = {name: answers(source, data.x).argmax(-1) == data.y for name, source in family.items()}
    p_values = []
    for name in ("alone", "many/small"):
        told = found["students"][name]
        gained, lost = int((right[name] & ~right["soft"]).sum()), int((right["soft"] & ~right[name]).sum())
        assert gained + lost > 4, "the case has something to tell"
        expected = statistics.mcnemar(gained, lost, 45)
        paired = told["paired"]
        assert (paired["gained"], paired["lost"], paired["n"]) == (gained, lost, 45)
        assert told["gain"] == pytest.approx(told["accuracy"] - found["students"]["soft"]["accuracy"])
        assert (told["gain"], paired["p"]) == (expected.difference, expected.p)
        assert expected.interval is not None
        assert paired["interval"] == {"low": expected.interval.low, "high": expected.interval.high, "confidence": 0.95}
        p_values.append(paired["p"])
    assert [found["students"][n]["paired"]["p_holm"] for n in ("alone", "many/small")] == statistics.holm(p_values)
    assert found["baseline"] == "soft"
    assert found["students"]["soft"]["gain"] == 0.0
    assert "paired" not in found["students"]["soft"]
    assert run_it(family, tmp_path)["baseline"] == "alone", "the first, if none is named"


def test_classes_one_by_one(family, tmp_path):
    found, data = run_it(family, tmp_path)["per_class"], Points()
    assert (found["of"], found["classes"]) == (3, [0, 1, 2])
    assert found["n"] == torch.bincount(data.y).tolist()
    right = {name: answers(source, data.x).argmax(-1) == data.y for name, source in family.items()}
    for c in range(3):
        own = data.y == c
        assert found["teacher"][c] == pytest.approx(float(right["teacher"][own].double().mean()))
        for name in ("alone", "soft", "many/small"):
            told = found["students"][name]
            assert told["recall"][c] == pytest.approx(float(right[name][own].double().mean()))
            assert told["gained"][c] == int((right[name] & ~right["alone"])[own].sum())
            assert told["lost"][c] == int((~right[name] & right["alone"])[own].sum())
    assert "names" not in found


def test_of_many_classes_those_that_move_are_kept(family, tmp_path, monkeypatch):
    whole = run_it(family, tmp_path)["per_class"]
    moved = [max(abs(s["gained"][c] - s["lost"][c]) for s in whole["students"].values()) for c in range(3)]
    monkeypatch.setattr(comparison, "CLASSES", 2)
    data = Points()
    data.names = ["zero", "one", "two"]  # type: ignore[attr-defined]
    found = run_it(family, tmp_path, data=data)["per_class"]
    assert found["classes"] == sorted(sorted(range(3), key=lambda c: (-moved[c], c))[:2])
    assert found["names"] == [["zero", "one", "two"][c] for c in found["classes"]]
    assert found["of"] == 3


def test_a_class_without_samples_is_not_told(family, tmp_path):
    data = Points()
    data.y[data.y == 1] = 0
    assert run_it(family, tmp_path, data=data)["per_class"]["classes"] == [0, 2]


@pytest.mark.parametrize("size", [1, 45])
def test_batches_do_not_matter(family, tmp_path, size):
    expected, found = run_it(family, tmp_path), run_it(family, tmp_path, data=Points(size))
    for name, told in expected["students"].items():
        assert found["students"][name].pop("paired", None) == told.pop("paired", None)
        assert found["students"][name] == pytest.approx(told, rel=1e-6)
    assert found["per_class"] == expected["per_class"]


def test_the_split_is_the_one_asked_for(family, tmp_path):
    data = Points()
    found = run_it(family, tmp_path, data=data, split="val")
    assert (found["split"], found["n"], data.stages) == ("val", 22, ["validate"])
    run_it(family, tmp_path, data=data)
    assert data.stages == ["validate", "test"]


def test_each_network_is_asked_once_a_batch_in_eval_mode(family, tmp_path, monkeypatch):
    asked: list[str] = []

    def load(path, **options):
        network = compact.load(path, **options)
        name = Path(path).name

        def told(module: nn.Module, *_: object) -> None:
            assert not module.training
            assert not torch.is_grad_enabled()
            asked.append(name)

        network.register_forward_hook(told)
        return network

    with monkeypatch.context() as patch:
        real = compact.load
        patch.setattr(comparison, "compact", type("spy", (), {"load": staticmethod(load)}))
        assert compact.load is real
        run_it(family, tmp_path, data=Points(45))
    assert asked == ["teacher", "alone", "soft", "small"] * 2, "the test split has two loaders"


def test_labels_by_position_are_compared_text_by_text(tmp_path):
    sources = [stored(tmp_path / name, seed, Tagger) for seed, name in enumerate(("teacher", "alone", "soft"))]
    data, task = Texts(), Classification(3, ignore_index=IGNORED)
    found = compare(sources[0], sources[1:], data, task, out=tmp_path / "out")["comparison"]
    valid = data.labels != IGNORED
    assert (found["n"], found["unit"]) == (int(valid.sum()), "positions")
    logits = [answers(source, data.ids) for source in sources]
    told = found["students"]["soft"]
    labels = data.labels.clamp(min=0)
    assert told["nll"] == pytest.approx(float(scores.nll(logits[2], labels, valid)), rel=1e-6)
    assert told["kl"] == pytest.approx(float(scores.kl(logits[2], logits[0], valid)), rel=1e-6)
    right = [(z.argmax(-1) == data.labels) & valid for z in logits[1:]]
    gained, lost = (right[1] & ~right[0]).sum(1).tolist(), (right[0] & ~right[1]).sum(1).tolist()
    expected = statistics.clustered(gained, lost, valid.sum(1).tolist())
    assert (told["paired"]["p"], told["paired"]["method"]) == (expected.p, expected.method)
    assert expected.interval is not None
    assert told["paired"]["interval"]["low"] == expected.interval.low


def test_students_that_never_differ_have_no_made_up_p(tmp_path):
    sources = [stored(tmp_path / name, 1, Tagger) for name in ("teacher", "alone", "copy")]
    task = Classification(3, ignore_index=IGNORED)
    found = compare(sources[0], sources[1:], Texts(), task, out=tmp_path / "out")["comparison"]
    told = found["students"]["copy"]
    assert told["gain"] == told["kl"] == 0.0
    assert told["agreement"] == 1.0
    assert (told["paired"]["p"], told["paired"]["p_holm"], told["paired"]["interval"]) == (None, None, None)


def test_networks_of_another_precision_are_asked_in_theirs(family, tmp_path):
    family["half"] = stored(tmp_path / "half", 2, lambda: MLP(4, (6,), 3).bfloat16())
    found = run_it(family, tmp_path)["students"]
    assert found["half"]["nll"] == pytest.approx(found["soft"]["nll"], rel=0.05), "the same weights, rounded"
    assert found["half"]["nll"] != found["soft"]["nll"]


def test_as_stages_of_a_recipe(tmp_path, monkeypatch):
    """From training to the page: a list of stages reaches the job, and a second run keeps what is there."""
    monkeypatch.chdir(tmp_path)
    outside = stored(tmp_path / "elsewhere" / "other", 9, lambda: MLP(64, (4,), 10))
    model = "model: {class_path: workbench.models.MLP, init_args: {hidden: [4]}}"
    text = f"""
        data: {{class_path: workbench.data.Digits, init_args: {{batch_size: 256}}}}
        trainer: {{max_steps: 1, accelerator: cpu}}
        teacher: {{job: fit, {model}}}
        alone: {{job: fit, {model}, seed_everything: 1}}
        bought: {{job: compare, teacher: teacher, students: [alone, {outside}], split: val}}
        page: {{job: report}}
    """
    (tmp_path / "recipe.yaml").write_text(text.replace("\n        ", "\n"))
    made = recipe.read(tmp_path / "recipe.yaml")
    done = run(made, tmp_path / "run")
    record = records.finished(tmp_path / "run" / "bought")
    assert record is not None
    assert list(record["comparison"]["students"]) == ["alone", str(outside)]
    assert record["comparison"]["n"] == 180
    assert "metrics" not in record
    assert [p["stage"] for p in record["parents"].values()] == ["teacher", "alone", str(outside)]
    monkeypatch.setattr(comparison, "compare", None)
    assert [entry["ended"] for entry in run(made, tmp_path / "run")] == [entry["ended"] for entry in done], "kept"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "small"}, "baseline is 'small': choose from the students alone, soft, many/small"),
        ({"split": "train"}, "split is 'train': choose val or test"),
        ({"data": Texts(), "split": "val"}, "Texts has no val_dataloader: compare on another split"),
        ({"data": Points(n=31), "task": Classification(3, ignore_index=0)}, None),
    ],
)
def test_what_cannot_be_compared(family, tmp_path, options, message):
    if message is None:
        data = options["data"]
        data.y[:] = 0
        message = "the split has no sample to score"
    with pytest.raises(ValueError, match=message):
        run_it(family, tmp_path, **options)


def test_students_must_be_some_and_distinct(family, tmp_path):
    alone = family["alone"]
    with pytest.raises(ValueError, match="students is empty: name at least one stage"):
        compare(family["teacher"], [], Points(), out=tmp_path / "out")
    with pytest.raises(ValueError, match="students has 'alone' more than once"):
        compare(family["teacher"], [alone, Source(f"{alone}/../alone")], Points(), out=tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere holds no compact checkpoint"):
        compare(family["teacher"], [Source(tmp_path / "nowhere")], Points(), out=tmp_path / "out")


def test_networks_must_answer_alike(family, tmp_path):
    family["wide"] = stored(tmp_path / "wide", 4, lambda: MLP(4, (6,), 5))
    with pytest.raises(ValueError, match=r"wide answers with \[7, 5\] and teacher with \[7, 3\]"):
        run_it(family, tmp_path)


def test_only_classes_are_compared(family, tmp_path):
    class Regression(Classification):  # type: ignore[misc] - a stand-in
        def targets(self, batch):
            return batch[0]

        def valid(self, batch):
            return torch.ones_like(batch[1], dtype=torch.bool)

    with pytest.raises(ValueError, match=r"has targets \[7, 4\] of torch\.float32: compare scores logits"):
        run_it(family, tmp_path, task=Regression(3))


class Rows(pl.LightningDataModule):
    """[N, 4] points, and labels of any shape."""

    def __init__(self, y: Tensor, batch_size: int = 7) -> None:
        super().__init__()
        self.x = torch.randn(len(y), 4, generator=torch.Generator().manual_seed(5))
        self.y, self.batch_size = y, batch_size

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.x, self.y), self.batch_size)


def some_labels(*shape: int, high: int = 2) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("kind", ["binary", "labels"])
def test_independent_labels_are_scored_each_by_a_sigmoid(kind, tmp_path):
    width = 1 if kind == "binary" else 3
    family = {
        name: stored(tmp_path / name, seed, lambda: MLP(4, (6,), width))
        for seed, name in enumerate(("teacher", "alone", "soft"))
    }
    y = some_labels(20) if kind == "binary" else some_labels(20, 3).float()
    if kind == "labels":
        y[::4, 1] = float("nan")
    task = Binary() if kind == "binary" else MultiLabel(3)
    data = Rows(y)
    found = run_it(family, tmp_path, data=data, task=task)
    known = ~y.isnan() if kind == "labels" else torch.ones(20, dtype=torch.bool)
    logits = {name: task.output(answers(source, data.x))[known].double() for name, source in family.items()}
    hard = y[known].bool()
    assert found["n"] == len(hard)
    for name, entry in {"teacher": found["teacher"], **found["students"]}.items():
        assert entry["accuracy"] == ((logits[name] > 0) == hard).double().mean()
        nll = nn.functional.binary_cross_entropy_with_logits(logits[name], hard.double())
        assert entry["nll"] == pytest.approx(nll.item())
    t, s = logits["teacher"].sigmoid(), logits["soft"].sigmoid()
    kl = (t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()).mean()
    assert found["students"]["soft"]["kl"] == pytest.approx(kl.item())
    assert found["per_class"]["names"] == ["no", "yes"]
    assert found["unit"] == ("samples" if kind == "binary" else "positions")
    if kind == "labels":
        metrics = task.metrics()
        metrics.update(task.output(answers(family["soft"], data.x)), y)
        assert found["monitor"] == ["f1", "max"]
        assert found["students"]["soft"]["score"] == pytest.approx(metrics.compute()["f1"].item())
    else:
        assert "monitor" not in found or found["monitor"] is None


class Pixels(nn.Module):
    """[B, 4] -> logits [B, 3, 2, 3], half as high as the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.init_args: dict = {}
        self.layer = nn.Linear(4, 18)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).unflatten(1, (3, 2, 3))


def test_pixels_are_compared_image_by_image_at_the_labels_resolution(tmp_path):
    family = {name: stored(tmp_path / name, seed, Pixels) for seed, name in enumerate(("teacher", "alone", "soft"))}
    y = some_labels(20, 4, 3, high=3)
    y[::2, 0] = 255
    task, data = Segmentation(3, ignore_index=255), Rows(y)
    found = run_it(family, tmp_path, data=data, task=task)
    assert (found["n"], found["unit"], found["monitor"]) == (20 * 12 - 10 * 3, "positions", ["mean_iou", "max"])
    for name, entry in {"teacher": found["teacher"], **found["students"]}.items():
        output = task.output(answers(family[name], data.x))
        metrics = task.metrics()
        metrics.update(output, y)
        for key, metric in (("score", "mean_iou"), ("accuracy", "accuracy"), ("nll", "nll")):
            assert entry[key] == pytest.approx(metrics.compute()[metric].item(), rel=1e-5)
    assert found["students"]["soft"]["paired"]["method"] == "t test and interval over 20 sequences"


@pytest.mark.parametrize(
    ("task", "y", "message"),
    [
        (Regression(), torch.zeros(20, 3), "outputs of Regression are numbers: read the metrics of the stages"),
        (Embedding(), torch.zeros(20, 3), "outputs of Embedding are embedding"),
        (MultiLabel(3), torch.full((20, 3), 0.3), "labels are probabilities: compare counts what is right"),
        (MultiLabel(2), torch.zeros(20, 2), r"answers with \[7, 3\] where MultiLabel has targets \[7, 2\]"),
    ],
)
def test_what_has_nothing_right_or_wrong_is_refused(family, tmp_path, task, y, message):
    with pytest.raises(ValueError, match=message):
        run_it(family, tmp_path, data=Rows(y), task=task)
