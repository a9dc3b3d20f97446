"""Loading masks: from memory, a file of masks, or a compact checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from prune.masks import Masks
from workbench.checkpoints import compact


def masks_of(source: Mapping[str, Tensor] | str | os.PathLike[str]) -> Masks:
    """``source`` as Masks; a path is that of a file that ``Masks.save`` wrote, or of a compact checkpoint.

    Raises:
        TypeError: If ``source`` is neither a mapping nor a path.
        FileNotFoundError: If there is nothing at the path.
        ValueError: If masks are not valid, or there are none in the checkpoint.
    """
    if isinstance(source, Masks):
        return source
    if isinstance(source, Mapping):
        return Masks(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"masks are {source!r}: give parameter name -> bool tensor, or the path of a file of masks")
    path = Path(source)
    if path.is_file():
        return Masks.load(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a file that Masks.save wrote, or a compact checkpoint")
    masks = compact.masks(path)
    if not masks:
        raise ValueError(f"{path} is a compact checkpoint of a dense network, without masks: give a pruned one")
    return Masks(masks)
