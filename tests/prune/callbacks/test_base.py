"""What every callback has of its base: all of them in every kind of training."""

import contextlib
import copy
import csv
import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

import prune
from prune import DynamicSparsity, GradualPruning, KeepMasked, LotteryTicket, Pruner
from prune.schedule import kept
from tests.helpers.lightning_training import (
    ADAMW,
    SGD,
    TOTAL,
    Watch,
    alive,
    data,
    fit,
    masks,
    net,
    two_optimizers,
    user_module,
)
from tests.helpers.policy_cases import CASES
from tests.helpers.ranks import on_ranks
from tests.helpers.trainers import BOTH, QUIET
from workbench.checkpoints import compact
from workbench.models import MLP

CALLBACKS: dict[str, tuple[Callable[[], Any], float]] = {  # and the density that each of them ends at
    name: (functools.partial(CASES[name].make, net(), prune), CASES[name].density)
    for name in ("fixed", "gradual", "movement", "rigl", "set")
}
EVERY = pytest.mark.parametrize("name", CALLBACKS)


class Obeyed(lp.Callback):
    """After every batch, whether the network and its averages are as sparse as the masks say."""

    def __init__(self, of: Any, averages: Callable[[], list[nn.Module]] = list) -> None:
        self.of, self.averages, self.changes = of, averages, [of.masks]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for network in (pl_module.network, *self.averages()):
            assert self.of.masks is None or self.of.masks.is_applied_to(network)
        if self.of.masks is not self.changes[-1]:
            self.changes.append(self.of.masks)


def weights(module: Any) -> list[list[float]]:
    every = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.network.parameters()]
    return [parameter.detach().flatten().tolist() for parameter in every]


@EVERY
@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_training(name: str, options: dict[str, Any]) -> None:
    build, density = CALLBACKS[name]
    callback, module = build(), user_module(optimizer=ADAMW)
    seen = Obeyed(callback)
    fit(module, seen, callback, **options)
    assert callback.masks.density == kept(TOTAL, density) / TOTAL
    assert len(seen.changes) == {"fixed": 1, "gradual": 4, "movement": 4, "rigl": 6, "set": 6}[name]


@EVERY
@pytest.mark.parametrize("clip", [None, 0.1])
def test_two_optimizers_stepped_by_hand(name: str, clip: float | None) -> None:
    """Of which the second does not hold the weights, and may have clipped gradients of the first."""
    build, density = CALLBACKS[name]
    callback, module = build(), two_optimizers(clip=clip)
    fit(module, callback, Obeyed(callback), max_epochs=2)
    assert callback.masks.density == kept(TOTAL, density) / TOTAL
    if name == "rigl":
        assert callback.masks != DynamicSparsity(0.3, "0it", "14it", "3it").policy.pruner(net(), 0.3)


