"""Ways to run a model: the call of `refllm.model.sample.generate_ids` plus keyword-only knobs."""

from refllm.methods.runtime.speculative import speculative as speculative

__all__ = ["speculative"]
