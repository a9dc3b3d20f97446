"""Names of a package that are imported on first use."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attach(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The module functions ``__getattr__`` and ``__dir__`` of a package whose names are imported on first use.

    Args:
        package: Its ``__name__``.
        homes: Name -> the module that defines it; the module itself where it is a submodule called like the name.

    Example:
        >>> __getattr__, __dir__ = attach(__name__, {"MLP": "workbench.models.mlp"})
    """

    def getattr_(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(home)
        return module if home == f"{package}.{name}" else getattr(module, name)

    return getattr_, lambda: sorted(homes)
