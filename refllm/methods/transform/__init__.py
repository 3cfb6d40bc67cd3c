"""Transforms: `f(model, ids, *, on_report, knobs) -> Model`, other weights that compute the same function."""

__all__: list[str] = []
