"""Quantization of weights: `f(W, stats, *, knobs) -> packed record`."""

from refllm.methods.quant.aciq import aciq as aciq
from refllm.methods.quant.aqlm import aqlm as aqlm
from refllm.methods.quant.billm import billm as billm
from refllm.methods.quant.binary import binary as binary
from refllm.methods.quant.gguf import gguf as gguf
from refllm.methods.quant.gptq import gptq as gptq
from refllm.methods.quant.hqq import hqq as hqq
from refllm.methods.quant.llm_int8 import llm_int8 as llm_int8
from refllm.methods.quant.microscaling import fp6 as fp6
from refllm.methods.quant.microscaling import fp8 as fp8
from refllm.methods.quant.microscaling import mx as mx
from refllm.methods.quant.microscaling import nvfp4 as nvfp4
from refllm.methods.quant.nf4 import fp4 as fp4
from refllm.methods.quant.nf4 import nf4 as nf4
from refllm.methods.quant.olive import olive as olive
from refllm.methods.quant.omse import omse as omse
from refllm.methods.quant.pq import pq as pq
from refllm.methods.quant.qoq import qoq as qoq
from refllm.methods.quant.rtn import rtn as rtn
from refllm.methods.quant.salient import salient as salient
from refllm.methods.quant.spark import spark as spark
from refllm.methods.quant.squeezellm import squeezellm as squeezellm
from refllm.methods.quant.zeroquant import zeroquant as zeroquant
from refllm.methods.quant.zeroquant import zeroquant_fp as zeroquant_fp

__all__ = [
    "aciq",
    "aqlm",
    "billm",
    "binary",
    "fp4",
    "fp6",
    "fp8",
    "gguf",
    "gptq",
    "hqq",
    "llm_int8",
    "mx",
    "nf4",
    "nvfp4",
    "olive",
    "omse",
    "pq",
    "qoq",
    "rtn",
    "salient",
    "spark",
    "squeezellm",
    "zeroquant",
    "zeroquant_fp",
]
