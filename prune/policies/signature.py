"""Callbacks that take the arguments of the policy they drive, so that the policy alone states and documents them."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
SelfT = TypeVar("SelfT")
PolicyT = TypeVar("PolicyT")


def takes_arguments_of(
    policy: Callable[P, PolicyT],
) -> Callable[[Callable[[SelfT, PolicyT], None]], Callable[Concatenate[SelfT, P], None]]:
    """Decorates an ``__init__(self, policy)``: it takes the policy's arguments, and is called with one made of them.

    ::

        class GradualPruning(PolicyCallback):
            @takes_arguments_of(Gradual)
            def __init__(self, policy: Gradual) -> None:
                super().__init__(policy)

        GradualPruning(0.2, begin="1ep", end="3ep", every="100it")

    ``inspect.signature``, type checkers and parsers of configuration see the signature of the policy; the docstring of
    ``__init__`` is that of the policy, so that ``help`` and ``--help`` describe each argument.
    """
    signature: Any = policy.__init__  # type: ignore[misc] - that of a class

    def decorate(init: Callable[[SelfT, PolicyT], None]) -> Callable[Concatenate[SelfT, P], None]:
        @wraps(signature)
        def __init__(self: SelfT, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, policy(*args, **kwargs))

        __init__.__doc__ = policy.__doc__
        return __init__

    return decorate
