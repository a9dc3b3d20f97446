"""Reading recipes: sharing, including, overriding. What a mistake says is in test_cli.py."""

from pathlib import Path
from typing import Any

import pytest

from workbench.launcher import recipe
from workbench.launcher.recipe import RecipeError

MODEL = "{class_path: workbench.models.MLP, init_args: {classes: 10}}"
TWO = f"""
seed_everything: 7
data: fragments/data.yaml
trainer: {{max_epochs: 3, accelerator: cpu}}
teacher: {{job: fit, model: {MODEL}}}
student: {{job: distill, teacher: teacher, model: {MODEL}, trainer: {{max_epochs: 5}}}}
"""
DATA = {"class_path": "workbench.data.Digits", "init_args": {"batch_size": 32}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "fragments").mkdir()
    (tmp_path / "fragments" / "data.yaml").write_text(
        "class_path: workbench.data.Digits\ninit_args: {batch_size: 32}\n"
    )
    (tmp_path / "r.yaml").write_text(TWO)
    return tmp_path / "r.yaml"


def arguments(path: Path, *overrides: tuple[str, str]) -> dict[str, dict[str, Any]]:
    return {stage.name: stage.arguments for stage in recipe.read(path, overrides).stages}


def test_shared_arguments_go_where_they_are_taken_and_are_merged_key_by_key(path: Path) -> None:
    found = arguments(path)
    assert list(found) == ["teacher", "student"]
    assert found["teacher"]["trainer"] == {"max_epochs": 3, "accelerator": "cpu"}
    assert found["student"]["trainer"] == {"max_epochs": 5, "accelerator": "cpu"}
    assert all(given["seed_everything"] == 7 and given["data"] == DATA for given in found.values())
    assert "teacher" not in found["teacher"]


def test_a_class_of_the_stage_replaces_the_shared_one_whole(path: Path) -> None:
    path.write_text(TWO + f"third: {{job: fit, model: {MODEL}, data: {{class_path: mine.Data}}}}\n")
    assert arguments(path)["third"]["data"] == {"class_path": "mine.Data"}


def test_stages_do_not_share_the_objects_they_share(path: Path) -> None:
    found = arguments(path)
    found["teacher"]["data"]["init_args"]["batch_size"] = 1
    assert found["student"]["data"] == DATA


@pytest.mark.parametrize(
    ("key", "text", "stage", "inside", "value"),
    [
        ("student.temperature", "2", "student", ["temperature"], 2),
        ("student.temperature", "1e-3", "student", ["temperature"], 1e-3),
        ("student.model.width", "9", "student", ["model", "init_args", "width"], 9),
        ("student.model.init_args.width", "9", "student", ["model", "init_args", "width"], 9),
        ("student.model", "{class_path: a.B}", "student", ["model"], {"class_path": "a.B"}),
        ("student.data.batch_size", "9", "student", ["data", "init_args", "batch_size"], 9),
        ("student.trainer.max_epochs", "9", "student", ["trainer"], {"max_epochs": 9, "accelerator": "cpu"}),
        ("trainer.max_epochs", "9", "teacher", ["trainer", "max_epochs"], 9),
        ("trainer.max_epochs", "9", "student", ["trainer", "max_epochs"], 5),
        ("teacher.trainer.max_steps", "9", "teacher", ["trainer", "max_epochs"], 3),
        ("data.batch_size", "9", "teacher", ["data", "init_args", "batch_size"], 9),
        ("seed_everything", "9", "student", ["seed_everything"], 9),
        ("checkpoint", "5it", "student", ["checkpoint"], "5it"),
        ("teacher.optimizer.class_path", "torch.optim.SGD", "teacher", ["optimizer", "class_path"], "torch.optim.SGD"),
    ],
)
def test_an_override(path: Path, key: str, text: str, stage: str, inside: list[str], value: object) -> None:
    found: Any = arguments(path, (key, text))[stage]
    for name in inside:
        found = found[name]
    assert found == value


