"""The files of a trained network in a stage's folder: compact checkpoint, example inputs; and its size."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench import records
from workbench.checkpoints import compact
from workbench.distributed.ranks import barrier, check_ranks_agree, full_tensor, rank
from workbench.distributed.sharding import full_state_dict
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
    outputs: Mapping[str, Any] | None = None,
) -> None:
    """Write the network to ``out/compact`` and example inputs to ``out/example.safetensors``.

    The checkpoint's provenance says what its outputs are: the module's task knows, or ``outputs`` says it. Adds
    ``size`` to ``result``. Of a family it is the network called ``member``. Ranks above zero write no files.
    """
    network = network_of(module).get_submodule(member)
    folder = out / compact.FOLDER
    check_ranks_agree(network)
    state = full_state_dict(network)
    if rank() == 0:
        if compact.describe(network) is None:
            warnings.warn(
                f"{type(network).__name__} does not record its constructor's arguments, so its checkpoint loads only "
                "into a given module: load(path, model=...). Let it keep its arguments, as JSON, in self.init_args, or "
                "call save_hyperparameters() in a LightningModule",
                stacklevel=2,
            )
        if isinstance(task := getattr(module, "task", None), Task):
            outputs = asdict(task.outputs)
        provenance = {"metrics": result["metrics"]} | ({"outputs": dict(outputs)} if outputs else {})
        compact.save(network, folder, masks, provenance=provenance, state=state)
        if example and data is not None and (inputs := example_inputs(module, data)):
            with atomic_file(out / "example.safetensors") as temporary:
                save_file(inputs, temporary)
    barrier()
    result["size"] = size_of(network, masks, folder)


def size_of(network: nn.Module, masks: Mapping[str, Tensor] | None, folder: Path) -> dict[str, int]:
    """Numbers of parameters, prunable, kept and nonzero weights; bytes in dense fp32 and of the checkpoint's files.

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
        "nonzero": sum(int(full_tensor(parameter.detach()).count_nonzero()) for parameter in parameters),
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
    inputs = {**{f"input_{i}": value for i, value in enumerate(args)}, **kwargs}
    if not all(isinstance(value, Tensor) for value in inputs.values()):
        return {}
    return {name: value[:_SAMPLES].detach().cpu().contiguous() for name, value in inputs.items()}


def save_family(
    module: SupervisedModule,
    data: LightningDataModule,
    out: Path,
    result: dict[str, Any],
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Write each network of a family as ``out/NAME/compact`` with a separate record; adds ``students``."""
    result["students"] = {}
    for name in module.family:
        member = {"metrics": _of_member(result["metrics"], name), "monitor": result["monitor"]}
        member["history"] = [_of_member(row, name) for row in result["history"]]
        kept = {key.removeprefix(f"{name}."): mask for key, mask in (masks or {}).items() if key.startswith(f"{name}.")}
        save_network(module, data, out / name, member, kept or None, member=name)
        if rank() == 0:
            records.write(out / name, {"stage": f"{out.name}/{name}", "status": "finished", **member})
        result["students"][name] = member


def _of_member(row: Mapping[str, float], member: str) -> dict[str, float]:
    """The values of a row that belong to one student or to the whole family, by names without the student's."""
    values: dict[str, float] = {}
    for name, value in row.items():
        split, _, rest = name.partition("/")
        owner, _, metric = rest.partition("/")
        if not metric or owner == member:
            values[f"{split}/{metric}" if metric else name] = value
    return values
