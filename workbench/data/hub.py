"""Data sets of the Hugging Face hub, by name."""

import re
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


def is_hub_name(name: str) -> bool:
    """Whether a data set of the hub may have this name: ``owner/name``, or ``owner/name:configuration``."""
    return _NAME.fullmatch(name) is not None


def load_from_hub(name: str, otherwise: str = "") -> Any:
    """All splits of a data set of the hub.

    Args:
        name: ``owner/name``, or ``owner/name:configuration`` where it has several, e.g. ``clinc/clinc_oos:plus``.
        otherwise: What to do instead; appended to the error.

    Raises:
        ValueError: If `datasets` cannot give it.
    """
    import datasets

    owned, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(owned, configuration) if configuration else datasets.load_dataset(owned)
    except Exception as error:  # the hub's, the network's and the files' own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name}: neither a path here nor a data set that the hub gives ({reason}){otherwise}."
        ) from error
