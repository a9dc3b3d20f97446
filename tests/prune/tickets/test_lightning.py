"""What a LightningModule's trainings share, whatever it is: its moments, what is not its network, its own callbacks."""

import math
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from prune.pruner import Pruner
from prune.tickets.arms import Hunt
from prune.tickets.controls import Controls
from prune.tickets.hunt import hunt
from prune.tickets.store import Store
from tests.helpers.hunt_training import BATCHES, SGD, Blobs, Net, Watch, run_hunt, same, trainee, weights
from workbench.duration import Duration
from workbench.models import MLP

TOTAL = 3 * BATCHES
START: Any = {"rewind": Duration(0, "it")}


class Projected(lp.LightningModule):
    """A network beside a part that is trained and not shipped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network, self.projector = Net(), nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.projector(self.network(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters())


class Adversaries(Projected):
    """Two optimizers with schedulers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = nn.functional.cross_entropy(self.projector(self.network(batch[0])), batch[1])
        self.manual_backward(loss)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers()):  # type: ignore[arg-type]
            optimizer.step()
            self.rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        built = [SGD(self.network.parameters()), torch.optim.Adam(self.projector.parameters(), lr=0.01)]
        return built, [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in built]


class Projectors(lp.Callback):
    """The projector at the beginning of every training."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __deepcopy__(self, memo: Any) -> "Projectors":
        return self

    def on_train_batch_start(self, trainer: lp.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not hasattr(trainer, "seen"):
            trainer.seen = self.seen.append(pl_module.projector.weight.detach().clone())  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["learning_rate", "fine_tuning"])
def test_what_is_not_the_network_is_of_the_moment(tmp_path: Path, mode: str) -> None:
    projectors = Projectors()
    of = trainee(tmp_path, Projected(), trainer={"callbacks": [projectors]})
    run_hunt(tmp_path, of, (1.0, 0.6, 0.3), mode=mode, controls=("reinit",))
    first, one, anew, two, again = projectors.seen
    moment = {"learning_rate": "rewind", "fine_tuning": "end"}[mode]
    kept = torch.load(tmp_path / "checkpoints" / f"{moment}.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(one, kept["projector.weight"])
    assert torch.equal(two, one)
    assert torch.equal(anew, first), "a control with new initial weights starts from the very start"
    assert torch.equal(again, first)
    assert not torch.equal(one, first)


@pytest.mark.parametrize("rewind", ["8it", "1ep"])
def test_optimizers_stepped_by_hand(tmp_path: Path, rewind: str) -> None:
    """Every step of each counts; what was last stepped with is held for each."""
    watch = Watch()
    module = Adversaries()
    of = trainee(tmp_path, module, rewind=rewind, trainer={"callbacks": [watch]})
    levels = run_hunt(tmp_path, of, (1.0, 0.5), mode="fine_tuning")
    k = {"8it": 8, "1ep": 2 * BATCHES}[rewind]
    assert watch.weights[1][0][0] == 2 * TOTAL
    assert levels[1]["history"][-1]["step"] == 2 * TOTAL + 2 * TOTAL - k
    dense, then = module.rates[: 2 * TOTAL], module.rates[2 * TOTAL :]
    assert then == dense[-2:] * ((2 * TOTAL - k) // 2)
    assert len(set(dense)) == 2 * TOTAL


def test_a_point_that_training_steps_over_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rewind is 7it, but training went past that step inside a batch, to step 8"):
        run_hunt(tmp_path, trainee(tmp_path, Adversaries(), rewind="7it"))


class Averaging(lp.Callback):
    """An average of the weights that is not what training ends with."""

    def setup(self, trainer: lp.Trainer, pl_module: Any, stage: str) -> None:
        self.average = AveragedModel(pl_module, use_buffers=True)

    def __deepcopy__(self, memo: Any) -> "Averaging":
        return self

    def on_train_batch_end(self, trainer: lp.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 9:
            self.before = {name: v.clone() for name, v in self.average.module.network.state_dict().items()}  # type: ignore[union-attr]
        self.average.update_parameters(pl_module)
        self.count = int(self.average.n_averaged)

    def on_save_checkpoint(self, trainer: lp.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, trainer: lp.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.average.load_state_dict(checkpoint["average"])


@pytest.mark.parametrize(("mode", "count"), [("all", TOTAL), ("learning_rate", TOTAL - 8)])
def test_averages_start_anew_with_new_weights_alone(tmp_path: Path, mode: str, count: int) -> None:
    averaging = Averaging()
    run_hunt(tmp_path, trainee(tmp_path, trainer={"callbacks": [averaging]}), (1.0, 1.0), mode=mode)
    assert averaging.count == count
    assert same(averaging.before, weights(tmp_path, 0)) == (mode == "learning_rate")


def test_an_average_of_swa_that_has_begun_is_refused_new_weights(tmp_path: Path) -> None:
    swa = lp.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    of = trainee(tmp_path, rewind="15it", trainer={"callbacks": [swa]})
    with pytest.raises(ValueError, match="StochasticWeightAveraging has weights in its average"):
        run_hunt(tmp_path, of, (1.0, 0.5), mode="learning_rate")


@pytest.mark.parametrize("length", [{"max_epochs": None, "max_steps": 15}, {"max_epochs": 3, "max_steps": 40}])
def test_fine_tuning_goes_on_for_as_long_as_rewinding_would(tmp_path: Path, length: dict[str, Any]) -> None:
    watch = Watch()
    of = trainee(tmp_path, rewind="1ep", trainer={"callbacks": [watch], **length})
    run_hunt(tmp_path, of, (1.0, 0.5), mode="fine_tuning")
    end = min(length["max_steps"], TOTAL)
    assert [step for step, *_ in watch.weights[1]] == list(range(end, end + end - BATCHES))


def test_fine_tuning_after_a_stop_on_the_way_has_the_whole_budget(tmp_path: Path) -> None:
    """Level 0 was ended by a callback of the user's, whose state does not go on."""

    class StopEarly(lp.Callback):
        def __init__(self) -> None:
            self.ended = False

        def on_train_batch_end(self, trainer: lp.Trainer, *_: Any) -> None:
            self.ended = self.ended or trainer.global_step == 12
            trainer.should_stop = trainer.should_stop or self.ended

        def state_dict(self) -> dict[str, Any]:
            return {"ended": self.ended}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.ended = state_dict["ended"]

    watch = Watch()
    of = trainee(tmp_path, rewind="1ep", trainer={"callbacks": [watch, StopEarly()]})
    run_hunt(tmp_path, of, (1.0, 0.5), mode="fine_tuning")
    assert len(watch.weights[0]) == 12
    assert len(watch.weights[1]) == TOTAL - BATCHES


