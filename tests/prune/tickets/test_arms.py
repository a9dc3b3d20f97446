"""The trainings of a level: what each control shares with its ticket, and what it has of its own."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from torch import Tensor, nn

from prune.allocation import Global
from prune.levels import Levels
from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewinding.modes import MODES, Rewind
from prune.rewinding.start import Start
from prune.shrinking import Coupled
from prune.tickets.arms import ARMS, Hunt, check_other, derived_seed, ticket_start
from prune.tickets.controls import Controls
from prune.tickets.reinit import reinitialised
from prune.tickets.store import Store
from prune.tickets.trainee import Arm, Trainee
from tests.helpers.ranks import on_ranks
from tests.prune.tickets.test_hunt import run
from workbench.checkpoints import compact
from workbench.records.source import Source
from workbench.training.save import save_network

DENSITIES = (1.0, 0.5, 0.25)


class Drifting(Trainee):
    """Training is a random walk of the weights."""

    def __init__(self, network: nn.Module, seed: int = 1) -> None:
        self.network, self.seed = network, seed

    def train(self, arm: Arm, folder: Path, part: tuple[int, int, str], level: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(arm.seed)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
        return {"metrics": {}}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(weights)

    def select_masks(self, pruner: Pruner, density: float, within: Masks) -> Masks:
        return pruner(self.network, density, within=within)

    def save(self, folder: Path, result: dict[str, Any], masks: Masks) -> None:
        save_network(self.network, None, folder, result, masks, example=False)

    def point_hashes(self) -> dict[str, str]:
        return {}


class Net(nn.Module):
    """A convolution and two matrices, everything in multiples of four."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.init_args = {"width": width}
        self.conv, self.fc, self.out = nn.Conv2d(4, 8, 3), nn.Linear(8, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.conv(x).relu().mean((2, 3))).relu())


STRUCTURES: dict[str, Any] = {
    "unstructured": "unstructured",
    "2:4": "2:4",
    "4x2": "4x2",
    "channel": "channel",
    "balanced": "balanced",
    "coupled": Coupled(torch.ones(2, 4, 5, 5)),
}


def train(hunt: Hunt, level: int, arm: str) -> Arm:
    """As ``prune.tickets.hunt`` does, without Lightning."""
    made = ARMS[arm](hunt, level)
    if made.start.weights is not None:
        hunt.trainee.load(made.start.weights)
    hunt.trainee.train(made, hunt.store.folder(level, arm), (0, 1, ""), level)
    masks = hunt.pruner(hunt.trainee.network, 1.0) if made.masks is None else made.masks
    masks.apply(hunt.trainee.network)
    result: dict[str, Any] = {"metrics": {}}
    hunt.trainee.save(hunt.store.folder(level, arm), result, masks)
    hunt.store.keep(level, arm, result, masks)
    return made


def hunted(
    out: Path, structure: str = "unstructured", allocation: str = "global", seed: int = 1, **options: Any
) -> Hunt:
    """Tickets of two levels."""
    torch.manual_seed(seed)
    made = STRUCTURES[structure]
    pruner = Pruner(structure=made, allocation=allocation, exclude=["out.*"] if structure == "channel" else None)
    hunt = Hunt(Drifting(Net(), seed), pruner, DENSITIES, Store(out, "key"), **options)
    for level in range(3):
        train(hunt, level, "ticket")
    return hunt


def other_of(hunt: Hunt) -> Controls:
    return Controls(other=Source(hunt.store.out))


def masks_of(hunt: Hunt, arm: str, level: int = 2) -> Masks:
    found = ARMS[arm](hunt, level).masks
    assert found is not None
    return found


