"""Small transformers trainings that know nothing of pruning."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from prune import Masks, Pruner
from prune.schedule import cubic, kept

VOCABULARY = 19
ARGUMENTS = {
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
}
SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.01, "learning_rate": 0.05}
ADAMW = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01}


def bert(kind: Any = BertForSequenceClassification, dropout: float = 0.0, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
        **{"hidden_size": 4, "num_hidden_layers": 1, "num_labels": 3, **options},
    )
    return kind(config)


TOTAL = sum(mask.numel() for mask in Pruner()(bert(), 0.5).values())


def sentences(count: int = 32, label: Callable[[Tensor, int], Tensor] = lambda _, i: torch.tensor(i % 3)) -> list[Any]:
    torch.manual_seed(0)
    rows = [torch.randint(1, VOCABULARY, (6,)) for _ in range(count)]
    ones = torch.ones(6, dtype=torch.int64)
    return [{"input_ids": r, "attention_mask": ones, "labels": label(r, i)} for i, r in enumerate(rows)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(**{"output_dir": str(folder), **ARGUMENTS, **ADAMW, **options})


def trained(
    folder: Path, *callbacks: TrainerCallback, model: Any = None, rows: Any = None, resume: Any = None, **options: Any
) -> Trainer:
    """The Trainer after 16 updates, 8 an epoch, unless ``options`` say otherwise."""
    model, rows = bert() if model is None else model, sentences() if rows is None else rows
    own = {name: options.pop(name) for name in ("compute_loss_func", "eval_dataset") if name in options}
    trainer = Trainer(model, arguments(folder, **options), train_dataset=rows, callbacks=list(callbacks), **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def masks(density: float = 0.3) -> Masks:
    return Pruner()(bert(), density)


def alive(model: nn.Module) -> int:
    return sum(int(model.get_parameter(name).count_nonzero()) for name in masks())


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Watch(TrainerCallback):
    """Weights alive after every update."""

    def __init__(self) -> None:
        self.alive: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.alive.append(alive(kwargs["model"]))


def scheduled(times: list[float], begin: float, end: float, density: float) -> list[int]:
    """Weights kept at each time that something is pruned at, by the formula."""
    return [kept(TOTAL, cubic(min(max((t - begin) / (end - begin), 0), 1), density)) for t in times]


def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """Over all samples of the update; the model's own loss is a mean over those of a micro-batch."""
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
