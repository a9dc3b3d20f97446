"""Set-ups of the transformers Trainer, of features in half precision, and of compiled modules."""

import copy
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
)

from distill import DistillationCallback, DistillationTrainer, DistillModule
from distill.losses import AttentionRelation, Hint, attention_relation, soft_target
from distill.objective import Objective, Outputs, SoftTargets, Term
from tests.setups.base import Setup
from workbench.tasks import LanguageModelling


@contextmanager
def arguments(**options: Any) -> Iterator[TrainingArguments]:
    with tempfile.TemporaryDirectory() as folder:
        yield TrainingArguments(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            lr_scheduler_type="constant",
            optim="sgd",
            train_sampling_strategy="sequential",
            **{"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.1, **options},
        )


def gpt2(width: int, vocabulary: int = 23, **options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(width)
    sizes = {"n_positions": 12, "n_layer": 1, "n_head": 2, "vocab_size": vocabulary, "initializer_range": 0.5}
    silent = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=width, **{**sizes, **silent, **ends, **options}))


def hinted(student: Tensor, teacher: Tensor) -> float:
    objective = Objective({"hint": Term(Hint(), student="body")})
    one, other = Outputs(student, {"body": student}), Outputs(None, {"body": teacher})
    objective.prepare(one.features, other.features)
    return float(objective(one, other, {"hint": 1.0}, task_loss=lambda logits: logits.sum())["loss"])


def large_features_beside_fp16() -> None:
    student = torch.zeros(2, 3, dtype=torch.float16)
    assert math.isclose(hinted(student, torch.full((2, 3), 7e4)), 7e4**2, rel_tol=1e-6)


def fine_features_beside_bf16() -> None:
    student = torch.ones(2, 3, dtype=torch.bfloat16)
    assert math.isclose(hinted(student, torch.full((2, 3), 1.003)), 0.003**2, rel_tol=1e-3)


def micro_batch_without_labels() -> None:
    """Token labels; the second micro-batch of each update is all padding to the annotators."""
    config = DistilBertConfig(vocab_size=23, dim=8, hidden_dim=8, n_layers=1, n_heads=2, max_position_embeddings=8)
    config.num_labels, config.dropout, config.attention_dropout = 3, 0.0, 0.0
    torch.manual_seed(0)
    student, teacher = DistilBertForTokenClassification(config), DistilBertForTokenClassification(config)
    tokens = torch.randint(1, 23, (4, 5))
    labels = torch.randint(0, 3, (4, 5))
    labels[2:] = -100
    rows = [{"input_ids": tokens[i], "attention_mask": torch.ones(5).long(), "labels": labels[i]} for i in range(4)]
    with torch.no_grad():
        expected = float(F.cross_entropy(student.eval()(tokens[:2]).logits.flatten(0, 1), labels[:2].flatten()))
    with arguments(gradient_accumulation_steps=2) as args:
        trainer = DistillationTrainer(student, args, train_dataset=rows, teacher=teacher, losses=SoftTargets(2.0, 0.5))
        trainer.train()
    logged = trainer.state.log_history[0]
    assert math.isclose(logged["hard"], expected, rel_tol=1e-4)
    assert math.isclose(logged["loss"], 0.5 * logged["soft"] + 0.5 * logged["hard"], rel_tol=1e-3)
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def chunked_without_a_hard_weight() -> None:
    batch = {"input_ids": torch.randint(0, 23, (2, 6))}
    student, task = gpt2(8), LanguageModelling(23)
    module = DistillModule(student, gpt2(16), task, SoftTargets(1.0, alpha=1.0), chunked=True)
    with torch.no_grad():
        plain = F.cross_entropy(student(**batch).logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    logged = module.step(batch).logged
    assert math.isclose(float(logged["hard"]), float(plain), rel_tol=1e-5)
    assert logged["loss"].item() == logged["soft"].item()


def bert_teacher_of_distilbert() -> None:
    """Pairs of sentences: the teacher was trained with segments, which DistilBERT does not have."""
    sizes = {"vocab_size": 23, "max_position_embeddings": 8, "num_labels": 3}
    torch.manual_seed(0)
    student = DistilBertForSequenceClassification(
        DistilBertConfig(
            dim=8,
            hidden_dim=8,
            n_layers=1,
            n_heads=2,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            **sizes,
        )
    )
    teacher = BertForSequenceClassification(
        BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            initializer_range=1.0,
            **sizes,
        )
    ).eval()
    columns = {
        "input_ids": torch.randint(1, 23, (4, 6)),
        "attention_mask": torch.ones(4, 6, dtype=torch.int64),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 4),
        "labels": torch.tensor([0, 1, 2, 0]),
        "idx": torch.arange(4),
    }
    rows = [{name: column[i] for name, column in columns.items()} for i in range(4)]
    table = Dataset.from_dict({name: column.tolist() for name, column in columns.items()}).with_format("torch")
    inputs = {name: columns[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own = student.eval()(**inputs, labels=columns["labels"])
        asked = teacher(**inputs, token_type_ids=columns["token_type_ids"]).logits
        assert (asked - teacher(**inputs).logits).abs().max() > 0.5
    for data in (rows, table):
        with arguments(per_device_train_batch_size=4, learning_rate=0.0) as args:
            trainer = DistillationTrainer(student, args, train_dataset=data, eval_dataset=data, teacher=teacher)
            trainer.train()
            assert math.isclose(trainer.state.log_history[0]["soft"], soft_target(own.logits, asked), rel_tol=1e-4)
            assert math.isclose(trainer.evaluate()["eval_loss"], own.loss, rel_tol=1e-4)
            unlabelled = [{name: row[name] for name in row if name != "labels"} for row in rows]
            assert abs(trainer.predict(unlabelled).predictions - own.logits.numpy()).max() < 1e-5


def tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    words = {token: number for number, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), pad_token="[PAD]")


WORDS = ("[PAD]", "[UNK]", *(f"word{i}" for i in range(17)))


def heads_padded_to_unlike_sizes() -> None:
    """19 tokens; the student's head has 20 rows and the teacher's 24."""
    student, teacher = gpt2(8, 20), gpt2(16, 24)
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(2, 19, (2, 6))]
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
    with torch.no_grad():
        one, other = (model.eval()(**batch).logits[:, :-1, :19] for model in (student, teacher))
    with tempfile.TemporaryDirectory() as folder, arguments() as args:
        teacher.save_pretrained(folder)
        tokenizer(*WORDS).save_pretrained(folder)
        own = {"processing_class": tokenizer(*WORDS)}
        for source, given in (
            (folder, own),
            (teacher, {**own, "teacher_tokenizer": tokenizer(*WORDS)}),
            (teacher, {"vocabulary": 19}),
        ):
            # A collator of tensors, so that nothing but the comparison needs a tokenizer.
            trainer = DistillationTrainer(
                copy.deepcopy(student),
                args,
                train_dataset=rows,
                teacher=source,
                data_collator=default_data_collator,
                losses=SoftTargets(2.0, 0.5),
                **given,
            )
            trainer.train()
            assert math.isclose(trainer.state.log_history[0]["soft"], soft_target(one, other, 2.0), rel_tol=1e-4)
        with pytest.raises(ValueError, match="the student's 20, the teacher's 24, and nothing"):
            DistillationTrainer(student, args, train_dataset=rows, teacher=teacher)


