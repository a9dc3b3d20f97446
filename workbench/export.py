"""The ``export`` job: a trained stage as files that load elsewhere, each proved equal to what was trained.

``compact`` is the small one and needs :func:`workbench.load`; ``torch`` is a dense fp16 folder that plain torch (or, for
their models, plain transformers) loads; ``onnx`` runs in stock ONNX Runtime.
"""

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench import artifact, records
from workbench.files import replacing
from workbench.source import Source

Format = Literal["compact", "torch", "onnx"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_LOADER = '''"""Loads the network in this folder with torch and safetensors alone: model = load(folder)."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def load(folder=Path(__file__).parent):
    """The network in eval mode, its float16 weights widened to float32."""
    model = torch.export.load(Path(folder) / "graph.pt2").module()
    weights = load_file(Path(folder) / "weights.safetensors")
    state = {name: weights[name].to(old.dtype) for name, old in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model
'''


def export(
    of: Source,
    level: int | Literal["last", "winning"] = "last",
    formats: list[Format] | None = None,
    values: Literal["float32", "float16", "bfloat16"] = "float32",
    out: Path = Path("runs/export"),
) -> dict[str, Any]:
    """Write a trained stage as a compact checkpoint, and on request as dense fp16 folder and ONNX file.

    Every file is loaded again and compared with the trained network, on validation inputs that the stage kept.

    Args:
        of: The stage to export, or the folder of a compact checkpoint.
        level: Of a hunt: its last level, the sparsest within tolerance on validation data, or a number.
        formats: Some of compact, torch and onnx; compact is always written.
        values: Type of the compact checkpoint's values; float32 is exact.
        out: The stage's folder, given by the recipe.

    Returns:
        For each format its path, bytes, largest difference of outputs and whether predictions agree.
    """
    folder, record = _chosen(Path(of), level)
    source = artifact.find(folder)
    network, masks = artifact.load(source), artifact.masks(source)
    inputs = _inputs(folder, Path(of))
    if not inputs and set(formats or ()) & {"torch", "onnx"}:
        raise ValueError(f"{of} kept no example inputs, which torch and onnx are traced with: export compact only")
    expected = _outputs(network, inputs)
    writers: dict[str, Callable[[], Callable[[], Tensor | None]]] = {
        "compact": lambda: _compact(network, source, masks, _DTYPES[values], inputs, out / "compact"),
        "torch": lambda: _dense(network, inputs, out / "torch"),
        "onnx": lambda: _onnx(network, inputs, out / "onnx"),
    }
    exports = []
    for name in dict.fromkeys(["compact", *(formats or [])]):
        found = writers[name]()()
        exports.append({"format": name, "path": name, "bytes": _bytes(out / name), **_compared(expected, found)})
        if name == "compact" and values == "float32" and exports[-1].get("largest_difference"):
            raise ValueError(f"{out / name} differs from the trained network: this is a defect, please report it")
    carried = {key: record[key] for key in ("metrics", "monitor", "size") if key in record}
    return {"exports": exports, "level": record.get("level"), **carried}


def _chosen(stage: Path, level: int | str) -> tuple[Path, Mapping[str, Any]]:
    """The folder to export and its record: the stage's own, or one of its levels'."""
    record = records.read(stage) or {}
    levels = record.get("levels") or []
    if not levels:
        if level != "last":
            raise ValueError(f"{stage} has no levels: leave level away, or export a hunt")
        return stage, record
    number = {"last": levels[-1]["level"], "winning": record.get("winning", 0)}.get(str(level), level)
    if not isinstance(number, int) or not 0 <= number < len(levels):
        raise ValueError(f"level is {level!r}, but {stage} has levels 0 to {len(levels) - 1}, 'last' and 'winning'")
    return stage / f"level_{number:02d}", levels[number]


def _inputs(*folders: Path) -> dict[str, Tensor]:
    for folder in folders:
        if (folder / "example.safetensors").is_file():
            return load_file(folder / "example.safetensors")
    return {}


def _call(inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments out of named inputs."""
    args = tuple(inputs[name] for name in sorted(inputs) if name.startswith("input_") and name[6:].isdigit())
    return args, {name: value for name, value in inputs.items() if not (name.startswith("input_") and name[6:].isdigit())}


def _tensor(raw: Any) -> Tensor:
    """The first tensor of what a model returned, its logits by preference."""
    if isinstance(raw, Tensor):
        return raw
    logits = raw.get("logits") if isinstance(raw, Mapping) else getattr(raw, "logits", None)
    return logits if isinstance(logits, Tensor) else next(iter(raw.values() if isinstance(raw, Mapping) else raw))


@torch.no_grad()
def _outputs(network: nn.Module | Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor | None:
    if not inputs:
        return None
    args, kwargs = _call(inputs)
    return _tensor(network(*args, **kwargs))


def _compared(expected: Tensor | None, found: Tensor | None) -> dict[str, Any]:
    if expected is None or found is None:
        return {}
    difference = (expected.double() - found.double()).abs().max()
    same = bool((expected.argmax(-1) == found.argmax(-1)).all())
    return {"largest_difference": float(difference), "same_predictions": same}


def _compact(
    network: nn.Module,
    source: Path,
    masks: Mapping[str, Tensor],
    dtype: torch.dtype,
    inputs: Mapping[str, Tensor],
    folder: Path,
) -> Callable[[], Tensor | None]:
    index = artifact.read_index(source)
    kept = None if dtype == torch.float32 else dtype
    artifact.save(network, folder, masks, kept, index["architecture"], index["provenance"])
    return lambda: _outputs(artifact.load(folder), inputs)


def _dense(network: nn.Module, inputs: Mapping[str, Tensor], folder: Path) -> Callable[[], Tensor | None]:
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(network).half()
    for name, value in half.state_dict().items():
        if value.is_floating_point() and not torch.equal(value.isfinite(), network.state_dict()[name].isfinite()):
            raise ValueError(f"{name!r} has values beyond the range of float16: export compact or onnx instead")
    if hasattr(half, "save_pretrained"):
        half.save_pretrained(folder)  # type: ignore[operator]
        return lambda: _outputs(type(network).from_pretrained(folder).float().eval(), inputs)  # type: ignore[attr-defined]
    with replacing(folder / "weights.safetensors") as temporary:
        save_file({name: value.clone() for name, value in half.state_dict().items()}, temporary)
    with replacing(folder / "graph.pt2") as temporary, temporary.open("wb") as file:
        torch.export.save(_graph(network, inputs), file)
    with replacing(folder / "load.py") as temporary:
        temporary.write_text(_LOADER, encoding="utf-8")

    def again() -> Tensor | None:
        scope: dict[str, Any] = {"__file__": str(folder / "load.py")}
        exec(_LOADER, scope)  # the very text that was written beside the weights
        return _outputs(scope["load"](folder), inputs)

    return again


def _graph(network: nn.Module, inputs: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """The traced network with its weights replaced by one number each: what to compute, not with what."""
    args, kwargs = _call(inputs)
    program = torch.export.export(network, args, kwargs, dynamic_shapes=_dynamic(network, args, kwargs))
    for name, value in program.state_dict.items():
        empty = torch.zeros((), dtype=value.dtype).expand(value.shape)
        trained = isinstance(value, nn.Parameter)
        program.state_dict[name] = nn.Parameter(empty, requires_grad=False) if trained else empty
    return program


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


def _onnx(network: nn.Module, inputs: Mapping[str, Tensor], folder: Path) -> Callable[[], Tensor | None]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch's exporter needs
    except ImportError as error:
        raise ValueError(f"format onnx needs {error.name}: pip install 'distill-prune[onnx]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    args, kwargs = _call(inputs)
    names = [*(f"input_{i}" for i in range(len(args))), *kwargs]
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    with warnings.catch_warnings(), replacing(folder / "model.onnx") as temporary:
        warnings.simplefilter("ignore")  # the exporter warns of its own internals, and of a missing torchvision
        exporter.setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                network,
                args,
                str(temporary),
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=_dynamic(network, args, kwargs),
                input_names=names,
                output_names=["output"],
                external_data=False,
                verbose=False,
            )
        finally:
            exporter.setLevel(level)

    def again() -> Tensor:
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        feed = {name: inputs[name].numpy() for name in names}
        return torch.from_numpy(session.run(["output"], feed)[0])

    return again


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
