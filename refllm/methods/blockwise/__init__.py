"""Methods that look at more than one weight at once: `f(model, ids, *, on_report, knobs) -> Model`, packed weights."""

__all__: list[str] = []
