"""Quantization of weights: `f(W, stats, *, knobs) -> packed record`."""

from refllm.methods.quant.gptq import gptq as gptq
from refllm.methods.quant.nf4 import fp4 as fp4
from refllm.methods.quant.nf4 import nf4 as nf4
from refllm.methods.quant.rtn import rtn as rtn

__all__ = ["fp4", "gptq", "nf4", "rtn"]
