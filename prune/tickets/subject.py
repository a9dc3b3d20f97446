"""What a hunt trains: the module and data of an earlier stage, or those given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from prune.shrinking import Coupled
from prune.shrinking.equivalence import example_call
from workbench.launcher.arguments import rebuild
from workbench.records.source import Source
from workbench.training.fit import module_for
from workbench.training.module import network_of, with_optimizer
from workbench.training.save import example_inputs


@dataclass(frozen=True)
class Subject:
    """What a hunt trains, on which data, how.

    Args:
        module: The module, untrained.
        data: Its data module.
        trainer: Arguments of Lightning's Trainer.
        seed: Of the initial weights, the data order and everything random in training.

    Attributes:
        network: The part of the module that is pruned and saved.
    """

    module: LightningModule
    data: LightningDataModule
    trainer: Mapping[str, Any]
    seed: int
    network: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", network_of(self.module))


def subject(
    start: Source | None,
    data: LightningDataModule | None,
    trainer: Mapping[str, Any] | None,
    seed: int | None,
    **plain: Any,
) -> Subject:
    """That of the stage ``start`` as far as nothing else is given, or as given.

    Args:
        start: A fit or distill stage.
        data: Instead of its data module.
        trainer: Arguments of a Trainer that replace its own.
        seed: Instead of its seed; 0 by default without a stage.
        plain: ``model``, ``task``, ``optimizer`` and ``lr_scheduler``, as :func:`module_for` takes them.

    Raises:
        ValueError: If there is nothing to train, or two things.
    """
    if start is None:
        if plain["model"] is None or data is None:
            raise ValueError("nothing to hunt in: give start (a fit or distill stage), or model and data")
        return Subject(module_for(data=data, **plain), data, trainer or {}, seed or 0)
    if twice := [name for name in ("model", "task") if plain[name] is not None]:
        raise ValueError(f"{', '.join(twice)} is given beside start, which brings its own: give one or the other")
    module, arguments = rebuild(Path(start), {} if seed is None else {"seed_everything": seed})
    if family := getattr(module, "family", ()):
        raise ValueError(
            f"{start} trained a family, {', '.join(family)}: hunt in one network, of a stage that trains it alone"
        )
    module = with_optimizer(module, plain["optimizer"], plain["lr_scheduler"])
    trainer = {**arguments["trainer"], **(trainer or {})}
    return Subject(module, data or arguments["data"], trainer, arguments["seed_everything"])


def coupled(of: Subject) -> Coupled:
    """Channels as the network's connections tie them, traced with inputs of the data module."""
    if not (inputs := example_inputs(of.module, of.data)):
        raise ValueError(
            f"structure 'coupled' traces the network with validation inputs, and {type(of.data).__name__} has none "
            "that are tensors: choose another structure"
        )
    return Coupled(example_call(of.network, inputs))
