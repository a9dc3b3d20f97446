import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prune.criteria import CRITERIA, Criterion, seeded
from tests.helpers.criteria_models import (
    ONLINE,
    WITH_DATA,
    WITH_LOSS,
    cross_entropy,
    each_criterion,
    image_net,
    images,
    matrices,
    points,
    scores_of,
    small,
)
from tests.helpers.ranks import on_ranks


def test_the_table_says_what_is_needed():
    assert list(CRITERIA) == ["magnitude", "random", "snip", "grasp", "synflow", "taylor", "movement", "wanda"]
    assert [name for name, c in CRITERIA.items() if c.needs_generator] == ["random"]
    assert [c.name for c in WITH_DATA] == ["snip", "grasp", "synflow", "taylor", "movement", "wanda"]
    assert [c.name for c in WITH_LOSS] == ["snip", "grasp", "taylor", "movement"]
    assert [c.name for c in ONLINE] == ["snip", "taylor", "movement"]
    assert {name: c.rounds for name, c in CRITERIA.items() if c.rounds != 1} == {"synflow": 100}


def gone(loader: Iterable[Any], alive: list[int]) -> Iterator[Any]:
    """New batches, and at each how many of those before the last are still in memory."""
    seen: list[weakref.ref[Tensor]] = []
    for inputs, labels in loader:
        alive.append(sum(ref() is not None for ref in seen[:-1]))
        fresh = inputs.clone()
        seen.append(weakref.ref(fresh))
        yield fresh, labels
        del fresh


@each_criterion(c for c in WITH_DATA if c.name != "grasp")
def test_batches_are_not_kept(criterion: Criterion):
    alive: list[int] = []
    expected = scores_of(criterion, small(), points(5))
    found = scores_of(criterion, small(), gone(points(5), alive))
    assert alive == [0] * (1 if criterion.name == "synflow" else 5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@each_criterion(WITH_LOSS)
def test_batches_count_alike_in_any_order(criterion: Criterion):
    batches = [*points(2), *points(1, seed=5, size=1)]
    first, second = scores_of(criterion, small(), batches), scores_of(criterion, small(), batches[::-1])
    for name in first:
        torch.testing.assert_close(first[name], second[name])


@each_criterion(WITH_DATA)
def test_a_loader_is_read_once(criterion: Criterion):
    class Once:
        reads = 0

        def __iter__(self) -> Iterator[Any]:
            self.reads += 1
            return iter(points(2))

    loader = Once()
    scores_of(criterion, small(), loader)
    assert loader.reads == 1


@pytest.mark.parametrize(
    "form", [lambda x, y: (x, y), lambda x, y: [x, y], lambda x, y: x, lambda x, y: {"input": x, "label": y}]
)
@pytest.mark.parametrize("name", ["wanda", "synflow"])
def test_batches_of_every_form(name: str, form: Callable[[Tensor, Tensor], Any]):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    expected = scores_of(CRITERIA[name], model, points(2))
    assert torch.equal(
        scores_of(CRITERIA[name], model, [form(x, y) for x, y in points(2)])["weight"], expected["weight"]
    )


@pytest.mark.parametrize(
    "batch",
    [
        {"a": torch.ones(2), "b": [torch.ones(2), "text"]},
        (torch.ones(2), (torch.ones(2), None)),
        torch.return_types.max((torch.ones(2), torch.ones(2))),
    ],
)
def test_batches_are_moved_whole(batch: Any):
    from workbench.models.forward import to_device

    found = to_device(batch, torch.device("meta"))
    assert isinstance(found, type(batch))
    values = torch.utils._pytree.tree_leaves(list(found.values()) if isinstance(found, dict) else list(found))
    assert {value.device.type for value in values if isinstance(value, Tensor)} == {"meta"}
    assert [value for value in values if isinstance(value, str)] == (["text"] if isinstance(batch, dict) else [])


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


@each_criterion(WITH_DATA)
def test_the_model_stays_as_it_was(criterion: Criterion):
    model, loader = used_net(), torch.utils.data.DataLoader(images(4), batch_size=None, shuffle=True)
    before = everything(model)
    first = scores_of(criterion, model, loader)
    assert_same(before, everything(model))
    second = scores_of(criterion, model, loader)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(score.requires_grad for score in first.values())


@each_criterion(WITH_DATA)
def test_the_model_stays_as_it_was_after_an_error(criterion: Criterion):
    model = used_net()
    before = everything(model)

    def break_off(module: nn.Module, args: Any, output: Tensor) -> None:
        raise ZeroDivisionError

    handle = model[5].register_forward_hook(break_off)  # after the norm has seen the batch
    with pytest.raises(ZeroDivisionError):
        scores_of(criterion, model, images(2))
    handle.remove()
    assert_same(before, everything(model))


@each_criterion(WITH_DATA)
def test_buffers_that_a_forward_replaces_are_put_back(criterion: Criterion):
    class Counting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            self.seen = self.seen + len(input)
            return super().forward(input)

    model = Counting(3, 2).double()
    model.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    before = everything(model)
    scores_of(criterion, model, points(2))
    assert_same(before, everything(model))


@each_criterion(WITH_DATA)
def test_the_mode_is_that_of_the_paper(criterion: Criterion):
    """Training for gradients, where a batch norm that is new has no statistics; evaluation for the others."""
    model, modes = image_net().eval(), []
    model[3].p = 0.0
    handle = model[1].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    scores_of(criterion, model, images(1))
    handle.remove()
    assert set(modes) == {criterion.needs_loss}


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@each_criterion(WITH_DATA)
def test_callers_without_gradients_get_the_same(criterion: Criterion, around: Callable[[], Any]):
    expected = scores_of(criterion, small(), points(2))
    model, batches = small(), points(2)
    with around():
        found = scores_of(criterion, model, batches)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=lambda criterion: criterion.name)
