"""Tasks: what a kind of problem needs besides a model - how to read a batch, a loss, metrics."""

from workbench.tasks.base import LogitsSpec, Task, find_logits, logits_of, loss_weight, scored, select_logits
from workbench.tasks.binary import Binary
from workbench.tasks.classification import Classification
from workbench.tasks.imitation import Embedding, Imitation
from workbench.tasks.language import LanguageModelling
from workbench.tasks.metrics import NLL, Accuracy, Perplexity, cross_entropy, update_metrics
from workbench.tasks.multilabel import MultiLabel
from workbench.tasks.outputs import Kind, OutputType
from workbench.tasks.regression import Regression
from workbench.tasks.segmentation import Segmentation

__all__ = [
    "NLL",
    "Accuracy",
    "Binary",
    "Classification",
    "Embedding",
    "Imitation",
    "Kind",
    "LanguageModelling",
    "LogitsSpec",
    "MultiLabel",
    "OutputType",
    "Perplexity",
    "Regression",
    "Segmentation",
    "Task",
    "cross_entropy",
    "find_logits",
    "logits_of",
    "loss_weight",
    "scored",
    "select_logits",
    "update_metrics",
]
