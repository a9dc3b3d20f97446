import copy
import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distill.cache import CachedTeacher, cache_teacher
from distill.losses import BernoulliTarget, Hint, LogitMSE, ReverseKL, SimilarityPreserving, SoftTarget, soft_target
from distill.module import DistillModule, distill, module_for
from distill.objective import SoftTargets, Term
from distill.targets import training_progress
from distill.teacher import Teacher
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny_gpt2 import gpt2
from tests.helpers.trainers import QUIET
from workbench.checkpoints import compact
from workbench.data import Digits
from workbench.duration import Duration
from workbench.models import MLP
from workbench.records.source import Source
from workbench.tasks import Classification, Embedding, LanguageModelling, Regression
from workbench.training.module import TaskModule
from workbench.training.order import with_epoch_order

OPTIONS: dict[str, Any] = {**QUIET, "limit_val_batches": 0}
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Recorder(lp.Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def student() -> MLP:
    torch.manual_seed(1)
    return MLP(6, [5], 3)


def teacher() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3))


def data() -> DataLoader:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(16, 6), torch.randint(0, 3, (16,))), 4)


def distilled(alpha: float = 0.9, temperature: float = 4.0, taught_by: Any = None) -> DistillModule:
    taught_by = teacher() if taught_by is None else taught_by
    return DistillModule(student(), taught_by, Classification(3), SoftTargets(temperature, alpha), SGD)


def fit(module: lp.LightningModule, *callbacks: lp.Callback, **options: Any) -> lp.Trainer:
    trainer = lp.Trainer(**{"max_epochs": 2, **OPTIONS, **options}, callbacks=list(callbacks))
    trainer.fit(module, data(), data())
    return trainer


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_what_it_says(alpha: float, temperature: float) -> None:
    """T^2 once, also at the ends."""
    module = distilled(alpha, temperature)
    x, y = next(iter(data()))
    output = module(x)
    terms = module.step((x, y)).logged
    soft = soft_target(output, teacher().eval()(x), temperature)
    hard = nn.functional.cross_entropy(output, y)
    assert torch.allclose(terms["loss"], alpha * soft + (1 - alpha) * hard)
    assert torch.allclose(terms["hard"], hard)
    if alpha:
        assert torch.allclose(terms["soft"], soft)


def test_alpha_zero_is_training_without_a_teacher() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("asked")

    module, plain = distilled(0.0, taught_by=Broken()), TaskModule(student(), Classification(3), SGD)
    fit(module)
    fit(plain)
    expected = plain.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.network.state_dict().items())


def test_alpha_one_does_not_look_at_the_labels() -> None:
    """The task loss is logged, and moves nothing."""
    module, seen = distilled(1.0), Recorder()
    fit(module, seen)
    other = distilled(1.0)
    x, y = data().dataset.tensors  # type: ignore[attr-defined]
    shuffled = DataLoader(TensorDataset(x, (y + 1) % 3), 4)
    lp.Trainer(**{"max_epochs": 2, **OPTIONS}).fit(other, shuffled, shuffled)
    expected = other.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.network.state_dict().items())
    assert seen.rows[-1]["train/loss"] == seen.rows[-1]["train/soft"] != seen.rows[-1]["train/hard"]


def test_terms_are_logged_per_epoch() -> None:
    seen = Recorder()
    fit(distilled(0.25), seen, max_epochs=1)
    (row,) = seen.rows
    assert row.keys() == {"train/loss", "train/soft", "train/hard"}
    assert row["train/loss"] == pytest.approx(0.25 * row["train/soft"] + 0.75 * row["train/hard"], rel=1e-5)


def test_the_teacher_is_left_as_it_was() -> None:
    """Pitfall 1: neither its weights nor its batch statistics move, and nobody wakes it."""
    module = distilled()
    before = copy.deepcopy(module.teacher.module.state_dict())
    module.train()
    fit(module)
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.module.state_dict().items())
    assert not any(part.training for part in module.teacher.module.modules())


