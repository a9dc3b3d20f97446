"""Records of made-up runs on disk, and the page and the terminal's text made of them."""

import html
import json
import re
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from io import StringIO
from pathlib import Path

from rich.console import Console

from workbench.records import FORMAT, read_run
from workbench.report.job import report
from workbench.report.summary import gather

DENSE = 1_340_488
PARAMETERS, PRUNABLE = 335_122, 334_848


def sized(density=1.0, per_weight=4, parameters=PARAMETERS, prunable=PRUNABLE):
    kept = round(prunable * density)
    return {
        "parameters": parameters,
        "prunable": prunable,
        "kept": kept,
        "nonzero": kept + parameters - prunable,
        "dense_fp32_bytes": 4 * parameters,
        "checkpoint_bytes": round(kept * per_weight + prunable / 8 + 4 * (parameters - prunable) + 900),
    }


def scored(test, val=None):
    val = test + 0.002 if val is None else val
    return {"test/accuracy": test, "test/loss": 1 - test, "val/accuracy": val, "val/loss": 1 - val}


def epochs(count, final, rate=0.5):
    return [
        {
            "epoch": e,
            "step": 20 * (e + 1),
            "train/loss": 2.3 * rate**e,
            "val/loss": 2.4 * rate**e + 0.08,
            "val/accuracy": final - (final - 0.12) * rate ** (e + 1),
        }
        for e in range(count)
    ]


def record(name, job="fit", start=0, parents=(), **fields):
    fingerprint = sha256(repr(name).encode()).hexdigest()
    return {
        "format": FORMAT,
        "stage": name,
        "job": job,
        "status": "finished",
        "fingerprint": fingerprint,
        "arguments": {},
        "seed": 0,
        "parents": {r: {"stage": p, "fingerprint": sha256(repr(p).encode()).hexdigest()} for r, p in parents},
        "versions": {"python": "3.11.7", "torch": "2.12.0", "lightning": "2.6.0", "distill-prune": "0.1.0"},
        "environment": {"platform": "Linux-6.1-x86_64", "cpus": 2, "device": "cpu"},
        "started": (datetime(2026, 11, 23, 12, tzinfo=UTC) + timedelta(seconds=start)).isoformat(),
        "seconds": 3.1,
        "monitor": ["accuracy", "max"],
        **fields,
    }


def network(activation, width=512):
    return {"class_path": "workbench.models.MLP", "init_args": {"width": width, "activation": activation}}


def level(number, density, test, val=None, **fields):
    return {
        "level": number,
        "density": density,
        "metrics": scored(test, val),
        "mask_hash": sha256(f"{number} {density}".encode()).hexdigest(),
        "seconds": 2.0 + 0.1 * number,
        "size": sized(density, parameters=101_386, prunable=101_120),
        "history": epochs(8, test),
        **fields,
    }


def hunt(name, start, tests, time):
    levels = [level(i, 0.49**i, test) for i, test in enumerate(tests)]
    last = levels[-1]
    return record(
        name, "hunt", time, [("start", start)], seconds=sum(lv["seconds"] for lv in levels), levels=levels,
        arguments={"start": start, "levels": len(tests), "rate": 0.51, "rewind": "1ep"},
        metrics=last["metrics"], size=last["size"],
    )  # fmt: skip


def exported(name, of, time, **bytes_):
    exports = [
        {
            "format": f,
            "path": f,
            "bytes": b,
            "largest_difference": 0.0 if f != "onnx" else 4e-6,
            "same_predictions": True,
        }
        for f, b in bytes_.items()
    ]
    return record(
        name,
        "export",
        time,
        [("of", of)],
        exports=exports,
        arguments={"of": of, "formats": list(bytes_)},
        seconds=1.4,
    )


GELU = [0.9778, 0.9806, 0.9778, 0.9750, 0.9722, 0.9639, 0.9333, 0.8417]
RELU = [0.9722, 0.9722, 0.9694, 0.9722, 0.9667, 0.9583, 0.9194, 0.8111]


def realistic():
    students = [
        record(
            f"student-{activation}", "distill", start, [("teacher", "teacher")], seconds=seconds,
            arguments={"teacher": "teacher", "model": network(activation, 256), "temperature": 4.0},
            metrics=scored(test), size=sized(parameters=101_386, prunable=101_120),
            history=epochs(15, test + 0.002, 0.52),
        )
        for activation, start, seconds, test in (("gelu", 10, 8.3, 0.9778), ("relu", 20, 8.1, 0.9722))
    ]  # fmt: skip
    return [
        record(
            "teacher", start=0, arguments={"model": network("gelu"), "trainer": {"max_epochs": 20}},
            seconds=9.7,
            metrics=scored(0.9806), size=sized(), history=epochs(20, 0.983, 0.55),
        ),
        *students,
        hunt("ticket-gelu", "student-gelu", GELU, 30),
        hunt("ticket-relu", "student-relu", RELU, 60),
        exported("checkpoint-gelu", "ticket-gelu", 90, compact=9_912, torch=1_342_210, onnx=1_341_874),
        exported("checkpoint-relu", "ticket-relu", 92, compact=9_874, onnx=1_341_874),
    ]  # fmt: skip


