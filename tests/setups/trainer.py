"""Set-ups of the transformers Trainer, of features in half precision, and of compiled modules."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DistilBertConfig,
    DistilBertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
)

from distill import DistillationTrainer, DistillModule
from distill.losses import Hint
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


SETUPS = [
    Setup("teacher features in a wider dtype", "7e4 beside an fp16 student", large_features_beside_fp16),
    Setup("teacher features in a wider dtype", "1.003 beside a bf16 student", fine_features_beside_bf16),
    Setup("labels all ignored", "a micro-batch of a trainer", micro_batch_without_labels),
    Setup("labels all ignored", "chunked with alpha 1", chunked_without_a_hard_weight),
]
