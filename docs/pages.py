"""Pages that the documentation makes from the code: recipes, jobs, tables of methods, records, and a picture."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import architecture
from workbench import records
from workbench.launcher import recipe as recipes
from workbench.launcher.jobs import Job, find_jobs
from workbench.launcher.signatures import REQUIRED, Parameter

ROOT = Path(__file__).parent.parent

API = {
    "workbench": ("workbench", "What both crafts share: modules, checkpoints, activations."),
    "models": ("workbench.models", "Networks with a pluggable activation."),
    "activations": (
        "workbench.models.activations",
        "Activations, their gains and gates, and swapping one for another.",
    ),
    "data": ("workbench.data", "Lightning data modules of images, text, series and bundled digits."),
    "tasks": ("workbench.tasks", "Loss, metrics and their direction."),
    "diagnostics": ("workbench.diagnostics", "Dead units, gates, gradient flow."),
    "distill": (
        "distill",
        "The teacher, the module that trains a student, the same as a callback and in transformers.",
    ),
    "losses": ("distill.losses", "Losses as functions and as modules."),
    "language": ("distill.language", "Losses of language models that never hold [tokens, vocabulary]."),
    "prune": ("prune", "Masks, what decides them, and the hunt for lottery tickets."),
    "criteria": ("prune.criteria", "What a weight is worth."),
    "structures": ("prune.structures", "Which weights are kept or pruned together."),
    "allocation": ("prune.allocation", "How a density is divided among layers."),
    "schedule": ("prune.schedule", "Density over time."),
    "policies": ("prune.policies", "Sparse training in a loop of your own."),
    "hf": ("prune.hf", "The same as callbacks of transformers' Trainer."),
    "connectivity": ("prune.connectivity", "Error barriers between trainings."),
    "accounting": ("prune.accounting", "Parameters, bytes, FLOPs and latency."),
}
"""Pages of the API: the module, and a line on it."""


@cache
def pages() -> dict[str, str]:
    """Every page made from the code, by its path below ``docs/``."""
    content = {
        "recipes/index.md": recipe_list(),
        **{f"recipes/{name}.md": recipe_page(name) for name in recipes.recipes()},
    }
    content |= {
        "reference/index.md": reference_index(),
        "reference/jobs.md": jobs_page(),
        "reference/methods.md": methods_page(),
    }
    content |= {f"reference/{name}.md": api_page(*row) for name, row in API.items()}
    content["how/rooms.svg"] = architecture.svg()
    content["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    content |= {f"_extra/schemas/{job}.json": json.dumps(records.json_schema(job), indent=2) for job in records.jobs()}
    return content


# Recipes


def recipe_list() -> str:
    """The bundled recipes in a table."""
    rows = [
        f"| [`{name}`]({name}.md) | {recipes.headline(path)} | {needs(path)} |"
        for name, path in recipes.recipes().items()
    ]
    return "\n".join(
        ["# Recipes", "", "`lightning run NAME` runs one; `lightning run --copy NAME` gives you the file to edit.", "",
         "| recipe | what it trains | data |", "| --- | --- | --- |", *rows, "",
         "```{toctree}", ":hidden:", "", *recipes.recipes(), "```", ""]
    )  # fmt: skip


def needs(path: Path) -> str:
    """Where a recipe's data comes from."""
    return "yours: `DATA=/folder`" if "DATA=" in path.read_text(encoding="utf-8") else "bundled"


def recipe_page(name: str) -> str:
    """One recipe: what it says of itself, its stages, the file, and the page that a run of it makes."""
    path = recipes.recipes()[name]
    text = path.read_text(encoding="utf-8")
    comment = [line.removeprefix("#").strip() for line in text.split("\n\n")[0].splitlines() if line.startswith("#")]
    recipe = recipes.read(path)
    stages = [
        f"| `{stage.name}` | [{stage.job.name}](../reference/jobs.md#{stage.job.name}) | {stage.job.summary} |"
        for stage in recipe.stages
    ]
    lines = [f"# {name}", "", *(f"{line}  " for line in comment), "", "```sh", f"lightning run {name}", "```", ""]
    if (Path(__file__).parent / "_extra" / "pages" / f"{name}.html").exists():
        lines += [f'<a href="../pages/{name}.html">The page that a run of it makes</a>', ""]
    lines += ["| stage | job | |", "| --- | --- | --- |", *stages, "", "```yaml", text.strip(), "```", ""]
    return "\n".join(lines)