def units(hunt: Hunt, masks: Masks) -> dict[str, int]:
    layout = hunt.pruner.axes.structure.layout(hunt.trainee.network, hunt.pruner.scope(hunt.trainee.network))
    return {key: int(alive.sum()) for key, alive in (layout.unpruned(masks) or {}).items()}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_masks_keep_as_much_as_the_ticket_in_whole_units(tmp_path: Path, structure: str) -> None:
    hunt = hunted(tmp_path, structure, "global" if structure == "unstructured" else "uniform")
    ticket, shuffled, random = hunt.store.masks(2), masks_of(hunt, "shuffled"), masks_of(hunt, "random")
    assert units(hunt, shuffled) == units(hunt, ticket)
    assert shuffled.counts() == ticket.counts()
    assert sum(units(hunt, random).values()) == sum(units(hunt, ticket).values())
    for masks in (shuffled, random):
        assert masks.keys() == ticket.keys()
        assert masks != ticket
        for name, mask in masks.items():
            inputs = mask.movedim(1, -1)
            if structure == "2:4":
                assert inputs.unflatten(-1, (-1, 4)).sum(-1).max() <= 2, name
            if structure == "4x2":
                blocks = mask.unflatten(0, (-1, 4)).unflatten(2, (-1, 2)).float()
                assert blocks.amax((1, 3)).equal(blocks.amin((1, 3))), name
            if structure == "channel":
                rows = mask.flatten(1).float()
                assert rows.amax(1).equal(rows.amin(1)), name
            if structure == "balanced":
                rows = mask.flatten(1).sum(1)
                assert rows.max() - rows.min() <= 1, name
            if structure == "coupled" and name == "fc.weight":
                kept = mask.any(1)
                assert mask.equal(kept[:, None] & mask.any(0))
                assert masks["out.weight"].equal(kept.expand(4, -1)), "what is made is read"


@pytest.mark.parametrize("arm", ["shuffled", "random"])
def test_masks_are_anywhere(tmp_path: Path, arm: str) -> None:
    """Over many seeds every weight is kept as often as the next, whatever the ticket kept."""
    hunt = hunted(tmp_path)
    ticket, seeds = hunt.store.masks(1), 80
    total = {name: torch.zeros(mask.shape) for name, mask in ticket.items()}
    for seed in range(seeds):
        hunt.trainee.seed = seed
        for name, mask in masks_of(hunt, arm, 1).items():
            total[name] += mask
    for name, times in total.items():
        share = ticket.layer_densities()[name] if arm == "shuffled" else ticket.density
        spread = (share * (1 - share) * seeds) ** 0.5
        assert (times - share * seeds).abs().max() < 5 * spread, name
        assert times.mean() / seeds == pytest.approx(share, abs=1e-6 if arm == "shuffled" else 0.02)


def test_a_random_mask_takes_large_and_small_units_alike(tmp_path: Path) -> None:
    """Means over many random numbers are all alike: by them only the smallest units would be kept."""
    hunt = hunted(tmp_path, "channel", "uniform")
    kept = {"conv.weight": 0, "fc.weight": 0}
    for seed in range(30):
        hunt.trainee.seed = seed
        for name, count in units(hunt, masks_of(hunt, "random", 1)).items():
            kept[name] += count
    assert kept["conv.weight"] / (30 * 8) == pytest.approx(0.5, abs=0.1)
    assert kept["fc.weight"] / (30 * 16) == pytest.approx(0.5, abs=0.1)


def test_random_masks_are_drawn_anew_and_no_layer_is_lost(tmp_path: Path) -> None:
    hunt = hunted(tmp_path)
    assert not masks_of(hunt, "random", 2).is_subset(masks_of(hunt, "random", 1))
    sparse = Masks({n: torch.arange(m.numel()).view(m.shape) < 2 for n, m in hunt.store.masks(2).items()})
    hunt.store.keep(2, "ticket", {}, sparse)
    hunt.trainee.save(hunt.store.folder(2), {"metrics": {}}, _applied(hunt, sparse))
    for seed in range(10):
        hunt.trainee.seed = seed
        found = masks_of(hunt, "random")
        assert sum(kept for kept, _ in found.counts().values()) == 6
        assert all(kept >= 1 for kept, _ in found.counts().values())


