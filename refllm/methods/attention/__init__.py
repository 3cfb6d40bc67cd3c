"""Attention variants: the call of `refllm.kernels.attention.attend` plus keyword-only knobs."""

from refllm.methods.attention.flash import flash as flash
from refllm.methods.attention.flash import flash_v1 as flash_v1

__all__ = ["flash", "flash_v1"]
