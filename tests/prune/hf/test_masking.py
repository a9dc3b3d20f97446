import copy
import gc
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from distill import DistillationTrainer
from prune import Masks, Pruner
from prune.hf import DynamicSparsity, GradualPruning, KeepMasked, PolicyCallback, masks_of_zeros
from prune.policies import Policy, Timestamp
from prune.policies.optimizers import unscaled
from prune.schedule import cubic, kept
from tests.helpers.ranks import on_ranks

VOCABULARY = 19
SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.01, "learning_rate": 0.05}
ADAMW = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01}


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every Trainer collects garbage, which takes longer than its training where so much is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def bert(kind: Any = BertForSequenceClassification, dropout: float = 0.0, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
        **{"num_labels": 3, **options},
    )
    return kind(config)


TOTAL = sum(mask.numel() for mask in Pruner()(bert(), 0.5).values())


def sentences(count: int = 32, label: Callable[[Tensor, int], Tensor] = lambda _, i: torch.tensor(i % 3)) -> list[Any]:
    torch.manual_seed(0)
    rows = [torch.randint(1, VOCABULARY, (6,)) for _ in range(count)]
    ones = torch.ones(6, dtype=torch.int64)
    return [{"input_ids": r, "attention_mask": ones, "labels": label(r, i)} for i, r in enumerate(rows)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "save_strategy": "no",
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
            **ADAMW,
            **options,
        }
    )


