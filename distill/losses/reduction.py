"""What the losses share: checks, precision, masks, sums."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

INF = float("inf")


def check_temperature(temperature: float) -> None:
    """Raises: ValueError: unless the temperature is positive and finite."""
    if not 0 < temperature < INF:
        raise ValueError(f"temperature is {temperature}: a positive number is needed, usually 1 to 10")


def check_alpha(alpha: float) -> None:
    """Raises: ValueError: unless alpha is in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: the weight of the soft targets is between 0 and 1")


def check_beta(beta: float) -> None:
    """Raises: ValueError: unless beta is in [0, 1]."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}: the teacher's weight in the mixture is between 0 and 1")


def check_smoothing(smoothing: float) -> None:
    """Raises: ValueError: unless the smoothing is in [0, 1)."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}: at least 0 and less than 1 is needed, usually 0.1")


def check_weights(**weights: float) -> None:
    """Raises: ValueError: unless each is finite and at least 0."""
    for name, weight in weights.items():
        if not 0 <= weight < INF:
            raise ValueError(f"{name} is {weight}: a weight is finite and at least 0")


def check_class_weights(class_weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """The weights as a tuple.

    Raises:
        ValueError: Unless each is finite and at least 0, and one above.
    """
    if class_weights is None:
        return None
    weights = tuple(float(weight) for weight in class_weights)
    if not all(0 <= weight < INF for weight in weights) or not any(weights):
        raise ValueError(f"class_weights are {list(weights)}: give finite numbers of at least 0, one of them above")
    return weights


def by_class(values: Tensor, teacher: Tensor, class_weights: Sequence[float] | None, valid: Tensor | None) -> Tensor:
    """The values of positions, each times the weight that the teacher expects of its class.

    Raises:
        ValueError: If there is not one weight a class.
    """
    if (weights := check_class_weights(class_weights)) is None:
        return values
    if len(weights) != teacher.shape[-1]:
        raise ValueError(f"class_weights are {len(weights)} for {teacher.shape[-1]} classes: give one each")
    p = torch.softmax(zero_invalid(upcast(teacher.detach()), valid), -1)
    return values * (p * p.new_tensor(weights)).sum(-1)


def check_classes(logits: Tensor) -> None:
    """Raises: ValueError: unless there are two classes at least: over one class every softmax is 1."""
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"logits are {list(logits.shape)}, and a softmax over one class is always 1: if this is a binary "
            "classifier or a regression use bernoulli_target or squared_error, in a trainer outputs='labels' or "
            "'numbers'; else put the classes last"
        )


def check_logits(student: Tensor, teacher: Tensor, valid: Tensor | None) -> None:
    """Raises: ValueError: unless both are logits over classes as ``check_pair`` and ``check_classes`` want them."""
    check_pair(student, teacher, valid)
    check_classes(student)


