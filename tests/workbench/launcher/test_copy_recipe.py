"""Copies of recipes: complete, runnable from anywhere, with every comment. The command line is in test_cli.py."""

from pathlib import Path

import pytest

from workbench import yaml_io
from workbench.launcher import recipe
from workbench.launcher.copy_recipe import copy_recipe, standalone

BUNDLED = recipe.recipes()


@pytest.mark.parametrize("name", BUNDLED)
def test_a_copy_is_the_same_recipe_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copy_recipe(name, None, "lightning")
    text = (tmp_path / f"{name}.yaml").read_text()
    copied, original = recipe.read(Path(f"{name}.yaml")), recipe.read(BUNDLED[name])
    assert copied.stages == original.stages
    commands = BUNDLED[name].read_text().replace(f"lightning run {name}", f"lightning run {name}.yaml")
    for line in commands.splitlines():
        assert line in text.splitlines() or line.endswith(".yaml"), "all but the fragments stands there as it was"
    assert "\ndata: configs" not in text, "fragments are written out"


def test_fragments_are_written_out_where_a_recipe_includes_them(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("# The data\nclass_path: a.B\ninit_args:\n  size: 1  # small\n")
    (tmp_path / "stage.yaml").write_text("job: fit\ndata: data.yaml\n")
    (tmp_path / "r.yaml").write_text(
        "# Head\n\nteacher: stage.yaml\nother:\n    job: fit\n\n    data: data.yaml  # mine\n"
        "    model:\n        data: data.yaml\nnot_a_stage:\n  data: data.yaml\nmissing: missing.yaml\n"
    )
    assert standalone(tmp_path / "r.yaml") == (
        "# Head\n\nteacher:  # stage.yaml\n  job: fit\n  data:  # data.yaml\n"
        "    # The data\n    class_path: a.B\n    init_args:\n      size: 1  # small\n"
        "other:\n    job: fit\n\n    data:  # data.yaml\n"
        "      # The data\n      class_path: a.B\n      init_args:\n        size: 1  # small\n"
        "    model:\n        data: data.yaml\nnot_a_stage:\n  data: data.yaml\nmissing: missing.yaml\n"
    ), "an argument of a class and what no job takes stay text, and what is missing is said when it is run"
    yaml_io.load(standalone(tmp_path / "r.yaml"))


def test_a_target_may_be_a_folder_or_in_a_new_one(tmp_path: Path) -> None:
    copy_recipe("digits", str(tmp_path), "lightning")
    said = copy_recipe("digits", str(tmp_path / "new" / "mine.yaml"), "python -m workbench")
    assert f"python -m workbench run {tmp_path / 'new' / 'mine.yaml'} --help" in said
    assert (tmp_path / "digits.yaml").read_text() == (tmp_path / "new" / "mine.yaml").read_text()
    (tmp_path / "gone.yaml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(recipe.RecipeError, match=r"gone.yaml: exists and is not overwritten"):
        copy_recipe("digits", str(tmp_path / "gone.yaml"), "lightning")
