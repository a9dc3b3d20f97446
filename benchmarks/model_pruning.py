"""What Lightning's ``ModelPruning`` and this package's callbacks do in the same trainings, case by case.

    OMP_NUM_THREADS=1 python benchmarks/model_pruning.py

A network of 30 x 64 x 64 x 5 is pruned to half of its weights, once, after the first epoch; or, for a lottery ticket,
three times by a fifth, each time going back to its first weights. "density" is the share of weights that are not zero.
"""

import copy
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from prune import GradualPruning
from prune.callbacks.lottery import LotteryTicket
from prune.levels import Levels
from tests.helpers.ranks import on_ranks

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Module(lp.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        sizes = (30, 64, 64, 5)
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.GELU())]
        self.network = nn.Sequential(*layers[:-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def layers(module: Any) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def density(module: Any) -> float:
    """Of what a forward pass would use."""
    masked = [getattr(layer, "weight_mask", None) for layer in layers(module)]
    raw = [getattr(layer, "weight_orig", layer.weight) for layer in layers(module)]
    used = [weight if mask is None else weight * mask for weight, mask in zip(raw, masked, strict=True)]
    return sum(int(weight.count_nonzero()) for weight in used) / sum(weight.numel() for weight in used)


def theirs(module: Any, **options: Any) -> Any:
    return ModelPruning(
        "l1_unstructured",
        [(layer, "weight") for layer in layers(module)],
        amount=lambda epoch: 0.0 if epoch else 0.5,  # type: ignore[arg-type]
        **{"use_lottery_ticket_hypothesis": False, **options},
    )


def ours(module: Any) -> Any:
    return GradualPruning(0.5, "1ep", "2ep", "1ep", initial=0.5)


def fit(module: Any, *callbacks: Any, epochs: int = 3, path: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 30), torch.randint(5, (64,)))
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = lp.Trainer(**QUIET, max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=keeps, **options)
    trainer.fit(module, DataLoader(data, 8), ckpt_path=path)
    return trainer


class At(lp.Callback):
    """Calls a function at the end of every epoch, after the callbacks listed before it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.found = function, []  # type: ignore[var-annotated]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.found.append(self.function(pl_module))


class Begun(lp.Callback):
    """Calls a function before the first batch of every epoch."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.found = function, []  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not batch_idx:
            self.found.append(self.function(pl_module))


def keys(make: Callable[[Any], Any]) -> str:
    module, plain = Module(), set(Module().state_dict())
    look = At(lambda m: len(set(m.state_dict()) ^ plain))
    fit(module, make(module), look)
    return f"{max(look.found)} keys gone or new"


def resumed(make: Callable[[Any], Any]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        module = Module()
        fit(module, make(module), ModelCheckpoint(folder, "{epoch}", save_top_k=-1), epochs=2)
        held = torch.load(Path(folder) / "epoch=1.ckpt", weights_only=False)["state_dict"]
        before = Module()
        before.load_state_dict(held)
        again = Module()
        fit(again, make(again), epochs=4, path=Path(folder) / "epoch=1.ckpt")
        return f"density {density(before):.2f} saved, {density(again):.2f} two epochs later"


def copied(make: Callable[[Any], Any]) -> str:
    module = Module()
    look = At(lambda m: density(copy.deepcopy(m)))
    fit(module, make(module), look)
    return f"the copy has density {look.found[-1]:.2f}"


def averaged(make: Callable[[Any], Any]) -> str:
    module, average = Module(), EMAWeightAveraging(decay=0.9)
    fit(module, make(module), average)
    return f"the average has density {density(module):.2f}"


def second(make: Callable[[Any], Any]) -> str:
    module = Module()
    callback = make(module)
    fit(module, callback)
    first = density(module)
    if isinstance(callback, ModelPruning):  # to prune once means not to prune again
        callback.amount = 0.0
    fit(module, callback)
    return f"density {first:.2f} after the first, {density(module):.2f} after the second"


def _rank(make: Callable[[Any], Any]) -> tuple[float, str]:
    module = Module()
    fit(module, make(module), devices=2, strategy="ddp")
    return density(module), str([p.tolist() for p in module.parameters()])


def ranks(make: Callable[[Any], Any]) -> str:
    one, other = on_ranks(_rank, make)
    return f"density {one[0]:.2f}, {'equal' if one == other else 'different'} weights on both ranks"


def drift(module: Any, first: list[Tensor]) -> float:
    """How far the live weights are from the first ones."""
    worst = 0.0
    for layer, value in zip(layers(module), first, strict=True):
        raw = getattr(layer, "weight_orig", layer.weight).detach()
        mask = getattr(layer, "weight_mask", raw != 0)
        worst = max(worst, float(((raw - value) * mask).abs().max()))
    return worst


def their_resets() -> str:
    module = Module()
    first = [layer.weight.detach().clone() for layer in layers(module)]
    look = At(lambda m: drift(m, first))
    pruning = ModelPruning("l1_unstructured", [(layer, "weight") for layer in layers(module)], amount=0.2)
    fit(module, pruning, look)
    return "off theta_0 by " + ", ".join(f"{value:.3f}" for value in look.found)


def our_resets() -> str:
    module = Module()
    first = [layer.weight.detach().clone() for layer in layers(module)]
    look = Begun(lambda m: drift(m, first))
    fit(module, LotteryTicket(Levels(3, rate=0.2), rewind="0it"), look, epochs=1)
    return "off theta_0 by " + ", ".join(f"{value:.3f}" for value in look.found[1:])


CASES: dict[str, Callable[[Callable[[Any], Any]], str]] = {
    "state dict while it trains": keys,
    "resumed from a checkpoint": resumed,
    "deepcopy while it trains": copied,
    "EMAWeightAveraging": averaged,
    "a second fit": second,
    "two ranks, DDP": ranks,
}


def said(case: Callable[[], str]) -> str:
    try:
        return case()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(f"lightning {lp.__version__}, torch {torch.__version__}")
    rows = [(name, said(lambda: case(theirs)), said(lambda: case(ours))) for name, case in CASES.items()]  # noqa: B023
    rows.append(("three resets to the first weights", said(their_resets), said(our_resets)))
    for row in [("case", "ModelPruning", "ours"), ("---", "---", "---"), *rows]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
