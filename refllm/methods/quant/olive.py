"""olive: four bits in which an outlier takes the room of its neighbour.

    two neighbours (w_1, w_2) / s -> one byte: both on the grid -7 ... 7; or one of them 12 ... 96, and the other 0
    s = alpha / 7      alpha = i / 100 (|mean| + 3 std of the row), i = 75, 77 ... 249: the one of least squared error

A large weight stands beside a small one nearly always, and the small one is worth less than the range that the large
one would take from all others. The byte says itself which case it is (refllm.kernels.pairs): nothing is stored beside
the codes, and every byte has its place, unlike with a list of outliers. So a byte is the code of a vector of two
columns, and it is stored as one: the table of the 256 vectors costs 1 KiB a weight matrix.

`inputs=true` codes the inputs in the same way, with one scale for all tokens, found by the same search in calibration.

Paper: Guo et al. 2023, "OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair
Quantization", ISCA, arXiv:2304.07493, sections 3 and 4.
Differs from the authors' code: scales of weights are float16 and rounded before the codes are computed; a row of zeros
takes an alpha of 1; an odd number of columns is refused (there, pairs run on in the next row); the scale of inputs is
searched on 512 to 1023 tokens, and inputs have the normals "int" always; no form for tensors without a negative number
(its 16 normals leave no code that could say "outlier"), and no 8-bit form.
Stage: memory, decode, prefill
Inventory: 77
Lesson: lessons/18-pairs-and-lengths.md
Golden: quant/olive
Baseline: none, its table of 1 KiB is more than the weight of a small matrix can pay
"""

import numpy as np

from refllm.kernels.grids import SCALE_DTYPES
from refllm.kernels.packed.inputs import PairInputs
from refllm.kernels.packed.records import VectorWeight, as_float
from refllm.kernels.packed.reference import row_blocks
from refllm.kernels.pairs import NORMALS, encode_pairs, pair_table, round_pairs
from refllm.kernels.stats import Stats

STEP = 2  # per cent
TOKENS = 512  # of the calibration inputs, up to twice as many
_ELEMENTS = 1 << 16  # of a weight at a time: they stay in the cache


def olive(
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    normals: str = "int",
    low: int = 75,
    high: int = 250,
    inputs: bool = False,
    scale_dtype: str = "float16",
) -> VectorWeight | PairInputs:
    """Outlier-victim pairs.

    Parameters
    ----------
    W : (out, in) float, finite; `in` is even
    stats : Stats, optional
        Calibration inputs; looked at for `inputs` only.
    normals : str
        int: -7 ... 7. flint: 0, 1/2, 1, 3/2, 2, 3, 4, 8 and their negatives. best: the one with less error in all.
    low, high : int
        The search for alpha, in per cent of |mean| + 3 std: from low, below high.
    inputs : bool
        Code the inputs, too.
    scale_dtype : str
        float16 or float32.

    Returns
    -------
    VectorWeight, or a PairInputs around it

    Raises
    ------
    ValueError
        NaN or Inf in W, an odd number of columns, another name of normals, an empty search, a scale beyond its type;
        `inputs` without calibration inputs, or with those of another width.

    Examples
    --------
    The neighbour of 40 gives its place away, and the steps of the others are no sixth of 40, as on an even grid:

    >>> W = np.array([[6.5, -7.0, 40.0, 1.0, 3.0, -2.0, 5.0, -6.0] + 28 * [0.0, 0.0]])
    >>> np.rint(olive(W).dense()[0, :8]).tolist()
    [8.0, -8.0, 40.0, 0.0, 3.0, -3.0, 5.0, -5.0]
    """
    W = _checked(W, low, high)
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {scale_dtype!r}")
    forms = ("int", "flint") if normals == "best" else (normals,)
    if unknown := set(forms) - set(NORMALS):
        raise ValueError(f"normals must be {', '.join(NORMALS)} or best, got {unknown.pop()!r}")
    found = {form: least_error_scale(W, form, low, high, scale_dtype) for form in forms}
    form = min(forms, key=lambda form: found[form][1].sum())  # of equals the first
    scale = found[form][0]
    codes = np.concatenate([encode_pairs(round_pairs(_steps(W[b], scale[b]), form), form) for b in _blocks(W)])
    weight = VectorWeight.pack(codes[..., None], pair_table(form)[None, None], scale)
    if not inputs:
        return weight
    if stats is None:
        raise ValueError("inputs=true needs calibration inputs, to find their scale")
    if stats.X.shape[1] != W.shape[1]:
        raise ValueError(f"calibration inputs have {stats.X.shape[1]} columns, the weight has {W.shape[1]}")
    X = stats.X[:: max(1, len(stats.X) // TOKENS)].astype(np.float32).reshape(1, -1)
    return PairInputs(weight, least_error_scale(X, "int", low, high, "float32")[0])


olive.needs_text = "inputs"  # see refllm.methods.apply


def _checked(W: np.ndarray, low: int, high: int) -> np.ndarray:
    W = np.asarray(W)
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"a weight must be a non-empty [out, in] matrix, got shape {W.shape}")
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf; quantization needs finite values")
    if W.shape[1] % 2:
        raise ValueError(f"a code holds 2 neighbouring columns, and the weight has an odd number, {W.shape[1]}")
    if not 1 <= low < high:
        raise ValueError(f"the search must go from low >= 1 to a larger high, got {low} and {high}")
    return W.astype(np.float32)


def least_error_scale(
    W: np.ndarray, normals: str, low: int, high: int, scale_dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """The scale of every row whose pairs have the least squared error, of equals the smallest.

    Parameters
    ----------
    W : (rows, n) float32, n even
    normals, low, high, scale_dtype :
        As for `olive`, normals int or flint.

    Returns
    -------
    scale : (rows, 1) of scale_dtype
    error : (rows, 1) float64
    """
    wide = W.astype(np.float64)
    base = np.abs(wide.mean(axis=1, keepdims=True)) + 3 * wide.std(axis=1, ddof=1, keepdims=True)
    base[base == 0] = 1
    smallest = np.finfo(scale_dtype).smallest_subnormal
    best, least = np.zeros(base.shape, scale_dtype), np.full(base.shape, np.inf)
    for percent in range(low, high, STEP):
        scale = np.maximum(as_float(base * (percent / 100 / NORMALS[normals][-1]), scale_dtype), smallest)
        for block in _blocks(W):
            decoded = round_pairs(_steps(W[block], scale[block]), normals) * scale[block].astype(np.float32)
            error = np.square(decoded - wide[block]).sum(axis=1, keepdims=True)
            better = error < least[block]
            least[block][better], best[block][better] = error[better], scale[block][better]
    return best, least


def _steps(W: np.ndarray, scale: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a quotient beyond the float range ends on the last value like any other
        return W / scale.astype(np.float32)


def _blocks(W: np.ndarray) -> list[slice]:
    return list(row_blocks(W.shape, _ELEMENTS))
