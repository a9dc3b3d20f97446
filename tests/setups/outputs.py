"""What the outputs of a network mean: one logit, independent labels, a class axis, outputs of another form."""

import math
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from distill import DistillationCallback, DistillModule, SoftTargets, Term
from distill.losses import BernoulliTarget, SoftTarget
from tests.helpers.trainers import QUIET
from tests.setups.base import Setup
from workbench.tasks import Binary, LanguageModelling, MultiLabel, OutputType, Segmentation
from workbench.training.module import TaskModule

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Own(lp.LightningModule):
    """A module as people write it: a network, a loss, SGD. What it logs is compared with numbers by hand."""

    def __init__(self, network: nn.Module, loss: Any) -> None:
        super().__init__()
        self.network, self.own_loss = network, loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.own_loss(self.network(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def soft_loss(module: Any, callback: DistillationCallback, rows: list[Any]) -> float:
    """``train/soft`` of a fit over one batch: the loss before its step. The network must have moved."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer = lp.Trainer(**QUIET, max_epochs=1, callbacks=[callback])
    trainer.fit(module, DataLoader(rows, len(rows)))  # type: ignore[arg-type]
    assert any(not torch.equal(*pair) for pair in zip(before, module.parameters()))
    return trainer.callback_metrics["train/soft"].item()


def by_hand(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 times the mean of KL between Bernoullis, as binary cross-entropy less the teacher's entropy."""
    p = torch.sigmoid(teacher / temperature)
    cross = F.binary_cross_entropy_with_logits(student / temperature, p)
    return temperature**2 * (cross - F.binary_cross_entropy(p, p))


def kl(student: Tensor, teacher: Tensor, axis: int, temperature: float = 4.0) -> Tensor:
    """T^2 KL over the classes along an axis, the mean over everything else."""
    p, q = (F.log_softmax(z / temperature, axis) for z in (teacher, student))
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(axis).mean()


def near(found: float | Tensor, expected: float | Tensor) -> None:
    one, other = (torch.as_tensor(value).item() for value in (found, expected))
    assert math.isclose(one, other, rel_tol=1e-4), (one, other)
    assert other > 1e-3


def linear(outputs: int, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(20, outputs)


def one_number_under_bce() -> None:
    student, teacher = linear(1, 1), linear(1, 2)
    x, y = torch.randn(8, 20), torch.randint(2, (8,))
    step = DistillModule(student, teacher, Binary()).step((x, y))
    soft, hard = by_hand(student(x), teacher(x)), F.binary_cross_entropy_with_logits(student(x).squeeze(1), y.float())
    near(step.logged["soft"], soft)
    near(step.loss, 0.9 * soft + 0.1 * hard)


def cross_encoder() -> None:
    def encoder(width: int, seed: int) -> BertForSequenceClassification:
        torch.manual_seed(seed)
        sizes = {
            "vocab_size": 30,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "initializer_range": 0.5,
            **NO_DROPOUT,
        }
        config = BertConfig(hidden_size=width, num_hidden_layers=1, num_labels=1, **sizes)
        return BertForSequenceClassification(config).train()

    class Reranker(Own):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.network(batch["input_ids"]).logits.squeeze(-1)
            return F.binary_cross_entropy_with_logits(logits, batch["labels"].float())

    student, teacher = encoder(4, 1), encoder(8, 2)
    rows = [{"input_ids": torch.randint(30, (5,)), "labels": torch.tensor(i % 2)} for i in range(6)]
    tokens = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        expected = by_hand(student(tokens).logits, teacher(tokens).logits)
    near(soft_loss(Reranker(student, None), DistillationCallback(teacher), rows), expected)


def squeezed() -> None:
    class Squeezed(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.layer = linear(1, seed)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).squeeze(-1)

    student, teacher = Squeezed(1), Squeezed(2)
    x, y = torch.randn(8, 20), torch.randint(2, (8,))
    expected = by_hand(student(x), teacher(x))
    near(DistillModule(student, teacher, Binary()).step((x, y)).logged["soft"], expected)
    module = Own(student, lambda z, y: F.binary_cross_entropy_with_logits(z, y.float()))
    near(soft_loss(module, DistillationCallback(teacher), list(zip(x, y))), expected)


def callback_on_a_binary_module() -> None:
    student, teacher = linear(1, 1), linear(1, 2)
    x, y = torch.randn(8, 20), torch.randint(2, (8, 1)).float()
    expected = by_hand(student(x), teacher(x))
    module = Own(student, F.binary_cross_entropy_with_logits)
    rows = list(zip(x, y))
    before = student.weight.detach().clone()
    with pytest.raises(ValueError, match="Say it by the argument outputs: 'classes'"):  # or a regression's 0.0 and 1.0
        soft_loss(module, DistillationCallback(teacher), rows)
    assert torch.equal(student.weight, before)
    near(soft_loss(module, DistillationCallback(teacher, outputs="labels"), rows), expected)


def callback_on_a_multi_label_module() -> None:
    student, teacher = linear(6, 1), linear(6, 2)
    x, y = torch.randn(8, 20), torch.randint(2, (8, 6)).float()
    y[0] = 1
    expected = by_hand(student(x), teacher(x))
    module = Own(student, F.binary_cross_entropy_with_logits)
    near(soft_loss(module, DistillationCallback(teacher), list(zip(x, y))), expected)


def shifted_teacher() -> None:
    x, y = torch.randn(8, 20), torch.randint(2, (8, 6))
    student, teacher = linear(6, 1), linear(6, 2)
    with torch.no_grad():
        student.weight.zero_()
        teacher.weight.zero_()
        student.bias.fill_(-5)
        teacher.bias.fill_(5)
    near(DistillModule(student, teacher, MultiLabel(6)).step((x, y)).logged["soft"], by_hand(student(x), teacher(x)))
    plain = BernoulliTarget()(student(x), teacher(x))
    assert BernoulliTarget()(student(x), teacher(x) + 5) - plain > 0.5


def segmentation() -> None:
    torch.manual_seed(1)
    student, teacher = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 3, padding=1)
    x, y = torch.randn(4, 3, 6, 7), torch.randint(5, (4, 6, 7))
    expected = kl(student(x), teacher(x), 1)
    near(DistillModule(student, teacher, Segmentation(5)).step((x, y)).logged["soft"], expected)
    rows = list(zip(x, y))
    near(soft_loss(Own(student, F.cross_entropy), DistillationCallback(teacher), rows), expected)
    y[:, :2] = -100
    expected = kl(student(x)[:, :, 2:], teacher(x)[:, :, 2:], 1)
    near(soft_loss(Own(student, F.cross_entropy), DistillationCallback(teacher), rows), expected)
    _segformer()


def _segformer() -> None:
    """Its logits have a quarter of the labels' resolution."""

    def segformer(width: int) -> SegformerForSemanticSegmentation:
        config = SegformerConfig(
            num_labels=4, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[width, width],
            patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 1], mlp_ratios=[1, 1],
            decoder_hidden_size=width, drop_path_rate=0.0, classifier_dropout_prob=0.0,
        )  # fmt: skip
        return SegformerForSemanticSegmentation(config).train()

    class Segmenter(Own):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.network(**batch).loss

    student, teacher = segformer(4), segformer(8).eval()
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(4, (32, 32))} for _ in range(3)]
    for row in rows:
        row["labels"][:16] = 255
    x = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        expected = kl(student(x).logits[:, :, 4:], teacher(x).logits[:, :, 4:], 1)
    callback = DistillationCallback(teacher, ignore_index=255)
    found = soft_loss(Segmenter(student, None), callback, rows)
    assert math.isclose(found, expected.item(), rel_tol=1e-3)


