import copy
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from distill import DistillationCallback, DistillationMixin, DistillationTrainer, DistillModule
from distill.cache import CachedTeacher, cache_teacher
from distill.hf_labels import label_spec, outputs_for, scored_positions
from distill.losses import (
    DKD,
    BernoulliTarget,
    FeatureLoss,
    Hint,
    SimilarityPreserving,
    SoftTarget,
    bernoulli_target,
    soft_target,
)
from distill.objective import SoftTargets, Term
from tests.helpers import transformers_training
from tests.helpers.projectors import draw_alike
from tests.helpers.ranks import on_ranks
from tests.helpers.transformers_training import VOCABULARY
from workbench.duration import Duration
from workbench.tasks import Classification, OutputType


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every Trainer collects garbage, which takes longer than its training where so much is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def bert(kind: Any, hidden: int, layers: int = 2, seed: int = 1, dropout: float = 0.0, **options: Any) -> Any:
    return transformers_training.bert(kind, dropout, seed, hidden_size=hidden, num_hidden_layers=layers, **options)


def classifier(**options: Any) -> Any:
    return bert(BertForSequenceClassification, 4, **options)


def expert(**options: Any) -> Any:
    return bert(BertForSequenceClassification, 8, 3, seed=2, **options)


def gpt2(hidden: int, seed: int = 1, dropout: float = 0.0) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=8,
        n_embd=hidden,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config)


def sentences(count: int = 16, label: Callable[[Tensor], Tensor] | None = None) -> list[dict[str, Tensor]]:
    """Of 6 places, of which some are padding; token classes are -100 there."""
    torch.manual_seed(0)
    rows = []
    for index in range(count):
        mask = (torch.arange(6) < 3 + index % 4).long()
        tokens = torch.randint(1, VOCABULARY, (6,)) * mask
        labels = torch.tensor(index % 3) if label is None else label(tokens).masked_fill(mask == 0, -100)
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return rows


def collated(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    return kind(
        **{
            "output_dir": str(folder),
            **transformers_training.ARGUMENTS,
            "max_grad_norm": 0.0,
            "learning_rate": 0.05,
            "train_sampling_strategy": "sequential",
            "optim": "sgd",
            **options,
        }
    )


def trained(folder: Path, student: Any, teacher: Any, rows: Any, cls: Any = DistillationTrainer, **options: Any) -> Any:
    """The Trainer after training; options that the distillation does not know are those of TrainingArguments."""
    own = {"losses", "compute_loss_func", "eval_dataset", "data_collator", "outputs", "logits", "teacher_logits"}
    given = {name: options.pop(name) for name in own & set(options)}
    trainer = cls(student, arguments(folder, **options), train_dataset=rows, teacher=teacher, **given)
    trainer.train()
    return trainer


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def largest(one: list[Tensor], other: list[Tensor]) -> float:
    assert len(one) == len(other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other))


HINTS = {
    "soft": Term(SoftTarget(2.0), 0.5, decay=Duration(2, "ep"), final=0.2),
    "hard": Term(None, 0.5),
    "hint": Term(Hint(), 0.3, "bert.encoder.layer.*", ["bert.encoder.layer.0", "bert.encoder.layer.2"]),
    "pairs": Term(SimilarityPreserving(), 0.1, "bert.pooler", warmup=Duration(3, "it")),
}


@pytest.fixture
def same_projectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sides draw them from one random state."""
    draw_alike(monkeypatch)


class Theirs(lp.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(module: Any, *callbacks: Any) -> Any:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "enable_checkpointing": False, "limit_val_batches": 0, "max_epochs": 2, **quiet}
    lp.Trainer(**options, callbacks=list(callbacks)).fit(module, DataLoader(sentences(), 4))  # type: ignore[arg-type]
    return module


@pytest.mark.usefixtures("same_projectors")
@pytest.mark.parametrize("losses", [None, HINTS], ids=["soft and hard", "terms"])
def test_three_ways_in_give_the_same_weights(losses: Any, tmp_path: Path) -> None:
    """The recipe's module, the callback and the Trainer."""
    trainer = trained(tmp_path, classifier(), expert(), sentences(), losses=losses)
    sgd = functools.partial(torch.optim.SGD, lr=0.05)
    module = DistillModule(classifier(), expert(), Classification(3), optimizer=sgd, losses=losses)
    module.validation_step = None  # type: ignore[assignment, method-assign]
    fit(module)
    callback = DistillationCallback(expert(), losses=losses)
    called = fit(Theirs(classifier()), callback)
    assert largest(weights(trainer.model), weights(classifier())) > 0.01
    assert largest(weights(trainer.model), weights(called.model)) == 0
    assert largest(weights(trainer.model), weights(module.network)) < 1e-6, "cross-entropy rounds in another order"
    if losses is not None:
        assert largest(weights(trainer.objective), weights(callback.objective)) == 0
        assert [tuple(value.shape) for value in weights(trainer.objective)] == [(8, 4), (8,), (8, 4), (8,)]


