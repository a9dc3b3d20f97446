"""The policies in a transformers Trainer: what each does, update by update."""

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
)

from distill import DistillationTrainer
from prune import Masks
from prune.hf import DynamicSparsity, GradualPruning, KeepMasked
from prune.schedule import kept
from tests.helpers.transformers_training import (
    ADAMW,
    SGD,
    TOTAL,
    Watch,
    arguments,
    bert,
    masks,
    mean,
    same,
    scheduled,
    sentences,
    trained,
    weights,
)

# KeepMasked


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}], ids=str)
def test_what_is_pruned_is_zero_after_every_update(optimizer: Any, options: Any, tmp_path: Path) -> None:
    """Momentum and weight decay move weights that have no gradient."""
    watch, model = Watch(), bert()
    trained(tmp_path, KeepMasked(masks()), watch, model=model, num_train_epochs=1, **optimizer, **options)
    assert set(watch.alive) == {kept(TOTAL, 0.3)}
    assert not same(weights(model), weights(bert()))


def test_it_is_the_training_of_a_bare_loop_under_the_same_masks(tmp_path: Path) -> None:
    """Masked gradients, clipped, AdamW, masked weights; written by hand."""
    rows, given = sentences(), masks()
    trainer = trained(tmp_path, KeepMasked(given), rows=rows, train_sampling_strategy="sequential", max_grad_norm=0.1)
    model, norms = bert().train(), []
    groups = [[], []]
    for name, parameter in model.named_parameters():
        groups[int("bias" in name or "LayerNorm" in name)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0}], 0.01, weight_decay=0.1
    )
    with torch.no_grad():
        for name, mask in given.items():
            model.get_parameter(name)[~mask] = 0
    for start in [*range(0, 32, 4)] * 2:
        batch = {key: torch.stack([row[key] for row in rows[start : start + 4]]) for key in rows[0]}
        model(**batch).loss.backward()
        for name, mask in given.items():
            model.get_parameter(name).grad *= mask
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in given.items():
                model.get_parameter(name).mul_(mask)
    assert [row["grad_norm"] for row in trainer.state.log_history if "loss" in row] == pytest.approx(norms, rel=1e-4)
    for name, value in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), value, atol=1e-5, rtol=1e-4)


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name no parameter"):
        trained(tmp_path, KeepMasked({"elsewhere": torch.ones(3, dtype=torch.bool)}))
    with pytest.raises(ValueError, match=r"torch\.bool"):
        KeepMasked({"classifier.weight": torch.ones(3, 4)})


# GradualPruning


def test_updates_follow_the_schedule_exactly(tmp_path: Path) -> None:
    pruning, watch = GradualPruning(0.2, "2it", "12it", "5it"), Watch()
    trainer = trained(tmp_path, pruning, watch)
    # Pruned after the update that reaches 2, at multiples of 5, and at 12.
    assert watch.alive == scheduled([0, 2, 2, 2, 5, 5, 5, 5, 5, 10, 10, 12, 12, 12, 12, 12], 2, 12, 0.2)
    assert pruning.masks is not None
    assert pruning.masks.is_applied_to(trainer.model)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["density"] for row in logged] == [count / TOTAL for count in watch.alive]
    for name, (left, total) in pruning.masks.counts().items():
        assert logged[-1][f"density/{name}"] == left / total


@pytest.mark.parametrize("options", [{}, {"max_steps": 6}], ids=str)
def test_epochs_follow_the_schedule_exactly(options: Any, tmp_path: Path) -> None:
    """Three updates an epoch, of two and two and one and two and two and one micro-batches."""
    watch = Watch()
    pruning = GradualPruning(0.2, "0ep", "2ep", "1ep")
    trained(tmp_path, pruning, watch, rows=sentences(20), gradient_accumulation_steps=2, **options)
    assert watch.alive == scheduled([0, 0, 1, 1, 1, 2], 0, 2, 0.2)


def test_training_that_is_too_short_is_refused_at_once(tmp_path: Path) -> None:
    watch = Watch()
    for end, begin, options in (("17it", "0it", {}), ("3ep", "0ep", {}), ("2ep", "0ep", {"max_steps": 15})):
        pruning = GradualPruning(0.2, begin, end, "1it")
        with pytest.raises(ValueError, match=f"end is {end}, but training has"):
            trained(tmp_path, pruning, watch, **options)
    assert not watch.alive