def frames() -> None:
    torch.manual_seed(1)
    student, teacher = nn.Conv1d(3, 5, 1), nn.Conv1d(3, 5, 3, padding=1)
    x, y = torch.randn(4, 3, 9), torch.randint(5, (4, 9))
    expected = kl(student(x), teacher(x), 1)
    near(soft_loss(Own(student, F.cross_entropy), DistillationCallback(teacher), list(zip(x, y))), expected)
    x, y = x[..., :5], y[..., :5]  # as many frames as classes: nobody can tell
    callback = DistillationCallback(teacher, outputs=OutputType("classes", class_dim=1))
    expected = kl(student(x), teacher(x), 1)
    near(soft_loss(Own(student, F.cross_entropy), callback, list(zip(x, y))), expected)


def tokens() -> None:
    sizes = {"vocab_size": 30, "num_attention_heads": 2, "intermediate_size": 8, "initializer_range": 0.5, **NO_DROPOUT}

    def tagger(width: int) -> BertForTokenClassification:
        model = BertForTokenClassification(BertConfig(hidden_size=width, num_hidden_layers=1, num_labels=5, **sizes))
        return model.train()

    class Tagger(Own):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.network(**batch).loss

    student, teacher = tagger(4), tagger(8)
    labels = torch.tensor([-100, 1, 2, 3, -100])  # as many tokens as classes
    rows = [{"input_ids": torch.randint(30, (5,)), "labels": labels} for _ in range(4)]
    x = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        expected = kl(student(x).logits[:, 1:4], teacher(x).logits[:, 1:4], -1)
    near(soft_loss(Tagger(student, None), DistillationCallback(teacher), rows), expected)


