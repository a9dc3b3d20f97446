"""Masks: data, enforcing them on a model, loading them."""

from prune.masks.masks import Masks

__all__ = ["Masks"]
