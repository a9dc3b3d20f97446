"""The ``lightning`` command: ``run`` runs a recipe, any other command is forwarded to Lightning's own command line.

Listing, help and copying read recipes and the sources of jobs only; they import no torch.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from workbench.launcher import help
from workbench.launcher import recipe as recipes
from workbench.launcher.copy_recipe import copy_recipe
from workbench.launcher.recipe import RecipeError

_USAGE = """\
usage: {program} run RECIPE [--STAGE.ARGUMENT VALUE ...]
         [--out DIR] [--print] [--replace]
       {program} run --copy RECIPE [FILE.yaml | -]

Run a recipe: the path of a YAML file, or the name of a bundled one.

  {program} run                 list the bundled recipes
  {program} run RECIPE --help   its stages and their arguments
  {program} run RECIPE --print  it, with every default written out
  {program} run --copy RECIPE   write it to a file of your own, to edit

  --STAGE.ARGUMENT VALUE  override an argument, e.g. --student.temperature 2;
                          --ARGUMENT VALUE shared by stages
  --out DIR               the run's folder, runs/RECIPE by default; what is
                          finished there is kept, what was stopped goes on
  --replace               move stages that were made with other arguments
                          aside, to DIR/replaced, and run them anew
"""
_FLAGS = ("--print", "--replace", "--copy")


@dataclass
class Options:
    """The parsed command line."""

    recipe: str | None = None
    overrides: list[tuple[str, str]] = field(default_factory=list)
    out: str | None = None
    print: bool = False
    replace: bool = False
    help: bool = False
    copy: bool = False
    target: str | None = None


def main(program: str = "lightning", argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 2 on a mistake in the command or the recipe, 1 if a stage fails, 130 on Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] != ["run"]:
        if program == "lightning":
            sys.exit(_forward())
        wants_help = arguments in ([], ["--help"], ["-h"])
        _write(_usage(program), error=not wants_help)
        sys.exit(0 if wants_help else 2)
    try:
        sys.exit(_run(program, parse(arguments[1:])))
    except RecipeError as error:
        _write(f"error: {error}", error=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _write("stopped; the same command goes on from here", error=True)
        sys.exit(130)


def parse(arguments: Sequence[str]) -> Options:
    """What follows ``run``: one recipe, flags, and overrides in order.

    Raises:
        RecipeError: On a flag that does not exist, a missing value, or two recipes.
    """
    options, rest = Options(), list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            options.help = True
        elif word in _FLAGS:
            setattr(options, word[2:], True)
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals and (not rest or rest[0].startswith("--")):
                raise RecipeError(f"{word}: a value is missing; write {word} VALUE")
            value = value if equals else rest.pop(0)
            if f"--{key}" in _FLAGS:
                raise RecipeError(f"--{key} takes no value, {value!r} is given")
            if key != "out":
                options.overrides.append((key, value))
            elif value:
                options.out = value
            else:
                raise RecipeError("--out: a folder is missing; write --out DIR")
        elif word.startswith("-") and len(word) > 1:
            raise RecipeError(f"{word}: no such option; arguments are given as --stage.argument value")
        elif options.recipe is None:
            options.recipe = word
        elif options.target is None and ("--copy" in arguments):
            options.target = word
        else:
            raise RecipeError(f"{word}: one recipe at a time, {options.recipe} is given already")
    if options.recipe is None and options != Options(help=options.help):
        raise RecipeError("no recipe is named; 'run' alone lists the bundled ones")
    if options.copy and (options.overrides or options.out or options.print or options.replace):
        raise RecipeError("--copy takes a recipe and a file only: edit the copy, or give arguments when you run it")
    return options


def _run(program: str, options: Options) -> int:
    if options.recipe is None:
        _write(_usage(program) if options.help else help.listing(program_name(program)))
        return 0
    if options.copy and not options.help:
        _write(copy_recipe(options.recipe, options.target, program_name(program)))
        return 0
    path = recipes.find(options.recipe)
    recipe = recipes.read(path, options.overrides)
    if options.help:
        _write(help.describe(recipe))
        return 0
    from workbench.launcher.runner import StageError, check, run
    from workbench.launcher.terminal import format_resolved, print_summary

    if options.print:
        _write(format_resolved(recipe, check(recipe)))
        return 0
    out = Path(options.out or Path("runs") / path.stem)
    try:
        records = run(recipe, out, options.replace)
    except StageError as error:
        _write(f"error: {error}", error=True)
        return 1
    print_summary(records, out)
    return 0


def program_name(program: str) -> str:
    """What the user types to start this program."""
    return program if program == "lightning" else f"python -m {program}"


def _usage(program: str) -> str:
    return _USAGE.format(program=program_name(program))


def _forward() -> Any:
    """Call lightning-sdk's command line if it is installed, else fabric's; returns the exit status."""
    try:
        scripts = distribution("lightning-sdk").entry_points.select(group="console_scripts")
    except PackageNotFoundError:
        from lightning.fabric import cli as fabric

        if not hasattr(fabric, "_main"):  # what the package's own `fabric` script calls
            _write("error: fabric's command line needs the package click: pip install click", error=True)
            return 1
        return fabric._main()
    # It installs a script `lightning`, as this project does, and the same one as `lightning-sdk`.
    names = ("lightning", "lightning-sdk")
    return next(script for script in scripts if script.name in names).load()()


def _write(text: str, error: bool = False) -> None:
    stream = sys.stderr if error else sys.stdout
    stream.write(text if text.endswith("\n") else f"{text}\n")
