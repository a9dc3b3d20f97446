"""Language modelling: the next token, or the masked ones."""

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from workbench.models.positions import IGNORED, valid_tokens
from workbench.tasks.base import Task, logits_of
from workbench.tasks.metrics import NLL, Accuracy, Perplexity, check_label_smoothing, cross_entropy
from workbench.tasks.outputs import OutputType

_NOT_FOR_THE_MODEL = ("labels", "prompt_lengths")


@final
class LanguageModelling(Task):
    """One token out of a vocabulary for each position: the next one, or the masked one.

    A batch is a mapping: ``input_ids`` [B, L], and perhaps ``attention_mask`` [B, L], 0 at padding on either side;
    ``labels`` [B, L], -100 where nothing counts, of the same positions as the inputs (the shift is done here);
    ``prompt_lengths`` [B], tokens at the beginning that the model was given. A causal model needs no labels: its inputs
    are. Labels and prompt lengths are not passed to the model.

    What loss, metrics and a teacher see of a causal model is shifted: position i of the output, without the last,
    belongs to token i + 1. Only the attention mask marks padding, so the end token counts if it pads unmasked; see
    `workbench.models.positions.valid_tokens`.

    Args:
        vocabulary: Number of tokens, V. Logits of an lm head that was padded to more rows are cut to it, so the rest
            takes no probability, the student's or the teacher's.
        causal: Whether the model predicts the next token; else those of ``labels``, in place.
        label_smoothing: Weight of the uniform distribution in the loss, in [0, 1); see `cross_entropy`.

    Raises:
        ValueError: An argument out of range; later, a batch or an output of another form.
    """

    def __init__(self, vocabulary: int, causal: bool = True, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if vocabulary < 2:
            raise ValueError(f"vocabulary={vocabulary}: give at least 2.")
        check_label_smoothing(label_smoothing)
        self.vocabulary = vocabulary
        self.causal = causal
        self.label_smoothing = label_smoothing

    @property
    def outputs(self) -> OutputType:
        """Classes, along the last axis."""
        return OutputType("classes")

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Negative log-likelihood, the lower the better."""
        return "nll", "min"

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """((), everything but labels and prompt lengths)."""
        self._labels(batch)
        return (), {str(key): value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}

    def targets(self, batch: Any) -> Tensor:
        """Tokens to predict, int64, -100 where none counts; [B, L - 1] if causal, else [B, L]."""
        labels = self._labels(batch)
        valid = valid_tokens(labels, batch.get("attention_mask"), batch.get("prompt_lengths"), IGNORED, self.causal)
        return (labels[:, 1:] if self.causal else labels).masked_fill(~valid, IGNORED)

    def valid(self, batch: Any) -> Tensor:
        """[B, L - 1] if causal, else [B, L]: the token counts."""
        return self.targets(batch) != IGNORED

    def aligned(self, raw: Any) -> Tensor:
        """What a model returned as logits, at the positions of `targets` and whole: [B, L - 1, ...] if causal.

        Of a model without its head (`distill.language.headless`) these are hidden states.
        """
        logits = logits_of(raw)
        if logits.ndim != 3:
            raise ValueError(f"logits are {list(logits.shape)}: a language model returns [B, L, {self.vocabulary}].")
        return logits[:, :-1] if self.causal else logits

    def output(self, raw: Any) -> Tensor:
        """Logits at the positions of `targets`, [B, L - 1, V] if causal, else [B, L, V]."""
        logits = self.aligned(raw)
        if logits.shape[-1] < self.vocabulary:
            raise ValueError(
                f"logits are {list(logits.shape)}, too narrow for vocabulary={self.vocabulary}: "
                "build the model for the tokenizer's vocabulary."
            )
        return logits[..., : self.vocabulary]

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Mean `cross_entropy` over valid positions; logits as from `output` -> scalar."""
        targets = self.targets(batch)
        if output.shape != (*targets.shape, self.vocabulary):
            raise ValueError(
                f"logits are {list(output.shape)} for targets {list(targets.shape)}, expected "
                f"{[*targets.shape, self.vocabulary]}: return one row a token, for vocabulary={self.vocabulary}."
            )
        return cross_entropy(output, targets, self.label_smoothing, IGNORED)

    def metrics(self, prefix: str = "") -> MetricCollection:
        """Metrics: nll in nats a token, perplexity, and accuracy in [0, 1], each over all valid positions seen."""
        plain = not self.label_smoothing
        metrics = {
            "nll": NLL(IGNORED, of_loss=plain),
            "perplexity": Perplexity(IGNORED, of_loss=plain),
            "accuracy": Accuracy(IGNORED),
        }
        # Likelihood and perplexity are made of the same sums.
        return MetricCollection(metrics, compute_groups=[["nll", "perplexity"], ["accuracy"]], prefix=prefix)

    def _labels(self, batch: Any) -> Tensor:
        """Labels of the inputs' own positions, [B, L]."""
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            form = f"a mapping of {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(f"the batch is {form}, without a tensor of 'input_ids': give a mapping with it.")
        labels = batch.get("labels")
        if labels is None and self.causal:
            labels = batch["input_ids"]
        if not isinstance(labels, Tensor):
            raise ValueError(
                "the batch has no tensor of labels: a model of masked tokens needs 'labels', -100 where nothing is "
                "masked, or set causal=True."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels are {labels.dtype}: give token numbers as int64.")
        if labels.shape != batch["input_ids"].shape:
            raise ValueError(
                f"labels are {list(labels.shape)} for input_ids {list(batch['input_ids'].shape)}: give one a token."
            )
        return labels.long()