def unlike_tokenizers() -> None:
    student, teacher = gpt2(8, 20), gpt2(16, 20)
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(2, 19, (2, 6))]
    swapped = [*WORDS[:5], WORDS[6], WORDS[5], *WORDS[7:]]
    with tempfile.TemporaryDirectory() as folder, arguments() as args:
        teacher.save_pretrained(folder)
        tokenizer(*swapped).save_pretrained(folder)
        with pytest.raises(ValueError, match="the first 5: 'word3' to the student and 'word4' to the teacher"):
            DistillationTrainer(student, args, train_dataset=rows, teacher=folder, processing_class=tokenizer(*WORDS))


def encoder(width: int, **options: Any) -> BertForSequenceClassification:
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.5}
    return BertForSequenceClassification(
        BertConfig(vocab_size=23, max_position_embeddings=8, **{**sizes, **silent, **options})
    )


def distilled(student: Any, teacher: Any, labels: Tensor, losses: Any, **options: Any) -> tuple[float, Tensor, Tensor]:
    """The soft loss that a Trainer logs at its first step, and the logits of both before it."""
    tokens = torch.randint(1, 23, (4, 6))
    rows = [{"input_ids": tokens[i], "labels": labels[i]} for i in range(4)]
    with torch.no_grad():
        one, other = (model.eval()(input_ids=tokens).logits for model in (student, teacher))
    with arguments(per_device_train_batch_size=4) as args:
        trainer = DistillationTrainer(student, args, train_dataset=rows, teacher=teacher, losses=losses, **options)
        trainer.train()
    return trainer.state.log_history[0]["soft"], one, other


def binary_divergence(student: Tensor, teacher: Tensor, t: float) -> float:
    p, q = (torch.sigmoid(z / t) for z in (teacher, student))
    return float(t**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())


def one_label_is_a_number() -> None:
    """Similarity of sentences, as transformers trains num_labels=1: by the squared error."""
    student, teacher = encoder(4, num_labels=1), encoder(8, num_labels=1)
    soft, one, other = distilled(student, teacher, torch.rand(4), SoftTargets(alpha=0.9))
    assert math.isclose(soft, float((one - other).square().mean()), rel_tol=1e-3)
    assert soft > 1e-3