def check_elements(student: Tensor, teacher: Tensor, valid: Tensor | None) -> None:
    """Raises: ValueError: unless both and ``valid``, which is bool, have one shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's outputs are {list(student.shape)} and the teacher's {list(teacher.shape)}: give them as "
            "many outputs"
        )
    if valid is not None and (valid.shape != student.shape or valid.dtype != torch.bool):
        raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}: bool {list(student.shape)} is needed")


def check_pair(student: Tensor, teacher: Tensor, valid: Tensor | None) -> None:
    """Raises: ValueError: unless both have one shape, and ``valid`` is bool of that shape without the last axis."""
    if student.shape != teacher.shape:
        if student.shape[:-1] == teacher.shape[:-1]:
            raise ValueError(
                f"the student scores {student.shape[-1]} classes and the teacher {teacher.shape[-1]}: "
                "give them outputs over the same classes"
            )
        raise ValueError(
            f"student logits are {list(student.shape)} and teacher logits {list(teacher.shape)}: "
            "ask both about the same inputs"
        )
    check_valid(student, valid)


def check_valid(logits: Tensor, valid: Tensor | None) -> None:
    """Raises: ValueError: unless ``valid`` is bool of the logits' shape without the classes."""
    if valid is not None and (valid.shape != logits.shape[:-1] or valid.dtype != torch.bool):
        raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}: bool {list(logits.shape[:-1])} is needed")


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which autocast does not reach the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def upcast(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def valid_rows(valid: Tensor | None, *tensors: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The rows [n, ...] of tensors [..., ...] that count, and a mask of these where that is not all of them.

    On a CPU the others are dropped, which costs no copy if all count. Elsewhere that would wait for the device, so the
    tensors and the mask stay as they are.

    Args:
        valid: Bool [...], checked before; None if all count.
        tensors: Of these leading axes.
    """
    if valid is None or not valid.ndim or not _readable(valid):
        return list(tensors), valid
    if bool(valid.all()):
        return list(tensors), None
    # Not by the mask itself, whose gradient is added up entry by entry.
    rows = valid.flatten().nonzero().squeeze(-1)
    return [tensor.flatten(0, valid.ndim - 1).index_select(0, rows) for tensor in tensors], None


def _readable(tensor: Tensor) -> bool:
    """Whether a branch may depend on a tensor's values, at no cost: on a CPU, outside of a compiler and of vmap."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    internals: Any = torch._C
    return not internals._functorch.is_functorch_wrapped_tensor(tensor)


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, without a copy at 1."""
    return logits if temperature == 1 else logits / temperature


def zero_invalid(tensor: Tensor, valid: Tensor | None) -> Tensor:
    """Zeros along the last axis wherever a position does not count.

    Before the softmax, not after: its gradient multiplies by what stood there, and 0 * NaN is NaN.
    """
    return tensor if valid is None else tensor.masked_fill(~valid.unsqueeze(-1), 0.0)


def soften(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher at a temperature; uniform where a position does not count."""
    zs, zt = zero_invalid(upcast(student), valid), zero_invalid(upcast(teacher.detach()), valid)
    return torch.log_softmax(softened(zs, temperature), -1), torch.log_softmax(softened(zt, temperature), -1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, summed over the last axis."""
    if log_p.numel() and _readable(log_p) and _readable(log_q) and min(log_p.min(), log_q.min()) > -INF:
        # The same in one pass.
        return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    p = log_p.exp()
    # 0 log 0 = 0, also where q gives such a class no probability either.
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1)


def average(values: Tensor, valid: Tensor | None, temperature: float = 1.0) -> Tensor:
    """T^2 times the mean over valid positions; 0, with its graph, if none is valid. The one place that knows T^2."""
    if valid is None:
        return temperature**2 * values.sum() / max(values.numel(), 1)
    return temperature**2 * values.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)


def label_mask(labels: Tensor, logits: Tensor, valid: Tensor | None) -> Tensor:
    """Bool, of the logits' shape: the class that each position is labelled with; class 0 where it does not count.

    Raises:
        ValueError: If labels are not int64 of the logits' shape without the classes, or one that counts is no class.
    """
    if labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}: int64 {list(logits.shape[:-1])} is needed, a class each"
        )
    labels = labels if valid is None else labels.masked_fill(~valid, 0)
    try:
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, labels.unsqueeze(-1), True)
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        raise ValueError(
            f"labels go from {labels.min().item()} to {labels.max().item()} and there are {logits.shape[-1]} classes: "
            "mark with valid the positions that count, e.g. valid=labels != -100"
        ) from error


def unit(tensor: Tensor, dim: int, size: Tensor | float = 0.0) -> Tensor:
    """Divided by its Euclidean norm along an axis, and as it is where there is no direction: gradients stay finite.

    Args:
        tensor: What to normalise.
        dim: The axis.
        size: Norm of what a difference was taken of: a norm within its rounding is none.
    """
    norm = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
    return tensor / torch.where(norm > _rounding(tensor) * size, norm, 1.0)


def varies(centred: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """Whether a tensor, given without and with its mean, is anything but constant along an axis, beyond rounding."""
    norm = torch.linalg.vector_norm(centred, dim=dim)
    return norm > _rounding(tensor) * torch.linalg.vector_norm(tensor, dim=dim)


def _rounding(tensor: Tensor) -> float:
    return 8 * torch.finfo(tensor.dtype).eps
