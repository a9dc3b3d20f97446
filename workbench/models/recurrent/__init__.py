"""Recurrent networks with any activation in the place of tanh: simple, GRU and LSTM."""

from workbench.models.recurrent.heads import Recurrent, RecurrentTokens
from workbench.models.recurrent.layer import RecurrentLayer
from workbench.models.recurrent.stack import RecurrentStack

__all__ = ["Recurrent", "RecurrentLayer", "RecurrentStack", "RecurrentTokens"]
