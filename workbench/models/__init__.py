"""Models with a pluggable activation; each records in ``init_args`` what it was built with.

Names are imported on first use: reading a checkpoint imports the parts below and no model.
"""

from typing import TYPE_CHECKING

from workbench import lazy

if TYPE_CHECKING:
    from workbench.models import activations
    from workbench.models.conv import Conv, Conv2, Conv4, Conv6
    from workbench.models.densenet import DenseNet, DenseNetBC
    from workbench.models.encoder import SentenceEncoder
    from workbench.models.lenet import LeNet5
    from workbench.models.mlp import MLP, LeNet300
    from workbench.models.recurrent import Recurrent, RecurrentStack, RecurrentTokens
    from workbench.models.resnet import ResNet
    from workbench.models.transformer import Transformer
    from workbench.models.unet import UNet

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
    "UNet",
    "activations",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "MLP": "workbench.models.mlp",
        "Conv": "workbench.models.conv",
        "Conv2": "workbench.models.conv",
        "Conv4": "workbench.models.conv",
        "Conv6": "workbench.models.conv",
        "DenseNet": "workbench.models.densenet",
        "DenseNetBC": "workbench.models.densenet",
        "LeNet300": "workbench.models.mlp",
        "LeNet5": "workbench.models.lenet",
        "Recurrent": "workbench.models.recurrent",
        "RecurrentStack": "workbench.models.recurrent",
        "RecurrentTokens": "workbench.models.recurrent",
        "ResNet": "workbench.models.resnet",
        "SentenceEncoder": "workbench.models.encoder",
        "Transformer": "workbench.models.transformer",
        "UNet": "workbench.models.unet",
        "activations": "workbench.models.activations",
    },
)
