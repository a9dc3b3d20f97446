"""The ``shrink`` job: a pruned stage's network made physically smaller."""

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from safetensors.torch import save_file

from prune.accounting import account
from prune.masks import Masks
from prune.shrinking.equivalence import example_call
from prune.shrinking.shrink import shrink as shrink_network
from workbench.checkpoints import compact
from workbench.export.inputs import load_example_inputs, select_level
from workbench.files import atomic_file
from workbench.records.source import Source
from workbench.tasks import Task
from workbench.training.fit import module_for
from workbench.training.loop import evaluate
from workbench.training.save import example_inputs, save_network


def shrink(
    of: Source,
    level: int | Literal["last", "winning"] | None = None,
    data: LightningDataModule | None = None,
    task: Task | None = None,
    out: Path = Path("runs/shrink"),
) -> dict[str, Any]:
    """Remove what the masks of a pruned network leave unused: a smaller network with the same outputs.

    Channels, hidden units and attention heads are removed if nothing reads them or if they are constant; the rest keeps
    its masks. Channels pruned in the structure `Coupled` are all removed. If weights were pruned one by one, only
    channels that happen to be unused are removed.

    Args:
        of: The stage with the pruned network, or the folder of a compact checkpoint.
        level: For a hunt: `winning`, the sparsest level within tolerance on validation data, which the report
            recommends; `last`; or the number of a level. By default `winning`, or `last` without validation scores.
        data: The data module to score the smaller network on; by default the record keeps the metrics of `of`.
        task: Loss and metrics on `data`; by default the data module's `task`, else classification over `classes`.
        out: The stage's folder, given by the recipe.

    Returns:
        Metrics, size, and under `shrunk` parameters and FLOPs before and after, and removed units, for the record.

    Raises:
        ValueError: If there is no network, no example input to trace it with, or it cannot be traced.
    """
    folder, record = select_level(Path(of), level)
    source = compact.find(folder)
    network, kept = compact.load(source), compact.masks(source)
    inputs = load_example_inputs(folder, Path(of), source.parent)
    if not inputs and data is not None:
        inputs = example_inputs(module_for(network, data, task=task), data)
    if not inputs:
        raise ValueError(f"{of} has no example inputs to trace the network with: give data")
    call = example_call(network, inputs)
    masks = Masks(kept) if kept else None
    smaller = shrink_network(network, call, masks)
    result: dict[str, Any] = {"metrics": record.get("metrics", {}), "monitor": record.get("monitor", ["loss", "min"])}
    if data is not None:
        result["metrics"] = evaluate(module_for(smaller.model, data, task=task), data, out)
    smaller.model.eval()
    one = example_call(network, {name: value[:1] for name, value in inputs.items()})
    before, after = account(network, one, masks), account(smaller.model, one, smaller.masks)
    outputs = compact.read_index(source)["provenance"].get("outputs")
    save_network(smaller.model, None, out, result, smaller.masks, outputs=outputs)
    with atomic_file(out / "example.safetensors") as temporary:
        save_file(inputs, temporary)
    return {
        **result,
        "shrunk": {
            "parameters": [smaller.before, smaller.after],
            "flops": [before.dense_flops, after.dense_flops],
            "largest_difference": smaller.difference,
            "removed": {layer: len(rows) for layer, rows in smaller.removed.items()},
        },
    }
