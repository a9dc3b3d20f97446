"""Every policy with arguments that any small training of 16 updates can meet, and the density that it ends at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from prune.levels import Levels
from prune.policies import Dynamic, Fixed, Gradual, Iterative, Policy
from prune.pruner import Pruner


@dataclass(frozen=True)
class Case:
    """A policy, the name of its callback in every framework, and arguments of both.

    Args:
        policy: The policy's class.
        callback: Its callback in ``prune`` and in ``prune.hf``.
        arguments: For a model that is to be trained.
        density: At the end.
    """

    policy: type[Policy]
    callback: str
    arguments: Callable[[nn.Module], dict[str, Any]]
    density: float

    def make(self, model: nn.Module, namespace: Any = None) -> Any:
        """The policy, or with a ``namespace`` its callback there."""
        kind = self.policy if namespace is None else getattr(namespace, self.callback)
        return kind(**self.arguments(model))


def _gradual(*pruner: Any, **options: Any) -> Case:
    times = {"begin": "2it", "end": "9it", "every": "3it"}
    arguments = lambda _: {"density": 0.2, **times, "pruner": Pruner(*pruner, **options)}  # noqa: E731
    return Case(Gradual, "GradualPruning", arguments, 0.2)


def _dynamic(**options: Any) -> Case:
    times = {"begin": "0it", "end": "14it", "every": "3it"}
    return Case(Dynamic, "DynamicSparsity", lambda _: {"density": 0.3, **times, **options}, 0.3)


CASES = {
    "fixed": Case(Fixed, "KeepMasked", lambda model: {"masks": Pruner()(model, 0.3)}, 0.3),
    "gradual": _gradual(),
    "movement": _gradual("movement"),
    "taylor": _gradual("taylor", allocation="uniform"),
    "rigl": _dynamic(),
    "set": _dynamic(growth="set", decay="constant"),
    "iterative": Case(Iterative, "LotteryTicket", lambda _: {"levels": Levels(1, rate=0.5), "rewind": "2it"}, 0.5),
}
