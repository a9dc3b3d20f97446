"""The ``onnx`` format: one file that stock ONNX Runtime runs."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.export.inputs import TrainedNetwork, arguments_of, cast_inputs, folder_bytes
from workbench.export.tracing import tracing
from workbench.files import atomic_files
from workbench.models.copying import copied


def require_onnx() -> None:
    """Raises: ValueError: If a package that the format needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 - what torch's exporter needs
    except ImportError as error:
        raise ValueError(f"format onnx needs {error.name}: pip install 'distill-prune[onnx]'") from error


def write_onnx(subject: TrainedNetwork, folder: Path) -> tuple[Tensor | None, int]:
    """Write ``model.onnx`` into ``folder``; the output of ONNX Runtime, and its size in bytes."""
    import onnxruntime

    wide = copied(subject.network).float()
    inputs = cast_inputs(subject.inputs, torch.float32)
    args, kwargs = arguments_of(inputs)
    names = [*(f"input_{i}" for i in range(len(args))), *kwargs]
    with atomic_files(folder) as part:
        with _quiet_exporter(), tracing(wide, inputs) as (args, kwargs, dynamic):
            # Traced before the export: the exporter would drop the constraint that a size is the example's.
            program = torch.export.export(wide, args, kwargs, dynamic_shapes=dynamic)
            export_options = {"input_names": names, "output_names": ["output"], "verbose": False}
            graph: Any = torch.onnx.export(program, dynamo=True, **export_options)
            _fix_sizes(graph)
            graph.save(part / "model.onnx", external_data=False)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(part / "model.onnx"), options, providers=["CPUExecutionProvider"])
        feed = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
        return torch.from_numpy(session.run(["output"], feed)[0]), folder_bytes(part)


def _fix_sizes(graph: Any) -> None:
    """State sizes that are fixed, so that ONNX Runtime refuses other ones."""
    for value in (*graph.model.graph.inputs, *graph.model.graph.outputs):
        for axis, size in enumerate(value.shape or ()):
            if str(size).isdigit():
                value.shape[axis] = int(str(size))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Inside, torch's ONNX exporter does not warn, e.g. of a missing torchvision."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
