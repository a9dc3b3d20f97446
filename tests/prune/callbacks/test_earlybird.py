from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch

from prune import EarlyBird, KeepMasked, LotteryTicket, Pruner
from prune.levels import Levels
from prune.masks import Masks
from tests.helpers.lightning_training import ADAMW, SGD, data, fit, two_optimizers, user_module
from tests.helpers.trainers import BOTH
from workbench import TaskModule
from workbench.tasks import Classification


class Drawn(lp.Callback):
    """The masks that the network would be pruned to after every epoch, as lists of flat positions."""

    def __init__(self, pruner: Pruner, density: float) -> None:
        self.pruner, self.density, self.kept = pruner, density, []  # type: ignore[var-annotated]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        masks = self.pruner(pl_module.network, self.density)
        self.kept.append([on for mask in masks.values() for on in mask.flatten().tolist()])


def distance(one: list[bool], two: list[bool]) -> float:
    return sum(a != b for a, b in zip(one, two)) / len(one)


@pytest.mark.parametrize(("window", "threshold"), [(2, 0.2), (3, 0.15), (5, 0.3), (5, 0.001)])
def test_the_ticket_is_that_of_the_authors_queue(window: int, threshold: float) -> None:
    """A queue of the last masks; drawn when it is full and all of them are near the newest."""
    pruner = Pruner()
    bird, seen = EarlyBird(pruner, 0.3, threshold, window, distance="hamming"), Drawn(pruner, 0.3)
    fit(user_module(optimizer=ADAMW), bird, seen, max_epochs=8)
    queue: list[list[bool]] = []
    farthest, drawn_at, ticket = [], None, None
    for epoch, mask in enumerate(seen.kept):
        queue = [*queue, mask][-window:]
        distances = [distance(mask, each) for each in queue[:-1]]
        farthest += [max(distances)] if distances else []
        if drawn_at is None and len(queue) == window and all(each < threshold for each in distances):
            drawn_at, ticket = epoch + 1, mask
    assert bird.distances == pytest.approx([distance(a, b) for a, b in zip(seen.kept, seen.kept[1:])])
    assert bird.farthest == pytest.approx(farthest)
    assert bird.drawn_at == drawn_at
    kept = None if bird.ticket is None else [on for mask in bird.ticket.values() for on in mask.flatten().tolist()]
    assert kept == ticket
    assert (drawn_at is None) == (threshold == 0.001), "both happen"


class Layers(lp.Callback):
    """The masks after every epoch, layer by layer."""

    def __init__(self) -> None:
        self.masks: list[Masks] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.masks.append(Pruner()(pl_module.network, 0.3))


def test_the_distance_is_relative_to_chance_at_the_layers_densities() -> None:
    bird, seen = EarlyBird(Pruner(), 0.3, 0.4), Layers()
    fit(user_module(optimizer=ADAMW), bird, seen, max_epochs=3)
    for found, one, two in zip(bird.distances, seen.masks, seen.masks[1:]):
        apart = sum(float((one[name] != two[name]).sum()) for name in one)
        rates = {name: (float(one[name].float().mean()), float(two[name].float().mean())) for name in one}
        chance = sum(one[name].numel() * (a * (1 - b) + b * (1 - a)) for name, (a, b) in rates.items())
        assert found == pytest.approx(apart / chance)
    assert len({round(float(mask.float().mean()), 3) for mask in seen.masks[0].values()}) > 1, "densities differ"


@BOTH
def test_training_is_the_same_and_can_be_stopped_there(namespace: Any) -> None:
    alone, watched, stopped = user_module(namespace), user_module(namespace), user_module(namespace)
    fit(alone, namespace=namespace, max_epochs=6)
    bird = EarlyBird(Pruner(), 0.3, 0.9, 3)
    trainer = fit(watched, bird, namespace=namespace, max_epochs=6)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), watched.parameters()))
    assert len(bird.distances) == 5
    assert float(trainer.callback_metrics["mask_distance"]) == pytest.approx(bird.distances[-1])
    assert bird.drawn_at is not None
    assert bird.drawn_at < 6
    early = EarlyBird(Pruner(), 0.3, 0.9, 3, stop=True)
    trainer = fit(stopped, early, namespace=namespace, max_epochs=6)
    assert trainer.current_epoch == early.drawn_at == bird.drawn_at
    assert early.ticket == bird.ticket
    assert early.ticket is not None
    fit(stopped, KeepMasked(early.ticket), namespace=namespace)
    assert early.ticket.is_applied_to(stopped.network)


