"""What a hunt is over: the module and data of an earlier stage, or those given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from prune.shrinking import Coupled
from prune.shrinking.equivalence import example_call
from workbench.launcher.arguments import rebuild
from workbench.records.source import Source
from workbench.training.fit import module_for
from workbench.training.module import network_of, with_optimizer
from workbench.training.save import example_inputs


def subject(
    start: Source | None,
    data: LightningDataModule | None,
    trainer: Mapping[str, Any] | None,
    seed: int | None,
    **plain: Any,
) -> tuple[LightningModule, LightningDataModule, Mapping[str, Any] | None, int]:
    """What is trained, on what, how, with which seed: of the stage ``start``, or as given."""
    if start is None:
        if plain["model"] is None or data is None:
            raise ValueError("nothing to hunt in: give start (a fit or distill stage), or model and data")
        return module_for(data=data, **plain), data, trainer, seed or 0
    if given := [name for name in ("model", "task") if plain[name] is not None]:
        raise ValueError(f"{', '.join(given)} is given beside start, which brings its own: give one or the other")
    module, made = rebuild(Path(start), {} if seed is None else {"seed_everything": seed})
    if family := getattr(module, "family", ()):
        raise ValueError(
            f"{start} trained a family, {', '.join(family)}: hunt in one network, of a stage that trains it alone"
        )
    module = with_optimizer(module, plain["optimizer"], plain["lr_scheduler"])
    return module, data or made["data"], {**made["trainer"], **(trainer or {})}, made["seed_everything"]


def coupled(module: LightningModule, data: LightningDataModule) -> Coupled:
    """Channels as the network's connections tie them, traced with inputs of the data module."""
    if not (inputs := example_inputs(module, data)):
        raise ValueError(
            f"structure 'coupled' traces the network with validation inputs, and {type(data).__name__} has none that "
            "are tensors: choose another structure"
        )
    return Coupled(example_call(network_of(module), inputs))
