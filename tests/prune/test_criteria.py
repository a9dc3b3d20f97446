import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from prune.criteria import CRITERIA, Criterion, magnitude, random, seeded
from prune.selection import keep_top_k
from tests.together import together

WITH_DATA = [criterion for criterion in CRITERIA.values() if criterion.needs_loader]
WITH_LOSS = [criterion for criterion in WITH_DATA if criterion.needs_loss]
ONLINE = [criterion for criterion in WITH_LOSS if criterion.online]
EPSILON = 1e-5


def named(criteria: Iterable[Criterion]) -> Any:
    return pytest.mark.parametrize("criterion", list(criteria), ids=lambda criterion: criterion.name)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def scored(
    criterion: Criterion, model: nn.Module, loader: Iterable[Any], loss: Any = cross_entropy
) -> dict[str, Tensor]:
    return criterion.score(model, matrices(model), loader, *([loss] if criterion.needs_loss else []))


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def points(count: int, seed: int = 1, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, generator=noise).double(), torch.randint(2, (size,), generator=noise))
        for _ in range(count)
    ]


def image_net() -> nn.Module:
    """Everything that a forward in training mode changes: statistics of a batch norm, random state of a dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Flatten(), nn.Linear(64, 3)),
    )


def images(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(2)
    return [(torch.randn(size, 2, 4, 4, generator=noise), torch.arange(size) % 3) for _ in range(count)]


# Without data


def test_magnitude_is_the_absolute_value():
    assert magnitude(torch.tensor([[-2.0, 0.5], [-0.0, 3.0]])).tolist() == [[2.0, 0.5], [0.0, 3.0]]


def test_random_depends_on_seed_and_name_and_nothing_else():
    weight = torch.zeros(50)
    first = random(weight, seeded(1, "a.weight"))
    torch.rand(7)  # the global generator plays no part
    random(weight, seeded(1, "b.weight"))  # nor do other parameters
    assert torch.equal(first, random(weight + 5, seeded(1, "a.weight")))
    assert not torch.equal(first, random(weight, seeded(2, "a.weight")))
    assert not torch.equal(first, random(weight, seeded(1, "b.weight")))
    assert bool(((first >= 0) & (first < 1)).all())


def test_the_table_says_what_is_needed():
    assert list(CRITERIA) == ["magnitude", "random", "snip", "grasp", "synflow", "taylor", "movement", "wanda"]
    assert [name for name, c in CRITERIA.items() if c.needs_generator] == ["random"]
    assert [c.name for c in WITH_DATA] == ["snip", "grasp", "synflow", "taylor", "movement", "wanda"]
    assert [c.name for c in WITH_LOSS] == ["snip", "grasp", "taylor", "movement"]
    assert [c.name for c in ONLINE] == ["snip", "taylor", "movement"]
    assert {name: c.rounds for name, c in CRITERIA.items() if c.rounds != 1} == {"synflow": 100}


# The papers' equations, one weight at a time


def each_weight(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, weight in matrices(model).items():
        for place in itertools.product(*map(range, weight.shape)):
            yield name, place


@torch.no_grad()
def with_weight(model: nn.Module, name: str, place: tuple[int, ...], scale: float, value: Callable[[], float]) -> float:
    """``value()`` while one weight is multiplied by ``scale``."""
    weight = model.get_parameter(name)
    before = weight[place].item()
    weight[place] = before * scale
    try:
        with torch.enable_grad():
            return value()
    finally:
        weight[place] = before


def slope(model: nn.Module, name: str, place: tuple[int, ...], value: Callable[[], float]) -> float:
    """The derivative of ``value`` by the connection c of the weight c * w, at c = 1, by central differences."""
    above = with_weight(model, name, place, 1 + EPSILON, value)
    return (above - with_weight(model, name, place, 1 - EPSILON, value)) / (2 * EPSILON)


def mean_loss(model: nn.Module, batches: list[Any]) -> float:
    return sum(cross_entropy(model, batch).item() for batch in batches) / len(batches)


def test_snip_is_the_sensitivity_to_the_connection():
    """Lee et al., equation 4: |dL(c * w) / dc| at c = 1, over all data; without the normalisation of equation 5."""
    model, batches = small(), points(3)
    scores = scored(CRITERIA["snip"], model, batches)
    for name, place in each_weight(model):
        expected = abs(slope(model, name, place, lambda: mean_loss(model, batches)))
        assert scores[name][place].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_taylor_is_the_mean_square_and_movement_minus_the_mean():
    """Molchanov et al., I^(1)_m = (g_m w_m)^2, mean over minibatches; Sanh et al., Table 1: -sum_t g_t w_t."""
    model, batches = small(), points(3)
    taylor, movement = (scored(CRITERIA[name], model, batches) for name in ("taylor", "movement"))
    for name, place in each_weight(model):
        slopes = [slope(model, name, place, lambda: cross_entropy(model, each).item()) for each in batches]  # noqa: B023
        assert taylor[name][place].item() == pytest.approx(sum(s * s for s in slopes) / 3, rel=1e-4, abs=1e-9)
        assert movement[name][place].item() == pytest.approx(-sum(slopes) / 3, rel=1e-4, abs=1e-9)


def squared_gradient(model: nn.Module, batches: list[Any]) -> float:
    loss = torch.stack([cross_entropy(model, batch) for batch in batches]).mean()
    return sum(grad.square().sum().item() for grad in torch.autograd.grad(loss, list(matrices(model).values())))


def test_grasp_keeps_what_the_gradient_would_miss():
    """Wang et al.: pruning a bit of w_q changes |g|^2 by -2 w_q (Hg)_q; the weights whose loss shrinks it are kept."""
    model, batches = small(), points(3)
    scores = scored(CRITERIA["grasp"], model, batches)
    for name, place in each_weight(model):
        expected = slope(model, name, place, lambda: squared_gradient(model, batches)) / 2
        assert scores[name][place].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert any((score < 0).any() for score in scores.values())


def test_grasp_is_the_explicit_hessian_times_the_gradient():
    """Algorithm 2 against the Hessian of the flat parameters, of all batches together."""
    model, batches = small(3), points(2)
    names, shapes = zip(*((name, weight.shape) for name, weight in matrices(model).items()))
    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        state = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        return torch.stack([F.cross_entropy(torch.func.functional_call(model, state, x), y) for x, y in batches]).mean()

    at = flat.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(each, at, retain_graph=True)[0] for each in gradient])
    expected = flat * (hessian @ gradient.detach())
    scores = scored(CRITERIA["grasp"], model, batches)
    torch.testing.assert_close(torch.cat([scores[name].flatten() for name in names]), expected)


def test_grasp_orders_as_the_published_code_and_a_temperature_belongs_into_the_loss():
    """https://github.com/alecwangcq/GraSP: z = <stopped gradient, gradient>, score -w * dz/dw, the largest pruned."""
    model, batches = small(4), points(2)

    def cooler(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]) / 200, batch[1])

    theirs = copy.deepcopy(model)
    weights = list(matrices(theirs).values())
    stopped = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        stopped = [sum_ + grad for sum_, grad in zip(stopped, torch.autograd.grad(cooler(theirs, batch), weights))]
    for batch in batches:
        grads = torch.autograd.grad(cooler(theirs, batch), weights, create_graph=True)
        sum((s.data * g).sum() for s, g in zip(stopped, grads)).backward()
    published = torch.cat([(-weight.data * weight.grad).flatten() for weight in weights])
    scores = torch.cat([score.flatten() for score in scored(CRITERIA["grasp"], model, batches, cooler).values()])
    torch.testing.assert_close(scores, -published / len(batches) ** 2)


