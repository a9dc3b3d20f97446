"""What distillation gained: a recipe run over several seeds, its students compared within seeds.

Every seed gives all arms of the recipe the same data order and, arm by arm, initial weights of its own. Printed are
means with 95 % t intervals over seeds, and paired differences to the first student with their t interval and exact
sign-flip test; last-epoch weights on the test split, which chose nothing.

    DATA=/folder/of/data python benchmarks/quality.py clinc150 --seeds 0 1 2 [--out runs/quality] [--teacher.… value …]
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from workbench.evaluation.statistics import mean, paired
from workbench.launcher import recipe as recipes
from workbench.launcher.runner import run

SCORES = ("accuracy", "nll", "brier", "ece", "agreement", "kl")


def scores_of(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By network the scores of a compare stage, or of a stage that trained a student without labels."""
    if "comparison" in record:
        found = record["comparison"]
        return {f"{found['teacher']['name']} (teacher)": found["teacher"], **found["students"]}
    metrics = {name.removeprefix("test/"): value for name, value in (record.get("metrics") or {}).items()}
    return {record["stage"]: metrics} if record["job"] == "distill" and "cosine" in metrics else {}


def said(values: list[float], scale: float) -> str:
    """Mean and half of the interval."""
    found = mean(values)
    half = "" if found.interval is None else f" ±{scale * (found.interval.high - found.mean):.2f}"
    return f"{scale * found.mean:.2f}{half}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    options, rest = parser.parse_known_args()
    changes = [(key.removeprefix("--"), value) for key, value in zip(rest[::2], rest[1::2], strict=True)]
    path = Path(__file__).parent.parent / "recipes" / f"{options.recipe}.yaml"
    table: dict[str, dict[str, list[float]]] = {}
    for seed in options.seeds:
        recipe = recipes.read(path, [*changes, ("seed_everything", str(seed))])
        for record in run(recipe, options.out / f"{options.recipe}-{seed}"):
            for name, scores in scores_of(record).items():
                for score, value in scores.items():
                    if isinstance(value, float):
                        table.setdefault(name, {}).setdefault(score, []).append(value)
    columns = [score for score in (*SCORES, "cosine", "spearman") if any(score in row for row in table.values())]
    print(f"\nrecipe {options.recipe}, n = {len(options.seeds)} seeds, test split, mean ±half of the 95 % t interval")
    print(f"{'':28}" + "".join(f"{score:>16}" for score in columns))
    for name, row in table.items():
        cells = (said(row[s], 100 if s in ("accuracy", "agreement", "ece") else 1) if s in row else "" for s in columns)
        print(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))
    students = [name for name, row in table.items() if "accuracy" in row and not name.endswith("(teacher)")]
    for name in students[1:]:
        found = paired(table[name]["accuracy"], table[students[0]]["accuracy"])
        line = f"accuracy of {name} less that of {students[0]}: {100 * found.mean:+.2f} points"
        if found.interval is not None:
            line += f" [{100 * found.interval.low:+.2f}, {100 * found.interval.high:+.2f}], t test p = {found.p:.3g}"
        print(f"{line}, sign flip p = {found.p_sign_flip}, n = {found.n}")


if __name__ == "__main__":
    main()
