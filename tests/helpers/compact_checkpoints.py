"""Helpers of the tests in tests/workbench/checkpoints/compact."""

from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from torch import Tensor, nn


def magnitude(model: nn.Module, density: float = 0.1) -> dict[str, Tensor]:
    """Masks of the largest weights of every matrix, applied."""
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            mask = torch.zeros(parameter.numel(), dtype=torch.bool)
            order = parameter.detach().float().abs().flatten().argsort(descending=True, stable=True)
            mask[order[: round(density * len(mask))]] = True
            masks[name] = mask.view_as(parameter)
            parameter.data.masked_fill_(~masks[name], 0)
    return masks


def same(one: Tensor, other: Tensor) -> bool:
    bits = (one.detach().reshape(-1).view(torch.uint8), other.detach().reshape(-1).view(torch.uint8))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert same(tensor, second[name]), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bert(**options: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(
        BertConfig(vocab_size=40, max_position_embeddings=12, num_labels=3, **shape, **options)
    )


class Odd(nn.Module):
    """Everything that a state may hold."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.init_args = {"width": width}
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.wide = nn.Linear(width, width, dtype=torch.float64)
        self.half = nn.Linear(width, width, dtype=torch.float16)
        self.brain = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("counts", torch.arange(4, dtype=torch.int16))
        self.register_buffer("large", torch.tensor(2**40))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("odd", torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())


class Given(lp.LightningModule):
    """A user's own module, which says what it was built with the Lightning way."""

    def __init__(self, width: int, activation: str = "relu") -> None:
        super().__init__()
        self.save_hyperparameters()
        act = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]()
        self.layers = nn.Sequential(nn.Linear(4, width), act, nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Plain(nn.Module):
    """Takes nothing, so there is nothing to say."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
