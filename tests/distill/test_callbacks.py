import copy
import functools
import inspect
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from distill import DistillationCallback, DistillModule, Teacher
from distill.cache import CachedTeacher, cache_teacher
from distill.losses import DKD, RKD, BernoulliTarget, Hint, SoftTarget, soft_target
from distill.objective import SoftTargets, Term
from tests.helpers.projectors import draw_alike
from tests.helpers.ranks import on_ranks
from tests.helpers.trainers import BOTH, QUIET
from workbench.checkpoints import compact
from workbench.duration import Duration
from workbench.models import MLP
from workbench.tasks import Classification, OutputType
from workbench.training.module import TaskModule

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Noisy(nn.Module):
    def __init__(self, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Dropout(0.3), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def network(seed: int = 1, width: int = 5, classes: int = 3) -> Noisy:
    torch.manual_seed(seed)
    return Noisy(width, classes)


def teacher(classes: int = 3) -> Noisy:
    return network(2, 9, classes)


def named(options: dict[str, Any]) -> str:
    """The same in every process, which the address of a loader is not."""
    return " ".join(f"{name}={'' if name == 'loader' else value}" for name, value in options.items())


def data(size: int = 18) -> DataLoader:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(size, 6), torch.randint(0, 3, (size,))), 4)


def theirs(namespace: Any = lp, part: str = "model", returns: str = "tensor") -> Any:
    """Somebody's module, that knows nothing of distillation."""

    class Theirs(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, part, network())

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, part)(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            loss = nn.functional.cross_entropy(self(x).float(), y)
            if returns == "nothing":
                return None
            return {"loss": loss, "extra": 7} if returns == "dict" else loss

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters())

    return Theirs()


def fit(module: Any, *callbacks: Any, namespace: Any = lp, loader: Any = None, **options: Any) -> Any:
    trainer = namespace.Trainer(**{"max_epochs": 1, **QUIET, **options}, callbacks=list(callbacks))
    loader = data() if loader is None else loader
    torch.manual_seed(3)
    trainer.fit(module, loader)
    return trainer


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def native(alpha: float = 0.9, **options: Any) -> list[Tensor]:
    """Weights that DistillModule ends with."""
    module = DistillModule(network(), teacher(), Classification(3), SoftTargets(4.0, alpha), SGD)
    module.validation_step = None  # type: ignore[assignment, method-assign]
    fit(module, **options)
    return weights(module)


@BOTH
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_equals_the_module_that_was_written_for_it(namespace: Any, alpha: float) -> None:
    module = theirs(namespace)
    fit(module, DistillationCallback(teacher(), SoftTargets(alpha=alpha)), namespace=namespace)
    assert equal(weights(module), native(alpha))


@pytest.mark.parametrize("returns", ["tensor", "dict"])
@pytest.mark.parametrize("part", ["network", "model", "net"])
def test_finds_the_student(part: str, returns: str) -> None:
    """Any other name is the module's own forward, or is given."""
    for student in (None, part):
        module = theirs(part=part, returns=returns)
        fit(module, DistillationCallback(teacher(), student=student))
        assert equal(weights(module), native())


@pytest.mark.parametrize(
    "options",
    [
        # Batches of one size: where they differ, the module's own loss is a mean of means, and so is this.
        {"accumulate_grad_batches": 2, "loader": data(16)},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
    ],
    ids=named,
)
def test_equals_it_under_every_trainer(options: dict[str, Any]) -> None:
    module = theirs()
    fit(module, DistillationCallback(teacher()), **options)
    assert equal(weights(module), native(**options))
    assert not equal(weights(module), weights(theirs()))


@BOTH
def test_training_step_is_as_it_was_afterwards(namespace: Any) -> None:
    module, callback = theirs(namespace), DistillationCallback(teacher())
    fit(module, callback, namespace=namespace)
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks for part in module.modules())
    once = weights(module)
    again = theirs(namespace)
    fit(again, callback, namespace=namespace)
    assert equal(weights(again), once), "a callback serves any number of fits"


