from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as lp
import pytest
import torch
from torch import nn

from tests.helpers.compact_checkpoints import Given, Odd, Plain, assert_same_state, same
from workbench import load, save, swap_activation
from workbench.checkpoints import compact
from workbench.models import MLP


class Partly(lp.LightningModule):
    def __init__(self, network: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"])
        self.network = network


class Secretive(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)


# How to build it again


def test_all_defaults_are_a_description_if_the_model_says_so() -> None:
    model = Secretive(4)
    model.init_args = {}  # type: ignore[assignment]
    assert compact.describe(model) is None, "not enough to build it"
    model = Odd()
    model.init_args = {}
    assert compact.describe(model) == {"class_path": f"{Odd.__module__}.Odd", "init_args": {}}


def test_the_module_of_a_user_is_described_by_its_hyperparameters() -> None:
    found = compact.describe(Given(6))
    assert found == {"class_path": f"{Given.__module__}.Given", "init_args": {"width": 6, "activation": "relu"}}
    found = compact.describe(swap_activation(Given(6), "gelu"))
    assert found is not None
    assert found["activation"] == "gelu"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Secretive(4),
        lambda: nn.Sequential(nn.Linear(2, 2)),
        lambda: Partly(nn.Linear(2, 2)),
        lambda: lp.LightningModule(),
        nn.Module,
    ],
)
def test_who_does_not_say_is_not_guessed(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    if type(model) not in (lp.LightningModule,):
        assert compact.describe(model) is None
    save(model, tmp_path, architecture=None)
    if compact.read_index(tmp_path)["architecture"] is None:
        with pytest.raises(
            ValueError, match=r"does not say how to build its model: pass one, load\(path, model=\.\.\.\)"
        ):
            load(tmp_path)
    filled = make()
    assert load(tmp_path, model=filled) is filled
    assert_same_state(filled, model)
    assert not filled.training


def test_a_class_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    class Local(Plain):
        pass

    model = Local()
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"needs the class .*Local.*cannot be imported.*load\(path, model=\.\.\.\)"):
        load(tmp_path)
    assert_same_state(load(tmp_path, model=Local()), model)


def test_the_weights_of_another_model_are_refused_and_nothing_is_filled(tmp_path: Path) -> None:
    save(MLP(4, (4,), 2), tmp_path)
    other = MLP(4, (5,), 2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"holds the weights of another model.*layers\.0\.weight' is \[5, 4\], \[4, 4\] here"
    ):
        load(tmp_path, model=other)
    assert all(same(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match="holds the weights of another model"):
        load(tmp_path, model=MLP(4, (4,), 2, norm="batch"))
    with torch.device("meta"):
        hollow = MLP(4, (4,), 2)
    with pytest.raises(ValueError, match="did not load"), pytest.warns(UserWarning, match="meta"):
        load(tmp_path, model=hollow)