def test_synflow_sums_the_paths_through_a_weight():
    """Tanaka et al., Algorithm 1, for two layers: R = sum over paths of |w2| |w1|."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    scores = scored(CRITERIA["synflow"], model, [torch.randn(7, 3)])
    first, second = model[0].weight.tolist(), model[2].weight.tolist()
    for i in range(4):
        for j in range(3):
            paths = sum(abs(second[k][i]) * abs(first[i][j]) for k in range(2))
            assert scores["0.weight"][i, j].item() == pytest.approx(paths)
    for k in range(2):
        for i in range(4):
            paths = sum(abs(second[k][i]) * abs(first[i][j]) for j in range(3))
            assert scores["2.weight"][k, i].item() == pytest.approx(paths)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=3, max_size=5), st.integers(0, 99), st.integers(0, 3))
def test_synflow_is_conserved_over_layers(widths: list[int], seed: int, pruned: int):
    """Tanaka et al., network-wise conservation: the scores of every layer sum to R, some weights pruned or not."""
    torch.manual_seed(seed)
    pairs = list(itertools.pairwise(widths))
    model = nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b, bias=False), nn.ReLU())))
    with torch.no_grad():
        model[0].weight.view(-1)[1 : 1 + pruned] = 0  # at least one path is left
    sums = [score.sum() for score in scored(CRITERIA["synflow"], model, [torch.zeros(1, widths[0])]).values()]
    torch.testing.assert_close(torch.stack(sums), sums[0].expand(len(sums)))


def test_synflow_equals_the_published_code_on_a_convolutional_net():
    """https://github.com/ganguli-lab/Synaptic-Flow: in eval mode, abs of the whole state dict, ones for one sample."""
    model = image_net().train()
    for batch, _ in images(3):
        model(batch)
    theirs = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for value in theirs.state_dict().values():
            value.abs_()
    theirs(torch.ones(1, 2, 4, 4).double()).sum().backward()
    scores = scored(CRITERIA["synflow"], model, images(1))
    for name, weight in matrices(theirs).items():
        torch.testing.assert_close(scores[name], (weight.grad * weight).abs().detach())


