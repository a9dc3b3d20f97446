"""What a run says in the terminal: the resolved recipe, and how it ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from workbench.arguments import Arguments
from workbench.report import summary
from workbench.training import rank


def resolved(plan: Sequence[Arguments]) -> str:
    """The recipe as YAML with every default written out."""
    stages = {a.stage.name: {"job": a.stage.job.name, **a.resolved()} for a in plan}
    return yaml.safe_dump(stages, sort_keys=False, allow_unicode=True)


def ending(records: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Print the summary table and where the checkpoints and the page are. Silent on ranks above zero."""
    if rank() != 0:
        return
    console = Console()
    console.print(summary(out))
    for record in records:
        folder = out / record["stage"]
        for export in record.get("exports", []):
            console.print(f"checkpoint  {folder / export['path']}", markup=False, highlight=False, soft_wrap=True)
        if page := record.get("page"):
            console.print(f"page        {folder / page}", markup=False, highlight=False, soft_wrap=True)
