"""Cached targets: a teacher's outputs on disk, by sample and view.

``cache`` is the job, :func:`cache_teacher` the function that writes, :class:`CachedTeacher` reads. In this folder
`samples` fetches and digests samples, `answers` selects what is stored of a teacher's outputs, `sampling` samples ids
from large vocabularies, and `store` is the format on disk.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from distill.cache.reading import CachedBatch, CachedTeacher, open_teacher
from distill.cache.writing import Store, cache_teacher, write
from distill.teacher import Precision, Teacher
from workbench.records.source import Source
from workbench.tasks import Task

__all__ = ["CachedBatch", "CachedTeacher", "cache", "cache_teacher", "open_teacher"]


def cache(
    teacher: Source,
    data: LightningDataModule,
    features: list[str] | None = None,
    store: Store = "full",
    samples: int = 64,
    dtype: str | None = None,
    precision: Precision | None = None,
    splits: list[str] | None = None,
    task: Task | None = None,
    batch_size: int | None = None,
    seed_everything: int = 0,
    out: Path = Path("runs/cache"),
) -> dict[str, Any]:
    """Run a teacher once on every sample and store its outputs, for a distill stage that names this one as teacher.

    Args:
        teacher: A stage of the recipe that trained one, or a folder or hub name to load one from.
        data: The data module; one that augments needs a number of views of a sample.
        features: Layers of the teacher whose inputs or outputs are stored too, e.g. `encoder.layer.*`.
        store: All logits (full), or for large vocabularies ids sampled from them (sampled).
        samples: With `store: sampled`, how many ids are sampled at each position.
        dtype: Type of the stored values, e.g. float16; the teacher's own by default.
        precision: Precision of the teacher, bf16 or int8; its own by default.
        splits: Splits of the data module to cache; train by default.
        task: Reads the teacher's inputs from a batch; by default all but the labels.
        batch_size: Batch size of the teacher, by default that of the data module. Distillation should use the same one
            to get the same bits as from a live teacher.
        seed_everything: Seed of the sampled ids.
        out: The stage's folder, given by the recipe.

    Returns:
        Bytes, samples, seconds and bytes a second, for the record.
    """
    network = Teacher(teacher, precision)
    summaries = {
        split: write(
            network,
            data,
            out / "cache",
            split,
            features=features or (),
            store=store,
            samples=samples,
            dtype=dtype,
            batch_size=batch_size,
            seed=seed_everything,
            task=task,
        )
        for split in dict.fromkeys(splits or ["train"])
    }
    seconds = sum(each.seconds for each in summaries.values())
    return {
        "cache": {
            split: {
                "bytes": each.bytes,
                "samples": each.samples,
                "views": each.views,
                "seconds": round(each.seconds, 3),
                "shards_reused": each.reused,
            }
            for split, each in summaries.items()
        },
        "bytes": sum(each.bytes for each in summaries.values()),
        "samples": sum(each.samples * each.views for each in summaries.values()),
        "seconds": round(seconds, 3),
        "rate": round(sum(each.written for each in summaries.values()) / max(seconds, 1e-9)),
    }
