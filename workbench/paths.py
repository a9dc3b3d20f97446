"""Paths in recipes: ``~``, environment variables, and folders inside installed packages. Imports nothing heavy."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

_PACKAGE = "package:"
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand_variables(name: str | os.PathLike[str]) -> str:
    """``name`` with ``~`` and environment variables such as ``$DATA`` replaced by their values.

    Raises:
        ValueError: If a variable is not set, or empty.
    """
    text = os.fspath(name)
    for braced, plain in _VARIABLE.findall(text):
        if not os.environ.get(variable := braced or plain):
            raise ValueError(
                f"{text}: the environment variable {variable} is not set: put {variable}=/folder/of/data before the "
                "command, or give the path itself, as in --data.root /folder"
            )
    return os.path.expanduser(os.path.expandvars(text))


def resolve_path(name: str | os.PathLike[str]) -> str:
    """``name`` with variables expanded, and ``package:NAME/folder`` replaced by the path of that folder.

    Models and data sets come in packages too: ``package:NAME/folder`` is ``folder`` inside the installed package NAME,
    which is not imported. Anything else, such as the name of a model on the hub, is returned unchanged.

    Raises:
        ValueError: If the package is not installed or has no such folder or file, or a variable is not set.
    """
    text = expand_variables(name)
    if not text.startswith(_PACKAGE):
        return text
    package, _, inside = text.removeprefix(_PACKAGE).partition("/")
    try:
        spec = find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module in sys.modules without a spec
        spec = None
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    if not folders:
        raise ValueError(f"{text}: no package {package!r} is installed here; install it, or give the path of a folder.")
    for folder in folders:
        if (path := Path(folder) / inside).exists():
            return str(path)
    raise ValueError(f"{text}: package {package!r} has no {inside!r} in {', '.join(folders)}.")
