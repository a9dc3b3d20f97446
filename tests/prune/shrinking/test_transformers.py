"""Heads and feed-forward units of transformers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prune.masks import Masks
from prune.shrinking import Coupled, shrink
from prune.structures import FFN
from tests.helpers.shrinkable_models import coupled, masked, sparse, tiny_transformer, weights
from workbench import load, save

TRANSFORMERS = ["bert", "roberta", "distilbert", "gpt2", "llama", "vit", "sentence", "transformer"]


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = copy.deepcopy(model).eval()(**inputs)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_heads_and_feed_forward_units_of_transformers_go(name: str, tmp_path: Path) -> None:
    model, inputs = tiny_transformer(name)
    heads = 2 if name == "llama" else 4
    masks = coupled(model, inputs)
    result = shrink(model, inputs, masks)
    fresh = {**inputs, **({"input_ids": torch.randint(2, 40, (2, 6))} if "input_ids" in inputs else {})}
    torch.testing.assert_close(answer(result.model, fresh), answer(masked(model, masks), fresh), rtol=1e-4, atol=1e-5)
    assert result.masks is not None
    assert result.masks.density == 1.0, "all that was pruned is gone"
    units = Coupled(inputs).layout(result.model, weights(result.model)).units
    assert sorted(units.values())[:2] == [heads // 2] * 2
    assert sorted(units.values())[-2:] == [12, 12]
    result.model.eval()
    save(result.model, tmp_path, result.masks)
    loaded = load(tmp_path)
    assert torch.equal(answer(loaded, fresh), answer(result.model, fresh))
    assert "config" not in str(result.model.resized)
    again = shrink(loaded, inputs)
    assert again.after == result.after
    assert again.model.resized == result.model.resized


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_unstructured_zeros_of_transformers(name: str) -> None:
    model, inputs = tiny_transformer(name)
    masks = sparse(model, 0.04)
    result = shrink(model, inputs, masks)
    torch.testing.assert_close(answer(result.model, inputs), answer(masked(model, masks), inputs), rtol=1e-4, atol=1e-5)
    assert result.after < result.before
    assert result.masks is not None
    assert result.masks.is_applied_to(result.model)
    if name == "gpt2":
        assert result.model.lm_head.weight is result.model.transformer.wte.weight


def test_a_head_of_constant_values_is_folded_into_the_output() -> None:
    model, inputs = tiny_transformer("bert")
    attention = model.bert.encoder.layer[1].attention
    with torch.no_grad():
        attention.self.value.weight[4:8] = 0
        model.bert.encoder.layer[0].attention.self.query.weight[8:12] = 0
        model.bert.encoder.layer[0].attention.self.query.bias[8:12] = 0
    result = shrink(model, inputs)
    assert set(result.removed) == {f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")}
    smaller = result.model.bert.encoder.layer[1].attention
    assert (smaller.self.num_attention_heads, smaller.self.all_head_size) == (3, 12)
    assert not torch.equal(smaller.output.dense.bias, attention.output.dense.bias)
    torch.testing.assert_close(answer(result.model, inputs), answer(model, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "vit", "llama"])
def test_equal_widths_become_the_configuration_s_own(name: str, tmp_path: Path) -> None:
    """Then plain `from_pretrained` loads it, and nothing needs to be said beside."""
    model, inputs = tiny_transformer(name)
    all_weights = weights(model)
    layout = FFN().layout(model, all_weights)
    scores = layout.pool({n: w.detach().abs() for n, w in all_weights.items()})
    masks = Masks(layout.spread(layout.select(scores, dict.fromkeys(layout.units, 9), None)))
    result = shrink(model, inputs, masks)
    assert not hasattr(result.model, "resized")
    result.model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded, inputs), answer(result.model, inputs))
    assert 9 in (loaded.config.to_dict().get(field) for field in ("intermediate_size", "hidden_dim", "n_inner"))
    assert 24 in (model.config.to_dict().get(field) for field in ("intermediate_size", "hidden_dim", "n_inner"))


def test_unequal_widths_are_noted_layer_by_layer() -> None:
    model, inputs = tiny_transformer("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[:, :7] = 0
    result = shrink(model, inputs)
    assert result.model.config.intermediate_size == 24
    assert result.model.resized == {
        "bert.encoder.layer.1.intermediate.dense": {"out_features": 17},
        "bert.encoder.layer.1.output.dense": {"in_features": 17},
    }


def test_tied_embeddings_are_untouched() -> None:
    model, inputs = tiny_transformer("gpt2")
    with torch.no_grad():
        model.lm_head.weight[:, 3] = 0
        model.transformer.wte.weight[5] = 0
    result = shrink(model, inputs)
    assert result.after == result.before
    assert result.model.lm_head.weight is result.model.transformer.wte.weight


def test_a_bias_that_from_pretrained_would_lose_is_not_made() -> None:
    """Qwen's values have biases, which a head of zeros hands on; what reads them has none."""
    import transformers

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    config = transformers.Qwen2Config(**shape, num_key_value_heads=4, vocab_size=40, max_position_embeddings=16)
    model: Any = transformers.Qwen2ForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight[:8] = 0
        attention.v_proj.bias[:4] = 1.0
    inputs = {"input_ids": torch.randint(2, 40, (2, 6))}
    result = shrink(model, inputs)
    assert set(result.removed.values()) == {(4, 5, 6, 7)}, "the head that is 0 goes, the other stays"
    assert result.model.model.layers[0].self_attn.o_proj.bias is None
    torch.testing.assert_close(answer(result.model, inputs), answer(model, inputs), rtol=1e-5, atol=1e-6)
