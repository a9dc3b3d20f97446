"""What is left of accuracy at 80, 90, 95 and 98 % sparsity: gradual pruning, RigL, SET, one shot and IMP.

A seed gives all methods the same initial weights, data order and augmentation, so they are compared within seeds.
Dense, gradual, RigL, SET and static train for the same number of updates with the same learning rates; the others cost
what column `updates` says. Accuracy is of the last weights on the test split, which chose nothing.

    gradual  cubic schedule from 10 to 75 % of the updates, largest magnitudes of the whole network
    rigl     a random mask (ERK), from 0 to 75 % of the updates the smallest weights replaced where gradients are large
    set      the same, replaced at random
    static   the same random mask for good: the control of the two above
    oneshot  dense training, one global cut, fine-tuning for a quarter of the updates from the full learning rate
             (validation preferred it to a tenth of it)
    imp      dense training, then cut and rewound to 10 % of the updates (weights, optimizer, learning rate, data order)
             once for every density, in descending order, each within the one before

Every result is a line of the file --out; what is there already is not run again, so a run that was broken off goes on.

    python benchmarks/sparsity.py mnist --data /folder/of/idx/files --seeds 0 1 2 3 4
    python benchmarks/sparsity.py cifar --data /folder/of/parquet/files --pool 2 --seeds 0 1 2
    python benchmarks/sparsity.py report [--published figures.csv]
"""

import argparse
import copy
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).parent.parent))

from prune.masks import Masks
from prune.policies import Dynamic, Fixed, Gradual, Policy
from prune.pruner import Pruner
from prune.rewinding.snapshot import Snapshot
from prune.schedule import kept
from workbench.data import Augment
from workbench.data.idx import IDXImages
from workbench.data.images import LabelledImages
from workbench.data.parquet import ParquetImages
from workbench.duration import Duration
from workbench.evaluation.statistics import Paired, mean, paired
from workbench.models import LeNet300, ResNet
from workbench.training.order import EpochOrder

METHODS = ("gradual", "rigl", "set", "static", "oneshot", "imp")
EXPECTED = (
    ("rigl", "set", "Evci et al. 2020, arXiv:1911.11134: gradients tell better than chance where to grow"),
    ("rigl", "static", "Evci et al. 2020: a mask that moves beats one that does not"),
    ("set", "static", "Mocanu et al. 2018, arXiv:1707.04780: the same"),
    ("gradual", "rigl", "Gale et al. 2019, arXiv:1902.09574 beside RigL's own figures at equal training"),
    ("gradual", "oneshot", "Zhu and Gupta 2017, arXiv:1710.01878: slowly, while training goes on"),
    (
        "imp",
        "oneshot",
        "Renda et al. 2020, arXiv:2003.02389: rewinding, and in many levels, beats fine-tuning after one cut",
    ),
    ("imp", "static", "Frankle and Carbin 2019, arXiv:1803.03635: a ticket beats a random mask"),
    ("imp", "dense", "Frankle and Carbin 2019: as good as dense on MNIST down to a few percent"),
)


@dataclass(frozen=True)
class Setting:
    """What is trained, on what and how; ``name`` says all of it and keeps results of different settings apart."""

    name: str
    network: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    train: LabelledImages
    test: LabelledImages
    batch: int
    epochs: int

    @property
    def per_epoch(self) -> int:
        return len(self.train) // self.batch

    @property
    def updates(self) -> int:
        return self.epochs * self.per_epoch


