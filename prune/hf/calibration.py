"""What a criterion that needs data is calibrated on in a transformers Trainer: batches, and the model's own loss."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from accelerate.data_loader import IterableDatasetShard
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from transformers import TrainingArguments

from prune.criteria import Criterion
from prune.policies.calibration import Calibration
from workbench.randomness import isolated


def trainer_calibration(args: TrainingArguments, loader: Any) -> Calibration:
    """Calibration batches from the data of a Trainer's training loader.

    They are the same at every reading, and the running epoch goes on as it would. Every process has batches of its own,
    and a criterion takes their mean.

    - Of a data set with indices, samples are drawn at random without replacement, by ``args.data_seed`` or else
      ``args.seed``: its first rows may be of one class. This holds for a loader in the order of the data set, too.
    - A sampler of one's own, such as one that balances classes, decides; its random numbers follow from the seed.
    - A stream is read from its start, in its own order.

    Args:
        args: The Trainer's.
        loader: Its training loader, as it hands it to callbacks.
    """

    def calibration(criterion: Criterion, batches: int) -> dict[str, Any]:
        if not criterion.needs_loader:
            return {}
        data = {"loader": _Batches(args, loader, batches)}
        return {**data, "loss": _loss} if criterion.needs_loss else data

    return calibration


@final
class _Batches:
    """The first batches of a new loader of the same data, drawn from the same random state at every reading."""

    def __init__(self, args: TrainingArguments, loader: Any, batches: int) -> None:
        self.args, self.loader, self.batches = args, loader, batches

    def __iter__(self) -> Iterator[Any]:
        return isolated(_shuffled(self.args, self.loader, _seed(self.args)), self.batches, _seed(self.args))


def _seed(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def _shuffled(args: TrainingArguments, loader: Any, seed: int) -> DataLoader:
    """This process's part of the data of ``loader``, in random order and in batches of its size, without workers."""
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, IterableDataset):
        stream = copy.deepcopy(dataset)
        if args.world_size > 1 and not isinstance(stream, IterableDatasetShard):
            stream = IterableDatasetShard(
                stream, args.train_batch_size, num_processes=args.world_size, process_index=args.process_index
            )
        return DataLoader(stream, args.train_batch_size, collate_fn=collate)
    if loader.batch_sampler is None:
        size, sampler = None, loader.sampler
    else:
        size, sampler = args.train_batch_size, _sampler(loader.batch_sampler)
    if type(sampler) is not SequentialSampler and not isinstance(sampler, RandomSampler):
        shared = {id(dataset): dataset}
        if size is None:
            return DataLoader(dataset, None, sampler=copy.deepcopy(sampler, shared), collate_fn=collate)
        return DataLoader(dataset, batch_sampler=copy.deepcopy(loader.batch_sampler, shared), collate_fn=collate)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return DataLoader(dataset, size, sampler=order[args.process_index :: args.world_size].tolist(), collate_fn=collate)


def _sampler(batches: Any) -> Any:
    """The sampler of indices inside of a batch sampler, which accelerate wraps to divide batches among processes."""
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)


def _loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """The model's own."""
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} gives no loss for {list(batch)}, and that of a Trainer is not known here: prune "
            "once before, with Pruner(...)(model, density, loader=..., loss=...), and train with KeepMasked(masks)"
        )
    return loss