class Parts(lp.LightningModule):
    """Stepped by hand, one optimizer for each layer."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.network, self.fused, self.automatic_optimization = net(), fused, False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for optimizer in self.optimizers():
            self.zero_grad()
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        layers = [layer for layer in self.network if next(layer.parameters(), None) is not None]
        return [torch.optim.SGD(layer.parameters(), 0.1, fused=self.fused) for layer in layers], []


class Scores(lp.Callback):
    """After every batch."""

    def __init__(self, of: Any) -> None:
        self.of, self.seen = of, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append({name: score.tolist() for name, score in self.of.policy.state_dict()["scores"].items()})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_scores_do_not_depend_on_the_scale_of_half_precision(several: bool, fused: bool) -> None:
    """Which grows: unscaled, scores of late updates would outweigh the others. Nor does what is trained."""
    found = []
    for growth in (None, 2):
        callback = GradualPruning(0.3, "0it", "16it", "8it", Pruner("movement"))
        module: Any = Parts(fused) if several else user_module(optimizer=functools.partial(SGD, fused=fused))
        options: dict[str, Any] = {}
        if growth:
            scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=growth)
            plugin = lp.plugins.MixedPrecision("16-mixed", "cpu", scaler)
            plugin.forward_context = contextlib.nullcontext  # type: ignore[method-assign]
            options = {"plugins": [plugin]}
        fit(module, callback, scores := Scores(callback), max_epochs=2, **options)
        found.append((scores.seen, callback.masks, weights(module)))
    assert found[0][0][3]["0.weight"]
    assert found[0] == found[1]


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_a_loss_that_would_step_the_optimizers_is_not_asked_for(criterion: str) -> None:
    """At once, not when it is time to prune; scores that training sums up need none."""
    late = GradualPruning(0.3, "1ep", "2ep", "1ep", Pruner(criterion))
    ticket = LotteryTicket(levels=1, rewind="0it", pruner=Pruner(criterion))
    for callback in (ticket, late) if criterion == "grasp" else (ticket,):
        module = Parts(False)
        with pytest.raises(
            ValueError, match=f"Parts steps its optimizers in training_step, which criterion '{criterion}'"
        ):
            fit(module, callback)
        assert weights(module) == weights(Parts(False))


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_policy_is_told_of_updates_alone(by_hand: bool) -> None:
    """Of three batches each; or of the first optimizer's steps, where each of two counts."""
    callback, told = KeepMasked(masks()), []
    policy: Any = callback.policy
    policy.before_step = lambda moment, clip: told.append(("before", *moment))
    policy.after_step = lambda moment: told.append(("after", *moment))
    options: dict[str, Any] = {} if by_hand else {"accumulate_grad_batches": 3}
    fit(two_optimizers() if by_hand else user_module(), callback, batches=4, max_epochs=2, **options)
    if by_hand:
        said = [(("before", 2 * i, i / 4), ("after", 2 * i + 2, (i + 1) / 4)) for i in range(8)]
    else:
        ends = [0.5, 0.75, 1.5, 1.75]  # the batch at whose end an update is done, as a share of the epoch
        said = [(("before", i, ends[i]), ("after", i + 1, math.floor(ends[i]) + (0.75, 1.0)[i % 2])) for i in range(4)]
    assert told == [event for pair in said for event in pair]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@EVERY
