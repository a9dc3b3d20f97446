import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel

from workbench import load, save
from workbench.models import SentenceEncoder
from workbench.models.activations import swap_activation
from workbench.models.architecture import describe
from workbench.models.encoder import pool, sentence_encoder

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

    assert describe(SentenceEncoder(Closed(3))) is None, "its arguments are not recorded"


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
        with pytest.raises(ValueError, match=rf"needs {', '.join(kinds) or 'nothing'}; only Transformer, Pooling"):
            sentence_encoder(sentence_folder(folder, mean, kinds))
    for pooling, found in (({}, "nothing"), ({**mean, "pooling_mode_max_tokens": True}, "pooling_mode_mean_tokens, p")):
        with pytest.raises(ValueError, match=f"pools by {found}"):
            sentence_encoder(sentence_folder(folder, pooling))
    (folder / "modules.json").write_text("{")
    with pytest.raises(ValueError, match="give a folder that sentence-transformers saved"):
        sentence_encoder(folder)
