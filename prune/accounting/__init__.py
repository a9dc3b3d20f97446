"""Parameters, bytes, FLOPs by layer, and latency of a model. Torch only."""

from prune.accounting.costs import Account, Layer, account
from prune.accounting.timing import Comparison, Latency, compare_latency, latency

__all__ = ["Account", "Comparison", "Latency", "Layer", "account", "compare_latency", "latency"]
