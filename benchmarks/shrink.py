"""What is left of a pruned network once it is made physically smaller: parameters, FLOPs, latency, the same outputs.

    python benchmarks/shrink.py [--only resnet,bert] [--seconds 2]

Every family twice: half of its channels, heads and feed-forward units pruned (`prune.Coupled`, by magnitude, uniformly
over layers), and 98% of its weights pruned one by one (random, ERK), where only units go that happen to be dead. Random
weights, moved away from their initial statistics. FLOPs are of one sample; latency is of a batch of 8, one thread,
masked over shrunk, the median of pairs taken in turns with quartiles (`prune.accounting.compare_latency`). The
difference is the largest between outputs of the masked network and the smaller one; the largest output is beside it.
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prune import Coupled, Masks, Pruner, shrink
from prune.accounting import account, compare_latency
from workbench.models import MLP, LeNet5, ResNet


def vgg() -> nn.Module:
    """VGG-11 with batch norm for 32x32 images."""
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 10))


class Inverted(nn.Module):
    """MobileNetV2's block: wider, depthwise, narrower, with a shortcut where shapes agree."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 6 * before
        self.branch = nn.Sequential(
            *(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)),
        )
        self.adds = stride == 1 and before == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.adds else self.branch(x)


def mobile() -> nn.Module:
    """A MobileNetV2 for 32x32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    before = 32
    for width, count, stride in ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2)):
        for number in range(count):
            layers.append(Inverted(before, width, stride if number == 0 else 1))
            before = width
    layers += [nn.Conv2d(before, 640, 1, bias=False), nn.BatchNorm2d(640), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(640, 10))


def transformer(name: str) -> nn.Module:
    """Six layers of width 384, as MiniLM has them."""
    import transformers as t

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    if name == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**shape, vocab_size=8000))
    if name == "distilbert":
        config = t.DistilBertConfig(dim=384, n_layers=6, n_heads=12, hidden_dim=1536, vocab_size=8000)
        return t.DistilBertForSequenceClassification(config)
    if name == "gpt2":
        config = t.GPT2Config(n_embd=384, n_layer=6, n_head=12, vocab_size=8000, bos_token_id=0, eos_token_id=0)
        return t.GPT2LMHeadModel(config)
    return t.ViTForImageClassification(t.ViTConfig(**shape, image_size=64, patch_size=8, num_labels=10))


def images(channels: int, size: int) -> Callable[[int], Any]:
    return lambda batch: torch.randn(batch, channels, size, size)


def tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 8000, (batch, 64)), "attention_mask": torch.ones(batch, 64, dtype=torch.long)}


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "mlp": (lambda: MLP(784, (1000, 1000)), lambda batch: torch.randn(batch, 784)),
    "lenet": (LeNet5, images(1, 28)),
    "resnet": (lambda: ResNet(20, 16), images(3, 32)),
    "resnet_group": (lambda: ResNet(20, 16, norm="group"), images(3, 32)),
    "vgg": (vgg, images(3, 32)),
    "mobile": (mobile, images(3, 32)),
    "bert": (lambda: transformer("bert"), tokens),
    "distilbert": (lambda: transformer("distilbert"), tokens),
    "gpt2": (lambda: transformer("gpt2"), tokens),
    "vit": (lambda: transformer("vit"), lambda batch: {"pixel_values": torch.randn(batch, 3, 64, 64)}),
}
ROW = "{:<13} {:<8} {:>11} {:>11} {:>6} {:>9} {:>9} {:>6}  {:<20} {:>9} {:>8} {:>5}"


def moved(model: nn.Module, inputs: Any) -> nn.Module:
    """With biases and statistics as after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 10)
        model.train()
        for _ in range(3):
            model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return model.eval()


def answer(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Any = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found if isinstance(found, Tensor) else found.logits


def measure(name: str, seconds: float) -> None:
    build, draw = FAMILIES[name]
    torch.manual_seed(0)
    inputs, one = draw(8), draw(1)
    model = moved(build(), inputs)
    arms = {
        "coupled": Pruner("magnitude", Coupled(one), "uniform"),
        "98%": Pruner("random", "unstructured", "erk"),
    }
    for arm, pruner in arms.items():
        masks: Masks = pruner(model, 0.5 if arm == "coupled" else 0.02)
        masks.apply(masked := copy.deepcopy(model))
        began = time.perf_counter()
        result = shrink(model, one, masks)
        took = time.perf_counter() - began
        costs = [account(network, one).dense_flops for network in (masked, result.model)]
        speed = compare_latency(masked, result.model, inputs, min_run_time=seconds)
        expected = answer(masked, inputs)
        apart = float((answer(result.model.eval(), inputs) - expected).abs().max())
        print(
            ROW.format(
                name,
                arm,
                f"{result.before:,}",
                f"{result.after:,}",
                f"{result.before / result.after:.2f}",
                f"{costs[0] / 1e6:.2f}M",
                f"{costs[1] / 1e6:.2f}M",
                f"{costs[0] / costs[1]:.2f}",
                f"{speed.ratio:.2f} ({speed.low:.2f} to {speed.high:.2f})",
                f"{apart:.1e}",
                f"{float(expected.abs().max()):.1e}",
                f"{took:.0f}s",
            ),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAMILIES), help="families, comma-separated")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring latency, a row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    heads = ("params", "after", "x", "FLOPs", "after", "x", "latency x (quartiles)", "diff", "output", "took")
    print(ROW.format("family", "pruned", *heads))
    for name in options.only.split(","):
        measure(name, options.seconds)


if __name__ == "__main__":
    main()
