"""Every criterion x structure x allocation: exactly k units, nested levels, an oracle in loops, peers with the rule.

    python -m benchmarks.pruning_table

A line is a structure and an allocation; marks stand for the criteria in the order of the head line. The oracle and the
models are those of the tests (tests/helpers/pruning_table.py). ``torch.nn.utils.prune`` is compared by magnitude.
"""

from tests.helpers import pruning_table


def main() -> None:
    """Print the table, and count what does not hold."""
    print(f"criteria: {' '.join(pruning_table.CRITERIA)}")
    print(
        f"{'structure':<13}{'allocation':<13}{'units':>6}  {'kept':<13}{'exact k':<10}{'nested':<10}{'oracle':<10}peer"
    )
    failed = combinations = 0
    for structure in pruning_table.STRUCTURES:
        for allocation in pruning_table.ALLOCATIONS:
            runs = [pruning_table.levels(criterion, structure, allocation) for criterion in pruning_table.CRITERIA]
            marks = [
                [all(pruning_table.exact(level, allocation) for level in run) for run in runs],
                [pruning_table.nested(run) and all(level.whole for level in run) for run in runs],
                [all(pruning_table.weights_in(level.masks) == level.expected for level in run) for run in runs],
            ]
            first = runs[0]
            peer = pruning_table.by_torch(structure, allocation, first[0].masks)  # the first criterion is magnitude
            units = sum(total for _, total in first[0].kept.values())
            kept = "/".join(str(sum(k for k, _ in level.kept.values())) for level in first)
            agreed = "" if peer is None else f"{peer[0]} {'agrees' if peer[1] else 'DIFFERS'}"
            shown = "".join(f"{''.join('+' if mark else '-' for mark in line):<10}" for line in marks)
            print(f"{structure:<13}{allocation:<13}{units:>6}  {kept:<13}{shown}{agreed}")
            combinations += len(runs)
            failed += sum(not all(each) for each in zip(*marks)) + (peer is not None and not peer[1])
    print(f"{combinations} combinations, {failed} failures")


if __name__ == "__main__":
    main()