def test_synflow_neither_overflows_nor_underflows_where_fp32_does():
    for gain in (40.0, 0.002):
        layers = [nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(40)]
        with torch.no_grad():
            for layer in layers:
                layer.weight.fill_(gain / 64)
        scores = scored(CRITERIA["synflow"], nn.Sequential(*layers), [torch.zeros(2, 64)])
        for score in scores.values():
            assert score.dtype == torch.float64
            assert bool(((score > 0) & score.isfinite()).all())


def linear_norms(inputs: list[Tensor]) -> list[float]:
    rows = [row for each in inputs for row in each.reshape(-1, each.shape[-1]).tolist()]
    return [sum(row[j] ** 2 for row in rows) ** 0.5 for j in range(len(rows[0]))]


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (3,)])
def test_wanda_of_a_linear_layer(shape: tuple[int, ...]):
    """Sun et al., equation 1: |W_ij| * ||X_j||_2."""
    torch.manual_seed(0)
    model, batches = nn.Linear(3, 2), [torch.randn(shape) for _ in range(3)]
    norms = linear_norms(batches)
    scores = scored(CRITERIA["wanda"], model, batches)["weight"]
    for i, row in enumerate(model.weight.tolist()):
        assert scores[i].tolist() == pytest.approx([abs(w) * norm for w, norm in zip(row, norms)])


def test_wanda_differs_from_the_published_running_mean_by_one_factor():
    """https://github.com/locuslab/wanda: scaler_row is the sum of squares over the number of sequences."""
    torch.manual_seed(0)
    model, batches = nn.Linear(3, 2), [torch.randn(2, 4, 3), torch.randn(3, 4, 3)]
    scaler, sequences = torch.zeros(3), 0
    for batch in batches:
        scaler *= sequences / (sequences + len(batch))
        sequences += len(batch)
        scaler += batch.reshape(-1, 3).norm(dim=0) ** 2 / sequences
    published = model.weight.detach().abs() * scaler.sqrt()
    torch.testing.assert_close(scored(CRITERIA["wanda"], model, batches)["weight"], published * 5**0.5)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(2, 3, (2, 3)), (2, 2, 4, 5)),
    "strided, padded, dilated": (nn.Conv2d(2, 3, 3, stride=2, padding=2, dilation=2), (2, 2, 6, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 4, 4)),
    "depthwise, same": (nn.Conv1d(3, 6, 3, padding="same", dilation=2, groups=3), (2, 3, 7)),
    "reflecting": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (1, 2, 4, 4)),
    "unbatched": (nn.Conv1d(2, 3, 2), (2, 5)),
    "3d": (nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 3, 3)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 3, padding=1, dilation=2), (2, 2, 5)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_wanda_of_a_convolution_is_that_of_the_linear_map_it_is(kind: str):
    """Every weight times the root of the summed squares of all values that it is ever multiplied with.

    These are read off the layer itself: what one weight of 1 among zeros makes of x^2, summed over the output.
    """
    layer, shape = copy.deepcopy(CONVOLUTIONS[kind])
    layer, inputs = layer.double(), torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    scores = scored(CRITERIA["wanda"], layer, [inputs])["weight"]
    probe = copy.deepcopy(layer)
    nn.init.zeros_(probe.bias)
    for place in itertools.product(*map(range, layer.weight.shape)):
        with torch.no_grad():
            probe.weight.zero_()[place] = 1
            norm = probe(inputs.square()).sum().sqrt()
        assert scores[place].item() == pytest.approx((layer.weight[place].abs() * norm).item())


