"""The latency of a model, with its spread, and the ratio of two models, which holds on a busy machine, too."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from prune.accounting.running import ready


@dataclass(frozen=True)
class Latency:
    """Seconds per call.

    Attributes:
        median: median of the measured blocks, each the mean of consecutive calls.
        low: lower quartile of the blocks.
        high: upper quartile.
        runs: number of calls.
    """

    median: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        low, median, high = (f"{1000 * seconds:.4g}" for seconds in (self.low, self.median, self.high))
        return f"{median} ms a call (quartiles {low} to {high}, {self.runs} calls)"


@dataclass(frozen=True)
class Comparison:
    """How many times longer ``a`` takes than ``b``: above 1 where ``b`` is faster.

    Attributes:
        ratio: median over pairs of blocks, one of each model, right after each other.
        low: lower quartile of the pairs.
        high: upper quartile.
        a: latency of the first model.
        b: latency of the second.
    """

    ratio: float
    low: float
    high: float
    a: Latency
    b: Latency

    def __str__(self) -> str:
        return f"{self.ratio:.3g} times (quartiles {self.low:.3g} to {self.high:.3g}): {self.a} against {self.b}"


def latency(model: nn.Module, example_inputs: Any, threads: int = 1, min_run_time: float = 1.0) -> Latency:
    """Measure one call of ``model`` with ``torch.utils.benchmark``, in eval and inference mode, after warming up.

    Args:
        model: on any device; a GPU is synchronised. It is left as it was.
        example_inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments; moved to the model's device.
        threads: torch's threads on the CPU.
        min_run_time: seconds to measure for.

    Raises:
        ValueError: if ``threads`` or ``min_run_time`` is not positive.
    """
    _check(threads, min_run_time)
    with ready(model, example_inputs) as forward, torch.inference_mode():
        timer = Timer("forward()", globals={"forward": forward}, num_threads=threads)
        timer.timeit(2)
        measurement = timer.blocked_autorange(min_run_time=min_run_time)
    return _latency(measurement.times, len(measurement.times) * measurement.number_per_run)


def compare_latency(
    a: nn.Module, b: nn.Module, example_inputs: Any, threads: int = 1, min_run_time: float = 2.0, pairs: int = 20
) -> Comparison:
    """Measure two models in turns, so that other load on the machine slows both.

    Args:
        a: the first model, say the dense one.
        b: the second.
        example_inputs: for both; see ``latency``.
        threads: torch's threads on the CPU.
        min_run_time: approximate seconds to measure for, both models together.
        pairs: number of turns; the first model alternates.

    Raises:
        ValueError: if ``threads``, ``min_run_time`` or ``pairs`` is not positive.
    """
    _check(threads, min_run_time)
    if pairs < 1:
        raise ValueError(f"pairs is {pairs}: give 1 or more")
    with ExitStack() as stack:
        forwards = [stack.enter_context(ready(model, example_inputs)) for model in (a, b)]
        stack.enter_context(torch.inference_mode())
        timers = [Timer("forward()", globals={"forward": forward}, num_threads=threads) for forward in forwards]
        share = min_run_time / (2 * pairs)
        numbers = []
        for timer in timers:
            timer.timeit(2)
            numbers.append(max(1, math.ceil(share / timer.timeit(3).median)))
        times: list[list[float]] = [[], []]
        for pair in range(pairs):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                times[which].append(timers[which].timeit(numbers[which]).median)
    ratio = _quartiles([first / second for first, second in zip(*times)])
    first, second = (_latency(each, pairs * number) for each, number in zip(times, numbers))
    return Comparison(ratio[1], ratio[0], ratio[2], first, second)


def _check(threads: int, min_run_time: float) -> None:
    if threads < 1 or not min_run_time > 0:
        raise ValueError(
            f"threads is {threads} and min_run_time {min_run_time}: give 1 or more threads, and seconds above 0"
        )


def _latency(times: Sequence[float], runs: int) -> Latency:
    low, median, high = _quartiles(times)
    return Latency(median, low, high, runs)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    )
    return low, median, high
