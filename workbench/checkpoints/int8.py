"""Dynamic 8-bit quantisation of linear layers, for inference. Torch only.

Replaces ``torch.ao.quantization.quantize_dynamic``, which is deprecated.
"""

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LARGEST = 127
_MULTIPLE, _ROWS = 8, 32  # sizes that torch._int_mm needs on CUDA


@final
class Int8Linear(nn.Module):
    r"""A linear layer with 8-bit weights and activations, whose products are summed exactly in 32-bit integers.

    .. math:: y_{ij} = s_i \, w_j \sum_k X_{ik} W_{jk} + b_j, \quad
              X_{ik} = \mathrm{round}(x_{ik} / s_i),\; s_i = \max_k |x_{ik}| / 127

    One fixed scale per output channel, and one per row of the input, computed at every call; both symmetric. The sum is
    exact, so a row's result does not depend on the other rows.

    Args:
        weight: Floating point [out, in].
        bias: [out], or None; added in its own precision.
    """

    weights: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        wide = weight.detach().float()
        scales = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        rounded = (wide / scales[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
        rounded = F.pad(rounded, (0, -self.in_features % _MULTIPLE, 0, -self.out_features % _MULTIPLE))
        self.register_buffer("weights", rounded)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the input's precision."""
        rows = x.reshape(-1, self.in_features).float()
        scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        rounded = (rows / scale).round().to(torch.int8)
        short = _ROWS - len(rounded) if len(rounded) < _ROWS and x.device.type != "cpu" else 0
        rounded = F.pad(rounded, (0, self.weights.shape[1] - self.in_features, 0, short))
        product = torch._int_mm(rounded, self.weights.t())  # type: ignore[attr-defined] - int8 x int8 -> int32
        summed = product[: len(rows), : self.out_features]
        result = summed.float() * scale * self.scales
        if self.bias is not None:
            result = result + self.bias
        return result.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize(module: nn.Module) -> nn.Module:
    """Replace every linear layer of ``module`` by an :class:`Int8Linear`, in place; use the returned module.

    Linear layers are ``nn.Linear`` and the transposed one of GPT-2 (transformers' ``Conv1D``). A layer whose weight
    its owner reads directly, as ``nn.MultiheadAttention`` does, stays as it is.

    Raises:
        ValueError: If there is none.
    """
    if (quantized := _quantized(module)) is not None:
        return quantized
    replaced: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children() yields a shared layer only once
            if child is not None and (layer := replaced.get(child) or _quantized(child)) is not None:
                setattr(parent, name, replaced.setdefault(child, layer))
        if hasattr(parent, "activation_relu_or_gelu"):
            # nn.TransformerEncoderLayer's fused path would read linear.weight instead of calling the layer.
            parent.activation_relu_or_gelu = 0  # type: ignore[assignment]
    if not replaced:
        raise ValueError(
            f"precision is 'int8', but {type(module).__name__} has no nn.Linear to quantise: give 'bf16' or None"
        )
    return module


def _quantized(module: Any) -> Int8Linear | None:
    if type(module) is nn.Linear:
        return Int8Linear(module.weight, module.bias)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return Int8Linear(module.weight.t(), module.bias)
    return None
