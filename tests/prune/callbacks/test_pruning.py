import copy
import os
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prune import GradualPruning, KeepMasked, Pruner
from prune.schedule import cubic, kept
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
from tests.helpers.ranks import on_ranks
from tests.helpers.trainers import BOTH, QUIET
from workbench import load
from workbench.checkpoints import compact
from workbench.data import Digits
from workbench.duration import Duration
from workbench.models import MLP
from workbench.training import fit as training

# KeepMasked


@BOTH
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}], ids=str)
def test_masked_weights_are_zero_after_every_batch(namespace: Any, optimizer: Any, options: dict[str, Any]) -> None:
    """Momentum and weight decay move weights that have no gradient."""
    module, watch = user_module(namespace, optimizer), Watch()
    fit(module, KeepMasked(masks()), watch, namespace=namespace, max_epochs=2, **options)
    assert set(watch.alive) == {kept(TOTAL, 0.3)}


@BOTH
def test_nothing_is_left_behind(namespace: Any) -> None:
    """No hook, and no key of a state dict, ever."""
    module, keys = user_module(namespace), net().state_dict().keys()

    class Look(lp.Callback, pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert pl_module.network.state_dict().keys() == keys
            assert alive(copy.deepcopy(pl_module)) == alive(pl_module)
            assert trainer.optimizers[0]._optimizer_step_post_hooks

    trainer = fit(module, KeepMasked(masks()), Look(), namespace=namespace, max_epochs=1)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_nothing_is_left_behind_after_an_exception() -> None:
    class Late(lp.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            made.append(trainer.optimizers[0])
            raise RuntimeError("power failure")

    made: list[Any] = []
    with pytest.raises(RuntimeError, match="power failure"):
        fit(user_module(), KeepMasked(masks()), Late())
    assert not made[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("own", [False, True])
def test_clipping_sees_masked_gradients(own: bool) -> None:
    """Also where the module clips in its own way. The norm of dead weights would shrink the step of the others."""
    norms: list[float] = []
    module = user_module()

    class Norm(lp.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            dead = [p.grad[~given[name]] for name, p in pl_module.network.named_parameters() if name in given]
            norms.append(float(torch.cat(dead).norm()))

    def configure_gradient_clipping(self: Any, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, 0.1, "norm")

    if own:
        type(module).configure_gradient_clipping = configure_gradient_clipping
    given = masks()
    fit(module, KeepMasked(given), Norm(), max_epochs=1, **({} if own else {"gradient_clip_val": 0.1}))
    assert norms == [0.0] * 8


@BOTH
@pytest.mark.parametrize("clip", [None, 0.1])
def test_two_optimizers_stepped_by_hand(namespace: Any, clip: float | None) -> None:
    module, watch, given = two_optimizers(namespace, clip), Watch(), masks()
    seen: list[float] = []
    original = module.clip_gradients

    def look(*args: Any, **more: Any) -> None:
        grads = [
            p.grad[~given[name]]
            for name, p in module.network.named_parameters()
            if name in given and p.grad is not None
        ]
        seen.append(float(torch.cat(grads).norm()))
        original(*args, **more)

    module.clip_gradients = look
    fit(module, KeepMasked(given), watch, namespace=namespace, max_epochs=1)
    assert set(watch.alive) == {kept(TOTAL, 0.3)}
    assert seen == ([0.0] * 16 if clip else [])


def test_masks_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="name no parameter"):
        fit(user_module(), KeepMasked({"elsewhere": torch.ones(3, dtype=torch.bool)}))
    with pytest.raises(ValueError, match=r"torch\.bool"):
        KeepMasked({"0.weight": torch.ones(10, 6)})


def test_a_module_without_a_network_is_masked_by_its_own_names() -> None:
    class Plain(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters())

    module = Plain()
    fit(module, KeepMasked(Pruner()(module, 0.5)), max_epochs=1)
    assert module.layer.weight.count_nonzero() == 9


def test_ranks_with_different_masks_are_refused() -> None:
    def run() -> None:
        given = masks(0.3 if os.environ["RANK"] == "0" else 0.4)
        fit(user_module(), KeepMasked(given), devices=2, strategy="ddp", max_epochs=1)

    with pytest.raises(RuntimeError, match=r"ranks hold different masks, by rank \['\w{12}', '\w{12}'\]"):
        on_ranks(run)


# GradualPruning


def expected(times: list[float], begin: float, end: float, density: float) -> list[int]:
    """Weights kept at each time that something is pruned at, by the formula."""
    return [kept(TOTAL, cubic(min(max((t - begin) / (end - begin), 0), 1), density)) for t in times]


@BOTH
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_steps_follow_the_schedule_exactly(namespace: Any, optimizer: Any) -> None:
    module = user_module(namespace, optimizer)
    pruning = GradualPruning(0.1, "4it", "24it", "5it")
    watch = Watch(pruning)
    fit(module, pruning, watch, namespace=namespace)
    # Pruned after the update that reaches 4, at multiples of 5 (5, 10, 15, 20), and at 24.
    times = [0, 0, 0, 4, 5, 5, 5, 5, 5, 10, 10, 10, 10, 10, 15, 15, 15, 15, 15, 20, 20, 20, 20, *[24] * 9]
    assert watch.alive == expected(times, 4, 24, 0.1)
    assert pruning.masks is not None
    assert alive(module) == sum(kept for kept, _ in pruning.masks.counts().values()) == kept(TOTAL, 0.1)
    assert all(after.is_subset(before) for before, after in zip(watch.masks, watch.masks[1:]))
    assert len(watch.masks) == 5


@pytest.mark.parametrize("every", ["1ep", "4it"])
def test_epochs_follow_the_schedule_exactly(every: str) -> None:
    module = user_module()
    pruning = GradualPruning(0.2, "1ep", "3ep", every)
    watch = Watch(pruning)
    fit(module, pruning, watch)
    if every == "1ep":
        times = [1.0] * 15 + [2.0] * 8 + [3.0] * 9
    else:
        times = [1.0] * 11 + [1.5] * 4 + [2.0] * 4 + [2.5] * 4 + [3.0] * 9
    assert watch.alive == expected(times, 1, 3, 0.2)
    (half,) = expected([2.0], 1, 3, 0.2)
    assert watch.epochs == pytest.approx([1.0, half / TOTAL, 0.2, 0.2]), "the density is logged"


def test_accumulated_batches_are_one_step() -> None:
    module = user_module()
    watch = Watch()
    fit(module, GradualPruning(0.5, "0it", "4it", "2it"), watch, accumulate_grad_batches=3, max_epochs=2)
    # Updates after batches 3, 6, 8, 11, 14, 16.
    times = [0, 0, 0, 0, 0, 2, 2, 2, 2, 2, *[4] * 6]
    assert watch.alive == expected(times, 0, 4, 0.5)


def test_a_loader_without_length() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(data().dataset)

    module, watch = user_module(), Watch()
    trainer = lp.Trainer(**QUIET, max_epochs=3, callbacks=[GradualPruning(0.2, "0ep", "2ep", "1ep"), watch])
    trainer.fit(module, DataLoader(Stream(), 4))
    assert watch.alive == expected([0] * 7 + [1] * 8 + [2] * 9, 0, 2, 0.2)


def test_initial_density_is_there_before_the_first_update() -> None:
    module, watch = user_module(), Watch()
    fit(module, GradualPruning(0.2, "0it", "8it", "8it", Pruner(allocation="uniform"), 0.5), watch, max_epochs=2)
    assert watch.alive == [kept(TOTAL, 0.5)] * 7 + [kept(TOTAL, 0.2)] * 9


def test_clipping_sees_masked_gradients_while_pruning() -> None:
    seen: list[bool] = []

    class Norm(lp.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if pruning.masks is not None:
                named = dict(pl_module.network.named_parameters())
                seen.append(any(bool(named[name].grad[~mask].any()) for name, mask in pruning.masks.items()))

    pruning = GradualPruning(0.1, "0it", "8it", "2it", Pruner(allocation="uniform"))
    fit(user_module(), pruning, Norm(), max_epochs=2, gradient_clip_val=0.1)
    assert len(seen) == 14
    assert not any(seen)


@BOTH
@pytest.mark.parametrize("clip", [None, 0.1])
def test_prunes_what_is_stepped_by_hand(namespace: Any, clip: float | None) -> None:
    """Two optimizers: Lightning counts two steps a batch."""
    module, watch = two_optimizers(namespace, clip), Watch()
    fit(
        module,
        GradualPruning(0.1, "0it", "16it", "8it", Pruner(include="0*")),
        watch,
        namespace=namespace,
        max_epochs=2,
    )
    whole, part = kept(60, cubic(0.5, 0.1)) + 30, kept(60, 0.1) + 30
    assert watch.alive == [TOTAL] * 3 + [whole] * 4 + [part] * 9


def test_an_epoch_may_end_without_an_update() -> None:
    """Of eight batches the third and sixth step; a time in epochs comes nevertheless."""

    class Sometimes(type(user_module())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            if batch_idx in (2, 5):
                self.optimizers().step()
                self.optimizers().zero_grad()

    callback = GradualPruning(0.3, "0ep", "2ep", "1ep")
    fit(Sometimes(), callback, watch := Watch(callback), max_epochs=2)
    assert [mask.density for mask in watch.masks] == [kept(TOTAL, cubic(0.5, 0.3)) / TOTAL, kept(TOTAL, 0.3) / TOTAL]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@BOTH
def test_resuming_keeps_masks_and_schedule(namespace: Any, tmp_path: Path) -> None:
    """Lightning's ModelPruning resumes a 50% sparse model at 0%."""

    def run(*more: Any, path: Any = None, optimizer: Any = SGD) -> tuple[Any, Watch]:
        pruning = GradualPruning(0.1, "2it", "28it", "3it")
        module, watch = user_module(namespace, optimizer), Watch(pruning)
        fit(module, pruning, watch, *more, namespace=namespace, ckpt_path=path)
        return pruning, watch

    keep = namespace.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, undisturbed = run(keep)
    for step in (1, 8, 9, 10, 16, 31):
        stored = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"]["GradualPruning"]
        assert sum(entry["bits"].numel() for entry in stored["masks"].values()) in (0, 8 + 4)
        resumed, rest = run(path=tmp_path / f"step={step}.ckpt")
        # A plain loader starts the epoch that was broken off again from its first batch, so only the end is compared.
        assert rest.alive[0] == undisturbed.alive[step]
        assert rest.alive[-1] == kept(TOTAL, 0.1)
        if step % 8 == 0:
            assert rest.alive == undisturbed.alive[step:]
            assert resumed.masks == whole.masks


def test_a_second_fit_stays_as_sparse() -> None:
    module, pruning = user_module(), GradualPruning(0.2, "0ep", "2ep", "1ep")
    fit(module, pruning)
    assert alive(module) == kept(TOTAL, 0.2)
    first, watch = pruning.masks, Watch(pruning)
    fit(module, pruning, watch, max_epochs=1)
    assert set(watch.alive) == {kept(TOTAL, 0.2)}
    assert pruning.masks == first


def test_another_network_starts_dense() -> None:
    pruning, watch = GradualPruning(0.2, "0ep", "2ep", "1ep"), Watch()
    fit(user_module(), pruning)
    fit(user_module(), pruning, watch)
    assert watch.alive[0] == TOTAL
    assert watch.alive[-1] == kept(TOTAL, 0.2)


def test_a_copy_of_the_callback_is_a_callback() -> None:
    """workbench.training.fit copies them, one for every training."""
    pruning = copy.deepcopy(GradualPruning(0.2, "0ep", "2ep", "1ep"))
    module = user_module()
    fit(module, pruning)
    again = copy.deepcopy(pruning)
    fit(module, again, max_epochs=1)
    assert alive(module) == kept(TOTAL, 0.2)


def test_a_layer_that_collapses_is_named() -> None:
    module = user_module()
    with torch.no_grad():
        module.network[3].weight.mul_(1e-6)
    pruning = GradualPruning(0.3, "0it", "2it", "1it")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, pruning, max_epochs=1, limit_train_batches=3)
    assert [str(w.message) for w in caught if "layer collapse: '3.weight'" in str(w.message)]


def test_training_that_is_too_short_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="end is 5ep, but training has 4ep only"):
        fit(user_module(), GradualPruning(0.2, "0ep", "5ep", "1ep"))
    with pytest.raises(ValueError, match="end is 33it, but training has 32it only"):
        fit(user_module(), GradualPruning(0.2, "0ep", "33it", "1ep"))
    fit(user_module(), GradualPruning(0.2, "0ep", "32it", "1ep"))
    fit(user_module(), GradualPruning(0.2, "0ep", "5ep", "1ep"), fast_dev_run=True)


def test_training_that_is_stopped_too_early_says_so() -> None:
    class Enough(lp.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"density 0\.\d+, not 0\.2: it was to be reached at 3ep"):
        fit(user_module(), GradualPruning(0.2, "0ep", "3ep", "1ep"), Enough(), max_epochs=3, min_epochs=1)


def test_two_ranks_prune_alike() -> None:
    def run() -> tuple[Any, ...]:
        module, pruning = user_module(), GradualPruning(0.2, "0it", "8it", "1it")
        watch = Watch(pruning)
        fit(module, pruning, watch, devices=2, strategy="ddp", max_epochs=2, gradient_clip_val=0.5)
        assert pruning.masks is not None
        return watch.alive, pruning.masks.hash(), [p.tolist() for p in module.network.parameters()]

    one, other = on_ranks(run)
    assert one == other
    assert one[0] == expected([1, 2, 3, 4, 5, 6, 7, 8], 0, 8, 0.2)


def test_a_parser_takes_them_in_either_namespace(tmp_path: Path) -> None:
    masks().save(tmp_path / "masks")
    for namespace in (lp, pl):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--callback", type=namespace.Callback)
        arguments = {
            "density": 0.1,
            "begin": "1ep",
            "end": "3ep",
            "every": "100it",
            "pruner": {"allocation": "uniform"},
        }
        given = {"class_path": "prune.GradualPruning", "init_args": arguments}
        made = parser.instantiate(parser.parse_object({"callback": given})).callback
        assert isinstance(made, GradualPruning)
        assert isinstance(made, namespace.Callback)
        assert made.policy.every == Duration(100, "it")
        assert type(made.policy.pruner.axes.allocation).__name__ == "Uniform"
        moving = {"density": 0.1, "begin": "0ep", "end": "3ep", "every": "100it", "growth": "set", "decay": "constant"}
        given = {"class_path": "prune.DynamicSparsity", "init_args": moving}
        made = parser.instantiate(parser.parse_object({"callback": given})).callback
        assert (made.policy.growth, made.policy.decay(0.5)) == ("set", 1.0)
        given = {"class_path": "prune.KeepMasked", "init_args": {"masks": str(tmp_path / "masks")}}
        assert parser.instantiate(parser.parse_object({"callback": given})).callback.masks == masks()


def test_a_fit_stage_ships_the_masks_of_its_callback(tmp_path: Path) -> None:
    """Else it would ship zeros as dense weights, and its record would know nothing of them."""
    pruning = GradualPruning(0.25, "0it", "1ep", "2it")
    trainer = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "callbacks": [pruning]}
    result = training.fit(MLP(64, [16], 10), Digits(batch_size=256), trainer=trainer, out=tmp_path)
    masks = compact.masks(tmp_path)
    kept, total = (sum(count(mask) for mask in masks.values()) for count in (lambda m: int(m.sum()), torch.numel))
    assert (result["size"]["kept"], result["size"]["prunable"]) == (kept, total) == (296, 1184)
    assert all(not load(tmp_path).get_parameter(name)[~mask].any() for name, mask in masks.items())
