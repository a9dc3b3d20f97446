"""Adapters are merged into a network that stays sparse."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from prune import Masks, Pruner, merge_adapters
from tests.helpers.adapters import adapted
from tests.helpers.transformers_training import bert

CONFIGS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "dense"]),
    "DoRA": peft.LoraConfig(target_modules=["query"], use_dora=True),
    "IA3": peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
}


def trained(config: Any) -> Any:
    """Its adapters are somewhere."""
    model = adapted(bert(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.add_(torch.rand_like(parameter))
    return model


@pytest.mark.filterwarnings("ignore:.*matrices that stay dense")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_comes_out_is_the_network_under_its_masks(config: Any) -> None:
    model = trained(config)
    masks = Pruner()(model, 0.3)
    masks.apply(model)
    dense = copy.deepcopy(model).merge_and_unload()
    merged = merge_adapters(model, masks)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in bert().named_parameters()]
    assert masks.is_applied_to(merged)
    for name, weight in merged.named_parameters():
        expected = dense.get_parameter(name)
        assert torch.equal(weight, expected * masks[name] if name in masks else expected), name


def test_what_cannot_be_merged() -> None:
    masks = Masks({"weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="this Linear has no adapters of PEFT"):
        merge_adapters(nn.Linear(2, 2), masks)
    prompts = peft.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=3, token_dim=4, num_attention_heads=2, num_layers=1
    )
    with pytest.raises(ValueError, match="are not part of a layer's weights"):
        merge_adapters(adapted(bert(), prompts), masks)


@pytest.mark.filterwarnings("ignore:.*matrices that stay dense")
def test_adapters_are_pruned_where_nothing_else_is_named() -> None:
    model = trained(CONFIGS["LoRA"])
    own = list(Pruner()(bert(), 0.5))
    assert list(Pruner()(model, 0.5)) == list(Pruner(include="*")(model, 0.5)) == own
    assert all("lora_A" in name for name in Pruner(include="*lora_A*")(model, 0.5))
