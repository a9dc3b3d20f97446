"""What keeping weights masked costs: a full training step over that of the dense network, memory, and the state dict.

    python benchmarks/masking.py [--rounds 12] [--steps 2]

An MLP of 12.6M parameters, AdamW, batch 128, one thread, 80% of the weights pruned alike in every arm:

* ours: ``Masks.keep``, alone and with ``Masks.mask_gradients`` before every step (what gradient clipping needs);
* ``torch.nn.utils.prune.custom_from_mask``: forward pre-hooks;
* Lightning's ``ModelPruning``: the network as one epoch of ``fit`` with ``make_pruning_permanent=False`` leaves it,
  its hooks on, then stepped like the others, so that no trainer is timed.

AdamW comes as torch makes it by default, and fused, as transformers does. The default one takes square roots by a
routine that is 15 to 20 times slower on exact zeros (``torch.sqrt`` with MKL), and zeros are what gradients of pruned
weights leave in its state: whoever zeroes these gradients, by a hook or not, pays that as well.

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


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Never the same: of a batch learnt by heart gradients are so small that their squares are slow numbers."""
    labels = torch.randint(WIDTHS[-1], (BATCH,), generator=generator)
    return torch.randn(BATCH, WIDTHS[0], generator=generator), labels


def chosen(model: nn.Module) -> Masks:
    return Pruner(allocation="uniform")(model, DENSITY)


def stepping(model: nn.Module, fused: bool, before_step: Step = lambda: None, keep: Masks | None = None) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    if keep is not None:
        keep.keep(optimizer, model)
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        x, y = batch(generator)
        nn.functional.cross_entropy(model(x), y).backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dense(fused: bool) -> tuple[nn.Module, Step]:
    model = network()
    return model, stepping(model, fused)


def kept(fused: bool) -> tuple[nn.Module, Step]:
    model = network()
    masks = chosen(model)
    masks.apply(model)
    return model, stepping(model, fused, keep=masks)


def kept_and_clipped(fused: bool) -> tuple[nn.Module, Step]:
    model = network()
    masks = chosen(model)
    masks.apply(model)
    return model, stepping(model, fused, lambda: masks.mask_gradients(model), masks)


def reparametrized(fused: bool) -> tuple[nn.Module, Step]:
    model = network()
    for name, mask in chosen(model).items():
        path, _, parameter = name.rpartition(".")
        torch_prune.custom_from_mask(model.get_submodule(path), parameter, mask.float())  # as its own methods have it
    return model, stepping(model, fused)


class Module(lp.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def lightning(fused: bool) -> tuple[nn.Module, Step]:
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
    trainer.fit(Module(model), DataLoader(TensorDataset(*batch(torch.Generator())), BATCH))
    model.zero_grad()
    return model, stepping(model, fused)


ARMS = {
    "dense": dense,
    "prune: Masks.keep": kept,
    "prune: and gradients masked": kept_and_clipped,
    "torch.nn.utils.prune": reparametrized,
    "Lightning ModelPruning": lightning,
}


def times(rounds: int, steps: int, fused: bool) -> dict[str, list[tuple[float, float]]]:
    """Arm -> for every round, the wall and processor seconds of a step."""
    runs = {name: make(fused)[1] for name, make in ARMS.items()}
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
    model, step = ARMS[arm](fused=True)
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
    held = {name: in_a_process(name) for name in ARMS}  # first: a process inherits the peak of the one that starts it
    for fused in (False, True):
        found = times(arguments.rounds, arguments.steps, fused)
        print(f"\nAdamW(fused={fused}), {arguments.rounds} rounds of {arguments.steps} steps: medians (quartiles)")
        print(f"{'':28} {'wall, s':>8} {'over dense':>18} {'processor, s':>13} {'over dense':>18}")
        for name in ARMS:
            wall, cpu = ([mine[i] / other[i] for mine, other in zip(found[name], found["dense"])] for i in (0, 1))
            seconds = [statistics.median(each[i] for each in found[name]) for i in (0, 1)]
            print(f"{name:28} {seconds[0]:8.3f} {spread(wall):>18} {seconds[1]:13.3f} {spread(cpu):>18}")
    print(f"\n{'':28} {'peak, MB':>8} {'over dense':>11} {'state dict, MB':>15} {'keys':>5} {'new keys':>9}")
    for name, size in held.items():
        ratio = size["peak"] / held["dense"]["peak"]
        sizes = f"{size['peak'] / 1e6:8.0f} {ratio:11.2f} {size['bytes'] / 1e6:15.1f}"
        print(f"{name:28} {sizes} {size['keys']:5} {size['extra']:9}")


if __name__ == "__main__":
    main()
