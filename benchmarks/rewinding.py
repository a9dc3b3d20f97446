"""Four ways to start a level of a hunt, on CIFAR-10: the initial weights, those of step k, learning-rate rewinding,
fine-tuning.

What Renda, Frankle, Carbin (2020, arXiv:2003.02389) compare, with a smaller network, smaller images and fewer levels. A
seed gives all four the same initial weights, data order and augmentation, and so the same dense network. Fine-tuning
trains each level for 30/182 of the dense budget, as theirs does, the others from their rewind point to the end.
Accuracy is of the last weights on the test split, which chose nothing.

Hunts are kept in --out, a folder each; what is finished there is not run again, so a run that was broken off goes on.

    python benchmarks/rewinding.py run --data /folder/of/parquet/files --seeds 0 1 2
    python benchmarks/rewinding.py report [--published figures.csv]
"""

import argparse
import csv
import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from prune.rewinding.modes import Rewind
from prune.tickets.hunt import hunt
from workbench import records
from workbench.data import Augment
from workbench.data.parquet import ParquetImages
from workbench.evaluation.statistics import Estimate, mean, paired
from workbench.models import ResNet
from workbench.training import CPUThreads

DENSITIES = [0.475, 0.226, 0.107]
WAYS = {
    "init": ("all", 0.0),
    "step": ("all", 12 / 182),
    "learning rate": ("learning_rate", 12 / 182),
    "fine-tuning": ("fine_tuning", 152 / 182),
}
PUBLISHED = {
    "init": "rewind to init",
    "step": "weight rewinding",
    "learning rate": "learning-rate rewinding",
    "fine-tuning": "fine-tuning",
}


def data(options: argparse.Namespace, folder: str) -> ParquetImages:
    made = ParquetImages(folder, batch_size=options.batch, validation=1000)
    made.setup()
    size = made.input_shape[-1] // options.pool
    for part in made.parts.values():
        part.images = F.avg_pool2d(part.images.float(), options.pool).round().to(torch.uint8)
    made.parts["train"].augment, made.parts["train"].views = Augment(padding=size // 8), 0
    return made


def run(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers")
    images = data(options, options.data)
    updates = options.epochs * -(-len(images.parts["train"]) // options.batch)
    for seed in options.seeds:
        for way in options.ways:
            mode, share = WAYS[way]
            pl.seed_everything(seed, verbose=False)
            hunt(
                model=ResNet(options.depth, options.width, activation="relu"),
                data=images,
                density=DENSITIES,
                rewind=Rewind(f"{round(share * updates)}it", mode),  # type: ignore[arg-type]
                optimizer=functools.partial(
                    torch.optim.SGD, lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
                ),
                lr_scheduler=functools.partial(
                    torch.optim.lr_scheduler.MultiStepLR,
                    milestones=[options.epochs // 2, 3 * options.epochs // 4],
                ),
                trainer={
                    "max_epochs": options.epochs,
                    "accelerator": "auto",
                    "enable_progress_bar": False,
                    "callbacks": [CPUThreads(1)],
                },
                seed_everything=seed,
                out=folder(options, way, seed),
            )
            print(way, seed, [round(100 * score, 2) for score in scores(options, way, seed) or []], flush=True)


def folder(options: argparse.Namespace, way: str, seed: int) -> Path:
    return options.out / f"{way.replace(' ', '-')}_{seed}"


def scores(options: argparse.Namespace, way: str, seed: int) -> list[float] | None:
    """Test accuracy of each level; None unless all are finished."""
    levels = [folder(options, way, seed) / f"level_{level:02d}" for level in range(len(DENSITIES) + 1)]
    found: list[dict[str, Any] | None] = [records.finished(level) for level in levels]
    return None if None in found else [record["metrics"]["test/accuracy"] for record in found if record]


def report(options: argparse.Namespace) -> None:
    published: dict[str, str] = {}
    if options.published:
        with options.published.open(encoding="utf-8") as file:
            published = {row["method"]: row["value"] for row in csv.DictReader(file) if "ResNet-20" in row["model"]}
    known = {way: {s: f for s in range(100) if (f := scores(options, way, s))} for way in WAYS}
    print(f"{'test accuracy, %':16}", *(f"{100 * d:>14.1f}" for d in (1, *DENSITIES)), f"{'published':>10}")
    for way, seeds in known.items():
        cells = []
        for level in range(len(DENSITIES) + 1):
            values = [100 * found[level] for found in seeds.values()]
            cells.append(said(mean(values)) if values else "-")
        print(f"{way:16}", *(f"{cell:>14}" for cell in cells), f"{published.get(PUBLISHED[way], '-'):>10}")
    print("paired differences at the last density, 95 % t interval")
    for a, b in (
        ("step", "init"),
        ("learning rate", "step"),
        ("step", "fine-tuning"),
        ("learning rate", "fine-tuning"),
    ):
        common = sorted(known[a].keys() & known[b].keys())
        if len(common) > 1:
            gap = paired([100 * known[a][s][-1] for s in common], [100 * known[b][s][-1] for s in common])
            interval = f" [{gap.interval.low:+.2f}, {gap.interval.high:+.2f}]" if gap.interval else ""
            print(f"  {a} - {b}: {gap.mean:+.2f}{interval}, n = {gap.n}")


def said(value: Estimate) -> str:
    spread = f" ±{(value.interval.high - value.interval.low) / 2:.2f}" if value.interval else ""
    return f"{value.mean:.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", required=True)
    running.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    running.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    running.add_argument("--epochs", type=int, default=8)
    running.add_argument("--batch", type=int, default=64)
    running.add_argument("--lr", type=float, default=0.1)
    running.add_argument("--pool", type=int, default=2, help="side of the squares of pixels that become one")
    running.add_argument("--depth", type=int, default=8)
    running.add_argument("--width", type=int, default=16)
    running.set_defaults(do=run)
    reporting = commands.add_parser("report")
    reporting.add_argument("--published", type=Path)
    reporting.set_defaults(do=report)
    for each in (running, reporting):
        each.add_argument("--out", type=Path, default=Path("runs/rewinding"))
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
