"""Transforms: `f(model, ids, *, on_report, knobs) -> Model`, other weights that compute the same function."""

from refllm.methods.transform.quarot import quarot as quarot

__all__ = ["quarot"]
