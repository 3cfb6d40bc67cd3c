"""sage: attention whose q k^T is a product of small integers, with what makes rounding k harmless: smoothing.

    k' = k - mean over tokens        q^ = round(q / s_q)     k^ = round(k' / s_k)     s = largest |x| of a group / 127
    S  = scale s_q s_k q^ k^T        a softmax of S is that of q k^T: what is missing, scale q mean, is the same for
                                     all keys of a query

Keys of many models share a large bias channel by channel, which would take the whole range; without it the codes are
left for what tells keys apart. The LSE is short by scale q mean, which is added back, so parts can be merged.

`sage` (SageAttention): INT8, one scale for 128 queries and for 64 keys, weights and values in float16 with sums in
float16. `sage2`: 4 bits with the queries smoothed as well, S = (q - q_mean)^ k^ + q_mean k', scales for the rows that
one thread of a tensor core holds, weights and values in E4M3. `sage2pp`: weights reach 448 and values 2.25, so that
sums of two steps of 32 keys fit float16, before they go to float32.

Paper: Zhang et al. 2024, "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration",
arXiv:2410.02367; Zhang et al. 2024, "SageAttention2", arXiv:2411.10958; Zhang et al. 2025, "SageAttention2++",
arXiv:2505.21136.
Differs from the authors' kernels: natural exponentials, and neither the scale nor log2(e) is in the codes of q; a group
of zeros has codes 0; with a soft cap, which does not forgive a constant, the missing term is added to S; sums that are
not float16 are float64. INT4 has no public code; it follows the paper.
Stage: prefill
Inventory: 9, 30
Lesson: lessons/23-flash-attention.md
Golden: attention/sage
Baseline: flash
"""

import numpy as np

from refllm.formats.dtypes import FP8_E4M3FN
from refllm.kernels.online_softmax import by_kv_head, dot, tiles, walk_tiles

GRANULARITIES = ("tensor", "block", "thread")
VALUES = ("float16", "fp8", "fp8_float16")
BLOCK_Q, BLOCK_K, WARP = 128, 64, 32
EPSILON = 1e-7  # what the kernels add to the scale of a thread's rows
SMALL_VALUES = 2.25  # 2 steps of 32 keys: 64 x 448 x 2.25 = 64512, below the largest float16


def sage(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bits: int = 8,
    granularity: str = "block",
    smooth_k: bool = True,
    smooth_q: bool = False,
    smooth_v: bool = False,
    values: str = "float16",
) -> np.ndarray:
    """SageAttention; the knobs lead to its successors.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`.
    bits : int
        2 to 8, of the codes of q and k.
    granularity : str
        tensor: a scale per head; block: for 128 queries, 64 keys; thread: within 32 queries for rows with the same
        i mod 8, within 64 keys for those with the same (i // 2) mod 4.
    smooth_k, smooth_q, smooth_v : bool
        Subtract the mean: of all keys, of 128 queries, of all values.
    values : str
        float16; fp8: values per channel and weights in E4M3; fp8_float16: the same with sums of 64 keys in float16.

    Returns
    -------
    (..., H, T, Dv); a query that sees no key gives zeros

    Raises
    ------
    ValueError
        NaN or Inf, a value beyond float16, a knob that is none of these, head counts that do not divide.

    Examples
    --------
    >>> q, at = np.ones((1, 2, 1)), np.arange(2)
    >>> k, v = np.array([[[1000.0], [1002.0]]]), np.array([[[0.0], [1.0]]])
    >>> sage(q, k, v, at, at, scale=1.0)[0, :, 0].round(3).tolist()
    [0.0, 0.881]
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    how = dict(bits=bits, granularity=granularity, smooth_k=smooth_k, smooth_q=smooth_q, smooth_v=smooth_v)
    return sage_with_lse(q, k, v, q_positions, k_positions, **rule, **how, values=values)[0]


def sage2(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bits: int = 4,
) -> np.ndarray:
    """SageAttention2: INT4 per thread with smoothed q and k, E4M3 weights and values.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap :
        As in `refllm.kernels.attention.attend`.
    bits : int
        4, or 8 as released; then q is not smoothed.

    Returns
    -------
    (..., H, T, Dv)

    Raises
    ------
    ValueError
        As `sage`.
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    how = dict(bits=bits, granularity="thread", smooth_q=bits < 8, values="fp8")
    return sage_with_lse(q, k, v, q_positions, k_positions, **rule, **how)[0]