def causal_rows(count: int = 16) -> list[dict[str, Tensor]]:
    """With a prompt of two tokens in every third, and one of nothing but prompt."""
    rows = sentences(count, label=lambda tokens: tokens.clone())
    for row in rows[::3]:
        row["labels"][:2] = -100
    rows[5]["labels"][:] = -100
    return rows


CAUSAL = {"soft": Term(SoftTarget(2.0), 0.7), "hard": Term(None, 0.3), "hint": Term(Hint(), 0.1, "transformer.h.0")}


def by_hand(student: nn.Module, teacher: nn.Module, rows: list[dict[str, Tensor]], temperature: float = 2.0) -> Tensor:
    """A bare loop's loss: functions only, every position by itself."""
    batch = collated(rows)
    labels = batch.pop("labels")
    z, t = student(**batch).logits, teacher.eval()(**batch).logits.detach()
    soft, hard, count = z.new_zeros(()), z.new_zeros(()), 0
    for b in range(len(labels)):
        for i in range(labels.shape[1] - 1):
            if labels[b, i + 1] != -100:
                soft = soft + soft_target(z[b, i], t[b, i], temperature)
                hard = hard - torch.log_softmax(z[b, i], -1)[labels[b, i + 1]]
                count += 1
    return (0.7 * soft + 0.3 * hard) / count


PLAIN = {name: term for name, term in CAUSAL.items() if name != "hint"}