def written(run: Path, records) -> Path:
    for number, entry in enumerate(records):
        folder = run / f"{number:02d}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(entry), encoding="utf-8")
    return run


def gathered(tmp_path, records):
    return gather(read_run(written(tmp_path / "run", records)))


def page_of(tmp_path, records, **arguments) -> str:
    run = written(tmp_path / "run", records)
    assert report(run / "report", **arguments) == {"page": "index.html"}
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def cells(page: str, table: str) -> list[list[str]]:
    """The text of a table's body rows, by cell."""
    body = re.search(rf'<table class="{table}">.*?<tbody>(.*?)</tbody>', page, re.S)
    assert body, f"no table {table}"
    rows = re.findall(r"<tr.*?>(.*?)</tr>", body[1], re.S)
    strip = re.compile(r"<[^>]*>")
    return [[html.unescape(strip.sub("", c)) for c in re.findall(r"<t[hd][ >].*?</t[hd]>", r, re.S)] for r in rows]


def terminal(table) -> str:
    console = Console(file=StringIO(), width=220, color_system=None)
    console.print(table)
    return console.file.getvalue()  # type: ignore[union-attr]


def compared(name="bought", time=200, classes=10, students=("alone", "smoothing", "many/small", "many/tiny"), **fields):
    """A compare stage of a teacher and students; the first student is the baseline."""
    told, by_class = {}, {}
    for place, student in enumerate(students):
        gained = [(3 * c * place) % 5 for c in range(classes)]
        lost = [(2 * c + 5 * place) % 4 if place else 0 for c in range(classes)]
        gain = (sum(gained) - sum(lost)) / (36 * classes)
        told[student] = {
            "accuracy": 0.90 + gain, "nll": 0.4 - 0.03 * place, "brier": 0.2 - 0.01 * place, "ece": 0.19 - 0.04 * place,
            "agreement": 0.9 + 0.01 * place, "kl": 0.39 - 0.05 * place, "gain": gain,
        }  # fmt: skip
        if place:
            interval = {"low": gain - 0.013, "high": gain + 0.0131, "confidence": 0.95}
            told[student]["paired"] = {
                "n": 36 * classes, "gained": sum(gained), "lost": sum(lost), "difference": gain, "interval": interval,
                "p": 0.1 / place, "p_holm": 0.2 / place, "method": "exact McNemar test, adjusted Wald interval",
            }  # fmt: skip
        recall = [0.8 + (g - x) / 36 for g, x in zip(gained, lost)]
        by_class[student] = {"recall": recall, "gained": gained, "lost": lost}
    found = {
        "split": "test",
        "baseline": students[0],
        "n": 36 * classes,
        "unit": "samples",
        "teacher": {"name": "teacher", "accuracy": 0.9806, "nll": 0.069, "brier": 0.031, "ece": 0.015},
        "students": told,
        "per_class": {
            "of": classes,
            "classes": list(range(classes)),
            "n": [36] * classes,
            "teacher": [0.98] * classes,
            "students": by_class,
        },
    }
    entry = record(name, "compare", time, [("teacher", "teacher")], comparison=found, seed=None, seconds=0.2, **fields)
    del entry["monitor"]
    return entry


def family(name="many", start=10):
    """A distill stage that trained two students on one teacher pass."""
    members = {
        member: {
            "metrics": scored(test),
            "size": sized(parameters=parameters, prunable=parameters - 280),
            "history": epochs(15, test + 0.002, 0.52),
        }
        for member, test, parameters in (("small", 0.9778, 101_386), ("tiny", 0.9611, 20_010))
    }
    models = {"small": network("gelu", 256), "tiny": network("relu", 64)}
    return record(
        name, "distill", start, [("teacher", "store")], seconds=9.5, students=members,
        arguments={"teacher": "store", "model": models, "temperature": 4.0},
    )  # fmt: skip


def cached(name="store", time=5):
    entry = record(
        name, "cache", time, [("teacher", "teacher")], seconds=0.8, bytes=12_345_678, samples=1437, seed=None
    )
    del entry["monitor"]
    return entry


def distilled():
    """A teacher, its cache, two fits, a family, a comparison."""
    alone, smoothing = realistic()[1:3]
    for entry, name in ((alone, "alone"), (smoothing, "smoothing")):
        entry.update(stage=name, job="fit", parents={})
    return [realistic()[0], cached(), alone, smoothing, family(), compared()]


MINUS = "\N{MINUS SIGN}"


MINUS = "\N{MINUS SIGN}"
