import ast
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prune.structures
from prune.allocation import ALLOCATIONS, Global, Layers, LayerwiseAsPaper, Uniform
from prune.criteria import CRITERIA, Criterion
from prune.masks import Masks
from prune.pruner import Pruner, prunable
from prune.schedule import geometric, kept
from prune.structures import NM, Unstructured, structure_named
from prune.topk import keep_top_k
from tests.helpers import pruning_table
from tests.helpers.prunable_models import Small, mlp, quiet
from tests.helpers.ranks import on_ranks


def test_the_promised_call():
    model = mlp(20, 30, 10)
    masks = Pruner(criterion="magnitude", structure="unstructured", allocation="global")(model, density=0.5)
    assert isinstance(masks, Masks)
    assert masks.density == 0.5


def test_agrees_with_a_sort_of_all_weights():
    model = mlp(20, 30, 10)
    masks = Pruner()(model, 0.3)
    ranked = sorted(
        (-abs(value), name, index)
        for name in ("0.weight", "1.weight")
        for index, value in enumerate(model.get_parameter(name).flatten().tolist())
    )
    expected = {(name, index) for _, name, index in ranked[: kept(900, 0.3)]}
    found = {(n, i) for n, m in masks.items() for i, on in enumerate(m.flatten().tolist()) if on}
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("density", [0.001, 0.25, 0.5, 0.999])
def test_exactly_k_in_any_precision(dtype: torch.dtype, density: float):
    """Pitfall 5."""
    model = mlp(100, 100, 50).to(dtype)
    masks = quiet(Pruner(), model, density)
    assert sum(count for count, _ in masks.counts().values()) == kept(15_000, density)


def test_equal_weights_are_kept_by_index():
    """Pitfall 5: of 8 tied weights, half are kept, the first ones."""
    model = nn.Linear(4, 2)
    nn.init.constant_(model.weight, -0.5)
    assert Pruner()(model, 0.5)["weight"].tolist() == [[True] * 4, [False] * 4]


def test_the_model_is_left_as_it_is():
    model = Small()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    quiet(Pruner(), model, 0.2)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# Levels


@settings(deadline=None, max_examples=18)
@given(st.integers(0, 100), st.floats(0.05, 0.55))
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_levels_are_nested_and_counted_from_the_original(criterion: str, allocation: str, seed: int, rate: float):
    model = mlp(5, 7, 6, 3)
    spec = LayerwiseAsPaper(rate=rate) if allocation == "layerwise" else allocation
    pruner = Pruner(criterion, allocation=spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    within = None
    for density in geometric(rate, 4)[1:]:
        for parameter in model.parameters():  # as if trained: pruned weights would win if they were looked at
            parameter.data = torch.randn(parameter.shape, generator=generator)
        if within is not None:
            for name, mask in within.items():
                model.get_parameter(name).data[~mask] = 100.0
        masks = quiet(pruner, model, density, within)
        if allocation == "layerwise":
            expected = [(kept(n, density), n) for _, n in list(masks.counts().values())[:-1]]
            assert list(masks.counts().values())[:-1] == expected
        else:
            assert sum(count for count, _ in masks.counts().values()) == kept(95, density)
        assert within is None or masks.is_subset(within)
        within = masks


def test_density_one_keeps_everything_that_is_left():
    model = mlp(6, 5, 4)
    assert Pruner()(model, 1.0) == Masks.ones(prunable(model))
    half = Pruner()(model, 0.5)
    assert Pruner(allocation="uniform")(model, 1, within=half) == half


def test_pruned_weights_never_come_back():
    model = mlp(6, 5, 4)
    half = Pruner()(model, 0.5)
    assert Pruner()(model, 0.5, within=half) == half
    with pytest.raises(ValueError, match="what is pruned never comes back"):
        Pruner()(model, 0.6, within=half)


def test_within_must_be_for_the_same_parameters():
    model = mlp(6, 5, 4)
    for density in (1.0, 0.5):
        with pytest.raises(ValueError, match=r"differ in \['1.weight'\]"):
            Pruner()(model, density, within=Pruner(exclude="1.*")(model, 1.0))
        with pytest.raises(ValueError, match=r"'0.weight' of shape \(5, 7\), the weight \(5, 6\)"):
            Pruner()(model, density, within=Masks.ones(prunable(mlp(7, 5, 4))))


@pytest.mark.parametrize("density", [0, -1, 1.01, math.nan])
def test_density_out_of_range(density: float):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Pruner()(mlp(3, 3), density)


def test_a_density_that_keeps_nothing():
    with pytest.raises(ValueError, match="keeps none of 9"):
        Pruner()(mlp(3, 3), 0.01)


def test_layer_collapse_is_prevented_and_reported():
    """Pitfall 7: at 80% global, a layer scaled down keeps nothing without a floor."""
    model = mlp(30, 30, 30, 30)
    model[1].weight.data *= 0.01
    with pytest.warns(UserWarning, match=r"layer collapse: '1\.weight' would have kept 0 of 900; it keeps 18"):
        masks = Pruner()(model, 0.2)
    assert masks.counts()["1.weight"] == (18, 900)
    assert sum(count for count, _ in masks.counts().values()) == 540


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_warning_points_at_the_call(allocation: str):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(20, 20))
    nn.init.zeros_(model[0].weight)  # pyright: ignore[reportArgumentType]
    with pytest.warns(UserWarning, match="layer collapse: '0.weight'") as caught:
        Pruner(allocation=allocation)(model, 0.02)
    assert {w.filename for w in caught} == {__file__}


