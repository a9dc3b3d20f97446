"""Projectors of feature losses that two trainings draw alike."""

from typing import Any

import pytest
import torch

from distill.objective import Objective


def draw_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every objective draws its projectors from one random state."""
    original = Objective.prepare

    def prepare(self: Objective, *args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            original(self, *args, **kwargs)

    monkeypatch.setattr(Objective, "prepare", prepare)
