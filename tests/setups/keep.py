"""Set-ups of people who prune while they train, in wrappers, loops and trainers of their own."""

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertForSequenceClassification, EarlyStoppingCallback, Trainer

from prune import GradualPruning, Masks, Pruner, hf, merge_adapters
from prune.policies import Gradual
from tests.helpers.adapters import adapted
from tests.helpers.ranks import on_ranks
from tests.helpers.trainers import QUIET
from tests.helpers.transformers_training import arguments, bert, sentences, trained
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

    AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer before, in full precision
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


# Best checkpoints


class Scored(lp.LightningModule):
    """Its score gets worse with every epoch, as that of a network that is pruned; data of 4 batches."""

    def __init__(self) -> None:
        super().__init__()
        self.network = _network()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 1.0 + self.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, 0.9)


def _loader() -> DataLoader:
    labels = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(INPUTS.repeat(2, 1), labels), 4)


def _fit(*callbacks: Any, resume: Any = None, epochs: int = 5) -> Scored:
    module = Scored()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers|Be aware that when using")
        trainer = lp.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            **{**QUIET, "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks)},
            num_sanity_val_steps=0,
        )
        trainer.fit(module, _loader(), _loader(), ckpt_path=resume)
    return module


def _alive(weights: Mapping[str, Any]) -> float:
    matrices = [value for name, value in weights.items() if name.endswith("weight")]
    return sum(int(value.count_nonzero()) for value in matrices) / sum(value.numel() for value in matrices)


def _model_checkpoint() -> None:
    with tempfile.TemporaryDirectory() as folder:
        keep = ModelCheckpoint(folder, monitor="val/loss", mode="min", save_top_k=2)
        pruning = GradualPruning(0.25, "1ep", "3ep", "1ep")
        _fit(pruning, keep)
        best = torch.load(keep.best_model_path, weights_only=False)
        files = {path.name: torch.load(path, weights_only=False) for path in Path(folder).iterdir()}
        assert best["epoch"] == 2  # the first that is as sparse as asked, and not epoch 0
        assert _alive(best["state_dict"]) == 0.25
        assert [_alive(each["state_dict"]) for each in files.values()] == [0.25, 0.25]


def _early_stopping() -> None:
    stop = EarlyStopping("val/loss", patience=2, stopping_threshold=10.0)
    ended = [(_fit(GradualPruning(0.25, "1ep", "3ep", "1ep"), stop, epochs=9), stop.stopped_epoch)]
    assert [epoch for _, epoch in ended] == [2]  # the threshold is met there, at the final density
    assert stop.stopping_threshold == 10.0
    patient = EarlyStopping("val/loss", patience=2)
    module = _fit(GradualPruning(0.25, "1ep", "3ep", "1ep"), patient, epochs=9)
    assert patient.stopped_epoch == 4  # two epochs after the first that counts
    assert _alive(dict(module.named_parameters())) == 0.25


def _best_of_a_trainer() -> None:
    def worse(prediction: Any) -> dict[str, float]:
        scores.append(len(scores) + 1.0)
        return {"loss_of_mine": scores[-1]}

    scores: list[float] = []
    rows = sentences(8)
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": 6, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "loss_of_mine", "greater_is_better": False}
        pruning = hf.GradualPruning(0.25, "1it", "4it", "1it")
        args = arguments(Path(folder), **options, **best, per_device_train_batch_size=4)
        trainer = Trainer(
            bert(),
            args,
            train_dataset=rows,
            eval_dataset=rows,
            compute_metrics=worse,
            callbacks=[pruning, EarlyStoppingCallback(early_stopping_patience=2)],
        )
        trainer.train()
    assert trainer.state.best_global_step == 4
    assert trainer.state.global_step == 6  # patience of two began there
    assert pruning.masks is not None
    assert pruning.masks.density == 0.25
    assert pruning.masks.is_applied_to(trainer.model)


