"""kvquant: keys by channel before RoPE, values by token, a learned table of codes, and the few loud numbers apart.

    u = (x - offset) / spread    code = the nearest entry of the layer's table    x^ = offset + spread table[code]
    x^ = offset + (x - offset)                                                    where x is an outlier

A channel of the keys has its level and its size in all tokens, until RoPE mixes it with its partner; so keys are stored
unrotated, and offset and spread of every channel are learned beforehand: the middle and half the distance of two
percentiles of a calibration text. Values have no such channels: their offset and spread belong to a token (all its
heads together) and are found when it comes.

    keys      outlier: beyond the learned percentiles o / 2 and 1 - o / 2 of its channel
    values    outlier: at or beyond these percentiles of its token; the others decide about offset and spread
    stored    an outlier's channel and x - offset in float16, and how many a token has: 24 to 32 bits each
    table     2^bits centroids of all u of a layer that are no outliers, one table for keys and one for values: k-means
              in which every number weighs the squared gradient of the loss by it (the diagonal of the Fisher
              information)
    norm      decoding takes table'[code] = (table[code] - m2) s1 / s2 + m1 in place of table[code], so that mean m2
              and deviation s2 of the decoded u of the calibration become those of the u (Q-Norm, meant for two bits)

The first tokens, on which much attention rests, are kept in full and left out of the calibration. Bits a number for C
channels (all heads): bits + 24 to 32 times the share of outliers + 8 or 16 / C for their count, values 32 / C more.

Paper: Hooper et al. 2024, "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization",
NeurIPS, arXiv:2401.18079, section 3.
Differs from the authors' code: k-means starts from the even grid and from the optimum of a coarse copy of the numbers,
and keeps the better result (scikit-learn: k-means++); percentiles of keys are rounded to float16 outwards; the first
tokens are left out of percentiles, too; a value equal to its token's median is no outlier, so a token of equal numbers
needs none; a spread of 0 gives the offset (there: 0 / 0); `cap` does not change the calibration; a call sees its own
tokens in full. The weights are gradients by x, not by u, as there.
Stage: memory, decode
Inventory: 46
Lesson: lessons/30-learned-caches.md
Golden: kvcache/kvquant, kvcache/kvquant_learn
"""

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.kmeans_1d import near_best_1d, nearest_1d
from refllm.methods.kvcache._coded import CodedStore
from refllm.model.cached import cache_sensitivity, cached_values
from refllm.model.model import Model

LIMIT = 32752.0  # a difference of two such numbers is a float16
_CHANNELS = 65535  # a place among them, and their number, is a uint16
_RAGGED = ("places", "rest")