@dataclass
class Training:
    """A network under training, and how many updates it has had."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    done: int = 0


def mnist(options: argparse.Namespace) -> Setting:
    data = IDXImages(options.data)
    data.setup()
    epochs, batch = options.epochs or 10, options.batch or 128
    name = f"MNIST, LeNet-300-100, Adam 1.2e-3 cosine, batch {batch}, {epochs} epochs"
    return Setting(
        name if options.split == "test" else f"{name}, {options.split} split",
        lambda: LeNet300("relu"),
        lambda model: torch.optim.Adam(model.parameters(), 1.2e-3),
        data.parts["train"],
        data.parts[options.split],
        batch,
        epochs,
    )


def cifar(options: argparse.Namespace) -> Setting:
    data = ParquetImages(options.data, validation=1000)
    data.setup()
    size = data.input_shape[-1] // options.pool
    for part in data.parts.values():
        part.images = F.avg_pool2d(part.images.float(), options.pool).round().to(torch.uint8)
    data.parts["train"].augment, data.parts["train"].views = Augment(padding=size // 8), 0
    epochs, batch = options.epochs or 8, options.batch or 64
    name = (
        f"CIFAR-10 at {size}x{size}, {len(data.parts['train'])} images, ResNet-{options.depth} of width "
        f"{options.width}, SGD {options.lr} cosine, batch {batch}, {epochs} epochs"
    )
    return Setting(
        name if options.split == "test" else f"{name}, {options.split} split",
        lambda: ResNet(options.depth, options.width, activation="relu").to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        lambda model: torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4),
        data.parts["train"],
        data.parts[options.split],
        batch,
        epochs,
    )


def started(setting: Setting, seed: int) -> Training:
    """Before the first update: the same initial weights for every method."""
    torch.manual_seed(seed)
    model = setting.network()
    return ready(setting, model, setting.updates)


def ready(setting: Setting, model: nn.Module, updates: int) -> Training:
    """A fresh optimizer whose learning rate falls to 0 along a cosine."""
    optimizer = setting.optimizer(model)
    return Training(model, optimizer, LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / updates))))


def fit(setting: Setting, training: Training, seed: int, until: int, first_epoch: int = 0) -> None:
    """The plain loop: it knows nothing of masks. Order and augmentation follow from seed and epoch."""
    data = setting.train
    data.seed = seed
    order = EpochOrder(len(data), seed)
    training.model.train()
    while training.done < until:
        epoch, begin = divmod(training.done, setting.per_epoch)
        order.set_epoch(first_epoch + epoch)
        indices = list(order)
        for at in range(begin, min(setting.per_epoch, begin + until - training.done)):
            x, y = data.__getitems__(indices[at * setting.batch : (at + 1) * setting.batch])
            training.optimizer.zero_grad()
            F.cross_entropy(training.model(x), y).backward()
            training.optimizer.step()
            training.schedule.step()
            training.done += 1


@torch.no_grad()
def accuracy(setting: Setting, model: nn.Module) -> float:
    """In percent."""
    model.eval()
    right = 0
    for at in range(0, len(setting.test), 500):
        x, y = setting.test.__getitems__(range(at, min(at + 500, len(setting.test))))
        right += int((model(x).argmax(1) == y).sum())
    return 100 * right / len(setting.test)


def policy(method: str, setting: Setting, density: float, seed: int, model: nn.Module) -> Policy:
    """What hangs on the optimizer while the plain loop runs."""
    begin, end = (Duration(share * setting.updates // 100, "it") for share in (10, 75))
    every = Duration(max(1, setting.updates // 60), "it")
    if method == "gradual":
        return Gradual(density, begin, end, every)
    if method == "static":
        return Fixed(Pruner("random", allocation="erk", seed=seed)(model, density))
    return Dynamic(density, "0it", end, every, "rigl" if method == "rigl" else "set", seed=seed)


Row = dict[str, Any]


def driven(method: str, setting: Setting, density: float, seed: int) -> Row:
    """A method that prunes while training goes on."""
    training = started(setting, seed)
    chosen = policy(method, setting, density, seed, training.model)
    with chosen.follow(training.model, training.optimizer, setting.per_epoch):
        fit(setting, training, seed, setting.updates)
    assert chosen.masks is not None
    return scored(setting, training.model, chosen.masks, density, setting.updates)


def after_dense(setting: Setting, seed: int, wanted: dict[str, list[float]]) -> Iterable[tuple[str, Row]]:
    """The dense network and what begins with it: fine-tuning after one cut, and rewinding again and again."""
    training = started(setting, seed)
    early = setting.updates // 10
    fit(setting, training, seed, early)
    point = Snapshot.take(training.model, training.optimizer, training.schedule)
    fit(setting, training, seed, setting.updates)
    dense = copy.deepcopy(training.model)
    yield "dense", {"density": 1.0, "accuracy": accuracy(setting, dense), "updates": setting.updates}

    tuning = setting.updates // 4
    for density in wanted["oneshot"]:
        masks = Pruner()(dense, density)
        tuned = ready(setting, copy.deepcopy(dense), tuning)
        masks.apply(tuned.model)
        with masks.keep(tuned.optimizer, tuned.model):
            fit(setting, tuned, seed, tuning, setting.epochs)
        yield "oneshot", scored(setting, tuned.model, masks, density, setting.updates + tuning)

    masks, spent = None, setting.updates
    for density in wanted["imp"]:
        masks = Pruner()(training.model, density, masks)
        point.restore(training.model, training.optimizer, training.schedule)
        training.done = early
        masks.apply(training.model)
        masks.clear_state(training.optimizer, training.model)
        with masks.keep(training.optimizer, training.model):
            fit(setting, training, seed, setting.updates)
        spent += setting.updates - early
        yield "imp", scored(setting, training.model, masks, density, spent)


def scored(setting: Setting, model: nn.Module, masks: Masks, density: float, updates: int) -> Row:
    """A result, once it is certain that it is one of this density."""
    counts = masks.counts()
    assert masks.is_applied_to(model)
    assert sum(k for k, _ in counts.values()) == kept(sum(n for _, n in counts.values()), density)
    layers = {name: round(k / n, 4) for name, (k, n) in counts.items()}
    return {"density": density, "accuracy": accuracy(setting, model), "updates": updates, "layers": layers}


def measure(setting: Setting, seeds: list[int], densities: list[float], methods: list[str], out: Path) -> None:
    """Run what is not in ``out`` yet, a line for every result."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for chain in (("oneshot", "imp"), *((method,) for method in METHODS[:4])):
            there = {(row["method"], row["density"]) for row in rows(out, setting.name) if row["seed"] == seed}
            wanted = {m: [d for d in densities if m in methods and (m, d) not in there] for m in chain}
            if chain == ("oneshot", "imp"):
                wanted["imp"] = densities if wanted["imp"] else []
                idle = not any(wanted.values()) and ("dense", 1.0) in there
                results = iter(()) if idle else after_dense(setting, seed, wanted)
            else:
                results = ((m, driven(m, setting, d, seed)) for m in chain for d in wanted[m])
            began = time.process_time()
            for method, row in results:
                if (method, row["density"]) not in there:
                    row = {"setting": setting.name, "method": method, "seed": seed, **row}
                    row["cpu_s"], began = round(time.process_time() - began, 1), time.process_time()
                    with out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)


