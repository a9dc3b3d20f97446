"""The ``lightning`` command: ``run`` is ours, anything else goes to the command line it would have gone to.

Help and listing read recipes and job sources only; they import no torch.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from workbench import recipe as recipes
from workbench.recipe import Recipe, RecipeError

_USAGE = """usage: {program} run RECIPE [--STAGE.ARGUMENT VALUE ...] [--out DIR] [--print] [--replace]

Run a recipe: the path of a YAML file, or the name of a bundled one.

  {program} run                     list the bundled recipes
  {program} run RECIPE --help       its stages and their arguments
  {program} run RECIPE --print      the resolved recipe, without running it
  --STAGE.ARGUMENT VALUE            override an argument, e.g. --student.temperature 2
  --out DIR                         the run's folder, runs/RECIPE by default; a stopped run goes on there
  --replace                         move stages that were made with other arguments aside and run them anew
"""


def main(program: str = "lightning", argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 2 on a mistake of the user's, 1 if a stage fails."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] != ["run"]:
        if program == "lightning":
            return _hand_over()
        return _exit(_usage(program), 0 if arguments in ([], ["--help"], ["-h"]) else 2)
    try:
        code = _run(program, arguments[1:])
    except RecipeError as error:
        _exit(f"error: {error}", 2)
    else:
        sys.exit(code)


def _run(program: str, arguments: list[str]) -> int:
    if arguments in (["--help"], ["-h"]):
        Console().print(_usage(program), markup=False, highlight=False)
        return 0
    name, options = _parsed(arguments)
    if name is None:
        _list(program)
        return 0
    path = recipes.find(name)
    recipe = recipes.read(path, options["overrides"])
    if options["help"]:
        _help(recipe)
        return 0
    if options["print"]:
        from workbench.run import check
        from workbench.show import resolved

        Console(soft_wrap=True).print(resolved(check(recipe)), markup=False, highlight=False)
        return 0
    from workbench.run import StageError, run
    from workbench.show import ending

    out = Path(options["out"] or Path("runs") / path.stem)
    try:
        records = run(recipe, out, options["replace"])
    except StageError as error:
        _print_error(f"error: {error}\nThe full traceback is in the stage's record.json under {out}.")
        return 1
    except KeyboardInterrupt:
        _print_error(f"stopped; the same command goes on from here ({out})")
        return 130
    ending(records, out)
    return 0


def _parsed(arguments: list[str]) -> tuple[str | None, dict]:
    """Recipe name, and options with the overrides in order."""
    options: dict = {"overrides": [], "out": None, "print": False, "replace": False, "help": False}
    name: str | None = None
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            options["help"] = True
        elif word in ("--print", "--replace"):
            options[word[2:]] = True
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                if not rest:
                    raise RecipeError(f"{word}: a value is missing")
                value = rest.pop(0)
            if key == "out":
                options["out"] = value
            else:
                options["overrides"].append((key, value))
        elif name is None:
            name = word
        else:
            raise RecipeError(f"{word!r}: one recipe at a time; arguments are given as --stage.argument value")
    if name is None and any(options.values()):
        raise RecipeError("name a recipe first; 'run' alone lists them")
    return name, options


def _list(program: str) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, path in recipes.recipes().items():
        table.add_row(name, recipes.headline(path))
    console = Console()
    console.print(table)
    console.print(f"\nRun one with: {program} run NAME", markup=False, highlight=False)


def _help(recipe: Recipe) -> None:
    console = Console()
    console.print(f"{recipe.path}: {recipes.headline(recipe.path)}", markup=False, highlight=False)
    for stage in recipe.stages:
        console.print(f"\n{stage.name}: {stage.job.name}. {stage.job.summary}", markup=False, highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for parameter in stage.job.parameters:
            if parameter.name == "out":
                continue
            given = stage.arguments.get(parameter.name)
            value = "given" if isinstance(given, (dict, list)) else f"= {given}" if given is not None else ""
            default = value or (
                parameter.default if parameter.default == "required" else f"default {_short(parameter.default)}"
            )
            table.add_row(f"--{stage.name}.{parameter.name}", default, _short(parameter.annotation), parameter.description)
        console.print(table)


def _short(source: str) -> str:
    """Source text of a type or default as a person would say it."""
    return source.replace("LightningDataModule", "data module").replace("Duration(1, 'ep')", "1ep").replace(" | None", "")


def _hand_over() -> None:
    """Call lightning-sdk's command line if it is installed, else fabric's."""
    if find_spec("lightning_sdk") is not None:
        (entry,) = entry_points(group="console_scripts", name="lightning-sdk")
        sys.exit(entry.load()())
    from lightning.fabric.cli import _main  # what the package's own `fabric` script calls

    sys.exit(_main())


def _usage(program: str) -> str:
    return _USAGE.format(program=program if program == "lightning" else f"python -m {program}")


def _exit(text: str, code: int) -> None:
    (Console() if code == 0 else Console(stderr=True)).print(text, markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _print_error(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
