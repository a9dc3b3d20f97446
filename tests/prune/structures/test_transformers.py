from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from prune.masks import Masks
from prune.pruner import Pruner, prunable
from prune.structures import FFN, Head, structure_named
from tests.helpers.prunable_models import quiet

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES: dict[str, Any] = {
    "BERT": lambda: hf.BertModel(hf.BertConfig(**SIZES, vocab_size=9)),
    "RoBERTa": lambda: hf.RobertaModel(hf.RobertaConfig(**SIZES, vocab_size=9)),
    "DistilBERT": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=4, vocab_size=9)
    ),
    "GPT-2": lambda: hf.GPT2Model(hf.GPT2Config(**GPT, vocab_size=9)),
    "ViT": lambda: hf.ViTModel(hf.ViTConfig(**SIZES, image_size=8, patch_size=4)),
    "Llama": lambda: hf.LlamaModel(hf.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=9)),
}
LAST = {
    "head": ("output.dense", "out_lin", "c_proj", "o_proj"),
    "ffn": ("output.dense", "lin2", "c_proj", "fc2", "down_proj"),
}


def output(model: Any) -> Tensor:
    inputs = torch.rand(2, 3, 8, 8) if hasattr(model.config, "image_size") else torch.arange(8).view(2, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        return model(inputs).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", ["head", "ffn"])
def test_what_falls_together_only_feeds_what_falls(structure: str, family: str) -> None:
    """Zeroing the columns that read the units alone changes the network as much as zeroing all their weights: so the
    other weights do nothing else, and no weight that does something else is among them."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.dim() == 2:
            nn.init.normal_(parameter)
    dense = output(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = quiet(Pruner(structure=structure), model, 0.5)
    units = {"head": 2 if family == "Llama" else 4, "ffn": 64 if family == "GPT-2" else 24}[structure]
    layout = structure_named(structure).layout(model, prunable(model))
    assert list(layout.units.values()) == [units, units]
    share = {mask.float().mean().item() for name, mask in masks.items() if ".0." in name}
    assert len(share) == 1, "of each matrix of a layer equally much"
    masks.apply(model)
    pruned = output(model)
    model.load_state_dict(before)
    readers = {name: mask for name, mask in masks.items() if name.removesuffix(".weight").endswith(LAST[structure])}
    assert len(readers) == 2
    Masks(readers).apply(model)
    torch.testing.assert_close(output(model), pruned)
    assert not torch.allclose(pruned, dense, atol=1e-3)


def test_weights_that_a_structure_does_not_cover_are_left_out() -> None:
    model = hf.BertForSequenceClassification(hf.BertConfig(**SIZES, vocab_size=9))
    pruner = Pruner(structure="head")
    with pytest.warns(UserWarning, match=r"14.4% .* stay dense: .* and 3 more: not covered by Head"):
        masks = pruner(model, 0.5)
    assert list(masks) == list(pruner.scope(model))
    assert {name.split(".")[4] for name in masks} == {"attention"}
    assert "bert.pooler.dense.weight" in prunable(model)
    with pytest.raises(
        ValueError, match=r"include pattern '\*pooler\*' matches only weights that Head\(\) does not cover"
    ):
        Pruner(structure="head", include=["*attention*", "*pooler*"])(model, 0.5)
    some = quiet(Pruner(structure="ffn", include="*layer.1.*"), model, 0.25)
    assert {name.split(".")[3] for name in some} == {"1"}
    assert set(some.counts().values()) == {(96, 384)}


def test_models_that_hold_a_transformer_are_looked_into() -> None:
    model = nn.ModuleDict({"student": FAMILIES["BERT"](), "teacher": FAMILIES["GPT-2"]()})
    layout = Head().layout(model, prunable(model))
    assert [key.split(".")[0] for key in layout.units] == ["student"] * 2 + ["teacher"] * 2


@pytest.mark.parametrize("structure", [Head(), FFN()], ids=str)
def test_a_network_without_attention_is_refused(structure: Any) -> None:
    with pytest.raises(ValueError, match=r"of a transformer \(BERT, RoBERTa, DistilBERT, GPT-2, ViT, Segformer"):
        Pruner(structure=structure)(nn.Linear(4, 4), 0.5)


def test_the_output_layer_of_the_paper_is_no_attention() -> None:
    """Heads do not cover the classifier, so nothing is pruned at its slower rate; channels do."""
    model = hf.BertForSequenceClassification(hf.BertConfig(**SIZES, vocab_size=9, num_labels=10))
    heads = quiet(Pruner(structure="head", allocation="layerwise"), model, 0.5)
    assert {kept / total for kept, total in heads.counts().values()} == {0.5}
    slow = Pruner(structure="channel", allocation="layerwise")(model, 0.5)
    assert slow.counts()["classifier.weight"] == (7 * 16, 160)


def test_layers_over_the_hidden_units_that_shrink_cannot_follow_are_refused() -> None:
    model = FAMILIES["ViT"]()
    model.layers[0].mlp.norm = nn.LayerNorm(24)
    with pytest.raises(ValueError, match=r"mlp.norm.weight' works on the 24 hidden units between 'mlp.fc1' and"):
        Pruner(structure="ffn").check(model, 0.5)