def test_causal_models_are_shifted_and_masked(tmp_path: Path) -> None:
    """Pitfall 8, against loops."""
    rows, student, teacher = causal_rows(), gpt2(4), gpt2(8, seed=2)
    trainer = DistillationTrainer(student, arguments(tmp_path), train_dataset=rows, teacher=teacher, losses=PLAIN)
    loss = trainer.compute_loss(student.train(), collated(rows))
    torch.testing.assert_close(loss, by_hand(student, teacher, rows))
    loss, output = trainer.compute_loss(student, collated(rows), return_outputs=True)
    assert output.logits.shape == (16, 6, VOCABULARY)
    other = copy.deepcopy(rows)
    for row in other:  # what stands at padding changes nothing
        row["input_ids"].masked_fill_(row["attention_mask"] == 0, 7)
    torch.testing.assert_close(trainer.compute_loss(student, collated(other)), loss)


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_any_number_of_micro_batches_is_the_same_gradient(pieces: int, tmp_path: Path) -> None:
    """Pitfall 7: the mean is over the positions of the whole update."""
    rows = causal_rows()
    options = {"per_device_train_batch_size": 16 // pieces, "gradient_accumulation_steps": pieces}
    trainer = trained(tmp_path, gpt2(4), gpt2(8, seed=2), rows, losses=PLAIN, num_train_epochs=1, **options)
    expected = gpt2(4)
    loss = by_hand(expected, gpt2(8, seed=2), rows)
    loss.backward()
    for parameter in expected.parameters():
        parameter.data -= 0.05 * parameter.grad
    assert largest(weights(trainer.model), weights(expected)) < 1e-6
    [logged] = [row for row in trainer.state.log_history if "loss" in row]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert 0.7 * logged["soft"] + 0.3 * logged["hard"] == pytest.approx(logged["loss"], rel=1e-4)


def test_a_micro_batch_without_a_valid_position_has_no_loss_and_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No Python value of a tensor is read, which would wait for the device, and no NaN is left."""

    def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        known = (labels[:, 1:] != -100).float()
        return (outputs.logits[:, :-1].square().mean(-1) * known).sum() / known.sum()

    asked, read = [], Tensor.__bool__

    def recorded(tensor: Tensor) -> bool:
        asked.append(sys._getframe(1).f_code.co_filename)
        return read(tensor)

    for own in ({}, {"compute_loss_func": mean}):
        student = gpt2(4).train()
        trainer = DistillationTrainer(student, arguments(tmp_path), teacher=gpt2(8, seed=2), losses=PLAIN, **own)
        batch = collated(causal_rows())
        batch["labels"] = torch.full_like(batch["labels"], -100)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "__bool__", recorded)
            loss = trainer.compute_loss(student, batch)
        loss.backward()
        assert loss.item() == 0
        assert all(not parameter.grad.any() for parameter in student.parameters())
    assert not [name for name in asked if Path(name).name.startswith("hf")]


def _on_ranks(folder: Path, rows: Any, losses: Any, average: bool = True) -> Any:
    trainer = trained(
        folder,
        gpt2(4),
        gpt2(8, seed=2),
        rows,
        losses=losses,
        average_tokens_across_devices=average,
        save_strategy="epoch",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        ddp_backend="gloo",
    )
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    found = [value.tolist() for value in weights(trainer.model) + weights(trainer.objective)]
    return found, [row for row in trainer.state.log_history if "soft" in row]


def full_rows() -> list[dict[str, Tensor]]:
    """As many tokens that count in each: then hints, means over tokens of a micro-batch, add up exactly too."""
    rows = sentences(label=lambda tokens: tokens.clone())
    ones = torch.ones(6, dtype=torch.int64)
    return [{"input_ids": row["input_ids"], "attention_mask": ones, "labels": row["input_ids"]} for row in rows]


@pytest.mark.usefixtures("same_projectors")
@pytest.mark.parametrize(("rows", "losses"), [(causal_rows, PLAIN), (full_rows, CAUSAL)], ids=["ragged", "hints"])
def test_ranks_are_one(rows: Callable[[], Any], losses: Any, tmp_path: Path) -> None:
    """Pitfall 10 and 7: equal weights and projectors on all ranks, and those of one process that sees all."""
    (one, logged), (other, _) = on_ranks(_on_ranks, tmp_path, rows(), losses)
    assert one == other
    both = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    alone = trained(tmp_path, gpt2(4), gpt2(8, seed=2), rows(), losses=losses, **both)
    found = weights(alone.model) + weights(alone.objective)
    assert largest(found, [torch.tensor(value) for value in one]) < 1e-6
    expected = [row for row in alone.state.log_history if "soft" in row]
    for mine, theirs in zip(logged, expected, strict=True):
        for name in ("loss", *losses):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4)
    assert (tmp_path / "checkpoint-2" / "distillation.safetensors").is_file() == ("hint" in losses)


def test_ranks_can_be_averaged_instead(tmp_path: Path) -> None:
    one, other = (found for found, _ in on_ranks(_on_ranks, tmp_path, causal_rows(), PLAIN, False))
    assert one == other
    both = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    alone = trained(tmp_path, gpt2(4), gpt2(8, seed=2), causal_rows(), losses=PLAIN, **both)
    assert 1e-6 < largest(weights(alone.model), [torch.tensor(value) for value in one]) < 0.1


def vit(hidden: int, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(hidden_size=hidden, intermediate_size=8, num_labels=3, initializer_range=0.5, **sizes)
    return ViTForImageClassification(config)


def t5(hidden: int, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    sizes = {"num_layers": 1, "num_heads": 2, "d_kv": 4, "d_ff": 8, "dropout_rate": 0.0}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=hidden, **sizes, **ends))


def pictures() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [{"pixel_values": torch.randn(1, 8, 8), "labels": torch.tensor(index % 3)} for index in range(16)]


def multilabelled() -> list[dict[str, Tensor]]:
    return [{**row, "labels": (torch.arange(3) == row["labels"]).float()} for row in sentences()]


def masked() -> list[dict[str, Tensor]]:
    return sentences(label=lambda tokens: tokens.masked_fill(torch.arange(6) % 2 == 0, -100))


def tagged() -> list[dict[str, Tensor]]:
    return sentences(label=lambda tokens: tokens % 3)


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any], str]] = {
    "masked language model": (
        lambda: bert(BertForMaskedLM, 4),
        lambda: bert(BertForMaskedLM, 8, seed=2),
        masked,
        "bert.encoder.layer.1",
    ),
    "tokens": (
        lambda: bert(BertForTokenClassification, 4),
        lambda: bert(BertForTokenClassification, 8, seed=2),
        tagged,
        "bert.encoder.layer.1",
    ),
    "images": (lambda: vit(4), lambda: vit(8, seed=2), pictures, "vit.layers.0"),
    "sequence to sequence": (lambda: t5(8), lambda: t5(12, seed=2), tagged, "decoder.block.0"),
    "several labels": (
        lambda: classifier(problem_type="multi_label_classification"),
        expert,
        multilabelled,
        "bert.pooler",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_all_kinds_learn(name: str, tmp_path: Path) -> None:
    """In one piece and in two; soft targets where the labels count, as by hand."""
    student, teacher, rows, place = MODELS[name]
    several = name == "several labels"
    losses = {"soft": Term(BernoulliTarget(2.0) if several else SoftTarget(2.0), 0.7), "hard": Term(None, 0.3)}
    found = []
    for pieces in (1, 2):
        options = {"per_device_train_batch_size": 16 // pieces, "gradient_accumulation_steps": pieces}
        trainer = trained(tmp_path, student(), teacher(), rows(), losses=losses, num_train_epochs=1, **options)
        found.append(weights(trainer.model))
    assert largest(*found) < 1e-6
    assert largest(found[0], weights(student())) > 1e-4
    [logged] = [row for row in trainer.state.log_history if "loss" in row]
    made, batch = student().train(), collated(rows())
    output = made(**batch)
    with torch.no_grad():
        known = teacher().eval()(**batch).logits
    labels = batch["labels"]
    valid = labels != -100 if labels.shape == known.shape[:-1] else torch.ones(known.shape[:-1], dtype=torch.bool)
    soft = bernoulli_target(output.logits, known, 2.0) if several else soft_target(output.logits, known, 2.0, valid)
    assert logged["soft"] == pytest.approx(soft.item(), rel=1e-4)
    assert logged["hard"] == pytest.approx(output.loss.item(), rel=1e-4)
    hinted = trained(tmp_path, student(), teacher(), rows(), losses={**losses, "hint": Term(Hint(), 0.1, place)})
    assert weights(hinted.objective)


def test_evaluation_is_the_trainers_own(tmp_path: Path) -> None:
    rows = causal_rows()
    own = Trainer(gpt2(4), arguments(tmp_path), eval_dataset=rows)
    taught = DistillationTrainer(gpt2(4), arguments(tmp_path), eval_dataset=rows, teacher=gpt2(8, seed=2))
    assert taught.evaluate()["eval_loss"] == own.evaluate()["eval_loss"]
    assert (taught.predict(rows).predictions == own.predict(rows).predictions).all()


def test_a_trainer_of_ones_own(tmp_path: Path) -> None:
    class Mine(DistillationMixin, Seq2SeqTrainer):
        pass

    options = {"kind": Seq2SeqTrainingArguments, "predict_with_generate": True, "generation_max_length": 5}
    trainer = trained(tmp_path, t5(8), t5(12, seed=2), tagged(), Mine, eval_dataset=tagged(), **options)
    plain = trained(tmp_path, t5(8), t5(12, seed=2), tagged())
    assert largest(weights(trainer.model), weights(plain.model)) == 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_own_losses_of_the_trainer_are_kept(tmp_path: Path) -> None:
    """A function, and label smoothing: at alpha 0 they are all there is."""

    def mine(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.2)

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teacher was asked")

    for given in ({"compute_loss_func": mine}, {"label_smoothing_factor": 0.2}):
        student = trained(tmp_path, classifier(), Recording(asked), sentences(), losses=SoftTargets(alpha=0.0), **given)
        own = {name: value for name, value in given.items() if name == "compute_loss_func"}
        rest = {name: value for name, value in given.items() if name not in own}
        plain = Trainer(classifier(), arguments(tmp_path, **rest), train_dataset=sentences(), **own)
        plain.train()
        assert largest(weights(student.model), weights(plain.model)) < 1e-7


class Recording(nn.Module):
    """A teacher that says when it is asked."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, **kwargs: Any) -> Any:
        return self.ask(self, **kwargs)


def test_the_teacher_is_frozen_in_eval_and_in_no_checkpoint(tmp_path: Path) -> None:
    modes, given = [], []
    teacher = expert(dropout=0.5)

    def ask(module: nn.Module, **kwargs: Any) -> Any:
        modes.append(module.training)
        given.append(set(kwargs))
        return teacher.eval()(**kwargs)

    asked = Recording(ask).train()
    trainer = trained(tmp_path, classifier(), asked, sentences(), losses=PLAIN, save_strategy="steps", save_steps=4)
    assert modes == [False] * 8
    assert all(names == {"input_ids", "attention_mask"} for names in given)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(parameter) for parameter in trainer.model.parameters()}
    names = set(classifier().state_dict())
    assert set(load_file(tmp_path / "checkpoint-4" / "model.safetensors")) == names
    assert not (tmp_path / "checkpoint-4" / "distillation.safetensors").exists(), "there are no projectors"