def test_a_random_mask_has_the_floor_of_the_ticket(tmp_path: Path) -> None:
    """A layer of few weights gets none by chance, where the ticket may leave it none."""
    hunt = hunted(tmp_path)
    sparse = Masks({n: torch.arange(m.numel()).view(m.shape) < 1 for n, m in hunt.store.masks(2).items()})
    hunt.store.keep(2, "ticket", {}, sparse)
    hunt.trainee.save(hunt.store.folder(2), {"metrics": {}}, _applied(hunt, sparse))
    least = {}
    for floor in (0, 1):
        of = replace(hunt, pruner=replace(hunt.pruner, allocation=Global(floor)))
        masks = []
        for seed in range(10):
            of.trainee.seed = seed
            masks.append(masks_of(of, "random"))
        least[floor] = min(kept for each in masks for kept, _ in each.counts().values())
    assert least == {0: 0, 1: 1}


def _applied(hunt: Hunt, masks: Masks) -> Masks:
    masks.apply(hunt.trainee.network)
    return masks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["same", "fresh"])
def test_controls_are_paired_with_their_ticket(tmp_path: Path, mode: Any, order: Any) -> None:
    hunt = hunted(tmp_path, rewind=Rewind(mode=mode, order=order))
    ticket, trained = ticket_start(hunt, 2), hunt.store.weights(1)
    replaced = replace(hunt, controls=other_of(hunted(tmp_path / "other", seed=2)))
    for name in ("shuffled", "random", "other"):
        arm = ARMS[name](replaced, 2)
        assert (arm.start.at, arm.start.optimizer, arm.start.random) == (ticket.at, ticket.optimizer, ticket.random)
        assert (arm.start.weights is None) == (mode in ("all", "weights"))
        assert arm.start.weights is None or all(torch.equal(arm.start.weights[n], trained[n]) for n in trained)
        assert arm.seed == hunt.seed(2)
    new = ARMS["reinit"](hunt, 2)
    expected = reinitialised(hunt.trainee.network, derived_seed(1, 2, "reinit"))
    assert new.start.weights is not None
    assert all(torch.equal(new.start.weights[name], value) for name, value in expected.items())
    assert (new.start.at, new.start.random, new.seed) == ("first", order == "same", hunt.seed(2))
    assert new.masks == hunt.store.masks(2)
    assert hunt.seed(2) == (1 if order == "same" else derived_seed(1, 2, "order"))


def test_initial_weights_are_new_at_every_level_and_the_same_in_every_hunt_of_the_seed(tmp_path: Path) -> None:
    one, other = hunted(tmp_path / "a"), hunted(tmp_path / "b", "2:4", "uniform", rewind=Rewind(mode="weights"))
    first, second = (ARMS["reinit"](one, level).start.weights or {} for level in (1, 2))
    assert not torch.equal(first["fc.weight"], second["fc.weight"])
    assert torch.equal(second["fc.weight"], (ARMS["reinit"](other, 2).start.weights or {})["fc.weight"])


@pytest.mark.parametrize("mode", MODES)
def test_the_dense_control_goes_on_from_its_last_weights(tmp_path: Path, mode: Any) -> None:
    hunt = hunted(tmp_path, rewind=Rewind(mode=mode))
    for level in (1, 2):
        before = hunt.store.weights(0) if level == 1 else hunt.store.weights(1, "dense")
        arm = train(hunt, level, "dense")
        assert arm.masks is None
        assert (arm.start.at, arm.seed) == ("end" if mode == "fine_tuning" else "point", 1)
        assert arm.start.weights is not None
        assert all(torch.equal(arm.start.weights[name], value) for name, value in before.items())
    assert hunt.store.masks(2, "dense").density == 1


def test_a_twin_differs_in_data_order_and_randomness_only(tmp_path: Path) -> None:
    hunt = hunted(tmp_path, rewind=Rewind(mode="learning_rate"))
    arm, ticket = ARMS["twin"](hunt, 2), ticket_start(hunt, 2)
    assert arm.masks == hunt.store.masks(2)
    assert (arm.start.at, arm.start.optimizer, arm.start.random) == (ticket.at, ticket.optimizer, False)
    assert arm.seed == derived_seed(1, 2, "twin")
    assert ARMS["twin"](hunt, 0) == Arm(Start("point", random=False), None, derived_seed(1, 0, "twin"))


