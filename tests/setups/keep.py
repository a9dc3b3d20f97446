"""Set-ups of people who prune while they train, in wrappers, loops and trainers of their own."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from prune import Masks, Pruner
from tests.helpers.adapters import adapted
from tests.helpers.ranks import on_ranks
from tests.helpers.transformers_training import bert, sentences
from tests.setups.base import Setup
from workbench import load, save
from workbench.models import MLP

INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def _network() -> MLP:
    torch.manual_seed(0)
    return MLP(6, [12], 3)


def _train(model: Any, optimizer: Any, backward: Callable[[Any], None], steps: int = 3) -> None:
    for _ in range(steps):
        backward(model(INPUTS).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def _prunes_and_saves(
    model: Any, optimizer: Any, plain: nn.Module, backward: Callable[[Any], None] = torch.Tensor.backward
) -> None:
    """Prune the wrapped model, train it so, save it, and go on with the plain one."""
    _train(model, optimizer, backward)
    masks = Pruner()(model, 0.25)
    masks.apply(model)
    with masks.keep(optimizer, model):
        _train(model, optimizer, backward)
    assert list(masks) == list(Pruner()(_network(), 0.25))
    assert masks.is_applied_to(model)
    assert masks.is_applied_to(plain)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, masks)
        masks.save(Path(folder) / "masks.safetensors")
        again, loaded = load(folder), Masks.load(Path(folder) / "masks.safetensors")
    assert type(again) is MLP
    assert loaded.is_applied_to(again)
    assert torch.equal(again(INPUTS), type(again).forward(plain.eval(), INPUTS))  # accelerate puts autocast around it


def _compile() -> None:
    network = _network()
    model: Any = torch.compile(network, backend="eager")
    _prunes_and_saves(model, SGD(model.parameters(), 0.1, 0.9), network)


def _fabric() -> None:
    from lightning.fabric import Fabric

    fabric, network = Fabric(accelerator="cpu", devices=1), _network()
    model, optimizer = fabric.setup(network, SGD(network.parameters(), 0.1, 0.9))
    _prunes_and_saves(model, optimizer, network, fabric.backward)


def _averaged() -> None:
    network = _network()
    average, optimizer = AveragedModel(network), SGD(network.parameters(), 0.1, 0.9)
    masks = Pruner()(network, 0.25)
    masks.apply(network)
    with masks.keep(optimizer, network):
        for _ in range(3):
            _train(network, optimizer, torch.Tensor.backward, 1)
            average.update_parameters(network)
    masks.apply(average)
    assert masks == Pruner()(average, 0.25)
    with tempfile.TemporaryDirectory() as folder:
        save(average, folder, masks)
        assert torch.equal(load(folder)(INPUTS), average(INPUTS))


def _accelerate() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    try:
        accelerator, network = Accelerator(cpu=True, mixed_precision="bf16"), _network()
        model, optimizer = accelerator.prepare(network, SGD(network.parameters(), 0.1, 0.9))
        _prunes_and_saves(model, optimizer, network, accelerator.backward)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _in_group(wrap: Callable[[nn.Module], Any]) -> None:
    torch.distributed.init_process_group("gloo")
    warnings.simplefilter("ignore")  # FSDP1: NO_SHARD is deprecated
    network = _network()
    model = wrap(network)
    _prunes_and_saves(model, SGD(model.parameters(), 0.1, 0.9), network)


def _ddp() -> None:
    on_ranks(_in_group, nn.parallel.DistributedDataParallel, ranks=1)


def _fsdp1(network: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    whole = ShardingStrategy.NO_SHARD
    return FullyShardedDataParallel(network, sharding_strategy=whole, device_id=torch.device("cpu"), **options)


def _refused() -> str:
    torch.distributed.init_process_group("gloo")
    warnings.simplefilter("ignore")
    try:
        Pruner()(_fsdp1(_network()), 0.25)
    except ValueError as error:
        return str(error)
    return "served"


def _fsdp() -> None:
    on_ranks(_in_group, lambda network: _fsdp1(network, use_orig_params=True), ranks=1)
    assert "use_orig_params=True" in on_ranks(_refused, ranks=1)[0]


def _fully_sharded() -> None:
    torch.distributed.init_process_group("gloo")
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model: Any = fully_shard(_network(), mesh=init_device_mesh("cpu", (1,)))
    optimizer = SGD(model.parameters(), 0.1, 0.9)
    masks = Pruner()(model, 0.25)
    masks.apply(model)
    with masks.keep(optimizer, model):
        _train(model, optimizer, torch.Tensor.backward)
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, masks, state=state)
        again = load(folder)
    assert type(again) is MLP
    assert list(masks) == list(Pruner()(again, 0.25))
    assert masks.is_applied_to(again)


def _fully_shard() -> None:
    on_ranks(_fully_sharded, ranks=1)


def _peft() -> None:
    """A sparse encoder gets adapters: the masks of the encoder are those of what is inside."""
    import peft

    network = bert()
    masks = Pruner()(network, 0.5)
    masks.apply(network)
    model = adapted(network, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    optimizer = SGD(model.parameters(), 0.1)
    with masks.keep(optimizer, model):
        batch = torch.utils.data.default_collate(sentences(4))
        model(**batch).loss.backward()
        optimizer.step()
    assert masks.is_applied_to(model)
    assert masks.model_density(model) < 1


SETUPS = [
    Setup("wrappers", "compile", _compile),
    Setup("wrappers", "DDP", _ddp),
    Setup("wrappers", "FSDP", _fsdp),
    Setup("wrappers", "fully_shard", _fully_shard),
    Setup("wrappers", "Fabric", _fabric),
    Setup("wrappers", "AveragedModel", _averaged),
    Setup("wrappers", "PEFT", _peft),
    Setup("wrappers", "accelerate", _accelerate),
]
