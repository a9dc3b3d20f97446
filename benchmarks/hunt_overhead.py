"""What a level of a hunt costs over a plain Lightning fit of the same updates.

Both train the same network on the same batches under the same mask budget of updates. The plain fit is Lightning with
nothing of ours but module and data: no checkpoint, no history. A level also draws its mask, keeps it, writes what it
would resume from, evaluates, and writes its compact checkpoint and record. Ratios are taken within rounds, in turn, and
their quartiles printed; memory is the process's peak, of one of each in a process of its own.

    python benchmarks/hunt_overhead.py --rounds 5
    python benchmarks/hunt_overhead.py --resnet
    python benchmarks/hunt_overhead.py --data /folder/of/idx/files      # LeNet-300-100 on MNIST
"""

import argparse
import copy
import functools
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from prune.tickets.hunt import hunt
from prune.tickets.store import Store
from workbench import TaskModule
from workbench.data import Digits, IDXImages
from workbench.duration import Duration
from workbench.models import MLP, LeNet300, ResNet
from workbench.tasks import Classification

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
OPTIMIZER = functools.partial(torch.optim.Adam, lr=1.2e-3)


def subject(options: argparse.Namespace) -> tuple[Any, Any]:
    if options.data:
        return LeNet300("relu"), IDXImages(options.data, batch_size=60)
    if options.resnet:
        return ResNet(8, 16, in_channels=1), Digits(batch_size=60, image=True)
    return MLP(64, [options.width] * 2, 10), Digits(batch_size=60)


def trainer(options: argparse.Namespace) -> dict[str, Any]:
    return {"max_epochs": options.epochs, "accelerator": "cpu", "enable_progress_bar": False, "logger": False}


def plain(options: argparse.Namespace, network: torch.nn.Module, data: Any) -> float:
    """Seconds of fit, validate and test by Lightning alone."""
    began = time.perf_counter()
    module = TaskModule(copy.deepcopy(network), Classification(10), OPTIMIZER)
    made = pl.Trainer(**trainer(options), enable_checkpointing=False, enable_model_summary=False)
    made.fit(module, datamodule=data)
    made.validate(module, datamodule=data, verbose=False)
    made.test(module, datamodule=data, verbose=False)
    return time.perf_counter() - began


def level(options: argparse.Namespace, network: torch.nn.Module, data: Any) -> float:
    """Seconds of level 1 of a hunt from the initial weights, everything included."""
    with tempfile.TemporaryDirectory() as folder:
        times: list[float] = []
        keep = Store.keep

        def timed(*args: Any) -> Any:
            kept = keep(*args)
            times.append(time.perf_counter())
            return kept

        Store.keep = timed  # type: ignore[method-assign]
        try:
            hunt(
                model=copy.deepcopy(network),
                data=data,
                levels=1,
                rewind=Duration(0, "it"),
                optimizer=OPTIMIZER,
                trainer=trainer(options),
                out=Path(folder),
            )
        finally:
            Store.keep = keep  # type: ignore[method-assign]
        return times[1] - times[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--resnet", action="store_true", help="ResNet-8 on the digits as images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--only", choices=("plain", "level"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    network, data = subject(options)
    data.setup()
    if options.only:
        {"plain": plain, "level": level}[options.only](options, network, data)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    plain(options, network, data)
    ratios = []
    for _ in range(options.rounds):
        base = plain(options, network, data)
        ratios.append(level(options, network, data) / base)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    print(f"a level over a plain fit: {middle:.3f} (quartiles {low:.3f} to {high:.3f}, n = {len(ratios)})")
    peaks = [
        int(
            subprocess.run(
                [sys.executable, *sys.argv, "--only", which], capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        )
        for which in ("plain", "level")
    ]
    mebibytes = " and ".join(f"{peak / 1024:.0f}" for peak in peaks)
    print(f"peak memory, level over plain: {peaks[1] / peaks[0]:.3f} ({mebibytes} MiB)")


if __name__ == "__main__":
    main()
