"""Models with a pluggable activation; each records in ``init_args`` what it was built with.

Names are loaded on first use: reading a checkpoint imports the parts below and no model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "Conv": "workbench.models.conv",
    "Conv2": "workbench.models.conv",
    "Conv4": "workbench.models.conv",
    "Conv6": "workbench.models.conv",
    "DenseNet": "workbench.models.densenet",
    "DenseNetBC": "workbench.models.densenet",
    "SentenceEncoder": "workbench.models.encoder",
    "LeNet5": "workbench.models.lenet",
    "MLP": "workbench.models.mlp",
    "LeNet300": "workbench.models.mlp",
    "Recurrent": "workbench.models.recurrent",
    "RecurrentStack": "workbench.models.recurrent",
    "RecurrentTokens": "workbench.models.recurrent",
    "ResNet": "workbench.models.resnet",
    "Transformer": "workbench.models.transformer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workbench.models' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
