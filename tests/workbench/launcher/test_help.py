"""Help and listing."""

from pathlib import Path

import pytest

from workbench.launcher import help, recipe


@pytest.mark.parametrize(
    ("annotation", "word"),
    [
        ("float", "FLOAT"),
        ("int | None", "INT"),
        ("Optional[str]", "STR"),
        ("Union[int, str, None]", "INT|STR"),
        ("'Path | None'", "PATH"),
        ("list[str] | None", "LIST"),
        ("dict[str, Any]", "DICT"),
        ("nn.Module", "MODULE"),
        ("LightningDataModule", "DATAMODULE"),
        ("OptimizerCallable | None", "OPTIMIZER"),
        ("Literal['a', 'b']", "{a,b}"),
        ("int | Literal['last']", "INT|{last}"),
        ("typing.Literal[1]", "{1}"),
    ],
)
def test_a_type_is_one_word(annotation: str, word: str) -> None:
    assert help.metavar(annotation) == word


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("narrow")
def test_the_recipes_values_beat_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "# What it is for\n"
        "trainer: {max_epochs: 3}\n"
        "one: {job: fit, model: {class_path: a.B}}\n"
        "two: {job: distill, teacher: one, temperature: 2, trainer: {accelerator: cpu}}\n"
    )
    text = help.describe(recipe.read(path))
    lines = text.splitlines()
    assert lines[:2] == [str(path), "What it is for"]
    assert "  --one.model MODULE  (a.B)" in lines
    assert "  --two.temperature FLOAT  (2)" in lines
    assert "  --two.alpha FLOAT  (0.9)" in lines
    assert "  --two.checkpoint DURATION  (1ep)" in lines
    assert "  --two.teacher LIST|SOURCE  (one)" in lines
    assert "  --two.data DATAMODULE  (required)" in lines
    assert "  --two.trainer DICT  ({max_epochs: 3, accelerator: cpu})" in lines
    assert "  --two.task TASK" in lines, "None says nothing"
    assert any(line.startswith("      Softens both outputs, 4 by default;") for line in lines)
    assert ".out " not in text


@pytest.mark.usefixtures("narrow")
def test_eighty_columns_are_enough() -> None:
    for name, path in recipe.recipes().items():
        text = help.describe(recipe.read(path)).partition("\n")[2]
        assert max(map(len, (text + "\n" + help.listing("lightning")).splitlines())) <= 80, name


def test_the_listing_has_every_recipe_with_its_headline() -> None:
    text = " ".join(help.listing("lightning").split())
    for name, path in recipe.recipes().items():
        assert f"{name} {recipe.headline(path)}" in text


@pytest.mark.usefixtures("narrow", "pruning")
def test_the_fields_of_a_dataclass_stand_below_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("one: {job: prune_in_steps, levels: {count: 3}, rewind: 2ep}\n")
    lines = help.describe(recipe.read(path)).splitlines()
    start = lines.index("  --one.levels INT|STEPS  ({count: 3})")
    assert lines[start + 1 : start + 6] == [
        "      How far.",
        "    --one.levels.count INT  (3)",
        "        How many, see a.b and `c`.",
        "    --one.levels.rate FLOAT  (0.2)",
        "        Share of each.",
    ]
    assert "  --one.rewind DURATION|REWIND  (2ep)" in lines
    assert "    --one.rewind.at DURATION  (required)" in lines
    assert "    --one.rewind.mode {all,weights}  (all)" in lines
    assert "      --one.rewind.inner.rate FLOAT  (0.2)" in lines
    assert "    --one.terms.NAME.count INT" in lines
