"""A policy driven by the hooks of a Lightning Trainer, of either namespace.

=========================== ====================================================================
hook of Lightning           event of :class:`prune.policies.Policy`
=========================== ====================================================================
``load_state_dict``         ``load_state_dict``
``on_train_start``          ``attach``, then ``check_budget``
``on_after_backward``       ``mask_gradients(complete=False)``, if the module steps by hand
``on_before_optimizer_step`` ``before_step``, if the optimizer's steps count as updates
(the optimizer steps)       a hook on the optimizer multiplies weights by masks
``on_train_batch_end``      ``after_step``, if there was an update or the epoch ends
``on_train_end``            ``shortfall``, as a warning
``teardown, on_exception``  ``detach``
=========================== ====================================================================
"""

import math
import warnings
from functools import partial
from typing import Any, final

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from pytorch_lightning import Callback as OtherCallback
from pytorch_lightning.callbacks import StochasticWeightAveraging as OtherSWA
from torch import nn
from torch.optim.swa_utils import AveragedModel

from prune.callbacks.best import Held, checkpointers, forget, names, of_denser, stoppers
from prune.callbacks.calibration import trainer_calibration
from prune.masks import Masks
from prune.policies import Policy, Timestamp
from prune.policies.optimizers import unscaled
from prune.policies.policy import densities
from workbench.models.wrappers import places, unwrap
from workbench.training.module import network_of

_LIGHTNING = ("lightning.", "pytorch_lightning.")


