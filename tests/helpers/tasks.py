"""Helpers of the tests in tests/workbench/tasks."""

import math


def naive(logits, targets, smoothing=0.0, ignore=None):
    """Position by position, class by class, in python floats."""
    values = []
    classes = logits.shape[-1]
    for z, y in zip(logits.reshape(-1, classes).tolist(), targets.flatten().tolist()):
        if y == ignore:
            continue
        top = max(z)
        log_sum = top + math.log(sum(math.exp(v - top) for v in z))
        q = [(1 - smoothing) * (c == y) + smoothing / classes for c in range(classes)]
        values.append(-sum(weight * (v - log_sum) for weight, v in zip(q, z)))
    return sum(values) / max(len(values), 1)
