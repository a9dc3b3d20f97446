"""What is pruned when: objects that any training loop can drive, and the callbacks of every trainer do."""

from prune.policies.base import Moment, Policy

__all__ = ["Moment", "Policy"]
