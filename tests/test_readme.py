"""What the README shows works as shown."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
RECIPES = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


def test_every_kind_of_example_is_there() -> None:
    assert (len(PYTHON), len(RECIPES)) == (3, 1)


@pytest.mark.parametrize("code", [code for code in PYTHON if "runs/" not in code], ids=["callback", "loss"])
def test_python_runs(code: str, tmp_path: Path) -> None:
    code = code.replace("Trainer(", "Trainer(enable_progress_bar=False, enable_checkpointing=False, logger=False, ")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_recipe_is_one(tmp_path: Path) -> None:
    from workbench import recipe as recipes
    from workbench.run import check

    (tmp_path / "recipe.yaml").write_text(RECIPES[0], encoding="utf-8")
    assert [arguments.stage.name for arguments in check(recipes.read(tmp_path / "recipe.yaml"))] == [
        "teacher",
        "student",
        "ticket",
        "checkpoint",
    ]


def test_every_path_named_exists() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / target).exists(), target


def test_the_test_command_is_the_one_that_continuous_integration_runs() -> None:
    command = next(line for line in README.splitlines() if line.endswith("python -m pytest")).split(" && ")[-1]
    ci = (Path(__file__).parent.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert command in ci.splitlines()
