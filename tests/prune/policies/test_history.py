"""What a policy finds out about a model that was trained before, or changed behind its back."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prune import Masks, Pruner
from prune.policies import Dynamic, Fixed, Gradual, Iterative
from prune.policies.history import Watch, zeros
from tests.helpers.bare_loop import ADAMW, SGD, grads, net, train


def gradual(**changed: Any) -> Gradual:
    return Gradual(**{"density": 0.2, "begin": "2it", "end": "6it", "every": "2it", **changed})


@pytest.mark.parametrize(
    ("make", "changed", "said"),
    [
        (gradual, {"density": 0.1}, r"density 0\.1 instead of 0\.2"),
        (gradual, {"end": "8it", "every": "1it"}, "end 8it instead of 6it, every 1it instead of 2it"),
        (gradual, {"schedule": "linear"}, "schedule linear instead of cubic"),
        (gradual, {"pruner": Pruner("random", exclude="0.*")}, "criterion random instead of magnitude, exclude"),
        (gradual, {"pruner": Pruner(group="sum")}, "group sum instead of mean"),
        (gradual, {"pruner": Pruner(smallest=50)}, "smallest 50 instead of 1"),
        (gradual, {"pruner": Pruner(seed=1)}, "seed 1 instead of 0"),
        (gradual, {"pruner": Pruner(output="2.*")}, r"output 2\.\*"),
        (
            lambda **c: Dynamic(**{"density": 0.3, "begin": "1it", "end": "6it", "every": "2it", **c}),
            {"density": 0.2},
            "density",
        ),
        (
            lambda **c: Dynamic(**{"density": 0.3, "begin": "1it", "end": "6it", "every": "2it", **c}),
            {"growth": "set"},
            "growth",
        ),
        (lambda **c: Iterative(**{"levels": 2, **c}), {"levels": 3}, "levels"),
        (lambda **c: Iterative(**{"levels": 2, **c}), {"rewind": "2ep"}, r"rewind\.at 2ep instead of 1ep"),
    ],
)
def test_other_settings_are_refused_by_name(make: Any, changed: dict[str, Any], said: str) -> None:
    state = make().state_dict()
    make().load_state_dict(copy.deepcopy(state))
    with pytest.raises(ValueError, match=f"other settings than it was trained with: {said}"):
        make(**changed).load_state_dict(state)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_a_policy_without_its_state_does_not_start_in_the_middle(optimizer: Any) -> None:
    model = net()
    stepper = optimizer(model.parameters())
    train(model, stepper, 0, 1)
    with pytest.raises(ValueError, match=r"^\w+ has stepped already, but this Gradual has no state"):
        gradual().follow(model, stepper)
    with gradual().follow(model, stepper, anew=True):
        train(model, stepper, 1, 7)
    assert zeros(Pruner().scope(model)) == 0.8


@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.AdamW, torch.optim.Rprop, torch.optim.LBFGS])
def test_state_from_the_start_is_no_step(make: Any) -> None:
    model = net()
    optimizer = make(model.parameters(), lr=0.01)
    gradual().follow(model, optimizer).remove()
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step(lambda: torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^\w+ has stepped already"):
        gradual().follow(model, optimizer)


def test_layers_of_zeros_are_no_sign() -> None:
    model = net()
    nn.init.zeros_(model[2].weight)
    assert zeros(Pruner().scope(model)) == 0
    gradual().follow(model, SGD(model.parameters())).remove()


def test_fixed_masks_are_given_for_a_sparse_model() -> None:
    model = net()
    masks = Pruner()(model, 0.3)
    masks.apply(model)
    optimizer = SGD(model.parameters())
    train(model, optimizer, 0, 1)
    with Fixed(masks).follow(model, optimizer):
        train(model, optimizer, 1, 3)
    assert masks.is_applied_to(model)


def test_a_sparse_model_is_pruned_on_from_its_density() -> None:
    model = net()
    masks = Pruner()(model, 0.5)
    masks.apply(model)
    policy = gradual(initial=0.5, begin="0it")
    with policy.follow(model, optimizer := SGD(model.parameters())):
        assert policy.masks == masks
        train(model, optimizer, 0, 6)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_come_back_are_named_at_the_next_step(assign: bool) -> None:
    model, policy = net(), gradual()
    optimizer, before = SGD(model.parameters()), copy.deepcopy(model.state_dict())
    with policy.follow(model, optimizer):
        train(model, optimizer, 0, 7)
        model.load_state_dict(copy.deepcopy(model.state_dict()))  # obeys the masks
        train(model, optimizer, 7, 8)
        if assign:
            model[0].weight.data = model[0].weight.data.clone()  # not seen, and harmless
        model.load_state_dict(before)
        with pytest.warns(
            UserWarning, match=r"not zero before update 9, in '0\.weight'.*density 1, not 0\.2\. Compare"
        ):
            train(model, optimizer, 8, 9)
        train(model, optimizer, 9, 10)


def test_an_exception_is_not_talked_over() -> None:
    model, policy = net(), gradual()
    optimizer = SGD(model.parameters())

    def fail() -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), policy.follow(model, optimizer):
        train(model, optimizer, 0, 3, fail)


def test_only_what_changed_is_looked_at() -> None:
    model, watch = net(), Watch()
    weights = dict(model.named_parameters())
    masks = Masks({"0.weight": torch.zeros(10, 6, dtype=torch.bool), "2.weight": torch.zeros(3, 10, dtype=torch.bool)})
    watch.note(weights)
    assert watch.strays(weights, masks) == {}
    with torch.no_grad():
        model[2].weight.mul_(1)
    assert watch.strays(weights, masks) == {"2.weight": 30}


class Counting(TorchDispatchMode):
    """Counts what looks at all weights, and what waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.called[name] = self.called.get(name, 0) + 1
        return func(*args, **kwargs or {})


def test_steps_of_another_optimizer_are_no_foreign_changes() -> None:
    model, policy = net(), Fixed(Pruner()(net(), 0.5))
    one, two = SGD(model[0].parameters()), SGD(model[2].parameters())
    with policy.follow(model, [one, two]):
        for index in range(2):
            grads(model, index)
            with Counting() as counting:
                two.step()
                one.step()
            assert "count_nonzero" not in counting.called
        model.load_state_dict(net().state_dict())
        grads(model, 2)
        with pytest.warns(UserWarning, match=r"not zero before update 3, in '0\.weight', '2\.weight'"):
            one.step()


def test_changed_weights_are_counted_with_one_synchronisation() -> None:
    model, watch = net(), Watch()
    weights = {"0.weight": model[0].weight, "2.weight": model[2].weight}
    masks = Pruner()(model, 0.5)
    masks.apply(model)
    watch.note(weights)
    with torch.no_grad():
        for weight in weights.values():
            weight.clamp_(-1, 1)
        weights["2.weight"][~masks["2.weight"]] = float("nan")
    with Counting() as counting:
        found = watch.strays(weights, masks)
    assert found == {"2.weight": int((~masks["2.weight"]).sum())}
    assert not {"nonzero", "index", "_local_scalar_dense"} & counting.called.keys()
