"""Run a function on several processes of one process group, as data-parallel training does."""

import multiprocessing
import os
import random
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch


def on_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """Run ``function(*args)`` on ``ranks`` forked processes with torchrun's environment variables; results by rank.

    The function may use tensors and modules of the parent process. Results are pickled: return plain values.
    """
    port = free_port()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork of a process with threads
        processes = [
            context.Process(target=_rank, args=(r, ranks, port, results, function, args)) for r in range(ranks)
        ]
        for process in processes:
            process.start()
    try:
        results_by_rank = dict(results.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(60)
            process.kill()
    if failed := {rank: value for rank, (succeeded, value) in results_by_rank.items() if not succeeded}:
        raise RuntimeError(f"ranks failed: {failed}")
    assert [process.exitcode for process in processes] == [0] * ranks
    return [results_by_rank[rank][1] for rank in range(ranks)]


def free_port() -> int:
    """A free port below the ephemeral range, from the range of this pytest-xdist worker."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(12_000 + 2_000 * (worker % 10), 14_000 + 2_000 * (worker % 10))
    for port in random.Random().sample(ports, len(ports)):  # not the global generator: tests seed it
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"none of the ports {ports} is free")


def _rank(rank: int, ranks: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()} | {"TORCHELASTIC_RUN_ID": "test"})
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        results.put((rank, (True, function(*args))))
    except BaseException as error:
        results.put((rank, (False, f"{type(error).__name__}: {error}")))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
