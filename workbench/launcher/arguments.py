"""A job's arguments: checked against its signature, built into objects, and rebuilt from a record.

jsonargparse derives the schema from the signature; an argument ``trainer`` has the schema of Lightning's Trainer. The
arguments exist in four forms: *given* by the recipe (`Stage.arguments`), *parsed* (`Arguments`, with all defaults),
*resolved* (parsed, as JSON, for ``--print`` and the record), and *built* (objects, for the job).
"""

import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import register_type
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import nn

from workbench import records
from workbench.definitions import Hashes, definitions
from workbench.duration import Duration
from workbench.launcher import errors
from workbench.launcher.jobs import find_jobs
from workbench.launcher.recipe import OVER, RUN, Recipe, Stage
from workbench.messages import flatten
from workbench.models.architecture import argument_to_json
from workbench.randomness import same_random_state
from workbench.records.source import Source


def _writer(kind: type) -> Callable[[Any], str]:
    """A serializer of jsonargparse. It refuses other types: of a union, jsonargparse takes the first that succeeds."""

    def write(value: Any) -> str:
        if not isinstance(value, kind):
            raise ValueError(f"{value!r} is no {kind.__name__}")
        return str(value)

    return write


register_type(Source, _writer(Source), Source)
register_type(Duration, _writer(Duration), Duration.parse)

# Logging and the frequency of checkpoints do not change a result: not part of the fingerprint.
SHOWN = ("enable_progress_bar", "enable_model_summary", "log_every_n_steps", "logger", "profiler", "default_root_dir")
_COSMETIC = ("checkpoint", *(f"trainer.{name}" for name in SHOWN))
_SEEDS = range(2**32)
_UNWRITABLE = object()
ModuleT = TypeVar("ModuleT")
DataT = TypeVar("DataT")
JobT = TypeVar("JobT", bound=Callable[..., Any])
_BUDGETS = ("max_epochs", "max_steps")