@given(st.floats(0.01, 100), st.integers(0, 2), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_wanda_sees_no_difference_between_a_scaled_input_and_a_scaled_weight(factor: float, column: int, parts: int):
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 2).double(), torch.randn(6, 3).double()
    before = scored(CRITERIA["wanda"], model, [inputs])["weight"]
    with torch.no_grad():
        model.weight[:, column] /= factor
        inputs[:, column] *= factor
    after = scored(CRITERIA["wanda"], model, inputs.chunk(parts))["weight"]  # nor between batches
    torch.testing.assert_close(after, before)


# Models of transformers


def bert(**options: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = BertConfig(vocab_size=11, max_position_embeddings=6, num_labels=2, **sizes, **options)
    return BertForSequenceClassification(config)


def sentences() -> dict[str, Tensor]:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([0, 1])}


def linear(model: nn.Module) -> dict[str, nn.Parameter]:
    kinds = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    return {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in kinds}


@named(WITH_LOSS)
def test_a_transformer_is_differentiated_once_and_twice(criterion: Criterion):
    model = bert().eval()
    scores = criterion.score(model, linear(model), [sentences()], lambda model, batch: model(**batch).loss)
    assert scores.keys() == linear(model).keys()
    assert all(score.isfinite().all() and score.any() for score in scores.values())
    assert not any(module.training for module in model.modules())


def test_wanda_leaves_out_padding():
    """The same scores as from each sentence alone, cut to its length; the pooler sees first tokens only."""
    model, batch = bert(), sentences()
    batch["input_ids"][1, 2:] = 7  # whatever stands there
    alone = [{"input_ids": batch["input_ids"][:1]}, {"input_ids": batch["input_ids"][1:, :2]}]
    weights = linear(model)
    together, apart = (CRITERIA["wanda"].score(model, weights, loader) for loader in ([batch], alone))
    blind = CRITERIA["wanda"].score(model, weights, [{"input_ids": batch["input_ids"]}])
    for name in weights:
        torch.testing.assert_close(together[name], apart[name])
    assert not torch.allclose(blind["bert.encoder.layer.0.intermediate.dense.weight"], apart[name][0, 0])


def test_wanda_of_conv1d_is_that_of_its_transpose():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer, twin, inputs = Conv1D(5, 3), nn.Linear(3, 5), torch.randn(2, 4, 3)
    with torch.no_grad():
        twin.weight.copy_(layer.weight.T)
    ours, theirs = (scored(CRITERIA["wanda"], each, [inputs])["weight"] for each in (layer, twin))
    torch.testing.assert_close(ours, theirs.T)


def test_synflow_takes_embeddings_in_place_of_token_ids():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2, bias=False)

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            assert attention_mask.tolist() == [[1, 1]]
            return {"logits": self.inner(inputs_embeds)}

    model = Embedded()
    batch = {"inputs_embeds": torch.randn(4, 2, 3), "attention_mask": torch.zeros(4, 2).long(), "labels": torch.ones(4)}
    scores = scored(CRITERIA["synflow"], model, [batch])["inner.weight"]
    torch.testing.assert_close(scores, 2 * model.inner.weight.detach().double().abs())  # two positions
    model = bert()
    with pytest.raises(ValueError, match=r"an input is torch.int64.*inputs_embeds"):
        CRITERIA["synflow"].score(model, linear(model), [{"input_ids": sentences()["input_ids"]}])


# Loaders


