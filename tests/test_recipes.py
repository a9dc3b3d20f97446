"""Every bundled recipe is found, checked against its jobs, and run for two steps."""

import json
from pathlib import Path

import pytest

from tests.helpers.data_files import small_data_sets
from workbench import records
from workbench.launcher import recipe as recipes
from workbench.launcher.runner import check, run

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
FRAGMENTS = sorted((ROOT / "configs").rglob("*.yaml"))
SHORT = [("trainer.accelerator", "cpu"), ("trainer.limit_train_batches", "2"), ("trainer.limit_test_batches", "2")]
BERT = "{model_type: bert, vocab_size: 100, hidden_size: 16, num_hidden_layers: 6, num_attention_heads: 2}"
TIMES = "begin: 0it, end: 2it, every: 1it"
COUPLED = "{class_path: prune.Coupled, init_args: {example_inputs: [2, 64]}}"
TIED = f"density: 0.5, pruner: {{class_path: prune.Pruner, init_args: {{structure: {COUPLED}}}}}"
HUNTS = (("run.density", "[0.5]"), ("run.rewind", "1it"), ("over.seed", "[0]"))
# What makes a recipe for real data run on a few samples: batches that they fill, a model that is not downloaded.
SMALL: dict[str, list[tuple[str, str]]] = {
    "cifar10": [("data.batch_size", "8"), ("data.validation", "20")],
    "clinc150": [("data.batch_size", "8")],
    "minilm": [("data.batch_size", "8"), ("data.tokenizer", "word"), ("teacher.model.encoder", BERT)],
    "ett": [("data.batch_size", "32"), ("data.split", "[200, 125, 125]")],
    "lottery": [
        ("data.batch_size", "8"),
        ("data.validation", "20"),
        *[("hunts.run.levels", "1"), ("hunts.run.trainer.max_epochs", "1"), ("hunts.over.seed", "[0]")],
    ],
    "mnist": [("data.batch_size", "8"), ("data.validation", "20")],
    "pairs": [
        ("data.batch_size", "32"),
        ("sparse.trainer.callbacks", f"[{{class_path: prune.GradualPruning, init_args: {{density: 0.5, {TIMES}}}}}]"),
    ],
    "segments": [("data.batch_size", "4"), ("data.train", "16"), ("data.val", "4"), ("data.test", "4")],
    "shakespeare": [("data.batch_size", "4"), ("data.length", "16")],
    "sparse": [
        ("gradual.trainer.callbacks", f"[{{class_path: prune.GradualPruning, init_args: {{density: 0.5, {TIMES}}}}}]"),
        ("rigl.trainer.callbacks", f"[{{class_path: prune.DynamicSparsity, init_args: {{density: 0.5, {TIMES}}}}}]"),
        ("narrow.trainer.callbacks", f"[{{class_path: prune.GradualPruning, init_args: {{{TIED}, {TIMES}}}}}]"),
    ],
    "taught": [
        *[("data.batch_size", "8"), ("data.validation", "20"), ("student.trainer.max_steps", "4")],
        *[(f"{arm}.{key}", value) for arm in ("labels", "taught") for key, value in HUNTS],
    ],
    "tickets": [(f"hunts.{key}", value) for key, value in (*HUNTS, ("run.trainer.max_epochs", "2"), ("workers", "1"))],
    "vowels": [("data.batch_size", "8")],
    "wikitext": [("data.batch_size", "4"), ("data.length", "16")],
}
STUDENTS = {"distill", "fit"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data_sets(tmp_path_factory.mktemp("data"))


def test_the_number_of_recipes() -> None:
    assert len(FILES) == 15, "a recipe was added or lost: say so here"
    assert len(recipes.recipes()) == len(FILES)
    assert SMALL.keys() == {path.stem for path in FILES} - {"digits"}


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
def test_a_recipe_runs_for_two_steps(path: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(data))
    stages = recipes.read(path).stages
    changes = [*SHORT, *SMALL.get(path.stem, [])]
    changes += [(f"{stage.name}.trainer.max_steps", "2") for stage in stages if stage.job.name in STUDENTS]
    hunts = [stage.name for stage in stages if stage.job.name == "hunt"]
    changes += [(f"{name}.{key}", value) for name in hunts for key, value in (("rewind", "1it"), ("density", "0.5"))]
    recipe = recipes.read(path, changes)
    check(recipe)
    finished = run(recipe, tmp_path)
    assert [record["status"] for record in finished] == ["finished"] * len(recipe.stages)
    assert (tmp_path / "report" / "index.html").is_file(), "each tells what came of it"
    written = [json.loads(each.read_text()) for each in tmp_path.glob("**/record.json") if "level_" not in str(each)]
    assert len(written) >= len(finished)
    assert {record.get("stage"): broken for record in written if (broken := records.violations(record))} == {}
