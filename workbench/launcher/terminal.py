"""What a run prints: the resolved recipe, and the summary at its end."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from workbench import yaml_io
from workbench.distributed.ranks import rank
from workbench.launcher.arguments import Arguments
from workbench.launcher.recipe import Recipe, headline
from workbench.report.job import summary

_WIDE = 120


def format_resolved(recipe: Recipe, plan: Sequence[Arguments]) -> str:
    """The recipe as YAML with every default written out: itself a recipe, of the same stages."""
    stages = {a.stage.name: {"job": a.stage.job.name, **a.resolved()} for a in plan}
    title = headline(recipe.path)
    return (f"# {title}\n" if title else "") + yaml_io.dump(stages)


def print_summary(records: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Print the summary table and where the checkpoints and the page are. Silent on ranks above zero."""
    if rank() != 0:
        return
    try:
        table = summary(out)
    except ValueError as error:
        # The run is over and its records are whole: a folder that cannot be read must not make it a failure.
        sys.stdout.write(f"no summary: {error}\n")
    else:
        # A file or a pipe has no width that lines must fit.
        Console(width=None if sys.stdout.isatty() else _WIDE).print(table)
    for record in records:
        folder = out / record["stage"]
        for export in record.get("exports", []):
            sys.stdout.write(f"checkpoint  {folder / export['path']}\n")
        if page := record.get("page"):
            sys.stdout.write(f"page        {folder / page}\n")
