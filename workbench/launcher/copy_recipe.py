"""``lightning run --copy``: a bundled recipe as a file of the user's own, to edit. Light: no torch.

The copy runs from any folder: a fragment that it includes, such as ``configs/data/digits.yaml``, is written out in its
place, comments and all, so that everything to edit is in one file.
"""

import os
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.files import atomic_file
from workbench.launcher.recipe import ENDINGS, RecipeError, find, find_fragment, is_stage, load_mapping

_ENTRY = re.compile(r"(?P<indent> *)(?P<key>[\w-]+): +(?P<value>[^\s#]+) *(#.*)?")


def copy_recipe(name: str, target: str | None, program: str) -> str:
    """Write the recipe called ``name`` to ``target``; what to print.

    Args:
        name: A bundled recipe, or the path of one.
        target: The new file, or a folder for it; ``NAME.yaml`` in this folder if None; ``-`` only returns the recipe.
        program: What the user typed, e.g. ``lightning``, for the commands in the text that is returned.

    Raises:
        RecipeError: If there is no such recipe, or ``target`` exists, is not a YAML file's name or cannot be written.
    """
    path = find(name)
    text = standalone(path)
    if target == "-":
        return text
    file = Path(target or f"{path.stem}.yaml")
    if file.is_dir():
        file /= f"{path.stem}.yaml"
    if file.suffix not in ENDINGS:
        raise RecipeError(f"{file}: a recipe is a YAML file: write --copy {name} {file}.yaml")
    if os.path.lexists(file):
        another = file.with_stem(f"{file.stem}_2")
        raise RecipeError(f"{file}: exists and is not overwritten: give another name, --copy {name} {another}")
    try:
        with atomic_file(file) as temporary:
            # The comments show the command of the bundled recipe: in the copy they name the copy.
            text = re.sub(rf"lightning run {re.escape(path.stem)}(?![\w.])", f"lightning run {file}", text)
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{file}: cannot be written: {error.strerror}") from error
    data = "DATA=/folder/of/data " if "$DATA" in text else ""
    return (
        f"{path} is copied to {file}. Edit it, then run it, or see its stages and their arguments:\n"
        f"  {data}{program} run {file}\n"
        f"  {program} run {file} --help\n"
    )


def standalone(path: Path) -> str:
    """The text of the recipe at ``path`` with the fragments of shared arguments, stages and their arguments inserted.

    Fragments elsewhere, as in a flow mapping or a grid, stay references, which are found in the bundle too.
    """
    return _with_fragments(path, load_mapping(path), path.read_text(encoding="utf-8-sig"))


def _with_fragments(path: Path, content: Mapping[str, Any], text: str) -> str:
    lines: list[str] = []
    indents = [""]  # of the keys whose values may be fragments: of the file's own, and of the last stage's
    arguments: Mapping[str, Any] = {}  # of that stage
    for line in text.splitlines():
        if line.strip() and not line.startswith((" ", "#")):
            stage = content.get(line.partition(":")[0])
            arguments, indents = (stage or {}, [""]) if is_stage(stage) else ({}, ["", ""])
        entry = _ENTRY.fullmatch(line)
        if entry and len(indents) == 1 and entry["indent"]:
            indents.append(entry["indent"])
        holder = {} if not entry or entry["indent"] not in indents else arguments if entry["indent"] else content
        # Anywhere else, as in the arguments of a class, a text that ends in .yaml is no fragment.
        fragment = entry and holder.get(entry["key"]) == entry["value"] and _fragment(path, entry["value"])
        if entry and fragment:
            lines.append(f"{entry['indent']}{entry['key']}:  # {entry['value']}")
            lines.append(textwrap.indent(fragment.rstrip(), f"{entry['indent']}  "))
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _fragment(path: Path, value: str) -> str | None:
    """The text of the fragment that ``value`` in the file ``path`` names; None if it is none."""
    file = find_fragment(path, value) if value.endswith(ENDINGS) else None
    if file is None:
        return None
    text, content = file.read_text(encoding="utf-8-sig"), load_mapping(file)
    # Only a stage's arguments may be fragments in turn, found from the recipe's folder.
    return _with_fragments(path, content, text) if is_stage(content) else text
