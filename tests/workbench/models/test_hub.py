import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from workbench import load, save
from workbench.models.hub import from_config, pretrained

TINY = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
}
IDS = torch.arange(6).reshape(2, 3)


def test_an_untrained_model_from_a_recipe(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    init_args = {"architecture": "BertForSequenceClassification", "config": {**TINY, "num_labels": 5}}
    given = {"class_path": "workbench.models.hub.from_config", "init_args": init_args}
    model = parser.instantiate(parser.parse_object({"model": given})).model.eval()
    assert type(model) is BertForSequenceClassification
    assert len(model.bert.encoder.layer) == 2
    logits = model(input_ids=IDS).logits
    assert logits.shape == (2, 5)
    again = load(save(model, tmp_path))
    assert torch.equal(again(input_ids=IDS).logits, logits)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("BertForSequenceClasification", {}, "no model .*; did you mean 'BertForSequenceClassification'"),
        ("BertConfig", {}, "no model 'BertConfig'"),
        ("nonsense", {}, "no model 'nonsense'"),
        ("AutoModel", {}, "AutoModel is no one model"),
        (
            "BertModel",
            {"num_hidden_layer": 2},
            "BertConfig has no 'num_hidden_layer'; did you mean 'num_hidden_layers'",
        ),
        ("BertModel", {**TINY, "num_attention_heads": 3}, "BertModel cannot be built from"),
    ],
)
def test_models_that_cannot_be_made_are_named(architecture, config, message):
    with pytest.raises(ValueError, match=message):
        from_config(architecture, config)


def test_a_pretrained_model_and_a_new_head(tmp_path):
    source = from_config("BertModel", TINY).eval()
    source.save_pretrained(tmp_path)
    model = pretrained(str(tmp_path))
    assert type(model) is BertModel
    assert model.training
    assert torch.equal(model.eval()(input_ids=IDS).pooler_output, source(input_ids=IDS).pooler_output)
    headed = pretrained(str(tmp_path), "BertForSequenceClassification", {"num_labels": 3}).eval()
    assert headed(input_ids=IDS).logits.shape == (2, 3)
    assert torch.equal(headed.bert.embeddings.word_embeddings.weight, source.embeddings.word_embeddings.weight)


def test_a_model_that_is_not_whole_is_not_filled_with_random_numbers(tmp_path):
    from_config("BertModel", TINY).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for architecture in ("AutoModel", "BertForSequenceClassification"):
        with pytest.raises(ValueError, match=r"lacks 1 weights, such as '.*1\.output\.dense\.weight'"):
            pretrained(str(tmp_path), architecture)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="BertModel cannot be loaded from there"):
        pretrained(str(tmp_path), "BertModel")
