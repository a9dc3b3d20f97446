"""The network to export, its example inputs and its outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from workbench import records
from workbench.tasks import find_logits
from workbench.training.scoring import in_float32

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network to export.

    Args:
        network: The network.
        masks: Masks of its pruned weights.
        index: Index of its compact checkpoint.
        inputs: Example inputs by name; may be empty.
    """

    network: nn.Module
    masks: Mapping[str, Tensor]
    index: Mapping[str, Any]
    inputs: Mapping[str, Tensor]


def select_level(stage: Path, level: int | str | None) -> tuple[Path, Mapping[str, Any]]:
    """The folder of a finished stage's network and its record: the stage's own, or one of its levels'.

    None is the level that a report recommends: the winning one; the last where no validation score tells.

    Raises:
        ValueError: If the stage is not finished, or has no such level.
    """
    record = records.read(stage) or {}
    if record.get("status", "finished") != "finished":
        raise ValueError(f"{stage} is {record['status']}: wait until it is finished")
    levels = record.get("levels") or []
    if not levels:
        if level not in ("last", None):
            raise ValueError(f"level is {level!r}, but {stage} has no levels: leave level out, or name a hunt")
        return stage, record
    if level is None:
        level = "last" if record.get("winning") is None else "winning"
    number = {"last": levels[-1]["level"], "winning": record.get("winning")}.get(str(level), level)
    if number is None:
        raise ValueError(f"{stage} has no validation score to choose a winning level by: give a number, or 'last'")
    if type(number) is not int or not 0 <= number < len(levels):
        last = len(levels) - 1
        raise ValueError(f"level is {level!r}, but {stage} has levels 0 to {last}, 'last' and 'winning'")
    return stage / f"level_{number:02d}", levels[number]


def load_example_inputs(*folders: Path) -> dict[str, Tensor]:
    """The example inputs by name in the first of ``folders`` that has some; empty if none has.

    Raises:
        ValueError: If they cannot be read.
    """
    for folder in folders:
        file = folder / "example.safetensors"
        if file.is_file():
            try:
                return load_file(file)
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged ({error}): remove it and export compact only") from error
    return {}


def arguments_of(inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional arguments, named ``input_0``, ``input_1`` ..., and keyword arguments out of named inputs."""
    positional = sorted((int(name[6:]), name) for name in inputs if name.startswith("input_") and name[6:].isdigit())
    names = [name for _, name in positional]
    return tuple(inputs[name] for name in names), {name: inputs[name] for name in inputs if name not in names}


def arguments_for(network: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """As :func:`arguments_of`, floating ones in the network's own type."""
    own = (parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    return arguments_of(cast_inputs(inputs, next(own, torch.float32)))


def cast_inputs(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs with floating-point ones in ``dtype``."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def first_tensor(raw: Any) -> Tensor:
    """The logits of a model's output, else its first tensor."""
    if isinstance(raw, Tensor):
        return raw
    logits = find_logits(raw)
    return next(iter(raw.values() if isinstance(raw, Mapping) else raw)) if logits is None else logits


@torch.no_grad()
def outputs(network: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The network's output for the inputs, computed in float32 if it is in half precision; None without inputs."""
    if not inputs:
        return None
    with in_float32(network):
        args, kwargs = arguments_for(network, inputs)
        return first_tensor(network(*args, **kwargs))


def folder_bytes(folder: Path) -> int:
    """Size of all files in ``folder``, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