def gone(loader: Iterable[Any], alive: list[int]) -> Iterator[Any]:
    """New batches, and at each how many of those before the last are still in memory."""
    seen: list[weakref.ref[Tensor]] = []
    for inputs, labels in loader:
        alive.append(sum(ref() is not None for ref in seen[:-1]))
        fresh = inputs.clone()
        seen.append(weakref.ref(fresh))
        yield fresh, labels
        del fresh


@named(c for c in WITH_DATA if c.name != "grasp")
def test_batches_are_not_kept(criterion: Criterion):
    alive: list[int] = []
    expected = scored(criterion, small(), points(5))
    found = scored(criterion, small(), gone(points(5), alive))
    assert alive == [0] * (1 if criterion.name == "synflow" else 5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@named(WITH_LOSS)
def test_batches_count_alike_in_any_order(criterion: Criterion):
    batches = [*points(2), *points(1, seed=5, size=1)]
    first, second = scored(criterion, small(), batches), scored(criterion, small(), batches[::-1])
    for name in first:
        torch.testing.assert_close(first[name], second[name])


@named(WITH_DATA)
def test_a_loader_is_read_once(criterion: Criterion):
    class Once:
        reads = 0

        def __iter__(self) -> Iterator[Any]:
            self.reads += 1
            return iter(points(2))

    loader = Once()
    scored(criterion, small(), loader)
    assert loader.reads == 1


@pytest.mark.parametrize(
    "form", [lambda x, y: (x, y), lambda x, y: [x, y], lambda x, y: x, lambda x, y: {"input": x, "label": y}]
)
@pytest.mark.parametrize("name", ["wanda", "synflow"])
def test_batches_of_every_form(name: str, form: Callable[[Tensor, Tensor], Any]):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    expected = scored(CRITERIA[name], model, points(2))
    assert torch.equal(scored(CRITERIA[name], model, [form(x, y) for x, y in points(2)])["weight"], expected["weight"])


@pytest.mark.parametrize(
    "batch",
    [
        {"a": torch.ones(2), "b": [torch.ones(2), "text"]},
        (torch.ones(2), (torch.ones(2), None)),
        torch.return_types.max((torch.ones(2), torch.ones(2))),
    ],
)
def test_batches_are_moved_whole(batch: Any):
    from prune.criteria.batches import moved

    found = moved(batch, torch.device("meta"))
    assert isinstance(found, type(batch))
    values = torch.utils._pytree.tree_leaves(list(found.values()) if isinstance(found, dict) else list(found))
    assert {value.device.type for value in values if isinstance(value, Tensor)} == {"meta"}
    assert [value for value in values if isinstance(value, str)] == (["text"] if isinstance(batch, dict) else [])


# The model is left as it was


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "addresses": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def used_net() -> nn.Module:
    """With gradients of its own, a frozen norm and layers in different modes."""
    model = image_net()
    cross_entropy(model, images(1)[0]).backward()
    model[1].requires_grad_(False)
    model[3].eval()
    return model


@named(WITH_DATA)
def test_the_model_stays_as_it_was(criterion: Criterion):
    model, loader = used_net(), torch.utils.data.DataLoader(images(4), batch_size=None, shuffle=True)
    before = everything(model)
    first = scored(criterion, model, loader)
    assert_same(before, everything(model))
    second = scored(criterion, model, loader)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(score.requires_grad for score in first.values())


@named(WITH_DATA)
def test_the_model_stays_as_it_was_after_an_error(criterion: Criterion):
    model = used_net()
    before = everything(model)

    def break_off(module: nn.Module, args: Any, output: Tensor) -> None:
        raise ZeroDivisionError

    handle = model[5].register_forward_hook(break_off)  # after the norm has seen the batch
    with pytest.raises(ZeroDivisionError):
        scored(criterion, model, images(2))
    handle.remove()
    assert_same(before, everything(model))


@named(WITH_DATA)
def test_the_mode_is_that_of_the_paper(criterion: Criterion):
    """Training for gradients, where a batch norm that is new has no statistics; evaluation for the others."""
    model, modes = image_net().eval(), []
    model[3].p = 0.0
    handle = model[1].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    scored(criterion, model, images(1))
    handle.remove()
    assert set(modes) == {criterion.needs_loss}


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@named(WITH_DATA)
def test_callers_without_gradients_get_the_same(criterion: Criterion, around: Callable[[], Any]):
    expected = scored(criterion, small(), points(2))
    model, batches = small(), points(2)
    with around():
        found = scored(criterion, model, batches)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=lambda criterion: criterion.name)
