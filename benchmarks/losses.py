"""One table of every distillation loss: how far from its formula in loops, how far from a peer, how it scales with T.

    python -m benchmarks.losses

Peers are torch itself and, where they are installed, torchdistill, trl and liger-kernel: only their loss code is
needed (``pip install --no-deps torchdistill trl liger-kernel``). A peer that computes the same times a number is
compared after multiplying by it; the number is shown.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill import losses
from tests.helpers import oracles
from tests.helpers.loss_table import FEATURE, LOGIT

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
CLASSES, WIDTH, BETA = 10, 12, 0.3  # beta as in the table of the tests


class Absent(Exception):
    """A peer is not installed."""


def part(package: str, module: str, name: str) -> Any:
    """Something of a peer; of a module that needs more than is installed, the one function is read from its source."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise Absent(f"{package} is not installed")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
        found: Any = importlib.import_module(module)
        for step in name.split("."):
            found = getattr(found, step)
        return found
    path = Path(spec.submodule_search_locations[0]).parent.joinpath(*module.split(".")).with_suffix(".py")
    if not path.exists():
        raise Absent(f"{package} {importlib.metadata.version(package)} has no {module}")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == name.rpartition(".")[2]:
            node.decorator_list = []
            scope: dict[str, Any] = {"torch": torch, "F": F, "math": math}
            exec(compile(ast.Module([node], []), str(path), "exec"), scope)
            return scope[node.name]
    raise Absent(f"{package} {importlib.metadata.version(package)} has no {name}")