def test_overrides_of_one_stage_leave_the_others_alone(path: Path) -> None:
    found = arguments(path, ("student.data.batch_size", "9"))
    assert found["teacher"]["data"] == DATA


def test_a_trainer_override_needs_no_trainer_in_the_recipe(path: Path) -> None:
    path.write_text(f"teacher: {{job: fit, model: {MODEL}, data: fragments/data.yaml}}\n")
    assert arguments(path, ("trainer.max_steps", "2"))["teacher"]["trainer"] == {"max_steps": 2}


def test_fragments_are_found_beside_the_recipe_above_it_here_and_in_the_bundle(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "r.yaml").write_text(TWO)
    assert arguments(deep / "r.yaml")["teacher"]["data"] == DATA, "two folders above"
    monkeypatch.chdir(deep)
    assert arguments(Path("r.yaml"))["teacher"]["data"] == DATA, "the same, by a relative path"
    elsewhere = tmp_path.parent / "elsewhere.yaml"
    elsewhere.write_text(TWO)
    monkeypatch.chdir(tmp_path)
    assert arguments(elsewhere)["teacher"]["data"] == DATA, "here"
    elsewhere.write_text(TWO.replace("fragments/data.yaml", "configs/data/digits.yaml"))
    assert arguments(elsewhere)["teacher"]["data"]["class_path"] == "workbench.data.Digits", "bundled"


def test_a_stage_may_be_a_fragment_and_have_fragments(path: Path, tmp_path: Path) -> None:
    (tmp_path / "fragments" / "teacher.yaml").write_text(f"job: fit\nmodel: {MODEL}\ndata: fragments/data.yaml\n")
    path.write_text("teacher: fragments/teacher.yaml\n")
    assert arguments(path)["teacher"]["data"] == DATA
    assert arguments(path, ("teacher.data.batch_size", "9"))["teacher"]["data"]["init_args"] == {"batch_size": 9}


def test_an_override_may_name_a_fragment(path: Path, tmp_path: Path) -> None:
    (tmp_path / "fragments" / "other.yaml").write_text("class_path: a.B\n")
    for key in ("data", "teacher.data"):
        assert arguments(path, (key, "fragments/other.yaml"))["teacher"]["data"] == {"class_path": "a.B"}


def test_bundled_recipes_are_found_by_name() -> None:
    known = recipe.recipes()
    assert recipe.find("digits") == known["digits"]
    assert all(recipe.headline(path) for path in known.values())


def test_a_file_counts_before_a_bundled_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").write_text("")
    monkeypatch.chdir(tmp_path)
    assert recipe.find("digits") == Path("digits")


def test_nearest_says_one_or_all_or_nothing() -> None:
    assert recipe.nearest("temprature", ["temperature", "teacher"]) == "; did you mean 'temperature'?"
    assert recipe.nearest("x", ["one", "two"]) == "; allowed: one, two"
    assert recipe.nearest("x", []) == ""
    assert recipe.nearest("x", [f"long{i}" for i in range(99)]) == ""


def test_an_error_says_where() -> None:
    error = recipe.Recipe(Path("r.yaml"), ()).error("is wrong", "teacher", "model")
    assert isinstance(error, RecipeError)
    assert str(error) == "r.yaml, stage 'teacher', key 'model': is wrong"


def test_a_stage_that_starts_from_another_takes_nothing_shared(tmp_path: Path) -> None:
    """Else the shared trainer would come instead of the one that the stage it starts from was given."""
    text = """
trainer: {max_epochs: 3}
seed_everything: 4
first: {job: fit, model: {class_path: workbench.models.MLP}, trainer: {max_epochs: 6}, data: {class_path: x.Y}}
second: {job: hunt, start: first, levels: 1}
third: {job: hunt, start: first, levels: 1, trainer: {max_epochs: 9}}
"""
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    first, second, third = recipe.read(tmp_path / "r.yaml").stages
    assert first.arguments["trainer"] == {"max_epochs": 6}
    assert first.arguments["seed_everything"] == 4
    assert second.arguments == {"start": "first", "levels": 1}
    assert third.arguments["trainer"] == {"max_epochs": 9}
