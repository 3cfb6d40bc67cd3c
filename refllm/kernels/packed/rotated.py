"""Weights whose inputs are turned by a Hadamard matrix at run time, because nothing before them can turn them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refllm.kernels.hadamard import turn
from refllm.kernels.packed.base import FLOATS, BaseRecord, check_array, rows_of


@dataclass(frozen=True, eq=False)
class Rotated(BaseRecord):
    """weight = stored Q^T with Q = (H (x) I) / sqrt(n): W x = stored (x Q), and x Q is what is rounded, if anything is.

    The inputs of down_proj come out of a product of two activations, those of o_proj out of attention: a rotation that
    mixes all channels, or all heads, does not pass through either and is made when the layer runs, by the fast
    transform. What is stored is W Q, which later stages pack.

    Parameters
    ----------
    weight : (out, in) float16, float32 or float64, or a record of that shape
        W Q.
    inner : int
        Neighbouring inputs that move together (`refllm.kernels.hadamard.turn`): 1 mixes all of them, the size of a
        head mixes heads.
    """

    weight: "np.ndarray | BaseRecord"
    inner: int
    kind: ClassVar[str] = "rotated"
    stored: ClassVar[tuple[str, ...]] = ("weight",)

    def __post_init__(self):
        shape = getattr(self.weight, "shape", ())
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"weight must be a non-empty matrix, got shape {shape}")
        if not isinstance(self.weight, BaseRecord):
            check_array("weight", self.weight, (*FLOATS, np.dtype(np.float64)), shape)
        self.turned(np.zeros((1, shape[1])))  # refuses what no Hadamard matrix fits

    @classmethod
    def of(cls, W: np.ndarray, inner: int = 1) -> "Rotated":
        """From the weight that meets inputs as they are; computed in float64, stored in its type.

        Examples
        --------
        >>> Rotated.of(np.float32([[2, 0, 0, 0]])).weight.tolist()
        [[1.0, 1.0, 1.0, 1.0]]
        """
        return cls(turn(W.astype(np.float64), inner=inner).astype(W.dtype), inner)

    def turned(self, x: np.ndarray) -> np.ndarray:
        """Inputs (..., in) as the stored weight meets them."""
        return turn(x, inner=self.inner)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape

    def rows(self, ids: np.ndarray | slice) -> np.ndarray:
        """Some rows as inputs that are not turned would meet them, (k, in) float32."""
        stored = rows_of(self.weight, ids).astype(np.float64)
        return turn(stored, inner=self.inner, back=True).astype(np.float32)