def sage2pp(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bits: int = 8,
) -> np.ndarray:
    """SageAttention2++: as `sage2`, with sums of two tensor-core steps in float16.

    Parameters
    ----------
    q, k, v, q_positions, k_positions, scale, window, softcap, bits :
        As in `sage2`.

    Returns
    -------
    (..., H, T, Dv)

    Raises
    ------
    ValueError
        As `sage`.
    """
    rule = dict(scale=scale, window=window, softcap=softcap)
    how = dict(bits=bits, granularity="thread", smooth_q=bits < 8, values="fp8_float16")
    return sage_with_lse(q, k, v, q_positions, k_positions, **rule, **how)[0]


def sage_with_lse(
    q, k, v, q_positions, k_positions, *, scale, window=None, softcap=None, bits=8, granularity="block", smooth_k=True,
    smooth_q=False, smooth_v=False, values="float16", traffic=None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What `sage` returns, and the log-sum-exp of every row, (..., H, T), of the scores without smoothing."""
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(VALUES)}, got {values!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not np.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or Inf; codes need finite numbers")
    wide = [x.astype(np.float64) for x in (q, k, v)]
    queries, keys, numbers = by_kv_head(wide[0], k.shape[-3]), *wide[1:]
    mean = keys.mean(axis=-2, keepdims=True) * smooth_k  # (..., Hk, 1, D)
    missing = dot(queries, mean)  # (..., Hk, g, T, 1): what smoothing takes from every product of a query
    keys = keys - mean
    centre = _block_means(queries) if smooth_q else np.zeros_like(queries)
    q_codes, q_scale = round_rows(queries - centre, bits, granularity, "q")
    k_codes, k_scale = round_rows(keys, bits, granularity, "k")

    def products(rows, columns):
        whole = dot(q_codes[..., rows, :].astype(np.float64), k_codes[..., columns, :].astype(np.float64))
        found = whole * q_scale[..., rows, None] * k_scale[..., None, None, columns]
        if smooth_q:
            found = found + dot(centre[..., rows, :], keys[..., columns, :])
        return found if softcap is None else found + missing[..., rows, :]

    shift = numbers.mean(axis=-2, keepdims=True) if smooth_v else np.zeros_like(numbers[..., :1, :])
    numbers, v_scale, weigh = _values(numbers - shift, values)
    o, lse = walk_tiles(
        wide[0], keys, numbers, q_positions, k_positions, scale=scale, window=window, softcap=softcap,
        block_q=BLOCK_Q, block_k=BLOCK_K, products=products, weigh=weigh, traffic=traffic,
    )  # fmt: skip
    by_head = lambda x: np.repeat(x, q.shape[-3] // k.shape[-3], axis=-3)
    o = o * by_head(v_scale) + np.where(np.isneginf(lse)[..., None], 0, by_head(shift))  # weights sum to 1
    if softcap is None:
        lse = lse + scale * missing.reshape(lse.shape)
    return o.astype(q.dtype), lse.astype(q.dtype)


def round_rows(x: np.ndarray, bits: int, granularity: str, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Integer codes of rows, half away from zero.

    Parameters
    ----------
    x : (..., T, D) float64
    bits : int
        2 to 8: codes reach from -(2^(bits-1) - 1) to 2^(bits-1) - 1.
    granularity : str
        See `sage`.
    side : str
        q or k: these are grouped in different ways.

    Returns
    -------
    codes : (..., T, D) int8
    scale : (..., T) float32, repeated for the rows of its group; 1 for a group of zeros

    Examples
    --------
    >>> codes, scale = round_rows(np.array([[7.0, 2.5], [-0.5, 0.49]]), 4, "block", "q")
    >>> codes.tolist(), scale.tolist()
    ([[7, 3], [-1, 0]], [1.0, 1.0])
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    most, largest = (1 << (bits - 1)) - 1, np.abs(x).max(axis=-1)
    group = row_groups(x.shape[-2], granularity, side)
    found = np.zeros((*largest.shape[:-1], group.max(initial=-1) + 1))
    for row, of in enumerate(group):
        found[..., of] = np.maximum(found[..., of], largest[..., row])
    scale = (found / most + (EPSILON if granularity == "thread" else 0)).astype(np.float32)
    scale = np.where((found > 0) & (scale > 0), scale, np.float32(1))[..., group]
    steps = x / scale[..., None].astype(np.float64)
    codes = np.trunc(steps + np.copysign(0.5, steps))
    return np.clip(codes, -most, most).astype(np.int8), scale


def row_groups(rows: int, granularity: str, side: str) -> np.ndarray:
    """Which scale each row takes, (rows,) integers from 0.

    Examples
    --------
    >>> row_groups(10, "thread", "q").tolist(), row_groups(10, "thread", "k").tolist()
    ([0, 1, 2, 3, 4, 5, 6, 7, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3, 0, 0])
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    row = np.arange(rows)
    if granularity == "tensor":
        return 0 * row
    if granularity == "block":
        return row // (BLOCK_Q if side == "q" else BLOCK_K)
    return row // WARP * 8 + row % 8 if side == "q" else row // BLOCK_K * 4 + row // 2 % 4


def _block_means(queries: np.ndarray) -> np.ndarray:
    centre = np.empty_like(queries)
    for rows in tiles(queries.shape[-2], BLOCK_Q, "block"):
        centre[..., rows, :] = queries[..., rows, :].mean(axis=-2, keepdims=True)
    return centre


def _values(v: np.ndarray, form: str):
    """Values as a tile meets them, what the output is multiplied by, and the product with weights."""
    if form == "float16":
        if np.abs(v).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError(f"values reach {np.abs(v).max():.6g}, beyond float16; values=fp8 scales them")
        return v.astype(np.float16).astype(np.float64), np.ones_like(v[..., :1, :]), _weigh_float16
    end = FP8_E4M3FN.max if form == "fp8" else SMALL_VALUES
    largest = np.abs(v).max(axis=-2, keepdims=True)  # per channel
    scale = np.where(largest > 0, largest / end, 1).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float64)
    codes = FP8_E4M3FN.encode(np.clip(v / scale, -end, end))
    decoded = FP8_E4M3FN.decode(codes).astype(np.float64)
    return decoded, scale, _weigh_fp8 if form == "fp8" else _weigh_fp8_float16


