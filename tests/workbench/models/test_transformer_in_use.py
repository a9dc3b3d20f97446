"""The transformer in everything that takes a network."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from distill import DistillModule, SoftTargets, cut_student
from prune import Masks, Pruner, shrink
from prune.pruner.scope import prunable
from prune.structures import structure_named
from tests.helpers.tiny_transformers import KINDS, TINY, built, inputs_for
from tests.helpers.trainers import QUIET
from workbench import load, save
from workbench.models import Transformer
from workbench.models.activations import swap_activation
from workbench.models.transformer.layers import Attention
from workbench.tasks import Classification, LanguageModelling
from workbench.training.module import TaskModule


@pytest.mark.parametrize("kind", KINDS)
def test_model_from_its_own_init_args(kind: str, tmp_path: Path) -> None:
    model, x = built(kind), inputs_for(kind)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    wanted = {"class_path": "workbench.models.Transformer", "init_args": json.loads(json.dumps(model.init_args))}
    again = parser.instantiate(parser.parse_object({"model": wanted})).model.double().eval()
    assert again.init_args == model.init_args
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    save(model, tmp_path)
    loaded: Any = load(tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert (loaded.head.weight is loaded.embedding.weight) == (kind == "tied")
    assert {p.data_ptr() for p in model.parameters()} != {p.data_ptr() for p in again.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_another_activation_is_swapped_in_and_remembered(kind: str, tmp_path: Path) -> None:
    model, x = swap_activation(built(kind), "tanh"), inputs_for(kind)
    assert model.init_args["gated"] == ("glu" in KINDS[kind].get("activation", ""))
    assert not torch.allclose(model(x), swap_activation(built(kind), "silu")(x))
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_pure(kind: str) -> None:
    models = [built(kind) for _ in range(3)]
    x = inputs_for(kind)
    before = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
    one = functional_call(models[0], dict(models[1].named_parameters()), (x,))
    torch.testing.assert_close(one, models[1](x))
    stacked, buffers = stack_module_state(models)
    with sdpa_kernel(SDPBackend.MATH):  # torch has no batched form of the CPU's fused kernel, and warns
        together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(stacked, buffers)
    for answer, model in zip(together, models):
        torch.testing.assert_close(answer, model(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in models[0].state_dict().items())


def test_only_the_activation_of_a_student_can_be_cut() -> None:
    model, x = built("causal"), inputs_for("causal")
    student: Any = cut_student(model, activation="relu")
    assert (student.init_args["activation"], student.init_args["gated"]) == ("relu", True)
    assert torch.equal(student.eval()(x), swap_activation(model, "relu")(x))
    with pytest.raises(ValueError, match=r"layers=\[0\]: of a Transformer can be changed activation"):
        cut_student(model, layers=[0])


def test_dropout_in_training_only() -> None:
    model, x = Transformer(20, **{**TINY, "dropout": 0.5}), torch.randint(0, 20, (2, 7))
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(1)
    one = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), one)
    assert torch.equal(model.eval()(x), model(x))
    attention = Attention(8, 2, dropout=0.5)
    y = torch.randn(1, 5, 8)
    assert not torch.equal(attention(y), attention(y)), "its weights, too"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_a_rounded_answer(kind: str, dtype: torch.dtype) -> None:
    model, x = built(kind).float(), inputs_for(kind)
    x = x.float() if x.is_floating_point() else x
    mask = (torch.arange(7) < torch.tensor([[7], [2], [5], [1]])).long()
    exact = model(x, mask)
    half = copy.deepcopy(model).to(dtype)(x.to(dtype) if x.is_floating_point() else x, mask)
    with torch.autocast("cpu", dtype):
        mixed = model(x, mask)
    for found in (half, mixed):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, rtol=0, atol=60 * torch.finfo(dtype).eps)


def batches(kind: str, count: int = 1) -> list[dict[str, Tensor]]:
    found = []
    for _ in range(count):
        ids = torch.randint(1, 20, (8, 7))
        mask = (torch.arange(7) < torch.randint(3, 8, (8, 1))).long()
        labels = {"labels": ids[:, 0] % 3} if "classes" in KINDS[kind] else {}
        found.append({"input_ids": ids * mask, "attention_mask": mask, **labels})
    return found


def fit(module: lp.LightningModule, data: Any, epochs: int) -> lp.Trainer:
    trainer = lp.Trainer(max_epochs=epochs, **QUIET)
    loader = DataLoader(data, batch_size=None)
    trainer.fit(module, loader, loader)
    return trainer


LEARNERS = [("classifier", "gelu"), ("post-norm, first token", "relu"), ("causal", "swiglu"), ("tied", "geglu")]


@pytest.mark.parametrize(("kind", "activation"), LEARNERS)
def test_a_batch_is_learnt_by_heart(kind: str, activation: str) -> None:
    task = Classification(3) if "classes" in KINDS[kind] else LanguageModelling(20)
    model = Transformer(**{**TINY, **KINDS[kind], "activation": activation})
    module = TaskModule(model, task, functools.partial(torch.optim.Adam, lr=1e-2))
    data = batches(kind)
    with torch.no_grad():
        before = float(module.step(data[0]).loss)
    trainer = fit(module, data, 20)
    assert float(trainer.callback_metrics["train/loss"]) < 0.3 * before
    assert trainer.callback_metrics["val/accuracy"] > 0.9
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_series_is_learnt_by_heart() -> None:
    model = Transformer(**{**TINY, **KINDS["series"]})
    x = torch.randn(12, 7, 5)
    module = TaskModule(model, Classification(3), functools.partial(torch.optim.Adam, lr=1e-2))
    trainer = fit(module, [(x, torch.arange(12) % 3)], 20)
    assert trainer.callback_metrics["val/accuracy"] > 0.9


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_a_wider_teacher_is_imitated(kind: str) -> None:
    task = Classification(3) if kind == "classifier" else LanguageModelling(20)
    teacher = Transformer(**{**TINY, **KINDS[kind], "width": 24, "width_ffn": 48})
    student = Transformer(**{**TINY, **KINDS[kind], "width": 8, "heads": 2, "activation": "relu", "gated": False})
    module = DistillModule(student, teacher, task, SoftTargets(2.0, 1.0), functools.partial(torch.optim.Adam, lr=1e-2))
    data = batches(kind)
    with torch.no_grad():
        before = float(module.step(data[0]).loss)
    trainer = fit(module, data, 12)
    assert float(trainer.callback_metrics["train/loss"]) < 0.8 * before


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_pruned_and_embeddings_are_not(kind: str) -> None:
    model = built(kind)
    found = prunable(model)
    layers = [name for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)]
    outside = (["head.weight"] if kind != "tied" else []) + (["embedding.weight"] if kind == "series" else [])
    assert sorted(found) == sorted([*(f"layers.{name}.weight" for name in layers), *outside])
    masks = Pruner()(model, 0.3)
    masks.apply(model)
    assert masks.density == pytest.approx(0.3, abs=1e-3)
    assert model(inputs_for(kind)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["head", "ffn"])
@pytest.mark.filterwarnings("ignore:.*matrices that stay dense.* not covered by")
def test_pruned_heads_and_units_are_taken_out(kind: str, structure: str, tmp_path: Path) -> None:
    model, x = built(kind).float(), inputs_for(kind)
    x = x.float() if x.is_floating_point() else x
    masks = Pruner(structure=structure, allocation="uniform")(model, 0.5)
    units = structure_named(structure).layout(model, prunable(model)).units
    hidden = 16 if "glu" in KINDS[kind].get("activation", "") else 24
    what, count = {"head": ("attention", 4), "ffn": ("ffn", hidden)}[structure]
    assert units == {f"layers.{number}.{what}": count for number in range(2)}
    result = shrink(model, x, masks)
    Masks(masks).apply(model)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert result.masks is not None
    assert result.masks.density == 1.0, "all that was pruned is gone"
    layer: Any = result.model.layers[1]  # type: ignore[index]
    narrow = layer.attention.query if structure == "head" else layer.feed_forward.up
    assert narrow.out_features == {"head": 8, "ffn": hidden // 2}[structure]
    parts = (layer.attention.key, layer.attention.value) if structure == "head" else ()
    gate = getattr(layer.feed_forward, "gate", layer.feed_forward.up)
    assert {part.out_features for part in (narrow, *parts)} == {narrow.out_features}
    assert gate.out_features == layer.feed_forward.up.out_features
    mask = torch.ones(len(x), 7).long()
    mask[0, 3:] = 0
    expected = model(x, mask)
    torch.testing.assert_close(result.model(x, mask), expected, rtol=1e-4, atol=1e-5)
    save(result.model, tmp_path, result.masks)
    assert torch.equal(load(tmp_path)(x, mask), result.model(x, mask))


def test_a_dead_head_goes_into_the_next_bias() -> None:
    model: Any = built("classifier")
    with torch.no_grad():
        model.layers[0].attention.value.weight[4:8] = 0
        model.layers[1].feed_forward.up.weight[5] = 0
    x = inputs_for("classifier")
    mask = (torch.arange(7) < torch.tensor([[7], [2], [5], [1]])).long()
    result = shrink(model, {"input_ids": x, "attention_mask": mask})
    assert {layer: rows for layer, rows in result.removed.items() if layer.endswith(("value", "up"))} == {
        "layers.0.attention.value": (4, 5, 6, 7),
        "layers.1.feed_forward.up": (5,),
    }
    torch.testing.assert_close(result.model(x, mask), model(x, mask))


@pytest.mark.parametrize("kind", ["post-norm, first token", "series", "tied"])
@torch.no_grad()
def test_graphs_take_any_batch_and_length(kind: str) -> None:
    model, x = built(kind).float(), inputs_for(kind)
    x = x.float() if x.is_floating_point() else x
    auto, mask = torch.export.Dim.AUTO, (torch.arange(7) < torch.tensor([[7], [2], [5], [1]])).long()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: auto}
    program = torch.export.export(model, (x, mask), dynamic_shapes=(sizes, sizes)).module()
    for batch, length in ((1, 7), (5, 3), (2, 9)):
        x = inputs_for(kind, batch, length)
        x = x.float() if x.is_floating_point() else x
        mask = torch.ones(batch, length).long()
        mask[0, length // 2 + 1 :] = 0
        torch.testing.assert_close(program(x, mask), model(x, mask))
