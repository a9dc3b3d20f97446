import importlib
import json

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from workbench.data import Digits
from workbench.models import MLP, Conv, DenseNet, LeNet5, Recurrent, ResNet
from workbench.models.activations import names

CASES = [
    (
        MLP,
        {
            "in_features": 12,
            "hidden": [7, 5],
            "classes": 3,
            "activation": "relu",
            "norm": "none",
            "init": "he",
        },
        (12,),
    ),
    (
        MLP,
        {
            "in_features": 12,
            "hidden": [7],
            "classes": 3,
            "activation": "silu",
            "norm": "layer",
            "init": "own",
        },
        (3, 4),
    ),
    (
        MLP,
        {
            "in_features": 12,
            "hidden": [7],
            "classes": 3,
            "activation": "gelu",
            "norm": "batch",
            "init": "own",
        },
        (1, 3, 4),
    ),
    (MLP, {"in_features": 12, "hidden": [], "classes": 3}, (12,)),
    (
        LeNet5,
        {"in_channels": 1, "classes": 4, "activation": "tanh", "image_size": 28, "init": "own"},
        (1, 28, 28),
    ),
    (
        LeNet5,
        {"in_channels": 3, "classes": 4, "activation": "gelu", "image_size": 32, "init": "he"},
        (3, 32, 32),
    ),
    (LeNet5, {"in_channels": 1, "classes": 4, "activation": "relu", "image_size": 8}, (1, 8, 8)),
    (
        ResNet,
        {
            "depth": 14,
            "width": 4,
            "classes": 3,
            "activation": "silu",
            "norm": "batch",
            "in_channels": 3,
            "init": "he",
        },
        (3, 9, 8),
    ),
    (ResNet, {"depth": 8, "width": 6, "classes": 3, "norm": "group", "in_channels": 1}, (1, 8, 8)),
    (ResNet, {"depth": 8, "width": 3, "classes": 3, "norm": "layer", "activation": "relu"}, (3, 12, 12)),
    (ResNet, {"depth": 8, "width": 4, "classes": 3, "norm": "none", "activation": "relu"}, (3, 8, 8)),
    (Conv, {"convolutions": 2, "width": 3, "hidden": 5, "classes": 4, "image_size": 9, "init": "he"}, (3, 9, 9)),
    (Conv, {"convolutions": 6, "width": 2, "hidden": 5, "norm": "group", "in_channels": 1, "image_size": 8}, (1, 8, 8)),
    (Conv, {"convolutions": 4, "width": 3, "hidden": 5, "norm": "batch", "activation": "silu"}, (3, 32, 32)),
    (DenseNet, {"depth": 10, "growth": 3, "classes": 3, "activation": "relu", "init": "he"}, (3, 9, 8)),
    (DenseNet, {"depth": 10, "growth": 3, "bottleneck": True, "compression": 0.5, "norm": "group"}, (3, 8, 8)),
    (DenseNet, {"depth": 7, "growth": 3, "norm": "none", "in_channels": 1}, (1, 8, 8)),
    (Recurrent, {"features": 3, "outputs": 4, "cell": "rnn", "activation": "relu", "recurrence": "identity"}, (5, 3)),
    (
        Recurrent,
        {
            "features": 3,
            "outputs": 4,
            "hidden": 6,
            "layers": 2,
            "cell": "lstm",
            "activation": "gelu",
            "bidirectional": True,
            "norm": "layer",
            "dropout": 0.5,
            "init": "he",
        },
        (5, 3),
    ),
    (Recurrent, {"features": 1, "outputs": 4, "cell": "gru", "hidden": 6}, (7, 1)),
]


@pytest.mark.parametrize(("cls", "arguments", "shape"), CASES)
def test_model_from_its_own_init_args(cls, arguments, shape):
    torch.manual_seed(0)
    model = cls(**arguments).eval()
    assert arguments.items() <= model.init_args.items()
    again = cls(**json.loads(json.dumps(model.init_args))).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(5, *shape)
    assert model(x).shape == (5, arguments.get("classes", arguments.get("outputs", 10)))
    assert torch.equal(again(x), model(x))
    assert not torch.equal(cls(**arguments).eval()(x), model(x))


@pytest.mark.parametrize(("cls", "arguments", "shape"), CASES)
def test_model_from_a_config(cls, arguments, shape):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    path = f"workbench.models.{cls.__name__}"
    parsed = parser.parse_object({"model": {"class_path": path, "init_args": arguments}})
    model = parser.instantiate(parsed).model
    assert type(model) is cls
    assert arguments.items() <= model.init_args.items()


@pytest.mark.parametrize("name", names())
def test_every_activation_learns(name):
    """One batch is learnt by heart: gradients reach every weight."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 8), torch.arange(16) % 4
    model = MLP(8, [32, 32], 4, activation=name)
    before = nn.functional.cross_entropy(model(x), y).item()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert nn.functional.cross_entropy(model(x), y).item() < 0.5 * before


LEARNERS = {
    "MLP": MLP,
    "LeNet5": lambda: LeNet5(image_size=8),
    **{f"ResNet {norm}": lambda norm=norm: ResNet(8, 6, in_channels=1, norm=norm) for norm in ("batch", "none")},
}


@pytest.mark.parametrize("name", LEARNERS)
def test_digits_are_learnt(name):
    torch.manual_seed(0)
    data = Digits(image=name != "MLP")
    model = LEARNERS[name]()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    train, (test,) = data.train_dataloader(), Digits(360, image=name != "MLP").test_dataloader()
    for _ in range(8):
        for x, y in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()
    assert (model(test[0]).argmax(1) == test[1]).float().mean() > 0.94


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (MLP, {"in_features": 0}, "in_features=0"),
        (MLP, {"hidden": [3, 0]}, r"hidden=\[3, 0\]"),
        (MLP, {"classes": -1}, "classes=-1"),
        (MLP, {"norm": "group"}, "norm='group': use one of none, layer, batch"),
        (MLP, {"init": "kaiming"}, "init='kaiming': use one of own, he"),
        (MLP, {"activation": "gleu"}, "Did you mean .*'gelu'"),
        (LeNet5, {"image_size": 7}, "image_size=7: LeNet5 needs at least 8"),
        (LeNet5, {"in_channels": 0}, "in_channels=0"),
        (LeNet5, {"classes": 0}, "classes=0"),
        (LeNet5, {"init": "x"}, "init='x'"),
        (LeNet5, {"activation": "swish"}, "Did you mean 'silu'"),
        (ResNet, {"depth": 18}, r"depth=18: give 6 n \+ 2 .* such as 20"),
        (ResNet, {"depth": 2}, "depth=2: .* such as 8"),
        (ResNet, {"width": 0}, "width=0"),
        (ResNet, {"in_channels": 0}, "in_channels=0"),
        (ResNet, {"norm": "instance"}, "norm='instance': use one of batch, group, layer, none"),
        (ResNet, {"activation": "gleu"}, "Did you mean .*'gelu'"),
        (ResNet, {"init": "x"}, "init='x'"),
    ],
)
def test_wrong_arguments_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize(("cls", "arguments", "shape"), CASES)
def test_several_models_run_as_one(cls, arguments, shape):
    models = [cls(**arguments).eval() for _ in range(3)]
    stacked, buffers = stack_module_state(models)
    x = torch.randn(4, *shape)
    together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(stacked, buffers)
    for one, model in zip(together, models):
        torch.testing.assert_close(one, model(x), rtol=1e-4, atol=1e-5)


def test_exports_exist():
    package = importlib.import_module("workbench.models")
    assert all(hasattr(package, name) for name in package.__all__)