class Form(nn.Module):
    """A network that returns its logits in a form of its own."""

    def __init__(self, seed: int, form: Any) -> None:
        super().__init__()
        self.layer, self.form = linear(3, seed), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.layer(x), x)


def _outputs_of(student: Form, teacher: Form, **where: Any) -> None:
    x, y = torch.randn(8, 20), torch.randint(3, (8,))
    expected = kl(student.layer(x), teacher.layer(x), -1)
    spec = where.get("logits")
    read = (lambda raw: spec(raw)) if callable(spec) else (lambda raw: raw if spec is None else raw[spec])
    module = Own(student, lambda raw, y: F.cross_entropy(read(raw), y))
    near(soft_loss(module, DistillationCallback(teacher, **where), list(zip(x, y))), expected)
    from workbench.tasks import Classification

    taught = DistillModule(student, teacher, Classification(3), **where)
    rows = DataLoader(TensorDataset(x, y), 8)
    near(taught.step((x, y)).logged["soft"], kl(student.layer(x), teacher.layer(x), -1))
    [scores] = lp.Trainer(**QUIET).validate(taught, rows, verbose=False)
    near(scores["val/loss"], F.cross_entropy(student.layer(x), y))


def a_dict() -> None:
    def form(logits: Tensor, x: Tensor) -> Any:
        return {"embedding": x, "scores": logits}

    _outputs_of(Form(1, form), Form(2, form), logits="scores", teacher_logits="scores")


def a_tuple() -> None:
    def form(logits: Tensor, x: Tensor) -> Any:
        return x, logits

    _outputs_of(Form(1, form), Form(2, form), logits=1, teacher_logits=-1)


def unlike_forms() -> None:
    student = Form(1, lambda logits, x: {"heads": [x, logits]})
    teacher = Form(2, lambda logits, x: (logits, x))
    _outputs_of(student, teacher, logits=lambda raw: raw["heads"][1], teacher_logits=0)


def several_heads() -> None:
    class Heads(nn.Module):
        def __init__(self, width: int, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.body, self.kind, self.tags = nn.Linear(20, width), nn.Linear(width, 3), nn.Linear(width, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.body(x).relu()
            return {"kind": self.kind(hidden), "tags": self.tags(hidden)}

    class TwoTasks(Own):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, kind, tags = batch
            found = self.network(x)
            return F.cross_entropy(found["kind"], kind) + F.binary_cross_entropy_with_logits(found["tags"], tags)

    student, teacher = Heads(8, 1), Heads(16, 2)
    x, kinds, tags = torch.randn(8, 20), torch.randint(3, (8,)), torch.randint(2, (8, 6)).float()
    terms = {
        "kind": Term(SoftTarget(4.0), 0.5, student="kind", outputs="classes"),
        "tags": Term(BernoulliTarget(4.0), 0.25, student="tags", outputs="labels"),
        "hard": Term(None, 0.25),
    }
    with torch.no_grad():
        zs, zt = student(x), teacher(x)
    trainer = lp.Trainer(**QUIET, max_epochs=1, callbacks=[DistillationCallback(teacher, terms)])
    trainer.fit(TwoTasks(student, None), DataLoader(TensorDataset(x, kinds, tags), 8))
    near(trainer.callback_metrics["train/kind"], kl(zs["kind"], zt["kind"], -1))
    near(trainer.callback_metrics["train/tags"], by_hand(zs["tags"], zt["tags"]))


def _gpt2(width: int, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"n_layer": 1, "n_head": 2, "vocab_size": 30, "n_positions": 40, "initializer_range": 0.5}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=width, **sizes, **dropouts)).train()


