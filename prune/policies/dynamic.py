"""Dynamic sparse training: constant density, with connections that move."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, final

from torch import Tensor, nn

from prune.allocation import Allocation, Global
from prune.criteria import random, seeded
from prune.masks import Masks
from prune.policies.history import axes_of, named
from prune.policies.policy import Policy
from prune.policies.timestamp import Timestamp, check_times
from prune.pruner import Patterns, Pruner
from prune.pruner.norms import keep_norms
from prune.schedule import check_density
from prune.structures import Layout
from prune.topk import keep_top_k
from workbench.duration import Duration
from workbench.models.matrices import Matrix, matrices

Growth = Literal["rigl", "set"]
Decay = Callable[[float], float]


def cosine(progress: float) -> float:
    """(1 + cos(pi t / T_end)) / 2 for ``progress`` = t / T_end: from 1 to 0. Evci et al. 2020, section 3."""
    return (1 + math.cos(math.pi * progress)) / 2


def constant(progress: float) -> float:
    """1, as in SET."""
    return 1.0


DECAYS: dict[str, Decay] = {"cosine": cosine, "constant": constant}


@final
class Dynamic(Policy):
    """Trains a network that is sparse from the start, and moves its connections: RigL, or SET.

    At every multiple of ``every`` from ``begin`` to ``end``, each layer with k active weights drops

        n = floor(k * fraction * decay((t - begin) / (end - begin)))

    of them, those of the smallest ``|w|``, and grows n of the inactive ones, including those just dropped: of the
    largest ``|gradient|`` (``"rigl"``) or at random (``"set"``). Every layer keeps exactly k; ties go by index. Grown
    weights start at 0, and optimizer state of a dropped or grown weight is cleared; a weight dropped and grown again at
    once keeps both, as in the authors' code (github.com/google-research/rigl). The masks change before an update, by
    its gradients, and the update is then done under the new ones; that code skips the update. Where gradients are not
    finite, the change waits for the next update; a layer without gradients stays as it is. Gradients are those of the
    whole update, over micro-batches and ranks, before they are clipped.

    A second training of the same network goes on from the masks held, if the network still obeys them; another network
    starts with random masks, and its weights are zero where these prune them.

    Args:
        density: Share of the prunable weights to keep, in (0, 1].
        begin: From when on connections move, e.g. "1ep" or "500it": epochs or updates. Never before the first. A
            Lightning Trainer counts updates as ``trainer.global_step``.
        end: Until when, in the same unit; the paper has three quarters of training.
        every: Time between two changes, in either unit; the paper has 100 updates.
        growth: ``"rigl"`` or ``"set"``.
        fraction: Largest share of a layer's active weights that moves at once, in (0, 1].
        decay: ``"cosine"``, ``"constant"``, or a function of progress (0 to 1) that gives 0 to 1.
        allocation: How the density is divided over layers, as for ``Pruner``.
        include: As for ``Pruner``.
        exclude: As for ``Pruner``.
        output: As for ``Pruner``.
        seed: Of the first masks, and of what SET grows: with the update and the parameter's name it decides both.

    Raises:
        ValueError: If an argument is out of range or the units differ; when training starts, as ``Pruner``, if it ends
            before ``begin``, or if RigL needs the gradient of a frozen weight.

    Warns:
        UserWarning: As :meth:`Policy.attach`.

    References: Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134, Algorithm 1; Mocanu et al., Scalable Training
    of Artificial Neural Networks with Adaptive Sparse Connectivity, 2018, arXiv:1707.04780, Algorithm 1.
    """

    def __init__(
        self,
        density: float,
        begin: str | Duration,
        end: str | Duration,
        every: str | Duration,
        growth: Growth = "rigl",
        fraction: float = 0.3,
        decay: str | Decay = "cosine",
        allocation: str | Global | Allocation = "erk",
        include: Patterns = None,
        exclude: Patterns = None,
        output: str | None = None,
        seed: int = 0,
    ) -> None:
        self.begin, self.end, self.every = (Duration.parse(time) for time in (begin, end, every))
        super().__init__(self.begin, self.end, self.every)
        check_density(density)
        check_times(self.begin, self.end, self.every)
        if growth not in ("rigl", "set"):
            raise ValueError(f"growth is {growth!r}: give 'rigl' (by gradient) or 'set' (at random)")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction!r}: give the share of active weights that moves, above 0 to 1")
        if isinstance(decay, str) and decay not in DECAYS:
            raise ValueError(f"unknown decay {decay!r}: give one of {list(DECAYS)}, or a function")
        self.density, self.growth, self.fraction, self.seed = density, growth, fraction, seed
        self.decay = DECAYS[decay] if isinstance(decay, str) else decay
        self.pruner = Pruner("random", "unstructured", allocation, include, exclude, output, seed)
        self.reads_gradients = growth == "rigl"
        self._passed = 0

    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self.pruner.scope(model)

    def _start(self, time: Timestamp, resumed: bool) -> None:
        self._check_pruner(self.pruner)
        self._passed = min(self._passed, time.passed(self.every))  # a second training begins at 0 again
        assert self._model is not None, "attached"
        if not resumed:
            self._enforce(self.pruner(self._model, self.density))

    def _needs_dense_gradients(self, time: Timestamp) -> bool:
        return self.reads_gradients and self._due(time)

    def _due(self, time: Timestamp) -> bool:
        return 0 <= time.progress(self.begin, self.end) <= 1 and time.passed(self.every) > self._passed

    def _read_gradients(self, time: Timestamp) -> None:
        if time.progress(self.begin, self.end) < 0:
            self._passed = time.passed(self.every)
        if not self._due(time):
            return
        grads = self._gradients() if self.reads_gradients else {}
        if self.reads_gradients and not grads:
            return
        self._passed = time.passed(self.every)
        assert self.masks is not None, "attached"
        share = self.fraction * self.decay(time.progress(self.begin, self.end))
        assert self._model is not None, "attached"
        moved, of_layers = dict(self.masks), matrices(self._model)
        for name, weight in self._weights.items():
            if not self.reads_gradients:
                scores = random(weight.detach(), seeded(self.seed, f"{name}@{time.step}"))
            elif name in grads:
                scores = grads[name].detach().abs()
            else:
                continue
            matrix = of_layers[name]
            values = self._dropped_by(name, matrix)
            fixed = 0 if matrix.norm is None else int(values.isinf().sum())
            moved[name] = rewired(self.masks[name], values, scores, share, fixed)
        self._enforce(Masks(moved))

    def _dropped_by(self, name: str, matrix: Matrix) -> Tensor:
        """What the layer multiplies by; infinite where a norm would be left without weights."""
        if matrix.made_by is None:
            return matrix.parameter.detach()
        assert self.masks is not None, "attached"
        layout = Layout({name: matrix.parameter.shape}, {name: [(name, None)]})
        return keep_norms({name: matrix}, layout, {name: matrix.product().abs()}, {name: self.masks[name]})[name]

    def _after_update(self, time: Timestamp) -> None:
        pass

    def _state(self) -> dict[str, Any]:
        return {"passed": self._passed}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._passed = state.get("passed", 0)

    def check_budget(self, updates: float, epochs: float) -> None:
        """Refuse a training that is over before connections begin to move."""
        budget = updates if self.end.unit == "it" else epochs
        if self.begin.value >= budget:
            raise ValueError(
                f"begin is {self.begin}, but training has {budget}{self.end.unit} only: begin earlier, or train longer"
            )

    def _settings(self) -> dict[str, Any]:
        times = {name: str(getattr(self, name)) for name in ("begin", "end", "every")}
        how = {"growth": self.growth, "fraction": self.fraction, "decay": named(self.decay), "seed": self.seed}
        return {"density": self.density, **times, **how, **axes_of(self.pruner)}

    def at_final_density(self) -> bool:
        """Always."""
        return True

    def shortfall(self) -> str | None:
        """None: the density is constant."""
        return None


def rewired(mask: Tensor, weight: Tensor, scores: Tensor, share: float, fixed: int = 0) -> Tensor:
    """``mask`` after a drop of n = floor(k * ``share``) of its k active weights and a growth of n inactive ones.

    Dropped are those of the smallest ``|weight|``; grown those of the highest ``scores`` among all inactive then. Ties
    go by index.

    Args:
        mask: bool, any shape.
        weight: Of the same shape.
        scores: Of the same shape.
        share: In [0, 1].
        fixed: How many of the largest weights stay, which may make n less.
    """
    active = int(mask.sum())
    moving = min(math.floor(active * share), active - fixed)
    kept = keep_top_k({"": weight.abs()}, active - moving, {"": mask})[""]
    return kept | keep_top_k({"": scores}, moving, {"": ~kept})[""]
