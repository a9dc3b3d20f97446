"""One recurrent layer in one direction, simple, GRU or LSTM, with any activation in the place of tanh."""

from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor, nn

from workbench.models.activations import make

Cell = Literal["rnn", "gru", "lstm"]
Norm = Literal["none", "layer"]
Recurrence = Literal["orthogonal", "identity"]
State = tuple[Tensor, ...]
Map = Callable[[Tensor], Tensor]


def rnn_step(read: Tensor, recalled: Tensor, state: State, f: Map, norm: Map) -> State:
    """H = f(W x + U h); the state is (h,). Elman (1990), "Finding structure in time"."""
    return (f(read + recalled),)


def gru_step(read: Tensor, recalled: Tensor, state: State, f: Map, norm: Map) -> State:
    """A gated recurrent unit; the state is (h,).

    h = (1 - z) n + z h with reset gate r and update gate z, sigmoids, and the candidate n = f(W x + r (U h)). Cho et
    al. (2014), arXiv:1406.1078, section 2.3, with the reset behind the product as in `torch.nn.GRU`.

    Args:
        read: W x of r, z and n side by side, [B, 3 H].
        recalled: U h of the same, [B, 3 H].
        state: (h,), [B, H].
        f: The activation.
        norm: Not used.
    """
    (r, z, n), (r_state, z_state, n_state) = read.chunk(3, -1), recalled.chunk(3, -1)
    update, candidate = (z + z_state).sigmoid(), f(n + (r + r_state).sigmoid() * n_state)
    return (candidate + update * (state[0] - candidate),)


def lstm_step(read: Tensor, recalled: Tensor, state: State, f: Map, norm: Map) -> State:
    """A long short-term memory without peepholes; the state is (h, c).

    c = s(forget) c + s(input) f(candidate) and h = s(output) f(norm(c)), s the sigmoid. Hochreiter & Schmidhuber
    (1997), with the forget gate of Gers et al. (2000).

    Args:
        read: W x of input, forget, candidate and output side by side, as in `torch.nn.LSTM`, [B, 4 H].
        recalled: U h of the same, [B, 4 H].
        state: (h, c), both [B, H].
        f: The activation.
        norm: Of the cell where it is put out.
    """
    put_in, forget, candidate, put_out = (read + recalled).chunk(4, -1)
    c = forget.sigmoid() * state[1] + put_in.sigmoid() * f(candidate)
    return put_out.sigmoid() * f(norm(c)), c


_CELLS: dict[str, tuple[Callable[[Tensor, Tensor, State, Map, Map], State], int, int]] = {
    "rnn": (rnn_step, 1, 1),
    "gru": (gru_step, 3, 1),
    "lstm": (lstm_step, 4, 2),
}
"""By name the step, how many maps stand side by side, and how many tensors the state has."""


@final
class RecurrentLayer(nn.Module):
    """One layer in one direction: [B, L, features] -> states [B, L, hidden], from the first step to the last.

    A plain loop over the steps in which every product is one of the two linear maps below, so that pruning, hooks and
    diagnostics see what they see in any network.

    Args:
        features: Size of the input at a step.
        hidden: Size of the state.
        cell: "rnn", "gru" or "lstm".
        activation: A name from `workbench.models.activations`.
        norm: "none", or "layer" for W x and U h, each over all gates, and for the LSTM's cell where it is put out.
    """

    def __init__(self, features: int, hidden: int, cell: Cell, activation: str, norm: Norm) -> None:
        super().__init__()
        self.cell: Cell = cell
        _, gates, _ = _CELLS[cell]
        bias = norm == "none"
        self.input = nn.Linear(features, gates * hidden, bias=bias)
        self.recurrent = nn.Linear(hidden, gates * hidden, bias=bias)
        self.input_norm = nn.Identity() if bias else nn.LayerNorm(gates * hidden)
        self.recurrent_norm = nn.Identity() if bias else nn.LayerNorm(gates * hidden)
        self.cell_norm = nn.Identity() if bias or cell != "lstm" else nn.LayerNorm(hidden)
        self.activation = make(activation)

    def init_(self, std: float, recurrence: Recurrence) -> None:
        """W from N(0, std^2); U orthogonal, gate by gate, or the identity; biases 0, but an LSTM's forget gate's 1."""
        _, gates, _ = _CELLS[self.cell]
        with torch.no_grad():
            self.input.weight.normal_(0.0, std)
            for block in self.recurrent.weight.chunk(gates):
                nn.init.orthogonal_(block) if recurrence == "orthogonal" else nn.init.eye_(block)
            for layer in (self.input, self.recurrent):
                if layer.bias is not None:
                    layer.bias.zero_()
            if self.cell == "lstm":
                bias = self.input.bias if isinstance(self.input_norm, nn.Identity) else self.input_norm.bias
                bias.chunk(gates)[1].fill_(1.0)

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States [B, L, hidden] and the last one [B, hidden], from [B, L, features].

        Where ``real``, bool [B, L], is False, the state stays as it is.
        """
        step, _, parts = _CELLS[self.cell]
        read = self.input_norm(self.input(x))
        state: State = (read.new_zeros(x.shape[0], self.recurrent.in_features),) * parts
        states = []
        for time, row in enumerate(read.unbind(1)):
            recalled = self.recurrent_norm(self.recurrent(state[0]))
            after = step(row, recalled, state, self.activation, self.cell_norm)
            if real is not None:
                kept = real[:, time, None]
                after = tuple(torch.where(kept, new, old) for new, old in zip(after, state, strict=True))
            state = after
            states.append(state[0])
        return torch.stack(states, 1), state[0]
