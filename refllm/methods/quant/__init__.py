"""Quantization of weights: `f(W, stats, *, knobs) -> packed record`."""

from refllm.methods.quant.rtn import rtn as rtn

__all__ = ["rtn"]
