import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from torch import nn

from prune.tickets.identity import difference, plain, settings_of
from workbench import TaskModule
from workbench.duration import Duration
from workbench.models import MLP
from workbench.tasks import Classification


class Data(lp.LightningDataModule):
    def __init__(self, size: int, folder: Path, extra: Any = None) -> None:
        super().__init__()
        self.size, self.folder, self.extra = size, folder, extra
        self.found = 0

    def setup(self, stage: str | None = None) -> None:
        self.found = 100


class Own(lp.LightningModule):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, 2)


class Mute(nn.Module):
    """Does not say what it was built with."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(slope))
        self.odd = object()


def test_objects_are_their_class_and_what_they_keep_of_their_arguments() -> None:
    assert plain(Data(3, Path("a"), extra=object())) == {
        "class": f"{__name__}.Data",
        "size": 3,
        "folder": "a",
        "extra": "builtins.object",
    }
    adam = functools.partial(torch.optim.Adam, lr=0.1)
    assert plain(adam) == {"call": "torch.optim.adam.Adam", "lr": 0.1}
    assert plain({"a": (1, None, True), "b": Duration(3, "it")}) == {"a": [1, None, True], "b": [3, "it"]}
    assert plain(nn.Linear) == "torch.nn.modules.linear.Linear"
    assert plain(Own(0.5))["rate"] == 0.5
    assert plain(list(range(1000))) == "1000 items"
    endless: list[Any] = []
    endless.append(endless)
    json.dumps(plain(endless))


def settings(network: nn.Module | None = None, trainer: dict[str, Any] | None = None, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    module = TaskModule(MLP(4, [3], 2) if network is None else network, Classification(2))
    data = Data(1, Path("x"))
    before = settings_of(module, module.network, data, trainer, rate=0.5)
    data.setup()
    assert settings_of(module, module.network, data, trainer, rate=0.5) == before, "setup makes it no other data"
    json.dumps(before)
    return before


def test_what_differs_is_said() -> None:
    one = settings()
    assert difference(one, settings()) == ""
    assert difference(one, settings(seed=1)).startswith("other initial weights (give the model as it was at first")
    quiet = {"enable_progress_bar": False, "callbacks": [lp.Callback()], "devices": 2, "strategy": "ddp"}
    assert difference(one, settings(trainer=quiet)) == ""
    assert difference(one, settings(trainer={"precision": "bf16-mixed"})) == (
        "trainer.precision nothing instead of bf16-mixed"
    )
    assert difference({}, {}) == ""
    many = difference({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, {})
    assert (
        many
        == "a 1 instead of nothing, b 1 instead of nothing, c 1 instead of nothing, d 1 instead of nothing and more"
    )
    assert difference({"a": "x" * 100}, {"a": [1]}) == f"a {'x' * 57}... instead of [1]"


def test_an_architecture_that_is_not_in_the_weights_counts() -> None:
    assert "network.init_args.activation gelu instead of relu" in difference(
        settings(MLP(4, [3], 2)), settings(MLP(4, [3], 2, activation="relu"))
    )
    torch.manual_seed(0)
    one, other = Mute(0.1), Mute(0.2)
    other.load_state_dict(one.state_dict())
    assert difference(settings(one), settings(other)).startswith("network Mute(")


def test_code_that_is_not_installed_is_part_of_the_settings() -> None:
    own, bare = Mute(0.1), nn.Linear(2, 2)
    assert "code" not in settings_of(bare, bare)
    train = test_objects_are_their_class_and_what_they_keep_of_their_arguments
    settings = settings_of(own, own, Data(3, Path("a")), train=train)
    found = settings["code"][__name__]
    assert {"Mute.__init__", "Data.setup", "Own.__init__"} <= found.keys(), "the last one by what the function names"
    changed = {**settings, "code": {__name__: {**found, "Data.setup": "0"}}}
    said = f"other code ({__name__.replace('.', '/')}.py has changed: Data.setup)"
    assert difference(settings, changed) == said
    assert difference({**settings, "train": "x"}, changed).endswith(f", {said}")
    observer = {"max_epochs": 1, "callbacks": [lp.Callback()]}
    assert settings_of(own, own, trainer=observer)["code"] == settings_of(own, own)["code"]
