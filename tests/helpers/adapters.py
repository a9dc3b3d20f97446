"""Networks with adapters of PEFT."""

import warnings
from typing import Any

import peft
from torch import nn


def adapted(model: nn.Module, config: Any) -> Any:
    """``model`` with the adapters of ``config`` in it."""
    with warnings.catch_warnings():
        # PEFT asks a model of transformers 5 by an attribute of transformers 4.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, config)  # type: ignore[arg-type]
