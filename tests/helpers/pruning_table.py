"""Every criterion x structure x allocation in one table, with an oracle in loops over lists, and peers with the rule.

The oracle shares nothing with the package but the scores of single weights, which have oracles of their own. Densities
are decimals, a unit is a list of weights, and places are given away one at a time.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as peer

from prune import criteria
from prune.masks import Masks
from prune.pruner import Pruner, prunable

Weight = tuple[str, int]  # name, flat index
Units = dict[str, list[list[Weight]]]  # key -> its units
Scores = dict[str, list[float]]  # key -> scores of its units
Alive = dict[str, list[bool]]


# Models and data


class Net(nn.Module):
    """A convolution and two matrices whose inputs come in fours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(4, 8, 3), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.out(F.relu(self.fc(F.relu(self.conv(image)).mean((2, 3)))))


@cache
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@cache
def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 4, "intermediate_size": 6, "num_hidden_layers": 2}
    config = hf.BertConfig(**sizes, vocab_size=5, max_position_embeddings=4, num_labels=3)
    return hf.BertForSequenceClassification(config).eval()


@cache
def data(model: nn.Module) -> list[Any]:
    """A batch of what goes into the model, and labels."""
    torch.manual_seed(1)
    labels = torch.tensor([0, 1, 2])
    if hasattr(model, "config"):
        return [{"inputs_embeds": torch.randn(3, 4, 8), "labels": labels}]
    return [(torch.randn(3, 4, 5, 5), labels)]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        return F.cross_entropy(model(inputs_embeds=batch["inputs_embeds"]).logits, batch["labels"])
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


# The rows


@dataclass(frozen=True)
class Row:
    """A structure.

    Args:
        model: What it is tried on.
        units: Which weights stand or fall together, by key.
        limit: Of how many neighbours along the inputs at most how many are kept.
        balanced: Whether every output keeps equally many.
        densities: Three levels.
    """

    model: Callable[[], nn.Module]
    units: Callable[[nn.Module], Units]
    limit: tuple[int, int] | None = None
    balanced: bool = False
    densities: tuple[float, ...] = (0.7, 0.45, 0.3)


def singles(model: nn.Module) -> Units:
    return {name: [[(name, i)] for i in range(w.numel())] for name, w in prunable(model).items()}


