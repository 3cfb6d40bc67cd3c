"""Sparse weights as arrays: 2:4 values with metadata words, a bitmask with values, CSR.

    2:4       values [out, in / 2], metadata U16 [out, in / 16]: a nibble i0 | i1 << 2 per four columns, low first;
              i0 < i1 are the columns kept. The plain order; CUTLASS and cuSPARSELt permute the words further.
    bitmask   values [kept] in row-major order, bitmask U8 [out, ceil(in / 8)] low bit first, row_offsets I64 [out]
    CSR       data [kept], indices I32 [kept] columns, indptr I32 [out + 1]

The records Sparse24 and SparseBitmask (refllm.kernels.packed) compute with the first two: the bytes of Sparse24.indices
are those of the metadata words, SparseBitmask holds the same bitmask with 32-bit offsets. Which weights are kept is
decided there or by the caller. Source: Mishra et al. 2021, arXiv:2104.08378; torch.sparse (the words before the
permutation); compressed-tensors up to 0.9, sparse-bitmask; SciPy's CSR.
"""

import numpy as np

from refllm.formats.checkpoints.base import check_multiple, pack_axis, stored, unpack_axis
from refllm.formats.checkpoints.describe import Stored, Tensor
from refllm.formats.layouts import Layout, codes, stream

# Number 2 g + k of a word: the k-th kept column of its g-th group of four.
METADATA = Layout("2:4 metadata word", 2, 16, (codes("q", 8, 2, "i // 4", "2 * (i % 4)", "columns kept"),))
BITMASK = Layout("bitmask byte", 1, 8, (stream("q", 8, 1, text="1 = kept"),))
STORED = (
    Stored(
        "2:4",
        "plain order",
        "values[o, 2 g + k] at column 4 g + metadata[o, 2 g + k], k = 0, 1",
        "none",
        (
            Tensor("values", "kept weights", None, "", ("out", "in / 2"), "scale"),
            Tensor("metadata", "which two of four", METADATA, "in", ("out", "in / 16"), "U16"),
        ),
        "torch (before the permutation of CUTLASS)",
    ),
    Stored(
        "bitmask",
        "",
        "the values in row-major order where the mask is 1",
        "none",
        (
            Tensor("values", "kept weights", None, "flat", ("kept",), "scale"),
            Tensor("bitmask", "1 = kept", BITMASK, "in", ("out", "ceil(in / 8)"), "U8"),
            Tensor("row_offsets", "where the values of each row begin", None, "", ("out",), "I64"),
        ),
        "compressed-tensors up to 0.9 (sparse-bitmask)",
    ),
    Stored(
        "CSR",
        "",
        "data[k] at row o, column indices[k], for indptr[o] <= k < indptr[o + 1]",
        "none",
        (
            Tensor("data", "kept weights", None, "flat", ("kept",), "scale"),
            Tensor("indices", "their columns", None, "flat", ("kept",), "I32"),
            Tensor("indptr", "where each row begins, and the end", None, "", ("out + 1",), "I32"),
        ),
        "SciPy, torch",
    ),
)


