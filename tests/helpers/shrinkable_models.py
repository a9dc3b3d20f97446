"""Small networks of every family that can be shrunk, and masks for them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune.masks import Masks
from prune.shrinking import Coupled, Shrunk
from workbench.models import MLP, LeNet5, ResNet, SentenceEncoder, Transformer


class Vgg(nn.Module):
    """Convolutions, norms and pooling in a row, flattened into linear layers with dropout."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, width in ((3, 8), (8, 12), (12, 16)):
            layers += [nn.Conv2d(fan_in, width, 3, padding=1), nn.BatchNorm2d(width) if norm else nn.Identity()]
            layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(64, 20), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(20, 20), nn.ReLU(True), nn.Linear(20, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class Bottleneck(nn.Module):
    """torchvision's, with its in-place addition."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(fan_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or fan_in != 2 * width:
            conv = nn.Conv2d(fan_in, 2 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Residual(nn.Module):
    """Bottlenecks as in torchvision's ResNet-50."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Bottleneck(8, 4, 1), Bottleneck(8, 6, 2), Bottleneck(12, 6, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Inverted(nn.Module):
    """MobileNetV3's block: wider, depthwise, squeeze and excitation, narrower, with a shortcut."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
        )
        self.squeeze, self.excite = nn.Conv2d(wide, 4, 1), nn.Conv2d(4, wide, 1)
        self.project = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(self.expand(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(out, 1)))))
        return x + self.project(out * gate)


class Mobile(nn.Module):
    """A stem, two inverted residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.blocks = nn.Sequential(Inverted(8, 16), Inverted(8, 12))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class Dense(nn.Module):
    """Layers that read several others side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.both, self.head = nn.Conv2d(10, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.one(x))
        return self.head(F.relu(self.both(torch.cat([one, F.relu(self.two(one))], 1))).mean((2, 3)))


IMAGES = (2, 3, 16, 16)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP(12, (20, 20), 5), (3, 12)),
    "mlp_batch": (lambda: MLP(12, (20, 20), 5, norm="batch"), (3, 12)),
    "lenet": (lambda: LeNet5(image_size=12), (2, 1, 12, 12)),
    "resnet": (lambda: ResNet(8, 8, 5, "relu"), IMAGES),
    "resnet_group": (lambda: ResNet(8, 16, 5, norm="group"), IMAGES),
    "resnet_none": (lambda: ResNet(8, 8, 5, norm="none"), IMAGES),
    "vgg": (Vgg, IMAGES),
    "vgg_plain": (lambda: Vgg(norm=False), IMAGES),
    "residual": (Residual, (2, 3, 32, 32)),
    "mobile": (Mobile, IMAGES),
    "dense": (Dense, IMAGES),
}


def built(name: str) -> tuple[Any, Tensor]:
    """A network with statistics, scales and biases as after some training, in eval mode, and inputs."""
    torch.manual_seed(1)
    build, shape = NETWORKS[name]
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    model.train()
    for _ in range(2):
        model(torch.randn(4, *shape[1:]))
    return model.eval(), torch.randn(shape)


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name}


def sparse(model: nn.Module, density: float, seed: int = 0) -> Masks:
    random = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(p.shape, generator=random) < density for n, p in weights(model).items()})


def coupled(model: nn.Module, inputs: Any, share: float = 0.5) -> Masks:
    """Masks of `Coupled` that keep about a share of the units of every key, by magnitude."""
    layout = Coupled(inputs).layout(model, weights(model))
    scores = layout.pool({name: weight.detach().abs() for name, weight in weights(model).items()})
    kept = layout.select(scores, {key: max(1, round(share * n)) for key, n in layout.units.items()}, None)
    ones = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights(model).items()}
    return Masks({**ones, **layout.spread(kept)})


def masked(model: nn.Module, masks: Masks) -> Any:
    other = copy.deepcopy(model)
    masks.apply(other)
    return other.eval()


def assert_same(result: Shrunk, model: nn.Module, masks: Masks, inputs: Tensor) -> None:
    """In float64 and in its own type, on fresh inputs."""
    before = masked(model, masks)
    fresh = torch.randn(5, *inputs.shape[1:])
    torch.testing.assert_close(copy.deepcopy(result.model).eval()(fresh), before(fresh), rtol=1e-4, atol=1e-6)
    wide = copy.deepcopy(result.model).eval().double()(fresh.double())
    torch.testing.assert_close(wide, before.double()(fresh.double()), rtol=1e-6, atol=1e-7)
    assert result.after == sum(p.numel() for p in result.model.parameters()) <= result.before


def tiny_transformer(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A small transformer with its inputs, eval mode."""
    import transformers

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    words = {"vocab_size": 40, "max_position_embeddings": 16, "initializer_range": 0.3}
    distil = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "bos_token_id": 1, "eos_token_id": 1}
    llama = {**shape, "num_key_value_heads": 2, "hidden_act": "silu"}
    torch.manual_seed(0)
    model: Any
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, **words))
    elif name == "roberta":
        config = transformers.RobertaConfig(**shape, **{**words, "max_position_embeddings": 20})
        model = transformers.RobertaForMaskedLM(config)
    elif name == "distilbert":
        model = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**distil, **words))
    elif name == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, **words))
    elif name == "llama":
        config = transformers.LlamaConfig(**llama, **words, bos_token_id=1, eos_token_id=1, pad_token_id=0)
        model = transformers.LlamaForCausalLM(config)
    elif name == "transformer":
        model = Transformer(40, width=16, layers=2, width_ffn=36, activation="swiglu", causal=True, tied=True)
    elif name == "sentence":
        model = SentenceEncoder(transformers.BertModel(transformers.BertConfig(**shape, **words)))
    else:
        config = transformers.ViTConfig(**shape, image_size=8, patch_size=4, initializer_range=0.3, num_labels=3)
        return transformers.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 8, 8)}
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) / 4)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    return model.eval(), {"input_ids": torch.randint(2, 40, (2, 6)), "attention_mask": mask}