def test_resuming_is_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    """Bit for bit, from every update on; an epoch is one batch, so that the data are the same."""
    keep = lp.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    options: Any = {"batches": 1, "max_epochs": 15}
    callback, module = CALLBACKS[name][0](), user_module(optimizer=ADAMW)
    fit(module, callback, keep, **options)
    for step in (1, 7):
        again, other = CALLBACKS[name][0](), user_module(optimizer=ADAMW)
        fit(other, again, ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert again.masks == callback.masks
        assert weights(other) == weights(module)


@EVERY
def test_a_second_fit_and_a_copy(name: str) -> None:
    """They go on from the masks held; a copy made in the middle of training is as good."""
    build, density = CALLBACKS[name]
    callback, module, copies = build(), user_module(), []

    class Copy(lp.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 15:
                copies.append((copy.deepcopy(callback), copy.deepcopy(trainer.lightning_module.network)))

    fit(module, callback, Copy(), max_epochs=2)
    first = callback.masks
    fit(module, callback, max_epochs=1, limit_train_batches=2)
    assert callback.masks == first
    twin = user_module()
    twin.network = copies[0][1]
    fit(twin, copies[0][0], max_epochs=1, limit_train_batches=2)
    assert copies[0][0].masks == first
    assert alive(twin) <= kept(TOTAL, density)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(
    ("namespace", "name", "kind"),
    [
        *((lp, name, kind) for name in ("gradual", "rigl") for kind in ("ema", "swa", "own")),
        (lp, "fixed", "ema"),
        *((pl, "gradual", kind) for kind in ("ema", "swa")),
    ],
)
def test_averages_are_as_sparse(namespace: Any, name: str, kind: str, ours_first: bool, tmp_path: Path) -> None:
    """Whenever they are swapped in or saved, and wherever the other callback stands in the list."""
    callback, module = CALLBACKS[name][0](), user_module(namespace)
    keep = namespace.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    if kind == "ema":
        averaging: Any = namespace.callbacks.EMAWeightAveraging(decay=0.9)
    elif kind == "swa":
        averaging = namespace.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    else:
        averaging = Averaging(module)
    seen = Obeyed(callback, lambda: [getattr(m, "module", m).network for m in [averaging._average_model]])
    pair = [callback, averaging] if ours_first else [averaging, callback]
    fit(module, *pair, seen, keep, namespace=namespace, max_epochs=3)
    assert callback.masks.is_applied_to(module.network)
    for file in tmp_path.iterdir():
        saved = torch.load(file, weights_only=False)
        stored = saved["callbacks"][callback.state_key]["masks"]
        if stored and kind == "ema":
            again = CALLBACKS[name][0]()
            again.load_state_dict(saved["callbacks"][callback.state_key])
            kept_ = {f"network.{key}": mask for key, mask in again.masks.items()}
            assert not any(saved["state_dict"][key][~mask].any() for key, mask in kept_.items())


class Averaging(lp.Callback):
    """As somebody may have written it: an AveragedModel of the whole module."""

    def __init__(self, module: Any) -> None:
        self._average_model = AveragedModel(module, avg_fn=lambda old, new, _: 0.9 * old + 0.1 * new)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._average_model.update_parameters(pl_module)


@BOTH
def test_every_layer_is_logged(namespace: Any, tmp_path: Path) -> None:
    callback, module = GradualPruning(0.2, "0ep", "2ep", "1ep"), user_module(namespace)
    logger = namespace.loggers.CSVLogger(tmp_path)
    fit(module, callback, namespace=namespace, max_epochs=2, logger=logger, log_every_n_steps=1)
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text(encoding="utf-8").splitlines()))
    last = {key: float(value) for key, value in rows[-1].items() if key.startswith("density")}
    assert callback.masks is not None
    layers = {f"density/{key}": kept / total for key, (kept, total) in callback.masks.counts().items()}
    assert last == pytest.approx({"density": 0.2, **layers})


def test_parts_of_a_network_may_have_their_own() -> None:
    """And a weight only one: with what it says, before the first step."""
    one = GradualPruning(0.5, "0it", "2it", "1it", Pruner(include="0*"))
    two, watch = GradualPruning(0.1, "0it", "2it", "1it", Pruner(include="3*")), Watch()
    module = user_module()
    fit(module, one, two, watch, max_epochs=1)
    assert [module.network[i].weight.count_nonzero() for i in (0, 3)] == [30, 3]
    assert watch.epochs == [pytest.approx(33 / 90)]
    with pytest.raises(ValueError, match=r"'0\.weight' is pruned by a Gradual and a Fixed at once"):
        fit(user_module(), GradualPruning(0.5, "0it", "2it", "1it"), KeepMasked(masks()))
    fit(user_module(), KeepMasked(masks()), max_epochs=1)
    fit(module := user_module(), *[KeepMasked({name: mask}) for name, mask in masks().items()], max_epochs=1)
    assert masks().is_applied_to(module.network)


@pytest.mark.parametrize("where", ["hook", "instance"])
def test_a_module_that_clips_in_its_own_way(where: str) -> None:
    """By a method of its instance, as modules put there that decide when they are made; or in another hook."""
    module, given, norms = user_module(), masks(), []

    def clip(*_: Any, **__: Any) -> None:
        grads = dict(module.network.named_parameters())
        norms.append(float(torch.cat([grads[name].grad[~mask] for name, mask in given.items()]).norm()))

    if where == "instance":
        module.configure_gradient_clipping = clip
    else:
        module.on_before_optimizer_step = clip
    fit(module, KeepMasked(given), max_epochs=1)
    assert norms == [0.0] * 8