class Arguments:
    """The checked arguments of one stage.

    Args:
        recipe: Its recipe, for error messages.
        stage: The stage.

    Raises:
        RecipeError: If an argument is missing, unknown or of the wrong type, anywhere in it.
    """

    def __init__(self, recipe: Recipe, stage: Stage) -> None:
        self.stage = stage
        try:
            function = stage.job.function
        except ValueError as error:
            raise recipe.error(str(error), stage.name, "job") from error
        parameters = {parameter.name: parameter for parameter in stage.job.parameters}
        self.trains = "trainer" in parameters
        self.runs = tuple(Arguments(recipe, run) for run in stage.runs)
        # The stage that a sweep repeats is checked run by run.
        self._grid = {name: stage.arguments[name] for name in (RUN, OVER) if stage.runs}
        arguments = copy.deepcopy({name: value for name, value in stage.arguments.items() if name not in self._grid})
        if isinstance(arguments.get("seed_everything"), bool):
            del arguments["seed_everything"]  # LightningCLI takes true for "a random seed"; here a stage always has one
        if self.trains and arguments.setdefault("trainer", {}) is None:
            arguments["trainer"] = {}
        if self.trains and not isinstance(arguments["trainer"], Mapping):
            what = (
                f"is {arguments['trainer']!r}: arguments of Lightning's Trainer are expected, e.g. {{max_epochs: 10}}"
            )
            raise recipe.error(what, stage.name, "trainer")
        if wrong := errors.dataclass_error(function, arguments):
            key, message = wrong
            raise recipe.error(message, stage.name, key)
        self._parser = _parser(function, self.trains, self._grid)
        try:
            self._values = self._parser.parse_object(
                copy.deepcopy(arguments)
            )  # it replaces parts of its input by objects
        except Exception as error:  # parsing imports the module of a class_path, which may raise anything
            key, message = errors.describe_error(str(error), arguments, function)
            raise recipe.error(message, stage.name, key) from error
        for name in arguments:
            if errors.is_wrongly_null(parameters[name], arguments):
                expected = errors.readable_types(parameters[name].annotation)
                raise recipe.error(f"is null: expected {expected}", stage.name, name)
        for name, value in vars(self._values).items():
            for key, setting in _plain_settings(name, value):
                try:
                    # Dataclasses, such as the terms of a loss, check their values when they are made, which is cheap.
                    self._parser.instantiate(Namespace({name: setting}))
                except ValueError as error:
                    raise recipe.error(errors.constructor_message(str(error)), stage.name, key) from error
        if check := getattr(function, "check", None):
            try:
                check(**{name: self._values[name] for name in inspect.signature(check).parameters})
            except ValueError as error:
                raise recipe.error(str(error), stage.name) from error
        for index, callback in enumerate(self._callbacks()):
            try:
                self._parser.instantiate(Namespace(trainer=Namespace(callbacks=[callback])))
            except ValueError as error:
                key = f"trainer.callbacks[{index}]"
                raise recipe.error(errors.constructor_message(str(error)), stage.name, key) from error
        if self.seed is not None and self.seed not in _SEEDS:
            what = f"is {self.seed}: a seed is between 0 and {_SEEDS[-1]}"
            raise recipe.error(what, stage.name, "seed_everything")
        # A job that trains another stage's module inherits that stage's trainer arguments. There, giving one of
        # Lightning's defaults overrides the inherited value; elsewhere it changes nothing and is left out.
        self._inherits = self.trains and not hasattr(function, "build")
        self._trainer = [name for name in arguments.get("trainer", ()) if self._inherits or not self._is_default(name)]
        if self.trains and not self._inherits and not set(_BUDGETS) & set(self._trainer):
            what = "has neither max_epochs nor max_steps: say how long to train, e.g. {max_epochs: 10}"
            raise recipe.error(what, stage.name, "trainer")

    def _callbacks(self) -> Iterator[Any]:
        """The trainer's callbacks that are cheap to make, so that making them now can check their arguments."""
        callbacks = self._values["trainer"]["callbacks"] if self.trains else None
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            path = callback.get("class_path") if isinstance(callback, Namespace) else None
            if path and getattr(errors.import_object(path), "made_of_settings", False):
                yield callback

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the family that the stage trains, or of a sweep's runs; none if it trains one network."""
        if self.runs:
            return tuple(run.stage.name.rpartition("/")[2] for run in self.runs)
        return next((tuple(value) for value in vars(self._values).values() if _is_family(value)), ())

    @property
    def seed(self) -> int | None:
        """The stage's seed, if its job has one."""
        return self._values.get("seed_everything")

    def sources(self) -> Iterator[tuple[str, Source]]:
        """Dotted key and value of every argument that names a stage or a folder."""
        yield from _sources(self._values, "")

    def resolved(self) -> dict[str, Any]:
        """All arguments with their defaults, as JSON; without trainer arguments inherited from another stage."""
        arguments = {**self._grid, **self._as_json()}
        if self._inherits:
            arguments["trainer"] = {name: arguments["trainer"][name] for name in self._trainer}
        return arguments

    @functools.cached_property
    def code(self) -> Hashes:
        """The code that is not installed of the job, and of what the arguments name that can change its result."""
        entry = self.stage.job.entry
        return definitions([f"{entry.module}.{entry.attr}", *_texts(self._essential())])

    def fingerprint(self, parents: Mapping[str, str]) -> str:
        """SHA-256 of the job, the arguments that can change its result, their code, and its parents' fingerprints."""
        parts = [self.stage.job.name, self._essential(), dict(parents)]
        return records.fingerprint([*parts, self.code] if self.code else parts)

    def _essential(self) -> dict[str, Any]:
        arguments = self._as_json()
        if self.trains:
            # Without defaults: a new version's new defaults must not change the fingerprint of a finished stage.
            arguments["trainer"] = {name: arguments["trainer"][name] for name in self._trainer}
        return essential(arguments)

    def build(self, folder_of: Callable[[Source], Source]) -> dict[str, Any]:
        """Keyword arguments for the job: objects made, sources replaced by ``folder_of`` them."""
        builders = [
            (_build_module, nn.Module, True),
            (functools.partial(_build_data, self.seed or 0), LightningDataModule, True),
        ]
        values = _replace_sources(self._values, folder_of)
        families = {name: value for name, value in vars(values).items() if _is_family(value)}
        for name in families:
            values[name] = None
        built = self._parser.instantiate(values, instantiators=builders).as_dict()
        for name, family in families.items():
            built[name] = {}
            for member, value in family.items():
                # Each under the stage's seed: its weights must not depend on the members made before it.
                seed_everything(self.seed or 0, workers=True, verbose=False)
                one = self._parser.instantiate(Namespace({name: {member: value}}), instantiators=builders)
                built[name] |= one[name]
        if self.trains:
            built["trainer"] = {name: built["trainer"][name] for name in self._trainer}
        return {**built, **self._grid}

    def _as_json(self) -> dict[str, Any]:
        try:
            return json.loads(self._parser.dump(self._values, format="json", skip_unset=False))
        except Exception:  # the parser cannot dump a default that is an object, such as Timer's Interval
            return _plain(self._values)

    def _is_default(self, name: str) -> bool:
        return self._values["trainer"][name] == inspect.signature(Trainer).parameters[name].default


