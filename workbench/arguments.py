"""A job's arguments: checked against its signature, built into objects, and built again from a record.

jsonargparse derives the schema from the signature; an argument called ``trainer`` has the schema of Lightning's Trainer.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import register_type
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from workbench import records
from workbench.duration import Duration
from workbench.jobs import find_jobs
from workbench.recipe import Recipe, Stage, nearest
from workbench.source import Source

register_type(Source, str, Source)
register_type(Duration, str, Duration.parse)

# What a run shows or how often it saves does not change what comes out: not part of the fingerprint.
_COSMETIC = ("enable_progress_bar", "enable_model_summary", "log_every_n_steps", "logger", "profiler", "default_root_dir")


class Arguments:
    """The checked arguments of one stage.

    Args:
        recipe: Where the stage stands, for messages.
        stage: The stage.

    Raises:
        RecipeError: If an argument is missing, unknown or of the wrong type, anywhere in it.
    """

    def __init__(self, recipe: Recipe, stage: Stage) -> None:
        self.stage = stage
        function = stage.job.function
        self._parser = ArgumentParser(exit_on_error=False)
        names = [parameter.name for parameter in stage.job.parameters]
        skip = {name for name in ("out", "trainer") if name in names}
        self._parser.add_function_arguments(function, skip=skip, fail_untyped=False)
        if "trainer" in names:
            self._parser.add_class_arguments(Trainer, "trainer", instantiate=False, fail_untyped=False)
        self._parser.add_instantiator(_build_module, nn.Module, subclasses=True)
        try:
            self._values = self._parser.parse_object(dict(stage.arguments))
        except (ArgumentError, TypeError, ValueError) as error:
            key, message = _explained(str(error), function, self._parser)
            raise recipe.error(message, stage.name, key) from error

    @property
    def trains(self) -> bool:
        """Whether the job trains, and so runs on every rank."""
        return any(parameter.name == "trainer" for parameter in self.stage.job.parameters)

    @property
    def seed(self) -> int | None:
        """The stage's seed, if its job has one."""
        return self._values.get("seed_everything")

    def sources(self) -> Iterator[tuple[str, Source]]:
        """Dotted key and value of every argument that names a stage or a folder."""
        yield from _sources(self._values, "")

    def resolved(self) -> dict[str, Any]:
        """All arguments with their defaults, as JSON."""
        return json.loads(self._parser.dump(self._values, format="json", skip_none=False))

    def fingerprint(self, parents: Mapping[str, str]) -> str:
        """SHA-256 of the job, the arguments that can change its result, and its parents' fingerprints."""
        arguments = self.resolved()
        arguments.pop("checkpoint", None)
        if "trainer" in arguments:
            # Only what was given: another version's defaults must not make a finished stage look foreign.
            given = self.stage.arguments.get("trainer") or {}
            arguments["trainer"] = {name: arguments["trainer"].get(name) for name in given if name not in _COSMETIC}
        return records.fingerprint([self.stage.job.name, arguments, dict(parents)])

    def build(self, folder_of: Callable[[Source], Source]) -> dict[str, Any]:
        """Keyword arguments for the job: objects made, sources replaced by ``folder_of`` them."""
        values = _replaced(self._values, folder_of)
        made = self._parser.instantiate(values).as_dict()
        if "trainer" in made:
            given = self.stage.arguments.get("trainer") or {}
            made["trainer"] = {key: value for key, value in dict(made["trainer"]).items() if key in given}
        return made


def rebuild(folder: Path, changes: Mapping[str, Any] | None = None) -> tuple[LightningModule, dict[str, Any]]:
    """The untrained module of the finished training stage in ``folder``, and the arguments it was trained with.

    Args:
        folder: A stage's folder.
        changes: Raw arguments that replace the stage's own.

    Raises:
        ValueError: If the stage is not finished or did not train a module.
    """
    record = records.finished(folder)
    if record is None:
        raise ValueError(f"{folder} holds no finished stage: name a finished fit or distill stage")
    job = find_jobs().get(record.get("job", ""))
    build = getattr(job.function, "build", None) if job else None
    if job is None or build is None:
        raise ValueError(f"{folder} is of job {record.get('job')!r}, which trains no module: name a fit or distill stage")
    stage = Stage(folder.name, job, {**record["given"], **(changes or {})})
    arguments = Arguments(Recipe(folder / "record.json", ()), stage)
    from lightning.pytorch import seed_everything

    seed_everything(arguments.seed or 0, workers=True, verbose=False)
    made = arguments.build(lambda source: _beside(folder, source))
    module = build(**{name: made[name] for name in inspect.signature(build).parameters})
    return module, made


def _beside(folder: Path, source: Source) -> Source:
    stage = folder.parent / source
    return Source(stage) if (stage / "record.json").is_file() else source


def _build_module(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Make a module and let it remember what it was made of, so that a checkpoint can say so."""
    made = cls(*args, **kwargs)
    if not hasattr(made, "init_args") and not args:
        try:
            made.init_args = json.loads(json.dumps(kwargs))  # type: ignore[assignment]
        except TypeError:
            pass  # an argument that is an object: the checkpoint will need the module to fill
    return made


def _sources(value: Any, key: str) -> Iterator[tuple[str, Source]]:
    if isinstance(value, Source):
        yield key, value
    elif isinstance(value, (Namespace, dict)):
        for name, item in (vars(value) if isinstance(value, Namespace) else value).items():
            yield from _sources(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _sources(item, f"{key}[{index}]")


def _replaced(value: Any, folder_of: Callable[[Source], Source]) -> Any:
    if isinstance(value, Source):
        return folder_of(value)
    if isinstance(value, Namespace):
        return Namespace(**{name: _replaced(item, folder_of) for name, item in vars(value).items()})
    if isinstance(value, dict):
        return {name: _replaced(item, folder_of) for name, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, folder_of) for item in value]
    return value


def _explained(text: str, function: Callable[..., Any], parser: ArgumentParser) -> tuple[str | None, str]:
    """Key and one-line message for a person, out of what the parser says."""
    key = match[1] if (match := re.search(r'Parser key "([^"]+)"', text)) else None
    known = [action.dest for action in parser._actions]  # no public list of destinations exists
    if match := re.search(r"does not accept option '([^']+)'", text):
        group, _, name = match[1].rpartition(".")
        siblings = [dest.rpartition(".")[2] for dest in known if dest.rpartition(".")[0] == group]
        return match[1], f"no such argument '{name}'{nearest(name, siblings)}"
    if match := re.search(r"arguments? (?:is|are) required: (.+)", text):
        return match[1], "is required"
    if option := re.search(r"Option '([^']+)' is not accepted", text):
        paths = re.findall(r"class_path '([^']+)'", text)
        cls = _imported(paths[-1]) if paths else None
        names = [name for name in inspect.signature(cls).parameters if name != "self"] if cls else []
        return key, f"{paths[-1] if paths else 'the class'} has no argument '{option[1]}'{nearest(option[1], names)}"
    if attribute := re.search(r"module '([^']+)' has no attribute '([^']+)'", text):
        names = [name for name in dir(import_module(attribute[1])) if not name.startswith("_")]
        return key, f"module '{attribute[1]}' has no '{attribute[2]}'{nearest(attribute[2], names)}"
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Parser key")]
    return key, " ".join(lines)[:600]


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


