"""A hunt over a function that trains: for loops that are nobody's Trainer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

from torch import Tensor, nn

from prune.masks import Masks
from prune.masks.memory import distributed
from prune.pruner import Pruner
from prune.rewinding.snapshot import Snapshot
from prune.tickets.arms import Hunt
from prune.tickets.densities import densities_of
from prune.tickets.identity import settings_of
from prune.tickets.level import Level, Moments
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
    levels: int | None = None,
    rate: float = 0.2,
    fall: float | None = None,
    patience: int = 1,
    rewind: str | Duration = "0it",
    rewinding: str = "all",
    order: Literal["same", "fresh"] = "same",
    controls: Iterable[str] = (),
    other: str | Path | None = None,
    pruner: Pruner | None = None,
    loader: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    monitor: tuple[str, Literal["min", "max"]] = ("accuracy", "max"),
    seed: int = 0,
    checkpoint: str | Duration = "500it",
    out: str | Path = "runs/tickets",
) -> list[dict[str, Any]]:
    """Hunt a lottery ticket in a training that is a function: ``prune.hunt`` for a loop of your own.

    ``train(model, level)`` trains the model in place and returns its metrics. It is called for every level, and for
    every control of a level, and has to do the same every time: make its optimizer, and schedulers if it has some, say
    ``level.begin(optimizer, scheduler)``, and make its updates. What is pruned stays zero by itself.

    What is stopped, at any moment, goes on when called again with a model made alike, seeded as before: of a level that
    was begun from its last snapshot, on the CPU with the same bits.

    Args:
        model: The network. Afterwards it has the weights of the last level.
        train: The function.
        density: As for ``prune.hunt``: share of the prunable weights to reach, or the density of every level.
        levels: How many times to prune, instead.
        rate: Share of the remaining weights pruned at each level.
        fall: End once the score has fallen by more than this below level 0's.
        patience: For how many levels in a row it has to have fallen.
        rewind: Where each level starts, in updates: "0it" is the initial weights, "500it" after 500 updates.
        rewinding: What goes back there: ``"all"``, ``"weights"``, ``"learning_rate"`` or with ``"fine_tuning"``
            nothing. In fine-tuning ``level.step`` goes on from the end, learning rates are held at the last ones used,
            and ``scheduler.step()`` does nothing.
        order: Whether ``level.seed`` is the same at every level, or another one at each.
        controls: Trained beside the ticket at each level: ``"reinit"``, ``"shuffled"``, ``"random"``, ``"dense"``,
            ``"twin"``.
        other: Folder of another hunt in the same network: its mask is one more control.
        pruner: Which weights go; the smallest of the whole network by default.
        loader: Batches that a criterion is shown which looks at data.
        loss: Model and batch -> loss, for a criterion that wants one.
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
        >>> from prune import find_tickets
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
        >>> levels = find_tickets(model, train, density=0.25, rate=0.5, rewind="8it", controls=["random"])
        >>> [level["density"] for level in levels], levels[2]["steps"]
        ([1.0, 0.5, 0.25], [8, 40])
        >>> levels[2]["controls"]["random"]["metrics"].keys()
        dict_keys(['val/accuracy'])
    """
    densities, out = densities_of(density, levels, rate, fall), Path(out)
    controls = (*controls, *(("other",) if other else ()))
    point, every = _updates("rewind", rewind, 0), _updates("checkpoint", checkpoint, 1)
    pruner = Pruner(seed=seed) if pruner is None else pruner
    pruner.check(model, *densities)
    chosen = {"rate": rate, "densities": densities, "rewind": point, "rewinding": rewinding, "order": order}
    chosen |= {"train": train, "pruner": pruner, "monitor": monitor, "seed": seed}
    settings = settings_of(model, **chosen)
    trainee = FunctionTrainee(model, train, seed, point, every, out / "checkpoints", monitor, loader, loss)
    store = Store(out, records.fingerprint(settings), settings)
    given = {"controls": controls, "other": None if other is None else Path(other), "fall": fall, "patience": patience}
    with locked(out):
        done = search(Hunt(trainee, pruner, densities, store, rewinding, order, **given))
    model.load_state_dict(store.weights(len(done) - 1))
    return done


@final
class FunctionTrainee(Trainee):
    """Trains a model by calling a function; moments of level 0 are files of its own.

    Args:
        network: The model.
        function: Trains it in place and returns its metrics.
        seed: Of level 0.
        rewind: Updates before the rewind point.
        every: Updates between two snapshots to resume from.
        folder: Where the moments are kept.
        monitor: The main metric without its prefix, and its direction.
        loader: Batches for a criterion that looks at data.
        loss: The loss for a criterion that wants one.

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
        moments = Moments(self._point, self._end, folder / "checkpoints" / "last.pt")
        with same_random_state(arm.seed):
            self.network.train()
            self.network.zero_grad()
            running = Level(self.network, arm, level, self.rewind, self.every, moments, self._first)
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

    def pruned(self, pruner: Pruner, density: float, within: Masks) -> Masks:
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

    def points(self) -> dict[str, str]:
        """See :class:`Trainee`."""
        paths = {"point": self._point, "end": self._end}
        return {name: sha256(path) for name, path in paths.items() if path.is_file()}

    def _checked(self, returned: Any) -> dict[str, float]:
        name = f"val/{self.monitor[0]}"
        if not isinstance(returned, Mapping) or name not in returned:
            found = sorted(returned) if isinstance(returned, Mapping) else type(returned).__name__
            raise ValueError(f"the function returned {found}: return metrics by name, with {name!r} (see monitor)")
        return {str(key): float(value) for key, value in returned.items()}


def _updates(what: str, given: str | Duration, least: int) -> int:
    duration = Duration.parse(given)
    if duration.unit != "it" or duration.value < least:
        raise ValueError(f"{what} is {duration}: a function has updates only, give {max(least, 500)}it or the like")
    return duration.value
