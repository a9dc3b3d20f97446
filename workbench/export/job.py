"""The ``export`` job: a trained stage as files for other programs, each compared with the trained network.

``compact`` is the compact checkpoint, read by :func:`workbench.load`; ``torch`` is a dense 16-bit folder for torch
(for models of transformers, transformers); ``onnx`` runs in ONNX Runtime. The last two compute in float32, or in
the type that transformers chooses, not the type that the network was trained in.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from workbench import records
from workbench.checkpoints import compact
from workbench.export.inputs import DTYPES, TrainedNetwork, load_example_inputs, outputs, select_level
from workbench.export.onnx import require_onnx, write_onnx
from workbench.export.torch import write_torch
from workbench.records import Export, ExportResult
from workbench.records.source import Source
from workbench.tasks import OutputType

Format = Literal["compact", "torch", "onnx"]


def export(
    of: Source,
    level: int | Literal["last", "winning"] | None = None,
    formats: list[Format] | None = None,
    values: Literal["float32", "float16", "bfloat16"] = "float32",
    out: Path = Path("runs/export"),
) -> dict[str, Any]:
    """Write a trained stage as a compact checkpoint, and on request as a dense 16-bit folder and an ONNX file.

    Every file is loaded again and compared with the trained network, on the validation inputs that the stage stored.

    Args:
        of: The stage to export, or the folder of a compact checkpoint.
        level: For a hunt: `winning`, the sparsest level within tolerance on validation data, which the report
            recommends; `last`; or the number of a level. By default `winning`, or `last` without validation scores.
        formats: Some of compact, torch and onnx; compact is always written.
        values: Type of the compact checkpoint's values; float32 is exact.
        out: The stage's folder, given by the recipe.

    Returns:
        For each format its path, bytes, largest difference of outputs and whether predictions agree.

    Raises:
        ValueError: If there is nothing to export, a level or format does not exist, what the format needs is not
            installed, the network cannot be traced or stored, or the exact checkpoint is not exact.
    """
    requested: list[str] = list(dict.fromkeys(["compact", *(formats or ())]))
    if unknown := [name for name in requested if name not in get_args(Format)]:
        raise ValueError(f"formats has {', '.join(map(repr, unknown))}: choose from {', '.join(get_args(Format))}")
    if values not in DTYPES:
        raise ValueError(f"values is {values!r}: choose from {', '.join(DTYPES)}")
    if "onnx" in requested:
        require_onnx()
    folder, record = select_level(Path(of), level)
    source = compact.find(folder)
    inputs = load_example_inputs(folder, Path(of), source.parent)
    if not inputs and requested != ["compact"]:
        raise ValueError(f"{of} stored no example inputs, with which torch and onnx are traced: export compact only")
    subject = TrainedNetwork(compact.load(source), compact.masks(source), compact.read_index(source), inputs)
    try:
        expected = outputs(subject.network, inputs)
    except NotImplementedError as error:
        kind = type(subject.network).__name__
        if requested != ["compact"]:
            raise ValueError(
                f"{kind} has no forward to trace for {', '.join(requested)}: add one, or export compact"
            ) from error
        # Without a forward there are no outputs to compare; compact.save compares the tensors.
        expected, subject = None, replace(subject, inputs={})
    writers = {
        "compact": lambda: _compact(subject, values, out / "compact"),
        "torch": lambda: write_torch(subject, out / "torch"),
        "onnx": lambda: write_onnx(subject, out / "onnx"),
    }
    exports = []
    for name in requested:
        exported, size = writers[name]()
        outputs_are = _outputs_of(subject.index["provenance"], expected)
        entry = Export(name, name, size, *_compared(expected, exported, out / name, outputs_are))
        if name == "compact" and values == "float32" and entry.largest_difference:
            raise ValueError(f"{out / name} differs from the trained network: this is a defect, please report it")
        exports.append(entry)
    copied = {key: record[key] for key in ("metrics", "monitor", "size") if key in record}
    return records.encode(ExportResult(exports, record.get("level"), values)) | copied


def _outputs_of(provenance: Mapping[str, Any], expected: Tensor | None) -> OutputType:
    """What the outputs are: by the checkpoint, else by their shape, of images along axis 1 as torch has classes."""
    with suppress(TypeError, ValueError):
        return OutputType(**provenance["outputs"]) if "outputs" in provenance else _by_shape(expected)
    return _by_shape(expected)


def _by_shape(expected: Tensor | None) -> OutputType:
    if expected is None or expected.ndim < 2 or expected.shape[-1] == 1:
        return OutputType("numbers")
    return OutputType("classes", 1 if expected.ndim > 3 else -1)


def _same_predictions(expected: Tensor, exported: Tensor, outputs: OutputType) -> bool:
    """The same class, the same yes or no of every label, or numbers within 1% of the largest."""
    if outputs.kind == "classes":
        return bool((outputs.scored(expected).argmax(-1) == outputs.scored(exported).argmax(-1)).all())
    if outputs.kind == "labels":
        return bool(((expected > 0) == (exported > 0)).all())
    scale = expected.abs().nan_to_num().max()
    return torch.allclose(expected, exported, rtol=0.0, atol=float(scale) / 100, equal_nan=True)


def _compared(
    expected: Tensor | None, exported: Tensor | None, path: Path, outputs: OutputType
) -> tuple[float | None, bool | None]:
    """The largest difference of outputs, and whether predictions are the same; None where there is no output."""
    if expected is None or exported is None:
        return None, None
    if expected.shape != exported.shape:
        raise ValueError(f"{path} returns shape {list(exported.shape)}, the network with {list(expected.shape)}")
    one, other = expected.double(), exported.double()
    # Equal infinities, and NaNs in the same positions, do not differ.
    equal = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(equal, 0.0, (one - other).abs()).nan_to_num(float("inf")).max()
    return float(difference), _same_predictions(one, other, outputs)


def _compact(subject: TrainedNetwork, values: str, folder: Path) -> tuple[Tensor | None, int]:
    dtype = None if values == "float32" else DTYPES[values]
    index = subject.index
    compact.save(subject.network, folder, subject.masks, dtype, index["architecture"], index["provenance"])
    weights = folder / compact.read_index(folder)["weights"]["file"]
    size = weights.stat().st_size + (folder / compact.INDEX).stat().st_size
    return outputs(compact.load(folder), subject.inputs), size