def test_the_mask_of_another_hunt(tmp_path: Path) -> None:
    theirs = hunted(tmp_path / "theirs", seed=2)
    ours = hunted(tmp_path / "ours", controls=other_of(theirs))
    assert masks_of(ours, "other") == theirs.store.masks(2) != ours.store.masks(2)


def test_another_hunt_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    ours = hunted(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"controls has 'other': give the hunt whose mask it has as controls\.other"):
        Controls(arms=("other",))  # type: ignore[arg-type]
    theirs = hunted(tmp_path / "theirs", seed=2)
    (tmp_path / "theirs" / "level_02" / "record.json").unlink()
    with pytest.raises(ValueError, match=r"theirs/level_02 is no finished level, and .*ours/level_02 is to have"):
        ARMS["other"](replace(ours, controls=other_of(theirs)), 2)
    narrow = Hunt(Drifting(Net(12)), Pruner(exclude=["conv.*"]), DENSITIES, Store(tmp_path / "narrow", "key"))
    for level in range(2):
        train(narrow, level, "ticket")
    with pytest.raises(ValueError, match=r"different networks: 'fc.weight' is \(12, 8\) there, \(16, 8\) here"):
        ARMS["other"](replace(ours, controls=other_of(narrow)), 1)
    sparser = Hunt(Drifting(Net()), Pruner(), (1.0, 0.4), Store(tmp_path / "sparser", "key"))
    for level in range(2):
        train(sparser, level, "ticket")
    with pytest.raises(ValueError, match=r"sparser/level_01 has density 0\.4, .*ours/level_01 0\.5: name a hunt of"):
        ARMS["other"](replace(ours, controls=other_of(sparser)), 1)


def test_a_ticket_found_elsewhere_gives_its_controls_their_start(tmp_path: Path) -> None:
    found = hunted(tmp_path / "found")
    given = Arm(Start("first", weights=found.store.weights(0)), found.store.masks(2), 9)
    moved = replace(found, store=Store(tmp_path / "moved", "key"), ticket=given)
    assert train(moved, 2, "ticket") is given
    for name in ("shuffled", "random"):
        assert ARMS[name](moved, 2).start is given.start
    assert masks_of(moved, "reinit") == given.masks
    assert masks_of(moved, "shuffled").counts() == found.store.masks(2).counts()


def hashes(hunt: Hunt) -> list[str]:
    found = [masks_of(hunt, arm, level).hash() for arm in ("shuffled", "random") for level in (1, 2)]
    weights = ARMS["reinit"](hunt, 2).start.weights or {}
    return [*found, hashlib.sha256(b"".join(v.numpy().tobytes() for v in weights.values())).hexdigest()]


def alone_or_not(hunt: Hunt) -> list[str]:
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(torch.distributed.get_rank())
    return hashes(hunt)


def test_ranks_agree_without_a_word(tmp_path: Path) -> None:
    hunt = hunted(tmp_path)
    one, other = on_ranks(alone_or_not, hunt)
    assert one == other == hashes(hunt)
    assert len(set(one)) == len(one)