def test_and_after_an_exception_too() -> None:
    """Pitfall 11, wherever it comes from."""
    module, callback = theirs(), DistillationCallback(teacher())
    original = type(module).training_step

    def failing(self: Any, batch: Any, batch_idx: int) -> Any:
        original(self, batch, batch_idx)
        raise RuntimeError("power failure")

    type(module).training_step = failing
    with pytest.raises(RuntimeError, match="power failure"):
        fit(module, callback)
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks for part in module.modules())

    class Late(lp.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("power failure")

    module = theirs()
    with pytest.raises(RuntimeError, match="power failure"):
        fit(module, Late(), callback)
    assert "training_step" not in vars(module)


def test_a_step_of_the_instance_is_given_back() -> None:
    """As torch.compile of a LightningModule leaves one."""
    module = theirs()
    mine = module.training_step
    module.training_step = mine
    fit(module, DistillationCallback(teacher()))
    assert module.training_step is mine
    assert equal(weights(module), native())


def test_the_wrapped_step_looks_like_the_step() -> None:
    """Lightning reads its signature."""
    seen: list[Any] = []

    class Look(lp.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(inspect.signature(pl_module.training_step))

    module = theirs()
    fit(module, DistillationCallback(teacher()), Look())
    assert seen == [inspect.signature(module.training_step)]


def test_a_copy_made_in_training_trains_itself() -> None:
    made: list[Any] = []

    class Copy(lp.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not made:
                made.append(copy.deepcopy(pl_module))
                before = weights(pl_module)
                loss = made[0].training_step(batch, 0)
                grads = torch.autograd.grad(loss, list(made[0].parameters()))
                assert all(grad.any() for grad in grads)
                assert equal(before, weights(pl_module))

    taught_by = Teacher(teacher())
    fit(theirs(), DistillationCallback(taught_by), Copy())
    assert made


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_without_a_loss_are_left_alone() -> None:
    asked: list[int] = []
    expert = teacher()
    expert.register_forward_hook(lambda *_: asked.append(1))
    module = theirs(returns="nothing")
    before = weights(module)
    fit(module, DistillationCallback(expert))
    assert equal(weights(module), before)
    assert not asked


def test_forward_passes_without_gradient_do_not_count() -> None:
    module = theirs()
    original = type(module).training_step

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.model.eval()(batch[0])
            self.model.train()
        return original(self, batch, batch_idx)

    type(module).training_step = step
    fit(module, DistillationCallback(teacher()))
    assert equal(weights(module), native())


@pytest.mark.parametrize("calls", [0, 2])
def test_a_part_that_is_not_called_once_is_named(calls: int) -> None:
    module = theirs()
    original = type(module).training_step

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        for _ in range(calls - 1):
            self.model(batch[0])
        if calls:
            return original(self, batch, batch_idx)
        return nn.functional.cross_entropy(self.model.layers(batch[0]), batch[1])

    type(module).training_step = step
    with pytest.raises(ValueError, match=rf"'Noisy' was called {calls} times .*DistillationCallback\(student="):
        fit(module, DistillationCallback(teacher()))
    if calls == 0:
        fit(module, DistillationCallback(teacher(), student="model.layers"))
        assert equal(weights(module), native())


def test_modules_that_step_by_hand_are_refused() -> None:
    module = theirs()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"steps its optimizers by hand.*soft_target"):
        fit(module, DistillationCallback(teacher()))


def test_a_wrong_name_is_told_the_right_ones() -> None:
    with pytest.raises(ValueError, match=r"student is 'modle', but Theirs has no such submodule: it has \['model'\]"):
        fit(theirs(), DistillationCallback(teacher(), student="modle"))


def test_two_of_them_are_refused() -> None:
    module = theirs()
    with pytest.raises(ValueError, match="already"):
        fit(module, DistillationCallback(teacher()), DistillationCallback(teacher()))
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(("alpha", "temperature"), [(-0.1, 4.0), (1.5, 4.0), (0.5, 0.0), (0.5, float("nan"))])
def test_arguments_out_of_range(alpha: float, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is|temperature is"):
        DistillationCallback(teacher(), SoftTargets(temperature, alpha))


class Segmented(nn.Module):
    """As BERT beside DistilBERT: it looks at one column more than its student."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.head(x if segments is None else x + segments)


@pytest.mark.parametrize("by_name", [True, False])
def test_the_teacher_gets_what_of_a_batch_it_names_besides(by_name: bool) -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        logits = self.model(x=batch["x"]) if by_name else self.model(batch["x"])
        return nn.functional.cross_entropy(logits, batch["labels"])

    batch = {
        "x": torch.randn(6, 5),
        "segments": torch.ones(6, 5),
        "labels": torch.zeros(6).long(),
        "index": torch.ones(6),
    }
    module, expert = theirs(), Segmented()
    module.model = Segmented()
    expected = soft_target(module.model(batch["x"]), expert(batch["x"], batch["segments"]), 4.0)
    type(module).training_step = step
    rows = [{name: value[i] for name, value in batch.items()} for i in range(6)]
    trainer = fit(module, DistillationCallback(expert), loader=DataLoader(rows, 6), max_epochs=1)  # type: ignore[arg-type]
    assert trainer.callback_metrics["train/soft"].item() == pytest.approx(expected.item(), rel=1e-4)


def by_columns(names: tuple[str, ...], **columns: Tensor) -> tuple[Any, DataLoader]:
    """A module that trains on mappings, whose labels are called what they are."""
    module = theirs()

    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(batch["x"])
        return nn.functional.cross_entropy(logits, batch[names[0]]) if names else logits.square().mean()

    type(module).training_step = step
    columns = {"x": torch.randn(6, 6), **columns}
    return module, DataLoader([{name: value[i] for name, value in columns.items()} for i in range(6)], 6)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["labels", "label", "label_ids", "targets", "target", "y"])
def test_labels_are_found_by_their_usual_names(name: str) -> None:
    module, loader = by_columns((name,), **{name: torch.tensor([0, 1, 2, -100, 1, 0])})
    callback = DistillationCallback(teacher())
    with torch.no_grad():
        module.eval()
        x = next(iter(loader))["x"]
        expected = soft_target(module.model(x), callback.teacher(x), 4.0, torch.arange(6) != 3)  # type: ignore[operator]
    module.train().model.layers[2].p = 0.0
    trainer = fit(module, callback, loader=loader)
    assert trainer.callback_metrics["train/soft"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_classifier_without_labels_needs_no_argument() -> None:
    module, loader = by_columns(())
    with pytest.warns(UserWarning, match="without labels and are taken for logits of classes"):
        trainer = fit(module, DistillationCallback(teacher(), SoftTargets(alpha=1.0)), loader=loader)
    assert trainer.callback_metrics["train/soft"] > 0


def test_the_ignored_label_of_a_task_is_not_said_twice() -> None:
    module = TaskModule(network(), Classification(3), SGD)
    module.validation_step = None  # type: ignore[assignment, method-assign]
    with pytest.raises(ValueError, match="ignore_index is given, and the TaskModule knows it"):
        fit(module, DistillationCallback(teacher(), ignore_index=255))


def test_the_teacher_s_decoder_reads_what_the_student_s_does() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 20, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    module = theirs()
    module.model = T5ForConditionalGeneration(T5Config(d_model=8, dropout_rate=0.0, **sizes)).train()
    type(module).training_step = lambda self, batch, batch_idx: self.model(**batch).loss
    expert = T5ForConditionalGeneration(T5Config(d_model=12, **sizes)).eval()
    batch = {"input_ids": torch.randint(2, 20, (4, 5)), "labels": torch.tensor([[3, 4, 1], [5, 1, -100]] * 2)}
    with torch.no_grad():
        student, target = module.model(**batch).logits, expert(**batch).logits
    loader = DataLoader([{name: value[i] for name, value in batch.items()} for i in range(4)], 4)  # type: ignore[arg-type]
    trainer = fit(module, DistillationCallback(expert), loader=loader)
    expected = soft_target(student, target, 4.0, batch["labels"] != -100)
    assert trainer.callback_metrics["train/soft"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_classes_of_another_number_are_named() -> None:
    with pytest.raises(ValueError, match="student scores 3 classes and the teacher 4"):
        fit(theirs(), DistillationCallback(teacher(classes=4)))


def test_only_valid_positions_count_and_labels_stay_here() -> None:
    """A transformers network in a module that passes labels on and uses its loss."""
    from transformers import BertConfig, BertForTokenClassification

    sizes = {"vocab_size": 20, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 8}
    config = functools.partial(BertConfig, num_hidden_layers=1, num_labels=3, hidden_dropout_prob=0.0, **sizes)
    expert = BertForTokenClassification(config(hidden_size=8))
    given: list[set[str]] = []
    expert.register_forward_pre_hook(lambda _, args, kwargs: given.append(set(kwargs)), with_kwargs=True)

    class Tagger(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = BertForTokenClassification(config(hidden_size=4)).train()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters())

    rows = [{"input_ids": torch.randint(0, 20, (5,)), "labels": torch.tensor([0, 1, 2, -100, -100])} for _ in range(4)]
    callback = DistillationCallback(expert, valid=lambda batch: batch["labels"] != -100)
    trainer = lp.Trainer(**QUIET, max_epochs=1, callbacks=[callback])
    module = Tagger()
    trainer.fit(module, DataLoader(rows, 2))  # type: ignore[arg-type]
    assert given == [{"input_ids"}] * 2
    assert trainer.callback_metrics["train/soft"] > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@BOTH
def test_logs_the_mean_soft_loss_and_resumes_it(namespace: Any, tmp_path: Path) -> None:
    def metric(trainer: Any) -> float:
        return float(trainer.callback_metrics["train/soft"])

    def loader() -> DataLoader:
        whole = data().dataset
        return DataLoader(whole, 6)

    class Rest(DataLoader):
        """The last two of three batches, after a resume from the middle."""

        def __iter__(self) -> Any:
            return iter(list(super().__iter__())[1:])

        def __len__(self) -> int:
            return 3

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    def run(train: Any, *more: Any, path: Any = None) -> Any:
        torch.manual_seed(5)
        module = theirs(namespace)
        module.model.layers[2].p = 0.0
        trainer = namespace.Trainer(
            **{**QUIET, "enable_checkpointing": bool(more)},
            max_epochs=1,
            callbacks=[DistillationCallback(teacher(), SoftTargets(alpha=0.5)), *more],
        )
        trainer.fit(module, train, ckpt_path=path)
        return trainer

    keep = namespace.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    expected = metric(run(loader(), keep))
    assert expected > 0
    keep = namespace.callbacks.ModelCheckpoint(tmp_path / "again", "{step}", every_n_train_steps=1)
    resumed = run(Rest(data().dataset, 6), keep, path=tmp_path / "step=1.ckpt")
    assert resumed.global_step == 3
    assert metric(resumed) == expected


def _on_ranks() -> list[list[Any]]:
    found = []
    for run in (lambda: _called(devices=2, strategy="ddp"), lambda: native(devices=2, strategy="ddp")):
        found.append([value.tolist() for value in run()])
        torch.distributed.destroy_process_group()
    return found


def _called(**options: Any) -> list[Tensor]:
    module = theirs()
    fit(module, DistillationCallback(teacher()), **options)
    return weights(module)


def test_equals_it_on_two_ranks() -> None:
    """Pitfall 10: gradients are averaged, so the wrapper was not bypassed."""
    rows = [row for rank in on_ranks(_on_ranks) for row in rank]
    assert all(row == rows[0] for row in rows)
    assert rows[0] != [value.tolist() for value in native()], "each rank had half of the batches"


HINTS = {
    "soft": Term(SoftTarget(2.0), 0.5, decay=Duration(2, "ep"), final=0.2),
    "hard": Term(None, 0.5),
    "hint": Term(Hint(), 0.3, "layers.1", warmup=Duration(3, "it")),
    "pairs": Term(RKD(), 0.1, "layers.0:output", "layers.1"),
}


def hinted(namespace: Any = lp, losses: Any = HINTS, **options: Any) -> tuple[Any, DistillationCallback]:
    module, callback = theirs(namespace), DistillationCallback(teacher(), losses=losses)
    fit(module, callback, namespace=namespace, **{"max_epochs": 3, **options})
    return module, callback


def natively_hinted(**options: Any) -> Any:
    module = DistillModule(network(), teacher(), Classification(3), optimizer=SGD, losses=HINTS)
    module.validation_step = None  # type: ignore[assignment, method-assign]
    fit(module, **{"max_epochs": 3, **options})
    return module


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "loader": data(16)}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}],
    ids=named,
)
def test_terms_schedules_and_projectors_equal_the_module(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_alike(monkeypatch)
    expected = natively_hinted(**options)
    module, callback = hinted(**options)
    assert equal(weights(module), weights(expected.network))
    assert equal(weights(callback.objective), weights(expected.objective))
    assert [tuple(value.shape) for value in weights(callback.objective)] == [(9, 5), (9,)]
    assert not any("projector" in name for name in module.state_dict())
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.parametrize("size", [10, 18, 24])
def test_micro_batches_of_a_module_that_weighs_them_count_by_their_positions(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own loss, teacher's terms and projectors; of 18 the last update is one of two samples, the first of 16."""
    draw_alike(monkeypatch)
    loader = DataLoader(data(size).dataset, 8)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "loader": loader}
    expected = natively_hinted(**options)
    module = TaskModule(network(), Classification(3), SGD)
    module.validation_step = None  # type: ignore[assignment, method-assign]
    callback = DistillationCallback(teacher(), losses=HINTS)
    metrics = fit(module, callback, max_epochs=3, **options).callback_metrics
    assert equal(weights(module.network), weights(expected.network))
    assert equal(weights(callback.objective), weights(expected.objective))
    assert "step" not in vars(module)
    # Its own loss is logged as without a teacher.
    assert torch.equal(metrics["train/loss"], metrics["train/hard"])


def test_every_term_is_logged_by_name() -> None:
    module, loader = theirs(), data()
    callback = DistillationCallback(teacher(), losses=HINTS)
    metrics = fit(module, callback, loader=loader).callback_metrics
    assert {name for name in metrics if name.startswith("train/")} == {f"train/{name}" for name in HINTS}
    assert all(0 < value < 10 for value in metrics.values())


def test_projectors_follow_the_learning_rate_and_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam, whose defaults have entries that its constructor does not take, and a schedule."""
    draw_alike(monkeypatch)

    def configure_optimizers(self: Any) -> Any:
        made = torch.optim.AdamW(self.parameters(), lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)
        return [made], [torch.optim.lr_scheduler.ExponentialLR(made, 0.5)]

    module = theirs()
    monkeypatch.setattr(type(module), "configure_optimizers", configure_optimizers)
    callback = DistillationCallback(teacher(), losses=HINTS)
    fit(module, callback, max_epochs=3)
    optimizer = functools.partial(torch.optim.AdamW, lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)
    schedule = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    expected = DistillModule(network(), teacher(), Classification(3), HINTS, optimizer, schedule)
    expected.validation_step = None  # type: ignore[assignment, method-assign]
    fit(expected, max_epochs=3)
    assert equal(weights(module), weights(expected.network))
    assert equal(weights(callback.objective), weights(expected.objective))


def test_optimizers_that_nobody_can_make_again_are_refused() -> None:
    class Odd(torch.optim.SGD):
        def __init__(self, parameters: Any, module: nn.Module) -> None:
            super().__init__(parameters, lr=0.1)

    module = theirs()
    module.configure_optimizers = lambda: Odd(module.parameters(), module)
    with pytest.raises(ValueError, match=r"no Odd can be made for the projectors .*'module'"):
        fit(module, DistillationCallback(teacher(), losses=HINTS))


@BOTH
def test_projectors_resume_bit_for_bit(namespace: Any, tmp_path: Path) -> None:
    def run(epochs: int, path: Any = None) -> tuple[Any, DistillationCallback]:
        module, callback = theirs(namespace), DistillationCallback(teacher(), losses=HINTS)
        module.model.layers[2].p = 0.0
        trainer = namespace.Trainer(**QUIET, max_epochs=epochs, callbacks=[callback])
        torch.manual_seed(3)
        trainer.fit(module, data(), ckpt_path=path, **({"weights_only": False} if path else {}))
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, callback

    run(1)
    stored = torch.load(tmp_path / "1.ckpt", weights_only=False)
    assert set(stored["distillation_projectors"]) == {"projectors", "optimizer"}
    assert not any("projector" in name for name in stored["state_dict"])
    resumed, callback = run(3, tmp_path / "1.ckpt")
    whole = theirs(namespace)
    whole.model.layers[2].p = 0.0
    made = DistillationCallback(teacher(), losses=HINTS)

    trainer = namespace.Trainer(**QUIET, max_epochs=3, callbacks=[made])
    torch.manual_seed(3)
    trainer.fit(whole, data())
    assert equal(weights(resumed), weights(whole))
    assert equal(weights(callback.objective), weights(made.objective))
    # A checkpoint of a fit that had nothing left to do still has them.
    run(3, tmp_path / "3.ckpt")
    again = torch.load(tmp_path / "3.ckpt", weights_only=False)
    assert torch.equal(again["distillation_projectors"]["projectors"]["hint-0.weight"], weights(made.objective)[0])


def test_no_hook_is_left_on_the_optimizer() -> None:
    class Late(lp.Callback):
        def __init__(self, fails: bool) -> None:
            self.fails = fails

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.optimizer = trainer.optimizers[0]
            assert self.optimizer._optimizer_step_post_hooks
            if self.fails:
                raise RuntimeError("power failure")

    for fails in (False, True):
        module, late = theirs(), Late(fails)
        with pytest.raises(RuntimeError, match="power failure") if fails else nullcontext():
            fit(module, DistillationCallback(teacher(), losses=HINTS), late)
        assert not late.optimizer._optimizer_step_post_hooks
        assert "training_step" not in vars(module)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_second_fit_makes_new_projectors() -> None:
    callback = DistillationCallback(teacher(), losses=HINTS)
    fit(theirs(), callback)
    once = weights(callback.objective)
    fit(theirs(), callback)
    assert equal(weights(callback.objective), once)


def test_loss_scaling_reaches_the_projectors_too() -> None:
    """fp16 on a GPU; here the scaler alone, whose scale is a power of two and so changes nothing."""

    def run(*plugins: Any) -> list[Tensor]:
        module, callback = theirs(), DistillationCallback(teacher(), losses=HINTS)
        with torch.random.fork_rng():
            fit(module, callback, plugins=list(plugins), max_epochs=2)
        return weights(callback.objective) + weights(module)

    scaled = MixedPrecision("bf16-mixed", "cpu")
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert all(torch.allclose(a, b) for a, b in zip(run(scaled), run(MixedPrecision("bf16-mixed", "cpu"))))


def _hinted_on_ranks(losses: Any) -> Any:
    own = DataLoader(Subset(data(16).dataset, range(int(os.environ["RANK"]), 16, 2)), 4)
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    module, callback = hinted(losses=losses, loader=own, accumulate_grad_batches=2, **options)
    return [value.tolist() for value in weights(callback.objective) + weights(module)]


def test_projectors_are_the_same_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as on one, to rounding: the ranks' batches together are those of one rank."""
    draw_alike(monkeypatch)
    losses = {name: term for name, term in HINTS.items() if name != "pairs"}  # which compares samples of a batch
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    one, other = on_ranks(_hinted_on_ranks, losses)
    assert one == other
    module, callback = hinted(losses=losses, loader=DataLoader(data(16).dataset, 8), accumulate_grad_batches=2)
    for mine, found in zip(weights(callback.objective) + weights(module), one):
        torch.testing.assert_close(mine, torch.tensor(found))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_cached_teacher_equals_a_live_one(tmp_path: Path, precision: Any) -> None:
    cache_teacher(teacher(), data(16), tmp_path, features=["layers.1"])
    losses = {"soft": Term(SoftTarget()), "hard": Term(None, 0.5), "hint": Term(Hint(), 0.3, "layers.1")}
    found = []
    for taught_by in (teacher(), CachedTeacher(tmp_path), str(tmp_path)):
        module, callback = theirs(), DistillationCallback(taught_by, losses=losses)
        fit(module, callback, loader=callback.attach(data(16)), max_epochs=2, precision=precision)
        found.append(weights(module) + weights(callback.objective))
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])
    with pytest.raises(ValueError, match="the teacher is a cache and the batch comes without cached targets"):
        fit(theirs(), DistillationCallback(tmp_path))


