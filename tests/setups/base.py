"""One row of the table of users' set-ups, and the list of the rows that must be there."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """A network, a loop or a trainer of the kind that people bring along.

    Args:
        topic: A key of NAMED.
        name: One of the names there.
        check: Builds it as its owner would, runs it and asserts the right value.
    """

    topic: str
    name: str
    check: Callable[[], None]


NAMED: dict[str, tuple[str, ...]] = {
    "one logit": (
        "a linear layer to one number under BCE",
        "transformers with num_labels=1",
        "a cross-encoder with the callback",
        "logits squeezed to [B]",
        "the callback on a binary module",
        "the trainer on a binary model",
    ),
    "independent labels": (
        "multi_label_classification in a trainer",
        "a multi-label module with the callback",
        "a shift of every teacher logit",
    ),
    "dense outputs": ("segmentation [B, C, H, W]", "frames [B, C, T]", "tokens [B, L, C]"),
    "outputs of another form": ("a dict", "a tuple", "several heads", "unlike forms of student and teacher"),
    "columns": ("a BERT teacher of a DistilBERT student",),
    "teacher features in a wider dtype": ("7e4 beside an fp16 student", "1.003 beside a bf16 student"),
    "valid positions of a task": ("the callback on GPT-2 with padding", "the documented valid= of a causal model"),
    "labels all ignored": ("a micro-batch of a trainer", "chunked with alpha 1"),
    "fused attention": ("attention relations of GPT-2",),
    "vocabularies": ("padded to unlike sizes", "unlike tokenizers"),
    "density": (
        "LSTM",
        "GRU",
        "RNN",
        "weight_norm of old",
        "weight_norm as a parametrization",
        "spectral_norm of old",
        "spectral_norm as a parametrization",
        "fused experts of Mixtral",
        "TransformerEncoder",
        "MultiheadAttention with unlike widths",
        "transposed convolutions",
        "a bilinear layer",
        "matrices of a layer of one's own stay dense",
        "the page's headline is the model's density",
    ),
    "adapters": ("LoRA beside a pruned base", "a merge that keeps the base's mask"),
    "data of a criterion": ("a trainer's data sorted by label",),
    "scores of groups": ("Taylor", "SNIP"),
    "floor of the global allocation": ("turned off by an argument",),
    "feed-forward units": ("Segformer",),
    "resuming with another schedule": ("another density", "another end"),
    "a compiled module": ("fitted once, then distilled",),
    "better by less than delta": ("an advantage of .003 at delta .02",),
    "diverged arms": ("dense in every seed", "every control"),
    "many levels": ("twelve without any ticket", "groups of hunts"),
    "early bird": ("unrelated masks at a low density",),
    "barriers": ("points and split of a hunt",),
    "an edited network": ("forward edited under a recipe", "a helper beside it edited"),
    "best checkpoints": (
        "ModelCheckpoint beside GradualPruning",
        "EarlyStopping beside GradualPruning",
        "load_best_model_at_end",
        "a bare loop that reloads its best weights",
    ),
    "a bare loop": ("resumed without the policy's state", "ended before the pruning did"),
    "wrappers": ("compile", "DDP", "FSDP", "fully_shard", "Fabric", "AveragedModel", "PEFT", "accelerate"),
    "optimizers that evaluate inside their step": ("L-BFGS",),
    "tasks": ("Binary", "MultiLabel", "Segmentation"),
    "one scoring": ("half precision against full", "the recommended level is exported", "why a level is no ticket"),
}
