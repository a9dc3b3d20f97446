"""Run a function on several processes of one process group, as data-parallel training does."""

import os
import queue
import random
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tests.helpers.processes import FORK


def on_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """Run ``function(*args)`` on ``ranks`` forked processes with torchrun's environment variables; results by rank.

    The function may use tensors and modules of the parent process. Results are pickled: return plain values.

    Raises:
        RuntimeError: If a rank raised an exception or died, with what each of them raised.
    """
    processes, results = start_ranks(function, *args, ranks=ranks)
    received: dict[int, tuple[bool, Any]] = {}
    try:
        while len(received) < ranks:
            dead = [rank for rank, process in enumerate(processes) if not process.is_alive() and rank not in received]
            failed = not all(succeeded for succeeded, _ in received.values())
            try:
                rank, result = results.get(timeout=60 if failed else 1)
                received[rank] = result
            except queue.Empty:
                if failed:  # the others wait for it in a collective
                    break
                if dead:
                    raise RuntimeError(f"ranks {dead} died without a result") from None
        if errors := {rank: value for rank, (succeeded, value) in received.items() if not succeeded}:
            raise RuntimeError(f"ranks failed: {errors}")
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
    return [received[rank][1] for rank in range(ranks)]


def start_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> tuple[list[Any], Any]:
    """The processes of `on_ranks`, and the queue that gets (rank, (succeeded, result or error)) from each."""
    results, port = FORK.Queue(), free_port()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork of a process with threads
        processes = [FORK.Process(target=_rank, args=(r, ranks, port, results, function, args)) for r in range(ranks)]
        for process in processes:
            process.start()
    return processes, results


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