def test_masks_from_files(tmp_path: Path) -> None:
    """For an already sparse network; and nothing else than that mask."""
    masks().save(tmp_path / "masks.safetensors")
    module = user_module()
    fit(module, KeepMasked(tmp_path / "masks.safetensors"), max_epochs=1)
    assert alive(module) == kept(TOTAL, 0.3)
    sparse = MLP(6, [10], 3)
    given = Pruner()(sparse, 0.3)
    given.apply(sparse)
    compact.save(sparse, tmp_path / "sparse", given)
    compact.save(sparse, tmp_path / "dense")
    assert KeepMasked(str(tmp_path / "sparse")).masks == given
    with pytest.raises(ValueError, match="compact checkpoint of a dense network, without masks"):
        KeepMasked(tmp_path / "dense")
    with pytest.raises(TypeError, match=r"masks are 5: give parameter name -> bool tensor, or the path"):
        KeepMasked(5)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"give a file that Masks\.save wrote, or a compact checkpoint"):
        KeepMasked(tmp_path / "nothing")


def test_resuming_under_another_mask_is_refused(tmp_path: Path) -> None:
    module = user_module()
    trainer = fit(module, KeepMasked(masks(0.3)), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    said = f"trained under mask {masks(0.3).hash()[:12]}, but mask {masks(0.4).hash()[:12]} is given"
    with pytest.raises(ValueError, match=said):
        fit(user_module(), KeepMasked(masks(0.4)), ckpt_path=tmp_path / "last.ckpt")
    fit(user_module(), KeepMasked(masks(0.3)), ckpt_path=tmp_path / "last.ckpt", max_epochs=2)


def test_a_compiled_module() -> None:
    module, callback = user_module(), CALLBACKS["gradual"][0]()
    module.network = torch.compile(module.network, backend="eager")
    trainer = lp.Trainer(**QUIET, max_epochs=2, callbacks=[callback, Obeyed(callback)])
    trainer.fit(torch.compile(module, backend="eager"), data())
    assert list(callback.masks) == ["0.weight", "3.weight"]
    assert callback.masks.density == kept(TOTAL, 0.2) / TOTAL


def test_strategies_that_hide_the_weights_are_refused() -> None:
    strategy = type("FSDPStrategy", (), {})()
    with pytest.raises(ValueError, match=r"FSDPStrategy keeps the weights in flat pieces.*ModelParallelStrategy"):
        KeepMasked(masks()).on_train_start(SimpleNamespace(strategy=strategy), user_module())


class Save(lp.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def _trained(sharded: bool, folder: Path) -> list[Any]:
    def run(name: str, path: Any = None) -> tuple[Any, ...]:
        module, callback = user_module(), CALLBACKS[name][0]()
        module.network[1] = nn.Identity()  # whose statistics would be those of one rank
        strategy: Any = "ddp"
        if sharded:
            shard(module)
            strategy = lp.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        save = [Save(folder / "last")] if sharded and name == "movement" and path is None else []
        fit(module, callback, *save, devices=2, strategy=strategy, ckpt_path=path)
        return callback.masks.hash(), weights(module)

    found = [run(name) for name in ("gradual", "rigl", "movement")]
    if sharded:
        assert run("movement", folder / "last") == found[-1]
    return found


def shard(module: Any) -> None:
    def configure_model() -> None:
        if not isinstance(module.network[0].weight, DTensor):
            for part in (module.network[0], module.network[3], module.network):
                fully_shard(part, mesh=module.device_mesh["data_parallel"])

    module.configure_model = configure_model


def test_two_ranks_decide_alike_sharded_or_not(tmp_path: Path) -> None:
    """And go on from a sharded checkpoint as if nothing had happened."""
    whole, same = on_ranks(_trained, False, tmp_path)
    assert whole == same
    for (mask, values), *parts in zip(whole, *on_ranks(_trained, True, tmp_path)):
        for other, near in parts:
            assert other == mask
            for value, close in zip(values, near):
                assert close == pytest.approx(value, abs=1e-5)
