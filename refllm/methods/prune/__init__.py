"""Pruning: `f(W, stats, *, knobs) -> packed record` that stores the kept weights only."""

from refllm.methods.prune.magnitude import magnitude as magnitude
from refllm.methods.prune.wanda import wanda as wanda

__all__ = ["magnitude", "wanda"]