# Reference


def reference_index() -> str:
    """What the reference holds."""
    rows = [f"| [`{module}`]({name}.md) | {line} |" for name, (module, line) in API.items()]
    toctree = ["```{toctree}", ":hidden:", "", "jobs", "methods", *API, "```", ""]
    return "\n".join(
        ["# Reference", "", "- [Jobs](jobs.md): every job of a recipe and its arguments.",
         "- [Methods](methods.md): losses, criteria, structures, allocations, schedules, each with its source.",
         "", "| module | |", "| --- | --- |", *rows, "", *toctree]
    )  # fmt: skip


def api_page(module: str, line: str) -> str:
    """The public names of a module, each by its docstring."""
    parts = [f"# `{module}`", "", line, "", "```{eval-rst}"]
    for name, thing in public(import_module(module)).items():
        if inspect.isclass(thing):
            parts += [f".. autoclass:: {module}.{name}", "   :members:", ""]
        elif inspect.isroutine(thing):
            parts += [f".. autofunction:: {module}.{name}", ""]
    return "\n".join([*parts, "```", ""])


def public(module: Any) -> dict[str, Any]:
    """The public names of a module: those of ``__all__``, else the functions and classes that it defines."""
    defined = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", None) or [name for name in defined if not name.startswith("_")]
    return {name: getattr(module, name) for name in names if not inspect.ismodule(getattr(module, name))}


def jobs_page() -> str:
    """Every job with its arguments, from its signature and docstring."""
    lines = [
        "# Jobs",
        "",
        "A stage of a recipe names a job and gives its arguments. `lightning run RECIPE --help` shows the same.",
        "",
    ]
    for job in sorted(ours(), key=lambda job: job.name):
        lines += [
            f"## {job.name}",
            "",
            *body_of(job),
            "",
            "| argument | type | default | |",
            "| --- | --- | --- | --- |",
        ]
        lines += [*(row for parameter in job.parameters for row in argument_rows(parameter)), ""]
    return "\n".join(lines)


def argument_rows(parameter: Parameter, above: str = "") -> Iterator[str]:
    """A row for an argument, and one for each field of it if it is a dataclass."""
    name = f"{above}{parameter.name}"
    about = cell(parameter.description)
    yield f"| `{name}` | {code(parameter.annotation)} | {default_of(parameter.default)} | {about} |"
    for each in parameter.fields:
        yield from argument_rows(each, f"{name}.")


def ours() -> list[Job]:
    """The jobs that this project brings, not those of other packages installed beside it."""
    return [job for job in find_jobs().values() if job.entry.module.split(".")[0] in architecture.PACKAGES]


def body_of(job: Job) -> list[str]:
    """A job's docstring above its arguments."""
    text = inspect.cleandoc(job.function.__doc__ or "")
    return [linked(text.partition("\nArgs:")[0].strip())]


def methods_page() -> str:
    """Tables of methods, a row each: what it is, its formula where its docstring has one, its source."""
    from distill import losses
    from prune.allocation import ALLOCATIONS
    from prune.criteria import CRITERIA
    from prune.schedule import SCHEDULES
    from prune.shrinking import Coupled
    from prune.structures import NM, STRUCTURES, Block

    sourced = {name: thing for name, thing in public(losses).items() if "Source:" in (thing.__doc__ or "")}
    functions = {name: thing for name, thing in sourced.items() if inspect.isfunction(thing)}
    criteria = {name: criterion.score for name, criterion in CRITERIA.items()}
    structures = {**STRUCTURES, "2:4": NM, "4x4": Block, "coupled": Coupled}
    return "\n".join(
        [
            "# Methods",
            *table("Losses", "`distill.losses`; any of them as a named term of a distillation.", functions),
            *table("Criteria", "What a weight is worth; `criterion:` in a recipe.", criteria),
            *table("Structures", "What is kept or pruned together; `structure:`, any `N:M`, `RxC`.", structures),
            *table("Allocations", "How a density is divided among layers; `allocation:` in a recipe.", ALLOCATIONS),
            *table("Schedules", "Density over time.", SCHEDULES),
        ]
    )  # fmt: skip


