"""What the README and the pages beside it show works as shown."""

import re
from pathlib import Path

import pytest

from docs import pages as site
from tests.helpers.processes import forked
from workbench.launcher import recipe as recipes
from workbench.launcher.runner import check

ROOT = Path(__file__).parent.parent
GENERATED = ("recipes", "reference", "changelog.md")  # by the build of the site, from the code
WRITTEN = [
    path for path in sorted((ROOT / "docs").rglob("*.md")) if path.relative_to(ROOT / "docs").parts[0] not in GENERATED
]
FILES = (ROOT / "README.md", *WRITTEN)
PAGES = {
    path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/"): path.read_text("utf-8") for path in FILES
}
README = PAGES["README"]
QUIET = "Trainer(accelerator='cpu', enable_progress_bar=False, enable_checkpointing=False, logger=False, "


def examples(language: str) -> dict[str, str]:
    """Every block of code, by its page and number."""
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return {f"{page}-{n}": code for page, text in PAGES.items() for n, code in enumerate(pattern.findall(text))}


PYTHON, RECIPES = examples("python"), examples("yaml")


def test_every_kind_of_example_is_there() -> None:
    count = {name: [sum(key.startswith(f"{name}-") for key in kind) for kind in (PYTHON, RECIPES)] for name in PAGES}
    assert {name: kinds for name, kinds in count.items() if any(kinds)} == {
        "README": [3, 1],
        "distillation": [4, 1],
        "extending": [5, 0],
        "guides/ship": [0, 2],
        "guides/tasks": [1, 1],
        "guides/trainer": [3, 0],
        "guides/transformer": [1, 1],
        "how/records": [1, 0],
        "pruning": [4, 1],
        "start": [1, 1],
        "tickets": [1, 3],
    }


@pytest.mark.parametrize("name", [name for name, code in PYTHON.items() if "runs/digits" not in code])
def test_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.sub(r"(?<!\w)Trainer\(", QUIET, PYTHON[name])
    monkeypatch.chdir(tmp_path)
    process = forked(exec, code, {"__name__": "__main__"}, output=tmp_path / "output.txt")
    process.join()
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPES[name], encoding="utf-8")
    stages = [arguments.stage.name for arguments in check(recipes.read(tmp_path / "recipe.yaml"))]
    assert stages == re.findall(r"^(\w+):(?:\n  | \{)job:", RECIPES[name], re.MULTILINE)
    assert len(stages) >= 3


def test_every_path_named_exists() -> None:
    generated = site.pages()
    for page, text in PAGES.items():
        folder = ROOT if page == "README" else (ROOT / "docs" / page).parent
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            path = (folder / target).resolve()
            assert path.exists() or path.relative_to(ROOT / "docs").as_posix() in generated, target


def test_every_bundled_recipe_is_named_in_a_page() -> None:
    for name in recipes.recipes():
        assert any(f"`{name}`" in text or f"run {name}" in text for text in PAGES.values()), name


def test_the_test_command_is_the_one_that_continuous_integration_runs() -> None:
    command = next(line for line in README.splitlines() if "python -m pytest" in line).split(" && ")[-1]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in ci.splitlines()
