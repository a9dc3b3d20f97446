"""What is pruned when: policies that follow any training loop, and that the callbacks of every trainer drive."""

from prune.policies.dynamic import Dynamic
from prune.policies.fixed import Fixed
from prune.policies.gradual import Gradual
from prune.policies.iterative import Iterative
from prune.policies.policy import Policy
from prune.policies.timestamp import Timestamp

__all__ = ["Dynamic", "Fixed", "Gradual", "Iterative", "Policy", "Timestamp"]
