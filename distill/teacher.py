"""Teacher: a trained network that is asked and never taught."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench import artifact
from workbench.source import Source


class Teacher:
    """A frozen network in eval mode, owned by nobody.

    Not an ``nn.Module``: whoever holds it does not get its weights in ``parameters()``, in the optimizer, in DDP
    buckets, in the state dict or in a checkpoint, and ``train()`` on the holder does not wake it.

    Args:
        source: A trained network; or a folder: a compact checkpoint, a finished stage, or a model that
            ``transformers.AutoModelForSequenceClassification`` loads (also a hub name).

    Raises:
        ValueError: If the folder holds none of them.
    """

    def __init__(self, source: "nn.Module | str | Path") -> None:
        module = source if isinstance(source, nn.Module) else _load(Path(source), str(source))
        # A copy: freezing must not reach into the caller's network.
        self._module = copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, without a graph; the network follows the inputs to their device."""
        self._module.eval()
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                self._module.to(value.device)
                break
        return self._module(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        """The network, for reading."""
        return self._module


def _load(path: Path, name: str) -> nn.Module:
    try:
        return artifact.load(path)
    except ValueError:
        if path.exists() and not (path / "config.json").is_file():
            raise
    from transformers import AutoModelForSequenceClassification

    try:
        return AutoModelForSequenceClassification.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher {name!r} is neither a stage, nor a compact checkpoint, nor a model that transformers loads: {error}"
        ) from error


__all__ = ["Source", "Teacher"]