def test_scores_are_at_least_fp32_and_of_the_weights_shape(criterion: Criterion, stored: torch.dtype):
    precise = torch.float64 if stored == torch.float64 else torch.float32
    model = small().to(stored)
    if criterion.needs_loader:
        scores = scored(criterion, model, [(x.to(stored), y) for x, y in points(2)])
    else:
        extra = [seeded(0, "w")] if criterion.needs_generator else []
        scores = {name: criterion.score(weight, *extra) for name, weight in matrices(model).items()}
    expected = torch.float64 if criterion.name == "synflow" else precise
    for name, weight in matrices(model).items():
        assert (scores[name].dtype, scores[name].shape, scores[name].requires_grad) == (expected, weight.shape, False)
    if criterion.needs_loader:
        assert all(score.any() for score in scores.values())


@named(ONLINE)
def test_online_and_offline_agree_on_one_batch(criterion: Criterion):
    model, (batch,) = small(), points(1)
    cross_entropy(model, batch).backward()
    for name, score in scored(criterion, model, [batch]).items():
        weight = model.get_parameter(name)
        torch.testing.assert_close(criterion.online(weight, weight.grad), score)
    half = criterion.online(torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 1e-3, dtype=torch.bfloat16))
    assert half.dtype == torch.float32


# Tied, unused, frozen, broken