def trained(
    folder: Path, *callbacks: TrainerCallback, model: Any = None, rows: Any = None, resume: Any = None, **options: Any
) -> Trainer:
    """The Trainer after 16 updates, 8 an epoch, unless ``options`` say otherwise."""
    model, rows = bert() if model is None else model, sentences() if rows is None else rows
    own = {name: options.pop(name) for name in ("compute_loss_func", "eval_dataset") if name in options}
    trainer = Trainer(model, arguments(folder, **options), train_dataset=rows, callbacks=list(callbacks), **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def masks(density: float = 0.3) -> Masks:
    return Pruner()(bert(), density)


def alive(model: nn.Module) -> int:
    return sum(int(model.get_parameter(name).count_nonzero()) for name in masks())


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Watch(TrainerCallback):
    """Weights alive after every update."""

    def __init__(self) -> None:
        self.alive: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.alive.append(alive(kwargs["model"]))


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


def expected(times: list[float], begin: float, end: float, density: float) -> list[int]:
    """Weights kept at each time that something is pruned at, by the formula."""
    return [kept(TOTAL, cubic(min(max((t - begin) / (end - begin), 0), 1), density)) for t in times]


def test_updates_follow_the_schedule_exactly(tmp_path: Path) -> None:
    pruning, watch = GradualPruning(0.2, "2it", "12it", "5it"), Watch()
    trainer = trained(tmp_path, pruning, watch)
    # Pruned after the update that reaches 2, at multiples of 5, and at 12.
    assert watch.alive == expected([0, 2, 2, 2, 5, 5, 5, 5, 5, 10, 10, 12, 12, 12, 12, 12], 2, 12, 0.2)
    assert pruning.masks is not None
    assert pruning.masks.obeyed_by(trainer.model)
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
    assert watch.alive == expected([0, 0, 1, 1, 1, 2], 0, 2, 0.2)


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


# Gradients


def test_clipping_counts_live_weights_only(tmp_path: Path) -> None:
    """Also of micro-batches, and while masks change."""
    seen: list[tuple[float, float]] = []
    pruning = GradualPruning(0.2, "0it", "8it", "2it", initial=0.9)
    options = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = Trainer(bert(), options, train_dataset=sentences(), callbacks=[pruning])
    original = trainer.accelerator.clip_grad_norm_

    def spy(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        held = pruning.masks
        assert held is not None
        grads = {name: trainer.model.get_parameter(name).grad for name in held}
        dead = max(float(grad[~held[name]].abs().sum()) for name, grad in grads.items())
        seen.append((dead, sum(float(grad.abs().sum()) for grad in grads.values())))
        return original(parameters, *args, **kwargs)

    trainer.accelerator.clip_grad_norm_ = spy
    trainer.train()
    assert len(seen) == 8
    assert all(dead == 0 < rest for dead, rest in seen)


class Looking(Policy):
    """Keeps fixed masks, and remembers every gradient that it is shown."""

    def __init__(self, given: Masks) -> None:
        super().__init__()
        self.given, self.seen, self.moments = given, [], []  # type: ignore[var-annotated]
        self.reads_gradients = True

    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: model.get_parameter(name) for name in self.given}

    def _start(self, time: Timestamp, resumed: bool) -> None:
        self._enforce(self.given)

    def _needs_dense_gradients(self, moment: Timestamp) -> bool:
        return True

    def _read_gradients(self, moment: Timestamp) -> None:
        self.moments.append(moment)
        self.seen.append({name: grad.clone() for name, grad in self._gradients().items()})

    def _after_update(self, moment: Timestamp) -> None:
        pass

    def _state(self) -> dict[str, Any]:
        return {}

    def _load_state(self, state: Any) -> None:
        pass

    def check_budget(self, updates: float, epochs: float) -> None:
        self.budget = updates, epochs

    def shortfall(self) -> str | None:
        return None


def tokens(count: int = 32) -> list[Any]:
    return sentences(count, lambda row, _: row)


def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """Over all samples of the update; the model's own loss is a mean over those of a micro-batch."""
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def first_gradient(rows: Any, given: Masks) -> dict[str, Tensor]:
    """Of the mean loss over all rows, by hand."""
    model = bert().train()
    given.apply(model)
    model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss.backward()
    return {name: model.get_parameter(name).grad for name in given}


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_policy_sees_whole_and_dense_gradients(pieces: int, tmp_path: Path) -> None:
    rows, given = sentences(16), masks()
    policy = Looking(given)
    options = {"per_device_train_batch_size": 16 // pieces, "gradient_accumulation_steps": pieces}
    trained(tmp_path, PolicyCallback(policy), rows=rows, compute_loss_func=mean, **options)
    assert policy.moments == [Timestamp(0, 0.0), Timestamp(1, 1.0)]
    assert policy.budget == (2, 2)
    truth = first_gradient(rows, given)
    for name, mask in given.items():
        torch.testing.assert_close(policy.seen[0][name], truth[name], atol=1e-6, rtol=1e-4)
        assert policy.seen[0][name][~mask].abs().sum() > 0


def test_gradients_of_half_precision_are_shown_unscaled() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 3.0]))
    inner, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(weight.square().sum()).backward()
    scaled = weight.grad.clone()  # type: ignore[union-attr]
    with unscaled(scaler, [inner]):
        assert weight.grad.tolist() == [2.0, 6.0]  # type: ignore[union-attr]
    assert torch.equal(weight.grad, scaled)  # type: ignore[arg-type]
    with unscaled(None, [inner]):
        assert torch.equal(weight.grad, scaled)  # type: ignore[arg-type]


# DynamicSparsity


@pytest.mark.parametrize("growth", ["rigl", "set"])
def test_connections_move_and_stay_as_many(growth: Any, tmp_path: Path) -> None:
    moving, seen = DynamicSparsity(0.3, "0it", "12it", "3it", growth, decay="constant"), []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert moving.masks is not None
            assert moving.masks.obeyed_by(kwargs["model"])
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
    assert moving.masks.obeyed_by(trainer.model)
    assert moving.masks != Masks.load(tmp_path / "checkpoint-8" / "masks.safetensors")


# Checkpoints

MAKE = {
    "gradual": lambda: GradualPruning(0.1, "1it", "7it", "2it", Pruner(allocation="uniform")),
    "movement": lambda: GradualPruning(0.1, "1it", "7it", "2it", Pruner("movement", allocation="uniform")),
    "rigl": lambda: DynamicSparsity(0.3, "0it", "7it", "2it"),
}


