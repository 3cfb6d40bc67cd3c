"""Hypothesis strategies shared by all tests: weights, calibration inputs and activations that look for trouble.

`weights` and `inputs` draw one kind for a whole matrix; `mixed_weights` and `activations` draw a kind for every row,
by name (WEIGHT_ROWS, ACTIVATION_ROWS). PROPERTY is the setting for a property, KERNEL that of a compiled kernel.
tests/unit/test_strategies.py checks that every kind is really drawn.
"""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
KERNEL = settings(PROPERTY, max_examples=200)  # of a compiled kernel against its text
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


WEIGHT_ROWS = (
    "zero",
    "constant",
    "normal",
    "outlier",
    "ties",
    "subnormal",
    "one-sided",
    "alternating",
    "negative zero",
)
ACTIVATION_ROWS = ("zero", "normal", "all largest", "alternating", "one hot", "wide", "subnormal", "integers", "ties")
SEEDS, FEW_ROWS, FEW_TOKENS = st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 3)


def weight_row(kind: str, columns: int, seed: int) -> np.ndarray:
    """One row (columns,) float32 of a weight.

    Parameters
    ----------
    kind : str
        A name of WEIGHT_ROWS: outlier = one value 1000 times the rest; ties = multiples of a half, on the rounding
        boundaries of a grid with step 1; subnormal = below the smallest normal float16 or float32.
    columns, seed : int
    """
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(columns)
    if kind == "zero":
        row = np.zeros(columns)
    elif kind == "constant":
        row = np.full(columns, normal[0])
    elif kind == "normal":
        row = normal
    elif kind == "outlier":
        row = normal.copy()
        row[rng.integers(columns)] = 1000.0
    elif kind == "ties":
        row = rng.integers(-14, 15, columns) / 2
    elif kind == "subnormal":
        row = normal * (1e-7 if seed % 2 else 1e-40)
    elif kind == "one-sided":
        row = np.abs(normal) * (1 if seed % 2 else -1)
    elif kind == "alternating":
        row = np.where(np.arange(columns) % 2, 1.0, -1.0)
    elif kind == "negative zero":
        row = np.where(rng.random(columns) < 0.5, -0.0, normal)
    else:
        raise ValueError(f"unknown kind of weight row {kind!r}")
    return row.astype(np.float32)


def activation_row(kind: str, columns: int, seed: int) -> np.ndarray:
    """One token (columns,) float32.

    Parameters
    ----------
    kind : str
        A name of ACTIVATION_ROWS: all largest = every value has the largest magnitude, the worst case of an integer
        sum; wide = magnitudes from 1e-18 to 1e18; integers = whole numbers with largest magnitude 127, exact in int8;
        ties = halves with largest magnitude 127, on the rounding boundaries of int8.
    columns, seed : int
    """
    rng = np.random.default_rng(seed)
    if kind == "zero":
        row = np.zeros(columns)
    elif kind == "normal":
        row = rng.standard_normal(columns)
    elif kind == "all largest":
        row = np.full(columns, 127.0) * (1 if seed % 2 else -1)
    elif kind == "alternating":
        row = np.where(np.arange(columns) % 2, 1e4, -1e4)
    elif kind == "one hot":
        row = np.zeros(columns)
        row[rng.integers(columns)] = -3.5
    elif kind == "wide":
        row = rng.standard_normal(columns) * 10.0 ** rng.integers(-18, 18, columns)
    elif kind == "subnormal":
        row = rng.standard_normal(columns) * 1e-40
    elif kind == "integers":
        row = rng.integers(-127, 128, columns)
        row[rng.integers(columns)] = 127
    elif kind == "ties":
        row = rng.integers(-253, 254, columns) / 2
        row[rng.integers(columns)] = 127
    else:
        raise ValueError(f"unknown kind of activation row {kind!r}")
    return row.astype(np.float32)


@st.composite
def mixed_weights(draw, rows: st.SearchStrategy[int] | int = FEW_ROWS, columns: st.SearchStrategy[int] | int = 64):
    """(rows, columns) float32 matrices whose rows are of any kinds of WEIGHT_ROWS."""
    rows = rows if isinstance(rows, int) else draw(rows)
    columns = columns if isinstance(columns, int) else draw(columns)
    kinds = [draw(st.sampled_from(WEIGHT_ROWS)) for _ in range(rows)]
    return np.stack([weight_row(kind, columns, draw(SEEDS)) for kind in kinds])


@st.composite
def activations(draw, columns: int, tokens: st.SearchStrategy[int] = FEW_TOKENS):
    """(tokens, columns) float32, each token of any kind of ACTIVATION_ROWS."""
    kinds = [draw(st.sampled_from(ACTIVATION_ROWS)) for _ in range(draw(tokens))]
    return np.stack([activation_row(kind, columns, draw(SEEDS)) for kind in kinds])


@st.composite
def group_sizes(draw, columns: int):
    """A group size that fits: -1 (per channel), 0 (per tensor) or a divisor of the columns."""
    divisors = [g for g in range(1, columns + 1) if columns % g == 0]
    return draw(st.sampled_from([-1, 0, *divisors]))


def gamma(k: int, unit: float = 2.0**-24) -> float:
    """Higham's gamma_k = k u / (1 - k u): the relative bound of k roundings, for float32 by default."""
    return k * unit / (1 - k * unit)
