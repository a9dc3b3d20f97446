"""Recurrent layers on top of each other."""

from typing import Any, final

import torch
from torch import Tensor, nn

from workbench.models.activations import Init, gain
from workbench.models.arguments import check_choice
from workbench.models.recurrent.layer import Cell, Norm, Recurrence, RecurrentLayer

_IDENTITY_STD = 1e-3


@final
class RecurrentStack(nn.Module):
    """Recurrent layers on top of each other, without a task; [B, L, features] -> states [B, L, D] and the last [B, D].

    D is ``hidden``, or twice that where ``bidirectional``. What `torch.nn.RNN`, ``GRU`` and ``LSTM`` compute, with any
    activation in the place of tanh: in an LSTM that of the candidate and that of the output.

    Initial weights: recurrent matrices are orthogonal, gate by gate (Saxe et al. 2014, arXiv:1312.6120); input matrices
    N(0, g^2 / fan-in), where g is 1 in the first layer, which reads inputs, and the activation's gain above; biases 0,
    but 1 for an LSTM's forget gate (Jozefowicz et al. 2015, "An empirical exploration of recurrent network
    architectures"). ``recurrence="identity"`` starts a simple RNN from the identity and the first layer's input matrix
    from N(0, 0.001^2), so that a ReLU remembers by default (Le et al. 2015, arXiv:1504.00941); of a small state a GELU
    or SiLU keeps half at every step instead.

    The loop over the steps is plain, so that an activation is all that tells two networks apart. A training step takes
    1.1 to 1.5 times as long as torch's own RNN and GRU on one core of a CPU, and 1.4 to 5 times as long as its LSTM (32
    units or 256). `torch.export`, and so ONNX, unrolls it: what is exported takes sequences of the example's length.

    Args:
        features: Size of the input at a step.
        hidden: Size of the state, H.
        layers: Number of layers.
        cell: "rnn", "gru" or "lstm".
        activation: A name from `workbench.models.activations`.
        bidirectional: Whether every layer reads the sequence backwards, too, with weights of its own.
        norm: "none" or "layer": W x and U h are each normalised over all gates, and an LSTM's cell where it is put out
            (Ba et al. 2016, arXiv:1607.06450, section 3.1 and supplement; for RNN and GRU here as for the LSTM).
        dropout: Share of what goes from a layer to the next that is dropped in training, in [0, 1).
        init: "own" for the activation's own gain, "he" for sqrt 2 in all input matrices.
        recurrence: "orthogonal", or "identity" for cell "rnn".

    Raises:
        ValueError: A size out of range, or an unknown cell, activation, norm, init or recurrence.
    """

    def __init__(
        self,
        features: int = 1,
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
        if min(features, hidden, layers) < 1:
            raise ValueError(f"features={features}, hidden={hidden}, layers={layers}: all must be at least 1.")
        for name, value, choices in (
            ("cell", cell, Cell),
            ("norm", norm, Norm),
            ("init", init, Init),
            ("recurrence", recurrence, Recurrence),
        ):
            check_choice(choices, **{name: value})
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: give at least 0 and less than 1.")
        if recurrence == "identity" and cell != "rnn":
            raise ValueError(f"recurrence='identity' with cell={cell!r}: it is for cell='rnn'; use 'orthogonal'.")
        self.init_args: dict[str, Any] = {
            "features": features,
            "hidden": hidden,
            "layers": layers,
            "cell": cell,
            "activation": activation,
            "bidirectional": bidirectional,
            "norm": norm,
            "dropout": dropout,
            "init": init,
            "recurrence": recurrence,
        }
        self.width = hidden * (2 if bidirectional else 1)
        self.features = features
        self.forwards, self.backwards = nn.ModuleList(), nn.ModuleList()
        self.dropout = nn.Dropout(dropout)
        hidden_gain = gain(activation) if init == "own" else 2**0.5
        for depth in range(layers):
            fan_in = self.width if depth else features
            std = (hidden_gain if depth or init == "he" else 1.0) / fan_in**0.5
            if recurrence == "identity" and not depth:
                std = _IDENTITY_STD
            for direction in (self.forwards, self.backwards)[: 1 + bidirectional]:
                layer = RecurrentLayer(fan_in, hidden, cell, activation, norm)
                layer.init_(std, recurrence)
                direction.append(layer)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States [B, L, D] and, of each direction, the last one, [B, D].

        Args:
            x: [B, L, features], L >= 1.
            attention_mask: 1 where a step is real and 0 where it is padding, on either side or between, [B, L]; None
                if all are real. A padded step leaves the state as it is, also if its input is NaN.

        Raises:
            ValueError: If shapes do not fit.
        """
        if x.ndim != 3 or x.shape[-1] != self.features or x.shape[1] < 1:
            raise ValueError(f"the sequences are {list(x.shape)}: give [B, L, {self.features}] with L >= 1.")
        real = None
        if attention_mask is not None:
            if attention_mask.shape != x.shape[:2]:
                raise ValueError(
                    f"attention_mask is {list(attention_mask.shape)} for sequences {list(x.shape)}: "
                    "give one entry a step."
                )
            real = attention_mask != 0
            x = x.masked_fill(~real[..., None], 0.0)
        last: list[Tensor] = []
        for depth, layer in enumerate(self.forwards):
            x = self.dropout(x) if depth else x
            states, end = layer(x, real)
            last = [end]
            if self.backwards:
                states_back, end = self.backwards[depth](x.flip(1), None if real is None else real.flip(1))
                states = torch.cat([states, states_back.flip(1)], -1)
                last.append(end)
            x = states
        return x, torch.cat(last, -1)