@pytest.mark.parametrize(
    ("made", "options"),
    [
        ("gradual", SGD),
        ("gradual", {"gradient_accumulation_steps": 2, "bf16": True}),
        ("movement", {}),
        ("rigl", {"gradient_accumulation_steps": 2}),
    ],
)
def test_resumed_is_undisturbed(made: str, options: Any, tmp_path: Path) -> None:
    """Bit for bit, with dropout and a schedule of the learning rate; whatever the folder is called."""
    options = {**options, "save_strategy": "steps", "save_steps": 3, "max_steps": 8, "lr_scheduler_type": "linear"}

    def run(**more: Any) -> tuple[Trainer, Any]:
        pruning = MAKE[made]()
        return trained(tmp_path / "out", pruning, model=bert(dropout=0.2), **options, **more), pruning

    whole, undisturbed = run()
    end = weights(whole.model)
    for step in (3, 6):
        moved = tmp_path / f"elsewhere {step}"
        (tmp_path / "out" / f"checkpoint-{step}").rename(moved)
        rest, pruning = run(resume=str(moved))
        assert same(weights(rest.model), end)
        assert pruning.masks == undisturbed.masks
        names = ("density", "step", "learning_rate", "grad_norm")
        ours, theirs = (
            [[row.get(name) for name in names] for row in t.state.log_history if "loss" in row] for t in (rest, whole)
        )
        assert ours == theirs


def test_checkpoints_have_the_masks(tmp_path: Path) -> None:
    pruning = GradualPruning(0.2, "3it", "6it", "1it")
    trained(tmp_path, pruning, max_steps=8, save_strategy="steps", save_steps=2)
    assert not (tmp_path / "checkpoint-2" / "masks.safetensors").exists()
    half, end = (Masks.load(tmp_path / f"checkpoint-{step}" / "masks.safetensors") for step in (4, 8))
    assert end == pruning.masks
    assert end.is_subset(half)
    assert sum(left for left, _ in half.counts().values()) == expected([4], 3, 6, 0.2)[0]
    tuned = KeepMasked(end)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    trained(tmp_path / "tuned", tuned, model=model)
    assert alive(model) == kept(TOTAL, 0.2)


def test_checkpoints_that_do_not_tell_are_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    trained(tmp_path, GradualPruning(0.2, "0it", "8it", "1it"), save_only_model=True, **options)
    with pytest.raises(ValueError, match=r"trained with GradualPruning, but has no state .*save_only_model"):
        trained(tmp_path, GradualPruning(0.2, "0it", "8it", "1it"), resume=str(tmp_path / "checkpoint-4"), **options)
    trained(tmp_path, KeepMasked(masks(0.4)), **options)
    with pytest.raises(ValueError, match=r"trained under mask \w{12}, but mask \w{12} is given"):
        trained(tmp_path, KeepMasked(masks(0.3)), resume=str(tmp_path / "checkpoint-4"), **options)
    trained(tmp_path, resume=str(tmp_path / "checkpoint-4"), **options)
    with pytest.raises(ValueError, match="is of step 8, its KeepMasked of step 4: between them"):
        trained(tmp_path, KeepMasked(masks(0.4)), resume=str(tmp_path / "checkpoint-8"), **{**options, "max_steps": 9})


