"""Early-bird tickets: drawn when the mask that a network would be pruned with stops changing."""

from typing import Any, Literal, final, get_args

from lightning.pytorch import Callback
from pytorch_lightning import Callback as OtherCallback

from prune.callbacks.calibration import trainer_calibration
from prune.masks import Masks
from prune.pruner import Pruner
from prune.schedule import check_density
from workbench.training.module import network_of

Distance = Literal["relative", "hamming"]


@final
class EarlyBird(Callback, OtherCallback):  # type: ignore[misc] - twins; a Trainer of either tree takes this
    """After every training epoch, draws the mask that ``pruner`` would select, and its distance from the last.

    Nothing is pruned: train ``ticket`` under :class:`KeepMasked`. The ticket is drawn when the newest mask is nearer
    than ``threshold`` to each of the ``window`` - 1 before it, as in the authors' program; to compare each with the
    next is less strict. Logged per epoch: ``mask_distance``, from the mask of the epoch before. Its state is part of
    the trainer's checkpoints, with the masks of the window, one bit a weight. A second ``fit`` starts anew.

    The distance is the Hamming distance divided by what unrelated masks of the same layers' densities have: 0 for the
    same mask, 1 for chance. The paper's, the plain share of weights that differ, is 2 d (1 - d) by chance at density d:
    below 5 % that is less than the paper's threshold of 0.1, and any two masks are a ticket.

    Args:
        pruner: Draws the masks, of the module's ``network`` or of all of the module if it has none.
        density: Share of the prunable weights it would keep, in (0, 1].
        threshold: In (0, 1], in the unit of ``distance``.
        window: How many masks are compared, 2 or more.
        stop: End training when the ticket is drawn.
        batches: How many training batches a criterion that needs data is calibrated on.
        distance: ``relative`` to chance, or ``hamming``, the paper's.

    Attributes:
        distances: From the mask of the epoch before, for every epoch but the first.
        farthest: The largest of those from the masks in the window, for every epoch but the first.
        drawn_at: After how many epochs of this training the ticket was drawn; None if it was not.
        ticket: Its masks.

    Raises:
        ValueError: If an argument is out of range; when training starts, if the pruner cannot choose in this network,
            or its criterion needs data that is not there.

    Source: You et al., "Drawing Early-Bird Tickets: Towards More Efficient Training of Deep Networks", 2020,
    arXiv:1909.11957, section 3.
    """

    made_of_settings = True  # recipes make one when they are checked, and not only when its stage starts

    def __init__(
        self,
        pruner: Pruner,
        density: float,
        threshold: float = 0.1,
        window: int = 5,
        stop: bool = False,
        batches: int = 16,
        distance: Distance = "relative",
    ) -> None:
        check_density(density)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}: give a distance above 0, up to 1")
        if window < 2:
            raise ValueError(f"window is {window}: compare 2 masks or more")
        if distance not in get_args(Distance):
            raise ValueError(f"distance is {distance!r}: choose from {', '.join(get_args(Distance))}")
        self.pruner, self.density, self.threshold, self.window = pruner, density, threshold, window
        self.distance: Distance = distance
        self.stop, self._batches = stop, batches
        self._reset()

    @property
    def state_key(self) -> str:
        """Under which its state is in checkpoints."""
        axes = self.pruner.axes
        chosen = f"{self.density}, {self.window}, {self.distance}"
        return f"EarlyBird, {axes.criterion.name}, {type(axes.structure).__name__}, {chosen}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start anew; a checkpoint that is resumed is read later."""
        if stage == "fit":
            self._reset()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that masks can be drawn."""
        self.pruner.check(network_of(pl_module), self.density)
        trainer_calibration(trainer, pl_module, self.pruner.axes.criterion, self._batches)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw a mask, and the ticket if it is time."""
        if trainer.current_epoch == self._last:
            return  # resumed at the end of an epoch
        self._last = trainer.current_epoch
        data = trainer_calibration(trainer, pl_module, self.pruner.axes.criterion, self._batches)
        drawn = self.pruner(network_of(pl_module), self.density, **data).to("cpu")
        if self._window:
            distances = [getattr(Masks.from_state_dict(m).overlap(drawn), self.distance) for m in self._window]
            self.distances.append(distances[-1])
            self.farthest.append(max(distances))
            pl_module.log("mask_distance", distances[-1], on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
            full = len(distances) == self.window - 1
            if self.drawn_at is None and full and max(distances) < self.threshold:
                self.drawn_at, self.ticket = len(self.distances) + 1, drawn
                trainer.should_stop = trainer.should_stop or self.stop
        self._window = [*self._window, drawn.state_dict()][1 - self.window :]

    def state_dict(self) -> dict[str, Any]:
        """Masks in the window, distances, and the ticket."""
        ticket = None if self.ticket is None else self.ticket.state_dict()
        lists = {"window": list(self._window), "distances": list(self.distances), "farthest": list(self.farthest)}
        return {**lists, "ticket": ticket, "drawn_at": self.drawn_at, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._window = list(state_dict["window"])
        self.distances, self.farthest = list(state_dict["distances"]), list(state_dict["farthest"])
        self.ticket = None if state_dict["ticket"] is None else Masks.from_state_dict(state_dict["ticket"])
        self.drawn_at, self._last = state_dict["drawn_at"], state_dict["last"]

    def _reset(self) -> None:
        self._window: list[dict[str, Any]] = []
        self.distances: list[float] = []
        self.farthest: list[float] = []
        self.drawn_at: int | None = None
        self.ticket: Masks | None = None
        self._last: int | None = None
