"""matmul(x, weight): the one place that knows how a weight is stored.

    dense array      x @ weight.T in the arrays' own types (float64 stays float64)
    packed record    decoded inside the product, by Numba kernels or, with REFLLM_KERNELS=numpy, by the NumPy text

The NumPy text (reference.py) is the definition; a kernel may differ from it by the rounding of float32 sums only,
and where activations are rounded to 8 or 4 bits and weights are whole numbers not at all.
float64 activations always take the NumPy text. Records are described in records.py.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple
from weakref import ref

import numpy as np

from refllm.kernels.packed import reference, rounded
from refllm.kernels.packed.activations import Rounding
from refllm.kernels.packed.encode import encode_gguf as encode_gguf
from refllm.kernels.packed.inputs import RoundedInputs, TokenInputs
from refllm.kernels.packed.quantized import GGUFBlocks, IntWeight, MinWeight
from refllm.kernels.packed.records import (
    BlockSparse,
    LowRank,
    Record,
    Reordered,
    Rotated,
    Sparse24,
    SparseBitmask,
    SparseRows,
    Sum,
    TwoLevel,
    is_record,
)

BITS = {"int8": 8, "int4": 4}  # of rounded activations
ACTIVATIONS = ("float32", *BITS)
BACKENDS = ("numba", "numpy")
_CODED = (IntWeight, MinWeight, TwoLevel, GGUFBlocks)


def backend() -> str:
    """What runs packed products: numba (default) or numpy, from the variable REFLLM_KERNELS, read at each call."""
    name = os.environ.get("REFLLM_KERNELS", "") or "numba"
    if name not in BACKENDS:
        raise ValueError(f"REFLLM_KERNELS must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def has_codes(weight: object) -> bool:
    """Whether a weight is stored as codes, so that rounded activations apply to it."""
    if isinstance(weight, _CODED):
        return True
    if isinstance(weight, (Reordered, Rotated)):
        return has_codes(weight.weight)
    return isinstance(weight, (Sparse24, SparseBitmask, BlockSparse)) and isinstance(weight.values, _CODED)


def as_run(weight: np.ndarray | Record, activations: str | Rounding) -> tuple[np.ndarray | Record, str | Rounding]:
    """A weight as kernels meet it: where a record says that its inputs are int8 or int4, the record inside and that."""
    if isinstance(weight, TokenInputs) and weight.form in BITS and isinstance(weight.weight, IntWeight):
        return weight.weight, weight.form
    return weight, activations


def matmul(x: np.ndarray, weight: np.ndarray | Record, activations: str | Rounding = "float32") -> np.ndarray:
    """x @ weight.T for any weight.

    Parameters
    ----------
    x : (..., in) float32 or float64
    weight : (out, in) array or record
    activations : str or Rounding
        float32, or int8 or int4: x is rounded to 8 or 4 bits with one scale per token (per 32 columns beside GGUF
        blocks, per 256 beside K-quants) wherever the weight is stored as codes; or what a Rounding says. Weights stored
        as floats (dense, sparse, low-rank) keep float activations; the parts of a LowRank or a Sum count one by one. A
        record that says how its inputs are rounded (inputs.py) is taken at its word. The inputs of a Rotated are turned
        first.

    Returns
    -------
    (..., out) array of the type of x (of x and weight together when the weight is dense)

    Raises
    ------
    ValueError
        The widths differ, or activations is none of these.

    Examples
    --------
    >>> matmul(np.ones((1, 2), np.float32), np.array([[1, 2], [3, 4], [5, 6]], np.float32)).tolist()
    [[3.0, 7.0, 11.0]]
    """
    if activations not in ACTIVATIONS and not isinstance(activations, Rounding):
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    x = np.asarray(x)
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"activations of shape {x.shape} do not fit a weight with {weight.shape[1]} columns")
    weight, activations = as_run(weight, activations)
    if not is_record(weight):
        return x @ weight.T
    if x.dtype not in (np.float32, np.float64):
        raise ValueError(f"activations of a packed weight must be float32 or float64, got {x.dtype}")
    if isinstance(weight, LowRank):
        A, B = weight.factors
        return matmul(matmul(x, B, activations), A, activations)
    if isinstance(weight, Sum):
        first, second = weight.terms
        return matmul(x, first, activations) + matmul(x, second, activations)
    if isinstance(weight, SparseRows):
        return weight.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], weight.shape[0])
    if isinstance(weight, Reordered):
        return matmul(x[..., weight.order], weight.weight, activations)
    if isinstance(weight, Rotated):
        return matmul(weight.turned(x), weight.weight, activations)
    if isinstance(weight, TwoLevel):
        return matmul(x, weight.flat, activations)
    flat = x.reshape(-1, x.shape[-1])
    text = reference
    if x.dtype == np.float32 and backend() == "numba":
        from refllm.kernels.packed import fast as text  # imports numba: a dense model does without
    if isinstance(weight, RoundedInputs):
        y = rounded.matmul_inputs(flat, weight, text)
    elif activations == "float32" or not has_codes(weight):
        y = text.matmul_float(flat, weight)
    elif isinstance(activations, Rounding):
        y = rounded.matmul_tokens(flat, weight, activations, text)
    else:
        y = text.matmul_rounded(flat, weight, BITS[activations])
    return y.reshape(*x.shape[:-1], weight.shape[0])


def matmul_each(x: np.ndarray, weights: Sequence, activations: str | Rounding = "float32") -> list[np.ndarray]:
    """[matmul(x, weight, activations) for weight in weights], to the last bit.

    Kernels lay x out, or round it, once for all weights that want it alike (q, k and v, or gate and up), and multiply
    by all of them in one job: no thread waits at the end of one weight for the next.

    Parameters
    ----------
    x : (..., in) float32 or float64
    weights : sequence of (out, in) array or record
        The numbers of rows may differ.
    activations : str or Rounding
        As of matmul.

    Returns
    -------
    list of (..., out) array

    Raises
    ------
    ValueError
        As of matmul.

    Examples
    --------
    >>> [y.tolist() for y in matmul_each(np.ones(2), [np.eye(2), np.array([[1, 2]])])]
    [[1.0, 1.0], [3.0]]
    """
    x = np.asarray(x)
    found = [None] * len(weights)
    if x.dtype == np.float32 and x.ndim and len(weights) > 1 and backend() == "numba":
        plan = _plan(weights, activations)
        if plan is not None and plan.columns == x.shape[-1]:
            flat = x if x.ndim == 2 else x.reshape(-1, plan.columns)
            for numbers, together in plan.parts:
                for i, y in zip(numbers, together.products(flat), strict=True):
                    found[i] = y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[1])
    return [matmul(x, weight, activations) if y is None else y for weight, y in zip(weights, found, strict=True)]


class _Plan(NamedTuple):
    """How kernels multiply several weights together: what they are found by, references to them, width and parts."""

    key: tuple
    weights: tuple[ref, ...]
    columns: int
    parts: list


_plans: dict[int, _Plan] = {}  # id of a record -> the plan of the weights that it last came first of


def _plan(weights: Sequence, activations: str | Rounding) -> _Plan | None:
    """None where matmul is to be asked for every weight by itself: not all are records of one width.

    Plans are found by identity and go with the first of their weights that does: after a product has streamed weights
    through the caches, every object that is looked at comes from memory.
    """
    first, columns = id(weights[0]), weights[0].shape[1]
    key = activations, *map(id, weights)
    known = _plans.get(first)
    if known is not None and known.key == key:
        return known
    records = []
    for weight in weights:
        record, how = as_run(weight, activations)
        if how not in ACTIVATIONS or not is_record(record) or record.shape[1] != columns:
            return None
        records.append((record, BITS[how] if how in BITS and has_codes(record) else 0))
    from refllm.kernels.packed import fast

    def forget(_):
        if first in _plans and _plans[first].key == key:
            del _plans[first]

    _plans[first] = _Plan(key, tuple(ref(weight, forget) for weight in weights), columns, fast.together(records))
    return _plans[first]


def rows(weight: np.ndarray | Record, ids: np.ndarray) -> np.ndarray:
    """Rows of a weight: the embedding lookup. Only these rows are decoded.

    Parameters
    ----------
    weight : (vocab, width) array or record
    ids : (...) integer in [0, vocab)

    Returns
    -------
    (..., width) float32, or the type of a dense weight

    Raises
    ------
    ValueError
        An id out of range, or not an integer.

    Examples
    --------
    >>> rows(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 1])).tolist()
    [[3.0, 4.0], [3.0, 4.0]]
    """
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" and ids.size:
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= weight.shape[0]):
        raise ValueError(f"ids must lie in [0, {weight.shape[0]}), got {ids.min()} to {ids.max()}")
    if not is_record(weight):
        return weight[ids]
    return weight.rows(ids.reshape(-1)).reshape(*ids.shape, weight.shape[1])
