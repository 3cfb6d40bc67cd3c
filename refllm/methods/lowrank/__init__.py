"""Low rank: `f(W, stats, *, knobs) -> LowRank`, two thin factors in place of one matrix."""

from refllm.methods.lowrank.svd import svd as svd

__all__ = ["svd"]
