"""A callback that logs how a network is while it trains, in either Lightning namespace."""

from typing import Any, final

from lightning.pytorch import Callback
from pytorch_lightning import Callback as OtherCallback

from workbench.diagnostics.gradients import gradient_flow
from workbench.diagnostics.units import dead_units, gate_statistics
from workbench.duration import Duration
from workbench.training.calibration import FirstBatches, TrainingLoss, batch_runner
from workbench.training.module import network_of


@final
class Diagnose(Callback, OtherCallback):  # type: ignore[misc] - twins; a Trainer of either tree takes this
    """Looks at the module's ``network``, or at all of the module if it has none, on training batches, and logs it.

    Logged, each as the mean over the looks of an epoch: ``dead``, the share of dead units, and ``zero``, of those that
    are always 0, see :func:`dead_units`; ``gate/<site>``, E f'(z)^2, see :func:`gate_statistics`; ``gradient_flow``, on
    the weights that callbacks with ``masks`` keep, and ``gradient_ratio``, see :func:`gradient_flow`. With ``layers``
    also ``dead/<site>`` and ``gradient_flow/<parameter>``. Training goes on as if it had not been looked at.

    Args:
        every: Time between two looks, in epochs, at whose end it is, or in updates, as ``trainer.global_step`` counts
            them.
        batches: How many of the first batches of the training loader it looks at.
        layers: Log every layer, too.

    Attributes:
        last: What was found last: ``units``, ``gates`` and ``gradients``, as the functions give it.

    Raises:
        ValueError: If an argument is out of range; when training starts, if the module steps its optimizers by hand,
            or there are several training loaders.
    """

    made_of_settings = True  # recipes make one when they are checked, and not only when its stage starts

    def __init__(self, every: str | Duration = "1ep", batches: int = 1, layers: bool = False) -> None:
        self.every, self.batches, self.layers = Duration.parse(every), batches, layers
        if self.every.value < 1:
            raise ValueError(f"every is {self.every}: give at least 1ep or 1it")
        if batches < 1:
            raise ValueError(f"batches is {batches}: give 1 or more")
        self.last: dict[str, Any] = {}
        self._seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the module can be looked at."""
        self._seen = trainer.global_step
        self._shown(trainer, pl_module)
        TrainingLoss(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look, if it is time."""
        stepped, self._seen = trainer.global_step > self._seen, trainer.global_step
        if self.every.unit == "ep":
            due = trainer.is_last_batch and (trainer.current_epoch + 1) % self.every.value == 0
        else:
            due = stepped and trainer.global_step % self.every.value == 0
        if due:
            self._look(trainer, pl_module)
            pl_module.log_dict(self._numbers(), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def _shown(self, trainer: Any, pl_module: Any) -> FirstBatches:
        precision = trainer.precision_plugin
        return FirstBatches(trainer.train_dataloader, self.batches, pl_module, trainer.datamodule, precision)

    def _look(self, trainer: Any, pl_module: Any) -> None:
        network, precision = network_of(pl_module), trainer.precision_plugin
        shown, run = self._shown(trainer, pl_module), batch_runner(pl_module, precision)
        held = [masks for each in trainer.callbacks if (masks := getattr(each, "masks", None)) is not None]
        masks = {name: mask for each in held for name, mask in each.items()}
        self.last = {
            "units": dead_units(network, shown, run),
            "gates": gate_statistics(network, shown, run),
            "gradients": gradient_flow(network, shown, TrainingLoss(pl_module, precision), masks),
        }

    def _numbers(self) -> dict[str, float]:
        units, gradients = self.last["units"], self.last["gradients"]
        metrics = {f"gate/{site}": row["slope_squared"] for site, row in self.last["gates"].items()}
        if every := sum(row["units"] for row in units.values()):
            metrics |= {word: sum(row[word] for row in units.values()) / every for word in ("dead", "zero")}
        metrics["gradient_flow"] = gradients["total"]
        if gradients["ratio"] is not None:
            metrics["gradient_ratio"] = gradients["ratio"]
        if self.layers:
            metrics |= {f"dead/{site}": row["dead"] / row["units"] for site, row in units.items()}
            metrics |= {f"gradient_flow/{name}": value for name, value in gradients["layers"].items()}
        return metrics
