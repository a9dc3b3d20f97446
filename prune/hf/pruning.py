"""The policies as callbacks of a transformers Trainer; each takes the arguments of its policy."""

from typing import final

from prune.hf.base import PolicyCallback
from prune.policies import Dynamic, Fixed, Gradual
from prune.policies.signature import takes_arguments_of


@final
class KeepMasked(PolicyCallback):
    """Fine-tunes a model that is sparse already: :class:`prune.policies.Fixed` in a transformers Trainer.

    A checkpoint that was trained under other masks is refused.

    ::

        masks = "checkpoint-500/masks.safetensors"  # or masks_of_zeros(model), where there is no such file
        Trainer(model, args, ..., callbacks=[KeepMasked(masks)]).train()
    """

    policy: Fixed

    @takes_arguments_of(Fixed)
    def __init__(self, policy: Fixed) -> None:
        super().__init__(policy, log=False)


@final
class GradualPruning(PolicyCallback):
    """Prunes a model while a transformers Trainer trains it, on a schedule: :class:`prune.policies.Gradual`.

    ::

        Trainer(model, args, ..., callbacks=[GradualPruning(0.2, "1ep", "3ep", "100it")]).train()
    """

    policy: Gradual

    @takes_arguments_of(Gradual)
    def __init__(self, policy: Gradual) -> None:
        super().__init__(policy)


@final
class DynamicSparsity(PolicyCallback):
    """Sparse training in a transformers Trainer, by RigL or SET: :class:`prune.policies.Dynamic`.

    ::

        Trainer(model, args, ..., callbacks=[DynamicSparsity(0.1, "0it", "750it", "100it")]).train()
    """

    policy: Dynamic

    @takes_arguments_of(Dynamic)
    def __init__(self, policy: Dynamic) -> None:
        super().__init__(policy)
