"""The same padded batch in 1, 2 and 4 micro-batches and on 1 and 2 ranks: largest difference of the gradient.

A GPT-2 student of a GPT-2 teacher, soft and hard loss; sequences of many lengths, so that micro-batches and ranks hold
different numbers of tokens that count. Beside it what a mean of means would give.

    python benchmarks/accumulation.py
"""

import functools
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from distill import DistillModule, SoftTargets
from tests.helpers.ranks import on_ranks
from tests.helpers.trainers import QUIET
from workbench.tasks import LanguageModelling

ROWS, LENGTH, VOCABULARY = 16, 24, 101
SIZES = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPTIONS: dict[str, Any] = {**QUIET, "use_distributed_sampler": False, "max_epochs": 1}


def rows() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    made = []
    for i in range(ROWS):
        mask = (torch.arange(LENGTH) < 3 + (i * 7) % (LENGTH - 3)).long()
        made.append({"input_ids": torch.randint(VOCABULARY, (LENGTH,)), "attention_mask": mask})
    return made


def model(width: int) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=2, n_head=2, **SIZES))


def gradient(pieces: int, ranks: int = 1, naive: bool = False) -> list[float]:
    """What one update of SGD at rate 1 takes from the weights."""
    torch.manual_seed(1)
    teacher, student = model(48), model(32)
    module = DistillModule(
        student,
        teacher,
        LanguageModelling(VOCABULARY),
        SoftTargets(2.0, 0.5),
        functools.partial(torch.optim.SGD, lr=1.0),
    )
    module.validation_step = None  # type: ignore[assignment, method-assign]
    if naive:
        module._global_mean.scale_loss = lambda loss, count, trainer: loss  # type: ignore[method-assign]
    before = nn.utils.parameters_to_vector(student.parameters()).detach().clone()
    mine = rows()[int(os.environ.get("RANK", "0")) :: ranks] if ranks > 1 else rows()
    options = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    trainer = lp.Trainer(**OPTIONS, accumulate_grad_batches=pieces, **options)
    trainer.fit(module, DataLoader(mine, len(mine) // pieces))  # type: ignore[arg-type]
    return (before - nn.utils.parameters_to_vector(student.parameters()).detach()).tolist()


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    whole = torch.tensor(gradient(1))
    print(
        f"gradient of {len(whole):,} weights, largest entry {whole.abs().max():.3g}; largest difference to one batch:"
    )
    print(f"{'ranks':>5} {'micro-batches':>13} {'global mean':>12} {'mean of means':>14}")
    for ranks in (1, 2):
        for pieces in (1, 2, 4):
            found = []
            for naive in (False, True):
                every = (
                    on_ranks(gradient, pieces, ranks, naive, ranks=ranks) if ranks > 1 else [gradient(pieces, 1, naive)]
                )
                assert all(each == every[0] for each in every), "ranks differ"
                found.append(float((torch.tensor(every[0]) - whole).abs().max()))
            print(f"{ranks:5} {pieces:13} {found[0]:12.2e} {found[1]:14.2e}")


if __name__ == "__main__":
    main()
