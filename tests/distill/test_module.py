import copy
import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distill.losses import soft_target
from distill.module import DistillModule, distill
from distill.teacher import Teacher
from workbench import artifact
from workbench.data import Digits
from workbench.models import MLP
from workbench.module import TaskModule
from workbench.source import Source
from workbench.tasks import Classification

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "limit_val_batches": 0,
}
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Seen(lp.Callback):
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
    return DistillModule(student(), taught_by, Classification(3), temperature, alpha, SGD)


def fit(module: lp.LightningModule, *callbacks: lp.Callback, **options: Any) -> lp.Trainer:
    trainer = lp.Trainer(**{"max_epochs": 2, **QUIET, **options}, callbacks=list(callbacks))
    trainer.fit(module, data(), data())
    return trainer


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_what_it_says(alpha: float, temperature: float) -> None:
    """T^2 once, also at the ends."""
    module = distilled(alpha, temperature)
    x, y = next(iter(data()))
    output = module(x)
    terms = module.terms(output, (x, y))
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
    module, seen = distilled(1.0), Seen()
    fit(module, seen)
    other = distilled(1.0)
    x, y = data().dataset.tensors  # type: ignore[attr-defined]
    shuffled = DataLoader(TensorDataset(x, (y + 1) % 3), 4)
    lp.Trainer(**{"max_epochs": 2, **QUIET}).fit(other, shuffled, shuffled)
    expected = other.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.network.state_dict().items())
    assert seen.rows[-1]["train/loss"] == seen.rows[-1]["train/soft"] != seen.rows[-1]["train/hard"]


def test_terms_are_logged_per_epoch() -> None:
    seen = Seen()
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
    module = DistillModule(network, expert, Classification(3, ignore_index=-100), 2.0, 0.5)
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


def test_the_job_distills_from_a_folder(tmp_path: Path) -> None:
    artifact.save(MLP(64, [32], 10), tmp_path / "teacher" / "artifact")
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
