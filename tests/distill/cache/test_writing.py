"""A cache is written once, whole, and goes on after an interruption; a folder of another cache is refused."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distill.cache import CachedTeacher, cache_teacher, store
from distill.cache.writing import write
from distill.teacher import Teacher
from tests.helpers.cache_data import CLASSES, WIDTH, Counting, N, loader, samples
from tests.helpers.processes import forked
from workbench.data import Digits
from workbench.models import MLP


def test_the_last_batch_is_filled_up(tmp_path: Path) -> None:
    network = Counting()
    teacher = Teacher(network)
    cache_teacher(teacher, loader(samples(count=10)), tmp_path)
    assert set(teacher.module.asked) == {4}
    found = next(iter(CachedTeacher(tmp_path).attach(loader(samples(count=10), 10)))).cached_targets["logits"]
    assert found.shape == (10, CLASSES)
    assert torch.allclose(found, network(samples(count=10).tensors[0]), atol=1e-6)
    few = samples(count=3)
    cache_teacher(teacher, loader(few), tmp_path / "few")
    assert len(next(iter(CachedTeacher(tmp_path / "few").attach(loader(few)))).cached_targets["logits"]) == 3


def test_an_interrupted_call_resumes(tmp_path: Path) -> None:
    network = Counting()
    teacher = Teacher(network)
    asked = teacher.module.asked
    real, calls = teacher.outputs, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:  # the first batch is asked once more, to see what there will be
            raise KeyboardInterrupt
        return real(*args)

    teacher.outputs = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(teacher, loader(), tmp_path, shard_size=4)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    with pytest.raises(ValueError, match="is not complete, it has 3 of 6 shards: call cache_teacher again as before"):
        CachedTeacher(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    asked.clear()
    done = write(teacher, loader(), tmp_path, shard_size=4)
    assert (done.reused, asked) == (3, [4] * 4)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    asked.clear()
    assert write(teacher, loader(), tmp_path).reused == 6
    assert asked == [4]
    for (x, _), targets in CachedTeacher(tmp_path).attach(loader(drop_last=True)):
        assert torch.equal(targets["logits"], network(x))


def test_a_killed_process_leaves_whole_shards(tmp_path: Path) -> None:
    def killed() -> None:
        write_shard = store.write_shard

        def killing(file: Path, tensors: dict[str, Tensor]) -> Any:
            written = write_shard(file, tensors)
            if file.name == "shard-00002.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)  # it is there, and the index does not know
            return written

        store.write_shard = killing
        torch.manual_seed(0)
        network, data = nn.Linear(3, 2), TensorDataset(torch.arange(30.0).reshape(10, 3), torch.zeros(10))
        cache_teacher(network, DataLoader(data, 2), tmp_path, shard_size=2)

    process = forked(killed, output=tmp_path / "output.txt")
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    torch.manual_seed(0)
    network, data = nn.Linear(3, 2), TensorDataset(torch.arange(30.0).reshape(10, 3), torch.zeros(10))
    (tmp_path / "train" / ".shard-00003.safetensors.1-2.tmp").write_bytes(b"half")
    assert write(network, loader(data, 2), tmp_path, shard_size=2).reused == 2
    assert not list(tmp_path.rglob("*.tmp"))
    (x, _), targets = next(iter(CachedTeacher(tmp_path).attach(loader(data, 2))))
    assert torch.equal(targets["logits"], network(x))


def test_damaged_and_missing_shards_are_written_again(tmp_path: Path) -> None:
    network = MLP(WIDTH, [8], CLASSES)
    cache_teacher(network, loader(), tmp_path, shard_size=4)
    files = sorted(tmp_path.rglob("*.safetensors"))
    content = [file.read_bytes() for file in files]
    files[0].write_bytes(content[0][:-1])
    files[1].write_bytes(content[1][:-1] + bytes([content[1][-1] ^ 1]))
    files[2].unlink()
    assert write(network, loader(), tmp_path).reused == 3
    assert [file.read_bytes() for file in files] == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": MLP(WIDTH, [8], CLASSES)}, "another teacher"),
        ({"precision": "bf16"}, r"the teacher's precision \(none there, bf16 here\)"),
        ({"data": samples(1)}, "another data set, transform or order of samples"),
        ({"data": samples(0, N - 1)}, r"another number of samples \(22 there, 21 here\)"),
        ({"batch_size": 5}, r"another batch size \(4 there, 5 here\)"),
        ({"features": ["layers.0"]}, "other features"),
        ({"store": "sampled"}, "another kind of store"),
        ({"dtype": "float16"}, r"another dtype \(none there, float16 here\)"),
        ({"collate_fn": lambda items: torch.utils.data.default_collate(items[::-1])}, "another collate_fn"),
    ],
)
def test_the_folder_of_another_cache_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    network = MLP(WIDTH, [8], CLASSES)
    cache_teacher(network, loader(), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    options = dict(change)
    teacher = Teacher(options.pop("teacher", network), options.pop("precision", None))
    given = loader(options.pop("data", None), collate_fn=options.pop("collate_fn", None))
    with pytest.raises(ValueError, match=f"holds a cache made with {message}.*choose another folder, or remove it"):
        cache_teacher(teacher, given, tmp_path, **options)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_another_sample_in_the_middle_is_noticed_when_going_on(tmp_path: Path) -> None:
    data = samples()
    cache_teacher(nn.Linear(WIDTH, 2), loader(data), tmp_path / "one", shard_size=4)
    torch.manual_seed(0)
    teacher = Teacher(nn.Linear(WIDTH, 2))
    cache_teacher(teacher, loader(data), tmp_path, shard_size=4)
    data.tensors[0][N - 1, 0] += 1
    with pytest.raises(ValueError, match="holds a cache made with another sample 21: choose another folder"):
        cache_teacher(teacher, loader(data), tmp_path, shard_size=4)


def test_a_function_is_recognised_by_its_outputs(tmp_path: Path) -> None:
    scale = torch.ones(())

    def function(x: Tensor) -> Tensor:
        return x * scale

    cache_teacher(function, loader(), tmp_path)
    assert write(function, loader(), tmp_path).reused == 1
    scale += 1
    with pytest.raises(ValueError, match="a function that answers otherwise"):
        cache_teacher(function, loader(), tmp_path)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard-00000.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds other files and no cache.json: choose an empty folder"):
        cache_teacher(nn.Linear(WIDTH, 2), loader(), tmp_path)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([loader()], {}, "there are several loaders"),
        (samples(), {}, "the loader is a TensorDataset: give a LightningDataModule or a torch DataLoader"),
        (DataLoader(Endless()), {}, "Endless cannot be read by index"),
        (DataLoader(samples(), None), {}, r"does not make batches \(batch_size=None\)"),
        (DataLoader(samples(), batch_sampler=[[0]]), {}, "list has no batch size: give batch_size"),  # type: ignore[arg-type]
        (loader(samples(0, 0)), {}, "the train split is empty"),
        (Digits(), {"split": "training"}, "split is 'training': a data module has train, val, test"),
        (loader(), {"store": "top-k"}, "store is 'top-k': choose from full, sampled"),
        (loader(), {"store": "sampled", "samples": 0}, "samples is 0: draw at least 1"),
        (loader(), {"dtype": "int8"}, "dtype is 'int8': choose from float16"),
        (loader(), {"shard_size": 0}, "shard_size is 0: give at least 1"),
        (loader(), {"batch_size": -1}, "batch_size is -1: give at least 1"),
    ],
)
def test_wrong_arguments(tmp_path: Path, given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_teacher(nn.Linear(WIDTH, 2), given, tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_a_data_module_that_changes_batches_later_is_refused(tmp_path: Path, hook: str) -> None:
    """The teacher would be asked about other batches than the student gets."""

    def normalised(self: Any, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] / 16, batch[1])

    data: Any = type("Later", (Digits,), {hook: normalised})()
    with pytest.raises(ValueError, match=rf"Later changes batches in {hook}, .* data set or in collate_fn, or use"):
        cache_teacher(nn.Linear(64, 10), data, tmp_path)
    assert not list(tmp_path.iterdir())
