import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from transformers import AutoConfig, AutoModel

from workbench import load, save
from workbench.data import Digits
from workbench.models import MLP, Conv, DenseNet, LeNet5, LeNet300, Recurrent, ResNet, SentenceEncoder
from workbench.models.activations import gain, names, swap_activation
from workbench.models.architecture import describe
from workbench.models.encoder import pool, sentence_encoder

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


def parameters(model):
    return sum(p.numel() for p in model.parameters())


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


def test_mlp_layers_in_order():
    layers = [type(m).__name__ for m in MLP(4, [3, 2], norm="layer", activation="silu").layers]
    assert layers == ["Linear", "LayerNorm", "SiLU", "Linear", "LayerNorm", "SiLU", "Linear"]
    layers = [type(m).__name__ for m in MLP(4, [3], norm="batch", activation="relu").layers]
    assert layers == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [type(m).__name__ for m in MLP(4, []).layers] == ["Linear"]


def test_init_is_that_of_the_activation():
    torch.manual_seed(0)
    deviations = [
        float(m.weight.detach().std() * m.in_features**0.5)
        for m in MLP(400, [400, 400], 400).layers
        if hasattr(m, "weight")
    ]
    assert deviations == pytest.approx([1.0, gain("gelu"), 1.0], rel=0.02)
    torch.manual_seed(0)
    he = MLP(400, [400, 400], 400, init="he").layers
    assert float(he[2].weight.detach().std() * 20) == pytest.approx(2**0.5, rel=0.02)


def test_init_args_do_not_alias_the_argument():
    hidden = [3, 4]
    model = MLP(2, hidden)
    hidden.append(5)
    assert model.init_args["hidden"] == [3, 4]


def test_classic_sizes():
    assert parameters(LeNet5()) == parameters(LeNet5(image_size=32)) == 61_706
    assert parameters(LeNet300()) == 266_610
    assert LeNet300("relu").init_args["hidden"] == [300, 100]
    assert LeNet300()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("size", range(8, 41))
def test_lenet_fits_every_size(size):
    model = LeNet5(image_size=size)
    assert model(torch.zeros(1, 1, size, size)).shape == (1, 10)


def test_lenet_is_smooth_but_for_its_activation():
    assert not [m for m in LeNet5().modules() if isinstance(m, nn.MaxPool2d)]


# --- ResNet


