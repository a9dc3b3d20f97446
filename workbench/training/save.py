"""A trained network as a stage leaves it: the compact checkpoint, a few inputs to try it on, its size."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench import records
from workbench.checkpoints import compact
from workbench.distributed.ranks import barrier, check_ranks_agree, rank, whole
from workbench.distributed.sharding import whole_state
from workbench.files import atomic_file
from workbench.tasks import Task
from workbench.training.module import SupervisedModule, network_of

_SAMPLES = 16


def save_network(
    module: nn.Module,
    data: LightningDataModule | None,
    out: Path,
    result: dict[str, Any],
    masks: Mapping[str, Tensor] | None = None,
    example: bool = True,
    member: str = "",
) -> None:
    """Write the shipped network to ``out/compact`` and inputs to try it on to ``out/example.safetensors``.

    Of a family it is the network called ``member``. Adds ``size`` to ``result``. On ranks above zero only that.
    """
    network = network_of(module).get_submodule(member)
    folder = out / "compact"
    check_ranks_agree(network)
    state = whole_state(network)
    if rank() == 0:
        if compact.describe(network) is None:
            warnings.warn(
                f"{type(network).__name__} does not say what it was built with, so its checkpoint loads only into a "
                "given module: load(path, model=...). Let it keep its arguments, as JSON, in self.init_args, or "
                "call save_hyperparameters() in a LightningModule",
                stacklevel=2,
            )
        compact.save(network, folder, masks, provenance={"metrics": result["metrics"]}, state=state)
        if example and data is not None and (inputs := example_inputs(module, data)):
            with atomic_file(out / "example.safetensors") as temporary:
                save_file(inputs, temporary)
    barrier()
    result["size"] = size_of(network, masks, folder)


def size_of(network: nn.Module, masks: Mapping[str, Tensor] | None, folder: Path) -> dict[str, int]:
    """Counts of weights under each of their names, and bytes: dense in fp32, and of the checkpoint in ``folder``.

    Called on every rank.
    """
    parameters = list(network.parameters())
    pruned = (
        {
            "prunable": sum(mask.numel() for mask in masks.values()),
            "kept": sum(int(mask.sum()) for mask in masks.values()),
        }
        if masks
        else {}
    )
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        **pruned,
        "nonzero": sum(int(whole(parameter.detach()).count_nonzero()) for parameter in parameters),
        "dense_fp32_bytes": 4 * sum(parameter.numel() for parameter in parameters),
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
    }


def example_inputs(module: nn.Module, data: LightningDataModule) -> dict[str, Tensor]:
    """Up to 16 validation inputs by name, ``input_0``, ... for positional ones; empty if they are not tensors."""
    if not is_overridden("val_dataloader", data, LightningDataModule):
        return {}
    data.setup("validate")
    loader = data.val_dataloader()
    while isinstance(loader, (Mapping, list, tuple)):
        loader = next(iter(loader.values() if isinstance(loader, Mapping) else loader))
    batch = next(iter(loader))
    task = getattr(module, "task", None)
    if isinstance(task, Task):
        args, kwargs = task.inputs(batch)
    elif isinstance(batch, Mapping):
        args, kwargs = (), {name: value for name, value in batch.items() if name not in ("label", "labels")}
    else:
        args, kwargs = (batch[0] if isinstance(batch, (tuple, list)) else batch,), {}
    named = {**{f"input_{i}": value for i, value in enumerate(args)}, **kwargs}
    if not all(isinstance(value, Tensor) for value in named.values()):
        return {}
    return {name: value[:_SAMPLES].detach().cpu().contiguous() for name, value in named.items()}


def save_family(
    module: SupervisedModule,
    data: LightningDataModule,
    out: Path,
    result: dict[str, Any],
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Write each network of a family as ``out/NAME/compact`` beside a record of its own; adds ``students``."""
    result["students"] = {}
    for name in module.family:
        mine = {"metrics": _of_member(result["metrics"], name), "monitor": result["monitor"]}
        mine["history"] = [_of_member(row, name) for row in result["history"]]
        kept = {key.removeprefix(f"{name}."): mask for key, mask in (masks or {}).items() if key.startswith(f"{name}.")}
        save_network(module, data, out / name, mine, kept or None, member=name)
        if rank() == 0:
            records.write(out / name, {"stage": f"{out.name}/{name}", "status": "finished", **mine})
        result["students"][name] = mine


def _of_member(row: Mapping[str, float], member: str) -> dict[str, float]:
    """Those numbers of a row that are of one student, and those that are of none."""
    found: dict[str, float] = {}
    for name, value in row.items():
        split, _, rest = name.partition("/")
        whose, _, metric = rest.partition("/")
        if not metric or whose == member:
            found[f"{split}/{metric}" if metric else name] = value
    return found