def sparse24_pack(values: np.ndarray, columns: np.ndarray) -> dict[str, np.ndarray]:
    """Kept weights and their places -> values, metadata.

    Parameters
    ----------
    values : (out, in / 2) float
        Two of each four columns, in order.
    columns : (out, in / 2) integers 0..3
        The column of each within its four; in pairs, ascending.

    Raises
    ------
    ValueError
        Wrong shapes; `in` no multiple of 16; a pair that does not ascend.
    """
    values, columns = np.asarray(values), np.asarray(columns)
    if values.dtype.kind != "f" or values.ndim != 2 or columns.shape != values.shape or columns.dtype.kind not in "iu":
        raise ValueError(f"values and columns must be (out, in / 2) alike, got {values.shape}, {columns.shape}")
    check_multiple("in", 2 * values.shape[1], 16, "a metadata word covers 16 columns")
    _check_pairs(columns)
    metadata = METADATA.pack(q=columns.reshape(len(columns), columns.shape[1] // 8, 8)).view("<u2")[..., 0]
    return {"values": np.ascontiguousarray(values), "metadata": np.ascontiguousarray(metadata, np.uint16)}


def sparse24_unpack(tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """values, metadata -> kept weights, and the column of each within its four, both (out, in / 2).

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape or dtype; a nibble that names no two ascending columns.
    """
    values = stored(tensors, "values", ("float16", "float32"), 2)
    metadata = stored(tensors, "metadata", ("uint16", "int16"), 2)
    if metadata.shape != (len(values), values.shape[1] // 8) or values.shape[1] % 8:
        raise ValueError(f"metadata must be (out, in / 16) for values (out, in / 2), got {metadata.shape}")
    units = np.ascontiguousarray(metadata).astype(metadata.dtype.newbyteorder("<")).view(np.uint8)
    columns = METADATA.unpack(units.reshape(*metadata.shape, 2))["q"].reshape(values.shape)
    _check_pairs(columns)
    return np.ascontiguousarray(values), columns


def sparse24_dense(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """values, metadata -> the weight, (out, in) of the dtype of the values; zeros where nothing was kept."""
    values, columns = sparse24_unpack(tensors)
    out = np.zeros((len(values), 2 * values.shape[1]), values.dtype)
    where = 4 * (np.arange(values.shape[1]) // 2) + columns
    np.put_along_axis(out, where, values, axis=1)
    return out


def bitmask_pack(W: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """A weight (out, in) float and the mask of what is kept (None: where it is not 0) -> values, bitmask, row_offsets.

    Raises
    ------
    ValueError
        Not a matrix, or a mask of another shape.
    """
    W, mask = _masked(W, mask)
    counts = mask.sum(axis=1)
    return {
        "values": W[mask],
        "bitmask": pack_axis(mask.astype(np.uint8), BITMASK, 1, "u1"),
        "row_offsets": np.cumsum(counts) - counts,
    }


def bitmask_unpack(tensors: dict[str, np.ndarray], columns: int) -> tuple[np.ndarray, np.ndarray]:
    """values, bitmask and the number of columns -> the weight (out, in) and the mask.

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape; offsets or values that do not fit the mask.
    """
    values = stored(tensors, "values", ("float16", "float32"), 1)
    mask = unpack_axis(stored(tensors, "bitmask", ("uint8",), 2), BITMASK, 1, columns).astype(bool)
    counts = mask.sum(axis=1)
    if values.shape != (counts.sum(),):
        raise ValueError(f"the bitmask keeps {counts.sum()} weights, there are {len(values)} values")
    if "row_offsets" in tensors and not np.array_equal(tensors["row_offsets"], np.cumsum(counts) - counts):
        raise ValueError("row_offsets do not follow from the bitmask")
    out = np.zeros(mask.shape, values.dtype)
    out[mask] = values
    return out, mask


def csr_pack(W: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """A weight (out, in) float and the mask of what is kept (None: where it is not 0) -> data, indices, indptr.

    Raises
    ------
    ValueError
        Not a matrix, or a mask of another shape.
    """
    W, mask = _masked(W, mask)
    indptr = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
    return {"data": W[mask], "indices": np.nonzero(mask)[1].astype(np.int32), "indptr": indptr}


def csr_unpack(tensors: dict[str, np.ndarray], columns: int) -> np.ndarray:
    """data, indices, indptr and the number of columns -> the weight, (out, in).

    Raises
    ------
    ValueError
        A tensor is missing or has a wrong shape; indptr that does not ascend from 0 to the number of values; a column
        that does not exist or stands twice in a row.
    """
    data = stored(tensors, "data", ("float16", "float32"), 1)
    indices = stored(tensors, "indices", ("int32", "int64"), 1)
    indptr = stored(tensors, "indptr", ("int32", "int64"), 1)
    if indices.shape != data.shape or len(indptr) < 1:
        raise ValueError(f"data and indices must be equally long, got {data.shape} and {indices.shape}")
    counts = np.diff(indptr)
    if indptr[0] != 0 or indptr[-1] != len(data) or (counts < 0).any():
        raise ValueError(f"indptr must ascend from 0 to {len(data)}, got {indptr[:5].tolist()} ... {int(indptr[-1])}")
    if len(indices) and (indices.min() < 0 or indices.max() >= columns):
        raise ValueError(f"indices must lie in 0..{columns - 1}, got {indices.min()}..{indices.max()}")
    rows = np.repeat(np.arange(len(counts)), counts)
    flat = rows * columns + indices
    if len(np.unique(flat)) != len(flat):
        raise ValueError("a column stands twice in a row")
    out = np.zeros(len(counts) * columns, data.dtype)
    out[flat] = data
    return out.reshape(len(counts), columns)


def _masked(W: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    W = np.asarray(W)
    mask = W != 0 if mask is None else np.asarray(mask, bool)
    if W.ndim != 2 or W.dtype.kind != "f" or mask.shape != W.shape:
        raise ValueError(f"a float weight (out, in) and a mask alike are needed, got {W.dtype} {W.shape}, {mask.shape}")
    return W.astype(W.dtype.newbyteorder("="), copy=False), mask


def _check_pairs(columns: np.ndarray) -> None:
    pairs = columns.reshape(len(columns), -1, 2)
    if columns.size and (columns.min() < 0 or columns.max() > 3 or (pairs[..., 0] >= pairs[..., 1]).any()):
        raise ValueError("each four columns need two different ones of 0..3, in ascending order")
