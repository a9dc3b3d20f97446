"""Naive oracles of the losses: published formulas in plain Python loops over floats. Nothing here is vectorised.

Each takes double-precision tensors and returns a float. ``valid`` marks the positions that count.
"""

import itertools
import math
from collections.abc import Iterator

from torch import Tensor

INF = float("inf")
Row = list[float]


def rows(*tensors: Tensor, valid: Tensor | None = None) -> Iterator[tuple[Row, ...]]:
    """The vectors along the last axis of each tensor, at each valid position."""
    flat = [tensor.reshape(-1, tensor.shape[-1]).tolist() for tensor in tensors]
    counts = [True] * len(flat[0]) if valid is None else valid.reshape(-1).tolist()
    yield from (vectors for counted, *vectors in zip(counts, *flat) if counted)  # type: ignore[misc]


def chosen(labels: Tensor, valid: Tensor | None) -> list[int]:
    """The labels of the valid positions."""
    counts = [True] * labels.numel() if valid is None else valid.reshape(-1).tolist()
    return [label for label, counted in zip(labels.reshape(-1).tolist(), counts) if counted]


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def softmax(logits: Row, temperature: float = 1.0) -> Row:
    top = max(logits)
    powers = [math.exp((z - top) / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def kl(p: Row, q: Row) -> float:
    """sum_c p_c (log p_c - log q_c), with 0 log 0 = 0."""
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q) if a > 0)


def soft_target(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> float:
    """T^2 KL(p || q): Hinton et al. 2015, section 2."""
    pairs = rows(student, teacher, valid=valid)
    return temperature**2 * mean([kl(softmax(zt, temperature), softmax(zs, temperature)) for zs, zt in pairs])


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> float:
    """T^2 KL(q || p): Gu et al. 2024, section 2.1. Classes that the teacher rules out are none."""
    found = []
    for zs, zt in rows(student, teacher, valid=valid):
        kept = [(a, b) for a, b in zip(zs, zt) if b > -INF]
        found.append(kl(softmax([a for a, _ in kept], temperature), softmax([b for _, b in kept], temperature)))
    return temperature**2 * mean(found)


def jsd(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None, beta: float = 0.5) -> float:
    """T^2 (beta KL(p || m) + (1 - beta) KL(q || m)), m = beta p + (1 - beta) q: Agarwal et al. 2024, equation 1."""
    found = []
    for zs, zt in rows(student, teacher, valid=valid):
        q, p = softmax(zs, temperature), softmax(zt, temperature)
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q)]
        found.append(beta * kl(p, m) + (1 - beta) * kl(q, m))
    return temperature**2 * mean(found)


