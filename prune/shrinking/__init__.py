"""Networks made physically smaller by what their masks leave unused."""

from prune.shrinking.coupled import Coupled
from prune.shrinking.removal import Shrunk, shrink

__all__ = ["Coupled", "Shrunk", "shrink"]
