"""Distillation in transformers: a mixin for any ``Trainer``, and the plain Trainer with it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from distill.cache import CachedTeacher
from distill.features import capture
from distill.hf_columns import check_columns, columns_for, teacher_only
from distill.hf_labels import Positions, label_spec, outputs_for, scored_positions
from distill.hf_loader import CACHED_TARGETS, AddCachedTargets, first_samples
from distill.hf_vocabulary import vocabulary_for
from distill.objective import Losses, Objective, Outputs, SoftTargets, average_gradients, make_projectors, zero_of
from distill.targets import TeacherLike, as_teacher, decoder_inputs, targets_of
from distill.teacher import Teacher, eval_mode
from workbench.distributed.ranks import all_gather
from workbench.files import atomic_file
from workbench.models.positions import tokens_of
from workbench.models.wrappers import unwrap
from workbench.randomness import same_random_state
from workbench.tasks import Kind, LogitsSpec, OutputType, select_logits
from workbench.tasks.outputs import infer
from workbench.training.means import Means

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

_FILE = "distillation.safetensors"


class DistillationMixin(_Trainer):
    """Makes a ``transformers.Trainer``, or any subclass of it, train its model on a teacher as well.

    ::

        class MyTrainer(DistillationMixin, Seq2SeqTrainer): ...

        MyTrainer(model, args, ..., teacher=teacher, losses=SoftTargets(temperature=2.0, alpha=0.5)).train()

    loss = alpha * T^2 KL(teacher || model) + (1 - alpha) * own loss, or the weighted sum of the terms in ``losses``

    The own loss is that of the Trainer without a teacher: the model's, ``compute_loss_func``'s or the label
    smoother's. The teacher gets the model's inputs without labels, is in eval mode at every call, and is in no
    optimizer and no checkpoint. The gradient of an update is the mean over all valid positions, however they are
    spread over micro-batches and, with ``average_tokens_across_devices``, ranks. Valid are positions with a label other
    than -100, after the shift of a causal model; without labels all samples, or for a token model the tokens that are
    not padding. The features of a term are averaged over the tokens of a micro-batch that are not padding, and these
    averages are weighted alike.

    Columns of the data sets that student or teacher take by name arrive, and each gets those that it takes. Language
    models are compared over the ids that both tokenizers share, whatever number of rows their heads are padded to;
    tokenizers that disagree are refused.

    Logged beside ``loss``: every term by its name, the mean since the last log. Evaluation and prediction are the
    Trainer's own: ``eval_loss`` is the own loss.

    Projectors between features of unequal widths are made before the optimizer, from the first samples of the training
    set, and are among its parameters. They are not part of the model: ``save_pretrained`` leaves them out, a checkpoint
    has them in ``distillation.safetensors``, and clipping by norm leaves them out.

    Hooks of the Trainer that are overridden, in the order of a training::

        get_train_dataloader             a cached teacher's targets are attached to the batches
        create_optimizer                 projectors are made and added to the optimizer's groups
        _load_optimizer_and_scheduler    projectors of a checkpoint are loaded, before the optimizer's state
        get_batch_samples                counts the valid positions of an update, over micro-batches and ranks
        _set_signature_columns_if_needed keeps the columns of a data set that the teacher takes
        prediction_step                  leaves out what only the teacher takes
        training_step                    clears the projectors' gradients at an update's first micro-batch, and averages
                                         them over ranks after its last
        compute_loss                     the objective, scaled by this micro-batch's share of the update's positions
        log                              adds the means of the terms
        save_model                       writes the projectors into a checkpoint

    Args:
        *args: The Trainer's.
        teacher: A Teacher, a trained network, or where to load one from; or a CachedTeacher, or where to find a cache,
            made of the training set by the same collator.
        losses: The objective: :class:`~distill.SoftTargets`, or terms by name, whose features are named as in
            the model; SoftTargets() by default.
        teacher_columns: Columns of the data sets that the teacher takes, beside those that its ``forward`` names. Only
            needed for a function or a wrapper that takes ``**kwargs``; an empty list says that there are none.
        teacher_tokenizer: The teacher's tokenizer, to be compared with ``processing_class``; by default the one beside
            the weights that the teacher was loaded from, if it is on this disk, which cuts no rows off heads of equal
            size.
        vocabulary: How many ids both language models share, in place of comparing tokenizers.
        outputs: What the outputs are: ``"classes"`` along the last axis, ``"labels"``, ``"numbers"`` or
            ``"embedding"``; for classes along axis 1 ``OutputType("classes", class_dim=1)``. If None, the model's class
            says it, else ``config.problem_type``, else its own loss (one output of a classifier is a number, float
            labels are independent), else the labels of the first batch (:func:`workbench.tasks.outputs.infer`). Where
            ``compute_loss_func`` is given or a Trainer has its own ``compute_loss``, the model's loss says nothing.
        logits: Where the logits are in what the model returns: a key, an index or a function, see
            :func:`workbench.tasks.select_logits`; ``logits`` if None.
        teacher_logits: The same for the teacher.
        **kwargs: The Trainer's.

    Raises:
        ValueError: If an argument is out of range, or the Trainer's settings do not go with a teacher; tokenizers,
            heads or kinds of outputs of both do not go together; in training, before the first update, if it cannot be
            told what the outputs are, the teacher has other classes than the model, or an output that a term compares
            is missing.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self,
        *args: Any,
        teacher: TeacherLike,
        losses: Losses | None = None,
        teacher_columns: Sequence[str] | None = None,
        teacher_tokenizer: Any = None,
        vocabulary: int | None = None,
        outputs: OutputType | Kind | None = None,
        logits: LogitsSpec | None = None,
        teacher_logits: LogitsSpec | None = None,
        **kwargs: Any,
    ) -> None:
        self.teacher = as_teacher(teacher, teacher_logits)
        self.objective = Objective(SoftTargets() if losses is None else losses, outputs=outputs)
        self._logits = logits
        self._term_means = Means()
        self._new_update = True
        self._teacher_columns = columns_for(self.teacher, teacher_columns)
        super().__init__(*args, **kwargs)
        student = self.accelerator.unwrap_model(self.model)
        self._label_spec = label_spec(student, self.label_names)
        self._teacher_only = teacher_only(student, self._teacher_columns, self._label_spec.names)
        if teacher_columns is None and self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            check_columns(self.train_dataset, self._signature_columns or (), self.teacher)
        self._vocabulary = vocabulary_for(student, self.teacher, self.processing_class, teacher_tokenizer, vocabulary)
        known = self.objective.outputs or outputs_for(student, self._loss_is_the_models)
        if known is not None:
            self._resolve(known, said=outputs is not None)
        # compute_loss divides by the positions of the whole update, so the Trainer must not divide by the number of
        # micro-batches as well.
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

        ``num_items_in_batch`` is the count of :meth:`get_batch_samples`; without it the loss is a mean over this batch.
        """
        if not model.training:
            return super().compute_loss(model, self._own_inputs(inputs), return_outputs, num_items_in_batch)
        weights = self.objective.weights(self._progress)
        inputs = dict(inputs)
        cached = inputs.pop(CACHED_TARGETS, None)
        positions = scored_positions(inputs, self._label_spec)
        with capture(model, self.objective.student_layers(weights=weights)) as features:
            own, raw = self._own_loss(model, inputs, weights, positions)
            logits = self._scored(select_logits(raw, self._logits), positions, inputs)
            outputs = Outputs(logits, features.take())
        valid, labels = positions.valid, positions.targets
        if (known := self.objective.outputs) is not None:
            valid, labels = positions.shaped(logits, known, inputs.get("labels"), self._label_spec.ignored)
        # accelerate casts inside of the model's forward only; the teacher and the projectors need autocast as well.
        with self.accelerator.autocast():
            needed = self.objective.needs_teacher(weights)
            terms = self.objective(
                outputs,
                self._targets(inputs, cached, positions, weights) if needed else Outputs(None),
                weights,
                task_loss=lambda logits: zero_of(logits) if own is None else own,
                valid=valid,
                labels=labels,
                tokens=tokens_of(inputs),
            )
        loss, count = terms.pop("loss"), positions.valid.sum()
        # Without an own loss, as in a batch without labels, its term is the zero of above: not logged.
        with_loss = {name for name, term in self.objective.terms.items() if own is not None or term.loss is not None}
        self._term_means.add({name: value for name, value in terms.items() if name in with_loss}, count)
        if num_items_in_batch is not None:
            # DDP averages gradients over ranks: multiplied by their number, the mean becomes the sum that is wanted.
            ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
            loss = loss * (ranks * count / torch.as_tensor(num_items_in_batch, device=count.device).clamp(min=1))
        return (loss, raw) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an update and their number of valid positions, over all ranks if that is configured."""
        batches: list[Any]
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = [scored_positions(batch, self._label_spec).valid.sum() for batch in batches]
        count = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            gathered: Any = self.accelerator.gather(count)
            count = gathered.sum()
        return batches, count

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's loader; with a cached teacher each batch has its cached targets."""
        if not isinstance(self.teacher, CachedTeacher):
            return super().get_train_dataloader()
        prepare = self.accelerator.prepare
        # attach makes the loader anew, so it needs the plain one, before accelerate spreads its batches over the ranks.
        self.accelerator.prepare = lambda loader: loader  # type: ignore[method-assign]
        try:
            loader = self.teacher.attach(super().get_train_dataloader())
        finally:
            del self.accelerator.prepare
        loader.collate_fn = AddCachedTargets(loader.collate_fn)
        return prepare(loader)

    def _set_signature_columns_if_needed(self) -> None:
        new = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if new:
            columns = self._signature_columns or []
            self._signature_columns = [*columns, *sorted(self._teacher_columns - set(columns))]

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, without the inputs that only the teacher takes."""
        return super().prediction_step(model, self._own_inputs(inputs), *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch.

        The projectors are outside of the model: the Trainer does not clear their gradients, and DDP does not average
        them. Both happen here, at the first and after the last micro-batch of an update.
        """
        if self._new_update:
            self.objective.projectors.zero_grad()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._new_update = self.accelerator.sync_gradients
        if self._new_update:
            average_gradients(self.objective)
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the projectors among its parameters."""
        if not self.objective.projects:
            return super().create_optimizer(model)
        if self.optimizer is None or not self.objective.projectors:
            make_projectors(self.objective, *self._example_outputs())
        optimizer = super().create_optimizer(model)
        present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        new = [parameter for parameter in self.objective.projectors.parameters() if id(parameter) not in present]
        if new and self.lr_scheduler is not None:
            raise ValueError(
                "the learning-rate scheduler was made for an optimizer without the projectors that the terms need: "
                "give the Trainer no scheduler, or optimizer_cls_and_kwargs in place of both"
            )
        # As the Trainer does for its model: biases do not decay.
        for decays in (True, False):
            if group := [parameter for parameter in new if (parameter.ndim > 1) == decays]:
                optimizer.add_param_group({"params": group, "weight_decay": self.args.weight_decay if decays else 0.0})
        self._new_update = True
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; in a checkpoint the projectors as well."""
        super().save_model(output_dir, _internal_call)
        state = self.objective.projectors.state_dict()
        if _internal_call and output_dir is not None and state and self.args.should_save:
            with atomic_file(Path(output_dir) / _FILE) as temporary:
                save_file(state, temporary)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's numbers, and with those of training steps the means of the terms."""
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

    @property
    def _loss_is_the_models(self) -> bool:
        """Whether the own loss is what the model returns, rather than that of a function or of another Trainer."""
        theirs = {each for each in type(self).__mro__ if "compute_loss" in vars(each)} - {DistillationMixin, Trainer}
        return self.compute_loss_func is None and not theirs

    def _own_loss(
        self, model: nn.Module, inputs: dict[str, Any], weights: Mapping[str, float], positions: Positions
    ) -> tuple[Any, Any]:
        """The loss of the Trainer without a teacher, a mean over this batch, and the model's output.

        None for a batch without labels where no term needs that loss; 0 for one where no position is valid.
        """
        needed = any(weight and self.objective.terms[name].loss is None for name, weight in weights.items())
        if needed or any(name in inputs for name in self._label_spec.names):
            # A copy: the Trainer takes labels out of it.
            own, some = self._own_inputs(inputs), positions.valid.any()
            if positions.targets is not None:
                # A mean over no position is NaN, and so may its gradient be: such a batch gets class 0 instead, and its
                # loss does not count. Asking whether it is one would wait for the device at every micro-batch.
                for name in self._label_spec.names & own.keys():
                    if isinstance(own[name], Tensor) and not own[name].is_floating_point():
                        own[name] = own[name].masked_fill(~some, 0)
            loss_and_output: Any = super().compute_loss(model, own, return_outputs=True)
            loss, raw = loss_and_output
            return torch.where(some.to(loss.device), loss, torch.zeros_like(loss)), raw
        return None, model(**self._own_inputs(inputs))

    def _own_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the inputs without what only the teacher takes."""
        return {name: value for name, value in inputs.items() if name not in self._teacher_only}

    def _targets(
        self, inputs: dict[str, Any], cached: Any, positions: Positions, weights: Mapping[str, float] | None
    ) -> Outputs:
        """The teacher's outputs at the scored positions; without ``weights`` its features only."""
        kwargs = {name: value for name, value in inputs.items() if name not in self._label_spec.names}
        if self.model is not None:
            kwargs |= decoder_inputs(self.model, inputs)
        logits = weights is not None and self.objective.needs_logits(weights)
        layers = self.objective.teacher_layers(weights)

        def score(outputs: Tensor) -> Tensor:
            outputs = positions.of(outputs)
            return outputs if self.objective.outputs is None else self.objective.outputs.scored(outputs)

        targets = targets_of(self.teacher, (), kwargs, cached, layers=layers, logits=logits, score=score, match=True)
        return targets if targets.logits is None else targets._replace(logits=targets.logits[..., : self._vocabulary])

    def _scored(self, logits: Tensor, positions: Positions, inputs: Mapping[str, Any]) -> Tensor:
        """The model's outputs at the scored positions, in scored form; the first batch may tell what they are."""
        logits = positions.of(logits)[..., : self._vocabulary]
        if not self.objective.compares_outputs:
            return logits
        if self.objective.outputs is None:
            labels = inputs.get("labels")
            config = getattr(unwrap(self.accelerator.unwrap_model(self.model), adapters=True), "config", None)
            # What the configuration says of one output holds for the loss that the model returns.
            known = config if self._loss_is_the_models else None
            labels = labels if isinstance(labels, Tensor) else None
            self._resolve(infer(logits, labels, known, self._label_spec.ignored))
        assert self.objective.outputs is not None
        return self.objective.outputs.scored(logits)

    def _resolve(self, outputs: OutputType, said: bool = False) -> None:
        """Fix what the outputs are, which the teacher's configuration must not contradict unless it was ``said``."""
        if isinstance(self.teacher, Teacher):
            self.teacher.check_outputs(outputs)
            for network in () if said else self.teacher.networks:
                # By which loss it was trained is not known.
                if (other := outputs_for(network, own_loss=False)) not in (None, outputs):
                    raise ValueError(
                        f"the student's outputs are {outputs} and the teacher's {other}, by their classes and "
                        "config.problem_type: distil a model of one kind, or say by the argument outputs what both are"
                    )
        self.objective.resolve(outputs)

    @torch.no_grad()
    def _example_outputs(self) -> tuple[Outputs, Outputs]:
        """Features of student and teacher for the first two training samples, from which projectors are made."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "projectors, which Hint and Cosine have at any width, do not go with FSDP or DeepSpeed: compare "
                "features by SimilarityPreserving, RKD, AttentionRelation or AttentionTransfer, or train with DDP"
            )
        with same_random_state():
            loader = self.get_train_dataloader()
            batch: Any = loader.collate_fn(first_samples(loader.dataset, 2))
            inputs, model = self._prepare_inputs(batch), self.model
            assert model is not None
            layers, cached = self.objective.student_layers(), inputs.pop(CACHED_TARGETS, None)
            with eval_mode(model), self.accelerator.autocast(), capture(model, layers) as features:
                model(**self._own_inputs(inputs))
                student = Outputs(None, features.take())
                return student, self._targets(inputs, cached, scored_positions(inputs, self._label_spec), None)

    def _check(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process would drive {self.args.n_gpu} GPUs through DataParallel, whose copies hide what terms "
                "compare: start one process a GPU, torchrun --nproc-per-node, or show it one, CUDA_VISIBLE_DEVICES=0"
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if getattr(parallelism, "non_data_parallel_size", 1) > 1:
            raise ValueError(
                f"parallelism_config is {parallelism}: tensor, context and sequence parallelism split the teacher's "
                "inputs; use data parallelism, DDP or FSDP"
            )

    def _progress(self, unit: str) -> float:
        """How many epochs ("ep") or updates ("it") are done."""
        return float(self.state.global_step if unit == "it" else self.state.epoch or 0.0)


@final
class DistillationTrainer(DistillationMixin, Trainer):
    """``transformers.Trainer`` with a teacher; :class:`DistillationMixin` documents the arguments.

    Example:
        >>> DistillationTrainer(student, args, train_dataset=data, teacher=teacher, losses=SoftTargets(2.0)).train()
    """


def _over_ranks(means: Means) -> dict[str, float]:
    """Means over all ranks. Every rank calls this."""
    rows = all_gather(means.local())
    sums = {name: [sum(part) for part in zip(*(row[name] for row in rows if name in row))] for name in rows[0]}
    return {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}
