"""Stats: what calibration knows of the inputs of one linear layer.

Every method that looks at activations reads them here, so there is one definition of the number of rows and of H.
"""

from functools import cached_property

import numpy as np

from refllm.kernels.packed.ordered import gram


class Stats:
    """Inputs of one linear layer, and their sums, computed when first asked for.

    Parameters
    ----------
    X : (n, in) float32 or float64
        One row per calibration token.

    Attributes
    ----------
    X : (n, in)
    n : int
        Rows.
    sum_squares : (in,) float64
        sum over rows of x_j^2.
    absmax : (in,) float64
        max over rows of |x_j|.
    mean_abs : (in,) float64
        mean over rows of |x_j|.
    H : (in, in) float64
        X^T X. GPTQ and SparseGPT write 2 X X^T or a running mean: a constant factor that their steps do not see.

    Raises
    ------
    ValueError
        No rows, or NaN or infinite inputs.

    Examples
    --------
    >>> stats = Stats(np.array([[1.0, 2.0], [3.0, -4.0]]))
    >>> stats.n, stats.sum_squares.tolist(), stats.absmax.tolist(), stats.H[0, 1].item()
    (2, [10.0, 20.0], [3.0, 4.0], -10.0)
    """

    def __init__(self, X: np.ndarray):
        if X.ndim != 2 or 0 in X.shape:
            raise ValueError(f"calibration inputs must be (n, in) with at least one row, got shape {X.shape}")
        if not np.isfinite(X).all():
            row = int(np.argmin(np.isfinite(X).all(axis=1)))
            raise ValueError(f"calibration inputs hold NaN or infinity (first in row {row}); check the model's weights")
        self.X = X
        self.n = X.shape[0]

    @cached_property
    def sum_squares(self) -> np.ndarray:
        """Sum of squares of each input over the tokens, (in,) float64."""
        return np.einsum("ni,ni->i", self.X, self.X, dtype=np.float64)

    @cached_property
    def absmax(self) -> np.ndarray:
        """Largest magnitude of each input, (in,) float64."""
        return np.max(np.abs(self.X), axis=0).astype(np.float64)

    @cached_property
    def mean_abs(self) -> np.ndarray:
        """Mean magnitude of each input, (in,) float64."""
        return np.mean(np.abs(self.X), axis=0, dtype=np.float64)

    @cached_property
    def H(self) -> np.ndarray:
        """X^T X, (in, in) float64, not divided by n; the same bits on every machine (refllm.kernels.packed.ordered)."""
        return gram(self.X)
