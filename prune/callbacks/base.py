"""What every callback here does: translate the events of a Trainer, of either Lightning namespace, to a policy."""

import math
import warnings
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from pytorch_lightning import Callback as OtherCallback
from pytorch_lightning.callbacks import StochasticWeightAveraging as OtherSWA
from torch import nn
from torch.amp.grad_scaler import OptState
from torch.optim.swa_utils import AveragedModel

from prune.callbacks.calibration import evidence
from prune.criteria import Criterion
from prune.masks import Masks
from prune.masks.enforce import bare
from prune.policies import Moment, Policy
from prune.policies.ownership import scaled_back
from prune.policies.policy import densities
from workbench.training.module import network_of

_LIGHTNING = ("lightning.", "pytorch_lightning.")


class Sparsifying(Callback, OtherCallback, ABC):  # type: ignore[misc] - twins; a Trainer of either tree takes this
    """Attaches a policy to the module's ``network``, or to all of the module if it has none, while ``fit`` runs.

    An update is counted as ``trainer.global_step`` does: each step of each of several optimizers is one. The state of
    the policy is part of the trainer's checkpoints. Logged per epoch, with ``log``: ``density``, kept over prunable
    weights, and ``density/<parameter>`` of every layer. Averages of the weights that callbacks keep (WeightAveraging,
    StochasticWeightAveraging, any with an ``AveragedModel``) are masked with them.

    A criterion that looks at data is shown the first ``batches`` batches of the training loader, and the loss that
    ``training_step`` gives.

    Where gradients are clipped, those of pruned weights are zero before, so that they do not count in the norm. Nobody
    knows when a module that steps by hand clips: there they are zero from ``backward`` on, but for the updates of which
    the policy looks at all gradients.

    Raises:
        ValueError: When training starts, if masks do not fit, ranks hold different ones, two callbacks prune the same
            weight, the strategy hides the weights from the optimizer's hooks, training is too short, or a criterion
            wants the loss of a module that steps by hand.

    Warns:
        UserWarning: By name, when training starts, if frozen weights are pruned that ``include`` does not name; when it
            ends before the policy's aim was reached.
    """

    made_of_settings = True  # recipes make one when they are checked, and not only when its stage starts

    def __init__(self, policy: Policy, log: bool = True, part: str = "", batches: int = 16) -> None:
        self.policy, self._log, self._part, self._batches = policy, log, part, batches
        self._clips, self._seen = False, 0

    @property
    @final
    def state_key(self) -> str:
        """Under which its state is in checkpoints: its name, and which part of the network it is for."""
        return type(self).__qualname__ + self._part

    @property
    @final
    def masks(self) -> Masks | None:
        """Those in force, or None. They stay after training."""
        return self.policy.masks

    @final
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """After weights and optimizer have been restored, before the first batch."""
        _check_strategy(trainer)
        self._clips, self._seen = _clips(trainer, pl_module), trainer.global_step
        averages = _averages(trainer, pl_module)

        def shown(criterion: Criterion) -> dict[str, Any]:
            loader, precision = (lambda: trainer.train_dataloader), trainer.precision_plugin
            return evidence(criterion, pl_module, loader, self._batches, trainer.datamodule, precision)

        self.policy.attach(network_of(pl_module), trainer.optimizers, _moment(trainer, 0.0), averages, shown)
        if not trainer.fast_dev_run:
            self.policy.check_budget(*_budget(trainer, pl_module))

    @final
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Keep pruned weights out of the gradients of a module that clips them and steps by hand."""
        if not pl_module.automatic_optimization:
            self.policy.mask_gradients(whole=False)

    @final
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Let the policy look at the gradients; then keep those of pruned weights out of the norm, clipped next."""
        if self.policy.leads(optimizer):
            done = trainer.fit_loop.epoch_loop.batch_idx / trainer.num_training_batches
            with _unscaled(trainer, self.policy.reads_gradients):
                self.policy.before_step(_moment(trainer, done), self._clips and pl_module.automatic_optimization)

    @final
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the policy go on, if there was an update or the epoch ends without one."""
        if trainer.global_step > self._seen or trainer.is_last_batch:
            self._seen = trainer.global_step
            done = 1.0 if trainer.is_last_batch else (batch_idx + 1) / trainer.num_training_batches
            self.policy.after_step(_moment(trainer, done))

    @final
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the densities, of all such callbacks together."""
        logging = [each for each in trainer.callbacks if isinstance(each, Sparsifying) and each._log]
        if logging and logging[0] is self:
            counts = {name: count for each in logging for name, count in each.policy.counts().items()}
            pl_module.log_dict(densities(counts), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    @final
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if training ended too early."""
        unmet = self.policy.unmet()
        if unmet is not None and not trainer.fast_dev_run and trainer.is_global_zero:
            warnings.warn(f"training ended with {unmet}", stacklevel=2)

    @final
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave no hook behind."""
        self.policy.detach()

    @final
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook behind, whatever happened."""
        self.policy.detach()

    @final
    def state_dict(self) -> dict[str, Any]:
        """The policy's."""
        return self.policy.state_dict()

    @final
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when training starts."""
        self.policy.load_state_dict(state_dict)


def _moment(trainer: Any, done: float) -> Moment:
    return Moment(trainer.global_step, trainer.current_epoch + done)


@contextmanager
def _unscaled(trainer: Any, wanted: bool) -> Iterator[None]:
    """Inside, no gradient is multiplied by the scale of half precision, if that is ``wanted``.

    Those of an optimizer that unscales them itself, as fused ones do, still are; so are those of optimizers whose turn
    comes later.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if not wanted or scaler is None or not scaler.is_enabled():
        yield
        return
    states = scaler._per_optimizer_states
    with scaled_back(scaler, [each for each in trainer.optimizers if states[id(each)]["stage"] is OptState.READY]):
        yield


def _clips(trainer: Any, pl_module: Any) -> bool:
    """Whether gradients are clipped or looked at, by the Trainer or by the module itself."""
    clips = not str(pl_module.configure_gradient_clipping.__module__).startswith(_LIGHTNING)
    looks = not str(pl_module.on_before_optimizer_step.__module__).startswith((*_LIGHTNING, "workbench."))
    return bool(trainer.gradient_clip_val) or clips or looks


def _budget(trainer: Any, pl_module: Any) -> tuple[float, float]:
    """Updates and epochs that training will have, infinite where nobody knows."""
    epochs = math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
    changes = any(type(callback).__name__ == "GradientAccumulationScheduler" for callback in trainer.callbacks)
    updates = -1 if changes or not pl_module.automatic_optimization else trainer.estimated_stepping_batches
    return math.inf if updates < 0 else updates, epochs


def _averages(trainer: Any, pl_module: Any) -> list[nn.Module]:
    """Networks that the weights are averaged into, by callbacks or by the module."""
    held = [value for callback in trainer.callbacks for value in vars(callback).values()]
    found = [bare(value) for value in (*held, *pl_module.modules()) if isinstance(value, AveragedModel)]
    swa = [c._average_model for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging | OtherSWA)]
    shapes = _shapes(network_of(pl_module))
    networks = [network_of(average) for average in (*found, *swa) if isinstance(average, nn.Module)]
    return [network for network in networks if _shapes(network) == shapes]


def _shapes(network: nn.Module) -> dict[str, Any]:
    return {name: parameter.shape for name, parameter in bare(network).named_parameters()}


def _check_strategy(trainer: Any) -> None:
    name = type(trainer.strategy).__name__
    if name in ("FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(
            f"{name} keeps the weights in flat pieces, where masks do not fit: use ModelParallelStrategy (FSDP2), "
            "which shards them by parameter"
        )
