"""Strategies shared by the property tests: weights and calibration inputs that look for trouble."""

import numpy as np
from hypothesis import strategies as st

KINDS = ("normal", "ties", "constant", "zero_row", "zeros", "outlier", "one_sign", "tiny", "mixed_scales")
WIDTHS = st.integers(1, 24)


@st.composite
def weights(draw, max_rows: int = 6, columns=WIDTHS, kinds=KINDS, dtype=np.float32):
    """(out, in) weights: equal values, zero rows, outliers, one sign only, very small, scales that differ by row."""
    rows, width = draw(st.integers(1, max_rows)), draw(columns)
    kind = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    W = rng.normal(0.0, 1.0, (rows, width))
    if kind == "ties":
        W = rng.integers(-3, 4, (rows, width)) / 4.0
    elif kind == "constant":
        W[:] = W[0, 0]
    elif kind == "zero_row":
        W[rng.integers(rows)] = 0.0
    elif kind == "zeros":
        W[:] = 0.0
    elif kind == "outlier":
        W[rng.integers(rows), rng.integers(width)] = 100.0
    elif kind == "one_sign":
        W = np.abs(W) * rng.choice([-1.0, 1.0])
    elif kind == "tiny":
        W *= 1e-7
    elif kind == "mixed_scales":
        W *= 2.0 ** rng.integers(-4, 5, (rows, 1))
    return W.astype(dtype)


@st.composite
def inputs(draw, columns: int, max_rows: int = 12, dtype=np.float32):
    """(n, columns) calibration inputs: fewer rows than columns, dead columns, one large column, repeated rows."""
    n = draw(st.integers(1, max_rows))
    kind = draw(st.sampled_from(("normal", "dead_column", "large_column", "repeated", "correlated")))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    X = rng.normal(0.0, 1.0, (n, columns))
    if kind == "dead_column":
        X[:, rng.integers(columns)] = 0.0
    elif kind == "large_column":
        X[:, rng.integers(columns)] *= 100.0
    elif kind == "repeated":
        X[:] = X[0]
    elif kind == "correlated":
        X = X[:, :1] + 0.01 * X
    return X.astype(dtype)
