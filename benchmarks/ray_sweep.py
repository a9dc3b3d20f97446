"""Four hunts on Ray, one of its workers killed in the middle, against the same four hunts in place.

The worker that trains one of the hunts is killed with SIGKILL when that hunt has a finished level. All four have to
finish, the killed one from its levels, and every level and control has to have the masks, weights, metrics and history
that it has in place, bit for bit. Exit status 1 if not. Needs /proc and Ray.

    python benchmarks/ray_sweep.py
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kills import levels  # type: ignore[import-not-found]

RECIPE = """
grid:
  job: sweep
  run:
    job: hunt
    model: {class_path: workbench.models.MLP, init_args: {hidden: [64, 64]}}
    data: {class_path: workbench.data.Digits}
    trainer: {max_epochs: 8, accelerator: cpu}
    density: [0.5, 0.2, 0.1]
    rewind: 1ep
    controls: [shuffled]
  over: {model.init_args.activation: [relu, gelu], seed: [0, 1]}
"""
VICTIM = "activation-gelu_seed-0"


def run(folder: Path, how: str) -> subprocess.Popen[str]:
    recipe = folder / f"{how.partition(':')[0]}.yaml"
    recipe.write_text(RECIPE + f"  {how}\n", encoding="utf-8")
    command = [sys.executable, "-m", "workbench", "run", str(recipe), "--out", str(folder / recipe.stem)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def worker_of(name: str) -> int | None:
    """The Ray worker whose child trains the run ``name``."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = status.read_bytes().split(b"\0")
            parent = int((status.parent / "stat").read_text().rpartition(")")[2].split()[1])
            boss = (Path("/proc") / str(parent) / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if (
            b"workbench.launcher.sweep" in words
            and any(name.encode() in word for word in words)
            and boss.startswith(b"ray::")
        ):
            return parent
    return None


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ray-sweep-") as made:
        folder = Path(made)
        going = run(folder, "ray: {cpus: 0.5}")
        victim, killed = folder / "ray" / "grid" / VICTIM, None
        while going.poll() is None:
            if killed is None and (victim / "level_01" / "record.json").is_file() and (killed := worker_of(VICTIM)):
                os.kill(killed, signal.SIGKILL)
            time.sleep(0.05)
        said = going.stderr.read() if going.stderr else ""
        record = json.loads((folder / "ray" / "grid" / "record.json").read_text(encoding="utf-8"))
        print(f"on Ray: exit status {going.returncode}, worker {killed} killed")
        for row in record.get("runs", []):
            print(f"  {row['name']}: {row['status']}, attempts {row['attempts']}")
        if going.returncode:
            sys.exit(said[-2000:])
        here = run(folder, "workers: 1")
        here.communicate()
        ours, theirs = levels(folder / "ray" / "grid"), levels(folder / "workers" / "grid")
        same = sum(ours.get(name) == found for name, found in theirs.items())
        print(f"in place: exit status {here.returncode}; {same} of {len(theirs)} trainings are the same, bit for bit")
        if not killed or not theirs or ours != theirs:
            sys.exit(1)


if __name__ == "__main__":
    main()
