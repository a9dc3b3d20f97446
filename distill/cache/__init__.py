"""A teacher's answers on disk: ``cache`` is the job, ``cache_teacher`` the function, ``CachedTeacher`` reads them.

`items` fetches samples and knows them again, `asking` takes a teacher's answers apart, `sampling` draws from large
vocabularies, `store` is the format; `writing` and `reading` put them together.
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
    """Ask a teacher about every sample once and keep what it says, for a distill stage that names this one as teacher.

    Args:
        teacher: A stage of the recipe that trained one, or a folder or hub name to load one from.
        data: The data module; one that augments has to say how many views of a sample there are.
        features: Submodules of the teacher whose inputs or outputs are kept too, e.g. `encoder.layer.*`.
        store: All logits (full), or for large vocabularies ids drawn from them (sampled).
        samples: How many ids are drawn at each position.
        dtype: Of what is kept, e.g. float16; the teacher's own by default.
        precision: Of the teacher, bf16 or int8; its own by default.
        splits: Of the data module; train by default.
        task: Says what of a batch the teacher gets; by default all but the labels.
        batch_size: Of the questions; the data module's by default, which is what distillation has to use as well to
            give the same bits as a live teacher.
        seed_everything: Seed of the draws.
        out: The stage's folder, given by the recipe.

    Returns:
        Bytes, samples, seconds and bytes a second, for the record.
    """
    asked = Teacher(teacher, precision)
    written = {
        split: write(
            asked,
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
    seconds = sum(each.seconds for each in written.values())
    return {
        "cache": {
            split: {
                "bytes": each.bytes,
                "samples": each.samples,
                "views": each.views,
                "seconds": round(each.seconds, 3),
                "shards_reused": each.reused,
            }
            for split, each in written.items()
        },
        "bytes": sum(each.bytes for each in written.values()),
        "samples": sum(each.samples * each.views for each in written.values()),
        "seconds": round(seconds, 3),
        "rate": round(sum(each.written for each in written.values()) / max(seconds, 1e-9)),
    }
