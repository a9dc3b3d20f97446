"""What stands or falls together."""

from prune.structure.unstructured import Structure, Unstructured

__all__ = ["Structure", "Unstructured"]
