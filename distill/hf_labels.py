"""Where models of transformers are scored: which of their inputs are labels, the causal shift, what counts."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForSequenceClassificationLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from workbench.models.positions import IGNORED, tokens_of, valid_tokens
from workbench.models.wrappers import unwrap
from workbench.tasks import OutputType
from workbench.tasks.outputs import of_problem

_PER_TOKEN = ("ForMaskedLM", "ForTokenClassification")
_PER_PIXEL = "ForSemanticSegmentation"


class LabelSpec(NamedTuple):
    """How a model's class uses its labels.

    Args:
        names: The arguments that are labels.
        causal: Whether position i of the output is scored against label i + 1.
        tokens: Whether every token is scored, rather than every sample.
        ignored: The label of positions that do not count.
    """

    names: frozenset[str]
    causal: bool
    tokens: bool
    ignored: int = IGNORED


def label_spec(model: nn.Module, names: Iterable[str] = ("labels",)) -> LabelSpec:
    """How a model reads its labels.

    A transformers model is causal if its class is one for causal language modelling, or its loss is, and it is no
    encoder-decoder, whose decoder's inputs are shifted already.
    """
    base = unwrap(model, adapters=True)
    classes = {each.__name__ for each in type(base).__mro__}
    decoders = _causal_classes()
    by_loss = LOSS_MAPPING.get(str(getattr(base, "loss_type", None))) is ForCausalLMLoss
    both = getattr(getattr(base, "config", None), "is_encoder_decoder", False) and not classes & decoders
    causal = bool(classes & decoders or by_loss) and not both
    tokens = causal or any(name.endswith(_PER_TOKEN) for name in classes)
    pixels = any(name.endswith(_PER_PIXEL) for name in classes)
    ignored = getattr(base.config, "semantic_loss_ignore_index", IGNORED) if pixels else IGNORED
    return LabelSpec(frozenset({*names, "labels", "label", "label_ids", "shift_labels"}), causal, tokens, ignored)


def outputs_for(model: nn.Module, own_loss: bool = True) -> OutputType | None:
    """What the outputs of a transformers model are, by its class and configuration; None where only labels tell.

    Args:
        model: The model.
        own_loss: Whether it is trained on its own loss, which for one output is the squared error.
    """
    base: Any = unwrap(model, adapters=True)
    config: Any = getattr(base, "config", None)
    if not hasattr(config, "model_type"):
        return None
    if any(each.__name__.endswith(_PER_PIXEL) for each in type(base).__mro__):
        return OutputType("classes", class_dim=1) if config.num_labels > 1 else OutputType("labels")
    head = getattr(base, "get_output_embeddings", lambda: None)()
    if label_spec(model).tokens or head is not None:
        return OutputType("classes")
    if (known := of_problem(config)) is not None:
        return known
    by_labels = LOSS_MAPPING.get(str(getattr(base, "loss_type", None))) is ForSequenceClassificationLoss
    return OutputType("numbers") if by_labels and own_loss and config.num_labels == 1 else None


class Positions(NamedTuple):
    """Where a batch is scored.

    Args:
        valid: Bool: the positions that count.
        targets: Their classes, of the same shape; None if there are none.
        cut: Whether the last output of each sequence is scored nowhere.
    """

    valid: Tensor
    targets: Tensor | None = None
    cut: bool = False

    def of(self, outputs: Tensor) -> Tensor:
        """The outputs that are scored, of [B, L, ...] those before the last if ``cut``."""
        return outputs[:, :-1] if self.cut else outputs

    def shaped(
        self, logits: Tensor, outputs: OutputType, labels: Any = None, ignored: int = IGNORED
    ) -> tuple[Tensor, Tensor | None]:
        """Valid positions of scored logits, and the labels there.

        Args:
            logits: Outputs in scored form.
            outputs: What they are.
            labels: The labels as the batch has them.
            ignored: The label of positions that do not count.

        Raises:
            ValueError: If the labels do not fit.
        """
        if outputs.elementwise or outputs.class_dim != -1:
            own = labels if isinstance(labels, Tensor) else None
            if own is not None and not own.is_floating_point() and own.dtype != torch.bool:
                own = own.long()  # small integers have no room for the ignored label
            if own is not None and outputs.elementwise and own.ndim == 3 and logits.ndim == 4:
                own = own.unsqueeze(1)  # of a segmentation in two
            return outputs.positions(logits, own, ignored)
        shape = logits.shape[:-1]
        if self.valid.numel() != shape.numel() and outputs.kind == "embedding":
            raise ValueError(
                f"the outputs are embeddings {list(logits.shape)}, and one of each sample is compared, [B, D]: pool "
                "them, such as logits=lambda output: output.last_hidden_state.mean(1)"
            )
        if self.valid.numel() != shape.numel():
            raise ValueError(
                f"labels or masks have {list(self.valid.shape)} positions and the scored logits {list(logits.shape)}: "
                "distil models that score every sample or every token of their inputs"
            )
        return self.valid.reshape(shape), None if self.targets is None else self.targets.reshape(shape)


def scored_positions(inputs: Mapping[str, Any], label_spec: LabelSpec) -> Positions:
    """The positions of a batch that a model is scored at.

    Those of a class label other than -100, after the shift of a causal model, or as they are in ``shift_labels``; each
    sample where labels are no classes; without labels each token that the attention mask calls real, or each sample.
    """
    ready, labels = inputs.get("shift_labels"), inputs.get("labels")
    targets = labels if ready is None else ready
    if isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.dtype == torch.bool):
        cut = label_spec.causal and ready is None and targets.ndim == 2
        # As long first: to uint8 labels -100 would be 156.
        targets = (targets[:, 1:] if cut else targets).long()
        return Positions(targets != label_spec.ignored, targets, cut)
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    tokens = inputs.get("input_ids")
    if targets is None and label_spec.tokens and isinstance(tokens, Tensor) and tokens.ndim == 2:
        valid = valid_tokens(tokens, tokens_of(inputs), causal=label_spec.causal)
        return Positions(valid, tokens[:, 1:] if label_spec.causal else None, label_spec.causal)
    return Positions(torch.ones(len(first), dtype=torch.bool, device=first.device))


@functools.cache
def _causal_classes() -> frozenset[str]:
    """Names of the classes for causal language modelling."""
    return frozenset(name for each in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _as_tuple(each))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
