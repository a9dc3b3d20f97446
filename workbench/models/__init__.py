"""Models with a pluggable activation; each records in ``init_args`` what it was built with."""

from workbench.models.encoder import SentenceEncoder
from workbench.models.lenet import LeNet5
from workbench.models.mlp import MLP, LeNet300
from workbench.models.resnet import ResNet

__all__ = ["MLP", "LeNet5", "LeNet300", "ResNet", "SentenceEncoder"]