def test_both_moments_are_kept_and_looked_at(tmp_path: Path) -> None:
    levels = run_hunt(tmp_path, trainee(tmp_path), (1.0, 0.5), mode="fine_tuning")
    assert set(levels[0]["points"]) == {"point", "end", "weights"}
    assert "points" not in levels[1]
    shutil.rmtree(tmp_path / "level_01")
    end = tmp_path / "checkpoints" / "end.ckpt"
    whole = end.read_bytes()
    end.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="end was altered"):
        run_hunt(tmp_path, trainee(tmp_path), (1.0, 0.5), mode="fine_tuning")
    end.write_bytes(whole)
    again = run_hunt(tmp_path, trainee(tmp_path), (1.0, 0.5), mode="fine_tuning")
    assert again[1]["metrics"] == levels[1]["metrics"]


def test_a_second_order_of_level_zero_leaves_its_moments_alone(tmp_path: Path) -> None:
    of = trainee(tmp_path, rewind="0it")
    levels = run_hunt(tmp_path, of, (1.0, 0.5), controls=("twin",))
    assert of.point_hashes() == levels[0]["points"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["rewind.ckpt", "rewind.safetensors"]


def test_a_module_stepped_by_hand_is_hunted_in_and_connected(tmp_path: Path) -> None:
    """Its training step, which would train it, is not called to look at it."""
    given = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1}
    options: Any = {"data": Blobs(), "levels": 1, "trainer": given, "controls": Controls(connectivity=True), **START}
    with pytest.raises(ValueError, match="steps its optimizers in training_step"):
        hunt(model=Adversaries(), out=tmp_path, **options)
    assert not (tmp_path / "level_00").exists()
    plain = Adversaries()
    plain.network = MLP(5, [4], 3)  # type: ignore[assignment] - no batch norm
    found = hunt(model=plain, out=tmp_path, **options)
    assert [level["diagnosis"] for level in found["levels"]] == [{}, {}]
    assert found["levels"][1]["connectivity"]["orders"]["val"]["metric"] == "val/loss"


class Attached(Projected):
    """Its training step asks for what it has inside of a fit only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.trainer.training:
            raise RuntimeError("no fit")
        return super().training_step(batch, batch_idx)


def test_a_module_that_cannot_be_looked_at_is_hunted_in_and_that_is_said(tmp_path: Path) -> None:
    given = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1}
    with pytest.warns(UserWarning, match=r"gradient flow are not in the record, RuntimeError: .*no fit"):
        found = hunt(model=Attached(), data=Blobs(), levels=1, trainer=given, **START, out=tmp_path)
    assert [level["diagnosis"] for level in found["levels"]] == [{}, {}]


class Exploding(Projected):
    """Trained at a rate that no network survives, where nothing is pruned and level 0 is over."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if "dense" in self.trainer.default_root_dir else loss


def test_a_control_that_diverges_is_a_control_all_the_same(tmp_path: Path) -> None:
    of = trainee(tmp_path, Exploding())
    with pytest.warns(UserWarning, match="val/loss: not finite after training"):
        levels = run_hunt(tmp_path, of, (1.0, 0.5), controls=("dense",))
    assert math.isnan(levels[1]["controls"]["dense"]["metrics"]["val/loss"])
    assert math.isfinite(levels[1]["metrics"]["val/loss"])


def test_every_training_of_a_hunt_has_its_place_on_the_bar(tmp_path: Path) -> None:
    of = trainee(tmp_path)
    hunt = Hunt(
        of,
        Pruner(),
        (1.0, 0.5, 0.25),
        Store(tmp_path, "k"),
        controls=Controls(("reinit", "dense")),
        barrier=lambda *_: {},
    )
    asked = [hunt.part(level, arm) for level in range(3) for arm in hunt.arms(level)]
    assert [(done, total) for done, total, _ in asked] == [(i, 10) for i in range(10)]
    assert asked[3][2] == "level 1, reinit, density 50.0%"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controls": ("nothing",)}, "controls has 'nothing': choose from"),
        ({"controls": ("other",)}, "give the hunt whose mask it has as controls.other"),
    ],
)
def test_mistakes_are_named_before_training(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_hunt(tmp_path, trainee(tmp_path), (1.0, 0.5), **options)
    assert not (tmp_path / "level_00").exists()


def test_a_drop_needs_a_score_to_compare_with(tmp_path: Path) -> None:
    of = trainee(tmp_path, trainer={"limit_val_batches": 0})
    with pytest.raises(ValueError, match=r"max_drop is 0.1, but level 0 has no finite val/accuracy to compare with"):
        run_hunt(tmp_path, of, (1.0, 0.5), max_drop=0.1)