def torchdistill(name: str, *args: Any, **kwargs: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """One of its losses, which take dictionaries of what modules put out."""
    made = part("torchdistill", "torchdistill.losses.mid_level", name)(*args, **kwargs)
    return lambda student, teacher: made({"m": {"output": student}}, {"m": {"output": teacher}})


def torchdistill_logits(name: str, **kwargs: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return torchdistill(name, "m", "output", "m", "output", **kwargs)


def trl(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    loss = part("trl", "trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss")
    return temperature**2 * loss(student, teacher, beta=beta, temperature=temperature)


def liger(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    name = "LigerFusedLinearJSDFunction.distillation_loss_fn"
    loss = part("liger_kernel", "liger_kernel.chunked_loss.jsd_loss", name)
    return temperature**2 / len(student) * loss(student / temperature, teacher / temperature, beta=beta)


def liger_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    name = "LigerFusedLinearCosineSimilarityFunction.distillation_loss_fn"
    loss = part("liger_kernel", "liger_kernel.chunked_loss.cosine_similarity_loss", name)
    return loss(student.flatten(0, 1), teacher.flatten(0, 1)) / student[..., 0].numel()


def torch_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q, p = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def torchdistill_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return temperature**2 * torchdistill_logits("KDLoss", temperature=temperature, alpha=0)(student, teacher)


def torchdistill_standardized(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    theirs = temperature * ((CLASSES - 1) / CLASSES) ** 0.5
    return temperature**2 * torchdistill_logits("LogitStdKDLoss", temperature=theirs, alpha=0)(student, teacher)


def torchdistill_dist(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return torchdistill_logits("DISTLoss", beta=2, gamma=0.5, tau=temperature)(student, teacher)


def torchdistill_attention(student: Tensor, teacher: Tensor) -> Tensor:
    pair = {"one": {who: {"io": "output", "path": "m"} for who in ("teacher", "student")}}
    return torchdistill("ATLoss", pair, mode="code")(student.transpose(1, 2), teacher.transpose(1, 2))


def torchdistill_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    return torchdistill("SPKDLoss", "m", "m", "batchmean")(student, teacher)


def torchdistill_relations(distance: float, angle: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, t: torchdistill("RKDLoss", "m", "m", distance, angle, "mean")(s, t)


# By loss: the peer, by what it was multiplied and what else differs, and how it is called.
LOGIT_PEERS: dict[str, list[tuple[str, str, Callable[[Tensor, Tensor, float, Tensor], Tensor]]]] = {
    "soft_target": [
        ("torch kl_div batchmean", "T^2", lambda s, t, T, y: torch_kl(s, t, T)),
        ("torchdistill KDLoss", "T^2", lambda s, t, T, y: torchdistill_kd(s, t, T)),
        ("trl GKD, beta 0", "T^2", lambda s, t, T, y: trl(s, t, T, 0)),
        ("liger JSD, beta 0", "T^2 / N", lambda s, t, T, y: liger(s, t, T, 0)),
    ],
    "soft_target, standardize": [
        (
            "torchdistill LogitStdKDLoss",
            "T^2; its T smaller by sqrt((C - 1) / C); eps 1e-7",
            lambda s, t, T, y: torchdistill_standardized(s, t, T),
        )
    ],
    "reverse_kl": [
        ("trl GKD, beta 1", "T^2", lambda s, t, T, y: trl(s, t, T, 1)),
        ("liger JSD, beta 1", "T^2 / N", lambda s, t, T, y: liger(s, t, T, 1)),
    ],
    "jsd": [
        ("trl GKD", "T^2", lambda s, t, T, y: trl(s, t, T, BETA)),
        ("liger JSD", "T^2 / N", lambda s, t, T, y: liger(s, t, T, BETA)),
    ],
    "logit_mse": [("torch mse_loss", "classes", lambda s, t, T, y: CLASSES * F.mse_loss(s, t))],
    "dist": [("torchdistill DISTLoss", "1; eps 1e-8", lambda s, t, T, y: torchdistill_dist(s, t, T))],
    "label_smoothing": [("torch cross_entropy", "1", lambda s, t, T, y: F.cross_entropy(s, y, label_smoothing=0.2))],
}
FEATURE_PEERS: dict[str, list[tuple[str, str, Callable[[Tensor, Tensor], Tensor]]]] = {
    "hint": [("torch mse_loss", "1", F.mse_loss)],
    "cosine": [
        ("torch cosine_similarity", "1", lambda s, t: (1 - F.cosine_similarity(s, t, dim=-1)).mean()),
        ("liger cosine", "1 / N", liger_cosine),
    ],
    "attention_transfer": [("torchdistill ATLoss, code", "1", torchdistill_attention)],
    "similarity_preserving": [
        (
            "torchdistill SPKDLoss",
            "1; its rows have 1-norm 1, not 2-norm",
            torchdistill_similarity,
        )
    ],
    "rkd_distance": [("torchdistill RKDLoss", "1; eps 1e-12", torchdistill_relations(1, 0))],
    "rkd_angle": [("torchdistill RKDLoss", "1", torchdistill_relations(0, 1))],
    "rkd": [("torchdistill RKDLoss", "1; eps 1e-12", torchdistill_relations(1, 2))],
}
NO_PEER = {
    "dkd": "none has it; tests restate the authors'",
    "shuffled_off_class": "none has it",
    "sampled_soft_target": "none has it; of all classes: soft_target",
    "attention_relation": "none has it",
}


def apart(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-12)


def shown(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:.0e}"


def logit_rows() -> list[list[str]]:
    rows = []
    for name, loss in {**LOGIT, "soft_target, standardize": None, "sampled_soft_target": None}.items():
        call: Callable[..., Tensor]
        oracle: Callable[..., float]
        if loss is not None:
            call, oracle = loss.call, loss.oracle
        elif name == "sampled_soft_target":
            call, oracle = _sampled, _sampled_oracle
        else:
            call, oracle = _standardized, _standardized_oracle
        exact, single = [], []
        for shape in ((7, CLASSES), (3, 5, CLASSES)):
            for temperature in TEMPERATURES:
                student, teacher, labels = 3 * wide(*shape), 3 * wide(*shape), torch.randint(CLASSES, shape[:-1])
                for valid in (None, torch.arange(labels.numel()).view(labels.shape) % 3 > 0):
                    expected = oracle(student, teacher, temperature, valid, labels)
                    exact.append(apart(call(student, teacher, temperature, valid, labels).item(), expected))
                    found = call(student.float(), teacher.float(), temperature, valid, labels).item()
                    single.append(apart(found, expected))
        peers = []
        for peer, factor, compute in LOGIT_PEERS.get(name, []):
            student, teacher, labels = 3 * wide(64, CLASSES), 3 * wide(64, CLASSES), torch.randint(CLASSES, (64,))
            ours = [call(student, teacher, T, None, labels).item() for T in TEMPERATURES]
            theirs = [functools.partial(compute, student, teacher, T, labels) for T in TEMPERATURES]
            peers.append(compared(peer, factor, ours, theirs))
        rows += laid_out(name, max(exact), max(single), peers, scale(call))
    return rows


def scale(call: Callable[..., Tensor]) -> str:
    norms = []
    for temperature in TEMPERATURES:
        torch.manual_seed(0)
        student, teacher, labels = (
            wide(256, CLASSES).requires_grad_(),
            wide(256, CLASSES),
            torch.randint(CLASSES, (256,)),
        )
        (grad,) = torch.autograd.grad(call(student, teacher, temperature, None, labels), student)
        norms.append(grad.norm().item())
    return "  ".join(f"{norm / norms[0]:5.2f}" for norm in norms)


def feature_rows() -> list[list[str]]:
    rows = []
    for name, loss in FEATURE.items():
        exact, single = [], []
        valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()
        for mask in (None, valid):
            for _ in range(4):
                student, teacher = wide(4, 5, WIDTH), wide(4, 5, WIDTH)
                expected = loss.oracle(student, teacher, mask)
                exact.append(apart(loss.call(student, teacher, mask).item(), expected))
                single.append(apart(loss.call(student.float(), teacher.float(), mask).item(), expected))
        peers = []
        for peer, factor, compute in FEATURE_PEERS.get(name, []):
            student, teacher = wide(16, 5, WIDTH), wide(16, 5, WIDTH)
            expected = loss.call(student, teacher, None).item()
            peers.append(compared(peer, factor, [expected], [functools.partial(compute, student, teacher)]))
        rows += laid_out(name, max(exact), max(single), peers, "-")
    return rows


def compared(peer: str, factor: str, ours: list[float], theirs: list[Callable[[], Tensor]]) -> tuple[str, str, str]:
    try:
        return peer, factor, shown(max(apart(call().item(), value) for call, value in zip(theirs, ours)))
    except Absent as absent:
        return peer, str(absent), "-"


def laid_out(name: str, exact: float, single: float, peers: list[tuple[str, str, str]], scales: str) -> list[list[str]]:
    peers = peers or [("-", NO_PEER[name], "-")]
    first = [name, shown(exact), shown(single), *peers[0], scales]
    return [first, *(["", "", "", *peer, ""] for peer in peers[1:])]


def wide(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _standardized(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None, labels: Tensor) -> Tensor:
    return losses.SoftTarget(temperature, standardize=True)(student, teacher, valid)


def _standardized_oracle(
    student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None, labels: Tensor
) -> float:
    shape = student.shape
    scores = [
        torch.tensor([oracles.standardize(row) for row in z.reshape(-1, shape[-1]).tolist()], dtype=z.dtype).view(shape)
        for z in (student, teacher)
    ]
    return oracles.soft_target(scores[0], scores[1], temperature, valid)


def _sampled(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None, labels: Tensor) -> Tensor:
    """A sample of all classes: the soft target."""
    log_p = (teacher / temperature).log_softmax(-1)
    ids = torch.arange(teacher.shape[-1]).expand(teacher.shape)
    return losses.sampled_soft_target(student, ids, log_p.exp(), log_p, temperature, valid)


def _sampled_oracle(
    student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None, labels: Tensor
) -> float:
    return oracles.soft_target(student, teacher, temperature, valid)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    head = [
        "loss",
        "loops, fp64",
        "loops, fp32",
        "peer",
        "factor to it",
        "peer, fp64",
        "gradient at T = 1 2 4 8 / T = 1",
    ]
    rows = [head, *logit_rows(), *feature_rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for index, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if not index:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\nDifferences are relative, the largest over shapes, masks and T; gradients are norms, logits from N(0, 1).")
    print("\nTime of soft_target, forward and backward, as a multiple of F.kl_div's, logits [256, 32000] on a CPU:")
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in speeds().items()))


def speeds(positions: int = 256, classes: int = 32000, repeats: int = 5) -> dict[str, float]:
    """Time of `soft_target` by how many positions are valid, relative to F.kl_div over all of them."""
    student, teacher = torch.randn(positions, classes, requires_grad=True), torch.randn(positions, classes)

    def peer() -> Tensor:
        log_q, log_p = (z.div(4).log_softmax(-1) for z in (student, teacher))
        return 16 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def seconds(loss: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(repeats):
            start = time.process_time()
            loss().backward()
            times.append(time.process_time() - start)
        return min(times)

    count, base = torch.arange(positions), seconds(peer)
    masks = {"no mask": None, "all valid": count >= 0, "half": count % 2 == 0, "an eighth": count % 8 == 0}
    return {
        name: seconds(functools.partial(losses.soft_target, student, teacher, 4.0, mask)) / base
        for name, mask in masks.items()
    }


if __name__ == "__main__":
    main()
