"""What is pruned when: objects that any training loop can drive, and the callbacks of every trainer do."""

from prune.policies.dynamic import Dynamic
from prune.policies.fixed import Fixed
from prune.policies.gradual import Gradual
from prune.policies.moment import Moment
from prune.policies.policy import Policy

__all__ = ["Dynamic", "Fixed", "Gradual", "Moment", "Policy"]