def a_cross_encoder_under_bce() -> None:
    """Relevant or not: one logit, with the loss that cross-encoders are trained with."""

    def entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs.logits.squeeze(-1), labels)

    student, teacher, labels = encoder(4, num_labels=1), encoder(8, num_labels=1), torch.tensor([0.0, 1.0, 1.0, 0.0])
    own = {"compute_loss_func": entropy}
    with pytest.raises(ValueError, match="Say it by the argument outputs"):
        distilled(student, teacher, labels, SoftTargets(2.0), **own)
    soft, one, other = distilled(student, teacher, labels, SoftTargets(2.0), outputs="labels", **own)
    assert math.isclose(soft, binary_divergence(one, other, 2.0), rel_tol=1e-3)
    assert soft > 1e-3


def several_topics_at_once() -> None:
    kind = {"num_labels": 5, "problem_type": "multi_label_classification"}
    labels = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).float()
    student, teacher = encoder(4, **kind), encoder(8, **kind)
    soft, one, other = distilled(student, teacher, labels, SoftTargets(4.0))
    assert math.isclose(soft, binary_divergence(one, other, 4.0), rel_tol=1e-3)
    # A softmax would not notice that every label of the teacher is more likely by far.
    with torch.no_grad():
        teacher.classifier.bias += 5
    more, one, other = distilled(student, teacher, labels, SoftTargets(4.0))
    assert math.isclose(more, binary_divergence(one, other, 4.0), rel_tol=1e-3)
    assert more > soft + 1


def relations_of_gpt2() -> None:
    """The queries in c_attn, beside all of it, which is none of queries, keys and values."""
    student, teacher, tokens = gpt2(8), gpt2(16), torch.randint(1, 23, (2, 6))
    rows = [{"input_ids": each, "labels": each} for each in tokens]
    with torch.no_grad():
        queries = [
            model.transformer.h[0].attn.c_attn(model.transformer.h[0].ln_1(model.transformer.wte(tokens) + at))
            for model in (student, teacher)
            for at in [model.transformer.wpe.weight[:6]]
        ]
    one, other = (each[..., : each.shape[-1] // 3] for each in queries)
    name = "transformer.h.0.attn.c_attn"
    with arguments(max_steps=1) as args:
        losses = {"queries": Term(AttentionRelation(2), student=f"{name}:query")}
        trainer = DistillationTrainer(student, args, train_dataset=rows, teacher=teacher, losses=losses)
        trainer.train()
    assert math.isclose(trainer.state.log_history[0]["queries"], attention_relation(one, other, heads=2), rel_tol=1e-3)
    with pytest.raises(ValueError, match=r"name it, 'transformer.*c_attn:query'"):
        Term(AttentionRelation(2), student=name)


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def compiled_fitted_and_distilled() -> None:
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(8, 5), torch.randint(0, 3, (8,))), 4)
    start, teacher = Net(), nn.Linear(5, 3)

    def fit(module: Any, *callbacks: Any) -> Any:
        silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(max_epochs=2, enable_model_summary=False, callbacks=list(callbacks), **silent)
        trainer.fit(module, data)
        return trainer.callback_metrics

    def distilled(module: Any) -> float:
        fit(module)
        return fit(module, DistillationCallback(teacher, SoftTargets(2.0, 0.5)))["train/soft"].item()

    plain, inside = copy.deepcopy(start), copy.deepcopy(start)
    expected = distilled(plain)
    assert math.isclose(distilled(torch.compile(inside, backend="eager")), expected, rel_tol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), inside.parameters()))
    in_place = copy.deepcopy(start)
    in_place.compile(backend="eager")
    assert math.isclose(distilled(in_place), expected, rel_tol=1e-5)


SETUPS = [
    Setup("fused attention", "attention relations of GPT-2", relations_of_gpt2),
    Setup("one logit", "transformers with num_labels=1", one_label_is_a_number),
    Setup("one logit", "the trainer on a binary model", a_cross_encoder_under_bce),
    Setup("independent labels", "multi_label_classification in a trainer", several_topics_at_once),
    Setup("a compiled module", "fitted once, then distilled", compiled_fitted_and_distilled),
    Setup("teacher features in a wider dtype", "7e4 beside an fp16 student", large_features_beside_fp16),
    Setup("teacher features in a wider dtype", "1.003 beside a bf16 student", fine_features_beside_bf16),
    Setup("columns", "a BERT teacher of a DistilBERT student", bert_teacher_of_distilbert),
    Setup("vocabularies", "padded to unlike sizes", heads_padded_to_unlike_sizes),
    Setup("vocabularies", "unlike tokenizers", unlike_tokenizers),
    Setup("labels all ignored", "a micro-batch of a trainer", micro_batch_without_labels),
    Setup("labels all ignored", "chunked with alpha 1", chunked_without_a_hard_weight),
]