def test_the_teacher_is_nobody_s_parameter(tmp_path: Path) -> None:
    """Pitfall 2."""
    module = distilled()
    assert {name.partition(".")[0] for name in module.state_dict()} == {"network"}
    assert len(list(module.parameters())) == len(list(student().parameters()))
    trainer = fit(module)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.network.parameters()}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == module.state_dict().keys()
    assert not [key for key in stored if "teacher" in key]


def test_missing_student_keys_still_fail_on_load() -> None:
    module = distilled()
    state = module.state_dict()
    del state["network.layers.0.weight"]
    with pytest.raises(RuntimeError, match=r"network\.layers\.0\.weight"):
        module.load_state_dict(state)


def test_a_copy_trains_alike_and_shares_the_teacher() -> None:
    module = distilled()
    twin = copy.deepcopy(module)
    assert twin.teacher is module.teacher
    assert twin.network is not module.network
    fit(module)
    fit(twin)
    expected = module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in twin.state_dict().items())


def test_a_student_in_eval_mode_is_woken() -> None:
    module = DistillModule(student().eval(), teacher(), Classification(3))
    assert module.network.training


def test_classes_of_another_number_are_named() -> None:
    module = distilled(taught_by=MLP(6, [5], 4))
    with pytest.raises(ValueError, match="student scores 3 classes and the teacher 4"):
        fit(module)


