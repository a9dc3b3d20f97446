"""Data sets of a few samples in the files and folders that the recipes for real data expect under ``$DATA``."""

import io
import json
import random
import struct
from pathlib import Path

import numpy as np


def small_data_sets(folder: Path) -> Path:
    """Write every data set into ``folder``; return ``folder``."""
    random.seed(0)
    mnist(folder / "mnist")
    cifar10(folder / "cifar10-jpeg-24k")
    clinc150(folder / "clinc150" / "data_full.json")
    for name, file in (("mr", "rt-polarity.all"), ("subj", "subj.all")):
        labelled_lines(folder / name / file)
    text(folder / "tinyshakespeare" / "input.txt", 6000)
    for name in ("valid.txt", "test.txt"):
        text(folder / "wikitext2-valid-test" / name, 3000)
    vowels(folder / "japanese_vowels")
    ett(folder / "ett" / "ETTh1.csv")
    return folder


def mnist(folder: Path, samples: int = 60) -> None:
    """IDX files of 28x28 images in ten classes."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels = noise.integers(0, 256, (samples, 28, 28), dtype=np.uint8)
        labels = np.arange(samples, dtype=np.uint8) % 10
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, samples, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">BBBBI", 0, 0, 8, 1, samples) + labels.tobytes()
        )


def cifar10(folder: Path, samples: int = 60) -> None:
    """Parquet files of 32x32 colour images, as PNG, in ten classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for part in ("train", "test"):
        images = []
        for number in range(samples):
            file = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": f"{number}.png"})
        pq.write_table(
            pa.table({"image": images, "label": [n % 10 for n in range(samples)]}), folder / f"{part}.parquet"
        )


def clinc150(file: Path) -> None:
    """Two questions of each of 150 intents in training, one in validation and test, and a few out of scope."""
    file.parent.mkdir(parents=True)
    parts = {"train": 2, "val": 1, "test": 1}
    rows = {
        part: [[f"{_words(4)} intent{label}", f"intent{label}"] for label in range(150) for _ in range(count)]
        for part, count in parts.items()
    }
    rows |= {f"oos_{part}": [[_words(5), "oos"]] * 2 for part in parts}
    file.write_text(json.dumps(rows))


def labelled_lines(file: Path, lines: int = 120) -> None:
    """A label and a sentence a line."""
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"{n % 2} {_words(3 + n % 9)}\n" for n in range(lines)))


def text(file: Path, characters: int) -> None:
    """Running text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{_words(characters // 4)} .\n"[:characters])


def vowels(folder: Path, samples: int = 45) -> None:
    """``.ts`` files of series of twelve channels and 3 to 9 steps in nine classes."""
    folder.mkdir(parents=True)
    header = "@dimensions 12\n@equalLength false\n@classLabel true 1 2 3 4 5 6 7 8 9\n@data\n"
    for part in ("TRAIN", "TEST"):
        lines = [
            ":".join(
                [*(",".join(str(random.gauss(n % 9, 1)) for _ in range(3 + n % 7)) for _ in range(12)), str(1 + n % 9)]
            )
            for n in range(samples)
        ]
        (folder / f"JapaneseVowels_{part}.ts").write_text(header + "\n".join(lines))


def ett(file: Path, hours: int = 460) -> None:
    """Seven channels, hour by hour."""
    file.parent.mkdir(parents=True)
    names = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    rows = [",".join([f"hour {n}", *(str(random.gauss(n % 24, 1)) for _ in names)]) for n in range(hours)]
    file.write_text("\n".join([",".join(["date", *names]), *rows]))


def _words(count: int) -> str:
    return " ".join(random.choice(("to", "be", "or", "not", "that", "is", "the", "question")) for _ in range(count))
