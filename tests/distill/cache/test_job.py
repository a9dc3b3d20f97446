"""The cache job."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distill.cache import CachedTeacher, cache, open_teacher
from distill.teacher import Teacher
from workbench.checkpoints import compact
from workbench.data import Digits
from workbench.launcher.jobs import find_jobs
from workbench.models import MLP
from workbench.records.source import Source


def test_a_stage_writes_a_cache_that_another_names_as_its_teacher(tmp_path: Path) -> None:
    network, data = MLP(64, [8], 10), Digits(batch_size=100)
    compact.save(network, tmp_path / "teacher" / "compact")
    out = tmp_path / "cached"
    result = cache(Source(tmp_path / "teacher"), data, splits=["train", "val"], precision="bf16", out=out)
    assert json.loads(json.dumps(result)) == result
    assert result["samples"] == 1257 + 180
    assert result["bytes"] == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert result["rate"] > 0
    assert sorted(os.listdir(out / "cache")) == ["train", "val"]
    opened = open_teacher(Source(out))
    assert isinstance(opened, CachedTeacher)
    (x, _), targets = next(iter(opened.attach(data.train_dataloader())))
    assert torch.allclose(targets["logits"], network(x), atol=0.3)
    assert F.cosine_similarity(targets["logits"], network(x)).min() > 0.99
    assert isinstance(open_teacher(tmp_path / "teacher", precision="int8"), Teacher)
    with pytest.raises(ValueError, match=r"precision is given, but .* is a cache: give it where the cache is made"):
        open_teacher(out, precision="bf16")
    with pytest.raises(ValueError, match="is a cache, not a network"):
        Teacher(out)


def test_the_job_is_found_and_described() -> None:
    job = find_jobs()["cache"]
    assert [parameter.name for parameter in job.parameters if not parameter.description] == []
    assert {parameter.name for parameter in job.parameters} >= {"teacher", "data", "features", "store", "splits"}