class PolicyCallback(Callback, OtherCallback):  # type: ignore[misc] - twins; a Trainer of either tree takes this
    """Attaches a policy to the module's ``network``, or to all of the module if it has none, while ``fit`` runs.

    An update is counted as ``trainer.global_step`` does: each step of each of several optimizers is one. The state of
    the policy is part of the trainer's checkpoints. Logged per epoch, with ``log``: ``density``, kept over pruned
    weights, ``model_density``, of all parameters of the network, and ``density/<parameter>`` of every layer. Averages
    of the weights that callbacks keep (WeightAveraging, StochasticWeightAveraging, any with an ``AveragedModel``) are
    masked with them.

    A criterion that needs data is calibrated on the first batches of the training loader, and the loss that
    ``training_step`` returns.

    Where gradients are clipped, those of pruned weights are zeroed before, so that they do not count in the norm. When
    a module that steps by hand clips is unknown: there they are zeroed after every ``backward``, except for updates of
    which the policy reads all gradients.

    A network that is denser than it will be scores better than what it becomes. So whenever it is pruned,
    ``ModelCheckpoint(monitor=...)`` forgets the scores of before: the best checkpoint is one at the final density, if
    one is saved there. ``EarlyStopping`` waits until then (in ``LotteryTicket``, it ends each level).

    Args:
        policy: What decides.
        log: Whether to log densities.
        part: Distinguishes, in a checkpoint, callbacks of one class that prune different parts of a network.

    Raises:
        ValueError: When training starts, if masks do not fit, ranks hold different ones, two callbacks prune the same
            weight, the strategy hides the weights from the optimizer's hooks, training is too short, or a criterion
            needs the loss of a module that steps by hand; when a checkpoint of other settings is resumed.

    Warns:
        UserWarning: By name, when training starts, if frozen weights are pruned that ``include`` does not name, or many
            weights are exactly 0 and will grow again; when it ends before the policy is complete, without a best
            checkpoint at the final density, or with weights that are not masked.
    """

    stops_levels = False  # whether early stopping ends a part of the training rather than all of it
    made_of_settings = True  # recipes make one when they are checked, and not only when its stage starts

    def __init__(self, policy: Policy, log: bool = True, part: str = "") -> None:
        self.policy, self._log, self._part = policy, log, part
        self._clips, self._step = False, 0
        self._held, self._compared = Held(), None

    @property
    @final
    def state_key(self) -> str:
        """The key of its state in checkpoints: its class, and which part of the network it is for."""
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
        self._clips, self._step = _clips(trainer, pl_module), trainer.global_step
        averages, calibration = _averages(trainer, pl_module), partial(trainer_calibration, trainer, pl_module)
        network, optimizers = network_of(pl_module), trainer.optimizers
        resumed = self.policy.attach(network, optimizers, _now(trainer, 0.0), averages, calibration)
        if not trainer.fast_dev_run:
            self.policy.check_budget(*_budget(trainer, pl_module))
        self._compared = self.masks if resumed else None
        self._compare(trainer)
        if _first(trainer, self) and _held_back(trainer) and (held := [*checkpointers(trainer), *stoppers(trainer)]):
            rank_zero_info(f"{names(held)} compare networks at the final density only")

    @final
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Keep pruned weights out of the gradients of a module that clips them and steps by hand."""
        if not pl_module.automatic_optimization:
            self.policy.mask_gradients(complete=False)

    @final
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Let the policy read the gradients; then keep those of pruned weights out of the norm, clipped next."""
        if self.policy.counts_steps_of(optimizer):
            done = trainer.fit_loop.epoch_loop.batch_idx / trainer.num_training_batches
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            with unscaled(scaler if self.policy.reads_gradients else None, trainer.optimizers):
                self.policy.before_step(_now(trainer, done), self._clips and pl_module.automatic_optimization)

    @final
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell the policy of an update, or of the end of an epoch that had none at its last batch."""
        if trainer.global_step > self._step or trainer.is_last_batch:
            self._step = trainer.global_step
            done = 1.0 if trainer.is_last_batch else (batch_idx + 1) / trainer.num_training_batches
            self.policy.after_step(_now(trainer, done))
        self._compare(trainer)

    @final
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the densities, of all such callbacks together."""
        logging = [each for each in trainer.callbacks if isinstance(each, PolicyCallback) and each._log]
        if logging and logging[0] is self:
            counts = {name: count for each in logging for name, count in each.policy.counts().items()}
            found = densities(counts, max(each.policy.parameters for each in logging))
            pl_module.log_dict(found, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    @final
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn if training ended too early, without a checkpoint at the final density, or with weights unmasked."""
        self._held.release()
        masked = self.masks is None or self.masks.is_applied_to(network_of(pl_module))
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        shortfall, denser = self.policy.shortfall(), dict(of_denser(trainer)) if _first(trainer, self) else {}
        if shortfall is not None:
            warnings.warn(f"training ended with {shortfall}", stacklevel=2)
        for each, path in denser.items():
            warnings.warn(
                f"the best checkpoint of {names([each])} is of a denser network: no other has been compared since the "
                f"last pruning. Train on after it, or use the last weights instead of {path}",
                stacklevel=2,
            )
        if not masked:
            warnings.warn(
                "weights that were pruned are not zero at the end: something has loaded or averaged others. Let it "
                "come before, or call masks.apply(network)",
                stacklevel=2,
            )

    @final
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave no hook behind."""
        self._held.release()
        self.policy.detach()

    @final
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._held.release()
        self.policy.detach()

    @final
    def state_dict(self) -> dict[str, Any]:
        """The policy's."""
        return self.policy.state_dict()

    @final
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when training starts."""
        self.policy.load_state_dict(state_dict)

    @final
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint in which a callback of this class pruned another part of the network."""
        stored, kind = checkpoint.get("callbacks", {}), type(self).__qualname__
        here = {each.state_key for each in trainer.callbacks}
        others = [str(key) for key in stored if (key == kind or str(key).startswith(f"{kind},")) and key not in here]
        if self.state_key not in stored and others:
            raise ValueError(
                f"the checkpoint was trained with {others[0]}, and {self.state_key} is given: resume with the same "
                "include and exclude, or the same masks; or start a new training from its weights"
            )

    def _compare(self, trainer: Any) -> None:
        """Let what compares by a metric forget networks that are denser than this one, and hold back early stopping."""
        before, now = self._compared, self.masks
        if now is not before:
            self._compared = now
            if now is not None and (before is None or now.density < before.density):
                forget(trainer)
        if _first(trainer, self):
            self._held.hold(trainer) if _held_back(trainer) else self._held.release()


def _first(trainer: Any, callback: PolicyCallback) -> bool:
    """Whether it is the one that acts for all of its kind."""
    return next(each for each in trainer.callbacks if isinstance(each, PolicyCallback)) is callback


def _held_back(trainer: Any) -> bool:
    """Whether early stopping is to wait for the density of a policy."""
    pruning = [each for each in trainer.callbacks if isinstance(each, PolicyCallback) and not each.stops_levels]
    return any(not each.policy.at_final_density() for each in pruning)


def _now(trainer: Any, done: float) -> Timestamp:
    """With the fraction of the epoch that is ``done``; Lightning counts whole epochs."""
    return Timestamp(trainer.global_step, trainer.current_epoch + done)


def _clips(trainer: Any, pl_module: Any) -> bool:
    """Whether the Trainer clips gradients, or a hook of the module's own may clip or log them."""
    clips = not str(pl_module.configure_gradient_clipping.__module__).startswith(_LIGHTNING)
    reads = not str(pl_module.on_before_optimizer_step.__module__).startswith((*_LIGHTNING, "workbench."))
    return bool(trainer.gradient_clip_val) or clips or reads


def _budget(trainer: Any, pl_module: Any) -> tuple[float, float]:
    """Updates and epochs that training will have, infinite where that is unknown."""
    epochs = math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
    changes = any(type(callback).__name__ == "GradientAccumulationScheduler" for callback in trainer.callbacks)
    updates = -1 if changes or not pl_module.automatic_optimization else trainer.estimated_stepping_batches
    return math.inf if updates < 0 else updates, epochs


def _averages(trainer: Any, pl_module: Any) -> list[nn.Module]:
    """Networks that the weights are averaged into, by callbacks or by the module."""
    attributes = [value for callback in trainer.callbacks for value in vars(callback).values()]
    averages = [unwrap(value) for value in (*attributes, *pl_module.modules()) if isinstance(value, AveragedModel)]
    swa = [c._average_model for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging | OtherSWA)]
    # An AveragedModel of something else, such as a critic, has other parameters.
    shapes = _shapes(network_of(pl_module))
    networks = [network_of(average) for average in (*averages, *swa) if isinstance(average, nn.Module)]
    return [network for network in networks if _shapes(network) == shapes]


def _shapes(network: nn.Module) -> dict[str, Any]:
    return {name: place.parameter.shape for name, place in places(network).items()}


def _check_strategy(trainer: Any) -> None:
    name = type(trainer.strategy).__name__
    if name in ("FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(
            f"{name} keeps the weights in flat pieces, where masks do not fit: use ModelParallelStrategy (FSDP2), "
            "which shards them by parameter"
        )
