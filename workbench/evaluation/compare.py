"""The ``compare`` job: a teacher and its students on one split, and what each student has over a baseline."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, final

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from workbench import progress, records
from workbench.checkpoints import compact
from workbench.evaluation import statistics
from workbench.evaluation.scores import Scores
from workbench.records import AccuracyDifference, ClassScores, Comparison, ComparisonResult, PerClass, Scored
from workbench.records.source import Source
from workbench.tasks import Task, scored
from workbench.training.fit import task_for
from workbench.training.scoring import widen

_SCORED = ("accuracy", "nll")
_NO_YES = ["no", "yes"]
CLASSES = 256
"""Number of classes listed in a record: those that move most."""


def compare(
    teacher: Source,
    students: list[Source],
    data: LightningDataModule,
    task: Task | None = None,
    split: Literal["val", "test"] = "test",
    baseline: str | None = None,
    device: str | None = None,
    out: Path = Path("runs/compare"),
) -> dict[str, Any]:
    """Score a teacher and its students on one split, and compare each student's accuracy with a baseline's.

    Every network is read from its compact checkpoint, all get the same batches, and all compute in float32. The
    networks must return logits over classes, or of independent labels, each a yes or no. The scores are accuracy, NLL,
    Brier score, calibration error, and each student's agreement with the teacher and KL divergence from it; beside them
    the task's main metric, such as mean IoU. Accuracy is compared with the baseline's sample by sample; if a sample has
    many labels, such as the tokens of a text or the pixels of an image, text by text and image by image. The intervals
    cover the choice of the test set, but not the choice of the seed: train several seeds for that.

    Args:
        teacher: A stage of the recipe, or a folder with a compact checkpoint.
        students: Stages or folders like that, e.g. [alone, distilled]; a student of a family is stage/name.
        data: The data module; its `names`, if it has any, name the classes.
        task: How to read batches and outputs; by default the data module's `task`, else classification over `classes`.
        split: Which part of the data to score on, test or val.
        baseline: The student that the others are compared with, by its name in `students`; the first by default.
        device: Where to compute, e.g. cpu or cuda:1; a GPU by default if there is one.
        out: The stage's folder, given by the recipe.

    Returns:
        `comparison`, for the record: scores of the teacher and each student, gains, and classes that move.

    Raises:
        ValueError: If there is no student, a name occurs twice, the baseline is none of them, the data module lacks the
            split, a network cannot be read, the task has numbers or embeddings, or outputs are no logits over the
            labels' classes.
    """
    named = _named(students, out)
    if baseline is None:
        baseline = next(iter(named))
    if baseline not in named:
        raise ValueError(f"baseline is {baseline!r}: choose from the students {', '.join(named)}")
    if split not in ("val", "test"):
        raise ValueError(f"split is {split!r}: choose val or test")
    task = task_for(data, task)
    if task.outputs.kind not in ("classes", "labels"):
        raise ValueError(
            f"compare scores classes and labels, and outputs of {type(task).__name__} are {task.outputs.kind}: read "
            "the metrics of the stages, or make a sweep over seeds"
        )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    teacher_network = _loaded(teacher, place)
    networks = {name: _loaded(source, place) for name, source in named.items()}
    tally = _Tally(_name(teacher, out), list(networks), baseline, task, place)
    loaders = _loaders(data, split)
    total, done = _length(loaders), 0
    for loader in loaders:
        for batch in loader:
            tally.add(_moved(data, batch, place), teacher_network, networks)
            done += 1
            progress.update(done, max(total, done), split)
    return records.encode(ComparisonResult(tally.result(split, getattr(data, "names", None))))


@final
class _Tally:
    """Sums over the batches of one split.

    Args:
        teacher: Its name.
        students: Their names.
        baseline: One of them.
        task: Theirs.
        device: Where they compute.
    """

    def __init__(self, teacher: str, students: Sequence[str], baseline: str, task: Task, device: torch.device) -> None:
        self.task = task
        self.main, mode = task.monitor
        self.monitor = None if self.main in _SCORED else [self.main, mode]
        # By name, and the teacher's without one: a student may be called as the teacher is.
        self.metrics: dict[str | None, Any] = {}
        if self.monitor is not None:
            self.metrics = {name: task.metrics()[self.main].to(device) for name in (None, *students)}
        self.teacher, self.students, self.baseline = teacher, students, baseline
        self.teacher_scores = Scores()
        self.scores = {name: Scores() for name in students}
        self.sizes: list[Tensor] = []  # of each batch, the number of positions of each row
        # Right by the student alone and right by the baseline alone: of each row, and of each class.
        self.rows: dict[str, list[Tensor]] = {name: [] for name in students}
        self.classes: dict[str, Tensor] = {}
        self.nested = False

    @torch.no_grad()
    def add(self, batch: Any, teacher: nn.Module, networks: Mapping[str, nn.Module]) -> None:
        """Run the teacher once and every student once, and count."""
        valid = self.task.valid(batch)
        labels = _class_numbers(self.task, self.task.targets(batch), valid)
        wanted = self._logits(None, teacher, batch, labels)
        self.teacher_scores.update(wanted, labels, valid=valid)
        right: dict[str, Tensor] = {}
        for name, network in networks.items():
            logits = self._logits(name, network, batch, labels)
            if logits.shape != wanted.shape:
                raise ValueError(
                    f"{name} answers with {list(logits.shape)} and {self.teacher} with {list(wanted.shape)}: "
                    "compare networks with the same classes"
                )
            self.scores[name].update(logits, labels, wanted, valid)
            right[name] = (logits.argmax(-1) == labels) & valid
        self.nested |= labels.dim() > 1
        self.sizes.append(_by_row(valid))
        positions, classes = labels[valid], wanted.shape[-1]
        for name in self.students:
            pair = right[name] & ~right[self.baseline], right[self.baseline] & ~right[name]
            self.rows[name].append(torch.stack([_by_row(alone) for alone in pair]))
            counts = [torch.bincount(positions[alone[valid]], minlength=classes).cpu() for alone in pair]
            self.classes[name] = self.classes.get(name, torch.tensor(0)) + torch.stack(counts)

    def _logits(self, name: str | None, network: nn.Module, batch: Any, labels: Tensor) -> Tensor:
        """What the network answers, [..., classes], floating-point inputs in its own precision; a label has two."""
        task = self.task
        own = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        args, kwargs = tree_map_only(
            Tensor, lambda value: value.to(own) if value.is_floating_point() else value, task.inputs(batch)
        )
        output = scored(task, network(*args, **kwargs), batch)
        shape = output.shape if task.outputs.elementwise else output.shape[:-1]
        if labels.is_floating_point() or shape != labels.shape:
            raise ValueError(
                f"{name or self.teacher} answers with {list(output.shape)} where {type(task).__name__} has targets "
                f"{list(labels.shape)} of {labels.dtype}: compare scores logits [..., classes] against class numbers "
                "[...], and one logit for each label"
            )
        if self.monitor is not None:
            self.metrics[name].update(output, task.targets(batch))
        # A sigmoid of z is a softmax over 0 and z.
        return torch.stack((torch.zeros_like(output), output), -1) if task.outputs.elementwise else output

    def result(self, split: str, names: Any) -> Comparison:
        """Everything; ``names`` are those of the classes, if there are any."""
        if not self.teacher_scores.count:
            raise ValueError("the split has no sample to score: compare on another")
        names = _NO_YES if self.task.outputs.kind == "labels" else names
        students = {
            name: replace(_scored(scores), gain=0.0, score=self._main(name)) for name, scores in self.scores.items()
        }
        differences = {name: self._paired(name) for name in self.students if name != self.baseline}
        tested = {name: each.p for name, each in differences.items() if each.p is not None}
        adjusted = dict(zip(tested, statistics.holm(list(tested.values()))))
        for name, difference in differences.items():
            paired = replace(difference, p_holm=adjusted.get(name))
            students[name] = replace(students[name], gain=difference.difference, paired=paired)
        return Comparison(
            split=split,
            baseline=self.baseline,
            n=self.teacher_scores.count,
            unit="positions" if self.nested else "samples",
            monitor=self.monitor,
            teacher=replace(_scored(self.teacher_scores), name=self.teacher, score=self._main(None)),
            students=students,
            per_class=self._per_class(names),
        )

    def _main(self, name: str | None) -> float | None:
        return float(self.metrics[name].compute()) if self.monitor is not None else None

    def _paired(self, name: str) -> AccuracyDifference:
        gained, lost = torch.cat(self.rows[name], 1).tolist()
        if not self.nested:
            return statistics.mcnemar(sum(gained), sum(lost), self.teacher_scores.count)
        return statistics.clustered(gained, lost, torch.cat(self.sizes).tolist())

    def _per_class(self, names: Any) -> PerClass:
        count, right = self.teacher_scores.per_class()
        moved = torch.stack([(pair[0] - pair[1]).abs() for pair in self.classes.values()]).amax(0)
        order = sorted(torch.nonzero(count).flatten().tolist(), key=lambda c: (-int(moved[c]), c))
        chosen = sorted(order[:CLASSES])
        named = isinstance(names, (list, tuple)) and len(names) == len(count)
        return PerClass(
            of=len(count),
            classes=chosen,
            n=[int(n) for n in count[chosen]],
            teacher=(right / count)[chosen].tolist(),
            students={
                name: ClassScores(
                    recall=(scores.per_class()[1] / count)[chosen].tolist(),
                    gained=self.classes[name][0][chosen].tolist(),
                    lost=self.classes[name][1][chosen].tolist(),
                )
                for name, scores in self.scores.items()
            },
            names=[str(names[c]) for c in chosen] if named else None,
        )


def _scored(scores: Scores) -> Scored:
    values = scores.compute()
    return Scored(
        accuracy=values["accuracy"],
        nll=values["nll"],
        brier=values["brier"],
        ece=values["ece"],
        agreement=values.get("agreement"),
        kl=values.get("kl"),
    )


def _named(sources: Sequence[Source], out: Path) -> dict[str, Source]:
    """The students by name, in order."""
    if not sources:
        raise ValueError("students is empty: name at least one stage that trained a student")
    named = {_name(source, out): source for source in sources}
    if len(named) != len(sources):
        names = [_name(source, out) for source in sources]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"students has {twice!r} more than once: name each student once")
    return named


def _name(source: Source, out: Path) -> str:
    """As the recipe has it: ``stage`` or ``stage/member``; the path of a folder outside of the run."""
    with suppress(ValueError):
        return Path(source).resolve().relative_to(out.resolve().parent).as_posix()
    return str(source)


def _loaded(source: Source, device: torch.device) -> nn.Module:
    """The network, in at least float32."""
    network = compact.load(source, map_location=device)
    widen(network)
    return network


def _loaders(data: LightningDataModule, split: str) -> list[Any]:
    """The split's loaders; most data modules have one."""
    if not is_overridden(f"{split}_dataloader", data, LightningDataModule):
        raise ValueError(f"{type(data).__name__} has no {split}_dataloader: compare on another split")
    data.prepare_data()
    data.setup("validate" if split == "val" else "test")
    return list(_flat(getattr(data, f"{split}_dataloader")()))


def _flat(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, (Mapping, list, tuple)):
        for loader in loaders.values() if isinstance(loaders, Mapping) else loaders:
            yield from _flat(loader)
    else:
        yield loaders


def _length(loaders: Sequence[Any]) -> int:
    """Batches in all; 0 if a loader does not know."""
    try:
        return sum(map(len, loaders))
    except TypeError:
        return 0


def _moved(data: LightningDataModule, batch: Any, device: torch.device) -> Any:
    """The batch on the device, by the hooks that a Trainer would call."""
    batch = data.on_before_batch_transfer(batch, 0)
    return data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)


def _class_numbers(task: Task, labels: Tensor, valid: Tensor) -> Tensor:
    """Labels as class numbers: 0 for no, 1 for yes.

    Raises:
        ValueError: If a label is a probability.
    """
    if task.outputs.kind != "labels":
        return labels
    known = labels.masked_fill(~valid, 0)
    if bool(((known != 0) & (known != 1)).any()):
        raise ValueError("labels are probabilities: compare counts what is right, and needs 0 or 1")
    return known.long()


def _by_row(which: Tensor) -> Tensor:
    """How many positions of each row."""
    return which.flatten(1).sum(1).cpu() if which.dim() > 1 else which.long().cpu()
