"""The policies as callbacks, in either Lightning namespace; each takes the arguments of its policy."""

import hashlib
from typing import final

from prune.callbacks.base import PolicyCallback
from prune.policies import Dynamic, Fixed, Gradual
from prune.policies.signature import takes_arguments_of
from prune.pruner import Pruner
from prune.pruner.scope import patterns_of


@final
class KeepMasked(PolicyCallback):
    """Trains under a fixed mask: :class:`prune.policies.Fixed` in a Lightning Trainer.

    Names are those of parameters of the module's ``network``, or of the module itself if it has none. Several may keep
    several parts of a network. A checkpoint that was trained under another mask of the same weights is refused.

    ::

        Trainer(max_epochs=1, callbacks=[KeepMasked(masks)]).fit(module, data)
    """

    policy: Fixed

    @takes_arguments_of(Fixed)
    def __init__(self, policy: Fixed) -> None:
        names = sorted(policy.counts())
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        super().__init__(policy, log=False, part=f", {len(names)} weights {digest[:8]}")


@final
class GradualPruning(PolicyCallback):
    """Prunes while a Lightning Trainer trains, on a schedule: :class:`prune.policies.Gradual`.

    ::

        Trainer(max_epochs=5, callbacks=[GradualPruning(0.2, "1ep", "3ep", "100it")]).fit(module, data)
    """

    policy: Gradual

    @takes_arguments_of(Gradual)
    def __init__(self, policy: Gradual) -> None:
        super().__init__(policy, part=_part(policy.pruner))


@final
class DynamicSparsity(PolicyCallback):
    """Sparse training in a Lightning Trainer, by RigL or SET: :class:`prune.policies.Dynamic`.

    ::

        Trainer(max_epochs=5, callbacks=[DynamicSparsity(0.1, "1ep", "4ep", "100it")]).fit(module, data)
    """

    policy: Dynamic

    @takes_arguments_of(Dynamic)
    def __init__(self, policy: Dynamic) -> None:
        super().__init__(policy, part=_part(policy.pruner))


def _part(pruner: Pruner) -> str:
    named = {"include": patterns_of(pruner.include), "exclude": patterns_of(pruner.exclude)}
    return "".join(f", {word} {list(patterns)}" for word, patterns in named.items() if patterns)
