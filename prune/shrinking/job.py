"""The ``shrink`` job: a pruned stage's network made physically smaller."""

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from safetensors.torch import save_file

from prune.accounting import account
from prune.masks import Masks
from prune.shrinking.equivalence import given
from prune.shrinking.shrink import shrink as shrunk
from workbench.checkpoints import compact
from workbench.export.inputs import chosen, kept_inputs
from workbench.files import atomic_file
from workbench.records.source import Source
from workbench.tasks import Task
from workbench.training.fit import module_for
from workbench.training.loop import evaluated
from workbench.training.save import example_inputs, save_network


def shrink(
    of: Source,
    level: int | Literal["last", "winning"] = "last",
    data: LightningDataModule | None = None,
    task: Task | None = None,
    out: Path = Path("runs/shrink"),
) -> dict[str, Any]:
    """Take out of a pruned network what its masks leave unused: a smaller network with the same outputs.

    Channels, hidden units and attention heads go that nothing reads or that never change; what is left keeps its masks.
    Channels pruned in the structure `Coupled` all go; of weights pruned one by one only what happens to be dead.

    Args:
        of: The stage with the pruned network, or the folder of a compact checkpoint.
        level: Of a hunt: its last level, the sparsest within tolerance on validation data, or a number.
        data: The data module to score the smaller network on; by default the metrics of `of` are taken over.
        task: Loss and metrics on `data`; by default the data module's `task`, else classification over `classes`.
        out: The stage's folder, given by the recipe.

    Returns:
        Metrics, size, and under `shrunk` what became of parameters, FLOPs and layers, for the record.

    Raises:
        ValueError: If there is no network, or nothing to try it on, or it cannot be traced.
    """
    folder, record = chosen(Path(of), level)
    source = compact.find(folder)
    network, kept = compact.load(source), compact.masks(source)
    inputs = kept_inputs(folder, Path(of), source.parent)
    if not inputs and data is not None:
        inputs = example_inputs(module_for(network, data, task), data)
    if not inputs:
        raise ValueError(f"{of} kept no example inputs, which a network is traced with: give data")
    call = given(network, inputs)
    masks = Masks(kept) if kept else None
    made = shrunk(network, call, masks)
    result: dict[str, Any] = {"metrics": record.get("metrics", {}), "monitor": record.get("monitor", ["loss", "min"])}
    if data is not None:
        result["metrics"] = evaluated(module_for(made.model, data, task), data, out)
    made.model.eval()
    one = given(network, {name: value[:1] for name, value in inputs.items()})
    before, after = account(network, one, masks), account(made.model, one, made.masks)
    save_network(made.model, None, out, result, made.masks)
    with atomic_file(out / "example.safetensors") as temporary:
        save_file(inputs, temporary)
    return {
        **result,
        "shrunk": {
            "parameters": [made.before, made.after],
            "flops": [before.dense_flops, after.dense_flops],
            "largest_difference": made.difference,
            "removed": {layer: len(rows) for layer, rows in made.removed.items()},
        },
    }