def test_projectors_are_in_checkpoints_and_nowhere_else(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", classifier(), expert(), sentences(), losses=HINTS, save_strategy="epoch")
    state = load_file(tmp_path / "run" / "checkpoint-8" / "distillation.safetensors")
    assert set(state) == {f"hint-{index}.{name}" for index in (0, 1) for name in ("weight", "bias")}
    names = set(classifier().state_dict())
    assert set(load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors")) == names
    trainer.save_model(str(tmp_path / "model"))
    trainer.model.save_pretrained(tmp_path / "pretrained")
    for folder in ("model", "pretrained"):
        assert set(load_file(tmp_path / folder / "model.safetensors")) == names
        assert not (tmp_path / folder / "distillation.safetensors").exists()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in trainer.model.modules())


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Dropout, momentum, schedules of terms and of the learning rate, projectors; in the middle of an epoch."""
    options: dict[str, Any] = {
        "losses": HINTS,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
    }
    whole = trained(tmp_path, classifier(dropout=0.3), expert(), sentences(), **options)
    made = arguments(tmp_path, **{name: value for name, value in options.items() if name != "losses"})
    torch.manual_seed(99)
    resumed = DistillationTrainer(
        classifier(dropout=0.3, seed=3), made, train_dataset=sentences(), teacher=expert(), losses=HINTS
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step == 8
    assert largest(weights(resumed.model), weights(whole.model)) == 0
    assert largest(weights(resumed.objective), weights(whole.objective)) == 0
    (tmp_path / "checkpoint-3" / "distillation.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3' has no distillation.safetensors, and the terms"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_making_projectors_leaves_the_random_state_alone(tmp_path: Path) -> None:
    """The same order of data and the same dropout as without the term."""
    losses = {**PLAIN, "hint": Term(Hint(), 0.0, "bert.encoder.layer.0")}

    def noisy(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        noise = torch.rand(len(rows), 6) < 0.2
        batch = collated(rows)
        return {**batch, "input_ids": batch["input_ids"].masked_fill(noise, 3)}

    options = {"train_sampling_strategy": "random", "data_collator": noisy}
    with_, without = (
        trained(tmp_path, classifier(dropout=0.3), expert(), sentences(), losses=terms, **options)
        for terms in (losses, PLAIN)
    )
    assert largest(weights(with_.model), weights(without.model)) == 0


def test_terms_are_logged_as_means_since_the_last_log(tmp_path: Path) -> None:
    every = trained(tmp_path, classifier(), expert(), sentences(), losses=HINTS)
    some = trained(tmp_path, classifier(), expert(), sentences(), losses=HINTS, logging_steps=4)
    each = [row for row in every.state.log_history if "soft" in row]
    [first, second] = [row for row in some.state.log_history if "soft" in row]
    for name in ("soft", "hard", "hint"):
        assert first[name] == pytest.approx(sum(row[name] for row in each[:4]) / 4)
        assert second[name] == pytest.approx(sum(row[name] for row in each[4:]) / 4)
    assert "pairs" not in each[0], "its weight is 0 before the warm-up"


def test_half_precision(tmp_path: Path) -> None:
    trainer = trained(tmp_path, classifier(), expert(), sentences(), losses=HINTS, bf16=True)
    full = trained(tmp_path, classifier(), expert(), sentences(), losses=HINTS)
    assert all(value.dtype == torch.float32 for value in weights(trainer.model) + weights(trainer.objective))
    assert 0 < largest(weights(trainer.model), weights(full.model)) < 0.05
    assert all(row["loss"] == row["loss"] for row in trainer.state.log_history if "loss" in row)


@pytest.mark.usefixtures("same_projectors")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_cached_teacher_equals_a_live_one(workers: int, tmp_path: Path) -> None:
    losses = {"soft": Term(SoftTarget(2.0), 0.5), "hard": Term(None, 0.5), "hint": Term(Hint(), 0.3, "bert.pooler")}
    cache_teacher(
        expert(), DataLoader(sentences(), 4, collate_fn=collated), tmp_path / "cache", features=["bert.pooler"]
    )  # type: ignore[arg-type]
    options = {"losses": losses, "train_sampling_strategy": "random", "dataloader_num_workers": workers}
    live = trained(tmp_path, classifier(), expert(), sentences(), data_collator=collated, **options)
    for teacher in (CachedTeacher(tmp_path / "cache"), tmp_path / "cache"):
        cached = trained(tmp_path, classifier(), teacher, sentences(), data_collator=collated, **options)
        assert largest(weights(live.model), weights(cached.model)) == 0
        assert largest(weights(live.objective), weights(cached.objective)) == 0
    assert cached.accelerator.prepare.__self__ is cached.accelerator
    with pytest.raises(ValueError, match="the batch comes without cached targets"):
        cached.compute_loss(cached.model.train(), collated(sentences(4)))


def table_of(rows: list[dict[str, Tensor]]) -> Any:
    plain = [{name: value.tolist() for name, value in row.items()} for row in rows]
    return Dataset.from_list(plain).with_format("torch")


def test_a_cache_has_the_columns_of_its_teacher(tmp_path: Path) -> None:
    """Those that its student does not take, too."""
    rows = [{**row, "token_type_ids": torch.tensor([0, 0, 0, 1, 1, 1])} for row in sentences()]
    cache_teacher(expert(), DataLoader(rows, 4, collate_fn=collated), tmp_path / "cache")  # type: ignore[arg-type]
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 8, "num_labels": 3}
    torch.manual_seed(3)
    student = DistilBertForSequenceClassification(
        DistilBertConfig(dim=4, hidden_dim=4, n_layers=1, n_heads=2, dropout=0.0, seq_classif_dropout=0.0, **sizes)
    )
    live, cached, table = (
        trained(tmp_path, copy.deepcopy(student), teacher, data, data_collator=collated)
        for teacher, data in (
            (expert(), rows),
            (tmp_path / "cache", rows),
            (
                tmp_path / "cache",
                Dataset.from_list([{n: v.tolist() for n, v in r.items()} for r in rows]).with_format("torch"),
            ),
        )
    )
    assert largest(weights(live.model), weights(cached.model)) == 0
    assert largest(weights(live.model), weights(table.model)) == 0
    without = trained(tmp_path, copy.deepcopy(student), expert(), sentences())
    assert largest(weights(live.model), weights(without.model)) > 1e-3


def segformer(labels: int, seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_sizes": [4, 4, 4, 4], "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 4}
    silent = {"hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=labels, **sizes, **silent))
    return model.eval()  # the head has batch normalisation


def bernoulli(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    p, q = (torch.sigmoid(z / t) for z in (teacher, student))
    return t**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


@pytest.mark.parametrize(("kind", "labels"), [("numbers", 1), ("classes", 3), ("labels", 4), ("labels", 1)])
def test_what_the_outputs_are_decides_the_soft_loss(kind: str, labels: int, tmp_path: Path) -> None:
    """By transformers' own rule, or where a loss is given, by the argument."""
    rows = sentences(4)
    for index, row in enumerate(rows):
        if kind == "numbers":
            row["labels"] = torch.rand(1)
        elif kind == "labels":
            row["labels"] = ((index + torch.arange(labels)) % 2).float()
    student, teacher = classifier(num_labels=labels), expert(num_labels=labels)
    batch = collated([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows])
    one, other = student.eval()(**batch).logits.detach(), teacher.eval()(**batch).logits.detach()
    expected = {
        "numbers": lambda: (one - other).square().mean(),
        "classes": lambda: soft_target(one, other, 2.0),
        "labels": lambda: bernoulli(one, other, 2.0),
    }[kind]()
    own = {}
    if labels == 1 and kind == "labels":

        def entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels)

        own = {"compute_loss_func": entropy}
        with pytest.raises(ValueError, match="Say it by the argument outputs"):
            trained(tmp_path, student, teacher, rows, losses=SoftTargets(2.0, 0.5), **own)
        own["outputs"] = "labels"
    losses = SoftTargets(alpha=0.5) if kind == "numbers" else SoftTargets(2.0, 0.5)
    trainer = trained(tmp_path, student, teacher, rows, losses=losses, max_steps=1, **own)
    assert trainer.state.log_history[0]["soft"] == pytest.approx(expected.item(), rel=1e-3)
    assert trainer.objective.outputs == OutputType(kind)  # type: ignore[arg-type]


