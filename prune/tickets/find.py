"""A hunt over a function that trains: for training loops without a Trainer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, final

from torch import Tensor, nn

from prune.levels import Levels
from prune.masks import Masks
from prune.masks.memory import distributed
from prune.pruner import Pruner
from prune.rewinding.modes import Rewind
from prune.rewinding.snapshot import Snapshot
from prune.tickets.arms import Hunt
from prune.tickets.controls import ControlName, Controls
from prune.tickets.identity import settings_of
from prune.tickets.level import Checkpoints, Level
from prune.tickets.search import search
from prune.tickets.store import Store
from prune.tickets.trainee import Arm, Trainee
from workbench import records
from workbench.checkpoints import compact
from workbench.distributed.ranks import barrier, check_ranks_agree, rank, world_size
from workbench.duration import Duration
from workbench.files import sha256
from workbench.randomness import same_random_state
from workbench.records.lock import locked
from workbench.training.save import size_of

Train = Callable[[nn.Module, Level], Mapping[str, Any]]


def find_tickets(
    model: nn.Module,
    train: Train,
    *,
    density: float | Sequence[float] | None = None,
    levels: int | Levels | None = None,
    rewind: str | Duration | Rewind = "0it",
    controls: Sequence[ControlName] | Controls = (),
    pruner: Pruner | None = None,
    loader: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    monitor: tuple[str, Literal["min", "max"]] = ("accuracy", "max"),
    seed: int = 0,
    checkpoint: str | Duration = "500it",
    out: str | Path = "runs/tickets",
) -> list[dict[str, Any]]:
    """Hunt a lottery ticket in a training that is a function: ``prune.hunt`` for a loop of your own.

    ``train(model, level)`` trains the model in place and returns its metrics. It is called for every level and every
    control of a level, and has to do the same each time: make its optimizer, and schedulers if it has some, call
    ``level.begin(optimizer, scheduler)``, and make its updates. Pruned weights are kept at zero.

    To resume a hunt that was stopped, at any moment, call it again with a model built and seeded in the same way. A
    level that had begun resumes from its last snapshot, on the CPU with the same bits.

    Args:
        model: The network. Afterwards it has the weights of the last level.
        train: The function.
        density: Share of the prunable weights to reach: the last level is the first at or below it. Or a list with the
            density of every level.
        levels: How many times to prune, instead of ``density``; or a ``Levels``, without ``early_stop``.
        rewind: Where each level starts, in updates: "0it" is the initial weights, "500it" after 500 updates; or a
            ``Rewind``. In fine-tuning ``level.step`` goes on from the end of level 0, learning rates are held at the
            last ones used, and ``scheduler.step()`` does nothing. With a fresh order each level has its own
            ``level.seed``.
        controls: Which controls are trained beside the ticket at each level: names, or a ``Controls`` without
            ``connectivity``; ``diagnose`` has no effect here.
        pruner: Selects the weights to prune; by default the smallest magnitudes of the whole network.
        loader: Batches for a criterion that needs data.
        loss: Model and batch -> loss, for a criterion that needs one.
        monitor: The metric that levels are compared by, which the function returns as ``val/NAME``, and its direction.
        seed: Of everything random in training.
        checkpoint: Updates between two snapshots to resume from.
        out: The folder of the levels.

    Returns:
        The record of each level, with those of its ``controls``: ``density``, ``metrics``, ``mask_hash``, ``steps`` (at
        its beginning and end), ``rewind`` (what went back and what did not) and more. ``out/level_NN`` holds the
        network: ``workbench.load(out / "level_03", model=model)``.

    Raises:
        ValueError: If an argument is out of range; if ``out`` holds the levels of another hunt, or files that were
            altered; if the function begins no training, makes no update, or returns no ``val/NAME``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from prune import Levels, find_tickets
        >>> _ = torch.manual_seed(0)
        >>> inputs = torch.randn(160, 8)
        >>> labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
        >>> data = DataLoader(TensorDataset(inputs[:128], labels[:128]), batch_size=16, shuffle=True)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
        >>> def train(model, level):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ...     scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        ...     level.begin(optimizer, scheduler)
        ...     for x, y in level.batches(data, 40):
        ...         nn.functional.cross_entropy(model(x), y).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         scheduler.step()
        ...     right = model(inputs[128:]).argmax(1) == labels[128:]
        ...     return {"val/accuracy": right.float().mean()}
        >>> levels = find_tickets(model, train, levels=Levels(2, rate=0.5), rewind="8it", controls=["random"])
        >>> [level["density"] for level in levels], levels[2]["steps"]
        ([1.0, 0.5, 0.25], [8, 40])
        >>> levels[2]["controls"]["random"]["metrics"].keys()
        dict_keys(['val/accuracy'])
    """
    levels, rewind, controls, out = _parsed(levels, density, rewind, controls, out)
    densities, point = levels.densities(), _updates("rewind", rewind.at, 0)
    pruner = Pruner(seed=seed) if pruner is None else pruner
    pruner.check(model, *densities)
    chosen = {"rate": levels.rate, "densities": densities, "rewind": rewind.settings(), "monitor": monitor}
    chosen["pruner"] = replace(pruner, allocation=pruner.axes.allocation)
    chosen |= {} if loss is None else {"loss": loss}
    settings = settings_of(model, model, **chosen, train=train, seed=seed)
    every = _updates("checkpoint", checkpoint, 1)
    trainee = FunctionTrainee(model, train, seed, point, every, out / "checkpoints", monitor, loader, loss)
    store = Store(out, records.fingerprint(settings), settings)
    ends = {"max_drop": levels.max_drop, "patience": levels.patience}
    with locked(out):
        done = search(Hunt(trainee, pruner, densities, store, rewind, controls, **ends))
    model.load_state_dict(store.weights(len(done) - 1))
    return done


@final
class FunctionTrainee(Trainee):
    """Trains a model by calling a function; snapshots are files of its own.

    Args:
        network: The model.
        function: Trains it in place and returns its metrics.
        seed: Of level 0.
        rewind: Updates before the rewind point.
        every: Updates between two snapshots to resume from.
        folder: Where the snapshots of level 0 are kept.
        monitor: The main metric without its prefix, and its direction.
        loader: Batches for a criterion that needs data.
        loss: The loss for a criterion that needs one.

    Raises:
        ValueError: If the model's weights are sharded.
    """

    def __init__(
        self,
        network: nn.Module,
        function: Train,
        seed: int,
        rewind: int,
        every: int,
        folder: Path,
        monitor: tuple[str, Literal["min", "max"]],
        loader: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        if any(distributed(parameter) for parameter in network.parameters()):
            raise ValueError("the model is sharded, and a snapshot is written whole: train on one device, or with DDP")
        self.network, self.function, self.seed, self.monitor = network, function, seed, monitor
        self.rewind, self.every = rewind, every
        self.loader, self.loss = loader, loss
        self._point, self._end = folder / "rewind.pt", folder / "end.pt"
        self._first = Snapshot.take(network, rng=False)

    def train(self, arm: Arm, folder: Path, part: tuple[int, int, str], level: int) -> dict[str, Any]:
        """See :class:`Trainee`."""
        checkpoints = Checkpoints(self._point, self._end, folder / "checkpoints" / "last.pt")
        with same_random_state(arm.seed):
            self.network.train()
            self.network.zero_grad()
            running = Level(self.network, arm, level, self.rewind, self.every, checkpoints, self._first)
            try:
                returned = self.function(self.network, running)
            finally:
                running.release()
            steps = running.finish()
        metrics = self._checked(returned)
        return {
            "metrics": metrics,
            "history": [],
            "monitor": list(self.monitor),
            "world_size": world_size(),
            "steps": list(steps),
        }

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """See :class:`Trainee`."""
        self.network.load_state_dict(weights)

    def select_masks(self, pruner: Pruner, density: float, within: Masks) -> Masks:
        """See :class:`Trainee`."""
        with same_random_state(self.seed):
            return pruner(self.network, density, within=within, loader=self.loader, loss=self.loss)

    def save(self, folder: Path, result: dict[str, Any], masks: Masks) -> None:
        """See :class:`Trainee`."""
        check_ranks_agree(self.network)
        if rank() == 0:
            compact.save(self.network, folder / "compact", masks, provenance={"metrics": result["metrics"]})
        barrier()
        result["size"] = size_of(self.network, masks, folder / "compact")

    def point_hashes(self) -> dict[str, str]:
        """See :class:`Trainee`."""
        paths = {"point": self._point, "end": self._end}
        return {name: sha256(path) for name, path in paths.items() if path.is_file()}

    def _checked(self, returned: Any) -> dict[str, float]:
        name = f"val/{self.monitor[0]}"
        if not isinstance(returned, Mapping) or name not in returned:
            what = sorted(returned) if isinstance(returned, Mapping) else type(returned).__name__
            raise ValueError(f"the function returned {what}: return metrics by name, with {name!r} (see monitor)")
        return {str(key): float(value) for key, value in returned.items()}


def _parsed(
    levels: int | Levels | None,
    density: float | Sequence[float] | None,
    rewind: str | Duration | Rewind,
    controls: Sequence[ControlName] | Controls,
    out: str | Path,
) -> tuple[Levels, Rewind, Controls, Path]:
    """The short spellings of arguments as the objects that they mean.

    Raises:
        ValueError: If one is out of range, or needs a Trainer.
    """
    spec, controls = Levels.parse(levels, density), Controls.parse(controls)
    if spec.early_stop is not None or controls.connectivity:
        needs = "levels.early_stop" if spec.early_stop is not None else "controls.connectivity"
        raise ValueError(f"{needs} needs a LightningModule and its data: use prune.hunt, or leave it out")
    return spec, Rewind.parse(rewind), controls, Path(out)


def _updates(what: str, given: str | Duration, least: int) -> int:
    duration = Duration.parse(given)
    if duration.unit != "it" or duration.value < least:
        raise ValueError(f"{what} is {duration}: a function counts updates only, give {max(least, 500)}it or the like")
    return duration.value
