"""Methods that look at more than one weight at once: `f(model, ids, *, on_report, knobs) -> Model`, packed weights."""

from refllm.methods.blockwise.awq import awq as awq
from refllm.methods.blockwise.exl2 import exl2 as exl2
from refllm.methods.blockwise.kquants import kquants as kquants
from refllm.methods.blockwise.lkd import lkd as lkd
from refllm.methods.blockwise.mixed import mixed as mixed
from refllm.methods.blockwise.omniquant import omniquant as omniquant

__all__ = ["awq", "exl2", "kquants", "lkd", "mixed", "omniquant"]
