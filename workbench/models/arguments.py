"""Checks of constructor arguments."""

from typing import Any, get_args


def check_choice(choices: Any, **arguments: object) -> None:
    """Raise ValueError unless each of the ``arguments`` is one of the values of the Literal ``choices``."""
    for name, value in arguments.items():
        if value not in get_args(choices):
            raise ValueError(f"{name}={value!r}: use one of {', '.join(get_args(choices))}.")
