import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.compact_checkpoints import magnitude, same
from workbench import load, save
from workbench.checkpoints import compact
from workbench.models import MLP

# Hostile and damaged folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("saved")
    model = MLP(6, (8,), 3, norm="batch")
    return save(model, path, magnitude(model, 0.3), provenance={"metrics": {"loss": 0.5}})


def copied(saved: Path, to: Path) -> tuple[Path, dict[str, Any]]:
    shutil.copytree(saved, to, dirs_exist_ok=True)
    return to, json.loads((to / "checkpoint.json").read_text())


def signed(path: Path, index: Any, sign: bool = True) -> None:
    """Write the index, with the checksum that a forger would give it."""
    if sign and isinstance(index, dict):
        index.pop("sha256", None)
        index["sha256"] = hashlib.sha256(json.dumps(index, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (path / "checkpoint.json").write_text(json.dumps(index))


def refused(path: Path) -> str:
    """The message with which every way to read the folder refuses it."""
    messages = []
    for read in (load, compact.tensors, compact.masks):
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            read(path)
        messages.append(str(caught.value))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(path, model=MLP(6, (8,), 3, norm="batch"))
    return messages[0]


@pytest.mark.parametrize("which", ["json", "weights"])
@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_harmless(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, which: str, place: float, value: int
) -> None:
    path, index = copied(saved, tmp_path_factory.mktemp("flip"))
    file = path / ("checkpoint.json" if which == "json" else index["weights"]["file"])
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= value
    file.write_bytes(content)
    try:
        state = compact.tensors(path)
    except ValueError as error:
        said = str(error)
    else:
        said = str(file)
        assert which == "json"
        assert json.loads(content) == index, "white space, or another spelling of the same"
        assert all(same(tensor, state[name]) for name, tensor in compact.tensors(saved).items())
    assert str(file) in said


@pytest.mark.parametrize("which", ["json", "weights"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path, which: str, share: float) -> None:
    path, index = copied(saved, tmp_path)
    file = path / ("checkpoint.json" if which == "json" else index["weights"]["file"])
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert str(file) in refused(path)
    file.write_bytes(content + b" x")
    assert str(file) in refused(path)
    file.unlink()
    with pytest.raises(ValueError, match=str(path)):
        load(path)


W = "layers.0.weight"
HUGE = 10**9


def edit(keys: list[Any], value: Any) -> Callable[[Any], Any]:
    """Set, or where ``value`` is Ellipsis delete, what lies under the keys."""

    def change(index: Any) -> Any:
        if not keys:
            return value
        inner = index
        for key in keys[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        return index

    return change


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "huge shape": edit(["tensors", W, "shape"], [HUGE, HUGE]),
    "huge shape, nothing kept": edit(["tensors", W], {"dtype": "float32", "shape": [HUGE, 100], "kept": 0}),
    "huge dense shape": edit(["tensors", "layers.0.bias", "shape"], [HUGE]),
    "overflowing shape": edit(["tensors", W, "shape"], [2**62, 2**62, 2**62]),
    "overflowing empty shape": edit(["tensors", W], {"dtype": "float32", "shape": [0, 2**62, 2**62], "kept": 0}),
    "enormous number": edit(["tensors", W, "shape"], [10**400, 0]),
    "negative shape": edit(["tensors", W, "shape"], [-6, -8]),
    "other shape of as many": edit(["tensors", W, "shape"], [6, 8]),
    "flat shape": edit(["tensors", W, "shape"], [48]),
    "fractional shape": edit(["tensors", W, "shape"], [6.0, 8.0]),
    "shape of bools": edit(["tensors", W, "shape"], [True, 48]),
    "shape of strings": edit(["tensors", W, "shape"], ["8", "6"]),
    "shape is a number": edit(["tensors", W, "shape"], 48),
    "shape is none": edit(["tensors", W, "shape"], None),
    "no shape": edit(["tensors", W, "shape"], ...),
    "a million dimensions": edit(["tensors", W, "shape"], [1] * 10**5),
    "other dtype": edit(["tensors", W, "dtype"], "float64"),
    "narrower dtype": edit(["tensors", W, "dtype"], "bfloat16"),
    "unknown dtype": edit(["tensors", W, "dtype"], "quint8"),
    "dtype is a function": edit(["tensors", W, "dtype"], "load"),
    "dtype is a list": edit(["tensors", W, "dtype"], ["float32"]),
    "stored otherwise": edit(["tensors", W, "stored"], "float16"),
    "stored is none": edit(["tensors", W, "stored"], None),
    "too few kept": edit(["tensors", W, "kept"], 13),
    "too many kept": edit(["tensors", W, "kept"], 15),
    "more kept than there are": edit(["tensors", W, "kept"], 49),
    "negative kept": edit(["tensors", W, "kept"], -1),
    "kept is true": edit(["tensors", W, "kept"], True),
    "kept is none": edit(["tensors", W, "kept"], None),
    "kept is a string": edit(["tensors", W, "kept"], "14"),
    "mask forgotten": edit(["tensors", W, "kept"], ...),
    "mask on what has none": edit(["tensors", "layers.0.bias", "kept"], 8),
    "entry is none": edit(["tensors", W], None),
    "entry is a list": edit(["tensors", W], []),
    "alias of itself": edit(["tensors", W], {"alias": W}),
    "alias of an alias": edit(["tensors", "x"], {"alias": "y"}),
    "alias of nothing": edit(["tensors", W], {"alias": "nowhere"}),
    "alias of a number": edit(["tensors", W], {"alias": 3}),
    "alias of a list": edit(["tensors", W], {"alias": []}),
    "alias and more": edit(["tensors", W, "alias"], "layers.0.bias"),
    "alias of another shape": edit(["tensors", W], {"alias": "layers.0.bias"}),
    "entry missing": edit(["tensors", W], ...),
    "entry of nothing": edit(["tensors", "more"], {"dtype": "float32", "shape": [2]}),
    "no entries": edit(["tensors"], {}),
    "entries are a list": edit(["tensors"], []),
    "newer version": edit(["version"], 2),
    "version is true": edit(["version"], True),
    "version is a float": edit(["version"], 1.0),
    "version is missing": edit(["version"], ...),
    "foreign format": edit(["format"], "safetensors"),
    "a list": edit([], [1, 2]),
    "a number": edit([], 1),
    "nothing": edit([], None),
    "file above": edit(["weights", "file"], "../weights-0123456789abcdef.safetensors"),
    "absolute file": edit(["weights", "file"], "/etc/passwd"),
    "parent folder": edit(["weights", "file"], ".."),
    "own index": edit(["weights", "file"], "checkpoint.json"),
    "file with a zero": edit(["weights", "file"], "weights-0123456789abcdef.safetensors\0"),
    "file with a newline": edit(["weights", "file"], "weights-0123456789abcdef.safetensors\n"),
    "file is a number": edit(["weights", "file"], 3),
    "other file": edit(["weights", "file"], "weights-0123456789abcdef.safetensors"),
    "no weights": edit(["weights"], ...),
    "weights are a list": edit(["weights"], []),
    "wrong size": edit(["weights", "bytes"], 3),
    "size is none": edit(["weights", "bytes"], None),
    "no hash": edit(["weights", "sha256"], ...),
    "wrong hash": edit(["weights", "sha256"], "0" * 64),
    "no architecture": edit(["architecture"], ...),
    "architecture is a list": edit(["architecture"], []),
    "architecture is text": edit(["architecture"], "os.system"),
    "class path is a number": edit(["architecture", "class_path"], 3),
    "arguments are a list": edit(["architecture", "init_args"], [6, 8]),
    "arguments are none": edit(["architecture", "init_args"], None),
    "configuration beside arguments": edit(["architecture", "config"], 5),
    "activation is a number": edit(["architecture", "activation"], 3),
    "provenance is a list": edit(["provenance"], []),
}


# A whole checkpoint, if not of this model.
OTHER_MODELS = ("other shape of as many", "flat shape")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_forged_index_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    path, index = copied(saved, tmp_path)
    if case == "alias of an alias":
        index["tensors"]["y"] = {"alias": "x"}
    signed(path, HOSTILE[case](index))
    with limited():
        if case in OTHER_MODELS:
            with pytest.raises(ValueError, match="another model"):
                load(path)
        else:
            refused(path)


@pytest.mark.parametrize("case", ["huge shape", "too few kept", "other dtype", "wrong size"])
def test_a_careless_edit_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    path, index = copied(saved, tmp_path)
    signed(path, HOSTILE[case](index), sign=False)
    assert "was altered" in refused(path)


class limited:
    """No more memory inside than a gigabyte on top of what the process has."""

    def __enter__(self) -> None:
        import resource

        self.before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, self.before[1]))

    def __exit__(self, *_: object) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, self.before)


CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "function": ({"class_path": "os.system", "init_args": {"command": "exit 1"}}, "not a torch.nn.Module class"),
    "eval": ({"class_path": "builtins.eval", "init_args": {}}, "not a torch.nn.Module class"),
    "class": ({"class_path": "subprocess.Popen", "init_args": {"args": ["false"]}}, "not a torch.nn.Module class"),
    "relative": ({"class_path": ".os.system", "init_args": {}}, "cannot be imported"),
    "empty": ({"class_path": "", "init_args": {}}, "cannot be imported"),
    "dots": ({"class_path": "...", "init_args": {}}, "cannot be imported"),
    "nowhere": ({"class_path": "no.such.Class", "init_args": {}}, "cannot be imported"),
    "no attribute": ({"class_path": "torch.nn.Nothing", "init_args": {}}, "cannot be imported"),
    "unknown argument": ({"class_path": "workbench.models.mlp.MLP", "init_args": {"depth": 3}}, "cannot be built"),
    "wrong argument": ({"class_path": "workbench.models.mlp.MLP", "init_args": {"hidden": "wide"}}, "cannot be built"),
    "another model": (
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}},
        "another model",
    ),
    "huge": ({"class_path": "workbench.models.mlp.MLP", "init_args": {"hidden": [HUGE]}}, "another model"),
    "more than there is": ({"class_path": "workbench.models.mlp.MLP", "init_args": {"hidden": [10**15, 10**15]}}, "."),
    "beyond numbers": (
        {"class_path": "workbench.models.mlp.MLP", "init_args": {"hidden": [10**30]}},
        "cannot be built",
    ),
    "unknown activation": (
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}, "activation": "step"},
        "cannot be built",
    ),
    "no configuration": ({"class_path": "torch.nn.Linear", "config": {}}, "cannot be built"),
    "huge configuration": (
        {
            "class_path": "transformers.BertForSequenceClassification",
            "config": {"vocab_size": HUGE, "hidden_size": 768},
        },
        "another model",
    ),
    "wrong configuration": (
        {"class_path": "transformers.BertForSequenceClassification", "config": {"hidden_size": "wide"}},
        "cannot be built",
    ),
    "hidden attention from a hub": (
        {
            "class_path": "transformers.BertForSequenceClassification",
            "config": {"text": [{"_attn_implementation": "evil/kernels"}]},
        },
        "damaged",
    ),
    "attention from a hub": (
        {"class_path": "transformers.BertForSequenceClassification", "config": {"attn_implementation": "evil/kernels"}},
        "damaged",
    ),
    "attention from a hub in a part": (
        {
            "class_path": "workbench.models.SentenceEncoder",
            "init_args": {
                "encoder": {
                    "torch.nn.Module": {
                        "class_path": "transformers.BertModel",
                        "config": {"attn_implementation": "evil/kernels"},
                    }
                }
            },
        },
        "damaged",
    ),
    "a pooler that is no choice": (
        {"class_path": "transformers.BertModel", "config": {}, "pooler": "evil"},
        "damaged",
    ),
}


