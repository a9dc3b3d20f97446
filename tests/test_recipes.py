"""Every bundled recipe is found, checked against its jobs, and run for two steps."""

from pathlib import Path

import pytest

from workbench import recipe as recipes
from workbench.run import check, run

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
FRAGMENTS = sorted((ROOT / "configs").rglob("*.yaml"))
SHORT = [("trainer.max_epochs", "2"), ("trainer.limit_train_batches", "2"), ("trainer.limit_test_batches", "2")]


def test_the_number_of_recipes() -> None:
    assert len(FILES) == 1, "a recipe was added or lost: say so here"
    assert len(recipes.recipes()) == len(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is(path: Path) -> None:
    assert 20 < len(recipes.headline(path)) < 100


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_every_fragment_is_used_and_not_runnable_alone(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert any(name in recipe.read_text(encoding="utf-8") for recipe in FILES)
    with pytest.raises(recipes.RecipeError):
        recipes.read(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_runs_for_two_steps(path: Path, tmp_path: Path) -> None:
    hunts = [stage.name for stage in recipes.read(path).stages if stage.job.name == "hunt"]
    short = [(f"{name}.{key}", value) for name in hunts for key, value in (("rewind", "1it"), ("density", "0.5"))]
    recipe = recipes.read(path, [*SHORT, *short])
    check(recipe)
    records = run(recipe, tmp_path)
    assert [record["status"] for record in records] == ["finished"] * len(recipe.stages)
