"""Recurrent networks for a task: of series and of tokens."""

from typing import Any, final

import torch
from torch import Tensor, nn

from workbench.models.activations import Init
from workbench.models.recurrent.layer import Cell, Norm, Recurrence
from workbench.models.recurrent.stack import RecurrentStack


@final
class Recurrent(nn.Module):
    """A `RecurrentStack` over a series and a linear map of its last state; [B, L, features] -> [B, outputs].

    For the class of a sequence (outputs are logits), a number about it (regression), or its future: with a horizon,
    [B, horizon, outputs], all steps at once.

    Args:
        features: Size of the input at a step.
        outputs: Classes, numbers, or channels of the future.
        horizon: Steps of the future; None for none.
        hidden: Size of the state.
        layers: Number of layers.
        cell: "rnn", "gru" or "lstm".
        activation: A name from `workbench.models.activations`.
        bidirectional: Whether every layer reads the sequence backwards, too.
        norm: "none" or "layer"; see `RecurrentStack`.
        dropout: Share that is dropped between layers in training, in [0, 1).
        init: "own" for the activation's own gain, "he" for sqrt 2; see `RecurrentStack`.
        recurrence: "orthogonal" or "identity"; see `RecurrentStack`.

    Raises:
        ValueError: A size out of range, or an unknown cell, activation, norm, init or recurrence.
    """

    def __init__(
        self,
        features: int = 1,
        outputs: int = 10,
        horizon: int | None = None,
        hidden: int = 64,
        layers: int = 1,
        cell: Cell = "gru",
        activation: str = "tanh",
        bidirectional: bool = False,
        norm: Norm = "none",
        dropout: float = 0.0,
        init: Init = "own",
        recurrence: Recurrence = "orthogonal",
    ) -> None:
        super().__init__()
        if outputs < 1 or (horizon is not None and horizon < 1):
            raise ValueError(f"outputs={outputs}, horizon={horizon}: give at least 1; None for no horizon.")
        self.stack = RecurrentStack(
            features, hidden, layers, cell, activation, bidirectional, norm, dropout, init, recurrence
        )
        self.init_args: dict[str, Any] = {**self.stack.init_args, "outputs": outputs, "horizon": horizon}
        self.horizon = horizon
        self.head = _output(self.stack.width, outputs * (horizon or 1))

    def forward(self, x: Tensor, lengths: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """[B, L, features] -> [B, outputs], or [B, horizon, outputs].

        Args:
            x: Sequences, padded to one length.
            lengths: Real steps at the beginning of each, [B].
            attention_mask: In the place of lengths 1 where a step is real and 0 where it is padding, [B, L].

        Raises:
            ValueError: If shapes do not fit, or both lengths and a mask are given.
        """
        if lengths is not None:
            if attention_mask is not None:
                raise ValueError("lengths and attention_mask are alternatives: give one of them.")
            if lengths.shape != x.shape[:1]:
                raise ValueError(
                    f"lengths is {list(lengths.shape)} for sequences {list(x.shape)}: give one a sequence."
                )
            attention_mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        output = self.head(self.stack(x, attention_mask)[1])
        return output if self.horizon is None else output.unflatten(-1, (self.horizon, -1))


@final
class RecurrentTokens(nn.Module):
    """An embedding, a `RecurrentStack` and a linear map; tokens [B, L] -> logits [B, L, vocabulary] or [B, classes].

    Without classes a language model: the logits at a position are those of the next token, from all tokens up to here.
    With classes one answer for the sequence, from the last state.

    Args:
        vocabulary: Number of tokens.
        classes: Size of the output for a sequence; None for a language model.
        embedding: Numbers that a token becomes, drawn from N(0, 1).
        hidden: Size of the state.
        layers: Number of layers.
        cell: "rnn", "gru" or "lstm".
        activation: A name from `workbench.models.activations`.
        bidirectional: Whether every layer reads the sequence backwards, too; not in a language model.
        norm: "none" or "layer"; see `RecurrentStack`.
        dropout: Share that is dropped between layers in training, in [0, 1).
        init: "own" for the activation's own gain, "he" for sqrt 2; see `RecurrentStack`.
        recurrence: "orthogonal" or "identity"; see `RecurrentStack`.

    Raises:
        ValueError: A size out of range, an unknown cell, activation, norm, init or recurrence, or a bidirectional
            language model.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int | None = None,
        embedding: int = 64,
        hidden: int = 64,
        layers: int = 1,
        cell: Cell = "lstm",
        activation: str = "tanh",
        bidirectional: bool = False,
        norm: Norm = "none",
        dropout: float = 0.0,
        init: Init = "own",
        recurrence: Recurrence = "orthogonal",
    ) -> None:
        super().__init__()
        if min(vocabulary, embedding, 1 if classes is None else classes) < 1:
            raise ValueError(f"vocabulary={vocabulary}, embedding={embedding}, classes={classes}: give at least 1.")
        if bidirectional and classes is None:
            raise ValueError("bidirectional=True: a language model would see what it predicts; give classes or False.")
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.stack = RecurrentStack(
            embedding, hidden, layers, cell, activation, bidirectional, norm, dropout, init, recurrence
        )
        stack = {name: value for name, value in self.stack.init_args.items() if name != "features"}
        self.init_args: dict[str, Any] = {
            "vocabulary": vocabulary,
            "classes": classes,
            "embedding": embedding,
            **stack,
        }
        self.classes = classes
        self.head = _output(self.stack.width, vocabulary if classes is None else classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, L, vocabulary], or [B, classes].

        Args:
            input_ids: Tokens, int64 [B, L].
            attention_mask: 1 where a token is real and 0 where it is padding, [B, L]; None if all are real.
        """
        states, last = self.stack(self.embedding(input_ids), attention_mask)
        return self.head(states if self.classes is None else last)


def _output(features: int, outputs: int) -> nn.Linear:
    """A linear map drawn from N(0, 1 / features), without a bias at first."""
    head = nn.Linear(features, outputs)
    nn.init.normal_(head.weight, 0.0, features**-0.5)
    nn.init.zeros_(head.bias)
    return head