@pytest.mark.parametrize("case", CLASSES)
def test_a_forged_class_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    path, index = copied(saved, tmp_path)
    index["architecture"], message = CLASSES[case]
    signed(path, index)
    import transformers  # noqa: F401 - so that its own memory is not counted

    with limited(), pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_mask_that_is_missing_is_not_read_off_the_zeros(saved: Path, tmp_path: Path) -> None:
    path, index = copied(saved, tmp_path)
    state = load_file(path / index["weights"]["file"])
    del state[f"mask/{W}"]
    rewrite(path, index, state)
    assert f"mask/{W}" in refused(path)


def rewrite(path: Path, index: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Other weights under the same index, with the checksums that a forger would give them."""
    file = path / index["weights"]["file"]
    save_file(state, file)
    index["weights"] |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    signed(path, index)


WEIGHTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "another key": lambda state: state.update({"dense/more": torch.ones(2)}),
    "another mask": lambda state: state.update({f"mask/{W}": state[f"mask/{W}"] ^ 1}),
    "longer mask": lambda state: state.update({f"mask/{W}": torch.zeros(700, dtype=torch.uint8)}),
    "mask of floats": lambda state: state.update({f"mask/{W}": torch.zeros(6)}),
    "mask of bools": lambda state: state.update({f"mask/{W}": torch.zeros(6, dtype=torch.bool)}),
    "fewer values": lambda state: state.update({f"values/{W}": state[f"values/{W}"][:-1].clone()}),
    "values of another type": lambda state: state.update({f"values/{W}": state[f"values/{W}"].double()}),
    "dense of another type": lambda state: state.update({"dense/layers.0.bias": torch.zeros(8, dtype=torch.int32)}),
    "dense of another shape": lambda state: state.update({"dense/layers.0.bias": torch.zeros(2, 4)}),
    "nothing": lambda state: state.clear(),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_forged_weights_are_refused(saved: Path, tmp_path: Path, case: str) -> None:
    path, index = copied(saved, tmp_path)
    state = load_file(path / index["weights"]["file"])
    WEIGHTS[case](state)
    rewrite(path, index, state)
    with limited():
        refused(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}" + b"\0" * 100])
def test_weights_that_are_no_safetensors_are_refused(saved: Path, tmp_path: Path, content: bytes) -> None:
    path, index = copied(saved, tmp_path)
    file = path / index["weights"]["file"]
    file.write_bytes(content)
    index["weights"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    signed(path, index)
    assert str(file) in refused(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\ud800", "NaN", '"' + "\\ud800" + '"'])
def test_an_index_that_is_no_json_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    path, _ = copied(saved, tmp_path)
    (path / "checkpoint.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(path)


def test_an_index_nested_to_the_limit_is_refused(saved: Path, tmp_path: Path) -> None:
    path, index = copied(saved, tmp_path)
    for depth in range(900, 1000, 7):
        index["provenance"] = {}
        text = json.dumps(index).replace('"provenance": {}', '"provenance": {"a": ' + "[" * depth + "]" * depth + "}")
        (path / "checkpoint.json").write_text(text)
        refused(path)


def random_json(rng: random.Random, depth: int = 0) -> Any:
    leaves = [None, True, 0, -1, 1, 8, 2**63, 1.5, float("nan"), "", "float32", "alias", W, HUGE]
    if depth > 2 or rng.random() < 0.5:
        return rng.choice(leaves)
    if rng.random() < 0.5:
        return [random_json(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    keys = ["dtype", "shape", "kept", "alias", "stored", "file", "class_path", "init_args", "config", W]
    return {rng.choice(keys): random_json(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def test_no_forgery_at_random_gets_through(saved: Path, tmp_path: Path) -> None:
    """Any one value of the index replaced by anything, with the right checksum."""
    path, index = copied(saved, tmp_path)
    state = compact.tensors(saved)
    text = json.dumps(index)
    places = [list(place) for place in paths(index) if place[:1] != ("sha256",)]
    rng = random.Random(0)
    passed = 0
    with limited():
        for _ in range(600):
            forged = edit(rng.choice(places), random_json(rng))(json.loads(text))
            signed(path, forged)
            try:
                found = load(path).state_dict()
            except ValueError as error:
                said = str(error)
            else:
                said = str(path)
                passed += 1
                assert list(found) == list(state)
                assert all(same(tensor, state[name]) for name, tensor in found.items())
            assert str(path) in said
    assert passed < 200, "what is in provenance alone"


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [above] if above else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += paths(item, (*above, key))
    return found