@pytest.mark.parametrize(("alpha", "temperature"), [(-0.1, 4.0), (1.5, 4.0), (0.5, 0.0), (0.5, float("inf"))])
def test_arguments_out_of_range(alpha: float, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is|temperature is"):
        distilled(alpha, temperature)


def test_dict_batches_and_valid_positions() -> None:
    """A token classifier, as Hugging Face feeds it: logits [B, L, C], -100 at padding, which holds junk."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            logits = self.head(self.embedding(input_ids))
            return {"logits": logits.masked_fill(attention_mask[..., None] == 0, float("nan"))}

    network, expert = Tagger(), Tagger()
    batch = {"input_ids": torch.randint(0, 9, (2, 5)), "labels": torch.randint(0, 3, (2, 5))}
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    batch["attention_mask"], batch["labels"][~valid] = valid.long(), -100
    module = DistillModule(network, expert, Classification(3, ignore_index=-100), SoftTargets(2.0, 0.5))
    loss = module.training_step(batch, 0)
    loss.backward()
    mine = network.head(network.embedding(batch["input_ids"]))[valid]
    theirs = expert.head(expert.embedding(batch["input_ids"]))[valid]
    hard = nn.functional.cross_entropy(mine, batch["labels"][valid])
    assert torch.allclose(loss, 0.5 * soft_target(mine, theirs, 2.0) + 0.5 * hard)
    assert module.means["train"].local()["soft"][1] == 8
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    batch["labels"].fill_(-100)
    nothing = module.training_step(batch, 0)
    nothing.backward()
    assert nothing.item() == 0


def test_transformers_networks_on_both_sides() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 20, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 8}
    config = functools.partial(BertConfig, num_hidden_layers=1, num_labels=3, **sizes)
    module = DistillModule(
        BertForSequenceClassification(config(hidden_size=4)).eval(),
        BertForSequenceClassification(config(hidden_size=8)),
        Classification(3),
    )
    assert module.network.training
    batch = {"input_ids": torch.randint(0, 20, (2, 6)), "labels": torch.tensor([0, 2])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    module.training_step(batch, 0).backward()
    assert all(p.grad is not None for p in module.network.parameters())


def family(**options: Any) -> DistillModule:
    """Two students with dropout, of two sizes."""
    return DistillModule(members(), teacher(), Classification(3), optimizer=SGD, **options)


def members() -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    for name, width in (("small", 7), ("tiny", 4)):
        torch.manual_seed(1)
        made[name] = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Dropout(0.4), nn.Linear(width, 3))
    return made


def ordered_data() -> Any:
    """A loader that draws nothing from the global generator, as recipes have it."""
    return with_epoch_order(DataLoader(data().dataset, 4, shuffle=True), seed=3)


def quiet_data() -> DataLoader:
    """A validation loader that draws nothing from it either."""
    return DataLoader(data().dataset, 4, generator=torch.Generator())


def alone(name: str, losses: Any = None, **options: Any) -> tuple[DistillModule, Recorder]:
    module = DistillModule(members()[name], teacher(), Classification(3), optimizer=SGD, losses=losses)
    return module, run(module, **options)


def run(module: DistillModule, **options: Any) -> Recorder:
    seen = Recorder()
    options = {**OPTIONS, "max_epochs": 3, "limit_val_batches": 1.0, **options}
    torch.manual_seed(4)
    lp.Trainer(**options, callbacks=[seen]).fit(module, ordered_data(), quiet_data())
    return seen


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.01}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}],
    ids=["plain", "norm", "value"],
)
def test_each_of_a_family_comes_out_as_if_alone(options: dict[str, Any]) -> None:
    """Dropout, metrics, clipping and all, from one pass of the teacher a batch."""
    asked: list[int] = []
    expert = teacher()
    expert.register_forward_hook(lambda *_: asked.append(1))
    jointly = DistillModule(members(), expert, Classification(3), optimizer=SGD)
    rows = run(jointly, **options)
    assert len(asked) == 3 * 4
    for name in ("small", "tiny"):
        module, expected = alone(name, **options)
        mine = jointly.members[name].state_dict()
        for key, value in module.network.state_dict().items():
            assert torch.allclose(mine[key], value, atol=1e-6), (name, key)
        for row, other in zip(rows.rows, expected.rows, strict=True):
            for metric, value in other.items():
                split, _, rest = metric.partition("/")
                assert row[f"{split}/{name}/{rest}"] == pytest.approx(value, abs=1e-5)
    states = [network.state_dict() for network in jointly.members.values()]
    assert states[0].keys() == states[1].keys()


def test_a_family_with_features_of_their_own_widths() -> None:
    term = {"hint": Term(Hint(), student="0", teacher="0"), "hard": Term()}
    jointly = family(losses=term)
    run(jointly)
    assert {name: list(p.shape) for name, p in jointly.objective.projectors.named_parameters()} == {
        "small-hint-0.weight": [8, 7],
        "small-hint-0.bias": [8],
        "tiny-hint-0.weight": [8, 4],
        "tiny-hint-0.bias": [8],
    }
    for name in ("small", "tiny"):
        module, _ = alone(name, term)
        for key, value in module.network.state_dict().items():
            assert torch.allclose(jointly.members[name].state_dict()[key], value, atol=1e-6)


def test_a_family_resumes_with_every_member_s_random_numbers(tmp_path: Path) -> None:
    whole, halves = family(), family()
    run(whole, max_epochs=4)
    first = lp.Trainer(**{**OPTIONS, "max_epochs": 2})
    torch.manual_seed(4)
    first.fit(halves, ordered_data(), quiet_data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = family()
    rest = lp.Trainer(**{**OPTIONS, "max_epochs": 4})
    rest.fit(again, ordered_data(), quiet_data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for key, value in whole.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[key], value)


def test_projectors_are_trained_resumed_and_not_shipped(tmp_path: Path) -> None:
    def make() -> DistillModule:
        terms = {"hint": Term(Hint(), student="layers.0", teacher="0"), "hard": Term()}
        return DistillModule(student(), teacher(), Classification(3), optimizer=SGD, losses=terms)

    whole = make()
    trainer = fit(whole, max_epochs=2)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in whole.objective.parameters()} < held
    assert all("projector" not in name for name in whole.network.state_dict())
    part = make()
    trainer = fit(part, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = make()
    lp.Trainer(**{**OPTIONS, "max_epochs": 2}).fit(
        again, data(), data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False
    )
    assert again.objective.state_dict().keys() == whole.objective.state_dict().keys()
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    fresh = make()
    fresh.load_state_dict(whole.state_dict())
    assert not list(fresh.objective.parameters()), "a student is read without the projectors"


def test_making_projectors_moves_nothing() -> None:
    terms = {"hint": Term(Hint(), student="0", teacher="0"), "hard": Term()}
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    module = DistillModule(network, teacher(), Classification(3), losses=terms)
    before = copy.deepcopy(network.state_dict())
    module.prepare(next(iter(data())))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(part.training for part in network.modules())


def test_terms_warm_up_by_epochs_and_by_updates() -> None:
    terms = {
        "soft": Term(SoftTarget(), 0.5, warmup=Duration(2, "ep")),
        "hard": Term(weight=1.0, decay=Duration(4, "it"), final=0.5),
    }
    module = DistillModule(student(), teacher(), Classification(3), optimizer=SGD, losses=terms)
    weights: list[dict[str, float]] = []

    class Look(lp.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            weights.append(pl_module.objective.weights(functools.partial(training_progress, trainer)))

    fit(module, Look(), max_epochs=3)
    assert [row["soft"] for row in weights] == pytest.approx([0.5 * min(1, i / 8) for i in range(12)])
    assert [row["hard"] for row in weights] == pytest.approx([1 - 0.5 * min(1, i / 4) for i in range(12)])


def test_a_cache_needs_its_loader(tmp_path: Path) -> None:
    loader = data()
    path = cache_teacher(teacher(), loader, tmp_path / "cache")
    live, cached = distilled(), distilled(taught_by=CachedTeacher(path))
    with pytest.raises(ValueError, match="train on a loader that attach returned"):
        fit(cached)
    fit(live)
    trainer = lp.Trainer(**{**OPTIONS, "max_epochs": 2})
    cached = distilled(taught_by=CachedTeacher(path))
    trainer.fit(cached, cached.attach(loader), data())
    expected = live.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in cached.network.state_dict().items())


def test_a_regression_is_taught_numbers_and_where_no_label_is_nothing(tmp_path: Path) -> None:
    """Both terms are means over the elements that have a label; the teacher's flat outputs are brought to the shape."""
    x, y = torch.randn(10, 6), torch.randn(10, 3, 2)
    y[2:5, 1] = float("nan")
    judge, task = MLP(6, [8], 6), Regression(shape=[3, 2])
    terms = {"soft": Term(LogitMSE(), 0.25), "hard": Term(None, 0.75)}
    module = DistillModule(MLP(6, [4], 6), judge, task, losses=terms)
    output, wanted = module.network(x).view(10, 3, 2), judge(x).view(10, 3, 2)
    known = [(i, h, d) for i in range(10) for h in range(3) for d in range(2) if not y[i, h, d].isnan()]
    soft, hard = (sum((output[at] - other[at]) ** 2 for at in known) / len(known) for other in (wanted, y))
    step = module.step((x, y))
    torch.testing.assert_close(step.loss, 0.25 * soft + 0.75 * hard)
    assert step.positions == len(known) == 54
    loader = DataLoader(TensorDataset(x, y), 5)
    path = cache_teacher(judge, loader, tmp_path / "cache")
    cached = DistillModule(copy.deepcopy(module.network), CachedTeacher(path), task, losses=terms)
    lp.Trainer(**{**OPTIONS, "max_epochs": 1}).fit(module, loader, loader)
    lp.Trainer(**{**OPTIONS, "max_epochs": 1}).fit(cached, cached.attach(loader), loader)
    expected = module.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in cached.network.state_dict().items())


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"z": Term(LogitMSE(standardize=True))}, "compares classes, and the outputs are numbers: use SquaredError"),
        ({"kl": Term(ReverseKL())}, r"term 'kl' is ReverseKL\(.*compares classes, and the outputs are numbers"),
        ({"yes": Term(BernoulliTarget())}, "compares labels, and the outputs are numbers"),
        (SoftTargets(2.0), "temperature is 2.0, and the outputs are numbers: leave it out"),
    ],
)
def test_a_regression_has_no_classes_to_soften(losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillModule(student(), teacher(), Regression(), losses=losses)


def test_soft_targets_of_a_regression_are_squared_errors() -> None:
    x, y = torch.randn(10, 6), torch.randn(10, 3)
    y[2, 1] = float("nan")
    terms = {"soft": Term(LogitMSE(), 0.9), "hard": Term(None, 0.1)}
    network, judge = MLP(6, [4], 3), MLP(6, [8], 3)
    found, expected = (DistillModule(network, judge, Regression(), losses=each).step((x, y)) for each in (None, terms))
    torch.testing.assert_close(found.loss, expected.loss)


def test_embeddings_imitate_their_teacher() -> None:
    class Encoder(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(9, width), nn.Linear(width, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.out(self.table(input_ids).mean(1))

    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(0, 9, (5,))} for _ in range(32)]
    loader = DataLoader(rows, 8)  # type: ignore[arg-type]
    module = DistillModule(Encoder(3), Encoder(6), Embedding(), optimizer=functools.partial(torch.optim.Adam, lr=0.1))
    seen = Recorder()
    options = {**OPTIONS, "max_epochs": 20, "limit_val_batches": 1.0}
    lp.Trainer(**options, callbacks=[seen]).fit(module, loader, loader)
    first, last = seen.rows[0], seen.rows[-1]
    assert {"train/imitation", "val/cosine", "val/spearman"} <= last.keys()
    assert last["val/cosine"] > max(first["val/cosine"], 0.8)
    assert last["val/spearman"] > first["val/spearman"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": {}}, "a family of nothing"),
        ({"student": {"a.b": MLP(6, [4], 3)}}, r"a family of 'a\.b'"),
        ({"losses": {}}, "nothing to learn from"),
        ({"chunked": True}, "chunked is for language models, and the task is Classification"),
        ({"student": {"half": MLP(6, [4], 3)}}, r"a family of 'half': .* no attributes of torch\.nn\.ModuleDict"),
        ({"task": Embedding(), "losses": SoftTargets(2.0)}, "but Embedding has no labels beside the teacher"),
        ({"task": LanguageModelling(9, label_smoothing=0.1), "chunked": True}, "chunked smooths no labels"),
        ({"task": LanguageModelling(9), "chunked": True, "teacher": Teacher([MLP(), MLP()])}, "one live teacher"),
        (
            {
                "task": LanguageModelling(9),
                "chunked": True,
                "losses": {"soft": Term(SoftTarget()), "hard": Term(ReverseKL())},
            },
            "hard, the task's own loss, and not",
        ),
    ],
)
def test_modules_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    given = {"student": student(), "teacher": teacher(), "task": Classification(3), **arguments}
    with pytest.raises(ValueError, match=message):
        DistillModule(**given)


