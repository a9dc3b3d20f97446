"""What a cached teacher costs: time of a student's epoch over that of the student alone, and over a live teacher's.

MNIST-sized images, a LeNet-5 student, a convolutional teacher of 13 million multiplications an image, one thread, the
ways in turn; CPU time, which other work on the machine does not lengthen. Beside the ratios: bytes on disk, how fast
they were written, and whether the weights after an epoch are the same.

    python benchmarks/cache.py [--samples 6000] [--rounds 5]
    python benchmarks/cache.py --messages     # what is said of stale, damaged and foreign caches
"""

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))

from distill.cache import CachedTeacher, cache_teacher, store
from distill.cache.writing import write
from distill.losses import soft_target
from distill.teacher import Teacher
from workbench.data.images import LabelledImages
from workbench.models import LeNet5

BATCH = 128


def images(count: int, seed: int = 0) -> LabelledImages:
    drawn = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=drawn)
    return LabelledImages(pixels, torch.randint(0, 10, (count,), generator=drawn), 127.5, 73.9)


def as_is(batch: Any) -> Any:
    return batch


def loader(data: LabelledImages, seed: int = 1) -> DataLoader:
    order = torch.Generator().manual_seed(seed)
    return DataLoader(data, BATCH, shuffle=True, collate_fn=as_is, generator=order, drop_last=True)


def big() -> nn.Module:
    def block(width: int, inner: int) -> list[nn.Module]:
        return [nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner), nn.GELU()]

    body = [*block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2), *block(64, 64)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64 * 49, 10))


def epoch(student: nn.Module, batches: Any, teach: Callable[[Any], tuple[Tensor, Tensor, Tensor | None]]) -> float:
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    began = time.process_time()
    for batch in batches:
        x, y, logits = teach(batch)
        optimizer.zero_grad()
        output = student(x)
        loss = F.cross_entropy(output, y)
        if logits is not None:
            loss = 0.9 * soft_target(output, logits) + 0.1 * loss
        loss.backward()
        optimizer.step()
    return time.process_time() - began


def measure(samples: int, rounds: int) -> None:
    torch.manual_seed(0)
    data, teacher, start = images(samples), Teacher(big()), LeNet5()
    with tempfile.TemporaryDirectory() as folder:
        written = write(teacher, loader(data), folder)
        cached = CachedTeacher(folder, teacher)
        blind = CachedTeacher(folder, verify=False)
        ways: dict[str, Callable[[nn.Module, int], float]] = {
            "alone": lambda s, i: epoch(s, loader(data, i), lambda b: (*b, None)),
            "alone, same loss": lambda s, i: epoch(s, loader(data, i), lambda b: (*b, b[0].flatten(1)[:, :10])),
            "cached": lambda s, i: epoch(
                s, cached.attach(loader(data, i)), lambda b: (*b.batch, b.cached_targets["logits"])
            ),
            "cached, verify=False": lambda s, i: epoch(
                s, blind.attach(loader(data, i)), lambda b: (*b.batch, b.cached_targets["logits"])
            ),
            "live": lambda s, i: epoch(s, loader(data, i), lambda b: (*b, teacher(b[0]))),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        ends: dict[str, dict[str, Tensor]] = {}
        for i in range(rounds + 1):
            for name, way in ways.items():
                student = copy.deepcopy(start)
                taken = way(student, i)
                ends[name] = student.state_dict()
                if i:  # the first round warms up
                    seconds[name].append(taken)
    print(f"{samples} samples, batches of {BATCH}, medians of {rounds} rounds, times of alone:")
    for name, taken in seconds.items():
        ratios = sorted(t / alone for t, alone in zip(taken, seconds["alone"]))
        print(f"  {name:22s} {median(ratios):6.2f}   ({ratios[0]:.2f} to {ratios[-1]:.2f}), {median(taken):.2f} s")
    same = all(torch.equal(ends["live"][name], ends["cached"][name]) for name in ends["live"])
    print(f"weights after an epoch, cached against live: {'the same bits' if same else 'DIFFERENT'}")
    rate = written.written / written.seconds
    print(
        f"on disk: {written.bytes:,} bytes, {written.bytes / samples:.0f} a sample; written in {written.seconds:.1f} s"
    )
    print(f"  with the teacher's passes: {samples / written.seconds:,.0f} samples/s, {rate / 2**20:.2f} MiB/s")


def say(what: str, act: Callable[[], Any]) -> None:
    try:
        act()
    except ValueError as error:
        print(f"{what}\n    {error}\n")
    else:
        raise SystemExit(f"{what}: nothing was said")


def messages() -> None:
    torch.manual_seed(0)
    data, network = images(512), nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    other = copy.deepcopy(network)
    nn.init.zeros_(other[1].bias)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "cache"
        cache_teacher(network, loader(data), path, shard_size=128)
        index, shard = path / "train" / "cache.json", path / "train" / "shard-00001.safetensors"
        kept = {file: file.read_bytes() for file in (index, shard)}

        def first(given: LabelledImages, **options: Any) -> Any:
            return next(iter(CachedTeacher(path, **options).attach(loader(given))))

        def changed(file: Path, content: bytes, act: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                try:
                    file.write_bytes(content)
                    act()
                finally:
                    file.write_bytes(kept[file])

            return run

        def open_it() -> Any:
            return CachedTeacher(path)

        def edited(**entries: Any) -> bytes:
            plain = {**json.loads(kept[index]), **entries}
            plain.pop("sha256")
            return json.dumps({**plain, "sha256": store._checksum(plain)}).encode()

        tail = bytearray(kept[shard])
        tail[-1] ^= 1
        moved = images(512)
        moved.mean = 128.0
        last = images(512)
        last.images[300, 0, 0, 0] ^= 1
        say("stale: another teacher", lambda: CachedTeacher(path, other))
        say("stale: another teacher writes there", lambda: cache_teacher(other, loader(data), path))
        say("stale: another dtype writes there", lambda: cache_teacher(network, loader(data), path, dtype="float16"))
        say("stale: another transform", lambda: first(moved))
        say("stale: one pixel of one sample", lambda: list(CachedTeacher(path).attach(loader(last))))
        say("stale: fewer samples", lambda: first(images(500)))
        say("damaged: shard cut", changed(shard, kept[shard][:-1], open_it))
        say("damaged: shard altered", changed(shard, bytes(tail), open_it))
        say("damaged: index cut", changed(index, kept[index][:99], open_it))
        say("damaged: index altered", changed(index, kept[index].replace(b"512", b"513"), open_it))
        say("damaged: stopped half-way", changed(index, edited(complete=False, shards=[]), open_it))
        say("newer version", changed(index, edited(version=2), open_it))
        say("foreign: another index", changed(index, b'{"name": "npm"}', open_it))
        say("foreign: no cache", lambda: CachedTeacher(temporary + "/nowhere"))
        shard.unlink()
        say("damaged: shard gone", open_it)
        (Path(temporary) / "mine" / "train").mkdir(parents=True)
        (Path(temporary) / "mine" / "train" / "notes.txt").touch()
        say("foreign: other files", lambda: cache_teacher(network, loader(data), Path(temporary) / "mine"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", ".*isinstance.treespec")
    torch.set_num_threads(1)
    messages() if given.messages else measure(given.samples, given.rounds)