def rows(out: Path, setting: str | None = None) -> list[Row]:
    found = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    return [row for row in found if setting in (None, row["setting"])]


def report(out: Path, published: Path | None) -> None:
    """The tables of every setting in ``out``."""
    for setting in dict.fromkeys(row["setting"] for row in rows(out)):
        tables(setting, rows(out, setting))
    if published:
        print("\nPublished, for pruning while or after training (other networks and budgets):")
        with published.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["area"] == "prune":
                    print("  {method}, {dataset}, {model}, {setting}: {metric} {value} ({source})".format(**row))


def tables(setting: str, found: list[Row]) -> None:
    """Accuracy, difference to dense, and what the literature leads one to expect."""
    scores: dict[tuple[str, float], dict[int, float]] = {}
    cost: dict[str, set[int]] = {}
    for row in found:
        scores.setdefault((row["method"], row["density"]), {})[row["seed"]] = row["accuracy"]
        cost.setdefault(row["method"], set()).add(row["updates"])
    densities = sorted({density for method, density in scores if method != "dense"}, reverse=True)
    for density in densities:
        scores["dense", density] = scores.get(("dense", 1.0), {})
    updates = next(iter(cost.get("dense", {1})))

    def pair(first: str, second: str, density: float) -> Paired | None:
        a, b = scores.get((first, density), {}), scores.get((second, density), {})
        seeds = sorted(a.keys() & b.keys())
        return paired([a[s] for s in seeds], [b[s] for s in seeds]) if seeds else None

    head = "".join(f"{100 * (1 - density):>22.4g} %" for density in densities)
    print(f"\n{setting}: {updates} updates\naccuracy in %, mean ± half of the 95 % t interval (seeds), by sparsity")
    print(f"{'':10}{'updates':>12}{head}")
    for method in ("dense", *METHODS):
        cells = [said(scores.get((method, density), {})) for density in densities]
        if any(cells):
            spent = " to ".join(f"{u / updates:.3g}" for u in sorted({min(cost[method]), max(cost[method])}))
            print(f"{method:10}{spent + ' x':>12}" + "".join(f"{cell:>24}" for cell in cells))
    print("less dense, points [95 % paired t interval]")
    for method in METHODS:
        print(f"{method:22}" + "".join(f"{difference(pair(method, 'dense', d)):>24}" for d in densities))
    print("what the literature leads one to expect of the first less the second, and what was found")
    for first, second, why in EXPECTED:
        found_here = [pair(first, second, d) for d in densities]
        print(f"{first + ' - ' + second:22}" + "".join(f"{difference(p):>24}" for p in found_here) + f"  {why}")


def said(values: dict[int, float]) -> str:
    if not values:
        return ""
    found = mean(list(values.values()))
    half = "" if found.interval is None else f" ±{found.interval.high - found.mean:.2f}"
    return f"{found.mean:.2f}{half} ({found.n})"


def difference(found: Paired | None) -> str:
    if found is None:
        return ""
    if found.interval is None:
        return f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} [{found.interval.low:+.2f}, {found.interval.high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("mnist", "cifar", "report"))
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--out", type=Path, default=Path("runs/sparsity.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.1, 0.05, 0.02])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--epochs", type=int, help="10 for mnist, 8 for cifar by default")
    parser.add_argument("--batch", type=int, help="128 for mnist, 64 for cifar by default")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val to choose settings by")
    parser.add_argument("--pool", type=int, default=1, help="cifar: average squares of so many pixels a side")
    parser.add_argument("--depth", type=int, default=8, help="cifar")
    parser.add_argument("--width", type=int, default=16, help="cifar")
    parser.add_argument("--lr", type=float, default=0.1, help="cifar")
    parser.add_argument("--published", type=Path, help="report: csv of published figures to print beside")
    options = parser.parse_args()
    if options.task == "report":
        report(options.out, options.published)
        return
    if options.data is None:
        parser.error(f"{options.task} needs --data, the folder of its files")
    torch.set_num_threads(1)
    setting = mnist(options) if options.task == "mnist" else cifar(options)
    densities = sorted(options.densities, reverse=True)
    measure(setting, options.seeds, densities, list(options.methods), options.out)


if __name__ == "__main__":
    main()
