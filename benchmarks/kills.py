"""A hunt killed at random moments and started again, against one that nothing disturbed.

    python benchmarks/kills.py [--kills 20] [--seed 0] [--recipe FILE] [--keep]

Each time, `python -m workbench run` is begun in a new folder, killed with SIGKILL at a moment drawn uniformly from
the processor time that the undisturbed run took after its first record was there, and the same command is given again.
Masks, weights, metrics and histories of every level and control have to be the same, bit for bit. Exit status 1 if one
is not. Needs /proc.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = """
seed_everything: 3
ticket:
  job: hunt
  model: {class_path: workbench.models.MLP, init_args: {hidden: [24], norm: batch}}
  data: {class_path: workbench.data.Digits, init_args: {batch_size: 64}}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}
  trainer: {max_epochs: 4, accelerator: cpu}
  levels: {count: 3, rate: 0.5}
  rewind: 7it
  controls: [shuffled]
  checkpoint: 9it
"""
KEYS = ("metrics", "history", "mask_hash", "density")


def begun(recipe: Path, out: Path, log: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "workbench", "run", str(recipe), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def worked(process: subprocess.Popen[bytes], out: Path, until: float = float("inf")) -> float:
    """Wait until the run has worked for so many seconds since its first record, or has ended; for how long it has."""
    start, done = None, 0.0
    while process.poll() is None and done < until:
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            break
        now = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if start is None and any(out.glob("*/record.json")):
            start = now
        done = 0.0 if start is None else now - start
        time.sleep(0.005)
    return done


def levels(out: Path) -> dict[str, dict[str, Any]]:
    """Every training that is whole on disk: its results, and the hash of its weights."""
    found = {}
    for path in sorted(out.glob("*/level_*/**/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        index = json.loads((path.parent / "compact" / "checkpoint.json").read_text(encoding="utf-8"))
        weights = {"weights": index["weights"]["sha256"]}
        found[str(path.parent.relative_to(out))] = {key: record[key] for key in KEYS} | weights
    return found


def whereabouts(out: Path) -> str:
    """How far a killed run had come."""
    done = len(levels(out))
    going = sorted(str(path.parent.parent.relative_to(out)) for path in out.glob("*/level_*/**/last.ckpt"))
    left = len(list(out.rglob("*.tmp")))
    return f"{done} trained" + (f", in {going[-1]}" if going else "") + (f", {left} half-written" if left else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the folders of the runs")
    options = parser.parse_args()
    draw, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="kills-"))
    recipe = options.recipe or folder / "recipe.yaml"
    if options.recipe is None:
        recipe.write_text(RECIPE, encoding="utf-8")
    with (folder / "log.txt").open("wb") as log:
        process = begun(recipe, folder / "whole", log)
        took = worked(process, folder / "whole")
        if process.wait() != 0:
            print((folder / "log.txt").read_text())
            return 1
        whole = levels(folder / "whole")
        print(f"undisturbed: {took:.1f} s, {len(whole)} trainings", flush=True)
        bad = 0
        for number in range(1, options.kills + 1):
            out, moment = folder / f"run-{number}", draw.uniform(0, took)
            process = begun(recipe, out, log)
            worked(process, out, moment)
            state = "had ended before"
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                state = whereabouts(out)
            process.wait()
            status = begun(recipe, out, log).wait()
            same = status == 0 and levels(out) == whole
            bad += not same
            print(f"{number:3d}  killed at {moment:5.2f} s: {state:40}  {'same' if same else 'DIFFERENT'}", flush=True)
            if same and not options.keep:
                shutil.rmtree(out)
    print(f"{options.kills - bad} of {options.kills} ended as the undisturbed run")
    if not (bad or options.keep):
        shutil.rmtree(folder)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
