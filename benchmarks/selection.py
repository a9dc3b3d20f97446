"""Scores while training, and selection: each beside the way it was done before, in turns, as ratios.

Every row is a time of the package's way divided by a time of another way or of a training step: the median over pairs
that ran one after the other, and the interval between the quartiles. Times are of the CPU, over all threads, which
other programs disturb least. Results are compared bit for bit where the other way has the same result.

    python benchmarks/selection.py --threads 1 --pairs 15
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from prune.allocation import Global, Layers
from prune.criteria import CRITERIA
from prune.policies import Gradual
from prune.pruner import Pruner
from prune.structures.layout import best_of_each
from prune.structures.weights import best_of_rows

Run = Callable[[], object]


def transformer(width: int = 128, layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layer = [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)]
    attention = [nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(2 * layers)]
    return nn.Sequential(*layer, *attention, nn.Linear(width, 10))


def online_before(policy: Gradual, sums: dict[str, Tensor], weights: dict[str, nn.Parameter]) -> None:
    """New tensors for every operation and every weight, as a loop over ``Criterion.online`` has them."""
    online, masks = policy.pruner.axes.criterion.online, policy.masks
    assert online is not None
    assert masks is not None
    grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    bad = {name: grad.isfinite().logical_not() & masks[name] for name, grad in grads.items()}
    assert not bool(torch.stack([each.sum() for each in bad.values()]).any())
    for name, grad in grads.items():
        added = online(weights[name].detach(), grad.detach()).masked_fill(~masks[name], 0)
        sums[name] = sums[name] + added if name in sums else added


def online(name: str, pairs: int) -> None:
    """One update's scores, with masks in force, beside what went before and beside the training step itself."""
    model, batch = transformer(), torch.randn(64, 128)
    optimizer = torch.optim.AdamW(model.parameters())
    policy = Gradual(0.1, "1it", "1000000it", "1000000it", Pruner(name), initial=0.5)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), torch.zeros(64, dtype=torch.long)).backward()
        optimizer.step()

    with policy.follow(model, optimizer):
        step()
        weights, sums = policy._weights, {}

        def now() -> None:
            policy._read_gradients(policy._time)

        def before() -> None:
            online_before(policy, sums, weights)

        policy._start(policy._time, True)  # scores from zero again, to compare
        now()
        before()
        ours = policy.state_dict()["scores"]
        same = all(torch.equal(ours[key], sums[key]) for key in sums)
        line(f"{name} online / before", now, before, pairs, same)
        line(f"{name} online / training step", now, step, pairs)


def allocation(pairs: int) -> None:
    """Selection under the global allocation: the masks of the counts, beside counts first and then every layer."""
    torch.manual_seed(0)
    scores = {f"w{i}": torch.rand(1024, 1024) for i in range(16)}
    layers = Layers(scores, 0.1)

    def now() -> dict[str, Tensor]:
        return Global().select(layers)

    def before() -> dict[str, Tensor]:
        return best_of_each(scores, Global()(layers), None)

    first, second = now(), before()
    line("global allocation / twice", now, before, pairs, all(torch.equal(first[key], second[key]) for key in scores))


def rows(pairs: int) -> None:
    """The best half of every row, and the next of each, beside a stable sort of whole rows."""
    torch.manual_seed(0)
    scores, allowed = torch.rand(1024, 1024), torch.ones(1024, 1024, dtype=torch.bool)
    for k in (102, 512):

        def now(k: int = k) -> tuple[Tensor, Tensor]:
            return best_of_rows(scores, allowed, k)

        def before(k: int = k) -> tuple[Tensor, Tensor]:
            order = torch.argsort(scores.masked_fill(~allowed, -torch.inf), dim=-1, descending=True, stable=True)
            positions = torch.arange(scores.shape[-1]).expand_as(order)
            rank = torch.empty_like(order).scatter_(-1, order, positions)
            rank[allowed].bincount().cumsum(0)
            return allowed & (rank < k), allowed & (rank == k)

        same = all(torch.equal(a, b) for a, b in zip(now(), before()))
        line(f"balanced, {k} of 1024 / sort", now, before, pairs, same)


def line(name: str, now: Run, before: Run, pairs: int, same: bool | None = None) -> None:
    """A row: the median ratio over pairs in turn, its quartiles, and the medians in ms."""
    times: list[tuple[float, float]] = []
    for pair in range(pairs + 2):
        both = [0.0, 0.0]
        for way in (0, 1) if pair % 2 else (1, 0):
            start = time.process_time()
            (now, before)[way]()
            both[way] = time.process_time() - start
        times.append((both[0], both[1]))
    times = times[2:]  # the first ones warm up
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ms = [1000 * statistics.median(side) for side in zip(*times)]
    equal = "" if same is None else "  same bits" if same else "  OTHER RESULT"
    print(f"{name:32} {middle:6.2f} [{low:.2f}, {high:.2f}]  {ms[0]:8.2f} {ms[1]:8.2f} ms{equal}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {options.threads} threads, {options.pairs} pairs: median ratio [quartiles]")
    for name in (each.name for each in CRITERIA.values() if each.online is not None):
        online(name, options.pairs)
    allocation(options.pairs)
    rows(options.pairs)


if __name__ == "__main__":
    main()