def kvquant(
    layer: int,
    *,
    bits: int = 3,
    outliers: float = 0.01,
    sinks: int = 1,
    recent: int = 0,
    cap: int = 0,
    norm: bool = False,
    fisher: bool = True,
    tables: dict[str, np.ndarray] | None = None,
) -> "KVQuantStore":
    """The store of one layer: `new_cache(model, policy=partial(kvquant, tables=kvquant.learn(model, ids)))`.

    Parameters
    ----------
    layer : int
    bits : int
        Of a code, 2 to 8.
    outliers : float
        Share of the numbers that is kept apart, 0 to 1. 0: none, and numbers beyond the range take its end.
    sinks : int
        First tokens that are kept in full.
    recent : int
        Last tokens that are kept in full (the paper: none).
    cap : int
        Outliers above the range that a token of the keys may have, and below it: the farthest, counted in spreads.
        0: any number (the authors' code, for 4096 channels: 21).
    norm : bool
        Q-Norm.
    fisher : bool
        False: every number weighs the same in the k-means. Gradients are known of plain Llama models only.
    tables : dict
        What `kvquant.learn(model, ids, bits=, outliers=, sinks=, norm=, fisher=)` gives; a recipe does so itself.
        Of every layer `LAYER.k_range` (2, Hk * D) float16, percentiles; `LAYER.k_table`, `LAYER.v_table`
        (1, 2^bits) float32, rising; with Q-Norm (2, 2^bits), the second row for decoding.

    Returns
    -------
    KVQuantStore

    Raises
    ------
    ValueError
        A number outside its range, tables that are missing or do not fit these knobs.
    """
    _check(bits, outliers)
    if cap < 0:
        raise ValueError(f"kvquant cap must be 0 (no limit) or more, got {cap}")
    if tables is None:
        raise ValueError(
            "kvquant needs tables: a recipe learns them from the calibration text; in Python give "
            "tables=kvquant.learn(model, ids) with the knobs of this call"
        )
    try:
        k_range, k_table, v_table = (tables[f"{layer}.{name}"] for name in ("k_range", "k_table", "v_table"))
    except KeyError as error:
        raise ValueError(f"kvquant has no table {error}: learn the tables of this model") from None
    for name, table in (("k_table", k_table), ("v_table", v_table)):
        if table.shape != (1 + norm, 1 << bits) or table.dtype != np.float32 or not _rising(table[0]):
            raise ValueError(
                f"kvquant: {layer}.{name} must be float32 {(1 + norm, 1 << bits)}, finite and rising, for bits={bits} "
                f"and norm={norm}, got {table.dtype} {table.shape}: learn the tables with these knobs"
            )
    if k_range.shape[:1] != (2,) or k_range.ndim != 2 or k_range.dtype != np.float16 or not _rising(k_range):
        raise ValueError(
            f"kvquant: {layer}.k_range must be float16 (2, channels), at most {LIMIT:g}, its second row not below "
            f"the first, got {k_range.dtype} {k_range.shape}: learn the tables again"
        )
    return KVQuantStore(k_range, {"k": k_table, "v": v_table}, outliers, cap, sinks, recent)


def _rising(table: np.ndarray) -> bool:
    """Along the first axis; NaN and what is too large are not."""
    return bool((np.abs(table) <= LIMIT).all() and (table[1:] >= table[:-1]).all())


def _check(bits: int, outliers: float) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"kvquant bits must be 2 to 8, got {bits}")
    if not 0 <= outliers <= 1:
        raise ValueError(f"kvquant outliers must be a share from 0 to 1, got {outliers}")


class KVQuantStore(CodedStore):
    """Codes of every token, its outliers, and offset and spread of its values.

    Parameters
    ----------
    k_range : (2, Hk * D) float16
    tables : dict
        "k" and "v": (1 or 2, 2^bits) float32.
    outliers, cap, sinks, recent :
        As in `kvquant`.
    """

    name = "kvquant"
    pre_rope = True
    limit = LIMIT

    def __init__(self, k_range, tables, outliers: float, cap: int, sinks: int, recent: int):
        self.k_range, self.tables, self.outliers, self.cap = k_range, tables, outliers, cap
        self.bits = tables["k"].shape[1].bit_length() - 1
        super().__init__(recent, sinks)

    def _check_width(self, side, shape):
        channels = shape[-3] * shape[-1]
        if side == "key" and channels != self.k_range.shape[1]:
            raise ValueError(f"kvquant learned {self.k_range.shape[1]} channels of keys, got {channels}")
        if channels > _CHANNELS:
            raise ValueError(f"kvquant codes up to {_CHANNELS} channels of a token, got {channels} of a {side}")

    def _encode(self, side, x):
        x = token_rows(x).astype(np.float64)
        if side == "k":
            offset, spread = middle(self.k_range)
            apart = key_outliers(x, self.k_range, self.cap) if self.outliers else np.zeros(x.shape, bool)
            arrays = {}
        else:
            apart, offset, spread = value_range(x, self.outliers)
            arrays = {"offset": offset, "spread": spread}
        codes, rest = encode(x, offset, spread, apart, self.tables[side])
        arrays |= {"codes": pack_bits(codes, self.bits)}
        if self.outliers:
            arrays |= gather(rest, apart)
        return arrays

    def _decode(self, side, arrays, dtype):
        *_, heads = self._first["kv".index(side)][0]
        channels = heads * self._width(side)
        offset, spread = middle(self.k_range) if side == "k" else (arrays["offset"], arrays["spread"])
        x = decode(unpack_bits(arrays["codes"], self.bits, channels), offset, spread, self.tables[side])
        if self.outliers:
            scatter(x, offset, arrays["counts"], arrays["places"], arrays["rest"])
        return x.astype(dtype).reshape(*x.shape[:-1], heads, -1).swapaxes(-3, -2)

    def _end(self, side, name, tokens):
        if name not in _RAGGED:
            return tokens
        return int(self._codes[side]["counts"].view[..., :tokens, :].sum())