def channels(model: nn.Module) -> Units:
    size = {name: w.numel() // len(w) for name, w in prunable(model).items()}
    return {
        name: [[(name, row * size[name] + i) for i in range(size[name])] for row in range(len(w))]
        for name, w in prunable(model).items()
    }


def blocks(rows: int, columns: int, model: nn.Module) -> Units:
    units: Units = {}
    for name, weight in prunable(model).items():
        outputs, inputs = weight.shape[:2]
        kernel = weight.numel() // (outputs * inputs)
        units[name] = [
            [
                (name, (o * inputs + i) * kernel + place)
                for o in range(top, top + rows)
                for i in range(left, left + columns)
                for place in range(kernel)
            ]
            for top in range(0, outputs, rows)
            for left in range(0, inputs, columns)
        ]
    return units


def rows_of(name: str, chosen: range, width: int) -> list[Weight]:
    return [(name, row * width + i) for row in chosen for i in range(width)]


def columns_of(name: str, chosen: range, height: int, width: int) -> list[Weight]:
    return [(name, row * width + i) for row in range(height) for i in chosen]


def heads(model: nn.Module) -> Units:
    """Of BERT: hidden size 8 in heads of 2."""
    units: Units = {}
    for number in range(2):
        layer = f"bert.encoder.layer.{number}"
        units[f"{layer}.attention"] = [
            [
                *rows_of(f"{layer}.attention.self.query.weight", own, 8),
                *rows_of(f"{layer}.attention.self.key.weight", own, 8),
                *rows_of(f"{layer}.attention.self.value.weight", own, 8),
                *columns_of(f"{layer}.attention.output.dense.weight", own, 8, 8),
            ]
            for own in (range(2 * head, 2 * head + 2) for head in range(4))
        ]
    return units


def ffns(model: nn.Module) -> Units:
    """Of BERT: 6 units between matrices of hidden size 8."""
    units: Units = {}
    for number in range(2):
        layer = f"bert.encoder.layer.{number}"
        units[f"{layer}.ffn"] = [
            rows_of(f"{layer}.intermediate.dense.weight", range(unit, unit + 1), 8)
            + columns_of(f"{layer}.output.dense.weight", range(unit, unit + 1), 8, 6)
            for unit in range(6)
        ]
    return units


STRUCTURES = {
    "unstructured": Row(net, singles),
    "2:4": Row(net, singles, limit=(2, 4), densities=(0.2, 0.15, 0.1)),
    "2x2": Row(net, partial(blocks, 2, 2)),
    "channel": Row(net, channels),
    "head": Row(bert, heads),
    "ffn": Row(bert, ffns),
    "balanced": Row(net, singles, balanced=True),
}
CRITERIA = ("magnitude", "random", "snip", "grasp", "synflow", "taylor", "movement", "wanda")
ALLOCATIONS = ("global", "uniform", "layerwise", "erk", "erdos_renyi")
ROUNDS = 2  # of SynFlow, for the table


# The oracle


def places(total: int, density: float) -> int:
    return int((Decimal(total) * Decimal(repr(density))).to_integral_value(ROUND_HALF_UP))


GATES: dict[str, Callable[[float], float]] = {
    "snip": abs,  # Michel et al. 2019, equation 2
    "taylor": lambda total: total**2,  # Molchanov et al. 2019, section 3, I^(1)_S
    "movement": lambda total: -total,
}
"""Criterion -> the score of a unit, of the sum over its weights of gradient times weight."""


def pooled(
    units: Units, scores: Mapping[str, list[float]], kept: set[Weight] | None, gate: Callable[[float], float] | None
) -> Scores:
    """The mean over a unit, in which a pruned weight counts as 0; of products of gradient and weight that of a gate."""
    if gate is not None:
        return {
            key: [gate(math.fsum(scores[n][i] for n, i in unit)) for unit in members] for key, members in units.items()
        }
    return {
        key: [
            math.fsum(scores[n][i] for n, i in unit if kept is None or (n, i) in kept) / len(unit) for unit in members
        ]
        for key, members in units.items()
    }


def outputs_of(model: nn.Module, name: str) -> dict[tuple[int, int], list[int]]:
    """(output, place in the kernel) -> flat indices of the weights of its inputs, in order."""
    shape = model.get_parameter(name).shape
    inputs, kernel = shape[1], math.prod(shape[2:])
    return {
        (o, place): [(o * inputs + i) * kernel + place for i in range(inputs)]
        for o in range(shape[0])
        for place in range(kernel)
    }


def candidates(row: Row, scores: Scores, alive: Alive) -> Alive:
    """What may be kept: at most n of every m living neighbours."""
    if row.limit is None:
        return alive
    n, m = row.limit
    chosen = {key: [False] * len(flags) for key, flags in alive.items()}
    for name, flags in chosen.items():
        for line in outputs_of(row.model(), name).values():
            for start in range(0, len(line), m):
                living = [i for i in line[start : start + m] if alive[name][i]]
                for i in sorted(living, key=lambda i: -scores[name][i])[:n]:
                    flags[i] = True
    return chosen


def top(scores: Scores, alive: Alive, k: int) -> Alive:
    """The k highest, ties to the first."""
    order = sorted(
        (-score, number, i, key)
        for number, key in enumerate(scores)
        for i, score in enumerate(scores[key])
        if alive[key][i]
    )
    chosen = {(key, i) for *_, i, key in order[:k]}
    return {key: [(key, i) in chosen for i in range(len(scores[key]))] for key in scores}


def ratio(allocation: str, shapes: list[torch.Size]) -> float:
    """RigL (Evci et al. 2020), section 3 (1), over the matrices that a key has together."""
    size = sum(math.prod(shape) for shape in shapes)
    if allocation == "erk":
        return sum(sum(shape) for shape in shapes) / size
    return sum((shape[0] + shape[1]) * math.prod(shape[2:]) for shape in shapes) / size


def counts(
    row: Row, allocation: str, units: Units, scores: Scores, alive: Alive, density: float
) -> dict[str, int] | None:
    sizes = {key: len(members) for key, members in units.items()}
    room = {key: sum(flags) for key, flags in alive.items()}
    if allocation == "layerwise":
        """Frankle and Carbin 2019, section 2: after n rounds 0.8^n, and 0.9^n of the output layer."""
        slow = 0.9 ** (math.log(density) / math.log(0.8))
        last = list(prunable(row.model()))[-1]  # of BERT the classifier, which heads and units do not cover
        given = {key: max(1, places(size, slow if key == last else density)) for key, size in sizes.items()}
        return given if all(given[key] <= room[key] for key in given) else None
    total = places(sum(sizes.values()), density)
    if allocation == "global":
        """The global top k; below a tenth of its fair part a layer is lifted, and the others compete for the rest."""
        floors = {k: min(room[k], max(1, math.ceil(Decimal("0.1") * places(s, density)))) for k, s in sizes.items()}
        lifted: dict[str, int] = {}
        while True:
            free = {key: flags if key not in lifted else [False] * len(flags) for key, flags in alive.items()}
            found = top(scores, free, total - sum(lifted.values()))
            short = {k: floors[k] for k, flags in found.items() if k not in lifted and sum(flags) < floors[k]}
            if not short:
                return {key: lifted.get(key, sum(flags)) for key, flags in found.items()}
            lifted |= short
    """One place to each, then one after the other to the highest weight / (2 places + 1)."""
    lying = {key: [row.model().get_parameter(n).shape for n in dict(members[0])] for key, members in units.items()}
    if allocation == "uniform":
        weights = {key: float(size) for key, size in sizes.items()}
        room = sizes
    else:
        weights = {key: size * ratio(allocation, lying[key]) for key, size in sizes.items()}
    given = dict.fromkeys(units, 1)
    for _ in range(total - len(given)):
        open_ = [key for key in given if given[key] < room[key]]
        given[max(open_, key=lambda key: weights[key] / (2 * given[key] + 1))] += 1
    return given


def selected(row: Row, scores: Scores, alive: Alive, given: Mapping[str, int]) -> Alive:
    if not row.balanced:
        return {key: top({key: scores[key]}, {key: alive[key]}, given[key])[key] for key in scores}
    chosen = {key: [False] * len(flags) for key, flags in alive.items()}
    for name, flags in chosen.items():
        """Every output takes its best in turn; in the last turn the outputs with the best ones to offer."""
        lines: dict[int, list[int]] = {}
        for (output, _), line in outputs_of(row.model(), name).items():
            lines.setdefault(output, []).extend(line)
        queues = [
            sorted((i for i in line if alive[name][i]), key=lambda i: (-scores[name][i], i)) for line in lines.values()
        ]
        left = given[name]
        while left:
            offered = [queue.pop(0) for queue in queues if queue]
            for i in sorted(offered, key=lambda i: (-scores[name][i], i))[:left]:
                flags[i] = True
            left -= min(left, len(offered))
    return chosen


def expected(
    structure: str,
    allocation: str,
    scores: Mapping[str, Tensor],
    density: float,
    within: set[Weight] | None,
    gate: Callable[[float], float] | None = None,
) -> tuple[set[Weight], dict[str, int]] | None:
    """The weights kept, and the units kept of each key; None if the layers have not as many as they should keep."""
    row = STRUCTURES[structure]
    units = row.units(row.model())
    values = {name: score.flatten().tolist() for name, score in scores.items()}
    worth = pooled(units, values, within, gate)
    alive = {
        key: [within is None or any(weight in within for weight in unit) for unit in members]
        for key, members in units.items()
    }
    alive = candidates(row, worth, alive)
    given = counts(row, allocation, units, worth, alive, density)
    if given is None:
        return None
    chosen = selected(row, worth, alive, given)
    kept = {
        weight
        for key, members in units.items()
        for unit, on in zip(members, chosen[key])
        for weight in unit
        if on and (within is None or weight in within)
    }
    return kept, given


# A combination, level by level


@dataclass(frozen=True)
class Level:
    """What was found at a density, and what was to be.

    Args:
        masks: Found.
        kept: Of each key, units with any weight left, and all of them.
        whole: Whether every unit is kept whole or not at all.
        expected: The oracle's weights.
        places: The oracle's counts.
    """

    density: float
    masks: Masks
    kept: dict[str, tuple[int, int]]
    whole: bool
    expected: set[Weight]
    places: dict[str, int]


def weights_in(masks: Mapping[str, Tensor]) -> set[Weight]:
    return {(name, i) for name, mask in masks.items() for i, on in enumerate(mask.flatten().tolist()) if on}


def levels(criterion: str, structure: str, allocation: str) -> list[Level]:
    """Three levels of a combination, each within the last."""
    row = STRUCTURES[structure]
    model = row.model()
    seen: list[Mapping[str, Tensor]] = []
    units = row.units(model)
    grouped = any(len(unit) > 1 for members in units.values() for unit in members)
    gate = GATES.get(criterion) if grouped else None
    listened = _listened(criteria.CRITERIA[criterion], seen, model, gate is not None)
    pruner = Pruner(listened, structure, allocation, seed=3)
    given = {"loader": data(model), "loss": cross_entropy} if criteria.CRITERIA[criterion].needs_loader else {}
    found: list[Level] = []
    masks: Masks | None = None
    left: set[Weight] | None = None
    share = 1.0
    for density in row.densities:
        seen.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "layer collapse")
            masks = pruner(model, density, masks, **given)
        rounds = 1 if not criteria.CRITERIA[criterion].needs_loader else len(seen)
        scores = seen if rounds == len(seen) else [{name: tensor for part in seen for name, tensor in part.items()}]
        number: dict[str, int] = {}
        for step, score in enumerate(scores, start=1):
            target = density if step == rounds else share * (density / share) ** (step / rounds)
            target = target if row.limit is None else min(target, row.limit[0] / row.limit[1])
            oracle = expected(structure, allocation, score, target, left, gate)
            assert oracle or step < rounds, "a density of the table can be met"
            left, number = oracle or (left, number)
        assert left is not None, "there was a score"
        share = sum(number.values()) / sum(map(len, units.values()))
        weights = weights_in(masks)
        states = {key: [sum(w in weights for w in unit) for unit in members] for key, members in units.items()}
        kept = {key: (sum(map(bool, state)), len(state)) for key, state in states.items()}
        whole = all(n in (0, len(unit)) for key, members in units.items() for n, unit in zip(states[key], members))
        found.append(Level(density, masks, kept, whole, left, number))
    return found


