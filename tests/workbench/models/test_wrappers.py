"""Names and modules of a model are those that it has by itself, in every wrapper."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from tests.helpers.adapters import adapted
from tests.helpers.ranks import on_ranks
from tests.helpers.transformers_training import bert
from workbench.models import MLP
from workbench.models.architecture import describe
from workbench.models.wrappers import (
    class_of,
    has_adapters,
    named_modules,
    named_parameters,
    places,
    plain_state,
    submodule,
    unwrap,
    without_prefixes,
    wrapped_parts,
)


class Net(nn.Module):
    """A layer of it is called as DDP calls what it wraps, another one is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 4)
        self.again = self.head

    def forward(self, inputs: Any) -> Any:
        return self.again(self.head(self.module(inputs)))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def in_the_middle(model: Any) -> Any:
    model.module[0] = compiled(model.module[0])
    model.module = checkpoint_wrapper(model.module)
    return model


def fabric(model: nn.Module) -> Any:
    return Fabric(accelerator="cpu", devices=1).setup(model)


WHOLE: dict[str, Callable[[nn.Module], Any]] = {
    "compile": compiled,
    "AveragedModel": AveragedModel,
    "DataParallel": nn.DataParallel,
    "Fabric": fabric,
    "Fabric, compiled": lambda model: fabric(compiled(model)),
    "an average, compiled": lambda model: compiled(AveragedModel(compiled(model))),
}
WRAPPERS = {**WHOLE, "parts": in_the_middle, "parts and Fabric": lambda model: fabric(in_the_middle(model))}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_are_those_of_the_plain_model(wrap: Callable[[nn.Module], Any]) -> None:
    model = Net()
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules, state = [name for name, _ in model.named_modules()], list(model.state_dict())
    wrapped = wrap(model)
    assert list(places(wrapped)) == parameters
    assert [place.path for place in places(wrapped).values()] == [
        name for name, _ in wrapped.named_parameters(remove_duplicate=False) if "_original_module" not in name
    ]
    assert [name for name, _ in named_parameters(wrapped)] == parameters[:-2]
    assert [name for name, _ in named_modules(wrapped)] == modules
    assert set(plain_state(wrapped, wrapped.state_dict())) - {"n_averaged"} == set(state)
    assert isinstance(submodule(wrapped, "module.0"), nn.Linear)
    assert submodule(wrapped, "module.0").weight is places(wrapped)["module.0.weight"].parameter
    assert class_of(wrapped) is Net


@pytest.mark.parametrize("wrap", WHOLE.values(), ids=WHOLE)
def test_a_wrapped_model_is_described_as_the_plain_one(wrap: Callable[[nn.Module], Any]) -> None:
    model = MLP(3, [4], 2)
    assert describe(wrap(model)) == describe(model) is not None
    assert type(unwrap(wrap(model))) is MLP


def test_nothing_is_stripped_by_its_name_alone() -> None:
    model = Net()
    assert unwrap(model) is model
    assert wrapped_parts(model) == []
    assert "module.0.weight" in places(nn.DataParallel(model))
    assert wrapped_parts(in_the_middle(model)) == ["module", "module._checkpoint_wrapped_module.0"]


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"Sequential has no submodule 'body', the model has no 'module.body.0'"):
        submodule(compiled(Net()), "module.body.0")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module._orig_mod.a.module.b", "a.module.b"),
        ("_forward_module.a._orig_mod.b", "a.b"),
        ("base_model.model.a", "a"),
        ("a_orig_mod.b", "a_orig_mod.b"),
    ],
)
def test_names_out_of_files(name: str, plain: str) -> None:
    assert without_prefixes(name) == plain


def _fsdp1(use_orig_params: bool, strategy: str) -> Any:
    import warnings

    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    torch.distributed.init_process_group("gloo")
    warnings.simplefilter("ignore")
    model = FullyShardedDataParallel(
        Net(),
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )
    try:
        return list(places(model)), class_of(model).__name__
    except ValueError as error:
        return str(error)


def test_what_fsdp1_holds_whole_has_names_and_what_it_flattens_is_refused() -> None:
    plain = [name for name, _ in Net().named_parameters(remove_duplicate=False)]
    assert on_ranks(_fsdp1, True, "NO_SHARD", ranks=1) == [(plain, "Net")]
    for refused in on_ranks(_fsdp1, False, "NO_SHARD", ranks=1):
        assert "flat pieces, where masks do not fit: shard the model with torch.distributed.fsdp.fully_shard" in refused


# PEFT


CONFIGS = {
    "LoRA": peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "word_embeddings"]),
    "DoRA": peft.LoraConfig(target_modules=["query"], use_dora=True),
    "IA3": peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
    "AdaLoRA": peft.AdaLoraConfig(total_step=10, target_modules=["query"]),
    "prompts": peft.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=3, token_dim=16, num_attention_heads=2, num_layers=2
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_network_keeps_its_names_under_adapters(config: Any) -> None:
    plain, model = bert(), adapted(bert(), config)
    names = [name for name, _ in plain.named_parameters()]
    assert set(names) <= set(places(model))
    assert {place.path for place in places(model).values()} == {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
    assert class_of(model) is type(plain)
    assert has_adapters(model)
    assert not has_adapters(plain)
    assert describe(model) is None  # its class makes no adapters
    for name in names:
        assert torch.equal(places(model)[name].parameter, plain.get_parameter(name)), name


def test_a_copy_that_is_trained_in_place_of_a_layer_has_its_name() -> None:
    model = adapted(bert(), CONFIGS["LoRA"])
    assert places(model)["classifier.weight"].path == "base_model.model.classifier.modules_to_save.default.weight"
    assert places(model)["classifier.original_module.weight"].parameter.requires_grad is False


def test_a_layer_with_adapters_is_the_layer_or_the_sum_of_both() -> None:
    model, path = adapted(bert(), CONFIGS["LoRA"]), "bert.encoder.layer.0.attention.self.query"
    assert type(dict(named_modules(model))[path]) is nn.Linear
    assert type(submodule(model, path)) is nn.Linear
    assert hasattr(dict(named_modules(model, adapted=True))[path], "lora_A")