# Every criterion x structure x allocation


@pytest.mark.parametrize("allocation", pruning_table.ALLOCATIONS)
@pytest.mark.parametrize("structure", pruning_table.STRUCTURES)
@pytest.mark.parametrize("criterion", pruning_table.CRITERIA)
@pytest.mark.filterwarnings("ignore:.*matrices that stay dense.* not covered by")  # by heads or by feed-forward units
def test_every_combination(criterion: str, structure: str, allocation: str):
    """Exactly k units, whole ones, nested over three levels, those of an oracle in loops; and of torch by magnitude."""
    found = pruning_table.levels(criterion, structure, allocation)
    assert len(found) == 3
    for level in found:
        assert pruning_table.exact(level, allocation)
        assert level.whole
        assert pruning_table.weights_in(level.masks) == level.expected
        assert {key: kept for key, (kept, _) in level.kept.items()} == level.places
    assert pruning_table.nested(found)
    if criterion == "magnitude":
        peer = pruning_table.by_torch(structure, allocation, found[0].masks)
        assert peer is None or peer[1]


@pytest.mark.parametrize("group", ["sum", "mean", None])
def test_a_unit_of_magnitudes_has_their_sum_or_their_mean(group: Any):
    """Over layers of unlike widths they are of unlike order: by sums the wide rows are kept."""
    model = nn.Sequential(nn.Linear(20, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.constant_(model[0].weight, 0.1)
    nn.init.constant_(model[1].weight, 0.2)
    masks = Pruner(structure="channel", allocation=Global(floor=1), group=group)
    kept = {name: int(mask.any(1).sum()) for name, mask in quiet(masks, model, 0.5).items()}
    assert kept == ({"0.weight": 3, "1.weight": 1} if group == "sum" else {"0.weight": 1, "1.weight": 3})


def test_scores_of_ones_own_are_pooled_and_unit_scores_are_taken_as_they_are():
    model = nn.Linear(2, 3, bias=False)
    scores = {"weight": torch.tensor([[9.0, -9.0], [1.0, 1.0], [2.0, 2.0]])}
    pruner = Pruner("taylor", "channel")
    assert pruner(model, 1 / 3, scores=scores)["weight"].any(1).tolist() == [False, False, True]
    units = {"weight": torch.tensor([1.0, 3.0, 2.0])}
    assert pruner(model, 1 / 3, unit_scores=units)["weight"].any(1).tolist() == [False, True, False]
    assert pruner.gates(model) is not None
    assert Pruner("taylor").gates(model) is Pruner("taylor", "channel", group="mean").gates(model) is None
    assert Pruner("magnitude", "channel", group="sum").gates(model) is None
    for wrong in ({}, {"weight": torch.ones(2)}, {"weight": torch.ones(3), "x": torch.ones(1)}):
        with pytest.raises(ValueError, match=r"`unit_scores` are of .*weight.: 3"):
            pruner(model, 1 / 3, unit_scores=wrong)


def test_a_group_is_one_of_two():
    with pytest.raises(ValueError, match=r"group is 'max': give one of \['mean', 'sum'\], or None"):
        Pruner(group="max")  # type: ignore[arg-type]


def test_no_row_is_missing_from_the_table():
    assert set(pruning_table.CRITERIA) == set(CRITERIA)
    assert set(pruning_table.ALLOCATIONS) == set(ALLOCATIONS)
    rows = {type(structure_named(name)).__name__ for name in pruning_table.STRUCTURES}
    folder = Path(prune.structures.__file__).parent
    classes = {
        node.name
        for file in folder.glob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and any(getattr(part, "name", "") == "layout" for part in node.body)
    }
    assert rows == classes - {"Structure", "Coupled"}, "Coupled, which needs inputs, has tests of its own"


def test_a_level_without_its_oracle_fails_the_table(monkeypatch: pytest.MonkeyPatch):
    """The table can fail: with an allocation that keeps one unit too many, it does."""

    def greedy(self: Uniform, layers: Layers) -> dict[str, int]:
        counts = original(self, layers)
        return counts | {"conv.weight": counts["conv.weight"] + 1}

    original = Uniform.__call__
    monkeypatch.setattr(Uniform, "__call__", greedy)
    level = pruning_table.levels("magnitude", "unstructured", "uniform")[0]
    assert not pruning_table.exact(level, "uniform")
    assert pruning_table.weights_in(level.masks) != level.expected


# Criteria that look at data


def test_what_a_criterion_needs_is_asked_for():
    model, batch = mlp(4, 4), [torch.ones(1, 4)]
    with pytest.raises(ValueError, match=r"'snip' looks at data: .* loader=, .* loss=, .*; or with scores="):
        Pruner("snip")(model, 0.5)
    with pytest.raises(ValueError, match=r"'snip' looks at data: call the pruner with loss=, a function"):
        Pruner("snip")(model, 0.5, loader=batch)
    with pytest.raises(
        ValueError, match=r"'wanda' looks at data: call the pruner with loader=, an iterable of batches;"
    ):
        Pruner("wanda")(model, 0.5)
    with pytest.raises(ValueError, match="'synflow' reads the loader 100 times, and an iterator can be read once"):
        Pruner("synflow")(model, 0.5, loader=iter(batch))
    with pytest.raises(ValueError, match="the loader is empty"):
        Pruner("wanda")(model, 0.5, loader=[])
    assert Pruner("snip")(model, 1.0) == Masks.ones(prunable(model))


def test_scores_of_ones_own_take_the_place_of_the_criterion():
    model = mlp(4, 4, 2)
    scores = {name: torch.rand_like(weight) for name, weight in prunable(model).items()}
    found = Pruner("snip", allocation=Global(floor=0))(model, 0.5, scores=scores | {"other": torch.ones(1)})
    assert {n: m.tolist() for n, m in found.items()} == {n: m.tolist() for n, m in keep_top_k(scores, 12).items()}
    with pytest.raises(ValueError, match=r"`scores` and this pruner differ in \['1.weight'\]"):
        Pruner("snip")(model, 0.5, scores={"0.weight": scores["0.weight"]})
    with pytest.raises(ValueError, match=r"`scores` has '0.weight' of shape \(2, 4\), the weight \(4, 4\)"):
        Pruner("snip")(model, 0.5, scores=scores | {"0.weight": torch.ones(2, 4)})
    with pytest.raises(ValueError, match=r"scores of '1\.weight' are NaN"):
        Pruner()(model, 0.5, scores=scores | {"1.weight": torch.full((2, 4), math.nan)})


def test_frozen_weights_are_pruned_unless_the_loss_must_reach_them():
    model = mlp(4, 4, 2)
    model[0].weight.requires_grad_(False)
    batch = [torch.rand(3, 4)]
    assert len(Pruner()(model, 0.5)) == len(Pruner("wanda")(model, 0.5, loader=batch)) == 2
    with pytest.raises(ValueError, match=r"'0\.weight' are frozen"):
        Pruner("snip")(model, 0.5, loader=batch, loss=lambda net, x: net(x).sum())
    assert list(Pruner("snip", exclude="0.*")(model, 0.5, loader=batch, loss=lambda net, x: net(x).sum())) == [
        "1.weight"
    ]


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("fails", [False, True])
def test_rounds_see_what_is_left_and_leave_the_model_as_it_was(fails: bool):
    """Tanaka et al. 2020, algorithm 1: density^(k/n) after round k; from within's density, if there is one."""
    model = mlp(10, 10, 10)
    seen: list[float] = []

    def score(net: nn.Module, weights: Any, loader: Any) -> dict[str, Tensor]:
        seen.append(sum(int((w != 0).sum()) for w in weights.values()) / 200)
        if fails and len(seen) == 3:
            raise KeyboardInterrupt
        return {name: weight.detach().abs() for name, weight in weights.items()}

    pruner = Pruner(Criterion("listening", score, needs_loader=True, rounds=4), allocation=Global(floor=0))
    before = state_of(model)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            pruner(model, 0.0625, loader=[1])
    else:
        masks = pruner(model, 0.0625, loader=[1])
        assert seen == [1.0, 0.5, 0.25, 0.125]
        assert masks == Pruner(allocation=Global(floor=0))(model, 0.0625)
        seen.clear()
        half = Pruner(allocation=Global(floor=0))(model, 0.5)
        assert pruner(model, 0.03125, half, loader=[1]) == Pruner(allocation=Global(floor=0))(model, 0.03125)
        assert seen == [0.5, 0.25, 0.125, 0.065]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_synflow_in_rounds_cuts_no_layer_off():
    """Tanaka et al. 2020, theorem 3; in one shot the widest layer loses everything at this density."""
    model = mlp(8, 8, 64, 64, 8, 4)
    pruner, batch = Pruner("synflow", allocation=Global(floor=0)), [torch.ones(1, 8)]
    masks = pruner(model, 0.008, loader=batch)
    assert min(kept for kept, _ in masks.counts().values()) > 0
    once = replace(CRITERIA["synflow"], rounds=1)
    with pytest.warns(UserWarning, match="keeps none"):
        Pruner(once, allocation=Global(floor=0))(model, 0.008, loader=batch)


def on_each_rank(make: Any) -> list[Any]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = mlp(6, 6, 3)
    pruner, given = make(rank)
    return [pruner(model, 0.4, **given).hash(), pruner(model, 0.2, pruner(model, 0.4, **given), **given).hash()]


def deciding_alone(rank: int) -> Any:
    """Scores that differ by rank, as data do."""

    def score(model: nn.Module, weights: Any, loader: Any) -> dict[str, Tensor]:
        chance = torch.Generator().manual_seed(rank)
        return {name: torch.rand(weight.shape, generator=chance) for name, weight in weights.items()}

    return Pruner(Criterion("alone", score, needs_loader=True, rounds=2)), {"loader": [0]}


def with_scores(rank: int) -> Any:
    chance = torch.Generator().manual_seed(rank)
    shapes = {name: weight.shape for name, weight in prunable(mlp(6, 6, 3)).items()}
    return Pruner(), {"scores": {name: torch.rand(shape, generator=chance) for name, shape in shapes.items()}}


def with_loader(rank: int) -> Any:
    return Pruner("wanda"), {"loader": [torch.rand(2, 6, generator=torch.Generator().manual_seed(rank))]}


@pytest.mark.parametrize("make", [deciding_alone, with_scores])
def test_rank_0_decides(make: Any):
    """Pitfall 9: random or data-dependent scores differ per rank."""
    pruner, given = make(0)
    model = mlp(6, 6, 3)
    alone = pruner(model, 0.4, **given)
    expected = [alone.hash(), pruner(model, 0.2, alone, **given).hash()]
    assert on_ranks(on_each_rank, make) == [expected, expected]


def test_every_rank_has_its_say_where_statistics_are_averaged():
    """Each rank has a batch of its own; one process that has both finds the same."""
    pruner = Pruner("wanda")
    loader = with_loader(0)[1]["loader"] + with_loader(1)[1]["loader"]
    first = pruner(mlp(6, 6, 3), 0.4, loader=loader)
    expected = [first.hash(), pruner(mlp(6, 6, 3), 0.2, first, loader=loader).hash()]
    assert on_ranks(on_each_rank, with_loader) == [expected, expected]


# Names and instances


def test_instances_do_what_their_names_do():
    model = mlp(8, 8, 8)
    named = Pruner("magnitude", "unstructured", "uniform")(model, 0.3)
    assert Pruner(CRITERIA["magnitude"], Unstructured(), Uniform())(model, 0.3) == named
    assert Pruner(allocation=Global(floor=0))(model, 0.3) == Pruner()(model, 0.3)


def test_a_criterion_of_ones_own():
    def smallest(weight: Tensor) -> Tensor:
        return -weight.abs()

    model = mlp(8, 8)
    small = Pruner(Criterion("smallest", smallest))(model, 0.5)
    assert not (small & Pruner()(model, 0.5))["0.weight"].any()
    bad = Criterion("nan", lambda weight: weight * math.nan)
    with pytest.raises(ValueError, match=r"scores of '0\.weight' are NaN"):
        Pruner(bad)(model, 0.5)


@pytest.mark.parametrize(
    ("axis", "given_", "meant"),
    [
        ("criterion", "magnitud", "magnitude"),
        ("structure", "Unstructured", "unstructured"),
        ("allocation", "layer-wise", "layerwise"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(axis: str, given_: str, meant: str):
    with pytest.raises(ValueError, match=f"unknown {axis} '{given_}'; did you mean '{meant}'"):
        Pruner(**{axis: given_})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "axis", [{"criterion": abs}, {"criterion": Criterion}, {"structure": 3}, {"allocation": Global}], ids=str
)
def test_neither_a_name_nor_an_instance(axis: dict[str, Any]):
    with pytest.raises(TypeError, match="or an instance"):
        Pruner(**axis)


def test_repr_shows_every_choice():
    shown = repr(Pruner("random", allocation=Global(floor=2), exclude="head.*", seed=5))
    assert "criterion='random'" in shown
    assert "allocation=Global(floor=2)" in shown
    assert "exclude=('head.*',)" in shown
    assert "seed=5" in shown


def test_fields_keep_what_was_given_and_axes_are_objects():
    pruner = replace(Pruner("snip", "2:4", include=["0.*"]), allocation=Global(floor=2), seed=3)
    assert (pruner.criterion, pruner.structure, pruner.include, pruner.seed) == ("snip", "2:4", ("0.*",), 3)
    assert pruner.axes == (CRITERIA["snip"], NM(2, 4), Global(floor=2))
    assert pruner == Pruner("snip", "2:4", Global(floor=2), "0.*", seed=3)


def test_coupled_by_name_needs_inputs_to_trace_with():
    """The job `hunt` has them and replaces the name; a call has not."""
    pruner = Pruner(structure="coupled")
    with pytest.raises(ValueError, match=r"give Coupled\(example_inputs\)"):
        pruner(mlp(4, 4), 0.5)


# Random pruning, the control


def test_random_depends_on_the_seed_and_the_names_only():
    """Pitfall 12: the random-mask control can be drawn again from its seed."""
    model, trained = mlp(9, 9, 9), mlp(9, 9, 9)
    trained[0].weight.data.mul_(7)
    masks = Pruner("random", seed=1)(model, 0.4)
    torch.rand(3)
    assert masks.hash() == Pruner("random", seed=1)(trained, 0.4).hash()
    assert masks != Pruner("random", seed=2)(model, 0.4)
    assert not torch.equal(masks["0.weight"], masks["1.weight"])
    assert masks.density == kept(162, 0.4) / 162
    alone = Pruner("random", seed=1, allocation="uniform", exclude="0.*")(model, 0.4)
    both = Pruner("random", seed=1, allocation="uniform")(model, 0.4)
    assert torch.equal(alone["1.weight"], both["1.weight"])


def test_another_process_draws_the_same_and_needs_torch_only():
    code = """if True:
        import sys, torch
        from prune.pruner import Pruner
        heavy = [m for m in ("lightning", "transformers", "datasets", "torchmetrics", "scipy") if m in sys.modules]
        print(heavy, Pruner("random", seed=3)(torch.nn.Linear(9, 5), 0.4).hash())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", Pruner("random", seed=3)(nn.Linear(9, 5), 0.4).hash()]