def exact(level: Level, allocation: str) -> bool:
    """Whether it keeps as many units as the density says: of all, or of each key but the output layer's."""
    if allocation == "layerwise":
        inner = [pair for key, pair in level.kept.items() if key != "out.weight"]
        return all(k == max(1, places(n, level.density)) for k, n in inner)
    return sum(k for k, _ in level.kept.values()) == places(sum(n for _, n in level.kept.values()), level.density)


def nested(found: list[Level]) -> bool:
    return all(deep.masks.is_subset(shallow.masks) for shallow, deep in pairwise(found))


def _listened(
    criterion: criteria.Criterion, seen: list[Mapping[str, Tensor]], model: nn.Module, gates: bool
) -> criteria.Criterion:
    """The criterion, of few rounds, whose scores are noted; those of single weights by name.

    Of ``gates`` the products of gradient and weight are noted: minus the movement on the table's only batch.
    """
    if criterion.needs_loader:

        def score(*args: Any, units: Any = None) -> Mapping[str, Tensor]:
            assert (units is not None) == gates
            if gates:
                seen.append({name: -score for name, score in criteria.movement(*args).items()})
                return criterion.score(*args, units=units)
            seen.append(criterion.score(*args))
            return seen[-1]

        return replace(criterion, score=score, rounds=min(criterion.rounds, ROUNDS))
    names = {w.data_ptr(): name for name, w in prunable(model).items()}

    def score_one(weight: Tensor, *args: Any) -> Tensor:
        seen.append({names[weight.data_ptr()]: criterion.score(weight, *args)})
        return seen[-1][names[weight.data_ptr()]]

    return replace(criterion, score=score_one)


# Peers


def by_torch(structure: str, allocation: str, masks: Masks) -> tuple[str, bool] | None:
    """The function of ``torch.nn.utils.prune`` that has the rule, and whether it finds the masks by magnitude, too."""
    if structure not in ("unstructured", "channel") or (structure == "channel" and allocation == "global"):
        return None
    model = Net()
    model.load_state_dict(net().state_dict())
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in masks}
    if structure == "channel":
        rule = "ln_structured"
        for name, module in modules.items():
            peer.ln_structured(module, "weight", int((~masks[name].flatten(1).any(1)).sum()), n=1, dim=0)
    elif allocation == "global":
        rule = "global_unstructured"
        dead = sum(int((~mask).sum()) for mask in masks.values())
        every = [(module, "weight") for module in modules.values()]
        peer.global_unstructured(every, peer.L1Unstructured, amount=dead)
    else:
        rule = "l1_unstructured"
        for name, module in modules.items():
            peer.l1_unstructured(module, "weight", int((~masks[name]).sum()))
    buffers = dict(model.named_buffers())
    return rule, all(torch.equal(buffers[f"{name}_mask"].bool(), mask) for name, mask in masks.items())
