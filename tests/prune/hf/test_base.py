"""What every callback of a transformers Trainer has of its base: gradients, checkpoints, hooks, ranks."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
)

from prune import Masks, Pruner
from prune.hf import DynamicSparsity, GradualPruning, KeepMasked, PolicyCallback
from prune.policies import Policy, Timestamp
from prune.policies.optimizers import unscaled
from prune.schedule import kept
from tests.helpers.ranks import on_ranks
from tests.helpers.transformers_training import (
    SGD,
    TOTAL,
    Watch,
    alive,
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

    def at_final_density(self) -> bool:
        return True

    def shortfall(self) -> str | None:
        return None


def tokens(count: int = 32) -> list[Any]:
    return sentences(count, lambda row, _: row)


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
    assert sum(left for left, _ in half.counts().values()) == scheduled([4], 3, 6, 0.2)[0]
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
    assert watch.alive == scheduled([5, 6, 7, 7], 5, 7, 0.2)
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


# Hooks


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
    assert given.is_applied_to(one.model)
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


# Refusals


def test_deepspeed_is_refused() -> None:
    args: Any = SimpleNamespace(deepspeed="zero.json")
    with pytest.raises(ValueError, match="DeepSpeed keeps its own copy of the weights"):
        KeepMasked(masks()).on_train_begin(args, None, None, model=bert(), optimizer=None)  # type: ignore[arg-type]