class Watch(lp.Callback):
    """What was in the batches of each training, and how many updates it made, by its folder."""

    def __init__(self) -> None:
        self.seen: dict[str, list[str]] = {}
        self.noise: dict[str, list[float]] = {}
        self.updates: dict[str, int] = {}

    def on_train_start(self, trainer: lp.Trainer, module: Any) -> None:
        self.updates[trainer.default_root_dir] = -trainer.global_step

    def on_train_batch_start(self, trainer: lp.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        digest = hashlib.sha256(batch[0].numpy().tobytes()).hexdigest()
        self.seen.setdefault(trainer.default_root_dir, []).append(digest)
        state = torch.get_rng_state()
        self.noise.setdefault(trainer.default_root_dir, []).append(float(torch.rand(())))
        torch.set_rng_state(state)

    def on_train_end(self, trainer: lp.Trainer, module: Any) -> None:
        self.updates[trainer.default_root_dir] += trainer.global_step

    def __deepcopy__(self, memo: Any) -> "Watch":
        return self


@pytest.mark.parametrize(("order", "levels"), [("same", 2), ("fresh", 1)])
def test_batches_and_noise_are_those_of_the_ticket(tmp_path: Path, order: str, levels: int) -> None:
    """20 updates in a training, and the rewind point after the 13th."""
    watch = Watch()
    controls = ["reinit", "shuffled", "random", "dense"]
    rewind = Rewind("13it", order=order)  # type: ignore[arg-type]
    result = run(
        tmp_path,
        None,
        {"callbacks": [watch]},
        levels=Levels(levels, rate=0.5),
        rewind=rewind,
        controls=controls,
    )
    for level in range(1, levels + 1):
        ticket = str(tmp_path / f"level_{level:02d}")
        for name in ("shuffled", "random", "dense", "reinit"):
            assert watch.seen[f"{ticket}/{name}"][-7:] == watch.seen[ticket], name
            assert watch.noise[f"{ticket}/{name}"][-7:] == watch.noise[ticket] or name == "reinit", name
        if order == "same":
            assert watch.seen[ticket] == watch.seen[str(tmp_path / "level_00")][13:]
            assert watch.seen[f"{ticket}/reinit"] == watch.seen[str(tmp_path / "level_00")]
            assert watch.noise[f"{ticket}/reinit"] == watch.noise[str(tmp_path / "level_00")]
            assert watch.noise[ticket] == watch.noise[str(tmp_path / "level_00")][13:]
        else:
            assert watch.seen[ticket] != watch.seen[str(tmp_path / "level_00")][13:]
        updates = {name: watch.updates[f"{ticket}/{name}"] for name in controls}
        assert updates == {"reinit": 20, "shuffled": 7, "random": 7, "dense": 7}
        hunted = sum(watch.updates[str(tmp_path / f"level_{n:02d}")] for n in range(level + 1))
        trained = watch.updates[str(tmp_path / "level_00")]
        trained += sum(watch.updates[str(tmp_path / f"level_{n:02d}" / "dense")] for n in range(1, level + 1))
        assert trained == hunted == 20 + 7 * level, "the dense network had as many updates as the hunt"
        densities = {name: record["density"] for name, record in result["levels"][level]["controls"].items()}
        ours = result["levels"][level]["density"]
        assert densities == {"reinit": ours, "shuffled": ours, "random": ours, "dense": 1.0}
        kept = {name: Masks(compact.masks(f"{ticket}/{name}")) for name in ("reinit", "shuffled", "random")}
        assert kept["reinit"].hash() == result["levels"][level]["mask_hash"] != kept["shuffled"].hash()


def test_another_hunt_is_looked_at_before_training_and_again(tmp_path: Path) -> None:
    theirs = hunted(tmp_path / "theirs", seed=2)
    ours = Hunt(Drifting(Net()), Pruner(), DENSITIES, Store(tmp_path / "ours", "key"))
    ours = replace(ours, controls=other_of(theirs))
    check_other(ours)
    for level in range(2):
        train(ours, level, "ticket")
    train(ours, 1, "other")
    check_other(ours)
    third = hunted(tmp_path / "third", seed=3)
    with pytest.raises(ValueError, match=r"level_01/other was trained under another mask than .*third/level_01 has"):
        check_other(replace(ours, controls=other_of(third)))
    (tmp_path / "theirs" / "level_02" / "record.json").unlink()
    with pytest.raises(ValueError, match=r"theirs/level_02 is no finished level"):
        check_other(ours)
    check_other(replace(ours, max_drop=0.1))


def test_a_hunt_may_begin_after_a_call_that_left_a_weight_with_a_history(tmp_path: Path) -> None:
    net = Net()
    net.head = nn.utils.spectral_norm(nn.Linear(2, 2))
    net.head(torch.randn(1, 2))
    hunt = Hunt(Drifting(net), Pruner(), DENSITIES, Store(tmp_path, "key"), controls=Controls(arms=("reinit",)))
    assert hunt.untrained is not None
    assert hunt.untrained is not net
