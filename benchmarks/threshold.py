"""The k highest of all magnitudes of a BERT-like model: time and memory beside what torch has for one flat vector.

Each way runs in a process of its own, ways in turn. Peers make one vector of the model; that, the threshold and the
mask are in their time, as they are in ours. Extra memory is the peak of the resident set over what it was with the
scores in memory, less the masks that are returned. The last columns tell how many more than k are kept, and whether
the mask is the exact one: the k highest, ties to the lower index. Time of the CPU, over all threads, is the better
measure where other programs run too.

    python benchmarks/threshold.py --weights 85000000 --threads 1 2 --repeats 3
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from prune.topk import keep_top_k

DENSITY = 0.2
HIDDEN = 768
LAYER = [*[(HIDDEN, HIDDEN)] * 4, (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN)]

Scores = dict[str, Tensor]


def model(weights: int) -> Scores:
    """Encoder layers of BERT-base, as many as it takes, the last one cut."""
    scores, left = {}, weights
    while left:
        for shape in LAYER:
            size = min(left, math.prod(shape))
            if size:
                whole = size == math.prod(shape)
                score = torch.empty(shape if whole else (size,)).normal_(std=0.02 * (1 + len(scores) % 5)).abs_()
                scores[f"w{len(scores)}"] = score
                left -= size
    return scores


def histogram(scores: Scores, k: int) -> list[Tensor]:
    return list(keep_top_k(scores, k).values())


def flat(scores: Scores) -> Tensor:
    return torch.cat([score.flatten() for score in scores.values()])


def split(mask: Tensor, scores: Scores) -> list[Tensor]:
    return [part.view(s.shape) for part, s in zip(mask.split([s.numel() for s in scores.values()]), scores.values())]


def kthvalue(scores: Scores, k: int) -> list[Tensor]:
    """Exact, ties by index, of everything in one tensor."""
    values = flat(scores)
    threshold = values.kthvalue(len(values) - k + 1).values
    above, tied = values > threshold, values == threshold
    return split(above | (tied & (tied.cumsum(0) <= k - above.sum())), scores)


def topk(scores: Scores, k: int) -> list[Tensor]:
    """As torch.nn.utils.prune.global_unstructured: the smallest are found and masked."""
    values = flat(scores)
    mask = torch.ones(len(values), dtype=torch.bool)
    mask[torch.topk(values, len(values) - k, largest=False, sorted=False).indices] = False
    return split(mask, scores)


def sort(scores: Scores, k: int) -> list[Tensor]:
    values = flat(scores)
    return split(values >= values.sort(descending=True).values[k - 1], scores)


def bare_kthvalue(scores: Scores, k: int) -> list[Tensor]:
    """The threshold alone, in a vector that is there already: no mask."""
    values = scores["flat"]
    values.kthvalue(len(values) - k + 1)
    return []


WAYS: dict[str, Callable[[Scores, int], list[Tensor]]] = {
    "histogram": histogram,
    "kthvalue alone": bare_kthvalue,
    "kthvalue": kthvalue,
    "topk": topk,
    "sort": sort,
}


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status: this needs Linux")


def measure(way: str, weights: int, threads: int) -> None:
    """One run in this process; prints seconds, extra bytes and a digest of the mask."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warm = {"flat": torch.rand(10_000)}
    WAYS[way](warm, 2000)
    scores = model(weights)
    if way == "kthvalue alone":
        scores = {"flat": flat(scores)}
    k = round(DENSITY * weights)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    masks = WAYS[way](scores, k)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    extra = resident("VmHWM") - before - sum(mask.numel() for mask in masks)
    kept = sum(int(mask.sum()) for mask in masks)
    place = sum(int(mask.flatten().nonzero().sum()) for mask in masks)
    print(json.dumps({"seconds": seconds, "cpu": cpu, "extra": extra, "kept": kept, "place": place, "k": k}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=85_000_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--measure", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.weights, options.threads[0])
        return
    print(f"{options.weights:,} scores, {DENSITY:.0%} kept, torch {torch.__version__}; medians of {options.repeats}")
    print("threads            way  seconds  of kthvalue alone  in CPU  extra MB  of the weights  kept-k  exact")
    for threads in options.threads:
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
        for _ in range(options.repeats):
            for way, found in runs.items():
                command = [sys.executable, __file__, "--measure", way, "--weights", str(options.weights)]
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                output = subprocess.check_output([*command, "--threads", str(threads)], env=environment, text=True)
                found.append(json.loads(output))
        medians = {
            way: {key: sorted(run[key] for run in found)[len(found) // 2] for key in ("seconds", "cpu", "extra")}
            for way, found in runs.items()
        }
        unit = medians.get("kthvalue alone", {"seconds": math.nan, "cpu": math.nan})
        exact = runs["kthvalue"][0] if "kthvalue" in runs else None
        for way, each in medians.items():
            kept, place, k = (runs[way][0][key] for key in ("kept", "place", "k"))
            same = "" if exact is None else "yes" if place == exact["place"] else "no"
            row = [f"{threads:7} {way:>14} {each['seconds']:8.2f} {each['seconds'] / unit['seconds']:18.2f}"]
            row += [f"{each['cpu'] / unit['cpu']:7.2f} {each['extra'] / 1e6:9.1f}"]
            row += [f"{each['extra'] / (4 * options.weights):15.1%}"]
            if way != "kthvalue alone":
                row += [f"{kept - k:+7} {same:>6}"]
            print(*row)


if __name__ == "__main__":
    main()
