"""What keeping weights masked costs: a full training step over that of the dense network, memory, and the state dict.

    python benchmarks/masking.py [--rounds 12] [--steps 2]

An MLP of 12.6M parameters, AdamW, batch 128, one thread, 80% of the weights pruned alike in every arm:

* ours: ``Masks.keep``, alone and with ``Masks.mask_gradients`` before every step (what gradient clipping needs);
* ``torch.nn.utils.prune.custom_from_mask``: forward pre-hooks;
* Lightning's ``ModelPruning``: the network as one epoch of ``fit`` with ``make_pruning_permanent=False`` leaves it,
  its hooks on, then stepped like the others, so that no trainer is timed.

Arms take turns, in another order every round, and a ratio is of two arms of one round. Memory is the peak of a process
of its own, less what importing takes.
"""

import argparse
import itertools
import json
import logging
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from prune import Masks, Pruner

WIDTHS, BATCH, DENSITY = (1024, 2048, 2048, 2048, 1024), 128, 0.2
Step = Callable[[], None]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, WIDTHS[0]), torch.randint(WIDTHS[-1], (BATCH,))


def chosen(model: nn.Module) -> Masks:
    return Pruner(allocation="uniform")(model, DENSITY)


def stepping(model: nn.Module, before_step: Step = lambda: None, keep: Masks | None = None) -> Step:
    optimizer = torch.optim.AdamW(model.parameters())
    if keep is not None:
        keep.keep(optimizer, model)
    x, y = batch()

    def step() -> None:
        nn.functional.cross_entropy(model(x), y).backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dense() -> tuple[nn.Module, Step]:
    model = network()
    return model, stepping(model)


def kept() -> tuple[nn.Module, Step]:
    model = network()
    masks = chosen(model)
    masks.apply(model)
    return model, stepping(model, keep=masks)


def kept_and_clipped() -> tuple[nn.Module, Step]:
    model = network()
    masks = chosen(model)
    masks.apply(model)
    return model, stepping(model, lambda: masks.mask_gradients(model), masks)


def reparametrized() -> tuple[nn.Module, Step]:
    model = network()
    for name, mask in chosen(model).items():
        path, _, parameter = name.rpartition(".")
        torch_prune.custom_from_mask(model.get_submodule(path), parameter, mask)
    return model, stepping(model)


class Module(lp.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def lightning() -> tuple[nn.Module, Step]:
    model = network()
    pruning = ModelPruning(
        "l1_unstructured",
        [(layer, "weight") for layer in model if isinstance(layer, nn.Linear)],
        amount=1 - DENSITY,
        make_pruning_permanent=False,
        use_lottery_ticket_hypothesis=False,
    )
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 1, **quiet}
    trainer = lp.Trainer(**options, callbacks=[pruning])
    trainer.fit(Module(model), DataLoader(TensorDataset(*batch()), BATCH))
    return model, stepping(model)


ARMS = {
    "dense": dense,
    "prune: Masks.keep": kept,
    "prune: and gradients masked": kept_and_clipped,
    "torch.nn.utils.prune": reparametrized,
    "Lightning ModelPruning": lightning,
}


def times(rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Arm -> for every round, the wall and processor seconds of a step."""
    runs = {name: make()[1] for name, make in ARMS.items()}
    for run in runs.values():
        run()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                runs[name]()
            found[name].append(((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
    return found


def memory(arm: str) -> dict[str, Any]:
    """Peak memory of a few steps, and what the state dict holds. For a process of its own."""
    started = peak()
    model, step = ARMS[arm]()
    for _ in range(3):
        step()
    state = model.state_dict()
    held = sum(value.numel() * value.element_size() for value in state.values())
    return {"peak": peak() - started, "bytes": held, "keys": len(state), "extra": len(state.keys() - reference())}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reference() -> set[str]:
    with torch.device("meta"):
        return set(network().state_dict())


def in_a_process(arm: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory", arm]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:5.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--memory", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.memory:
        print(json.dumps(memory(arguments.memory)))
        return
    with torch.device("meta"):
        total = sum(p.numel() for p in network().parameters()) / 1e6
    print(f"torch {torch.__version__}, MLP {WIDTHS}: {total:.1f}M parameters; AdamW, batch {BATCH}, density {DENSITY}")
    held = {name: in_a_process(name) for name in ARMS}
    found = times(arguments.rounds, arguments.steps)
    print(f"ratios over dense: median (quartiles) of {arguments.rounds} rounds of {arguments.steps} steps")
    titles = ("wall, s", "wall, ratio", "processor, ratio", "peak, MB", "ratio", "state dict, MB", "keys", "new keys")
    widths = (8, 18, 18, 9, 6, 15, 5, 9)
    print(" " * 28, *(f"{title:>{width}}" for title, width in zip(titles, widths)))
    for name in ARMS:
        wall, cpu = ([mine[i] / other[i] for mine, other in zip(found[name], found["dense"])] for i in (0, 1))
        size = held[name]
        cells = (
            f"{statistics.median(each[0] for each in found[name]):.3f}",
            spread(wall),
            spread(cpu),
            f"{size['peak'] / 1e6:.0f}",
            f"{size['peak'] / held['dense']['peak']:.2f}",
            f"{size['bytes'] / 1e6:.1f}",
            size["keys"],
            size["extra"],
        )
        print(f"{name:28}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths)))


if __name__ == "__main__":
    main()
