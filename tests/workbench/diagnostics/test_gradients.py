from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.ranks import on_ranks
from tests.workbench.diagnostics.test_units import assert_same, everything
from workbench.diagnostics import gradient_flow


def net() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.GELU(), nn.Dropout(0.5), nn.Linear(10, 3))
    model[1].bias.requires_grad_(False)
    return model


def shown(batches: int = 3) -> list[Any]:
    torch.manual_seed(0)
    return [(torch.randn(4 + i, 6), torch.arange(4 + i) % 3) for i in range(batches)]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_it_is_the_norm_of_the_mean_gradient_on_kept_weights() -> None:
    model, data = net(), shown()
    masks = {"0.weight": torch.rand(10, 6) < 0.3, "4.weight": torch.rand(3, 10) < 0.5}
    torch.manual_seed(5)
    found = gradient_flow(model, data, cross_entropy, masks)
    peer = net()
    torch.manual_seed(5)
    (sum(cross_entropy(peer, batch) for batch in data) / 3).backward()  # type: ignore[union-attr]
    expected = {}
    for name, weight in peer.named_parameters():
        if weight.grad is not None:
            mask = masks.get(name, torch.ones_like(weight)).flatten().tolist()
            expected[name] = sum(g * g for g, keep in zip(weight.grad.flatten().tolist(), mask) if keep)
    assert found["layers"] == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert list(found["layers"]) == list(expected)
    assert "1.bias" not in found["layers"]
    assert found["total"] == pytest.approx(sum(expected.values()), rel=1e-4)
    assert found["ratio"] == pytest.approx(expected["0.weight"] / expected["4.weight"], rel=1e-4)


def test_it_is_what_a_small_step_takes_off_the_loss() -> None:
    model, data = net().double(), [(x.double(), y) for x, y in shown()]
    model[3].p, rate = 0.0, 1e-6
    flow = gradient_flow(model, data, cross_entropy)["total"]

    def mean() -> Tensor:
        return torch.stack([cross_entropy(model, batch) for batch in data]).mean()

    before = mean()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight, grad in zip(weights, torch.autograd.grad(before, weights)):
            weight -= rate * grad
    assert (before - mean()).item() / rate == pytest.approx(flow, rel=1e-3)


def test_what_a_mask_takes_away_does_not_count() -> None:
    masks = {"0.weight": torch.zeros(10, 6, dtype=torch.bool), "4.weight": torch.zeros(3, 10, dtype=torch.bool)}
    found = gradient_flow(net(), shown(), cross_entropy, masks)
    assert found["layers"]["0.weight"] == found["layers"]["4.weight"] == 0
    assert found["total"] > 0
    assert found["ratio"] is None


def test_a_gradient_that_is_infinite_where_it_was_masked_does_not_count() -> None:
    """That of sqrt|w| at 0."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 4.0]]))
    mask = {"weight": torch.tensor([[False, True]])}
    found = gradient_flow(model, [torch.ones(1)], lambda network, batch: network.weight.abs().sqrt().sum(), mask)
    assert found["total"] == pytest.approx(1 / 16)


def test_the_network_is_as_it_was_also_after_an_exception() -> None:
    model, data = net(), shown()
    cross_entropy(model, data[0]).backward()
    model[1].eval()
    grads = {name: None if w.grad is None else w.grad.clone() for name, w in model.named_parameters()}
    before = everything(model)
    first = gradient_flow(model, data, cross_entropy)
    assert_same(before, everything(model))
    assert gradient_flow(model, data, cross_entropy) == first, "also what dropout draws"

    def fails(network: nn.Module, batch: Any) -> Tensor:
        cross_entropy(network, batch)
        raise KeyError("no")

    with pytest.raises(KeyError):
        gradient_flow(model, data, fails)
    assert_same(before, everything(model))
    assert_same(grads, {name: w.grad for name, w in model.named_parameters()})


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="the loader is empty"):
        gradient_flow(net(), [], cross_entropy)
    with pytest.raises(ValueError, match="Linear has no parameter that trains"):
        gradient_flow(nn.Linear(2, 2).requires_grad_(False), shown(), cross_entropy)
    with pytest.raises(ValueError, match=r"the mask '0.weight' of shape \(2,\) fits no parameter"):
        gradient_flow(net(), shown(), cross_entropy, {"0.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="the mask 'other'"):
        gradient_flow(net(), shown(), cross_entropy, {"other": torch.ones(2)})
    with pytest.raises(ValueError, match="the loss has no graph"):
        gradient_flow(net(), shown(), lambda network, batch: torch.ones(()))


def flows(model: nn.Module, data: list[Any]) -> Any:
    torch.distributed.init_process_group("gloo")
    return gradient_flow(model, data[:1] if torch.distributed.get_rank() == 0 else data[1:], cross_entropy)


def test_batches_of_all_ranks_count_alike() -> None:
    model = net()
    model[3].p = 0.0
    alone = gradient_flow(model, shown(), cross_entropy)
    for found in on_ranks(flows, model, shown()):
        assert found["total"] == pytest.approx(alone["total"], rel=1e-5)
        assert found["layers"] == pytest.approx(alone["layers"], rel=1e-4, abs=1e-12)