def token_rows(x: np.ndarray) -> np.ndarray:
    """(..., Hk, T, D) -> (..., T, Hk * D): all channels of a token in a row, head after head."""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], -1)


def middle(limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offset and spread of (2, ...) lower and upper limits, float64.

    Examples
    --------
    >>> [part.tolist() for part in middle(np.array([[-1.0, 0.0], [3.0, 0.0]]))]
    [[1.0, 0.0], [2.0, 0.0]]
    """
    low, high = limits.astype(np.float64)
    return (low + high) / 2, (high - low) / 2


def key_outliers(x: np.ndarray, k_range: np.ndarray, cap: int = 0) -> np.ndarray:
    """Which numbers lie beyond the limits of their channels.

    Parameters
    ----------
    x : (..., T, C) float64
    k_range : (2, C)
    cap : int
        At most so many above and so many below in each row, the farthest in spreads, the first of equals; 0: all.

    Returns
    -------
    (..., T, C) bool

    Examples
    --------
    >>> key_outliers(np.array([[2.0, 5.0, -1.0, 0.0]]), np.array([[0.0] * 4, [1.0] * 4]), cap=1).tolist()
    [[False, True, True, False]]
    """
    low, high = k_range
    sides = x > high, x < low
    if not cap:
        return sides[0] | sides[1]
    offset, spread = middle(k_range)
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.abs((x - offset) / spread)
    chosen = np.zeros(x.shape, bool)
    for beyond in sides:
        order = np.argsort(np.where(beyond, -far, np.inf), axis=-1, kind="stable")[..., :cap]
        first = np.zeros(x.shape, bool)
        np.put_along_axis(first, order, True, axis=-1)
        chosen |= beyond & first
    return chosen


def value_range(x: np.ndarray, outliers: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outliers of every row, and the range of the others.

    Parameters
    ----------
    x : (..., T, C) float64
    outliers : float
        Share, as in `kvquant`.

    Returns
    -------
    apart : (..., T, C) bool
        At or beyond the percentiles, but not equal to the median (the lower of two).
    offset, spread : (..., T, 1) float16
        As stored.

    Examples
    --------
    >>> apart, offset, spread = value_range(np.array([[-9.0, 1.0, 2.0, 4.0, 70.0]]), outliers=0.4)
    >>> apart.tolist(), offset.tolist(), spread.tolist()
    ([[True, False, False, False, True]], [[2.5]], [[1.5]])
    """
    apart = np.zeros(x.shape, bool)
    if outliers:
        low, high = np.quantile(x, [outliers / 2, 1 - outliers / 2], axis=-1, keepdims=True)
        half = (x.shape[-1] - 1) // 2
        median = np.partition(x, half, axis=-1)[..., half, None]
        apart = ((x <= low) | (x >= high)) & (x != median)
        x = np.where(apart, median, x)
    limits = np.stack([x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)])
    return apart, *(part.astype(np.float16) for part in middle(limits))