def _best_of_a_loop() -> None:
    """The usual three lines: keep a copy of the best weights, and load them at the end."""
    network = _network()
    optimizer, gradual = SGD(network.parameters(), 0.1, 0.9), Gradual(0.25, "1it", "4it", "1it")
    best: dict[str, Any] = {}
    said = "pruned are not zero at the end, in '.*Their scores are those of a network of density 1, not 0.25"
    following = gradual.follow(network, optimizer)
    for step in range(8):
        _train(network, optimizer, torch.Tensor.backward, 1)
        if step == 0:
            best = copy.deepcopy(network.state_dict())
    network.load_state_dict(best)
    with pytest.warns(UserWarning, match=said):
        following.remove()
    assert gradual.masks is not None
    assert not gradual.masks.is_applied_to(network)


# Resuming


def _another_density() -> None:
    with tempfile.TemporaryDirectory() as folder:
        last = Path(folder) / "last.ckpt"
        _fit(GradualPruning(0.25, "1ep", "3ep", "1ep"), ModelCheckpoint(folder, save_last=True), epochs=4)
        with pytest.raises(
            ValueError, match=r"GradualPruning|Gradual that is resumed .*: density 0\.1 instead of 0\.25\."
        ):
            _fit(GradualPruning(0.1, "1ep", "3ep", "1ep"), resume=last, epochs=8)
        _fit(GradualPruning(0.25, "1ep", "3ep", "1ep"), resume=last, epochs=6)


def _another_end() -> None:
    network = _network()
    optimizer, gradual = SGD(network.parameters(), 0.1, 0.9), Gradual(0.25, "1it", "4it", "1it")
    with gradual.follow(network, optimizer):
        _train(network, optimizer, torch.Tensor.backward, 6)
    with pytest.raises(ValueError, match=r"the Gradual that is resumed .*: end 9it instead of 4it\. Resume with those"):
        Gradual(0.25, "1it", "9it", "1it").load_state_dict(gradual.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        trained(
            Path(folder), hf.GradualPruning(0.25, "1it", "4it", "1it"), max_steps=5, save_strategy="steps", save_steps=5
        )
        resume = Path(folder) / "checkpoint-5"
        with pytest.raises(ValueError, match="end 8it instead of 4it"):
            trained(Path(folder), hf.GradualPruning(0.25, "1it", "8it", "1it"), max_steps=9, resume=str(resume))


# A bare loop


def _resumed_without_state() -> None:
    network = _network()
    optimizer, gradual = SGD(network.parameters(), 0.1, 0.9), Gradual(0.25, "1it", "4it", "1it")
    with gradual.follow(network, optimizer):
        _train(network, optimizer, torch.Tensor.backward, 6)
    stored = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "policy": gradual.state_dict()}

    again = _network()
    again.load_state_dict(stored["model"])
    stepper, other = SGD(again.parameters(), 0.1, 0.9), Gradual(0.25, "1it", "4it", "1it")
    with pytest.raises(ValueError, match=r"75\.0% of the weights .* are exactly 0, but this Gradual has no state"):
        other.follow(again, stepper)
    stepper.load_state_dict(copy.deepcopy(stored["optimizer"]))
    with pytest.raises(ValueError, match=r"exactly 0 and SGD has stepped already, .*load_state_dict"):
        other.follow(again, stepper)
    assert _alive(again.state_dict()) == 0.25  # nothing has been done

    other.load_state_dict(stored["policy"])
    for model, steps, policy in ((network, optimizer, gradual), (again, stepper, other)):
        with policy.follow(model, steps):
            _train(model, steps, torch.Tensor.backward, 2)
    assert all(torch.equal(one, two) for one, two in zip(network.parameters(), again.parameters()))


