"""Methods that look at more than one weight at once: `f(model, ids, *, on_report, knobs) -> Model`, packed weights."""

from refllm.methods.blockwise.kquants import kquants as kquants
from refllm.methods.blockwise.mixed import mixed as mixed

__all__ = ["kquants", "mixed"]
