"""Networks made physically smaller by what their masks leave unused."""

from prune.shrinking.coupled import Coupled
from prune.shrinking.shrink import Shrunk, shrink

__all__ = ["Coupled", "Shrunk", "shrink"]
