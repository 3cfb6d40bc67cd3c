"""Methods that shrink the key-value cache: `f(layer, *, knobs) -> store`, see `refllm.model.cache`."""

from refllm.methods.kvcache.kivi import kivi as kivi

__all__ = ["kivi"]