def _padded(rows: int = 4, padding: int = 16) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    found = []
    for _ in range(rows):
        tokens = F.pad(torch.randint(1, 30, (8,)), (0, padding))
        found.append({"input_ids": tokens, "attention_mask": F.pad(torch.ones(8, dtype=torch.int64), (0, padding))})
    return found


def _of_tokens(student: nn.Module, teacher: nn.Module, rows: list[dict[str, Tensor]]) -> Tensor:
    """KL over the seven tokens that are predicted from real ones."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return kl(student(**batch).logits[:, :7], teacher(**batch).logits[:, :7], -1)


def callback_on_gpt2() -> None:
    found = {}
    for padding in (0, 16):
        rows = _padded(padding=padding)
        expected = _of_tokens(_gpt2(4, 1), _gpt2(8, 2), rows)
        module = TaskModule(_gpt2(4, 1), LanguageModelling(30), lambda p: torch.optim.SGD(p, 0.1))
        module.validation_step = None  # type: ignore[assignment, method-assign]
        near(soft_loss(module, DistillationCallback(_gpt2(8, 2)), rows), expected)
        native = DistillModule(_gpt2(4, 1), _gpt2(8, 2), LanguageModelling(30), None, lambda p: torch.optim.SGD(p, 0.1))
        native.validation_step = None  # type: ignore[assignment, method-assign]
        trainer = lp.Trainer(**QUIET, max_epochs=1)
        trainer.fit(native, DataLoader(rows, len(rows)))  # type: ignore[arg-type]
        pairs = list(zip(native.network.parameters(), module.network.parameters()))
        assert all(torch.equal(*pair) for pair in pairs)
        found[padding] = expected
    near(found[0], found[16])


def documented_valid() -> None:
    """Of a causal model that somebody's own module trains; without valid= it is the same."""

    class Own(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = _gpt2(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    rows = _padded()
    for row in rows:
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
    expected = _of_tokens(_gpt2(4, 1), _gpt2(8, 2), rows)
    valid = lambda batch: torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))  # noqa: E731
    assert '``lambda batch: torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))``' in (
        DistillationCallback.__doc__ or ""
    )
    for callback in (DistillationCallback(_gpt2(8, 2), valid=valid), DistillationCallback(_gpt2(8, 2), SoftTargets())):
        near(soft_loss(Own(), callback, rows), expected)


SETUPS = [
    Setup("one logit", "a linear layer to one number under BCE", one_number_under_bce),
    Setup("one logit", "a cross-encoder with the callback", cross_encoder),
    Setup("one logit", "logits squeezed to [B]", squeezed),
    Setup("one logit", "the callback on a binary module", callback_on_a_binary_module),
    Setup("independent labels", "a multi-label module with the callback", callback_on_a_multi_label_module),
    Setup("independent labels", "a shift of every teacher logit", shifted_teacher),
    Setup("dense outputs", "segmentation [B, C, H, W]", segmentation),
    Setup("dense outputs", "frames [B, C, T]", frames),
    Setup("dense outputs", "tokens [B, L, C]", tokens),
    Setup("outputs of another form", "a dict", a_dict),
    Setup("outputs of another form", "a tuple", a_tuple),
    Setup("outputs of another form", "several heads", several_heads),
    Setup("outputs of another form", "unlike forms of student and teacher", unlike_forms),
    Setup("valid positions of a task", "the callback on GPT-2 with padding", callback_on_gpt2),
    Setup("valid positions of a task", "the documented valid= of a causal model", documented_valid),
]
