"""The trainings of a hunt on disk: a folder each, whole once its record is there."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor

from prune.masks import Masks
from prune.tickets.identity import difference
from workbench import records
from workbench.checkpoints import compact
from workbench.distributed.ranks import barrier, rank
from workbench.files import write_json
from workbench.records import Size

TICKET = "ticket"
_PARTS = {
    "metrics": dict,
    "monitor": list,
    "history": list,
    "world_size": int,
    "seconds": (int, float),
    "density": (int, float),
    "mask_hash": str,
}


@final
class Store:
    """The folders ``level_NN`` of a hunt, and inside them those of its controls.

    Args:
        out: The hunt's folder.
        key: Fingerprint of this hunt: levels of another one are refused.
        settings: What the fingerprint is of, as far as it is known, kept with every level to say what differs.
    """

    def __init__(self, out: Path, key: str, settings: Mapping[str, Any] | None = None) -> None:
        self.out, self.key, self.settings = out, key, dict(settings or {})

    def folder(self, level: int, arm: str = TICKET) -> Path:
        """Where the training of ``arm`` at ``level`` is kept."""
        folder = self.out / f"level_{level:02d}"
        return folder if arm == TICKET else folder / arm

    def check(self) -> None:
        """Make sure, before anything is trained, that all trainings here are this hunt's, and as they were left.

        Raises:
            ValueError: If one belongs to another hunt, its record makes no sense, or its network or masks were
                truncated, altered or replaced since; it names the file. Nothing is removed.
        """
        for folder in self._folders():
            if (record := self._record(folder)) is None:
                continue
            if missing := [name for name, kind in _PARTS.items() if not isinstance(record.get(name), kind)]:
                damage = f"no {', '.join(missing)} in it"
                raise ValueError(f"{folder / 'record.json'} is damaged: {damage}. {_remedy(folder)}")
            try:
                checkpoint = compact.find(folder)
                index, masks = compact.read_index(checkpoint), Masks(compact.masks(checkpoint))
            except ValueError as error:
                raise ValueError(f"{error}. {_remedy(folder)}") from error
            if record.get("checkpoint", index["sha256"]) != index["sha256"] or record["mask_hash"] != masks.hash():
                raise ValueError(
                    f"{checkpoint} is not what {folder / 'record.json'} was written for. {_remedy(folder)}"
                )

    def finished(self, level: int, arm: str = TICKET) -> dict[str, Any] | None:
        """The record of a whole training of this hunt, or None.

        Raises:
            ValueError: If it belongs to another hunt.
        """
        return self._record(self.folder(level, arm))

    def keep(self, level: int, arm: str, result: Mapping[str, Any], masks: Masks) -> dict[str, Any]:
        """Make the training whole: write its record, and remove what it would have resumed from. On every rank."""
        folder = self.folder(level, arm)
        record = {
            **result,
            "level": level,
            "arm": arm,
            "status": "finished",
            "fingerprint": self.key,
            "settings": self.settings,
            "density": masks.density,
            "model_density": Size(**result["size"]).model_density if "size" in result else None,
            "layers": {name: list(count) for name, count in masks.counts().items()},
            "mask_hash": masks.hash(),
            "checkpoint": compact.read_index(compact.find(folder))["sha256"],
        }
        if rank() == 0:
            records.write(folder, record)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        barrier()
        return record

    def measurement(self, level: int, name: str) -> dict[str, Any] | None:
        """What :meth:`save_measurement` wrote of a level under ``name``, or None.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.folder(level) / f"{name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): remove it to measure it anew") from error
        return content["found"] if content["fingerprint"] == self.key else None

    def save_measurement(self, level: int, name: str, values: Mapping[str, Any]) -> None:
        """Keep what was measured of a finished level, beside its record. On every rank."""
        if rank() == 0:
            write_json(self.folder(level) / f"{name}.json", {"fingerprint": self.key, "found": values})
        barrier()

    def weights(self, level: int, arm: str = TICKET) -> dict[str, Tensor]:
        """The network's state dict at the end of a training."""
        return compact.tensors(self.folder(level, arm))

    def masks(self, level: int, arm: str = TICKET) -> Masks:
        """The masks of a training."""
        return Masks(compact.masks(self.folder(level, arm)))

    def _folders(self) -> Iterator[Path]:
        """Every folder that may hold a training, also of levels and controls that are not asked for now."""
        for folder in sorted(self.out.glob("level_*")):
            yield from (folder, *sorted(path.parent for path in folder.glob("*/record.json")))

    def _record(self, folder: Path) -> dict[str, Any] | None:
        record = records.finished(folder)
        if record is None:
            return None
        if record.get("fingerprint") != self.key:
            other = difference(record.get("settings") or {}, self.settings) if self.settings else ""
            why = f", made with {other}" if other else ""
            raise ValueError(f"{folder} is a level of another hunt{why}: choose another out, or move it aside")
        return record


def _remedy(folder: Path) -> str:
    return f"Move {folder} aside to train it anew; all others are kept"