def test_a_cache_that_lacks_what_a_term_compares_is_refused(tmp_path: Path) -> None:
    """The soft loss must not be that of the student with itself."""

    class Encoder(Noisy):
        def forward(self, x: Tensor) -> Any:
            return {"hidden": self.layers[0](x)}

    cache_teacher(Encoder(9), data(16), tmp_path / "features", features=["layers.0"])
    callback = DistillationCallback(tmp_path / "features")
    with pytest.raises(ValueError, match=r"cache has no logits, .* only feature/layers.0: .*leave that term out"):
        fit(theirs(), callback, loader=callback.attach(data(16)))
    cache_teacher(teacher(), data(16), tmp_path / "logits")
    callback = DistillationCallback(tmp_path / "logits", losses=HINTS)
    with pytest.raises(
        ValueError, match=r"cache has features of nothing and not of 'layers.1': cache again with features"
    ):
        fit(theirs(), callback, loader=callback.attach(data(16)))


def _weighed(loader: DataLoader, **options: Any) -> list[Tensor]:
    module = TaskModule(network(), Classification(3), SGD)
    module.validation_step = None  # type: ignore[assignment, method-assign]
    callback = DistillationCallback(teacher(), losses={"soft": Term(SoftTarget()), "hint": HINTS["hint"]})
    fit(module, callback, loader=loader, max_epochs=3, accumulate_grad_batches=2, **options)
    return weights(callback.objective) + weights(module)