def logit_mse(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> float:
    """||z^s - z^t||^2: Kim et al. 2021, equation 2."""
    pairs = rows(student, teacher, valid=valid)
    return mean([sum((a - b) ** 2 for a, b in zip(zs, zt) if b > -INF) for zs, zt in pairs])


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    valid: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> float:
    """T^2 (alpha TCKD + beta NCKD): Zhao et al. 2022, equations 4, 5 and 7."""
    found = []
    for (zs, zt), y in zip(rows(student, teacher, valid=valid), chosen(labels, valid)):
        q, p = softmax(zs, temperature), softmax(zt, temperature)
        rest_q, rest_p = ([x for c, x in enumerate(row) if c != y] for row in (q, p))
        target = kl([p[y], sum(rest_p)], [q[y], sum(rest_q)])
        others = kl([x / sum(rest_p) for x in rest_p], [x / sum(rest_q) for x in rest_q])
        found.append(alpha * target + beta * others)
    return temperature**2 * mean(found)


def pearson(a: Row, b: Row) -> float:
    """Huang et al. 2022, equation 6."""
    a, b = [x - mean(a) for x in a], [x - mean(b) for x in b]
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def dist(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    valid: Tensor | None = None,
    inter: float = 1.0,
    intra: float = 1.0,
) -> float:
    """beta L_inter + gamma L_intra: Huang et al. 2022, equations 8 to 10, times the T^2 of their code."""
    pairs = list(rows(student, teacher, valid=valid))
    q, p = [softmax(zs, temperature) for zs, _ in pairs], [softmax(zt, temperature) for _, zt in pairs]
    over_classes = mean([1 - pearson(a, b) for a, b in zip(q, p)])
    over_batch = mean([1 - pearson(list(a), list(b)) for a, b in zip(zip(*q), zip(*p))])
    return temperature**2 * (inter * over_classes + intra * over_batch)


def standardize(logits: Row) -> Row:
    """(z - mean) / deviation: Sun et al. 2024, algorithm 1."""
    kept = [z for z in logits if z > -INF]
    middle = mean(kept)
    deviation = math.sqrt(mean([(z - middle) ** 2 for z in kept]))
    return [(z - middle) / deviation if z > -INF else z for z in logits]


def sampled_soft_target(
    student: Tensor, ids: Tensor, weights: Tensor, log_probs: Tensor, temperature: float, valid: Tensor | None = None
) -> float:
    """T^2 sum_k w_k (log p_k - log q_k)."""
    found = []
    for zs, cs, ws, logs in rows(student, ids, weights, log_probs, valid=valid):
        q = softmax(zs, temperature)
        found.append(sum(w * (log_p - math.log(q[int(c)])) for c, w, log_p in zip(cs, ws, logs) if w))
    return temperature**2 * mean(found)


def label_smoothing(student: Tensor, labels: Tensor, smoothing: float, valid: Tensor | None = None) -> float:
    """Cross-entropy with (1 - s) [c = y] + s / C: Szegedy et al. 2016, section 7."""
    found = []
    for (zs,), y in zip(rows(student, valid=valid), chosen(labels, valid)):
        target = [(1 - smoothing) * (c == y) + smoothing / len(zs) for c in range(len(zs))]
        found.append(-sum(t * math.log(q) for t, q in zip(target, softmax(zs)) if t))
    return mean(found)


def hint(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> float:
    """Mean of (f^s - f^t)^2: Romero et al. 2015, equation 3, without its half. Channels last."""
    return mean([mean([(a - b) ** 2 for a, b in zip(fs, ft)]) for fs, ft in rows(student, teacher, valid=valid)])


def cosine(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> float:
    """1 - cos: Sanh et al. 2019, section 2. Channels last."""
    found = []
    for fs, ft in rows(student, teacher, valid=valid):
        dot = sum(a * b for a, b in zip(fs, ft))
        found.append(1 - dot / math.sqrt(sum(a * a for a in fs) * sum(b * b for b in ft)))
    return mean(found)


def attention_transfer(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> float:
    """Mean of (Q^s/||Q^s|| - Q^t/||Q^t||)^2, Q_i = sum_c f_ic^2: Zagoruyko, Komodakis 2017, equation 2 and their code.

    Features [B, L, D], ``valid`` [B, L].
    """
    found: list[float] = []
    for b in range(len(student)):
        mask = None if valid is None else valid[b]
        maps = [[sum(x * x for x in f) for (f,) in rows(feature[b], valid=mask)] for feature in (student, teacher)]
        norms = [math.sqrt(sum(x * x for x in values)) for values in maps]
        found += [(a / norms[0] - c / norms[1]) ** 2 for a, c in zip(*maps)]
    return mean(found)


def attention_relation(student: Tensor, teacher: Tensor, heads: int, valid: Tensor | None = None) -> float:
    """KL(R^t || R^s), R = softmax(A A^T / sqrt d): Wang et al. 2021, equations 4 to 6. ``valid`` [B, L]."""
    found = []
    for b in range(len(student)):
        mask = None if valid is None else valid[b]
        sides = [[f for (f,) in rows(feature[b], valid=mask)] for feature in (student, teacher)]
        for i in range(len(sides[0])):
            total = 0.0
            for head in range(heads):
                relations = []
                for side in sides:
                    d = len(side[0]) // heads
                    parts = [f[head * d : (head + 1) * d] for f in side]
                    relations.append(softmax([sum(x * y for x, y in zip(parts[i], a)) / math.sqrt(d) for a in parts]))
                total += kl(relations[1], relations[0])
            found.append(total / heads)
    return mean(found)


def similarity_preserving(student: Tensor, teacher: Tensor) -> float:
    """||G^s - G^t||_F^2 / b^2, rows of G = A A^T normalised: Tung, Mori 2019, equations 2 to 4. Features [b, D]."""
    sides = []
    for feature in (student.tolist(), teacher.tolist()):
        gram = [[sum(x * y for x, y in zip(a, b)) for b in feature] for a in feature]
        sides.append([[g / math.sqrt(sum(x * x for x in row)) for g in row] for row in gram])
    return sum((a - b) ** 2 for s, t in zip(*sides) for a, b in zip(s, t)) / len(student) ** 2


def huber(a: float, b: float) -> float:
    """Park et al. 2019, equation 7."""
    return (a - b) ** 2 / 2 if abs(a - b) <= 1 else abs(a - b) - 1 / 2


def rkd_distance(student: Tensor, teacher: Tensor) -> float:
    """Park et al. 2019, equations 5 and 6, over b^2 as in their code. Features [b, D]."""
    sides = []
    for feature in (student.tolist(), teacher.tolist()):
        distances = [math.dist(a, b) for a, b in itertools.permutations(feature, 2)]
        sides.append([d / mean(distances) for d in distances])
    return sum(huber(a, b) for a, b in zip(*sides)) / len(student) ** 2


def rkd_angle(student: Tensor, teacher: Tensor) -> float:
    """Park et al. 2019, equations 8 and 9, over b^3 as in their code. Features [b, D]."""

    def angle(i: Row, j: Row, k: Row) -> float:
        one, two = [a - b for a, b in zip(i, j)], [a - b for a, b in zip(k, j)]
        return sum(a * b for a, b in zip(one, two)) / math.hypot(*one) / math.hypot(*two)

    triples = list(itertools.permutations(range(len(student)), 3))
    sides = [[angle(f[i], f[j], f[k]) for i, j, k in triples] for f in (student.tolist(), teacher.tolist())]
    return sum(huber(a, b) for a, b in zip(*sides)) / len(student) ** 3