def binary_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs.logits.squeeze(-1), labels.float())


class CrossEncoderTrainer(Trainer):
    """As people write one for pairs of texts: its own loss on one logit, the labels still given to the model."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = binary_entropy(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("way", ["compute_loss", "compute_loss_func"])
def test_one_logit_under_another_loss_is_no_regression(way: str, tmp_path: Path) -> None:
    class Mine(DistillationMixin, CrossEncoderTrainer):
        pass

    cls, own = (Mine, {}) if way == "compute_loss" else (DistillationTrainer, {"compute_loss_func": binary_entropy})
    rows = sentences(4)
    for index, row in enumerate(rows):
        row["labels"] = torch.tensor(index % 2)
    student, teacher = classifier(num_labels=1), expert(num_labels=1)
    batch = collated([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows])
    one, other = student.eval()(**batch).logits.detach(), teacher.eval()(**batch).logits.detach()
    trainer = trained(tmp_path, student, teacher, rows, cls, losses=SoftTargets(2.0, 0.5), max_steps=1, **own)
    assert trainer.objective.outputs == OutputType("labels")
    assert trainer.state.log_history[0]["soft"] == pytest.approx(bernoulli(one, other, 2.0).item(), rel=1e-3)
    for row in rows:
        row["labels"] = row["labels"].float()
    with pytest.raises(ValueError, match="Say it by the argument outputs"):
        trained(tmp_path, classifier(num_labels=1), teacher, rows, cls, losses=SoftTargets(2.0, 0.5), **own)
    regressor = expert(num_labels=1, problem_type="regression")
    with pytest.raises(ValueError, match=r"student's outputs are .*labels.* and the teacher's .*numbers"):
        trained(
            tmp_path, classifier(num_labels=1, problem_type="multi_label_classification"), regressor, rows, cls, **own
        )


def test_pixels_have_their_classes_on_axis_1_and_their_own_ignored_label(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 8, 8))
    labels[0, :4] = 255
    large = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    student, teacher = segformer(3, 1), segformer(3, 2)
    one, other = (model(pixel_values=images).logits.movedim(1, -1).detach() for model in (student, teacher))
    expected = soft_target(one, other, 2.0, labels != 255)
    # In evaluation mode for one step, since batch normalisation would give other logits.
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, losses=SoftTargets(2.0, 1.0))
    student.train()
    for part in student.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    loss = trainer.compute_loss(student, {"pixel_values": images, "labels": large})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert trainer.objective.outputs == OutputType("classes", class_dim=1)


def test_pixels_in_two_classes_are_labels(tmp_path: Path) -> None:
    labels = torch.randint(0, 2, (2, 32, 32))
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": each} for each in labels]
    trainer = trained(tmp_path, segformer(1, 1), segformer(1, 2), rows, losses=SoftTargets(2.0, 0.5), max_steps=1)
    assert trainer.objective.outputs == OutputType("labels")
    assert trainer.state.log_history[0]["soft"] > 0


class Headed(nn.Module):
    """Several outputs, none of which is called logits."""

    def __init__(self, model: Any, form: str) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        raw = self.model(input_ids, attention_mask, labels=labels)
        if self.form == "tuple":
            return (raw.loss, raw.logits.detach(), raw.logits)
        return {"loss": raw.loss, "scores": raw.logits}


def test_outputs_of_another_form(tmp_path: Path) -> None:
    losses = SoftTargets(2.0, 0.5)
    plain = trained(tmp_path, classifier(), expert(), sentences(), losses=losses)
    student, teacher = Headed(classifier(), "tuple"), Headed(expert(), "dict")
    options = {"logits": 2, "teacher_logits": "scores", "losses": losses}
    found = trained(tmp_path, student, teacher, sentences(), **options)
    assert largest(weights(plain.model), weights(found.model)) < 1e-6
    with pytest.raises(ValueError, match="logits of the model are 'absent'"):
        trained(tmp_path, student, teacher, sentences(), losses=losses, logits="absent")


def test_a_teacher_of_another_kind_is_refused(tmp_path: Path) -> None:
    teacher = expert(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"student's outputs are .*classes.* and the teacher's .*labels"):
        trained(tmp_path, classifier(), teacher, sentences())
    student = classifier(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"term 'soft' is SoftTarget.*the outputs are labels"):
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher, losses={"soft": Term(SoftTarget(2.0))})
    trained(tmp_path, classifier(), teacher, sentences(4), outputs="classes", max_steps=1)


def test_outputs_by_class_and_configuration() -> None:
    classes = OutputType("classes")
    assert [outputs_for(each) for each in (gpt2(4), bert(BertForMaskedLM, 4))] == [classes, classes]
    assert outputs_for(bert(BertForTokenClassification, 4)) == classes
    assert outputs_for(classifier()) is None
    assert outputs_for(classifier(num_labels=1)) == OutputType("numbers")
    assert outputs_for(classifier(num_labels=1), own_loss=False) is None
    assert outputs_for(classifier(problem_type="multi_label_classification")) == OutputType("labels")
    assert outputs_for(segformer(3, 1)) == OutputType("classes", class_dim=1)
    assert outputs_for(nn.Linear(1, 1)) is None
    assert label_spec(segformer(3, 1)).ignored == 255


def test_text_without_labels_is_enough_for_soft_targets(tmp_path: Path) -> None:
    rows = sentences(label=lambda tokens: tokens.clone())
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    soft = {"soft": Term(SoftTarget(2.0))}
    with_, without = (
        trained(tmp_path, gpt2(4), gpt2(8, seed=2), each, losses=soft, gradient_accumulation_steps=2)
        for each in (rows, bare)
    )
    assert largest(weights(with_.model), weights(without.model)) < 1e-6
    trained(tmp_path, bert(BertForMaskedLM, 4), bert(BertForMaskedLM, 8, seed=2), bare, losses=SoftTargets(alpha=1.0))
    with pytest.raises(ValueError, match="did not return a loss"):
        trained(tmp_path, gpt2(4), gpt2(8, seed=2), bare)


def test_losses_that_need_labels_get_shifted_ones(tmp_path: Path) -> None:
    rows, student, teacher = causal_rows(), gpt2(4), gpt2(8, seed=2)
    losses = {"decoupled": Term(DKD(2.0))}
    trainer = DistillationTrainer(student, arguments(tmp_path), train_dataset=rows, teacher=teacher, losses=losses)
    batch = collated(rows)
    found = trainer.compute_loss(student.train(), batch)
    labels = batch.pop("labels")[:, 1:]
    z, t = student(**batch).logits[:, :-1], teacher.eval()(**batch).logits[:, :-1]
    torch.testing.assert_close(found, DKD(2.0)(z, t, labels != -100, labels))


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    make = functools.partial(DistillationTrainer, train_dataset=sentences(), teacher=expert())
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        make(classifier(), arguments(tmp_path), losses=SoftTargets(alpha=1.5))
    with pytest.raises(ValueError, match="scores 3 classes and the teacher 4"):
        trained(tmp_path, classifier(), expert(num_labels=4), sentences())
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="scheduler was made for an optimizer without the projectors"):
        make(model, arguments(tmp_path), losses=HINTS, optimizers=(optimizer, scheduler)).train()
    alone = make(model, arguments(tmp_path), losses=HINTS, optimizers=(optimizer, None))
    alone.train()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(weights(model)) + 4
    rows = [
        {name: value for name, value in row.items() if name != "labels"}
        | {"start_positions": torch.tensor(0), "end_positions": torch.tensor(1)}
        for row in sentences()
    ]
    answers = bert(BertForQuestionAnswering, 4, num_labels=2)
    with pytest.raises(ValueError, match="the model returned QuestionAnsweringModelOutput without logits"):
        trained(tmp_path, answers, expert(), rows)


def test_where_no_projectors_go_losses_without_them_are_named(tmp_path: Path) -> None:
    trainer: Any = DistillationTrainer(
        classifier(), arguments(tmp_path), train_dataset=sentences(), teacher=expert(), losses=HINTS
    )
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"^projectors, which .* do not go with FSDP or DeepSpeed") as refused:
        trainer.create_optimizer()
    needing, remedy = str(refused.value).split(" do not go with ")
    kinds = [kind for kind in FeatureLoss.__subclasses__() if kind.__module__.startswith("distill.")]
    assert {kind.__name__ in remedy for kind in kinds if not kind.projects} == {True}
    assert {(kind.__name__ in needing, kind.__name__ in remedy) for kind in kinds if kind.projects} == {(True, False)}


def test_a_new_model_gets_new_projectors(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        None,
        arguments(tmp_path),
        train_dataset=sentences(),
        teacher=expert(),
        losses=HINTS,
        model_init=lambda trial=None: classifier(),
    )
    trainer.train()
    once = weights(trainer.model) + weights(trainer.objective)
    trainer.train()
    assert largest(once, weights(trainer.model) + weights(trainer.objective)) == 0


@pytest.mark.parametrize(
    ("make", "causal", "tokens"),
    [
        (lambda: gpt2(4), True, True),
        (lambda: bert(BertForMaskedLM, 4), False, True),
        (lambda: bert(BertForTokenClassification, 4), False, True),
        (classifier, False, False),
        (lambda: t5(8), False, False),
        (lambda: vit(4), False, False),
    ],
)
def test_how_models_read_their_labels(make: Callable[[], PreTrainedModel], causal: bool, tokens: bool) -> None:
    known = label_spec(make())
    assert (known.causal, known.tokens) == (causal, tokens)


def test_positions() -> None:
    causal = label_spec(gpt2(4))
    labels = torch.tensor([[-100, 3, 4], [5, -100, 6]])
    found = scored_positions({"input_ids": labels, "labels": labels}, causal)
    assert found.valid.tolist() == [[True, True], [False, True]]
    ready: Mapping[str, Any] = {"labels": labels, "shift_labels": torch.tensor([[3, 4, -100]])}
    assert scored_positions(ready, causal).valid.tolist() == [[True, True, False]]
    assert not scored_positions(ready, causal).cut
    with pytest.raises(ValueError, match=r"\[2, 2\] positions and the scored logits \[2, 9, 5\]"):
        found.shaped(torch.zeros(2, 9, 5), OutputType("classes"))


def test_small_integers_are_no_ignored_labels() -> None:
    spec = label_spec(bert(BertForTokenClassification, 4))
    labels = torch.tensor([[156, 1, 2]], dtype=torch.uint8)  # 156 is -100 in eight bits
    assert scored_positions({"labels": labels}, spec).valid.all()
    images = torch.tensor([[[-1, 1]]], dtype=torch.int8)  # and -1 is 255, which Segformer ignores
    positions, outputs = scored_positions({"labels": images}, label_spec(segformer(3, 1))), OutputType("classes", 1)
    assert positions.valid.all()
    assert positions.shaped(torch.zeros(1, 1, 2, 3), outputs, images, 255)[0].all()


def test_embeddings_of_tokens_are_to_be_pooled() -> None:
    positions = scored_positions({"input_ids": torch.ones(2, 6).long()}, label_spec(classifier()))
    with pytest.raises(ValueError, match=r"embeddings \[2, 6, 4\], and one of each sample is compared, \[B, D\]: pool"):
        positions.shaped(torch.zeros(2, 6, 4), OutputType("embedding"))
    assert positions.shaped(torch.zeros(2, 4), OutputType("embedding"))[0].all()


def test_a_bare_loop() -> None:
    """No trainer at all: the functions, a frozen teacher, an optimizer."""
    from distill import Teacher, losses

    student, teacher, alpha = gpt2(4).train(), Teacher(gpt2(8, seed=2)), 0.7
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    loader = DataLoader(causal_rows(), 4)  # type: ignore[arg-type]
    values = []
    for _ in range(2):
        for batch in loader:
            output = student(**batch)
            labels = batch.pop("labels")[:, 1:]
            taught = teacher(**batch).logits[:, :-1]
            soft = losses.soft_target(output.logits[:, :-1], taught, temperature=2.0, valid=labels != -100)
            loss = losses.mix(soft, output.loss, alpha)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    assert sum(values[4:]) < sum(values[:4])