def _weighed_on_ranks() -> Any:
    own = DataLoader(Subset(data(10).dataset, range(int(os.environ["RANK"]), 10, 2)), 4)
    return [each.tolist() for each in _weighed(own, devices=2, strategy="ddp", use_distributed_sampler=False)]


def test_micro_batches_on_two_ranks_count_by_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_alike(monkeypatch)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    one, other = on_ranks(_weighed_on_ranks)
    assert one == other
    for mine, found in zip(_weighed(DataLoader(data(10).dataset, 8)), one, strict=True):
        torch.testing.assert_close(mine, torch.tensor(found))


def test_losses_that_need_labels_find_them() -> None:
    losses = {"decoupled": Term(DKD(), 0.5), "hard": Term(None)}
    module = theirs()
    fit(module, DistillationCallback(teacher(), losses=losses))
    expected = DistillModule(network(), teacher(), Classification(3), optimizer=SGD, losses=losses)
    expected.validation_step = None  # type: ignore[assignment, method-assign]
    fit(expected)
    assert equal(weights(module), weights(expected.network))
    given = theirs()
    fit(given, DistillationCallback(teacher(), losses=losses, labels=lambda batch: batch[1] * 1))
    assert equal(weights(given), weights(module))
    with pytest.raises(ValueError, match="labels"):
        fit(theirs(), DistillationCallback(teacher(), losses=losses, labels=lambda batch: None, outputs="classes"))  # type: ignore[arg-type, return-value]