def table(title: str, about: str, methods: Mapping[str, Callable[..., Any]]) -> list[str]:
    """A table of methods: name, what it does, when to use it, source."""
    head = ["| name | what it does | formula | when to use it | source |", "| --- | --- | --- | --- | --- |"]
    rows = []
    for name, method in methods.items():
        text = inspect.cleandoc(method.__doc__ or "")
        what, *rest = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
        parts = {key.rstrip("s"): value for key, _, value in (paragraph.partition(":") for paragraph in rest)}
        formula = next((p.removeprefix(".. math::").strip() for p in rest if p.startswith(".. math::")), "")
        formula = formula.replace(r"\|", r"\Vert ").replace("|", r"\vert ")  # a bar would end the cell
        cells = [f"`{name}`", what, f"${formula}$" if formula else parts.get("Formula", "").strip()]
        cells += [parts.get("When to use", ""), parts.get("Source", parts.get("Reference", ""))]
        rows.append("| " + " | ".join(map(cell, cells)) + " |")
    return ["", f"## {title}", "", about, "", *head, *rows]


def cell(text: str) -> str:
    """Text as one cell of a table."""
    return linked(" ".join(text.split())).replace("|", "\\|")


def linked(text: str) -> str:
    """Docstring markup as Markdown: double backticks and roles as code, arXiv numbers as links."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text.replace("``", "`"))
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def code(text: str) -> str:
    """Text as inline code that may stand in a table."""
    return f"`{text}`".replace("|", "\\|")


def default_of(text: str) -> str:
    """A default as a recipe would write it."""
    if match := re.fullmatch(r"Duration\((\d+), '(\w+)'\)", text):
        return code(f"{match[1]}{match[2]}")
    return "required" if text == REQUIRED else "" if text == "None" else code(text.strip("'"))


# How it works


def write() -> None:
    """Write the pages beside those that are written by hand; unchanged ones are left alone, so that none is rebuilt."""
    for name, content in pages().items():
        path = Path(__file__).parent / name
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")


def filled(markdown: str) -> str:
    """Text with tables made from the code in place of its markers."""
    return markdown.replace("<!-- floors -->", floors()).replace("<!-- schemas -->", schemas())


def floors() -> str:
    """The floors of each package as tables, from the top down."""
    parts = []
    for package, levels in architecture.FLOORS.items():
        rows = ["| " + " ".join(f"`{room}`" for room in level.split()) + " |" for level in levels]
        parts += [f"| `{package}/` |", "| --- |", *rows, ""]
    return "\n".join(parts)


@cache
def schemas() -> str:
    """Fields of every job's record, those that all share first; the JSON Schema of each is a file beside the page."""
    properties = {job: records.json_schema(job)["properties"] for job in records.jobs()}
    shared = {name for name in properties["report"] if all(name in fields for fields in properties.values())}
    lines = ["## Every record", "", *fields_table({name: properties["fit"][name] for name in sorted(shared)})]
    for job, fields in properties.items():
        own = {name: field for name, field in fields.items() if name not in shared}
        link = f'<a href="../schemas/{job}.json">JSON Schema</a>'
        lines += [f"## {job}", "", link, "", *(fields_table(own) if own else [])]
    return "\n".join(lines)


def fields_table(fields: Mapping[str, Any]) -> list[str]:
    """A row for each field of a record."""
    rows = [
        f"| `{name}` | {code(type_of(field))} | {cell(field.get('description', ''))} |"
        for name, field in fields.items()
    ]
    return ["| field | type | |", "| --- | --- | --- |", *rows, ""]


def type_of(schema: Mapping[str, Any]) -> str:
    """A JSON Schema in a word or two."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(type_of(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if schema.get("type") == "array" and "items" in schema:
        return f"list of {type_of(schema['items'])}"
    if schema.get("type") == "object" and schema.get("additionalProperties"):
        return f"{type_of(schema['additionalProperties'])} by name"
    return str(schema.get("type", "any"))