def _ended_early() -> None:
    network = _network()
    optimizer, gradual = SGD(network.parameters(), 0.1, 0.9), Gradual(0.25, "1it", "9it", "1it")
    with (
        pytest.warns(UserWarning, match=r"training ended with density .*, not 0\.25: it was to be reached at 9it"),
        gradual.follow(network, optimizer),
    ):
        _train(network, optimizer, torch.Tensor.backward, 5)


# Adapters


def _with_adapters() -> Any:
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"])
    return adapted(bert(num_hidden_layers=2), config)


def _lora() -> None:
    model = _with_adapters()
    with pytest.warns(UserWarning, match="matrices that stay dense: .*lora_A.* adapters, which are added"):
        masks = Pruner()(model, 0.25)
    assert not [name for name in masks if "lora" in name or "original_module" in name]
    assert list(masks) == list(Pruner()(bert(num_hidden_layers=2), 0.25))
    assert masks.density == 0.25


def _merged() -> None:
    model, pruning = _with_adapters(), hf.GradualPruning(0.25, "1it", "4it", "1it")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*matrices that stay dense")
        warnings.filterwarnings("ignore", "No label_names provided")
        args = arguments(Path(folder), max_steps=6)
        Trainer(model, args, train_dataset=sentences(8), callbacks=[pruning]).train()
    assert pruning.masks is not None
    assert pruning.masks.is_applied_to(model)
    filled = copy.deepcopy(model)
    assert not pruning.masks.is_applied_to(filled.merge_and_unload())
    merged = merge_adapters(model, pruning.masks)
    assert type(merged) is BertForSequenceClassification
    assert pruning.masks.is_applied_to(merged)
    matrices = {name: weight for name, weight in merged.named_parameters() if name in pruning.masks}
    assert sum(int(each.count_nonzero()) for each in matrices.values()) == sum(
        kept for kept, _ in pruning.masks.counts().values()
    )


# Optimizers that evaluate inside their step


def _lbfgs() -> None:
    network = _network()
    targets = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=20, line_search_fn="strong_wolfe")
    masks = Pruner()(network, 0.5)
    masks.apply(network)
    inside: list[float] = []

    def closure() -> Any:
        optimizer.zero_grad()
        assert masks.is_applied_to(network)
        loss = nn.functional.mse_loss(network(INPUTS), targets)
        loss.backward()
        inside.append(loss.item())
        return loss

    with masks.keep(optimizer, network):
        for _ in range(3):
            optimizer.step(closure)
    assert masks.is_applied_to(network)
    after = nn.functional.mse_loss(network(INPUTS), targets).item()
    assert after == pytest.approx(min(inside), rel=1e-3)
    assert after < 0.05 * inside[0]


SETUPS = [
    Setup("optimizers that evaluate inside their step", "L-BFGS", _lbfgs),
    Setup("adapters", "LoRA beside a pruned base", _lora),
    Setup("adapters", "a merge that keeps the base's mask", _merged),
    Setup("best checkpoints", "ModelCheckpoint beside GradualPruning", _model_checkpoint),
    Setup("best checkpoints", "EarlyStopping beside GradualPruning", _early_stopping),
    Setup("best checkpoints", "load_best_model_at_end", _best_of_a_trainer),
    Setup("best checkpoints", "a bare loop that reloads its best weights", _best_of_a_loop),
    Setup("resuming with another schedule", "another density", _another_density),
    Setup("resuming with another schedule", "another end", _another_end),
    Setup("a bare loop", "resumed without the policy's state", _resumed_without_state),
    Setup("a bare loop", "ended before the pruning did", _ended_early),
    Setup("wrappers", "compile", _compile),
    Setup("wrappers", "DDP", _ddp),
    Setup("wrappers", "FSDP", _fsdp),
    Setup("wrappers", "fully_shard", _fully_shard),
    Setup("wrappers", "Fabric", _fabric),
    Setup("wrappers", "AveragedModel", _averaged),
    Setup("wrappers", "PEFT", _peft),
    Setup("wrappers", "accelerate", _accelerate),
]