def encode(x, offset, spread, apart, table) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and what lies between numbers and their offset.

    Parameters
    ----------
    x : (..., T, C) float64
    offset, spread : broadcast to x
        As stored.
    apart : (..., T, C) bool
    table : (1 or 2, 2^bits), the first row rising

    Returns
    -------
    codes : (..., T, C) uint8
        0 for outliers and where the spread is 0; a number halfway between two entries takes the lower one.
    rest : (..., T, C) float64
        x - offset.

    Examples
    --------
    >>> codes, rest = encode(np.array([[1.0, 2.9, 70.0]]), 2.0, 1.0, np.array([[0, 0, 1]]) > 0, np.array([[-1.0, 1.0]]))
    >>> codes.tolist(), rest.round(3).tolist()
    ([[0, 1, 0]], [[-1.0, 0.9, 68.0]])
    """
    rest = x - offset
    inside = ~apart & (spread > 0)
    u = np.where(inside, rest, 0) / np.where(spread > 0, spread, 1)
    codes = nearest_1d(u.reshape(1, -1), table[:1]).reshape(x.shape)
    return np.where(inside, codes, np.uint8(0)), rest


def decode(codes, offset, spread, table) -> np.ndarray:
    """offset + spread table[code] with the table's last row, float64; parameters as `encode` has and returns them.

    Examples
    --------
    >>> decode(np.array([[0, 1]], np.uint8), 2.0, 0.5, np.array([[-1.0, 1.0], [-0.5, 0.5]])).tolist()
    [[1.75, 2.25]]
    """
    return offset + np.multiply(spread, table[-1].astype(np.float64)[codes])


def gather(rest: np.ndarray, apart: np.ndarray) -> dict[str, np.ndarray]:
    """Outliers in sparse form, token by token (of a batch: row by row of a token), by rising channel.

    Parameters
    ----------
    rest : (..., T, C)
    apart : (..., T, C) bool

    Returns
    -------
    counts : (..., T, 1) uint8, or uint16 for more than 255 channels
    places : (n,) of the same type
        Channels.
    rest : (n,) float16
    """
    rest, by_token = (np.moveaxis(a, -2, 0) for a in (rest, apart))
    small = np.min_scalar_type(apart.shape[-1])
    return {
        "counts": apart.sum(axis=-1, keepdims=True).astype(small),
        "places": np.nonzero(by_token)[-1].astype(small),
        "rest": rest[by_token].astype(np.float16),
    }


def scatter(x: np.ndarray, offset, counts: np.ndarray, places: np.ndarray, rest: np.ndarray) -> None:
    """Write offset + rest into x (..., T, C), in place, where `gather` found outliers."""
    by_token = np.moveaxis(counts[..., 0], -1, 0)
    rows = np.repeat(np.arange(by_token.size), by_token.ravel())
    at = np.unravel_index(rows, by_token.shape)
    at = (*at[1:], at[0], places.astype(np.intp))
    x[at] = np.broadcast_to(offset, x.shape)[at] + rest.astype(np.float64)


# --- calibration -----------------------------------------------------------------------------------------------------


def _learn(
    model: Model, ids, *, bits: int = 3, outliers: float = 0.01, sinks: int = 1, norm=False, fisher=True, **_
) -> dict[str, np.ndarray]:
    """See `refllm.methods.apply`: percentiles of keys and both tables of every layer, by names as in `kvquant`."""
    _check(bits, outliers)
    seen = cached_values(model, ids, pre_rope=True)
    weights = [(None, None)] * len(seen)
    if fisher:
        try:
            weights = cache_sensitivity(model, ids, pre_rope=True)
        except ValueError as error:
            raise ValueError(f"{error}; kvquant needs no gradients with fisher=false") from error
    found = {}
    for layer, (sides, squares) in enumerate(zip(seen, weights, strict=True)):
        for what, of_side in zip(("keys", "values"), squares, strict=True):
            if of_side is not None and not of_side[:, :, sinks:].any():
                raise ValueError(
                    f"kvquant: the loss does not depend on the {what} of layer {layer}: give more text, or fisher=false"
                )
        tables = layer_tables(*sides, *squares, bits=bits, outliers=outliers, sinks=sinks, norm=norm)
        found |= {f"{layer}.{name}": table for name, table in tables.items()}
    return found


kvquant.learn = _learn


def layer_tables(
    k, v, k_squares=None, v_squares=None, *, bits: int, outliers: float, sinks: int = 0, norm: bool = False
) -> dict[str, np.ndarray]:
    """What a layer's store needs, from what its cache was handed on a calibration text.

    Parameters
    ----------
    k : (windows, Hk, tokens, D), v : (windows, Hk, tokens, Dv) float
        Keys before RoPE.
    k_squares, v_squares : of the same shapes, optional
        Squared gradients of the loss; None: all numbers weigh the same.
    bits, outliers, sinks, norm :
        As in `kvquant`.

    Returns
    -------
    dict
        k_range, k_table, v_table, as in `kvquant`.

    Raises
    ------
    ValueError
        Windows no longer than `sinks`, keys too large for float16.
    """
    if k.shape[2] <= sinks:
        raise ValueError(f"kvquant leaves out {sinks} tokens of a window and is left with none: give longer text")
    x = {side: _calibration_rows(numbers, sinks) for side, numbers in (("k", k), ("v", v))}
    k_range = percentiles(x["k"], outliers)
    limits = {"k": k_range, "v": np.quantile(x["v"], [outliers / 2, 1 - outliers / 2], axis=-1, keepdims=True)}
    found = {"k_range": k_range}
    for side, squares in (("k", k_squares), ("v", v_squares)):
        offset, spread = middle(limits[side])
        inside = (x[side] >= limits[side][0]) & (x[side] <= limits[side][1]) & (spread > 0)
        u = (x[side] - offset)[inside] / np.broadcast_to(spread, inside.shape)[inside]
        weights = np.ones(u.size) if squares is None else _calibration_rows(squares, sinks)[inside]
        found[f"{side}_table"] = fit_table(u, weights, bits, norm)
    return found


def _calibration_rows(x: np.ndarray, sinks: int) -> np.ndarray:
    """(windows, Hk, tokens, D) -> (n, Hk * D) float64, without the first tokens of every window."""
    rows = token_rows(x[:, :, sinks:]).astype(np.float64)
    return rows.reshape(-1, rows.shape[-1])


def percentiles(x: np.ndarray, outliers: float) -> np.ndarray:
    """Percentiles outliers / 2 and 1 - outliers / 2 of every column, between neighbours on a line.

    Parameters
    ----------
    x : (n, C) float64
    outliers : float

    Returns
    -------
    (2, C) float16
        Rounded outwards, so that no number between the percentiles is an outlier.

    Raises
    ------
    ValueError
        Numbers too large for float16.

    Examples
    --------
    >>> percentiles(np.arange(6.0)[:, None], 0.4).ravel().tolist()
    [1.0, 4.0]
    """
    exact = np.quantile(x, [outliers / 2, 1 - outliers / 2], axis=0)
    if not (np.abs(exact) <= LIMIT).all():
        raise ValueError(f"kvquant stores float16: keys must be finite and at most {LIMIT:g}")
    low, high = stored = exact.astype(np.float16)
    low[...] = np.where(low > exact[0], np.nextafter(low, np.float16(-np.inf)), low)
    high[...] = np.where(high < exact[1], np.nextafter(high, np.float16(np.inf)), high)
    return stored


def fit_table(u: np.ndarray, weights: np.ndarray, bits: int, norm: bool = False) -> np.ndarray:
    """The entries with the least weighted squared error, and with Q-Norm those for decoding.

    Parameters
    ----------
    u : (n,) float64
        Numbers from -1 to 1; with none of them the entries are the even steps.
    weights : (n,) float64
        Not negative; if all are 0, they count as 1.
    bits : int
    norm : bool

    Returns
    -------
    (1, 2^bits) float32, or (2, 2^bits) with `norm`

    Examples
    --------
    >>> fit_table(np.array([-1.0, -0.5, 0.5, 1.0]), np.array([1.0, 1.0, 1.0, 3.0]), bits=1).tolist()
    [[-0.75, 0.875]]
    >>> fit_table(np.array([-1.0, -0.5, 0.5, 1.0]), np.ones(4), bits=1, norm=True).round(3).tolist()
    [[-0.75, 0.75], [-0.7910000085830688, 0.7910000085830688]]
    """
    if not u.size:
        return np.repeat(np.linspace(-1, 1, 1 << bits, dtype=np.float32)[None], 1 + norm, axis=0)
    weights = weights if weights.any() else np.ones(u.size)
    table = near_best_1d(u[None], weights[None], 1 << bits).astype(np.float32)
    if not norm:
        return table
    coded = table[0].astype(np.float64)[nearest_1d(u[None], table)[0]]
    ratio = u.std() / coded.std() if coded.std() else 1.0
    return np.concatenate([table, (table - coded.mean()) * ratio + u.mean()]).astype(np.float32)
