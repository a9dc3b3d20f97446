"""The record of every job as a dataclass, and as a JSON Schema.

A job states the dataclass of what it returns beside itself, by entry point: group ``workbench.records``, under the
job's name. Nothing is imported until a record of that job is read.
"""

import dataclasses
import inspect
import types
from functools import cache
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from workbench.records.codec import Monitor, problems
from workbench.records.network import Network
from workbench.records.record import FORMAT

GROUP = "workbench.records"


@dataclasses.dataclass(frozen=True)
class Parent:
    """A stage that another one came from: its name, and its fingerprint at the time."""

    stage: str
    fingerprint: str | None = None


@dataclasses.dataclass(frozen=True)
class Envelope(Network):
    """Fields of every job's record; ``metrics``, ``monitor``, ``size`` and ``history`` where they apply.

    Attributes:
        format: Version of the record's format.
        stage: The stage's name.
        job: Its job's name.
        status: ``running``, ``finished`` or ``failed``.
        fingerprint: SHA-256 of job, arguments and parents.
        given: The arguments as the recipe gives them.
        arguments: The same, with every default.
        seed: Of everything random; None of a job that draws nothing.
        parents: Role -> the stage it came from.
        code: Module -> definition -> hash of the code that is not installed.
        versions: Of Python and packages.
        environment: The machine.
        started: When, ISO 8601 in UTC.
        ended: When, ISO 8601 in UTC.
        seconds: Of its trainings, also in earlier sessions; of a job that trains nothing, that it took.
        took: Seconds of the session that finished it.
        error: The traceback of one that failed.
    """

    format: int = FORMAT
    stage: str | None = None
    job: str | None = None
    status: str | None = None
    fingerprint: str | None = None
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    parents: dict[str, Parent] = dataclasses.field(default_factory=dict)
    code: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    started: str | None = None
    ended: str | None = None
    seconds: float | None = None
    took: float | None = None
    error: str | None = None


def jobs() -> list[str]:
    """The jobs that state what they record."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


@cache
def schema(job: str | None) -> type | None:
    """The dataclass of what ``job`` records; None if it states none.

    Raises:
        ValueError: If it cannot be imported, or is no dataclass.
    """
    entry = next(iter(entry_points(group=GROUP, name=job)), None) if job else None
    if entry is None:
        return None
    try:
        kind = entry.load()
    except Exception as error:  # an import may raise anything
        raise ValueError(f"the record of job {job!r} ({entry.value}) cannot be imported: {error}") from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"the record of job {job!r} ({entry.value}) is no dataclass: name one in its entry point")
    return kind


def violations(record: dict[str, Any]) -> list[str]:
    """What of a whole record does not have the types of its job's schema; empty if all has."""
    kind = schema(record.get("job"))
    own = {field.name for field in dataclasses.fields(kind)} if kind else set(record)
    common = {field.name for field in dataclasses.fields(Envelope)}
    result = {key: value for key, value in record.items() if key not in common}
    envelope = {key: value for key, value in record.items() if key in common and key not in own - common}
    return problems(Envelope, envelope, "record") + (problems(kind, result, "record") if kind else [])


def json_schema(job: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of ``record.json`` of a stage of ``job``.

    Raises:
        ValueError: If no job of this name states what it records.
    """
    kind = schema(job)
    if kind is None:
        raise ValueError(f"no job {job!r} states what it records: choose from {', '.join(jobs())}")
    definitions: dict[str, Any] = {}
    common, own = _object(Envelope, definitions), _object(kind, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Record of job {job}",
        "description": own["description"],
        "type": "object",
        "properties": common["properties"] | own["properties"],
        "required": ["format", "status"],
        "$defs": dict(sorted(definitions.items())),
    }


def _object(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    described = descriptions(kind)
    hints = get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(cast(Any, kind))
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    properties = {}
    for field in fields:
        properties[field.name] = _type(hints[field.name], definitions)
        if text := described.get(field.name):
            properties[field.name] |= {"description": text}
    return {
        "type": "object",
        "description": (inspect.getdoc(kind) or "").partition("\n")[0],
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _type(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if kind == Monitor:
        return {"type": "array", "prefixItems": [{"type": "string"}, {"enum": ["max", "min"]}]}
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inner[0], definitions)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(each, definitions) for each in inner]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _type(inner[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(inner[1], definitions)}
    if dataclasses.is_dataclass(kind):
        name = cast(type, kind).__name__
        if name not in definitions:
            definitions[name] = {}  # before its fields, which may be of its own type
            definitions[name] = _object(cast(type, kind), definitions)
        return {"$ref": f"#/$defs/{name}"}
    names = {float: "number", int: "integer", str: "string", bool: "boolean", type(None): "null"}
    return {"type": names[kind]} if kind in names else {}


def descriptions(kind: type) -> dict[str, str]:
    """What the sections ``Attributes`` of a dataclass's docstring, and of those it extends, say of each field."""
    texts: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        name = ""
        for line in section.splitlines():
            if line.startswith("     ") and name:
                texts[name] += " " + line.strip()
            elif line.startswith("    "):
                name, _, text = line.strip().partition(": ")
                texts[name] = text
    return texts
