"""What a hunt refuses in its folder before it trains: altered files, damaged records, levels of other hunts."""

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prune.levels import Levels
from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewinding.modes import Rewind
from prune.tickets.hunt import hunt
from prune.tickets.store import Store
from tests.helpers.processes import holder
from workbench import records
from workbench.checkpoints import compact
from workbench.duration import Duration
from workbench.models import MLP
from workbench.records.lock import locked

SGD = functools.partial(torch.optim.SGD, lr=0.1)


class Blobs(lp.LightningDataModule):
    classes = 2

    def __init__(self, batch_size: int = 8, noise: float = 1.0) -> None:
        super().__init__()
        self.batch_size, self.noise = batch_size, noise

    def _loader(self, shuffle: bool) -> Any:
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * self.noise
        return DataLoader(TensorDataset(inputs, torch.arange(16) % 2), self.batch_size, shuffle)

    def train_dataloader(self) -> Any:
        return self._loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader(shuffle=False)


def hunted(out: Path, **options: Any) -> Any:
    lp.seed_everything(1, verbose=False)
    given: dict[str, Any] = {"model": lambda: MLP(4, [6], 2), "data": Blobs(), "optimizer": SGD}
    given |= {
        "rewind": Duration(0, "it"),
        "controls": ["random"],
        "seed_everything": 1,
        "levels": Levels(2, rate=0.5),
        **options,
    }
    trainer = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, **given.pop("trainer", {})}
    return hunt(**{**given, "model": given["model"]()}, trainer=trainer, out=out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "hunt"
    hunted(folder)
    return folder


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """The finished hunt, with its last level still to do."""
    shutil.copytree(whole, tmp_path / "hunt")
    (tmp_path / "hunt" / "level_02" / "record.json").unlink()
    return tmp_path / "hunt"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def weights_file(level: Path) -> Path:
    return next((level / "compact").glob("weights-*.safetensors"))


def truncated(level: Path) -> Path:
    file = weights_file(level)
    file.write_bytes(file.read_bytes()[:-9])
    return file


def flipped(level: Path) -> Path:
    file = weights_file(level)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return file


def index_altered(level: Path) -> Path:
    file = level / "compact" / "checkpoint.json"
    file.write_text(file.read_text().replace("MLP", "MPL"))
    return file


def of_another_level(level: Path) -> Path:
    shutil.rmtree(level / "compact")
    shutil.copytree(level.parent / "level_02" / "compact", level / "compact")
    return level / "compact"


def same_masks_other_weights(level: Path) -> Path:
    model = compact.load(level)
    assert isinstance(model, MLP)
    with torch.no_grad():
        next(model.parameters())[next(iter(compact.masks(level).values()))] += 1
    compact.save(model, level / "compact", compact.masks(level))
    return level / "compact"


def missing(level: Path) -> Path:
    shutil.rmtree(level / "compact")
    return level


@pytest.mark.parametrize("level", ["level_00", "level_01", "level_01/random"])
@pytest.mark.parametrize(
    "harm", [truncated, flipped, index_altered, of_another_level, same_masks_other_weights, missing]
)
def test_a_level_that_is_not_as_it_was_left_is_refused(out: Path, level: str, harm: Callable[[Path], Path]) -> None:
    if level == "level_01/random" and harm is of_another_level:
        shutil.copytree(out / "level_02", out / "level_01" / "level_02")
    file = harm(out / level)
    before = stamps(out)
    with pytest.raises(ValueError, match=r"Move .* aside to train it anew; all others are kept") as caught:
        hunted(out)
    assert str(file) in str(caught.value)
    assert str(out / level) in str(caught.value)
    assert stamps(out) == before, "nothing was trained, nothing removed"


def test_moved_aside_it_is_trained_again_and_the_same(out: Path, whole: Path) -> None:
    truncated(out / "level_01" / "random")
    shutil.move(out / "level_01" / "random", out / "aside")
    hunted(out)
    for name in ("level_01/random", "level_02", "level_02/random"):
        assert weights_file(out / name).name == weights_file(whole / name).name
        assert records.read(out / name)["mask_hash"] == records.read(whole / name)["mask_hash"]  # type: ignore[index]


RECORDS = {
    "half-written": ('{"format": 2, "status": "fini', "is not JSON"),
    "empty": ("", "is not JSON"),
    "a list": ("[]", "record format 'list'"),
    "of an earlier version": (
        '{"format": 1, "status": "finished"}',
        "written by an earlier version .*move .*level_01 aside",
    ),
    "of another version": ('{"format": 99, "status": "finished"}', "record format 99"),
    "without its parts": ('{"format": 2, "status": "finished", "fingerprint": "KEY"}', "is damaged: no metrics, "),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_damaged_record_is_named(out: Path, case: str) -> None:
    path = out / "level_01" / "record.json"
    text, said = RECORDS[case]
    path.write_text(text.replace("KEY", json.loads(path.read_text())["fingerprint"]))
    with pytest.raises(ValueError, match=said) as caught:
        hunted(out)
    assert str(path) in str(caught.value)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"levels": Levels(2, rate=0.4)}, "rate 0.5 instead of 0.4"),
    "mode": ({"rewind": Rewind("0it", "weights")}, "rewind.mode all instead of weights"),
    "point": ({"rewind": Duration(1, "it")}, "rewind.at 0it instead of 1it"),
    "activation": ({"model": lambda: MLP(4, [6], 2, activation="relu", init="he")}, "activation gelu instead of relu"),
    "width": ({"model": lambda: MLP(4, [7], 2)}, r"hidden \[6\] instead of \[7\]"),
    "weights": ({"model": lambda: (torch.rand(1), MLP(4, [6], 2))[1]}, "other initial weights"),
    "seed": ({"seed_everything": 2}, "seed 1 instead of 2"),
    "data": ({"data": Blobs(noise=2.0)}, "data.noise 1.0 instead of 2.0"),
    "batch": ({"data": Blobs(4)}, "data.batch_size 8 instead of 4"),
    "budget": ({"trainer": {"max_epochs": 2}}, "trainer.max_epochs 1 instead of 2"),
    "clipping": ({"trainer": {"gradient_clip_val": 1.0}}, "trainer.gradient_clip_val nothing instead of 1.0"),
    "optimizer": ({"optimizer": functools.partial(torch.optim.SGD, lr=0.2)}, "optimizer.lr 0.1 instead of 0.2"),
    "names": ({"pruner": Pruner(include=["layers.0.*"])}, r"pruner.include null instead of \[layers.0.\*\]"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_another_hunt_left_is_refused_naming_the_difference(out: Path, case: str) -> None:
    options, said = OTHERS[case]
    before = stamps(out)
    with pytest.raises(ValueError, match=f"level_00 is a level of another hunt, made with .*{said}"):
        hunted(out, **options)
    assert stamps(out) == before


def test_how_and_where_it_runs_makes_no_other_hunt(out: Path) -> None:
    class Watch(lp.Callback):
        pass

    watched = {"callbacks": [Watch()], "enable_model_summary": True, "log_every_n_steps": 1, "devices": 1}
    assert (
        len(
            hunted(out, trainer=watched, controls=[], levels=Levels(2, rate=0.5, tolerance=0.5, max_drop=9.0))["levels"]
        )
        == 3
    )


@pytest.mark.slow
def test_a_key_is_the_same_in_every_process(out: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.prune.tickets.test_store import hunted\n"
        "print(len(hunted(Path(sys.argv[1]))['levels']))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout.splitlines()[-1:] == ["3"], done.stderr


def test_a_folder_that_is_in_use_is_left_alone(out: Path) -> None:
    with holder(out) as (other, _), pytest.raises(ValueError, match=rf"is in use by process {other.pid}"):
        hunted(out)
    with locked(out):
        assert len(hunted(out)["levels"]) == 3, "its own lock is no obstacle"


def test_levels_without_settings_are_compared_by_key(tmp_path: Path) -> None:
    """As older versions wrote them, and trainings of plain functions do."""
    model = nn.Sequential(nn.Linear(2, 2))
    masks = Masks.ones(model)
    compact.save(model, tmp_path / "level_00" / "compact", masks)
    result = {"metrics": {}, "monitor": ["loss", "min"], "history": [], "world_size": 1, "seconds": 0.0}
    store = Store(tmp_path, "one")
    kept = store.keep(0, "ticket", result, masks)
    store.check()
    assert {**kept, "format": 2} == store.finished(0)
    with pytest.raises(ValueError, match="level_00 is a level of another hunt: choose another out"):
        Store(tmp_path, "two").check()
    record = records.read(tmp_path / "level_00")
    assert record is not None
    del record["checkpoint"]
    records.write(tmp_path / "level_00", record)
    store.check()