def test_pruning_can_begin_in_a_training_that_was_dense(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    trained(tmp_path, **options)
    watch, pruning = Watch(), GradualPruning(0.2, "5it", "7it", "1it")
    more = {"restore_callback_states_from_checkpoint": True, **options}
    trained(tmp_path, pruning, watch, resume=str(tmp_path / "checkpoint-4"), **more)
    assert watch.alive == expected([5, 6, 7, 7], 5, 7, 0.2)
    again = GradualPruning(0.2, "5it", "7it", "1it")
    trained(tmp_path, again, resume=str(tmp_path / "checkpoint-8"), **{**more, "max_steps": 9})
    assert again.masks == pruning.masks


def test_a_second_training_stays_as_sparse(tmp_path: Path) -> None:
    pruning, watch = GradualPruning(0.2, "0ep", "2ep", "1ep"), Watch()
    trainer = trained(tmp_path, pruning)
    first = pruning.masks
    trainer.add_callback(watch)
    trainer.train()
    assert set(watch.alive) == {kept(TOTAL, 0.2)}
    assert len(watch.alive) == 16
    assert pruning.masks == first


def test_the_best_model_is_one_of_the_sparsest(tmp_path: Path) -> None:
    """The dense ones of before have the lower loss, and are not what was asked for."""
    pruning = GradualPruning(0.2, "2it", "6it", "2it")
    losses = iter([1.0, 2.0, 3.0, 8.0, 7.0, 7.5, 9.0])
    trainer = Trainer(
        bert(),
        arguments(
            tmp_path,
            max_steps=14,
            **dict.fromkeys(("save_strategy", "eval_strategy"), "steps"),
            save_steps=2,
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="made_up",
            greater_is_better=False,
        ),
        train_dataset=sentences(),
        eval_dataset=sentences(4),
        compute_metrics=lambda _: {"made_up": next(losses)},
        callbacks=[pruning],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert alive(trainer.model) == kept(TOTAL, 0.2)


# What is left behind


def hooks(trainer: Any) -> int:
    inner = trainer.optimizer.optimizer
    found = len(inner._optimizer_step_post_hooks) + len(inner._optimizer_state_dict_post_hooks)
    return found + sum(len(p._post_accumulate_grad_hooks or ()) for p in trainer.model.parameters())


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    class Late(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert hooks(trainer) > 2
            copy.deepcopy(kwargs["model"])
            assert kwargs["model"].state_dict().keys() == bert().state_dict().keys()
            if fails:
                raise RuntimeError("power failure")

    fails, pruning = False, KeepMasked(masks())
    options = arguments(tmp_path, max_steps=3)
    trainer = Trainer(bert(), options, train_dataset=sentences(), callbacks=[pruning, Late()])
    trainer.train()
    assert hooks(trainer) == 0
    fails = True
    with pytest.raises(RuntimeError, match="power failure"):
        trainer.train()
    pruning.release()
    assert hooks(trainer) == 0


def _elsewhere(folder: Path, inputs: Tensor) -> Any:
    """In a process that does not know of this package."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("prune", "distill", "workbench")]:
        sys.modules[name] = None  # type: ignore[assignment]
    model = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(input_ids=inputs).logits
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    zeros = {name: int((value == 0).sum()) for name, value in model.named_parameters()}
    return logits.tolist(), tied, zeros, list(model.state_dict())


def test_what_is_saved_is_a_plain_model(tmp_path: Path) -> None:
    """Pruned to 20% in train(), with a decoder that is tied to the embeddings."""
    rows, pruner = sentences(label=lambda row, _: row), Pruner(allocation="uniform")
    model, pruning = bert(BertForMaskedLM), GradualPruning(0.2, "0it", "12it", "3it", pruner)
    trainer = trained(tmp_path, pruning, model=model, rows=rows)
    trainer.save_model(str(tmp_path / "final"))
    inputs = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        logits = model.eval()(input_ids=inputs).logits
    [(found, tied, zeros, keys)] = on_ranks(_elsewhere, tmp_path / "final", inputs, ranks=1)
    assert torch.equal(torch.tensor(found), logits)
    assert tied
    assert pruning.masks is not None
    assert zeros.items() >= {name: total - left for name, (left, total) in pruning.masks.counts().items()}.items()
    assert pruning.masks.density == pytest.approx(0.2, abs=0.5 / sum(m.numel() for m in pruning.masks.values()))
    assert zeros["bert.embeddings.word_embeddings.weight"] <= model.config.hidden_size  # of padding
    assert keys == list(bert(BertForMaskedLM).state_dict())
    assert not (tmp_path / "final" / "masks.safetensors").exists()


# Ranks


def _on_ranks(folder: Path, rows: Any, given: Masks) -> Any:
    policy, pruning = Looking(given), GradualPruning(0.2, "0it", "4it", "1it", Pruner("random"))
    options = {"gradient_accumulation_steps": 2, "ddp_backend": "gloo", "max_steps": 4}
    options = {**options, "save_strategy": "steps", "save_steps": 2}
    one = trained(folder / "looking", PolicyCallback(policy), rows=rows, compute_loss_func=mean, **options)
    assert given.obeyed_by(one.model)
    two = trained(folder / "gradual", pruning, **options)
    assert isinstance(two.model_wrapped, nn.parallel.DistributedDataParallel)
    rest = GradualPruning(0.2, "0it", "4it", "1it", Pruner("random"))
    resumed = trained(folder / "gradual", rest, resume=str(folder / "gradual" / "checkpoint-2"), **options)
    assert same(weights(two.model), weights(resumed.model))
    assert pruning.masks is not None
    logged = [row["grad_norm"] for row in one.state.log_history if "loss" in row]
    try:
        trained(folder, KeepMasked(masks(0.3 + 0.1 * torch.distributed.get_rank())), **options)
        said = ""
    except ValueError as error:
        said = str(error)
    seen = {name: grad.tolist() for name, grad in policy.seen[0].items()}
    ours = alive(two.model), pruning.masks.hash(), [value.tolist() for value in weights(two.model).values()]
    return seen, logged, ours, said


def test_ranks_prune_alike_and_see_the_mean_gradient(tmp_path: Path) -> None:
    rows, given = sentences(16), masks()
    one, other = on_ranks(_on_ranks, tmp_path, rows, given)
    assert one == other
    seen, logged, (left, *_), said = one
    truth = first_gradient(rows, given)
    for name, grad in seen.items():
        torch.testing.assert_close(torch.tensor(grad), truth[name], atol=1e-6, rtol=1e-4)
    alone = trained(tmp_path, KeepMasked(given), rows=rows, per_device_train_batch_size=16)
    assert logged[0] == pytest.approx(alone.state.log_history[0]["grad_norm"], rel=1e-4)
    assert left == kept(TOTAL, 0.2)
    assert "ranks hold different masks" in said


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


# Masks of zeros


def test_masks_of_zeros_are_those_of_the_zeros() -> None:
    given, model = masks(), bert()
    given.apply(model)
    assert masks_of_zeros(model) == given
    assert list(masks_of_zeros(model, include="bert.encoder*")) == [n for n in given if n.startswith("bert.encoder")]
    with pytest.raises(ValueError, match=rf"none of the {TOTAL} prunable weights .* is zero: it is dense"):
        masks_of_zeros(bert())


def test_deepspeed_is_refused() -> None:
    args: Any = SimpleNamespace(deepspeed="zero.json")
    with pytest.raises(ValueError, match="DeepSpeed keeps weights of its own"):
        KeepMasked(masks()).on_train_begin(args, None, None, model=bert(), optimizer=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("criterion", ["snip", "wanda"])
def test_a_criterion_that_looks_at_data_is_shown_the_first_batches(criterion: str, tmp_path: Path) -> None:
    pruner, rows = Pruner(criterion, allocation="uniform"), sentences()
    sparse = GradualPruning(0.4, "0it", "1it", "1it", pruner, schedule="one_shot", batches=2)
    trained(tmp_path, sparse, model=bert(), rows=rows, max_steps=2)
    batches = [{name: torch.stack([row[name] for row in rows[i : i + 4]]) for name in rows[0]} for i in (0, 4)]
    loss = {"loss": lambda model, batch: model(**batch).loss} if criterion == "snip" else {}
    assert sparse.masks == pruner(bert(), 0.4, loader=batches, **loss)