def test_resnet_has_the_published_sizes():
    """He et al. 2016, table 6: 0.27 M at depth 20, 0.46 M at 32, and with the projections of option B 2,752 more."""
    assert parameters(ResNet()) == 269_722 + 2_752
    assert parameters(ResNet(32)) == 464_154 + 2_752
    assert parameters(ResNet(56)) == 853_018 + 2_752
    layers = [m for m in ResNet(32).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 32 + 2, "and two projections"


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_resnet_is_the_formula(norm):
    torch.manual_seed(0)
    model = ResNet(8, 3, 5, "gelu", norm, in_channels=2).double().train()
    x = torch.randn(4, 2, 9, 10, dtype=torch.float64)

    def normed(x, module):
        if norm == "none":
            return x
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (variance + module.eps).sqrt()

    conv = nn.functional.conv2d
    h = nn.functional.gelu(normed(conv(x, model.stem[0].weight, model.stem[0].bias, padding=1), model.stem[1]))
    for stage, stride in zip(model.stages, (1, 2, 2)):
        (block,) = stage
        branch = conv(h, block.conv1.weight, block.conv1.bias, stride, 1)
        branch = conv(nn.functional.gelu(normed(branch, block.norm1)), block.conv2.weight, block.conv2.bias, 1, 1)
        short = h
        if stride == 2:
            short = normed(conv(h, block.shortcut[0].weight, block.shortcut[0].bias, stride), block.shortcut[1])
        h = nn.functional.gelu(normed(branch, block.norm2) + short)
    assert h.shape == (4, 12, 3, 3)
    torch.testing.assert_close(model(x), h.mean((2, 3)) @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_resnet_starts_neither_dead_nor_exploded(activation, norm):
    """Without the division by sqrt L, GELU of depth 20 without a norm starts with logits of about 20."""
    torch.manual_seed(0)
    model = ResNet(20, 8, activation=activation, norm=norm)
    x = torch.randn(16, 3, 16, 16)
    logits = model(x)
    nn.functional.cross_entropy(logits, torch.arange(16) % 10).backward()
    assert logits.detach().square().mean() < 9
    gradients = [float(m.weight.grad.norm()) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert min(gradients) > 1e-3
    assert max(gradients) < 5


@pytest.mark.parametrize(("channels", "groups"), [(4, 4), (6, 2), (7, 1), (16, 8), (24, 8)])
def test_group_norm_divides_the_channels(channels, groups):
    assert ResNet(8, channels, norm="group").stem[1].num_groups == groups
    assert ResNet(8, channels, norm="layer").stem[1].num_groups == 1


def test_resnet_swaps_its_activation():
    model = swap_activation(ResNet(8, 4), "relu")
    assert model.init_args["activation"] == "relu"
    assert [type(m).__name__ for m in model.modules() if "LU" in type(m).__name__] == ["ReLU"] * 7


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


# --- sentence encoder

BERT = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


def tokens(seed=0, length=7):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (4, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([[length], [3], [1], [5]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(1)
    bert = AutoModel.from_config(AutoConfig.for_model(**BERT))
    bert.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_by_the_book(folder, pooling, normalize):
    model = SentenceEncoder(str(folder), pooling, normalize).eval()
    batch = tokens()
    hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    for row, (states, mask, found) in enumerate(zip(hidden, batch["attention_mask"], model(**batch))):
        real = [state for state, one in zip(states, mask) if one]
        expected = sum(real) / len(real) if pooling == "mean" else states[0]
        if normalize:
            expected = expected / expected.norm()
        torch.testing.assert_close(found, expected, msg=f"sentence {row}")


def test_padding_does_not_matter(folder):
    model = SentenceEncoder(folder).eval()
    batch = tokens()
    longer = {name: nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
    torch.testing.assert_close(model(**longer), model(**batch))
    whole = {"input_ids": batch["input_ids"][:1]}
    torch.testing.assert_close(model(**whole), model(**batch)[:1])
    segments = torch.ones_like(batch["input_ids"])
    assert not torch.allclose(model(**batch, token_type_ids=segments), model(**batch))
    assert torch.equal(model(**batch, token_type_ids=0 * segments), model(**batch))


def test_pool_ignores_whatever_stands_at_padding():
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    hidden[0, 2] = float("nan")
    hidden.requires_grad_()
    found = pool(hidden, mask)
    torch.testing.assert_close(found[0], hidden[0, :2].mean(0))
    assert found[1].tolist() == [0.0] * 4
    found.sum().backward()
    assert torch.equal(hidden.grad, mask[..., None].expand(2, 3, 4) / torch.tensor([2.0, 1.0])[:, None, None])


@pytest.mark.parametrize("source", ["folder", "config", "module"])
def test_an_encoder_is_loaded_without_what_it_was_made_from(source, folder, tmp_path):
    given = {"folder": folder, "config": BERT, "module": AutoModel.from_pretrained(folder)}[source]
    model = SentenceEncoder(given, "cls", normalize=False).eval()
    shutil.rmtree(folder)
    assert json.loads(json.dumps(model.init_args)) == model.init_args
    save(model, tmp_path / "checkpoint")
    again = load(tmp_path / "checkpoint")
    assert (type(again), again.pooling, again.normalize) == (SentenceEncoder, "cls", False)
    assert torch.equal(again(**tokens()), model(**tokens()))


def test_what_is_cut_or_swapped_is_remembered(folder, tmp_path):
    model = swap_activation(SentenceEncoder(folder), "relu").eval()
    model.encoder.encoder.layer = model.encoder.encoder.layer[1:]
    model.encoder.config.num_hidden_layers = 1
    save(model, tmp_path / "checkpoint")
    again = load(tmp_path / "checkpoint")
    assert torch.equal(again(**tokens()), model(**tokens()))
    assert not torch.allclose(again(**tokens()), SentenceEncoder(folder).eval()(**tokens()))


def test_every_weight_of_an_encoder_learns(folder):
    model = SentenceEncoder(folder)
    assert model.training
    assert model.encoder.training, "from_pretrained gives it asleep"
    (model(**tokens()) @ torch.randn(16)).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == [], "DDP would wait for them"


def test_an_encoder_of_ones_own():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=input_ids[..., None].float() * torch.tensor([3.0, 4.0]))

    model = SentenceEncoder(Mine())
    torch.testing.assert_close(model(torch.tensor([[2, 5]])), torch.tensor([[0.6, 0.8]]))
    assert describe(model)["init_args"]["encoder"] == {"torch.nn.Module": describe(model.encoder)}

    class Closed(Mine):
        def __init__(self, width):
            super().__init__()

    assert describe(SentenceEncoder(Closed(3))) is None, "it does not say what it was built with"


def test_an_encoder_from_a_config(folder):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    for encoder in (str(folder), BERT, {"class_path": "torch.nn.Identity"}):
        given = {"class_path": "workbench.models.SentenceEncoder", "init_args": {"encoder": encoder, "pooling": "cls"}}
        model = parser.instantiate(parser.parse_object({"model": given})).model
        assert type(model) is SentenceEncoder
        expected = "Identity" if encoder not in (str(folder), BERT) else "BertModel"
        assert type(model.encoder).__name__ == expected


def test_encoders_that_are_none_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="pooling='max': use one of mean, cls"):
        SentenceEncoder(BERT, "max")
    with pytest.raises(ValueError, match=r"nowhere: AutoModel cannot be loaded from there"):
        SentenceEncoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no encoder can be built from the configuration hidden_size: .*model_type"):
        SentenceEncoder({"hidden_size": 8})
    with pytest.raises(ValueError, match=r"no encoder can be built .*give model_type"):
        SentenceEncoder({"model_type": "nonsense"})
    with pytest.raises(ValueError, match="an attention that is not built in"):
        SentenceEncoder({**BERT, "attn_implementation": "somebody/kernel"})
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"bert: lacks 1 weights, such as 'encoder\.layer\.1\.output\.dense\.weight'"):
        SentenceEncoder(folder)


def sentence_folder(folder, pooling, kinds=("Transformer", "Pooling", "Normalize")):
    """As sentence-transformers lays it out."""
    paths = {"Transformer": ""}
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": paths.get(kind, f"{i}_{kind}"),
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("mode", "pooling"), [("mean_tokens", "mean"), ("cls_token", "cls")])
def test_a_folder_of_sentence_transformers(folder, mode, pooling, normalize):
    modes = {f"pooling_mode_{name}": name == mode for name in ("mean_tokens", "cls_token", "max_tokens")}
    kinds = ("Transformer", "Pooling", "Normalize")[: 3 if normalize else 2]
    sentence_folder(folder, {"word_embedding_dimension": 16, **modes}, kinds)
    model = sentence_encoder(folder).eval()
    assert (model.pooling, model.normalize) == (pooling, normalize)
    expected = SentenceEncoder(folder, pooling, normalize).eval()
    assert torch.equal(model(**tokens()), expected(**tokens()))


def test_other_folders_of_sentence_transformers_are_named(folder):
    with pytest.raises(ValueError, match=r"modules\.json: cannot be read .*No such file"):
        sentence_encoder(folder)
    mean = {"pooling_mode_mean_tokens": True}
    for kinds in ((), ("Transformer",), ("Transformer", "Pooling", "Dense")):
        with pytest.raises(ValueError, match=rf"asks for {', '.join(kinds) or 'nothing'}; only Transformer, Pooling"):
            sentence_encoder(sentence_folder(folder, mean, kinds))
    for pooling, found in (({}, "nothing"), ({**mean, "pooling_mode_max_tokens": True}, "pooling_mode_mean_tokens, p")):
        with pytest.raises(ValueError, match=f"pools by {found}"):
            sentence_encoder(sentence_folder(folder, pooling))
    (folder / "modules.json").write_text("{")
    with pytest.raises(ValueError, match="give a folder that sentence-transformers saved"):
        sentence_encoder(folder)
