"""The trainings of a hunt on disk: a folder each, whole once its record is there."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor

from prune.masks import Masks
from workbench import artifact, records
from workbench.ranks import barrier, rank

TICKET = "ticket"


@final
class Store:
    """The folders ``level_NN`` of a hunt, and inside them those of its controls.

    Args:
        out: The hunt's folder.
        key: What tells this hunt from another: levels of another key are refused.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.out, self.key = out, key

    def folder(self, level: int, arm: str = TICKET) -> Path:
        """Where the training of ``arm`` at ``level`` is kept."""
        folder = self.out / f"level_{level:02d}"
        return folder if arm == TICKET else folder / arm

    def finished(self, level: int, arm: str = TICKET) -> dict[str, Any] | None:
        """The record of a whole training of this hunt, or None.

        Raises:
            ValueError: If it belongs to another hunt.
        """
        folder = self.folder(level, arm)
        record = records.finished(folder)
        if record is not None and record.get("fingerprint") != self.key:
            raise ValueError(f"{folder} is a level of another hunt: choose another out, or move it aside")
        return record

    def keep(self, level: int, arm: str, result: Mapping[str, Any], masks: Masks) -> dict[str, Any]:
        """Make the training whole: write its record, and remove what it would have resumed from. On every rank."""
        folder = self.folder(level, arm)
        record = {
            **result,
            "level": level,
            "arm": arm,
            "status": "finished",
            "fingerprint": self.key,
            "density": masks.density,
            "layers": {name: list(count) for name, count in masks.counts().items()},
            "mask_hash": masks.hash(),
        }
        if rank() == 0:
            records.write(folder, record)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        barrier()
        return record

    def weights(self, level: int, arm: str = TICKET) -> dict[str, Tensor]:
        """The network's state dict at the end of a training."""
        return artifact.tensors(self.folder(level, arm))

    def masks(self, level: int, arm: str = TICKET) -> Masks:
        """The masks of a training."""
        return Masks(artifact.masks(self.folder(level, arm)))
