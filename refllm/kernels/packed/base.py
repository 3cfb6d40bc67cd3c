"""What every packed record has, and the checks its constructor makes."""

from typing import ClassVar, NamedTuple

import numpy as np

from refllm.formats.bits import packed_size, padding_is_zero

FLOATS = (np.dtype(np.float16), np.dtype(np.float32))
ALL = slice(None)


def check_array(name: str, value: object, dtypes: tuple, shape: tuple[int, ...]) -> None:
    """Check one stored array: type and shape; floats must be finite."""
    if not isinstance(value, np.ndarray) or value.dtype not in dtypes or value.shape != shape:
        came = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name} must be {' or '.join(str(np.dtype(d)) for d in dtypes)} {shape}, got {came}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"{name} holds NaN or Inf")


def check_packed(name: str, value: object, rows: int, n: int, bits: int) -> None:
    """Check one array of packed codes, its padding bits included."""
    check_array(name, value, (np.uint8,), (rows, packed_size(n, bits)))
    if not padding_is_zero(value, bits, n):
        raise ValueError(f"{name}: bits after the last of {n} codes of {bits} bits are not zero")


def check_columns(columns: int, least: int = 1) -> None:
    """Raise ValueError for fewer columns than `least`."""
    if columns < least:
        raise ValueError(f"columns must be at least {least}, got {columns}")


def row_count(name: str, value: object) -> int:
    """Rows of a stored matrix, before anything else is known of it."""
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.shape[0] == 0:
        raise ValueError(f"{name} must be a matrix with at least one row, got {getattr(value, 'shape', value)}")
    return value.shape[0]


def as_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the stored type; NaN, Inf and overflow are errors, not data.

    Parameters
    ----------
    values : float array
    dtype : str
        float16 (nearest, ties to even) or float32.
    """
    if np.dtype(dtype) not in FLOATS:
        raise ValueError(f"dtype must be float16 or float32, got {dtype}")
    with np.errstate(over="ignore", under="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        raise ValueError(f"a value is NaN, Inf or too large for {dtype}; largest is {np.abs(values).max():.6g}")
    return stored


RUN = 512  # columns under one scale, and so many products of a rounded activation and a number stay below 2^24


class Whole(NamedTuple):
    """Rows of whole numbers that are scaled group by group: weight = scale number + low.

    Parameters
    ----------
    numbers : (rows, in) float32
        Up to 255 in magnitude.
    scale : (rows, groups) float32
        Of equally many consecutive columns each.
    low : (rows, groups) float32, or None
    run : int
        Columns of a group whose products with activations of one scale are summed before they are scaled.
    """

    numbers: np.ndarray
    scale: np.ndarray
    low: np.ndarray | None = None
    run: int = RUN


class BaseRecord:
    """What every record has."""

    kind: ClassVar[str]
    stored: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()  # stored fields that may be None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return sum(part.nbytes for name in self.stored if (part := getattr(self, name)) is not None)

    def whole(self, ids: np.ndarray | slice) -> Whole | None:
        """Some rows as whole numbers, for products with rounded activations; None if they are none."""

    def dense(self) -> np.ndarray:
        """The (out, in) float32 matrix the record stands for. For tests and for methods, not for the forward pass."""
        return self.rows(ALL)


def check_factor(name: str, value: object, shape: tuple[int, ...]) -> None:
    """Check a matrix that may be an array or a record."""
    if not isinstance(value, BaseRecord):
        check_array(name, value, FLOATS, shape)
    elif value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {value.shape}")


def is_record(weight: object) -> bool:
    """Whether a weight is packed (or else a dense array)."""
    return isinstance(weight, BaseRecord)


def rows_of(weight: "np.ndarray | BaseRecord", ids: np.ndarray | slice) -> np.ndarray:
    """Rows of a stored array or of a record, as float32."""
    return weight.rows(ids) if isinstance(weight, BaseRecord) else weight[ids].astype(np.float32)