@BOTH
@pytest.mark.parametrize("ended", [2, 4])
def test_resumed_it_gives_the_same(namespace: Any, ended: int, tmp_path: Path) -> None:
    whole = EarlyBird(Pruner(), 0.3, 0.6, 3)
    fit(user_module(namespace), whole, namespace=namespace, max_epochs=6)
    first, second, module = EarlyBird(Pruner(), 0.3, 0.6, 3), EarlyBird(Pruner(), 0.3, 0.6, 3), user_module(namespace)
    fit(module, first, namespace=namespace, max_epochs=ended).save_checkpoint(tmp_path / "half.ckpt")
    fit(user_module(namespace), second, namespace=namespace, max_epochs=6, ckpt_path=tmp_path / "half.ckpt")
    assert second.distances == whole.distances
    assert (second.farthest, second.drawn_at, second.ticket) == (whole.farthest, whole.drawn_at, whole.ticket)
    assert whole.drawn_at is not None


def test_its_state_is_a_bit_a_weight_whatever_the_epochs() -> None:
    bird = EarlyBird(Pruner(), 0.3, window=3)
    fit(user_module(), bird, max_epochs=6)
    queue = bird.state_dict()["window"]
    assert len(queue) == 2
    assert [entry["bits"].numel() for entry in queue[0].values()] == [8, 4]
    assert bird._window is not queue


def test_a_second_fit_starts_anew() -> None:
    bird = EarlyBird(Pruner(), 0.3, 1.0, 2)
    fit(user_module(), bird, max_epochs=4)
    fit(user_module(), bird, max_epochs=1)
    assert (bird.distances, bird.drawn_at, bird.ticket) == ([], None, None)


@pytest.mark.parametrize("criterion", ["snip", "wanda", "random"])
def test_any_criterion_may_draw(criterion: str) -> None:
    module, plain = (
        TaskModule(user_module().network, Classification(3), SGD),
        TaskModule(user_module().network, Classification(3), SGD),
    )
    bird = EarlyBird(Pruner(criterion, allocation="uniform"), 0.3, batches=2)
    for each, callbacks in ((module, [bird]), (plain, [])):
        trainer = lp.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(each, data(), data())
    assert len(bird.distances) == 2
    assert (max(bird.distances) == 0) == (criterion == "random")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters()))


def test_in_a_hunt_every_level_has_its_own_ticket() -> None:
    bird = EarlyBird(Pruner(), 0.3, 1.0, 2)
    lengths = []

    class Noted(lp.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            lengths.append(len(bird.distances))

    fit(user_module(), LotteryTicket(Levels(2, rate=0.5), rewind="0it"), bird, Noted(), max_epochs=3)
    assert lengths == [0, 1, 2] * 3


def test_several_have_states_of_their_own() -> None:
    birds = [EarlyBird(Pruner(), density) for density in (0.1, 0.3)]
    fit(user_module(), *birds, max_epochs=2)
    assert birds[0].state_key != birds[1].state_key
    assert EarlyBird(Pruner(), 0.1, distance="hamming").state_key != birds[0].state_key
    assert all(isinstance(each, Masks) or each is None for each in (bird.ticket for bird in birds))


def test_mistakes_are_named_before_training() -> None:
    for wrong, message in (
        ({"density": 0.0}, r"density is 0\.0"),
        ({"threshold": 0.0}, r"threshold is 0\.0: give a distance above 0"),
        ({"window": 1}, "window is 1: compare 2 masks or more"),
        ({"distance": "far"}, "distance is 'far': choose from relative, hamming"),
    ):
        with pytest.raises(ValueError, match=message):
            EarlyBird(**{"pruner": Pruner(), "density": 0.5, **wrong})
    with pytest.raises(ValueError, match=r"above the 0\.5 that"):
        fit(user_module(), EarlyBird(Pruner(structure="1:2"), 0.7))
    with pytest.raises(ValueError, match="steps its optimizers in training_step"):
        fit(two_optimizers(), EarlyBird(Pruner("snip"), 0.7))
