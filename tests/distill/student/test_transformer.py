"""Transformers cut from a teacher: layers, heads, hidden and feed-forward units."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import workbench.launcher.arguments  # noqa: F401 - makes Source known to parsers
from distill.student import cut_student
from workbench.checkpoints import compact
from workbench.models import MLP, LeNet5, SentenceEncoder
from workbench.models.activations import swap_activation

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {"vocab_size": 20, "max_position_embeddings": 16, "pad_token_id": 0}
IMAGE = {"image_size": 8, "patch_size": 4}
DISTIL = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
DISTIL["intermediate_size"] = "hidden_dim"
GPT = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
GPT |= {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}

# Class -> its configuration's class, names of sizes where they differ, and what else it takes.
FAMILIES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "BertModel": ("BertConfig", {}, TEXT),
    "BertForMaskedLM": ("BertConfig", {}, TEXT),
    "BertForPreTraining": ("BertConfig", {}, TEXT),
    "BertForSequenceClassification": ("BertConfig", {}, TEXT),
    "RobertaForMaskedLM": ("RobertaConfig", {}, TEXT),
    "RobertaForSequenceClassification": ("RobertaConfig", {}, TEXT),
    "DistilBertForMaskedLM": ("DistilBertConfig", DISTIL, TEXT),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTIL, TEXT),
    "GPT2Model": ("GPT2Config", GPT, TEXT | TOKENS),
    "GPT2LMHeadModel": ("GPT2Config", GPT, TEXT | TOKENS),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT, TEXT | TOKENS),
    "ViTModel": ("ViTConfig", {}, IMAGE),
    "ViTForImageClassification": ("ViTConfig", {}, IMAGE),
    "ViTForMaskedImageModeling": ("ViTConfig", {}, IMAGE | {"encoder_stride": 4}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str, **changes: Any) -> Any:
    """A teacher whose biases and norms are not just 0 and 1."""
    config, names, more = FAMILIES[family]
    given = {names.get(name, name): value for name, value in {**SIZES, **more, **changes}.items()}
    torch.manual_seed(0)
    model = getattr(hf, family)(getattr(hf, config)(**given))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model.double().eval()


def ask(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    if model.config.model_type == "vit":
        return model(torch.randn(3, 3, 8, 8, generator=generator, dtype=dtype))[0]
    return model(torch.randint(1, 20, (3, 7), generator=generator))[0]


@every_family
def test_a_student_of_everything_is_the_teacher(family: str) -> None:
    teacher = make(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.requires_grad_(False)
    state = torch.get_rng_state()
    student: Any = cut_student(teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(student) is type(teacher)
    assert student.training
    assert not teacher.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    student.eval()
    with torch.no_grad():
        assert torch.equal(ask(student), ask(teacher))
        for parameter in student.parameters():
            parameter.add_(1)  # nothing is shared
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def renamed(name: str, chosen: list[int]) -> str:
    return re.sub(r"((?:^|\.)(?:layer|layers|h)\.)(\d+)\.", lambda m: f"{m[1]}{chosen[int(m[2])]}.", name, count=1)


@pytest.mark.parametrize(
    ("given", "chosen"), [({"layers": [1, 3]}, [1, 3]), ({"every": 2}, [0, 2]), ({"every": 3}, [0, 3])]
)
@every_family
def test_layers_are_copied_exactly(family: str, given: dict[str, Any], chosen: list[int]) -> None:
    teacher = make(family)
    student: Any = cut_student(teacher, **given)
    assert student.config.num_hidden_layers == len(chosen)
    assert teacher.config.num_hidden_layers == 4
    state = teacher.state_dict()
    found = {renamed(name, chosen) for name in student.state_dict()}
    gone = set(range(4)) - set(chosen)
    assert found == {name for name in state if not re.search(rf"(^|\.)(layer|layers|h)\.{sorted(gone)}\.", name)}
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, state[renamed(name, chosen)]), name
    ask(student).sum().backward()


PARTS = {
    "bert": ("query|key", "value", "attention.output.dense", "intermediate.dense", r"\d+\.output.dense"),
    "distilbert": ("q_lin|k_lin", "v_lin", "out_lin", "lin1", "lin2"),
    "gpt2": ("c_attn", "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
    "vit": ("q_proj|k_proj", "v_proj", "o_proj", "fc1", "fc2"),
}


UNITS = torch.tensor([1, 2, 5, 7, 8, 11, 12, 14])  # hidden; each has a twin that nobody reads


TWIN = torch.tensor([0, 3, 4, 6, 9, 10, 13, 15])


FFN = torch.tensor([0, 3, 4, 9, 10, 23])


def widened(small: Any, big: Any, heads: list[int], pairs: list[int], values: list[int]) -> Any:
    """``big``, with weights that make it compute what ``small`` does.

    Hidden units come twice, which leaves every mean and variance of a norm as it was; feed-forward units, heads and
    dimensions of heads beyond those of ``small`` are zero.
    """
    width, narrow = 16 // 4, 8 // len(heads)
    rows = torch.tensor([head * width + pair for head in heads for pair in pairs])
    other = torch.tensor([head * width + value for head in heads for value in values])
    query, value, output, up, down = PARTS[big.config.model_type]
    state = small.state_dict()
    with torch.no_grad():
        for name, target in big.named_parameters():
            tensor = state[name].clone()
            conv = big.config.model_type == "gpt2" and re.search(r"\.c_", name) and tensor.dim() == 2
            tensor = tensor.T if conv else tensor
            target.zero_()
            view = target.T if conv else target
            ins: Tensor = UNITS
            outs: Any = None  # hidden
            if re.search(f"{query}|{value}|c_attn", name):
                if big.config.model_type == "gpt2":
                    outs = torch.cat([rows, rows + 16, other + 32])
                else:
                    outs = other if re.search(value, name) else rows
                if re.search("c_attn", name):
                    tensor[:8] *= (width / narrow) ** 0.5
                elif re.search("query|q_lin|q_proj", name):
                    tensor *= (width / narrow) ** 0.5
            elif re.search(output, name):
                ins = other
            elif re.search(up, name):
                outs = FFN
            elif re.search(down, name):
                ins = FFN
            if "embeddings" in name or re.search("wte|wpe", name):
                if "projection" in name:
                    view[UNITS] = view[TWIN] = tensor
                else:
                    view[..., UNITS] = view[..., TWIN] = tensor
            elif tensor.dim() == 1:
                for units in [outs] if outs is not None else [UNITS, TWIN] if len(tensor) == 8 else [slice(None)]:
                    view[units] = tensor
            else:
                for units in [outs] if outs is not None else [UNITS, TWIN] if len(tensor) == 8 else [slice(None)]:
                    block = view[units].clone()
                    block[:, ins] = tensor
                    view[units] = block
    return big


@pytest.mark.parametrize(
    ("heads", "pairs", "values"), [([0, 1, 2, 3], [1, 2], [0, 3]), ([1, 2], [0, 1, 2, 3], [0, 1, 2, 3])]
)
@pytest.mark.parametrize(
    "family",
    [
        "BertForSequenceClassification",
        "DistilBertForSequenceClassification",
        "GPT2ForSequenceClassification",
        "GPT2LMHeadModel",
        "ViTForImageClassification",
    ],
)
def test_what_matters_is_found_and_the_function_kept(
    family: str, heads: list[int], pairs: list[int], values: list[int]
) -> None:
    """A small model hidden in a large one comes out again: every slice is the right one, in the right order."""
    more = {"tie_word_embeddings": False, "num_hidden_layers": 2}
    small = make(family, **more, hidden_size=8, num_attention_heads=len(heads), intermediate_size=6)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if re.search("(norm|ln_.).*weight", name, re.IGNORECASE):
                parameter.copy_(1 + 0.1 * (parameter - 1))
            if re.search("classifier|score|lm_head", name):  # what tells a unit from its twin
                parameter.mul_(100)
    big = widened(small, make(family, **more), heads, pairs, values)
    with torch.no_grad():
        assert torch.allclose(ask(big), ask(small), atol=1e-8), "the test's own construction"
    student: Any = cut_student(big, hidden=8, heads=len(heads), ffn=6)
    for name, tensor in small.state_dict().items():
        assert torch.allclose(student.state_dict()[name], tensor, atol=1e-12), name
    with torch.no_grad():
        assert torch.allclose(ask(student.eval()), ask(big), atol=1e-8)


@every_family
def test_units_that_do_nothing_go_first(family: str) -> None:
    teacher = make(family)
    *_, up, _ = PARTS["bert" if teacher.config.model_type == "roberta" else teacher.config.model_type]
    dead = [0, 5, 6, 17, 23]
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if re.search(rf"\b(layer|layers|h)\..*({up})", name):
                conv = teacher.config.model_type == "gpt2" and parameter.dim() == 2
                (parameter.T if conv else parameter)[dead] = 0
        expected = ask(teacher)
        student: Any = cut_student(teacher, ffn=19)
        assert torch.allclose(ask(student.eval()), expected, atol=1e-12)
        assert not torch.allclose(ask(cut_student(teacher, ffn=18).eval()), expected, atol=1e-12)


def test_importance_beats_chance() -> None:
    """Feed-forward units of many sizes: keeping the large ones stays nearer to the teacher than any random choice."""
    teacher = make("BertForSequenceClassification")
    sizes = torch.logspace(0, -3, 24, dtype=torch.float64)
    shuffled = [torch.randperm(24, generator=torch.Generator().manual_seed(layer)) for layer in range(4)]
    with torch.no_grad():
        for layer, order in zip(teacher.bert.encoder.layer, shuffled):
            layer.output.dense.weight.mul_(sizes[order])
        student: Any = cut_student(teacher, ffn=8)
        error = (ask(student.eval()) - ask(teacher)).square().mean()
        for seed in range(5):
            chance: Any = copy.deepcopy(student)
            generator = torch.Generator().manual_seed(seed)
            for mine, theirs in zip(chance.bert.encoder.layer, teacher.bert.encoder.layer):
                units = torch.randperm(24, generator=generator)[:8]
                mine.intermediate.dense.weight.copy_(theirs.intermediate.dense.weight[units])
                mine.intermediate.dense.bias.copy_(theirs.intermediate.dense.bias[units])
                mine.output.dense.weight.copy_(theirs.output.dense.weight[:, units])
            assert error < 0.5 * (ask(chance) - ask(teacher)).square().mean()


def test_hidden_units_are_chosen_by_gains_and_embeddings() -> None:
    """Against a loop over units and parameters; the tied decoder counts once, layers that go do not count."""
    teacher = make("BertForMaskedLM")
    gains, norms = [0.0] * 16, [0.0] * 16
    for name, parameter in teacher.named_parameters():
        gone = "layer.1." in name or "layer.3." in name
        for unit in range(16):
            if name.endswith("LayerNorm.weight") and not gone:
                gains[unit] += abs(parameter[unit].item())
            if parameter.dim() == 2 and "layer." not in name:
                norms[unit] += parameter[:, unit].norm().item()
            if "transform.dense.weight" in name:  # from hidden units to hidden units
                norms[unit] += parameter[unit].norm().item()
    expected = sorted(sorted(range(16), key=lambda unit: -gains[unit] * norms[unit])[:8])
    student: Any = cut_student(teacher, every=2, hidden=8)
    words = teacher.bert.embeddings.word_embeddings.weight
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, words[:, expected])
    assert torch.equal(
        student.bert.encoder.layer[1].output.LayerNorm.bias,
        teacher.bert.encoder.layer[2].output.LayerNorm.bias[expected],
    )
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight


CUTS: list[dict[str, Any]] = [
    {"hidden": 8},
    {"heads": 2},
    {"hidden": 6, "heads": 3},
    {"ffn": 5},
    {"layers": [0, 3], "hidden": 12, "heads": 3, "ffn": 20, "activation": "relu"},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@every_family
def test_every_family_runs_saves_and_loads(family: str, cut: dict[str, Any], tmp_path: Path) -> None:
    student: Any = cut_student(make(family).float(), **cut)
    heads = cut.get("heads", 4)
    assert student.config.hidden_size == cut.get("hidden", 4 * heads)
    assert student.config.num_attention_heads == heads
    output = ask(student)
    output.square().mean().backward()
    student.zero_grad(set_to_none=True)
    expected = ask(student.eval()).detach()
    assert expected.isfinite().all()
    if cut == CUTS[-1] or family == "BertModel":
        student.save_pretrained(tmp_path / "hub")
        again = type(student).from_pretrained(tmp_path / "hub")
        assert torch.equal(ask(again), expected)
        assert set(again.state_dict()) == set(student.state_dict())
        compact.save(student, tmp_path / "own")
        assert torch.equal(ask(compact.load(tmp_path / "own")), expected)


def test_queries_of_unscaled_attention_are_left_as_they_are() -> None:
    for scaled, factor in ((True, 0.5**0.5), (False, 1.0)):
        teacher = make("GPT2Model", scale_attn_weights=scaled)
        student: Any = cut_student(teacher, hidden=8)
        query, own = student.h[0].attn.c_attn.weight[:, :8], teacher.h[0].attn.c_attn.weight[:, :16]
        kept = [int((student.wte.weight[:, [unit]] == teacher.wte.weight).all(0).nonzero()) for unit in range(8)]
        assert all(((own[kept] * factor - query[:, [unit]]).abs().amax(0) < 1e-12).any().item() for unit in range(8))


def test_attention_scaled_by_layer_stays_so() -> None:
    """GPT-2 may divide the scores by the layer's number, which changes for a layer that moves down."""
    teacher = make("GPT2Model", scale_attn_by_inverse_layer_idx=True, num_hidden_layers=3)
    student: Any = cut_student(teacher, layers=[0, 2]).eval()
    with torch.no_grad():
        for part in (teacher.h[1].attn.c_proj, teacher.h[1].mlp.c_proj):
            part.weight.zero_()
            part.bias.zero_()
        assert torch.allclose(ask(student), ask(teacher), atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_rest_of_the_configuration_stays(attention: str) -> None:
    teacher = make("BertForSequenceClassification", id2label={0: "no", 1: "yes", 2: "perhaps"})
    teacher.set_attn_implementation(attention)
    student: Any = cut_student(teacher, every=2)
    assert student.config._attn_implementation == attention
    assert student.config.id2label == teacher.config.id2label
    assert student.config is not teacher.config
    assert ask(student).shape == (3, 3)


def test_parts_that_the_teacher_lacks_are_lacking() -> None:
    config = make("BertModel").config
    teacher = hf.BertModel(config, add_pooling_layer=False).eval()
    student: Any = cut_student(teacher, every=2)
    assert student.pooler is None
    assert torch.equal(ask(cut_student(teacher).eval()), ask(teacher))


def test_precision_and_generation_settings_are_the_teachers() -> None:
    teacher = make("GPT2LMHeadModel").bfloat16()
    teacher.generation_config.max_length = 11
    student: Any = cut_student(teacher, hidden=8)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.generation_config.max_length == 11
    assert student.lm_head.weight is student.transformer.wte.weight


def test_another_activation_and_one_that_no_configuration_can_name(tmp_path: Path) -> None:
    teacher = make("BertForSequenceClassification")
    student: Any = cut_student(teacher, every=2, activation="relu")
    assert isinstance(student.bert.encoder.layer[0].intermediate.intermediate_act_fn, nn.ReLU)
    assert isinstance(student.bert.pooler.activation, nn.Tanh)
    assert student.config.hidden_act == "relu"
    assert teacher.config.hidden_act == "gelu"
    swap_activation(teacher, "elu")
    student = cut_student(teacher)
    assert isinstance(student.bert.encoder.layer[0].intermediate.intermediate_act_fn, nn.ELU)
    assert torch.equal(ask(student.eval()), ask(teacher))
    compact.save(student, tmp_path)
    assert torch.equal(ask(compact.load(tmp_path)), ask(teacher))


def test_ties_go_to_the_lower_index() -> None:
    teacher = make("BertForSequenceClassification")
    with torch.no_grad():
        for layer in teacher.bert.encoder.layer:
            layer.intermediate.dense.weight.fill_(0.5)
            layer.intermediate.dense.bias.copy_(torch.arange(24) % 2)
            layer.output.dense.weight.copy_(1 + torch.arange(24).remainder(2).expand(16, 24))
    student: Any = cut_student(teacher, ffn=14)
    bias = student.bert.encoder.layer[0].intermediate.dense.bias
    assert bias.tolist() == [0, 1, 0, 1, *[1] * 10]  # all 12 odd ones, the first two even ones, in their order


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layers": [0, 4]}, "no layer 4, only 0 to 3"),
    ({"layers": [-1]}, "no layer -1"),
    ({"layers": [1, 1]}, "each once and in ascending order"),
    ({"layers": [2, 1]}, "ascending order"),
    ({"layers": []}, "at least one"),
    ({"layers": [0], "every": 2}, "give one of them"),
    ({"every": 0}, "every=0: the teacher has 4 layers, give 1 to 4"),
    ({"every": 5}, "every=5"),
    ({"hidden": 9}, "hidden=9 is not divisible by 4 heads: give heads=3, or hidden as a multiple of 4"),
    ({"hidden": 10}, "hidden=10 is not divisible by 4 heads: give hidden as a multiple of 4"),
    ({"hidden": 7, "heads": 2}, "hidden=7 is not divisible by 2 heads"),
    ({"hidden": 17}, "hidden=17: the teacher has 16"),
    ({"hidden": 0}, "hidden=0"),
    ({"hidden": [8, 8]}, "one hidden size"),
    ({"hidden": 16, "heads": 2}, "a head 8 wide.*the teacher's are 4: give hidden=8 or less"),
    ({"heads": 5}, "heads=5: the teacher has 4"),
    ({"ffn": 25}, "ffn=25: the teacher has 24"),
    ({"activation": "cube"}, "cube"),
]


