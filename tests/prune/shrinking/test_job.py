"""The job `shrink` in a recipe."""

from pathlib import Path

import pytest
import torch

from prune.shrinking.job import shrink as job
from workbench import load, save
from workbench.checkpoints import compact
from workbench.data import Digits
from workbench.launcher import recipe
from workbench.launcher.runner import run
from workbench.models import MLP
from workbench.records.source import Source

RECIPE = """
dense:
  job: fit
  model: {{class_path: workbench.models.MLP, init_args: {{in_features: 64, hidden: [24, 16], classes: 10}}}}
  data: {{class_path: workbench.data.Digits, init_args: {{batch_size: 64}}}}
  trainer:
    max_steps: 6
    accelerator: cpu
    callbacks:
      class_path: prune.GradualPruning
      init_args:
        density: 0.5
        begin: 0it
        end: 4it
        every: 2it
        pruner:
          class_path: prune.Pruner
          init_args: {{structure: {structure}, allocation: uniform, exclude: layers.4.weight}}
small: {{job: shrink, of: dense}}
again: {{job: shrink, of: small, data: {{class_path: workbench.data.Digits}}}}
files: {{job: export, of: small, formats: {formats}}}
"""


COUPLED = "{class_path: prune.Coupled, init_args: {example_inputs: [2, 64]}}"


@pytest.mark.parametrize(("structure", "formats"), [("channel", []), (COUPLED, ["torch", "onnx"])])
def test_a_recipe_prunes_shrinks_and_exports(structure: str, formats: list[str], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.format(structure=structure, formats=formats))
    dense, small, again, files = run(recipe.read(tmp_path / "r.yaml"), tmp_path / "out")
    assert small["metrics"] == dense["metrics"]
    assert again["metrics"]["test/accuracy"] == pytest.approx(dense["metrics"]["test/accuracy"])
    before, after = small["shrunk"]["parameters"]
    assert before == dense["size"]["parameters"]
    assert after == small["size"]["parameters"] < before
    assert small["shrunk"]["flops"][0] == 2 * (64 * 24 + 24 * 16 + 16 * 10)
    widths = [24 - small["shrunk"]["removed"]["layers.0"], 16 - small["shrunk"]["removed"]["layers.2"]]
    assert small["shrunk"]["flops"][1] == 2 * (64 * widths[0] + widths[0] * widths[1] + widths[1] * 10)
    assert widths == [12, 8]
    assert again["shrunk"]["parameters"] == [after, after]
    assert small["monitor"] == dense["monitor"]
    assert small["size"]["checkpoint_bytes"] < dense["size"]["checkpoint_bytes"]
    loaded, original = load(tmp_path / "out" / "small"), load(tmp_path / "out" / "dense")
    assert compact.masks(tmp_path / "out" / "small").keys() == compact.masks(tmp_path / "out" / "dense").keys()
    inputs = torch.randn(3, 64)
    torch.testing.assert_close(loaded(inputs), original(inputs), rtol=1e-4, atol=1e-5)
    assert {entry["format"]: entry["same_predictions"] for entry in files["exports"]} == dict.fromkeys(
        ["compact", *formats], True
    )


def test_a_stage_without_inputs_needs_data(tmp_path: Path) -> None:
    save(MLP(64, (4,), 10), tmp_path)
    with pytest.raises(ValueError, match="has no example inputs to trace the network with: give data"):
        job(Source(tmp_path), out=tmp_path / "out")
    found = job(Source(tmp_path), data=Digits(256), out=tmp_path / "out")
    assert "test/accuracy" in found["metrics"]
    assert load(tmp_path / "out")
