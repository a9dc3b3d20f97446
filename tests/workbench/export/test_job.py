import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench import load, records, save, swap_activation
from workbench.checkpoints import compact
from workbench.export.inputs import TrainedNetwork
from workbench.export.job import export
from workbench.export.torch import write_torch
from workbench.models import MLP, Conv, DenseNet, LeNet5, RecurrentTokens, Transformer
from workbench.records.source import Source

BLOCKED = """
import sys
from importlib.machinery import ModuleSpec
class Blocker:
    # Importing fails; asking whether a package is there, as torch does of many, is no import.
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in %r else None
    def create_module(self, spec):
        raise ImportError(spec.name + " is blocked")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Blocker())
import warnings
warnings.simplefilter("error")
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
import json, os, traceback
for line in sys.stdin:
    code, folder, asked, answered = json.loads(line)
    if not os.fork():
        os.dup2(2, 1)
        status = 1
        try:
            inputs = load_file(asked)
            exec(code)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
OURS = ("distill", "prune", "workbench", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
THEIRS = ("transformers", "datasets", "onnx", "onnxruntime", "scipy", "sklearn", "jsonargparse")
PLAIN_TORCH = """
sys.path.insert(0, folder)
from load import load
model = load()
with torch.no_grad():
    save_file({str(b): model(inputs[str(b)]) for b in (1, 5, 33)}, answered)
"""
TRANSFORMERS = """
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
with torch.no_grad():
    save_file({str(b): model(inputs[f"{b}/input_ids"], attention_mask=inputs[f"{b}/attention_mask"]).logits.float()
               for b in (1, 5, 33)}, answered)
"""
ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
def run(batch):
    mine = {name: value for name, value in inputs.items() if name.split("/")[0] == str(batch)}
    found = {name.rpartition("/")[2]: value.numpy() for name, value in mine.items()}
    if len(found) == 1 and "input_ids" not in found:
        found = {session.get_inputs()[0].name: next(iter(found.values()))}
    return torch.from_numpy(session.run(None, found)[0])
save_file({str(b): run(b) for b in (1, 5, 33)}, answered)
"""


def bert(**options: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=40, max_position_embeddings=12, num_labels=3, initializer_range=0.5, **shape)
    return BertForSequenceClassification(config)


