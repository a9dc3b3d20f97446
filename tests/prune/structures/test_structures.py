import math
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prune.masks import Masks
from prune.pruner import Pruner, prunable
from prune.structures import FFN, NM, STRUCTURES, Balanced, Block, Channel, Head, Unstructured, structure_named
from prune.structures.weights import best_of_rows
from tests.helpers.ranks import on_ranks


class Conv1D(nn.Module):
    """As transformers has it: inputs first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS = {
    "linear": (lambda: nn.Linear(8, 12, bias=False), (8,)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, bias=False), (8, 5)),
    "conv2d": (lambda: nn.Conv2d(8, 4, (3, 2), bias=False), (8, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, bias=False), (4, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2, bias=False), (8, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose1d(8, 6, 3, bias=False), (8, 4)),
    "transposed and grouped": (lambda: nn.ConvTranspose2d(8, 12, 2, groups=2, bias=False), (8, 3, 3)),
    "Conv1D of transformers": (lambda: Conv1D(8, 12), (8,)),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param][0]()


def wiring(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of every weight: the output that depends on it, the input it reads (in its group), its place in the kernel.

    Found by differentiating; the place is what is left when output and input are known.
    """
    shape = next(shape for make, shape in LAYERS.values() if same(make(), layer))
    size = layer.weight.shape
    image = torch.rand(1, *shape) + 0.5
    axis = image.dim() - 1 if image.dim() == 2 else 1
    result = layer(image)
    writes, reads = torch.full(size, -1), torch.full(size, -1)
    for output in range(result.shape[axis]):
        (grad,) = torch.autograd.grad(result.select(axis, output).sum(), layer.weight, retain_graph=True)
        writes[grad != 0] = output
    for number in range(shape[0]):
        one = torch.zeros_like(image)
        one.select(axis, number).copy_(image.select(axis, number))
        (grad,) = torch.autograd.grad(layer(one).sum(), layer.weight)
        reads[grad != 0] = number % (shape[0] // getattr(layer, "groups", 1))
    kernel = size[2:].numel() if len(size) > 2 else 1
    return writes, reads, (torch.arange(layer.weight.numel()) % kernel).view(size)


def same(a: Any, b: Any) -> bool:
    return (
        type(a) is type(b) and a.weight.shape == b.weight.shape and getattr(a, "groups", 1) == getattr(b, "groups", 1)
    )


def keep(structure: Any, model: Any, density: float, within: Masks | None = None, **given: Any) -> Masks:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer collapse")
        return Pruner("magnitude", structure, "global", **given)(model, density, within)


# Outputs and inputs, of any layer


def test_wiring_finds_outputs_and_inputs() -> None:
    writes, reads, place = wiring(nn.Linear(8, 12, bias=False))
    assert torch.equal(writes, torch.arange(12)[:, None].expand(12, 8))
    assert torch.equal(reads, torch.arange(8)[None].expand(12, 8))
    assert not place.any()


def test_a_channel_is_what_an_output_depends_on(layer: Any) -> None:
    [[(key, index)]] = Channel().layout(layer, prunable(layer)).members.values()
    assert key == "weight"
    assert index is not None
    assert torch.equal(index.expand(layer.weight.shape), wiring(layer)[0])


def test_a_block_is_so_many_outputs_by_inputs(layer: Any) -> None:
    [[(_, index)]] = Block(2, 4).layout(layer, prunable(layer)).members.values()
    assert index is not None
    writes, reads, _ = wiring(layer)
    units, rows, columns = (t.flatten().tolist() for t in (index.expand(layer.weight.shape), writes // 2, reads // 4))
    found = set(zip(units, rows, columns))
    assert {unit for unit, _, _ in found} == set(range(len(found)))
    assert len({(row, column) for _, row, column in found}) == len(found)


@pytest.mark.parametrize("density", [0.5, 0.3])
def test_n_of_m_neighbouring_inputs_are_the_largest(layer: Any, density: float) -> None:
    """Zhou et al. 2021, equation 1, in loops over weights found by what they read."""
    mask = keep("2:4", layer, density)["weight"]
    writes, reads, place = (t.flatten().tolist() for t in wiring(layer))
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i, (output, number, where) in enumerate(zip(writes, reads, place)):
        groups.setdefault((output, where, number // 4), []).append(i)
    assert all(len(group) == 4 for group in groups.values())
    size = layer.weight.detach().abs().flatten().tolist()
    best = {i for group in groups.values() for i in sorted(group, key=lambda i: -size[i])[:2]}
    chosen = sorted(best, key=lambda i: -size[i])[: int(mask.sum())]
    assert set(mask.flatten().nonzero().flatten().tolist()) == set(chosen)
    assert int(mask.sum()) == math.floor(len(size) * Fraction(str(density)) + Fraction(1, 2))


@pytest.mark.parametrize("density", [0.9, 0.5, 0.26])
def test_balanced_outputs_keep_equally_many(layer: Any, density: float) -> None:
    mask = keep("balanced", layer, density)["weight"]
    writes = wiring(layer)[0]
    size = layer.weight.detach().abs()
    counts = [int(mask[writes == output].sum()) for output in writes.unique()]
    assert max(counts) - min(counts) <= 1
    for output in writes.unique():
        kept, gone = size[(writes == output) & mask], size[(writes == output) & ~mask]
        assert not len(gone) or kept.min() >= gone.max()


def test_balanced_is_the_rule_of_wanda() -> None:
    """The published code sorts each output's metric and prunes the first int(inputs * ratio) of them."""
    layer = nn.Linear(20, 7)
    metric = torch.rand(7, 20)
    pruned = torch.zeros(7, 20, dtype=torch.bool).scatter_(1, metric.sort(stable=True)[1][:, : int(20 * 0.6)], True)
    masks = Pruner("wanda", "balanced", "uniform")(layer, 0.4, scores={"weight": metric})
    assert torch.equal(masks["weight"], ~pruned)


def test_an_output_with_few_left_keeps_them_all() -> None:
    layer = nn.Linear(6, 3)
    within = torch.ones(3, 6, dtype=torch.bool)
    within[1, 1:] = False
    assert Pruner("magnitude", "balanced")(layer, 0.5, Masks({"weight": within}))["weight"].sum(1).tolist() == [4, 1, 4]


def test_two_of_four_are_those_of_torch() -> None:
    from torch.ao.pruning import WeightNormSparsifier

    model: Any = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    ours = keep("2:4", model, 0.5)
    peer = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    peer.prepare(model, [{"tensor_fqn": name} for name in ours])
    peer.step()
    for name, mask in ours.items():
        assert torch.equal(
            model.get_submodule(name.removesuffix(".weight")).parametrizations.weight[0].mask.bool(), mask
        )


def test_filters_by_their_l2_norm_are_those_of_torch() -> None:
    from torch.nn.utils import prune as peer

    model: Any = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Linear(6, 20))
    squares = {name: weight.detach().square() for name, weight in prunable(model).items()}
    ours = Pruner("magnitude", "channel", "uniform")(model, 0.3, scores=squares)
    for layer, mask in zip(model, ours.values()):
        peer.ln_structured(layer, "weight", 0.7, n=2, dim=0)
        assert torch.equal(layer.weight_mask.bool(), mask)


def test_ties_go_to_the_first() -> None:
    layer = nn.Linear(4, 4)
    nn.init.ones_(layer.weight)
    assert keep("channel", layer, 0.5)["weight"][:, 0].tolist() == [True, True, False, False]
    assert keep("2:4", layer, 0.5)["weight"].tolist() == [[True, True, False, False]] * 4
    assert keep("2x2", layer, 0.5)["weight"].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert keep("balanced", layer, 0.3)["weight"].int().tolist() == [[1, 1, 0, 0], *[[1, 0, 0, 0]] * 3]


values = st.sampled_from([0.0, 1.0, 2.0, -1.0, math.inf, -math.inf, math.nan])


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(values, st.booleans()), min_size=5, max_size=5), min_size=1, max_size=3))
def test_the_best_of_rows_are_those_of_a_stable_sort(rows: list[list[tuple[float, bool]]]) -> None:
    """Whatever is not alive is never among them, NaN included."""
    rows = [[(0.0 if alive and math.isnan(value) else value, alive) for value, alive in row] for row in rows]
    scores, alive = (torch.tensor([[pair[i] for pair in row] for row in rows]) for i in (0, 1))
    for k in range(6):
        best, following = best_of_rows(scores.float(), alive, k)
        for row, *found in zip(rows, best.tolist(), following.tolist()):
            living = [i for _, i in sorted((-value, i) for i, (value, on) in enumerate(row) if on)]
            assert [[i for i, on in enumerate(flags) if on] for flags in found] == [
                sorted(living[:k]),
                living[k : k + 1],
            ]


def test_balanced_refuses_scores_without_an_order() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    scores = {"0.weight": torch.full((3, 4), math.nan)}
    with pytest.raises(ValueError, match=r"12 of 12 scores of '0\.weight' are NaN"):
        Pruner(structure="balanced")(model, 0.5, scores=scores)


# Names, and what cannot be


def test_structures_by_name() -> None:
    assert structure_named("1:3") == NM(1, 3)
    assert structure_named("4x4") == structure_named("block4x4") == Block(4, 4)
    assert {name: structure_named(name) for name in STRUCTURES} == {
        "unstructured": Unstructured(),
        "channel": Channel(),
        "head": Head(),
        "ffn": FFN(),
        "balanced": Balanced(),
    }
    for name, remedy in {"block": r"Block\(rows, columns\), or 4x4", "coupled": "Coupled"}.items():
        with pytest.raises(ValueError, match=f"'{name}' needs arguments: give {remedy}"):
            structure_named(name)
    for name, near in {"chanel": "channel", "2;4": "2:4", "heads": "head", "2:4:8": "2:4"}.items():
        with pytest.raises(ValueError, match=f"unknown structure '{name}'; did you mean '{near}'"):
            Pruner(structure=name)
    with pytest.raises(ValueError, match="4:4 is no N:M structure"):
        structure_named("4:4")
    with pytest.raises(ValueError, match="0 x 4 is empty"):
        structure_named("0x4")


def test_layers_that_cannot_be_divided_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.raises(
        ValueError, match=r"2:4 needs inputs in groups of 4, .*\{'0.weight': 3, '2.weight': 6\}; exclude"
    ):
        Pruner(structure="2:4")(model, 0.5)
    assert Pruner(structure="2:4", exclude=["0.*", "2.*"])(model, 0.5).counts() == {"1.weight": (24, 48)}
    with pytest.raises(
        ValueError, match=r"blocks of 4 outputs x 2 inputs do not .*\{'0.weight': \(8, 3\), '1.weight': \(6, 8\)\}"
    ):
        Pruner(structure="4x2")(model, 0.5)


@pytest.mark.parametrize("name", ["2:4", "1:3", "5:7"])
def test_density_above_what_n_of_m_allows(name: str) -> None:
    n, m = map(int, name.split(":"))
    model = nn.Sequential(nn.Linear(84, 10), nn.Linear(21 * 4, 3))
    masks = keep(name, model, n / m)
    assert masks.density == pytest.approx(n / m)
    assert keep(name, model, 1.0).density == 1.0
    with pytest.raises(ValueError, match=rf"density 0\.75 is above the .* that NM\(n={n}, m={m}\) allows"):
        keep(name, model, 0.75)


# Weights on several ranks


def sharded(structure: str) -> list[Any]:
    """Hashes of masks of a plain network, and of one whose weights are divided over the ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model: Any = nn.Sequential(nn.Linear(8, 9), nn.Linear(8, 4))
    found = [keep(structure, model, 0.4).hash()]
    for layer, axis in zip(model, (0, 1)):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(axis)]))
    masks = keep(structure, model, 0.4)
    assert all(type(mask) is Tensor for mask in masks.values())
    bad = next(iter(model)).weight.to_local()
    if dist.get_rank() == 0:
        bad.data[0, 0] = math.nan
    try:
        keep(structure, model, 0.4)
    except ValueError as error:
        found.append(str(error))
    return [*found, masks.hash()]


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "channel", "balanced"])
def test_a_sharded_network_is_pruned_like_a_whole_one(structure: str) -> None:
    torch.manual_seed(0)
    first, second = on_ranks(sharded, structure)
    assert first == second
    assert first[0] == first[2]
    assert first[1].startswith("'0.weight' has 1 NaN or infinite values of 72")
