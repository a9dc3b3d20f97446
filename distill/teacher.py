"""Teacher: a trained network that is asked and never taught."""

import copy
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from workbench import artifact


@final
class Teacher:
    """A frozen network in eval mode, owned by nobody.

    Not an ``nn.Module``: whoever holds it does not get its weights in ``parameters()``, in the optimizer, in DDP
    buckets, in the state dict or in a checkpoint, and ``train()`` on the holder does not wake it. Copies of the
    holder share it.

    Args:
        source: A trained network, which is copied; or a folder: a compact checkpoint, a finished stage, or a model
            that ``transformers.AutoModelForSequenceClassification`` loads (also a hub name).

    Raises:
        ValueError: If there is no such thing there, or it lacks weights.
    """

    def __init__(self, source: nn.Module | str | Path) -> None:
        # The copy keeps freezing from reaching into the caller's network; what was just loaded is nobody else's.
        module = copy.deepcopy(source) if isinstance(source, nn.Module) else _load(source)
        self._module = module.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, without a graph.

        The network follows the inputs to their device; floating-point inputs are read in the network's precision,
        since the student's may be another.
        """
        self._module.eval()
        weight = next((p for p in self._module.parameters() if p.is_floating_point()), None)
        first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if weight is not None and first is not None:
            if weight.device != first.device:
                self._module.to(first.device)
            args, kwargs = tree_map_only(
                Tensor, lambda value: value.to(weight.dtype) if value.is_floating_point() else value, (args, kwargs)
            )
        return self._module(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        # It never changes, and may be far larger than what learns from it.
        return self

    @property
    def module(self) -> nn.Module:
        """The network, for reading."""
        return self._module


def _load(source: str | Path) -> nn.Module:
    path = Path(source)
    if (folder := _checkpoint(path)) is not None:
        return artifact.load(folder)
    if (path / "config.json").is_file() or _is_hub_name(source):
        return _from_transformers(str(source))
    state = "holds none" if path.exists() else "does not exist"
    raise ValueError(f"teacher '{source}' {state}: give a finished stage, a compact checkpoint or a transformers model")


def _checkpoint(path: Path) -> Path | None:
    try:
        return artifact.find(path)
    except ValueError:
        return None


def _is_hub_name(source: str | Path) -> bool:
    """Whether it could be one: ``name`` or ``owner/name``, and nothing on this disk."""
    name = str(source)
    plain = not isinstance(source, Path) and not name.startswith((".", "/", "~")) and name.count("/") <= 1
    return plain and name != "" and not Path(name).exists()


def _from_transformers(name: str) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"teacher '{name}' is neither a stage, nor a compact checkpoint, nor a model that transformers loads: "
            f"{reason[:300]}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise ValueError(
            f"teacher '{name}' lacks {len(missing)} weights of a {type(model).__name__}, such as '{missing[0]}': "
            "give one that was trained for classification"
        )
    return model