def test_a_job_refuses_temperature_and_alpha_beside_losses(tmp_path: Path) -> None:
    compact.save(MLP(64, [4], 10), tmp_path / "compact")
    job = functools.partial(module_for, MLP(64, [4], 10), Source(tmp_path / "compact"), Digits())
    assert job(losses={"hard": Term()}).objective.terms.keys() == {"hard"}
    soft = job(temperature=2.0, alpha=0.5).objective.terms["soft"]
    assert (soft.loss.temperature, soft.weight) == (2.0, 0.5)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="temperature and alpha are given beside losses"):
        job(losses={"hard": Term()}, alpha=0.5)


def test_a_cache_cannot_be_asked_what_to_imitate(tmp_path: Path) -> None:
    path = cache_teacher(teacher(), data(), tmp_path / "cache")
    with pytest.raises(ValueError, match="validation runs the teacher, which a cache cannot do"):
        DistillModule(student(), CachedTeacher(path), Embedding())


def test_a_family_follows_no_single_metric() -> None:
    scheduler = functools.partial(ReduceLROnPlateau, monitor="val/small/loss")
    with pytest.raises(ValueError, match="ReduceLROnPlateau would follow one metric"):
        run(DistillModule(members(), teacher(), Classification(3), optimizer=SGD, lr_scheduler=scheduler))


