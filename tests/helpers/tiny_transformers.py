"""Small transformers of every kind, and inputs for them."""

from typing import Any

import torch
from torch import Tensor

from workbench.models import Transformer

TINY: dict[str, Any] = {"width": 16, "layers": 2, "heads": 4, "width_ffn": 24, "max_length": 9, "dropout": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "classifier": {"vocabulary": 20, "classes": 3},
    "post-norm, first token": {"vocabulary": 20, "classes": 3, "pre_norm": False, "pooling": "cls"},
    "series": {"features": 5, "classes": 3, "positions": "rotary", "activation": "geglu", "bias": False},
    "masked": {"vocabulary": 20, "norm": "rms", "activation": "relu", "init": "he"},
    "causal": {"vocabulary": 20, "causal": True, "positions": "rotary", "norm": "rms", "activation": "swiglu"},
    "tied": {"vocabulary": 20, "causal": True, "tied": True, "bias": False},
}
SEQUENCES = [name for name in KINDS if "classes" in KINDS[name]]


def built(kind: str, **changed: Any) -> Transformer:
    """A transformer whose norms and biases differ from their initial values."""
    model = Transformer(**{**TINY, **KINDS[kind], **changed})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def inputs_for(kind: str, batch: int = 4, length: int = 7) -> Tensor:
    if "features" in KINDS[kind]:
        return torch.randn(batch, length, 5, dtype=torch.float64)
    return torch.randint(0, 20, (batch, length))