def test_the_teacher_is_asked_only_when_a_term_needs_it() -> None:
    asked: list[int] = []
    expert = teacher()
    expert.register_forward_hook(lambda *_: asked.append(1))
    module = theirs()
    losses = {"soft": Term(SoftTarget(), decay=Duration(2, "it")), "hard": Term(None)}
    fit(module, DistillationCallback(expert, losses=losses))
    assert len(asked) == 2, "of five steps"


def test_a_parser_takes_it_in_either_namespace(tmp_path: Path) -> None:
    compact.save(MLP(6, [5], 3), tmp_path / "compact")
    for namespace in (lp, pl):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--callback", type=namespace.Callback)
        arguments = {"teacher": str(tmp_path), "losses": {"alpha": 0.5}}
        given = {"class_path": "distill.DistillationCallback", "init_args": arguments}
        made = parser.instantiate(parser.parse_object({"callback": given})).callback
        assert isinstance(made, DistillationCallback)
        assert made.objective.weights(lambda _: 0.0) == {"soft": 0.5, "hard": 0.5}
        assert isinstance(made.teacher.module, MLP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"valid": lambda batch: batch[1] > 0},
            "valid is given, and the TaskModule knows it, by its task Classification",
        ),
        ({"labels": lambda batch: batch[1]}, "labels is given, and the TaskModule knows it"),
        ({"logits": 0}, "logits is given, and the TaskModule knows it"),
        ({"outputs": "labels"}, "outputs are OutputType.*labels.*and those of Classification"),
        ({"losses": {"z": Term(BernoulliTarget())}}, "which compares labels, and the outputs are classes"),
    ],
)
def test_a_task_says_what_is_scored(options: dict[str, Any], message: str) -> None:
    module = TaskModule(network(), Classification(3), SGD)
    module.validation_step = None  # type: ignore[assignment, method-assign]
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        fit(module, DistillationCallback(teacher(), **options))
    assert equal(weights(module), before)


def test_a_second_fit_may_have_other_outputs() -> None:
    callback = DistillationCallback(teacher())
    fit(theirs(), callback)
    assert callback.objective.outputs == OutputType("classes")
    module = theirs()
    module.training_step = lambda batch, batch_idx: nn.functional.mse_loss(module(batch[0]), batch[1])
    x, y = torch.randn(8, 6), 3 * torch.randn(8, 3)
    fit(module, callback, loader=DataLoader(TensorDataset(x, y), 4))
    assert callback.objective.outputs == OutputType("numbers")


def test_labels_that_do_not_go_with_the_outputs_are_refused() -> None:
    loader = DataLoader(TensorDataset(torch.randn(8, 6), torch.randint(3, (8, 2))), 4)
    module = theirs()
    module.training_step = lambda batch, batch_idx: module(batch[0]).square().mean()
    with pytest.raises(ValueError, match=r"labels are torch.int64 \[4, 2\] and the outputs, which are classes"):
        fit(module, DistillationCallback(teacher(), outputs="classes"), loader=loader)
    fit(module, DistillationCallback(teacher(), outputs="classes", labels=lambda batch: batch[1][:, 0]), loader=loader)