def _weigh_float16(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _summed_in_float16(p.astype(np.float16).astype(np.float64), v, 16, v.shape[-2])


def _weigh_fp8(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.matmul(_p_codes(p), v) / FP8_E4M3FN.max


def _weigh_fp8_float16(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _summed_in_float16(_p_codes(p), v, 32, 64) / FP8_E4M3FN.max


def _p_codes(p: np.ndarray) -> np.ndarray:
    return FP8_E4M3FN.decode(FP8_E4M3FN.encode(FP8_E4M3FN.max * p)).astype(np.float64)


def _summed_in_float16(p: np.ndarray, v: np.ndarray, step: int, run: int) -> np.ndarray:
    """p v, `step` keys at a time, the sum rounded to float16 after each; every `run` keys it goes to a wide one."""
    wide = np.zeros((*np.broadcast_shapes(p.shape[:-2], v.shape[:-2]), p.shape[-2], v.shape[-1]))
    for start in range(0, v.shape[-2], run):
        narrow = np.zeros(wide.shape, np.float16)
        for at in range(start, min(start + run, v.shape[-2]), step):
            keys = slice(at, min(at + step, start + run))
            with np.errstate(over="ignore"):
                narrow = (narrow + np.matmul(p[..., keys], v[..., keys, :])).astype(np.float16)
        wide += narrow
    return wide