class Twice(nn.Module):
    """One weight in two layers, and a layer that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_a_tied_weight_is_scored_by_all_that_it_does():
    torch.manual_seed(0)
    model, batches = Twice().double(), points(2)
    weights = {"first.weight": model.first.weight}
    for criterion in WITH_LOSS:
        scores = criterion.score(model, weights, batches, cross_entropy)["first.weight"]
        for place in itertools.product(range(3), range(3)):
            at = [slope(model, "first.weight", place, lambda: cross_entropy(model, each).item()) for each in batches]  # noqa: B023
            expected = {"snip": abs(sum(at)) / 2, "taylor": sum(a * a for a in at) / 2, "movement": -sum(at) / 2}
            if criterion.name in expected:
                assert scores[place].item() == pytest.approx(expected[criterion.name], rel=1e-4, abs=1e-8)
    inner = [model.first(x).tanh().detach() for x, _ in batches]
    norms = torch.tensor(linear_norms([*(x for x, _ in batches), *inner])).double()
    found = CRITERIA["wanda"].score(model, weights, batches)["first.weight"]
    torch.testing.assert_close(found, model.first.weight.detach().abs() * norms)


def test_a_weight_that_the_loss_does_not_use_is_worth_nothing():
    model = Twice().double()
    weights = {name: model.get_parameter(name) for name in ("first.weight", "idle.weight")}
    for criterion in WITH_LOSS:
        scores = criterion.score(model, weights, points(1), cross_entropy)
        assert scores["first.weight"].any()
        assert not scores["idle.weight"].any()
    with pytest.raises(ValueError, match=r"layers of 'idle.weight' were never called.*exclude"):
        CRITERIA["wanda"].score(model, weights, points(1))
    scores = CRITERIA["synflow"].score(model, weights, points(1))
    assert not scores["idle.weight"].any()


def test_a_loss_without_curvature_has_no_gradient_signal():
    model = nn.Linear(3, 2).double()
    scores = scored(CRITERIA["grasp"], model, points(2), lambda model, batch: model(batch[0]).mean())
    assert not scores["weight"].any()


@named(WITH_DATA)
def test_weights_tied_by_memory_alone_are_refused(criterion: Criterion):
    model = small()
    model.extra = nn.Linear(4, 3).double()
    model.extra.weight = nn.Parameter(model[0].weight.detach().T)
    with pytest.raises(
        ValueError, match=r"'0.weight', 'extra.weight' are several parameters in one memory.*b.weight = "
    ):
        scored(criterion, model, points(1))


@named(WITH_DATA)
def test_empty_loaders_are_refused(criterion: Criterion):
    with pytest.raises(ValueError, match="the loader is empty"):
        scored(criterion, small(), iter(()))


@named(WITH_LOSS)
def test_frozen_weights_are_refused_where_a_gradient_is_needed(criterion: Criterion):
    model = small()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.weight' are frozen.*set requires_grad, or exclude"):
        scored(criterion, model, points(1))


@pytest.mark.parametrize("name", ["wanda", "synflow"])
def test_frozen_weights_are_scored_where_none_is_needed(name: str):
    frozen = small().requires_grad_(False)
    expected, found = (scored(CRITERIA[name], model, points(1)) for model in (small(), frozen))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not any(weight.requires_grad for weight in frozen.parameters())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), r"shape \(5,\).*scalar"),
        (lambda model, batch: 1.5, "the loss is a float.*scalar tensor"),
        (lambda model, batch: model(batch[0]).mean().detach(), "no graph.*without no_grad"),
        (lambda model, batch: nn.Linear(3, 1).double()(batch[0]).mean(), "depends on none of the 2 weights"),
    ],
)
@named(WITH_LOSS)
def test_losses_that_are_none_are_refused(criterion: Criterion, loss: Any, message: str):
    with pytest.raises(ValueError, match=message):
        scored(criterion, small(), points(1), loss)


@pytest.mark.parametrize(
    ("name", "model", "loader", "message"),
    [
        ("wanda", small(), [3], "a batch is int: give a mapping"),
        ("synflow", small(), [torch.zeros(2, 3, dtype=torch.int64)], "an input is torch.int64"),
        (
            "synflow",
            nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2, bias=False)),
            points(1),
            "flow through this Sequential is 0",
        ),
        ("wanda", nn.Embedding(3, 2), [torch.zeros(2).long()], "'weight' is the weight of a Embedding"),
        ("wanda", nn.Bilinear(2, 2, 2), [], "'weight' is the weight of a Bilinear"),
    ],
)
def test_what_cannot_be_scored_is_named(name: str, model: nn.Module, loader: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        scored(CRITERIA[name], model, loader)


def test_no_weights_at_all_are_refused():
    with pytest.raises(ValueError, match="no weights to score"):
        CRITERIA["wanda"].score(small(), {}, points(1))


@named(WITH_LOSS)
def test_scores_that_are_nan_are_named_by_selection(criterion: Criterion):
    batches = [(x.log(), y) for x, y in points(1)]  # of negative numbers
    with pytest.raises(ValueError, match=r"scores of '0.weight' are NaN.*the data"):
        keep_top_k(scored(criterion, small(), batches), 3)


# Several ranks


def _on_two_ranks() -> list[Any]:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), []
    parts = (points(3)[:1], points(3)[1:])  # of unequal length
    for criterion in WITH_DATA:
        scores = scored(criterion, small(), parts[rank])
        found.append({name: score.tolist() for name, score in scores.items()})
    model = nn.parallel.DistributedDataParallel(small())
    scores = CRITERIA["snip"].score(model, matrices(model), points(3), cross_entropy)
    found.append({name.removeprefix("module."): score.tolist() for name, score in scores.items()})
    empty = scored(CRITERIA["taylor"], small(), points(1) if rank else [])
    found.append({name: score.tolist() for name, score in empty.items()})
    try:
        scored(CRITERIA["movement"], small(), [])
    except ValueError as error:
        found.append(str(error))
    sharded = fully_shard(small())
    for criterion in WITH_DATA:
        try:
            scored(criterion, sharded, points(1))
        except ValueError as error:
            found.append(str(error))
    return found


def test_ranks_score_all_their_data_together():
    first, second = together(_on_two_ranks)
    assert first == second
    whole = [scored(criterion, small(), points(3)) for criterion in WITH_DATA]
    whole += [scored(CRITERIA["snip"], small(), points(3)), scored(CRITERIA["taylor"], small(), points(1))]
    for found, expected in zip(first, whole):
        for name, score in expected.items():
            torch.testing.assert_close(torch.tensor(found[name]).double(), score.double(), rtol=1e-6, atol=1e-8)
    empty, *refused = first[len(whole) :]
    assert "the loader is empty" in empty
    assert len(refused) == len(WITH_DATA)
    assert all("'0.weight', '2.weight' are sharded (DTensor)" in message for message in refused)
