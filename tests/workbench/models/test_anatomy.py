from typing import Any

import pytest
import transformers as hf
from torch import nn

from workbench.models import Transformer
from workbench.models.anatomy import ANATOMIES, anatomy_of, at, layers_of

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, Any] = {
    "BERT": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, vocab_size=9)),
    "RoBERTa": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES, vocab_size=9)),
    "DistilBERT": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=4, vocab_size=9)
    ),
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=16, n_inner=24, n_layer=2, n_head=4, vocab_size=9, bos_token_id=0, eos_token_id=0)
    ),
    "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4)),
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=6, vocab_size=9)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found_with_its_parts(family: str) -> None:
    model = FAMILIES[family]()
    anatomy = anatomy_of(model)
    assert anatomy is not None
    found = list(layers_of(model))
    assert [layer.anatomy for layer in found] == [anatomy] * 2
    assert [layer.width for layer in found] == [6 if family == "Llama" else 4] * 2
    for number, (path, module, _, _) in enumerate(found):
        assert path.endswith(f"{anatomy.layers}.{number}")
        assert module is model.get_submodule(path)
        parts: list[Any] = [at(module, part) for part in anatomy.parts]
        assert all(part.weight.dim() == 2 for part in parts)
        weights = [parameter for parameter in module.parameters() if parameter.dim() == 2]
        assert len(parts) == len(weights), "and it has no other matrix"
    assert (anatomy.gate is not None) == (family == "Llama")


@pytest.mark.parametrize("gated", [True, False])
def test_our_own_transformer_is_found_with_its_parts(gated: bool) -> None:
    model = Transformer(9, width=16, layers=2, heads=2, width_ffn=24, gated=gated)
    found = list(layers_of(nn.Sequential(model)))
    assert [(layer.path, layer.width) for layer in found] == [("0.layers.0", 8), ("0.layers.1", 8)]
    for layer in found:
        weights = {name.removesuffix(".weight") for name, p in layer.module.named_parameters() if p.dim() == 2}
        assert weights == set(layer.anatomy.parts)
        assert (layer.anatomy.gate is not None) == gated
    assert anatomy_of(model) is None, "it has no configuration of transformers"


def test_layers_are_found_wherever_the_transformer_is() -> None:
    inner = FAMILIES["BERT"]()
    assert [layer.path for layer in layers_of(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"net": inner})))] == [
        f"1.net.bert.encoder.layer.{number}" for number in range(2)
    ]
    [layer] = layers_of(inner.bert.encoder.layer[0])
    assert (layer.path, layer.width) == ("", 4)


def test_what_is_no_transformer_has_no_anatomy() -> None:
    convolutional = hf.ResNetModel(hf.ResNetConfig(depths=[1], hidden_sizes=[4], embedding_size=4))
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), convolutional):
        assert anatomy_of(model) is None
        assert list(layers_of(model)) == []
    assert at(nn.Linear(2, 2), "weight.x") is None


def test_heads_of_unknown_width() -> None:
    def built(path: str, parent: nn.Module) -> nn.Module:
        name, _, rest = path.partition(".")
        if not rest:
            parent.add_module(name, nn.Linear(4, 4))
        else:
            if name not in dict(parent.named_children()):
                parent.add_module(name, nn.Module())
            built(rest, parent.get_submodule(name))
        return parent

    bare = nn.Module()
    for part in ANATOMIES[0].parts:
        built(part, bare)
    with pytest.raises(ValueError, match="the width of the heads of 'x' is unknown"):
        list(layers_of(nn.ModuleDict({"x": bare})))
