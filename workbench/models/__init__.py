"""Models with a pluggable activation; each records in ``init_args`` what it was built with."""

from workbench.models.conv import Conv, Conv2, Conv4, Conv6
from workbench.models.densenet import DenseNet, DenseNetBC
from workbench.models.encoder import SentenceEncoder
from workbench.models.lenet import LeNet5
from workbench.models.mlp import MLP, LeNet300
from workbench.models.recurrent import Recurrent, RecurrentStack, RecurrentTokens
from workbench.models.resnet import ResNet
from workbench.models.transformer import Transformer

__all__ = [
    "MLP",
    "Conv",
    "Conv2",
    "Conv4",
    "Conv6",
    "DenseNet",
    "DenseNetBC",
    "LeNet5",
    "LeNet300",
    "Recurrent",
    "RecurrentStack",
    "RecurrentTokens",
    "ResNet",
    "SentenceEncoder",
    "Transformer",
]
