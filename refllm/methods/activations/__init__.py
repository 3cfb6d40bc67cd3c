"""Rounded activations of weights stored as codes: `f(*, knobs) -> what matmul takes as activations`."""

from refllm.methods.activations.dynamic import dynamic as dynamic

__all__ = ["dynamic"]