def test_training_that_is_stopped_too_early_says_so(tmp_path: Path) -> None:
    class Enough(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = True
            return control

    with pytest.warns(UserWarning, match=r"training ended with density 0\.\d+, not 0\.2: it was to be reached at 2ep"):
        trained(tmp_path, GradualPruning(0.2, "0ep", "2ep", "1ep"), Enough())


def test_a_layer_that_collapses_is_named(tmp_path: Path) -> None:
    model = bert()
    with torch.no_grad():
        model.classifier.weight.mul_(1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(tmp_path, GradualPruning(0.3, "0it", "1it", "1it"), model=model, max_steps=2)
    assert [str(w.message) for w in caught if "layer collapse: 'classifier.weight'" in str(w.message)]


def test_densities_reach_reporters_that_come_after(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[str, Any]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    after, moved, last = Reporter(), Reporter(), GradualPruning(0.2, "0it", "1it", "1it")
    trained(tmp_path, GradualPruning(0.2, "0it", "1it", "1it"), after, max_steps=2)
    assert after.seen[0]["density"] == kept(TOTAL, 0.2) / TOTAL
    assert "density" not in after.seen[-1], "the summary is of no step"
    trainer = Trainer(bert(), arguments(tmp_path, max_steps=2), train_dataset=sentences(), callbacks=[moved, last])
    trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(last))
    trainer.train()
    assert moved.seen[:2] == after.seen[:2]


# DynamicSparsity


@pytest.mark.parametrize("growth", ["rigl", "set"])
def test_connections_move_and_stay_as_many(growth: Any, tmp_path: Path) -> None:
    moving, seen = DynamicSparsity(0.3, "0it", "12it", "3it", growth, decay="constant"), []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert moving.masks is not None
            assert moving.masks.is_applied_to(kwargs["model"])
            seen.append(moving.masks)

    trainer = trained(tmp_path, moving, Look())
    assert len({str(each.counts()) for each in seen}) == 1
    changed = [number + 2 for number, (one, other) in enumerate(itertools.pairwise(seen)) if one != other]
    assert changed == [4, 7, 10, 13], "in the update that follows 3, 6, 9 and 12"
    assert trainer.state.log_history[-2]["density"] == kept(TOTAL, 0.3) / TOTAL


def test_rigl_grows_where_the_gradient_of_the_whole_update_is_largest(tmp_path: Path) -> None:
    """Algorithm 1 by loops: of two micro-batches, clipped afterwards."""
    rows, before = sentences(16), []
    moving = DynamicSparsity(0.5, "0it", "100it", "1it", fraction=0.4, decay="constant")

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before.append((copy.deepcopy(kwargs["model"]), moving.masks))

    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 2}
    trained(tmp_path, moving, Look(), rows=rows, compute_loss_func=mean, max_grad_norm=0.01, **options)
    (model, old), (_, new) = before
    model.zero_grad()
    model.train()(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss.backward()
    for name, mask in old.items():
        weight, grad = (
            value.flatten() for value in (model.get_parameter(name).detach(), model.get_parameter(name).grad)
        )
        active = [i for i, on in enumerate(mask.flatten().tolist()) if on]
        moves = int(len(active) * 0.4)
        stay = sorted(active, key=lambda i: (-abs(float(weight[i])), i))[: len(active) - moves]
        others = [i for i in range(len(weight)) if i not in stay]
        grown = sorted(others, key=lambda i: (-abs(float(grad[i])), i))[:moves]
        assert new[name].flatten().nonzero().flatten().tolist() == sorted([*stay, *grown])


def test_the_best_model_has_the_masks_of_its_time(tmp_path: Path) -> None:
    moving, losses = DynamicSparsity(0.3, "0it", "100it", "1it"), iter([2.0, 1.0, 3.0, 4.0])
    both = dict.fromkeys(("save_strategy", "eval_strategy"), "steps")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "made_up", "greater_is_better": False}
    options = arguments(tmp_path, max_steps=8, save_steps=2, eval_steps=2, **both, **best)
    data = {"train_dataset": sentences(), "eval_dataset": sentences(4)}
    trainer = Trainer(bert(), options, **data, compute_metrics=lambda _: {"made_up": next(losses)}, callbacks=[moving])
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert moving.masks is not None
    assert moving.masks.is_applied_to(trainer.model)
    assert moving.masks != Masks.load(tmp_path / "checkpoint-8" / "masks.safetensors")


# With distillation


def test_a_student_is_pruned_while_it_is_taught(tmp_path: Path) -> None:
    watch = Watch()
    callbacks = [GradualPruning(0.2, "0it", "8it", "2it"), watch]
    teacher = bert(seed=2)
    trainer = DistillationTrainer(
        bert(), arguments(tmp_path), train_dataset=sentences(), teacher=teacher, callbacks=callbacks
    )
    trainer.train()
    assert watch.alive[-1] == kept(TOTAL, 0.2)
    logged = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert {"soft", "density"} <= logged.keys()
