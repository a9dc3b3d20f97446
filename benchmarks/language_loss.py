"""Memory and time of the chunked language-model loss against both heads followed by the plain losses.

Each variant runs alone in a process of its own, so that one's peak is not another's; peaks are resident memory above
what inputs and weights take. Run it as ``python benchmarks/language_loss.py``.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from distill.language import chunked_soft_target
from distill.losses import mix, soft_target

TEMPERATURE, ALPHA = 2.0, 0.5


def inputs(shape: argparse.Namespace, device: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    n, d, v = shape.tokens, shape.hidden, shape.vocabulary
    made = {
        "student_hidden": torch.randn(n, d, generator=random),
        "student_weight": torch.randn(v, d, generator=random) * 0.05,
        "teacher_hidden": torch.randn(n, d, generator=random),
        "teacher_weight": torch.randn(v, d, generator=random) * 0.05,
        "labels": torch.randint(v, (n,), generator=random),
    }
    made = {name: tensor.to(device) for name, tensor in made.items()}
    for name in ("student_hidden", "student_weight"):
        made[name].requires_grad_()
    return made


def naive(given: dict[str, Tensor], alpha: float, _: int) -> Tensor:
    student = given["student_hidden"] @ given["student_weight"].t()
    with torch.no_grad():
        teacher = given["teacher_hidden"] @ given["teacher_weight"].t()
    soft = soft_target(student, teacher, TEMPERATURE)
    return mix(soft, torch.nn.functional.cross_entropy(student, given["labels"]), alpha) if alpha < 1 else soft


def chunked(given: dict[str, Tensor], alpha: float, chunk: int) -> Tensor:
    labels = given["labels"] if alpha < 1 else None
    return chunked_soft_target(
        given["student_hidden"],
        given["student_weight"],
        given["teacher_hidden"],
        given["teacher_weight"],
        TEMPERATURE,
        labels,
        alpha,
        chunk=chunk,
    )


def liger(given: dict[str, Tensor], alpha: float, _: int) -> Tensor:
    """Liger's fused linear JSD at beta 0: forward KL without T^2 and without labels, so those are added here."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
    named = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    return TEMPERATURE**2 * loss(*(given[name] for name in named), None)


VARIANTS: dict[str, Callable[[dict[str, Tensor], float, int], Tensor]] = {
    "naive": naive,
    "chunked": chunked,
    "liger": liger,
}


def step(variant: str, given: dict[str, Tensor], alpha: float, chunk: int) -> tuple[float, float]:
    for tensor in given.values():
        tensor.grad = None
    began = time.perf_counter()
    loss = VARIANTS[variant](given, alpha, chunk)
    loss.backward()
    value = loss.item()  # on a GPU this waits for the end of it
    if given["labels"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, value


def measure(variant: str, shape: argparse.Namespace, device: str) -> dict[str, Any]:
    """One variant in this process: peak bytes above the inputs, seconds a step, value; gradients into a file."""
    torch.set_num_threads(shape.threads)
    given = inputs(shape, device)
    small = {name: tensor.detach()[:2].clone().requires_grad_(tensor.requires_grad) for name, tensor in given.items()}
    small["labels"] = small["labels"] % 2
    step(variant, small, shape.alpha, shape.chunk)  # libraries loaded, threads started
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
    else:
        before = resident()
    first, value = step(variant, given, shape.alpha, shape.chunk)
    after = torch.cuda.max_memory_allocated() if device == "cuda" else peak()
    seconds = [step(variant, given, shape.alpha, shape.chunk)[0] for _ in range(shape.repeats)] or [first]
    named = {name: given[name].grad for name in ("student_hidden", "student_weight")}
    torch.save(named, shape.gradients)
    return {"bytes": after - before, "seconds": median(seconds), "value": value}


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "tokens": 4096,
        "hidden": 512,
        "vocabulary": 32000,
        "chunk": 256,
        "threads": 1,
        "repeats": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of the soft targets; Liger has no other")
    parser.add_argument("--gradients", default="gradients-{}.pt", help="where to, removed afterwards")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments, arguments.device)))
        return
    print(
        f"{arguments.tokens} tokens, hidden {arguments.hidden}, vocabulary {arguments.vocabulary}, "
        f"alpha {arguments.alpha}, T {TEMPERATURE}, chunk {arguments.chunk}, torch {torch.__version__}"
    )
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        compare(arguments, device)
    if "cuda" not in devices:
        print("cuda: no GPU at hand, so Liger's kernels were not measured")


def compare(arguments: argparse.Namespace, device: str) -> None:
    found: dict[str, dict[str, Any]] = {}
    grads: dict[str, dict[str, Tensor]] = {}
    for variant in ["naive", "chunked", *(["liger"] if device == "cuda" and arguments.alpha == 1 else [])]:
        file = Path(arguments.gradients.format(variant))
        same = [f"--{n}={getattr(arguments, n)}" for n in ("tokens", "hidden", "vocabulary", "chunk", "threads")]
        same += [f"--repeats={arguments.repeats}", f"--alpha={arguments.alpha}", f"--gradients={file}"]
        call = [sys.executable, __file__, f"--variant={variant}", f"--device={device}", *same]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{device} {variant}: failed, {done.stderr.strip().splitlines()[-1:]}")
            continue
        found[variant] = json.loads(done.stdout.splitlines()[-1])
        grads[variant] = torch.load(file, map_location="cpu")
        file.unlink()
    for variant, row in found.items():
        naive_row, reference = found["naive"], grads["naive"]
        worst = max(float((g - reference[n]).abs().max() / reference[n].abs().max()) for n, g in grads[variant].items())
        memory, seconds = row["bytes"] / naive_row["bytes"], row["seconds"] / naive_row["seconds"]
        print(
            f"{device} {variant:8} peak {row['bytes'] / 2**20:7.0f} MiB ({memory:.3f} of naive)  "
            f"{row['seconds']:7.3f} s ({seconds:.3f})  loss {row['value']:.6f}  "
            f"gradient difference {worst:.1e} of the largest"
        )


if __name__ == "__main__":
    main()