def batch_norm() -> MLP:
    model = MLP(64, (16,), 10, norm="batch")
    norm: Any = model.layers[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked.fill_(7)
    return model


NETWORKS: dict[str, tuple[Any, Any]] = {
    "mlp": (lambda: MLP(64, (32, 32), 10), lambda b: {"input_0": torch.randn(b, 64)}),
    "lenet": (lambda: LeNet5(image_size=8), lambda b: {"input_0": torch.randn(b, 1, 8, 8)}),
    "batch norm": (batch_norm, lambda b: {"input_0": torch.randn(b, 64)}),
    "bert": (
        bert,
        lambda b: {
            "input_ids": torch.randint(1, 40, (b, 7)),
            "attention_mask": (torch.arange(7) < torch.randint(3, 8, (b, 1))).long(),
        },
    ),
}


def pruned(model: nn.Module, density: float = 0.5) -> dict[str, Tensor]:
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            masks[name] = torch.rand(parameter.shape) < density
            parameter.data.masked_fill_(~masks[name], 0)
    return masks


def stage(folder: Path, model: nn.Module, inputs: dict[str, Tensor] | None, **record: Any) -> Source:
    """A finished stage with a checkpoint of ``model``."""
    save(model, folder / "compact", pruned(model), provenance={"made": "by hand"})
    if inputs:
        save_file(inputs, folder / "example.safetensors")
    records.write(
        folder, {"status": "finished", "metrics": {"test/accuracy": 0.5}, "monitor": ["accuracy", "max"], **record}
    )
    return Source(folder)


def answers(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    args = [value for name, value in inputs.items() if name.startswith("input_") and name[6:].isdigit()]
    named = {name: value for name, value in inputs.items() if not name[6:].isdigit()}
    with torch.no_grad():
        raw = model.eval()(*args, **named)
    return raw if isinstance(raw, Tensor) else raw.logits


Bare = Callable[[tuple[str, ...]], tuple[subprocess.Popen[str], Path]]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    """A process that can import none of what is given, run far from this project, and its errors.

    It reads what to run line by line, and forks for each.
    """
    started: dict[tuple[str, ...], tuple[subprocess.Popen[str], Path]] = {}
    folder = tmp_path_factory.mktemp("bare")

    def process(blocked: tuple[str, ...]) -> tuple[subprocess.Popen[str], Path]:
        if blocked not in started:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
            command, errors = [sys.executable, "-c", BLOCKED % (blocked,)], folder / f"{len(started)}.txt"
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with errors.open("w") as stderr:
                new = subprocess.Popen(command, stderr=stderr, cwd=folder, env=environment, **pipes)
            started[blocked] = new, errors
        return started[blocked]

    yield process
    for each, errors in started.values():
        each.communicate()
        assert each.returncode == 0, errors.read_text()


def elsewhere(
    bare: Bare, tmp: Path, folder: Path, asked: dict[str, Tensor], code: str, blocked: tuple[str, ...]
) -> dict[str, Tensor]:
    """What ``code`` answers in a process that can import none of ``blocked``, run far from this project."""
    save_file(asked, tmp / "asked.safetensors")
    process, errors = bare(blocked)
    files = [str(path) for path in (folder, tmp / "asked.safetensors", tmp / "answered.safetensors")]
    print(json.dumps([code, *files]), file=process.stdin, flush=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n", errors.read_text()
    return load_file(tmp / "answered.safetensors")


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A network in every format: name, folder of the exports, what the job returned, the network."""
    torch.manual_seed(3)
    make, example = NETWORKS[request.param]
    tmp = tmp_path_factory.mktemp("exported")
    of = stage(tmp / "stage", make(), example(16))
    result = export(of, formats=["torch", "onnx"], out=tmp / "out")
    return request.param, tmp / "out", result, load(of)


def questions(name: str, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs in batches of 1, 5 and 33, and what the network answers."""
    torch.manual_seed(4)
    asked: dict[str, Tensor] = {}
    expected = {}
    for batch in (1, 5, 33):
        inputs = NETWORKS[name][1](batch)
        expected[str(batch)] = answers(model, inputs)
        for key, value in inputs.items():
            asked[str(batch) if len(inputs) == 1 else f"{batch}/{key}"] = value
    return asked, expected


def test_what_is_reported_was_measured(exported: Any) -> None:
    _, out, result, model = exported
    assert [entry["format"] for entry in result["exports"]] == ["compact", "torch", "onnx"]
    assert json.loads(json.dumps(result)) == result
    assert result["metrics"] == {"test/accuracy": 0.5}
    for entry in result["exports"]:
        folder = out / entry["path"]
        assert entry["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert entry["same_predictions"] is True
        assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    smaller, dense, onnx = result["exports"]
    assert smaller["largest_difference"] == 0
    assert 0 < dense["largest_difference"] < 2e-2
    assert onnx["largest_difference"] < 1e-5
    assert smaller["bytes"] < onnx["bytes"]
    again = load(out / "compact").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
    assert compact.read_index(out / "compact")["provenance"] == {"made": "by hand"}
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask() for path in out.rglob("*") if path.is_file())


def umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


def test_the_dense_folder_loads_where_nothing_of_this_project_is(bare: Bare, exported: Any, tmp_path: Path) -> None:
    name, out, _, model = exported
    asked, expected = questions(name, model)
    moved = tmp_path / "moved"
    shutil.copytree(out / "torch", moved)
    code, blocked = (TRANSFORMERS, OURS) if name == "bert" else (PLAIN_TORCH, (*OURS, *THEIRS))
    found = elsewhere(bare, tmp_path, moved, asked, code, blocked)
    for batch, answer in expected.items():
        assert found[batch].dtype == torch.float32
        torch.testing.assert_close(found[batch], answer, atol=2e-2, rtol=1e-2)
        assert torch.equal(found[batch].argmax(-1), answer.argmax(-1))


def test_the_onnx_file_runs_in_stock_onnx_runtime(bare: Bare, exported: Any, tmp_path: Path) -> None:
    name, out, _, model = exported
    asked, expected = questions(name, model)
    found = elsewhere(bare, tmp_path, out / "onnx", asked, ONNX, (*OURS, "transformers", "onnxscript"))
    for batch, answer in expected.items():
        torch.testing.assert_close(found[batch], answer, atol=1e-5, rtol=1e-4)
        assert torch.equal(found[batch].argmax(-1), answer.argmax(-1))


def test_the_dense_weights_have_sixteen_bits(exported: Any) -> None:
    name, out, _, model = exported
    file = out / "torch" / ("model.safetensors" if name == "bert" else "weights.safetensors")
    state = load_file(file)
    for key, parameter in model.named_parameters():
        assert state[key].dtype == torch.float16
        assert torch.equal(state[key], parameter.detach().half())


def test_it_speaks_of_nothing_but_trouble(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("mlp", "bert"):
        make, example = NETWORKS[name]
        of = stage(tmp_path / name, make(), example(4))
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
            warnings.simplefilter("always")
            export(of, formats=["torch", "onnx"], out=tmp_path / "out" / name)
        assert [str(warning.message) for warning in caught] == []
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ""
    assert logging.getLogger("torch.onnx").level == logging.NOTSET


@pytest.mark.parametrize("values", ["float16", "bfloat16"])
def test_fewer_bits_are_reported_as_what_they_cost(tmp_path: Path, values: Any) -> None:
    inputs = NETWORKS["mlp"][1](16)
    of = stage(tmp_path / "stage", MLP(64, (32, 32), 10), inputs)
    full = export(of, out=tmp_path / "full")
    half = export(of, values=values, out=tmp_path / "half")
    assert (full["values"], half["values"]) == ("float32", values)
    entry = half["exports"][0]
    difference = (answers(load(of), inputs) - answers(load(tmp_path / "half" / "compact"), inputs)).abs().max()
    assert entry["largest_difference"] == pytest.approx(float(difference))
    assert entry["largest_difference"] > 0
    assert entry["bytes"] < full["exports"][0]["bytes"]


def test_predictions_that_change_are_said_to(tmp_path: Path) -> None:
    """Two classes apart by less than 16 bits can tell."""
    model = MLP(2, (), 2)
    layer: Any = model.layers[0]
    layer.weight.data.fill_(1)
    layer.weight.data[1, 0] += 1e-6
    save(model, tmp_path / "stage")
    save_file({"input_0": torch.ones(3, 2)}, tmp_path / "example.safetensors")
    save_file({"input_0": torch.ones(3, 2)}, tmp_path / "stage" / "example.safetensors")
    result = export(Source(tmp_path / "stage"), values="float16", formats=["torch"], out=tmp_path / "out")
    assert [entry["same_predictions"] for entry in result["exports"]] == [False, False]


def test_an_exact_checkpoint_that_is_not_exact_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = stage(tmp_path / "stage", MLP(64, (8,), 10), NETWORKS["mlp"][1](4))
    load_unchanged = compact.load

    def load_changed(path: Path, *args: Any) -> nn.Module:
        model = load_unchanged(path, *args)
        if Path(path) == tmp_path / "out" / "compact":
            next(model.parameters()).data.add_(1)
        return model

    monkeypatch.setattr(compact, "load", load_changed)
    with pytest.raises(ValueError, match="differs from the trained network: this is a defect"):
        export(of, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mlp", torch.bfloat16), ("mlp", torch.float16), ("mlp", torch.float64), ("bert", torch.bfloat16)],
)
def test_a_network_of_another_type(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    make, example = NETWORKS[name]
    of = stage(tmp_path / "stage", make().to(dtype), example(16))
    smaller, dense, onnx = export(of, formats=["torch", "onnx"], out=tmp_path / "out")["exports"]
    assert smaller["largest_difference"] == 0
    assert max(dense["largest_difference"], onnx["largest_difference"]) < 0.2
    assert next(load(tmp_path / "out" / "compact").parameters()).dtype == dtype
    state = load_file(tmp_path / "out" / "torch" / ("model.safetensors" if name == "bert" else "weights.safetensors"))
    assert {tensor.dtype for tensor in state.values()} == {torch.float16 if dtype == torch.float64 else dtype}


def test_an_activation_that_transformers_does_not_know_becomes_a_graph(tmp_path: Path) -> None:
    of = stage(tmp_path / "stage", swap_activation(bert(), "softplus"), NETWORKS["bert"][1](16))
    result = export(of, formats=["torch"], out=tmp_path / "out")
    assert (tmp_path / "out" / "torch" / "load.py").exists()
    assert not (tmp_path / "out" / "torch" / "config.json").exists()
    assert all(entry["same_predictions"] and entry["largest_difference"] < 1e-2 for entry in result["exports"])


def test_an_activation_that_transformers_knows_is_in_its_configuration(tmp_path: Path) -> None:
    of = stage(tmp_path / "stage", swap_activation(bert(), "silu"), NETWORKS["bert"][1](16))
    result = export(of, formats=["torch"], out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "torch" / "config.json").read_text())["hidden_act"] == "silu"
    assert all(entry["same_predictions"] for entry in result["exports"])


@pytest.mark.parametrize("name", ["conv", "densenet", "recurrent"])
def test_the_onnx_file_of_other_networks(tmp_path: Path, name: str) -> None:
    """Any batch; of sequences, which a recurrent network is unrolled for, the example's length or an error."""
    import onnxruntime

    torch.manual_seed(0)
    model, example = {
        "conv": (lambda: Conv(2, 2, 4, image_size=4), lambda *size: {"input_0": torch.randn(*size[:1], 3, 4, 4)}),
        "densenet": (lambda: DenseNet(7, 2), lambda *size: {"input_0": torch.randn(*size[:1], 3, 4, 4)}),
        "recurrent": (
            lambda: RecurrentTokens(9, None, 3, 4, activation="gelu"),
            lambda *size: {"input_ids": torch.randint(0, 9, size), "attention_mask": torch.randint(0, 2, size)},
        ),
    }[name]
    of = stage(tmp_path / "stage", model(), example(4, 3))
    smaller, onnx = export(of, formats=["onnx"], out=tmp_path / "out")["exports"]
    assert (smaller["largest_difference"], onnx["same_predictions"]) == (0, True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"), options)
    for size in ((1, 3), (7, 3)):
        inputs = example(*size)
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]
        torch.testing.assert_close(torch.from_numpy(found), answers(load(of), inputs), atol=1e-5, rtol=1e-4)
    if name == "recurrent":
        for length in (2, 5):
            with pytest.raises(Exception, match=f"invalid dimensions.*\n? index: 1 Got: {length} Expected: 3"):
                session.run(None, {key: value.numpy() for key, value in example(4, length).items()})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else self.layer(-x)


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_what_cannot_be_traced_is_said_so(tmp_path: Path, name: Any) -> None:
    of = stage(tmp_path / "stage", Branching(), {"input_0": torch.randn(4, 4)})
    with pytest.raises(ValueError, match="Branching cannot be traced, which formats torch and onnx need"):
        export(of, formats=[name], out=tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()
    assert export(of, formats=["compact"], out=tmp_path / "out")["exports"][0]["same_predictions"]


def test_one_example_is_enough(tmp_path: Path) -> None:
    of = stage(tmp_path / "stage", MLP(64, (8,), 10), {"input_0": torch.randn(1, 64)})
    export(of, formats=["torch", "onnx"], out=tmp_path / "out")
    sys.path.insert(0, str(tmp_path / "out" / "torch"))
    try:
        import load as loader  # type: ignore[import-not-found]

        assert loader.load().eval()(torch.randn(5, 64)).shape == (5, 10)
    finally:
        sys.path.pop(0)
        del sys.modules["load"]


def test_values_beyond_sixteen_bits_are_refused(tmp_path: Path) -> None:
    model = MLP(64, (8,), 10)
    layer: Any = model.layers[0]
    layer.bias.data[0] = 1e6
    of = stage(tmp_path / "stage", model, NETWORKS["mlp"][1](4))
    with pytest.raises(ValueError, match=r"layers\.0\.bias.*beyond the range of float16"):
        export(of, formats=["torch"], out=tmp_path / "out")
    export(of, formats=["onnx"], out=tmp_path / "out")


def test_a_half_written_export_is_written_again(tmp_path: Path) -> None:
    formats: Any
    for name, formats in (("mlp", ["torch", "onnx"]), ("bert", ["torch"])):
        make, example = NETWORKS[name]
        of, out = stage(tmp_path / name, make(), example(4)), tmp_path / "out" / name
        first = export(of, formats=formats, out=out)
        files = {path.relative_to(out): path.stat().st_size for path in out.rglob("*") if path.is_file()}
        for index, path in enumerate(sorted(out.rglob("*"))):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:20]) if index % 2 else path.unlink()
        (out / ".torch.part").mkdir()
        (out / ".torch.part" / "stale.safetensors").write_text("half")
        (out / "compact" / ".checkpoint.json.1-2.tmp").write_text("half")
        assert export(of, formats=formats, out=out)["exports"] == first["exports"]
        assert {path.relative_to(out): path.stat().st_size for path in out.rglob("*") if path.is_file()} == files


@pytest.fixture
def hunt(tmp_path: Path) -> Source:
    """A finished hunt of three levels, of which the second wins."""
    inputs = NETWORKS["mlp"][1](4)
    levels = []
    for level in range(3):
        torch.manual_seed(level)
        record = {"level": level, "metrics": {"val/accuracy": level / 10}, "size": {"kept": level}}
        stage(tmp_path / "hunt" / f"level_{level:02d}", MLP(64, (8,), 10), inputs, **record)
        levels.append(record)
    torch.manual_seed(2)
    return stage(tmp_path / "hunt", MLP(64, (8,), 10), inputs, levels=levels, winning=1)


@pytest.mark.parametrize(("level", "expected"), [("last", 2), ("winning", 1), (None, 1), (0, 0), (2, 2)])
def test_a_level_of_a_hunt(hunt: Source, tmp_path: Path, level: Any, expected: int) -> None:
    result = export(hunt, level=level, out=tmp_path / "out")
    assert result["level"] == expected
    assert result["metrics"] == {"val/accuracy": expected / 10}
    assert result["size"] == {"kept": expected}
    back = load(tmp_path / "out" / "compact").state_dict()
    source = load(Path(hunt) / f"level_{expected:02d}").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in source.items())
    assert compact.masks(tmp_path / "out" / "compact").keys() == compact.masks(Path(hunt)).keys()


def test_without_validation_scores_it_is_the_last_level(hunt: Source, tmp_path: Path) -> None:
    record = records.read(Path(hunt)) or {}
    records.write(Path(hunt), {**record, "winning": None})
    assert export(hunt, out=tmp_path / "out")["level"] == 2


def test_half_precision_is_compared_in_float32(tmp_path: Path) -> None:
    """A network that was trained in bf16 is not said to differ from its own dense export by what bf16 rounds."""
    of = stage(tmp_path / "stage", MLP(64, (8,), 10).to(torch.bfloat16), NETWORKS["mlp"][1](4))
    result = export(of, formats=["torch"], out=tmp_path / "out")
    assert [each["largest_difference"] for each in result["exports"]] == [0.0, 0.0]


@pytest.mark.parametrize("level", [3, -1, "best", True, 1.0])
def test_an_unknown_level(hunt: Source, tmp_path: Path, level: Any) -> None:
    with pytest.raises(ValueError, match=f"level is {level!r}.*levels 0 to 2, 'last' and 'winning'"):
        export(hunt, level=level, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_level_of_what_has_none(tmp_path: Path) -> None:
    of = stage(tmp_path / "stage", MLP(64, (8,), 10), None)
    with pytest.raises(ValueError, match=r"level is 1.*has no levels"):
        export(of, level=1, out=tmp_path / "out")


def test_a_checkpoint_without_a_stage(tmp_path: Path) -> None:
    of = stage(tmp_path / "stage", MLP(64, (8,), 10), NETWORKS["mlp"][1](4))
    result = export(Source(Path(of) / "compact"), formats=["torch"], out=tmp_path / "out")
    assert result["exports"][1]["same_predictions"], "the example inputs lie beside it"


def test_without_examples_only_compact(tmp_path: Path) -> None:
    of = stage(tmp_path / "stage", MLP(64, (8,), 10), None)
    with pytest.raises(ValueError, match=r"stored no example inputs.*export compact only"):
        export(of, formats=["torch"], out=tmp_path / "out")
    (entry,) = export(of, formats=["compact"], out=tmp_path / "out")["exports"]
    assert set(entry) == {"format", "path", "bytes"}, "nothing is claimed that was not measured"


def test_what_is_not_there_or_not_finished(tmp_path: Path) -> None:
    records.write(tmp_path / "empty", {"status": "finished"})
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no compact checkpoint"):
            export(Source(folder), out=tmp_path / "out")
    of = stage(tmp_path / "stage", MLP(64, (8,), 10), None)
    records.write(Path(of), {"status": "running"})
    with pytest.raises(ValueError, match="is running: wait until it is finished"):
        export(of, out=tmp_path / "out")
    (Path(of) / "record.json").unlink()
    (Path(of) / "example.safetensors").write_text("half")
    with pytest.raises(ValueError, match=r"example\.safetensors is damaged"):
        export(of, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    of = stage(tmp_path / "stage", MLP(64, (8,), 10), NETWORKS["mlp"][1](4))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"format onnx needs {package}: pip install 'distill-prune\[onnx\]'"):
        export(of, formats=["onnx"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists(), "said before anything is written"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"formats": ["tflite"]}, "'tflite': choose from compact, torch, onnx"),
        ({"values": "int8"}, "'int8': choose from"),
    ],
)
def test_an_unknown_choice(tmp_path: Path, extra: Any, message: str) -> None:
    of = stage(tmp_path / "stage", MLP(64, (8,), 10), None)
    with pytest.raises(ValueError, match=message):
        export(of, out=tmp_path / "out", **extra)


def test_a_network_that_answers_with_infinities_is_compared(tmp_path: Path) -> None:
    model = MLP(2, (), 2)
    layer: Any = model.layers[0]
    layer.bias.data = torch.tensor([float("inf"), float("nan")])
    save(model, tmp_path / "stage")
    save_file({"input_0": torch.ones(3, 2)}, tmp_path / "stage" / "example.safetensors")
    (entry,) = export(Source(tmp_path / "stage"), out=tmp_path / "out")["exports"]
    assert entry["largest_difference"] == 0


@torch.no_grad()
def test_a_language_model_is_exported_for_any_batch_and_length(tmp_path: Path) -> None:
    import onnxruntime

    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
        return {"input_ids": torch.randint(0, 20, (batch, length)), "attention_mask": mask}

    kind: dict[str, Any] = {"causal": True, "tied": True, "positions": "rotary", "activation": "swiglu", "norm": "rms"}
    of = stage(tmp_path / "stage", Transformer(20, width=16, layers=1, heads=2, width_ffn=24, **kind), inputs(4, 7))
    result = export(of, formats=["onnx"], out=tmp_path / "out")
    assert result["exports"][1]["largest_difference"] < 1e-5
    model = load(of)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"))
    for batch, length in ((1, 7), (5, 3), (2, 40)):
        asked = inputs(batch, length)
        [answer] = session.run(None, {name: value.numpy() for name, value in asked.items()})
        torch.testing.assert_close(torch.from_numpy(answer), model(**asked), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("outputs", "network", "weights", "example", "same"),
    [
        ({"kind": "labels", "class_dim": -1}, nn.Linear(2, 1), [1e-9], (3, 2), False),
        ({"kind": "labels", "class_dim": -1}, nn.Linear(2, 3), [1.0, 1e-9, -1.0], (3, 2), False),
        ({"kind": "labels", "class_dim": -1}, nn.Linear(2, 3), [1.0, 1e-3, -1.0], (3, 2), True),
        ({"kind": "classes", "class_dim": 1}, nn.Conv2d(2, 2, 1), [1.0, 1.000001], (3, 2, 4, 5), False),
        (None, nn.Conv2d(2, 2, 1), [1.0, 1.000001], (3, 2, 4, 5), False),
        ({"kind": "numbers", "class_dim": -1}, nn.Linear(2, 2), [1.0, 1.000001], (3, 2), True),
    ],
)
def test_predictions_are_what_the_outputs_are(
    outputs: Any, network: Any, weights: list[float], example: tuple[int, ...], same: bool, tmp_path: Path
) -> None:
    """The largest entry of the last axis is none of a binary network, of independent labels or of an image."""
    network.bias.data.zero_()
    for row, value in zip(network.weight.data, weights):
        row.fill_(value)
    save(_one_layer(network), tmp_path / "compact", provenance={} if outputs is None else {"outputs": outputs})
    save_file({"input_0": torch.ones(example)}, tmp_path / "example.safetensors")
    compact_entry, dense = export(Source(tmp_path), formats=["torch"], out=tmp_path / "out")["exports"]
    assert compact_entry["same_predictions"] is True
    assert dense["same_predictions"] is same


def _one_layer(layer: nn.Module) -> nn.Module:
    """A network that a checkpoint can rebuild, of this layer alone."""
    kind, sizes = type(layer).__name__, layer.weight.shape[:2]
    model = OneLayer(kind, int(sizes[1]), int(sizes[0]))
    model.layer.load_state_dict(layer.state_dict())
    return model


class OneLayer(nn.Module):
    def __init__(self, kind: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.init_args = {"kind": kind, "inputs": inputs, "outputs": outputs}
        self.layer: Any = nn.Linear(inputs, outputs) if kind == "Linear" else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # by torch, of the weight that the hook computes
def test_a_network_is_exported_after_a_call_that_left_a_weight_with_a_history(tmp_path: Path) -> None:
    network = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 6))).eval()
    inputs = torch.randn(2, 4)
    expected = network(inputs)
    written, _ = write_torch(TrainedNetwork(network, {}, {"architecture": None}, {"input": inputs}), tmp_path / "torch")
    assert written is not None
    assert torch.allclose(written, expected, atol=1e-2)
