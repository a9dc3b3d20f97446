"""Tasks: what a kind of problem needs besides a model - how to read a batch, a loss, metrics."""

from workbench.tasks.base import Task, find_logits, logits_of
from workbench.tasks.classification import Classification
from workbench.tasks.imitation import Embedding, Imitation
from workbench.tasks.language import LanguageModelling
from workbench.tasks.metrics import NLL, Accuracy, Perplexity, cross_entropy
from workbench.tasks.outputs import Kind, OutputType
from workbench.tasks.regression import Regression

__all__ = [
    "NLL",
    "Accuracy",
    "Classification",
    "Embedding",
    "Imitation",
    "Kind",
    "LanguageModelling",
    "OutputType",
    "Perplexity",
    "Regression",
    "Task",
    "cross_entropy",
    "find_logits",
    "logits_of",
]
