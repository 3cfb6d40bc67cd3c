"""Attention variants: the call of `refllm.kernels.attention.attend` plus keyword-only knobs."""

from refllm.methods.attention.adaspa import adaspa as adaspa
from refllm.methods.attention.flash import flash as flash
from refllm.methods.attention.flash import flash_v1 as flash_v1
from refllm.methods.attention.fp8 import flash_fp8 as flash_fp8
from refllm.methods.attention.minference import minference as minference
from refllm.methods.attention.rainfusion import rainfusion as rainfusion
from refllm.methods.attention.rainfusion import rainfusion2 as rainfusion2
from refllm.methods.attention.sage import sage as sage
from refllm.methods.attention.sage import sage2 as sage2
from refllm.methods.attention.sage import sage2pp as sage2pp
from refllm.methods.attention.split import flash_decoding as flash_decoding

__all__ = [
    "adaspa",
    "flash",
    "flash_decoding",
    "flash_fp8",
    "flash_v1",
    "minference",
    "rainfusion",
    "rainfusion2",
    "sage",
    "sage2",
    "sage2pp",
]