@pytest.mark.parametrize(("cut", "message"), REFUSED, ids=str)
def test_what_cannot_be_cut(cut: dict[str, Any], message: str) -> None:
    for family in ("BertModel", "GPT2Model"):
        with pytest.raises(ValueError, match=message):
            cut_student(make(family), **cut)


def test_models_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="layers=\\[0\\]: of a LeNet5 can be changed activation"):
        cut_student(LeNet5(), layers=[0])
    with pytest.raises(ValueError, match=r"hidden=8, heads=2: of a Sequential can be changed activation"):
        cut_student(nn.Sequential(nn.Linear(2, 2)), hidden=8, heads=2)
    with pytest.raises(ValueError, match="cross-attention"):
        cut_student(make("GPT2Model", add_cross_attention=True), hidden=8)
    with pytest.raises(ValueError, match="ffn=3: of a MLP"):
        cut_student(MLP(), ffn=3)
    teacher = make("BertModel")
    teacher.embeddings.extra = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"'embeddings.extra.bias' is only in one of them: give a plain"):
        cut_student(teacher)
    teacher = make("BertModel")
    teacher.encoder.layer[1].output.dense = nn.Sequential(teacher.encoder.layer[1].output.dense)
    with pytest.raises(ValueError, match=r"layer.1.output.dense.* is only in one of them"):
        cut_student(teacher, layers=[1, 2])
    teacher = make("BertForMaskedLM")
    teacher.cls.predictions.decoder.weight = nn.Parameter(torch.randn(20, 16).double())
    with pytest.raises(ValueError, match="ties"):
        cut_student(teacher)


def test_layers_may_go_with_cross_attention() -> None:
    teacher = make("GPT2Model", add_cross_attention=True)
    student: Any = cut_student(teacher, layers=[1, 2])
    other = student.h[0].crossattention.q_attn.weight
    assert torch.equal(other, teacher.h[1].crossattention.q_attn.weight)


def test_the_encoder_of_sentences_is_cut_inside_its_wrapping() -> None:
    teacher = SentenceEncoder(make("BertModel"), pooling="cls", normalize=False).eval()
    student: Any = cut_student(teacher, layers=[1, 3], hidden=8)
    assert isinstance(student, SentenceEncoder)
    assert student.training
    assert (student.pooling, student.normalize) == ("cls", False)
    assert student(torch.randint(1, 20, (3, 7))).shape == (3, 8)
    kept, own = student.encoder.encoder.layer[1].output.dense.bias, teacher.encoder.encoder.layer[3].output.dense.bias
    assert set(kept.tolist()) < set(own.tolist())