def test_each_of_a_family_forgets_the_random_numbers_of_an_earlier_fit() -> None:
    once, twice = family(), family()
    run(once)
    run(twice)
    twice.load_state_dict(family().state_dict())
    run(twice)
    for key, value in once.network.state_dict().items():
        assert torch.equal(twice.network.state_dict()[key], value)


def test_projectors_are_clipped_with_their_student() -> None:
    module = family(losses={"hint": Term(Hint(), student="0", teacher="0"), "hard": Term()})
    module.prepare(next(iter(data())))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module._clip_each(None, 0.5, "norm")
    for name, network in module.members.items():
        mine = [p.grad for p in (*network.parameters(), *module.objective.parameters_of(name))]
        assert sum(float(grad.square().sum()) for grad in mine if grad is not None) ** 0.5 == pytest.approx(
            0.5, rel=1e-4
        )
    module._clip_each(None, 0.001, "value")
    assert all(float(p.grad.abs().max()) < 0.0011 for p in module.objective.parameters())  # type: ignore[union-attr]


def test_projectors_are_made_of_what_the_device_gets() -> None:
    class Normalised(lp.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            x, y = torch.randint(0, 255, (16, 6), dtype=torch.uint8), torch.randint(0, 3, (16,))
            return DataLoader(TensorDataset(x, y), 4)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0].float() / 255, batch[1]

    terms = {"hint": Term(Hint(), student="layers.0", teacher="0"), "hard": Term()}
    module = DistillModule(student(), teacher(), Classification(3), losses=terms)
    module.validation_step = None  # type: ignore[assignment, method-assign]
    lp.Trainer(**{**OPTIONS, "max_epochs": 1}).fit(module, Normalised())
    assert list(module.objective.parameters())
    module = DistillModule(student(), teacher(), Classification(3), losses=terms)
    with pytest.raises(ValueError, match=r"several training loaders.*call prepare\(batch\)"):
        lp.Trainer(**{**OPTIONS, "max_epochs": 1}).fit(module, [data(), data()], data())


