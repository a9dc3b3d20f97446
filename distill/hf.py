"""Distillation in transformers: a mixin for any ``Trainer``, and the plain Trainer with it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from distill.cache import CachedBatch, CachedTeacher
from distill.features import capture
from distill.hf_labels import Positions, label_spec, scored_positions
from distill.objective import Outputs, Term, average_gradients, make_projectors, objective_of
from distill.targets import TeacherLike, as_teacher, targets_of
from distill.teacher import eval_mode
from workbench.distributed.ranks import everyone
from workbench.files import atomic_file
from workbench.models.positions import tokens_of
from workbench.randomness import same_random_state
from workbench.tasks import logits_of
from workbench.training.means import Means

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

_CACHED = "cached_targets"
_FILE = "distillation.safetensors"


class DistillationMixin(_Trainer):
    """Makes a ``transformers.Trainer``, or any class made from it, train its model on a teacher as well.

    ::

        class Mine(DistillationMixin, Seq2SeqTrainer): ...

        Mine(model, args, ..., teacher=teacher, temperature=2.0, alpha=0.5).train()

    loss = alpha * T^2 KL(teacher || model) + (1 - alpha) * own loss, or the weighted sum of ``losses``

    The own loss is that of the Trainer without a teacher: the model's, ``compute_loss_func``'s or the label
    smoother's. The teacher gets the model's inputs without labels, is in eval mode at every call, and is in no
    optimizer and no checkpoint. The gradient of an update is the mean over all positions that count, however they are
    shared out among micro-batches and, with ``average_tokens_across_devices``, ranks: those of a label other than
    -100, of a causal model after its shift; without labels the samples, of a token model the tokens that are not
    padding. The features of a term are averaged over the tokens of a micro-batch that are not padding, and these
    averages are weighed alike.

    Logged beside ``loss``: every term by its name, the mean since the last log. Evaluation and prediction are the
    Trainer's own: ``eval_loss`` is the own loss.

    Projectors between unequal widths are made before the optimizer, from the first samples of the training set, and are
    parameters of it. They are no part of the model: ``save_pretrained`` knows nothing of them, a checkpoint has them
    in ``distillation.safetensors``, and clipping by norm leaves them out.

    Args:
        *args: The Trainer's.
        teacher: A Teacher, a trained network, or where to load one from; or a CachedTeacher, or where to find a cache,
            made of the training set by the same collator and without columns that the model does not take.
        temperature: T > 0.
        alpha: Weight of the soft targets, 0 (own loss only) to 1 (teacher only).
        losses: The terms of the objective by name, instead of ``temperature`` and ``alpha``; their features are named
            as in the model.
        **kwargs: The Trainer's.

    Raises:
        ValueError: If an argument is out of range, or the Trainer is set up in a way that does not go with a teacher;
            in training, if the teacher's classes are not the model's, or what a term compares is not there.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self,
        *args: Any,
        teacher: TeacherLike,
        temperature: float = 4.0,
        alpha: float = 0.9,
        losses: Mapping[str, Term] | None = None,
        **kwargs: Any,
    ) -> None:
        self.teacher = as_teacher(teacher)
        self.objective = objective_of(temperature, alpha, losses)
        self._term_means = Means()
        self._update_is_new = True
        super().__init__(*args, **kwargs)
        self._label_spec = label_spec(self.accelerator.unwrap_model(self.model), self.label_names)
        # The loss that compute_loss returns is a share of the whole update's mean already.
        self.loss_is_scaled_for_ga = True
        self._check()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the terms in training, the own loss in evaluation.

        ``num_items_in_batch`` is what :meth:`get_batch_samples` counted; without it the loss is a mean over this batch.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights = self.objective.weights(self._elapsed)
        inputs = dict(inputs)
        cached = inputs.pop(_CACHED, None)
        positions = scored_positions(inputs, self._label_spec)
        with capture(model, self.objective.student_layers(weights=weights)) as features:
            own, outputs = self._own(model, inputs, weights)
            logits = positions.of(logits_of(outputs))
            seen = Outputs(logits, features.take())
        valid, labels = positions.shaped(logits)
        # As the model: half precision is cast inside of its forward only.
        with self.accelerator.autocast():
            asks = self.objective.needs_teacher(weights)
            terms = self.objective(
                seen,
                self._targets(inputs, cached, positions, weights) if asks else Outputs(None),
                weights,
                own=lambda logits: logits.new_zeros(()) if own is None else own,
                valid=valid,
                labels=labels,
                tokens=tokens_of(inputs),
            )
        loss, count = terms.pop("loss"), valid.sum()
        known = {
            name: value
            for name, value in terms.items()
            if own is not None or self.objective.terms[name].loss is not None
        }
        self._term_means.add(known, count)
        if num_items_in_batch is not None:
            ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
            loss = loss * (ranks * count / torch.as_tensor(num_items_in_batch, device=count.device).clamp(min=1))
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an update, and how many positions count in them, on all ranks if that is wanted."""
        batches: list[Any]
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        count = (
            torch.stack([scored_positions(batch, self._label_spec).valid.sum() for batch in batches]).sum().to(device)
        )
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            every: Any = self.accelerator.gather(count)
            count = every.sum()
        return batches, count

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's; of a cached teacher each batch with what that says."""
        if not isinstance(self.teacher, CachedTeacher):
            return super().get_train_dataloader()
        prepare = self.accelerator.prepare
        # The loader as it is before accelerate deals its batches out, for that is what can be made again.
        self.accelerator.prepare = lambda loader: loader  # type: ignore[method-assign]
        try:
            loader = self.teacher.attach(super().get_train_dataloader())
        finally:
            del self.accelerator.prepare
        loader.collate_fn = _AddCachedTargets(loader.collate_fn)
        return prepare(loader)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch forward and backward; after the last one of an update the ranks share projector gradients."""
        if self._update_is_new:
            # The Trainer clears the gradients of its model alone.
            self.objective.projectors.zero_grad()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._update_is_new = self.accelerator.sync_gradients
        if self._update_is_new:
            average_gradients(self.objective)
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, and in it the projectors."""
        if not self.objective.projects:
            return super().create_optimizer(model)
        if self.optimizer is None or not self.objective.projectors:
            make_projectors(self.objective, *self._example_outputs())
        optimizer = super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        new = [parameter for parameter in self.objective.projectors.parameters() if id(parameter) not in known]
        if new and self.lr_scheduler is not None:
            raise ValueError(
                "the learning-rate scheduler was made for an optimizer without the projectors that the terms need: "
                "give the Trainer no scheduler, or optimizer_cls_and_kwargs in place of both"
            )
        for decays in (True, False):
            if group := [parameter for parameter in new if (parameter.ndim > 1) == decays]:
                optimizer.add_param_group({"params": group, "weight_decay": self.args.weight_decay if decays else 0.0})
        self._update_is_new = True
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model alone; into a checkpoint the projectors too."""
        super().save_model(output_dir, _internal_call)
        state = self.objective.projectors.state_dict()
        if _internal_call and output_dir is not None and state and self.args.should_save:
            with atomic_file(Path(output_dir) / _FILE) as temporary:
                save_file(state, temporary)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's numbers; where they are of training steps, the terms by name."""
        if "loss" in logs:
            logs = {**logs, **_over_ranks(self._term_means)}
            self._term_means.reset()
        super().log(logs, start_time)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.objective.projectors.state_dict():
            if not (path := Path(checkpoint) / _FILE).is_file():
                raise ValueError(
                    f"'{checkpoint}' has no {_FILE}, and the terms need projectors: resume a checkpoint of a training "
                    "with the same terms, without save_only_model"
                )
            self.objective.projectors.load_state_dict(load_file(path))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _own(self, model: nn.Module, inputs: dict[str, Any], weights: Mapping[str, float]) -> tuple[Any, Any]:
        """The loss that the Trainer would have without a teacher, a mean over this batch, and the model's output."""
        wanted = any(weight and self.objective.terms[name].loss is None for name, weight in weights.items())
        if wanted or any(name in inputs for name in self._label_spec.names):
            # A copy: labels are taken out of it.
            found: Any = super().compute_loss(model, dict(inputs), return_outputs=True)
            return found
        return None, model(**inputs)

    def _targets(
        self, inputs: dict[str, Any], cached: Any, positions: Positions, weights: Mapping[str, float] | None
    ) -> Outputs:
        named = {name: value for name, value in inputs.items() if name not in self._label_spec.names}
        shifted: Any = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shifted is not None and "labels" in inputs and "decoder_input_ids" not in inputs:
            # What the model makes of its labels by itself.
            named["decoder_input_ids"] = shifted(labels=inputs["labels"])
        asks = weights is not None and self.objective.needs_logits(weights)
        layers = self.objective.teacher_layers(weights)
        return targets_of(self.teacher, (), named, cached, layers, asks, positions.of)

    @torch.no_grad()
    def _example_outputs(self) -> tuple[Outputs, Outputs]:
        """Features of the first samples, by which projectors are measured."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "projectors, which Hint and Cosine have at any width, do not go with FSDP or DeepSpeed: compare "
                "features by SimilarityPreserving, RKD, AttentionRelation or AttentionTransfer, or train with DDP"
            )
        with same_random_state():
            loader = self.get_train_dataloader()
            batch: Any = loader.collate_fn(_first(loader.dataset, 2))
            inputs, model = self._prepare_inputs(batch), self.model
            assert model is not None
            layers, cached = self.objective.student_layers(), inputs.pop(_CACHED, None)
            with eval_mode(model), self.accelerator.autocast(), capture(model, layers) as features:
                model(**inputs)
                seen = Outputs(None, features.take())
                return seen, self._targets(inputs, cached, scored_positions(inputs, self._label_spec), None)

    def _check(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process would drive {self.args.n_gpu} GPUs through DataParallel, whose copies hide what terms "
                "compare: start one process a GPU, torchrun --nproc-per-node, or show it one, CUDA_VISIBLE_DEVICES=0"
            )
        shared = getattr(self.accelerator, "parallelism_config", None)
        if getattr(shared, "non_data_parallel_size", 1) > 1:
            raise ValueError(
                f"parallelism_config is {shared}: tensor, context and sequence parallelism split what the teacher is "
                "asked about; use data parallelism, DDP or FSDP"
            )

    def _elapsed(self, unit: str) -> float:
        """Epochs or updates done so far."""
        return float(self.state.global_step if unit == "it" else self.state.epoch or 0.0)


@final
class DistillationTrainer(DistillationMixin, Trainer):
    """``transformers.Trainer`` with a teacher; see :class:`DistillationMixin` for the arguments and what they do.

    Example:
        >>> DistillationTrainer(student, args, train_dataset=data, teacher=teacher, temperature=2.0).train()
    """


@dataclass(frozen=True)
class _AddCachedTargets:
    """What a Trainer can do with the batches of a cached teacher's loader: the Trainer's mapping, and one entry more.

    Args:
        collate: Of that loader.
    """

    collate: Callable[[Any], CachedBatch]

    def __call__(self, samples: Any) -> dict[str, Any]:
        """Put a batch together."""
        batch, cached = self.collate(samples)
        return {**batch, _CACHED: cached}


def _first(samples: Any, count: int) -> Any:
    """The first samples of a data set, as a loader fetches them."""
    if isinstance(samples, IterableDataset):
        return list(islice(samples, count))
    indices = list(range(min(count, len(samples))))
    together = getattr(samples, "__getitems__", None)
    return together(indices) if together else [samples[index] for index in indices]


def _over_ranks(means: Means) -> dict[str, float]:
    """Means over what all ranks have seen. Called on every rank."""
    rows = everyone(means.local())
    sums = {name: [sum(part) for part in zip(*(row[name] for row in rows if name in row))] for name in rows[0]}
    return {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}
