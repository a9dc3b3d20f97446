"""The ``torch`` format: a dense 16-bit folder that plain torch, or plain transformers for its own models, loads."""

import runpy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.export.inputs import TrainedNetwork, cast_inputs, folder_bytes, outputs
from workbench.export.tracing import tracing
from workbench.files import atomic_files
from workbench.models.copying import copied

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


def write_torch(subject: TrainedNetwork, folder: Path) -> tuple[Tensor | None, int]:
    """Write the dense folder; the output of the network loaded from it, and its size in bytes."""
    half = _halved(subject.network)
    with atomic_files(folder) as part:
        if _is_of_transformers(subject.index["architecture"]):
            with _no_bars():
                half.save_pretrained(part)  # type: ignore[operator]
                again = type(half).from_pretrained(part)  # type: ignore[attr-defined]
            loaded_outputs = outputs(again.eval(), subject.inputs)
        else:
            wide = copied(subject.network).float()
            save_file({name: value.clone() for name, value in half.state_dict().items()}, part / "weights.safetensors")
            _save_graph(wide, cast_inputs(subject.inputs, torch.float32), part / "graph.pt2")
            (part / "load.py").write_text(_LOADER, encoding="utf-8")
            # Run the written file, as a user would.
            loaded_outputs = outputs(runpy.run_path(str(part / "load.py"))["load"](part), subject.inputs)
        return loaded_outputs, folder_bytes(part)


def _halved(network: nn.Module) -> nn.Module:
    """A copy with parameters of more than 16 bits in float16; bfloat16 ones and all buffers stay what they are."""
    half = copied(network)
    for name, parameter in half.named_parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 2:
            narrow = parameter.data.half()
            if not torch.equal(narrow.isfinite(), parameter.data.isfinite()):
                raise ValueError(f"{name!r} has values beyond the range of float16: export compact or onnx instead")
            parameter.data = narrow
    return half


def _is_of_transformers(architecture: Mapping[str, Any] | None) -> bool:
    """Whether transformers can build the network from its own configuration, with the same layer sizes."""
    if architecture is None or "config" not in architecture or "resized" in architecture:
        return False
    if "activation" not in architecture:
        return True
    from workbench.models.activations import spec

    return bool(spec(architecture["activation"]).hub_keys)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bars."""
    from transformers.utils import logging as hub

    shown = hub.is_progress_bar_enabled()
    hub.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hub.enable_progress_bar()


def _save_graph(network: nn.Module, inputs: Mapping[str, Tensor], file: Path) -> None:
    """Write the traced network with each weight replaced by an expanded scalar: the graph without the values."""
    with tracing(network, inputs) as (args, kwargs, dynamic):
        program = torch.export.export(network, args, kwargs, dynamic_shapes=dynamic)
    for name, value in program.state_dict.items():
        empty = torch.zeros((), dtype=value.dtype).expand(value.shape)
        trained = isinstance(value, nn.Parameter)
        program.state_dict[name] = nn.Parameter(empty, requires_grad=False) if trained else empty
    with warnings.catch_warnings():
        # Weights were replaced by expanded scalars on purpose.
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        torch.export.save(program, file)
