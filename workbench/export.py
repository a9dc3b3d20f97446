"""The ``export`` job: a trained stage as files that load elsewhere, each measured against what was trained.

``compact`` is the small one and needs :func:`workbench.load`; ``torch`` is a dense 16-bit folder that plain torch (or,
for their models, plain transformers) loads; ``onnx`` runs in stock ONNX Runtime. The last two compute in float32, or
for transformers in the type that it chooses, whatever the network was trained in.
"""

import copy
import inspect
import logging
import runpy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench import artifact, records
from workbench.files import filling
from workbench.source import Source

Format = Literal["compact", "torch", "onnx"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_LOADER = '''"""Loads the network in this folder with torch and safetensors alone: model = load(folder)."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def load(folder=Path(__file__).parent):
    """The network as it answers in eval mode, weights widened to float32; the size of the batch is free."""
    model = torch.export.load(Path(folder) / "graph.pt2").module()
    weights = load_file(Path(folder) / "weights.safetensors")
    state = {name: weights[name].to(old.dtype) for name, old in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.eval = lambda: model  # as it is; torch's own raises
    return model
'''


@dataclass(frozen=True)
class _Subject:
    """What is exported.

    Args:
        network: The trained network.
        masks: Of its pruned weights.
        index: Of the compact checkpoint that it came from.
        inputs: To try and to trace it with, by name; empty if there are none.
    """

    network: nn.Module
    masks: Mapping[str, Tensor]
    index: Mapping[str, Any]
    inputs: Mapping[str, Tensor]


def export(
    of: Source,
    level: int | Literal["last", "winning"] = "last",
    formats: list[Format] | None = None,
    values: Literal["float32", "float16", "bfloat16"] = "float32",
    out: Path = Path("runs/export"),
) -> dict[str, Any]:
    """Write a trained stage as a compact checkpoint, and on request as dense 16-bit folder and ONNX file.

    Every file is loaded again and compared with the trained network, on validation inputs that the stage kept.

    Args:
        of: The stage to export, or the folder of a compact checkpoint.
        level: Of a hunt: its last level, the sparsest within tolerance on validation data, or a number.
        formats: Some of compact, torch and onnx; compact is always written.
        values: Type of the compact checkpoint's values; float32 is exact.
        out: The stage's folder, given by the recipe.

    Returns:
        For each format its path, bytes, largest difference of outputs and whether predictions agree.

    Raises:
        ValueError: If there is nothing to export, a level or format does not exist, what the format needs is not
            installed, the network cannot be traced or stored, or the exact checkpoint is not exact.
    """
    wanted: list[str] = list(dict.fromkeys(["compact", *(formats or ())]))
    if unknown := [name for name in wanted if name not in get_args(Format)]:
        raise ValueError(f"formats has {', '.join(map(repr, unknown))}: choose from {', '.join(get_args(Format))}")
    if values not in _DTYPES:
        raise ValueError(f"values is {values!r}: choose from {', '.join(_DTYPES)}")
    if "onnx" in wanted:
        _need_onnx()
    folder, record = chosen(Path(of), level)
    source = artifact.find(folder)
    inputs = kept_inputs(folder, Path(of), source.parent)
    if not inputs and wanted != ["compact"]:
        raise ValueError(f"{of} kept no example inputs, which torch and onnx are traced with: export compact only")
    subject = _Subject(artifact.load(source), artifact.masks(source), artifact.read_index(source), inputs)
    try:
        expected = _outputs(subject.network, inputs)
    except NotImplementedError as error:
        kind = type(subject.network).__name__
        if wanted != ["compact"]:
            raise ValueError(
                f"{kind} has no forward to trace for {', '.join(wanted)}: add one, or export compact"
            ) from error
        # The tensors are compared when a checkpoint is written; there is no output to compare besides.
        expected, subject = None, replace(subject, inputs={})
    written = {
        "compact": lambda: _compact(subject, values, out / "compact"),
        "torch": lambda: _dense(subject, out / "torch"),
        "onnx": lambda: _onnx(subject, out / "onnx"),
    }
    exports = []
    for name in wanted:
        found, size = written[name]()
        entry = {"format": name, "path": name, "bytes": size, **_compared(expected, found, out / name)}
        if name == "compact" and values == "float32" and entry.get("largest_difference"):
            raise ValueError(f"{out / name} differs from the trained network: this is a defect, please report it")
        exports.append(entry)
    carried = {key: record[key] for key in ("metrics", "monitor", "size") if key in record}
    return {"exports": exports, "level": record.get("level"), "values": values, **carried}


def chosen(stage: Path, level: int | str) -> tuple[Path, Mapping[str, Any]]:
    """The folder of a finished stage's network and its record: the stage's own, or one of its levels'.

    Raises:
        ValueError: If the stage is not finished, or has no such level.
    """
    record = records.read(stage) or {}
    if record.get("status", "finished") != "finished":
        raise ValueError(f"{stage} is {record['status']}: wait until it is finished")
    levels = record.get("levels") or []
    if not levels:
        if level != "last":
            raise ValueError(f"level is {level!r}, but {stage} has no levels: leave level away, or name a hunt")
        return stage, record
    number = {"last": levels[-1]["level"], "winning": record.get("winning")}.get(str(level), level)
    if number is None:
        raise ValueError(f"{stage} has no validation score to choose a winning level by: give a number, or 'last'")
    if type(number) is not int or not 0 <= number < len(levels):
        last = len(levels) - 1
        raise ValueError(f"level is {level!r}, but {stage} has levels 0 to {last}, 'last' and 'winning'")
    return stage / f"level_{number:02d}", levels[number]


def kept_inputs(*folders: Path) -> dict[str, Tensor]:
    """The example inputs by name in the first of ``folders`` that has some; empty if none has.

    Raises:
        ValueError: If they cannot be read.
    """
    for folder in folders:
        file = folder / "example.safetensors"
        if file.is_file():
            try:
                return load_file(file)
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged ({error}): remove it and export compact only") from error
    return {}


def arguments_of(inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional arguments, named ``input_0``, ``input_1`` ..., and keyword arguments out of named inputs."""
    places = sorted((int(name[6:]), name) for name in inputs if name.startswith("input_") and name[6:].isdigit())
    names = [name for _, name in places]
    return tuple(inputs[name] for name in names), {name: inputs[name] for name in inputs if name not in names}


def arguments_for(network: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """As :func:`arguments_of`, floating ones in the network's own type."""
    own = (parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    return arguments_of(_typed(inputs, next(own, torch.float32)))


def _typed(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs with floating-point ones in ``dtype``."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _tensor(raw: Any) -> Tensor:
    """The first tensor of what a model returned, its logits by preference."""
    if isinstance(raw, Tensor):
        return raw
    logits = raw.get("logits") if isinstance(raw, Mapping) else getattr(raw, "logits", None)
    return logits if isinstance(logits, Tensor) else next(iter(raw.values() if isinstance(raw, Mapping) else raw))


@torch.no_grad()
def _outputs(network: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """What the network answers to the inputs, in its own floating-point type; None without inputs."""
    if not inputs:
        return None
    args, kwargs = arguments_for(network, inputs)
    return _tensor(network(*args, **kwargs))


def _compared(expected: Tensor | None, found: Tensor | None, path: Path) -> dict[str, Any]:
    if expected is None or found is None:
        return {}
    if expected.shape != found.shape:
        raise ValueError(f"{path} answers with shape {list(found.shape)}, the network with {list(expected.shape)}")
    one, other = expected.double(), found.double()
    # Infinities and NaNs in the same places are no difference.
    equal = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(equal, 0.0, (one - other).abs()).nan_to_num(float("inf")).max()
    same = bool((one.argmax(-1) == other.argmax(-1)).all())
    return {"largest_difference": float(difference), "same_predictions": same}


def _compact(subject: _Subject, values: str, folder: Path) -> tuple[Tensor | None, int]:
    dtype = None if values == "float32" else _DTYPES[values]
    index = subject.index
    artifact.save(subject.network, folder, subject.masks, dtype, index["architecture"], index["provenance"])
    weights = folder / artifact.read_index(folder)["weights"]["file"]
    size = weights.stat().st_size + (folder / "artifact.json").stat().st_size
    return _outputs(artifact.load(folder), subject.inputs), size


def _dense(subject: _Subject, folder: Path) -> tuple[Tensor | None, int]:
    half = _halved(subject.network)
    with filling(folder) as part:
        if _is_of_transformers(subject.index["architecture"]):
            with _no_bars():
                half.save_pretrained(part)  # type: ignore[operator]
                again = type(half).from_pretrained(part)  # type: ignore[attr-defined]
            found = _outputs(again.eval(), subject.inputs)
        else:
            wide = copy.deepcopy(subject.network).float()
            save_file({name: value.clone() for name, value in half.state_dict().items()}, part / "weights.safetensors")
            _save_graph(wide, _typed(subject.inputs, torch.float32), part / "graph.pt2")
            (part / "load.py").write_text(_LOADER, encoding="utf-8")
            # The very file, as its user runs it.
            found = _outputs(runpy.run_path(str(part / "load.py"))["load"](part), subject.inputs)
        return found, _bytes(part)


def _halved(network: nn.Module) -> nn.Module:
    """A copy with parameters of more than 16 bits in float16; bfloat16 ones and all buffers stay what they are."""
    half = copy.deepcopy(network)
    for name, parameter in half.named_parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 2:
            narrow = parameter.data.half()
            if not torch.equal(narrow.isfinite(), parameter.data.isfinite()):
                raise ValueError(f"{name!r} has values beyond the range of float16: export compact or onnx instead")
            parameter.data = narrow
    return half


def _is_of_transformers(architecture: Mapping[str, Any] | None) -> bool:
    """Whether transformers can build the network again from a configuration of its own, with layers of those sizes."""
    if architecture is None or "config" not in architecture or "resized" in architecture:
        return False
    if "activation" not in architecture:
        return True
    from workbench.activations import spec

    return bool(spec(architecture["activation"]).hub_keys)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Inside, transformers draws no progress bars of its own."""
    from transformers.utils import logging as hub

    shown = hub.is_progress_bar_enabled()
    hub.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hub.enable_progress_bar()


def _save_graph(network: nn.Module, inputs: Mapping[str, Tensor], file: Path) -> None:
    """Write the traced network with its weights replaced by one number each: what to compute, not with what."""
    with _tracing(network, inputs) as (args, kwargs, dynamic):
        program = torch.export.export(network, args, kwargs, dynamic_shapes=dynamic)
    for name, value in program.state_dict.items():
        empty = torch.zeros((), dtype=value.dtype).expand(value.shape)
        trained = isinstance(value, nn.Parameter)
        program.state_dict[name] = nn.Parameter(empty, requires_grad=False) if trained else empty
    with warnings.catch_warnings():
        # That is just what was meant.
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        torch.export.save(program, file)


@contextmanager
def _tracing(
    network: nn.Module, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor], Any]]:
    """Arguments to trace with and which of their dimensions vary; a failure to trace becomes a ValueError."""
    # A batch of one would be taken for a constant.
    several = {name: torch.cat([value, value]) if len(value) == 1 else value for name, value in inputs.items()}
    args, kwargs = arguments_of(several)
    try:
        yield args, kwargs, _dynamic(network, args, kwargs)
    except Exception as error:  # the tracer's errors have no common class
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(network).__name__} cannot be traced, which formats torch and onnx need: {reason}; "
            "export compact only"
        ) from error


def _dynamic(network: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Any:
    """Which dimensions may vary: the batch, and where token ids go in, their number."""
    dim = torch.export.Dim

    def free(value: Tensor) -> dict[int, Any]:
        inner = {} if value.is_floating_point() else dict.fromkeys(range(1, value.dim()), dim.AUTO)
        return {0: dim.DYNAMIC, **inner}

    by_name = {name: free(value) for name, value in kwargs.items()}
    if not kwargs:
        return tuple(free(value) for value in args)
    names = list(inspect.signature(network.forward).parameters)
    return {**{name: free(value) for name, value in zip(names, args)}, **by_name}


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 - what torch's exporter needs
    except ImportError as error:
        raise ValueError(f"format onnx needs {error.name}: pip install 'distill-prune[onnx]'") from error


def _onnx(subject: _Subject, folder: Path) -> tuple[Tensor | None, int]:
    import onnxruntime

    wide = copy.deepcopy(subject.network).float()
    inputs = _typed(subject.inputs, torch.float32)
    args, kwargs = arguments_of(inputs)
    names = [*(f"input_{i}" for i in range(len(args))), *kwargs]
    with filling(folder) as part:
        with _quiet_exporter(), _tracing(wide, inputs) as (args, kwargs, dynamic):
            # Traced here, as the exporter would drop the condition that a size is the example's.
            program = torch.export.export(wide, args, kwargs, dynamic_shapes=dynamic)
            options = {"input_names": names, "output_names": ["output"], "verbose": False}
            graph: Any = torch.onnx.export(program, dynamo=True, **options)
            _fix_sizes(graph)
            graph.save(part / "model.onnx", external_data=False)
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(part / "model.onnx"), quiet, providers=["CPUExecutionProvider"])
        feed = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
        return torch.from_numpy(session.run(["output"], feed)[0]), _bytes(part)


def _fix_sizes(graph: Any) -> None:
    """Where a network takes sequences of one length only, say so, that ONNX Runtime refuses others."""
    for value in (*graph.model.graph.inputs, *graph.model.graph.outputs):
        for axis, size in enumerate(value.shape or ()):
            if str(size).isdigit():
                value.shape[axis] = int(str(size))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Inside, torch's ONNX exporter does not speak of its own internals, nor of a missing torchvision."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