def test_scores_are_at_least_fp32_and_of_the_weights_shape(criterion: Criterion, stored: torch.dtype):
    precise = torch.float64 if stored == torch.float64 else torch.float32
    model = small().to(stored)
    if criterion.needs_loader:
        scores = scores_of(criterion, model, [(x.to(stored), y) for x, y in points(2)])
    else:
        extra = [seeded(0, "w")] if criterion.needs_generator else []
        scores = {name: criterion.score(weight, *extra) for name, weight in matrices(model).items()}
    expected = torch.float64 if criterion.name == "synflow" else precise
    for name, weight in matrices(model).items():
        assert (scores[name].dtype, scores[name].shape, scores[name].requires_grad) == (expected, weight.shape, False)
    if criterion.needs_loader:
        assert all(score.any() for score in scores.values())


@each_criterion(WITH_DATA)
def test_weights_tied_by_memory_alone_are_refused(criterion: Criterion):
    model = small()
    model.extra = nn.Linear(4, 3).double()
    model.extra.weight = nn.Parameter(model[0].weight.detach().T)
    with pytest.raises(
        ValueError, match=r"'0.weight', 'extra.weight' are several parameters in one memory.*b.weight = "
    ):
        scores_of(criterion, model, points(1))


@each_criterion(WITH_DATA)
def test_empty_loaders_are_refused(criterion: Criterion):
    with pytest.raises(ValueError, match="the loader is empty"):
        scores_of(criterion, small(), iter(()))


@pytest.mark.parametrize("name", ["wanda", "synflow"])
def test_frozen_weights_are_scored_where_none_is_needed(name: str):
    frozen = small().requires_grad_(False)
    expected, found = (scores_of(CRITERIA[name], model, points(1)) for model in (small(), frozen))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not any(weight.requires_grad for weight in frozen.parameters())


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
        ("wanda", nn.Embedding(3, 2), [torch.zeros(2).long()], "'weight' are not the weight of any layer"),
        ("wanda", nn.Bilinear(2, 2, 2), [], "'weight': Wanda scores Linear and Conv layers, .* and this is a Bilinear"),
    ],
)
def test_what_cannot_be_scored_is_named(name: str, model: nn.Module, loader: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        scores_of(CRITERIA[name], model, loader)


def test_no_weights_at_all_are_refused():
    with pytest.raises(ValueError, match="no weights to score"):
        CRITERIA["wanda"].score(small(), {}, points(1))


def _on_two_ranks() -> list[Any]:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), []
    parts = (points(3)[:1], points(3)[1:])  # of unequal length
    for criterion in WITH_DATA:
        scores = scores_of(criterion, small(), parts[rank])
        found.append({name: score.tolist() for name, score in scores.items()})
    model = nn.parallel.DistributedDataParallel(small())
    scores = CRITERIA["snip"].score(model, matrices(model), points(3), cross_entropy)
    found.append({name.removeprefix("module."): score.tolist() for name, score in scores.items()})
    cross_entropy(model, points(1)[0]).backward()  # training goes on
    assert all(parameter.grad is not None for parameter in model.parameters())
    empty = scores_of(CRITERIA["taylor"], small(), points(1) if rank else [])
    found.append({name: score.tolist() for name, score in empty.items()})
    try:
        scores_of(CRITERIA["movement"], small(), [])
    except ValueError as error:
        found.append(str(error))
    sharded = fully_shard(small())
    for criterion in WITH_DATA:
        try:
            scores_of(criterion, sharded, points(1))
        except ValueError as error:
            found.append(str(error))
    whole = small()
    for each in (sharded, whole):
        cross_entropy(each, points(1)[0]).backward()
    for name, weight in matrices(sharded).items():
        plain = whole.get_parameter(name)
        for criterion in ONLINE:
            online = criterion.online(weight, weight.grad).full_tensor()
            torch.testing.assert_close(online, criterion.online(plain, plain.grad))
    return found


def test_ranks_score_all_their_data_together():
    first, second = on_ranks(_on_two_ranks)
    assert first == second
    whole = [scores_of(criterion, small(), points(3)) for criterion in WITH_DATA]
    whole += [scores_of(CRITERIA["snip"], small(), points(3)), scores_of(CRITERIA["taylor"], small(), points(1))]
    for found, expected in zip(first, whole):
        for name, score in expected.items():
            torch.testing.assert_close(torch.tensor(found[name]).double(), score.double(), rtol=1e-6, atol=1e-8)
    empty, *refused = first[len(whole) :]
    assert "the loader is empty" in empty
    assert len(refused) == len(WITH_DATA)
    assert all("'0.weight', '2.weight' are sharded (DTensor)" in message for message in refused)