def _warming(decay: bool) -> Any:
    time: dict[str, Any] = {"decay": Duration(3, "it")} if decay else {"warmup": Duration(3, "it")}
    terms = {"hint": Term(Hint(), student="0", teacher="0", **time), "soft": Term(SoftTarget(), **time)}
    if not decay:
        terms["alike"] = Term(SimilarityPreserving(), student="0", teacher="0")
    module = family(losses=terms)
    run(module, devices=2, strategy="ddp", use_distributed_sampler=False, num_sanity_val_steps=0)
    return [p.flatten().tolist() for p in module.parameters()]


@pytest.mark.parametrize("decay", [False, True])
def test_ranks_where_terms_have_no_weight_yet_or_any_more(decay: bool) -> None:
    """Every parameter takes part in every step, or data-parallel training gives up."""
    one, other = on_ranks(_warming, decay)
    assert one == other


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_chunked_language_models_learn_the_same(temperature: float) -> None:
    """A causal model of transformers, padded on the right; logits of [tokens, vocabulary] are never made."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 19, "n_positions": 8, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

    def models() -> tuple[Any, Any]:
        torch.manual_seed(5)
        return tuple(GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=1, **sizes)) for width in (8, 12))

    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    batch = {"input_ids": torch.randint(0, 19, (3, 7)), "attention_mask": mask}
    found = []
    for chunked in (False, True):
        mine, expert = models()
        module = DistillModule(mine, expert, LanguageModelling(19), SoftTargets(temperature, 0.6), chunked=chunked)
        step = module.step(batch)
        step.loss.backward()
        found.append((step, [p.grad for p in mine.parameters()]))
    (one, expected), (other, gradients) = found
    assert one.positions == other.positions == 16
    for name in ("loss", "soft", "hard"):
        assert torch.allclose(one.logged[name], other.logged[name], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, gradients, strict=True))


@pytest.mark.parametrize(("alpha", "names"), [(1.0, {"loss", "soft", "hard"}), (0.0, {"loss", "hard"})])
def test_chunks_log_the_terms_that_the_plain_losses_log(alpha: float, names: set[str]) -> None:
    batch = {"input_ids": torch.randint(0, 19, (3, 7))}
    mine, expert = gpt2(), gpt2()
    plain, chunks = (
        DistillModule(mine, expert, LanguageModelling(23), SoftTargets(2.0, alpha), chunked=chunked).step(batch).logged
        for chunked in (False, True)
    )
    assert set(plain) == set(chunks) == names
    assert all(torch.allclose(plain[name], chunks[name], atol=1e-5) for name in names)


def test_chunks_of_a_family_ask_the_teacher_once_and_not_at_weight_zero() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 24, "n_positions": 8, "n_head": 2, "n_layer": 1}

    def model(width: int) -> Any:
        return GPT2LMHeadModel(GPT2Config(n_embd=width, **sizes))

    asked: list[int] = []
    expert = model(12)
    expert.register_forward_hook(lambda *_: asked.append(1))
    batch = {"input_ids": torch.randint(0, 19, (3, 7))}
    for alpha in (0.5, 0.0):
        students: dict[str, nn.Module] = {"a": model(8), "b": model(4)}
        module = DistillModule(students, expert, LanguageModelling(19), SoftTargets(alpha=alpha), chunked=True)
        module.step(batch)
        asked.clear()
        step = module.step(batch)
        assert len(asked) == (1 if alpha else 0)
        step.loss.backward()
        assert all(p.grad is not None for p in module.network.parameters())


def test_heads_that_are_not_all_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Softer(GPT2LMHeadModel):
        def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
            output = super().forward(**inputs)
            output.logits = output.logits.tanh()  # type: ignore[union-attr]
            return output

    config = GPT2Config(vocab_size=24, n_positions=8, n_head=2, n_layer=1, n_embd=8)
    module = DistillModule(GPT2LMHeadModel(config), Softer(config), LanguageModelling(19), chunked=True)
    with pytest.raises(ValueError, match="Softer does more to its logits than its output layer"):
        module.step({"input_ids": torch.randint(0, 19, (3, 7))})


def test_the_job_distills_a_family(tmp_path: Path) -> None:
    compact.save(MLP(64, [32], 10), tmp_path / "teacher" / "compact")
    result = distill(
        {"small": MLP(64, [8], 10), "tiny": MLP(64, [4], 10)},
        Source(tmp_path / "teacher"),
        Digits(256),
        trainer={"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        out=tmp_path / "students",
    )
    for name, width in (("small", 8), ("tiny", 4)):
        mine = result["students"][name]
        assert {"train/loss", "train/soft", "train/hard", "val/accuracy"} <= mine["history"][0].keys()
        assert mine["metrics"]["test/accuracy"] == result["metrics"][f"test/{name}/accuracy"]
        assert Teacher(tmp_path / "students" / name).module.init_args["hidden"] == [width]  # type: ignore[index]
        assert (tmp_path / "students" / name / "example.safetensors").is_file()


def test_the_job_distills_from_a_folder(tmp_path: Path) -> None:
    compact.save(MLP(64, [32], 10), tmp_path / "teacher" / "compact")
    result = distill(
        MLP(64, [8], 10),
        Source(tmp_path / "teacher"),
        Digits(256),
        trainer={"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        out=tmp_path / "student",
    )
    assert {"train/loss", "train/soft", "train/hard", "val/accuracy"} <= result["history"][0].keys()
    assert Teacher(tmp_path / "student").module.init_args["hidden"] == [8]  # type: ignore[index]


def test_half_precision_students_have_a_full_precision_teacher() -> None:
    module = distilled()
    fit(module, precision="bf16-true", max_epochs=1)
    assert module.network.layers[0].weight.dtype == torch.bfloat16  # type: ignore[index, union-attr]
    assert next(module.teacher.module.parameters()).dtype == torch.float32