def _texts(value: Any) -> Iterator[str]:
    """Every text in JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def checked(check: Callable[..., None]) -> Callable[[JobT], JobT]:
    """Decorator of a job: before any stage runs, a recipe is refused if ``check`` raises ValueError.

    ``check`` takes some of the job's arguments by name, as parsed, before objects are built from them.
    """

    def mark(job: JobT) -> JobT:
        setattr(job, "check", check)  # noqa: B010 - a function has no declared attribute of that name
        return job

    return mark


def essential(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved arguments that can change a stage's result, by dotted key."""
    # In a job without a trainer, an argument called "checkpoint" is another thing.
    cosmetic = tuple(f"{name}." for name in _COSMETIC if "trainer" in arguments)
    return {key: value for key, value in flatten(arguments).items() if not f"{key}.".startswith(cosmetic)}


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
    if "job" not in record:
        raise ValueError(f"{folder} is one of a family: name a stage that trains this network alone")
    if job is None or build is None:
        raise ValueError(
            f"{folder} is of job {record.get('job')!r}, which trains no module: name a fit or distill stage"
        )
    arguments = arguments_of(folder, changes)
    module = build(**{name: arguments[name] for name in inspect.signature(build).parameters})
    return module, arguments


def arguments_of(folder: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of the stage in ``folder``, built again under its seed.

    Args:
        folder: A stage's folder.
        changes: Raw arguments that replace the stage's own.

    Raises:
        ValueError: If there is no stage of an installed job.
    """
    record = records.read(folder) or {}
    job = find_jobs().get(record.get("job", ""))
    if job is None:
        raise ValueError(f"{folder} holds no stage of an installed job: name one that a recipe has run")
    stage = Stage(folder.name, job, {**record["given"], **(changes or {})})
    arguments = Arguments(Recipe(folder / "record.json", ()), stage)
    seed_everything(arguments.seed or 0, workers=True, verbose=False)
    return arguments.build(lambda source: _stage_beside(folder, source))


def _parser(function: Callable[..., Any], trains: bool, grid: Iterable[str]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function, skip={"out", "trainer", *grid}, fail_untyped=False)
    if trains:
        parser.add_class_arguments(Trainer, "trainer", instantiate=False, fail_untyped=False)
    return parser


def _stage_beside(folder: Path, source: Source) -> Source:
    """The folder of the stage ``source``, beside ``folder`` or beside the sweep that ``folder`` is a run of."""
    stages = (parent / source for parent in (folder.parent, folder.parent.parent))
    return next((Source(stage) for stage in stages if (stage / "record.json").is_file()), source)


def _build_data(seed: int, class_type: type[DataT], *args: Any, **kwargs: Any) -> DataT:
    """Make a data module under the stage's seed: a random split must not depend on the model that was made before."""
    with same_random_state():
        seed_everything(seed, workers=True, verbose=False)
        return class_type(*args, **kwargs)


def _build_module(class_type: type[ModuleT], *args: Any, **kwargs: Any) -> ModuleT:
    """Make a module with the attribute ``init_args``, by which a checkpoint can describe how to build it."""
    module = class_type(*args, **kwargs)
    if not hasattr(module, "init_args") and not args:
        # An argument that is an object cannot be described: loading the checkpoint will need a module to fill.
        with suppress(TypeError):
            init_args = {name: argument_to_json(value) for name, value in kwargs.items()}
            setattr(module, "init_args", json.loads(json.dumps(init_args)))  # noqa: B010 - not declared
    return module


def _plain_settings(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each dataclass in an argument: the argument itself, or its entries by name."""
    if isinstance(value, Namespace) and "class_path" not in value and name != "trainer":
        yield name, value
    elif isinstance(value, dict) and not _is_family(value):
        yield from ((f"{name}.{part}", {part: item}) for part, item in value.items())


def _is_family(value: Any) -> bool:
    """Whether an argument is a family: several objects by name, each with its own class."""
    members = list(value.values()) if isinstance(value, dict) else []
    return bool(members) and all(isinstance(member, Namespace) and "class_path" in member for member in members)


def _sources(value: Any, key: str) -> Iterator[tuple[str, Source]]:
    if isinstance(value, Source):
        yield key, value
    elif isinstance(value, (Namespace, dict)):
        for name, item in (vars(value) if isinstance(value, Namespace) else value).items():
            yield from _sources(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _sources(item, f"{key}[{index}]")


def _replace_sources(value: Any, folder_of: Callable[[Source], Source]) -> Any:
    if isinstance(value, Source):
        return folder_of(value)
    if isinstance(value, Namespace):
        return Namespace(**{name: _replace_sources(item, folder_of) for name, item in vars(value).items()})
    if isinstance(value, dict):
        return {name: _replace_sources(item, folder_of) for name, item in value.items()}
    if isinstance(value, list):
        return [_replace_sources(item, folder_of) for item in value]
    return value


def _plain(value: Any) -> Any:
    """Parsed values as JSON. A default that is no JSON value is left out: it is the default again when it is read."""
    if isinstance(value, (Namespace, Mapping)):
        items = vars(value) if isinstance(value, Namespace) else value
        return {str(name): plain for name, item in items.items() if (plain := _plain(item)) is not _UNWRITABLE}
    if isinstance(value, Enum):
        return value.value if isinstance(value, str) else value.name
    if isinstance(value, (str, Duration, Path, timedelta)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else _UNWRITABLE
