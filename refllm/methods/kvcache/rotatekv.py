"""rotatekv: keys turned over several heads at once, channels of like level side by side, two bits a number.

A loud channel widens the range of every group it is in. A Hadamard matrix over the channels of four heads gives a
share of it to all of them, before RoPE, which would move it about. What remains is that turned channels have different
means; sorted by them, the channels of one group lie close together and its range is small.

    keys     r = k H / sqrt(n), n = 4 D numbers of four heads    row = r[order], order = argsort of sums on a text
             groups of G channels of the row, all heads in one
    values   v H / sqrt(D), every head by itself, one group a head
    group    clipped to c of its range (c = 0.8 at two bits, else 1) about its middle, then as in `kivi`:
             scale = c (max - min) / (2^bits - 1)    code = rint((x - low) / scale)

Reading undoes all of it, last first; the caller rotates the keys. A call sees its own tokens coded. The first tokens,
on which much attention rests and whose numbers are unlike all others, stay in full. Bits a number: bits + 32 / G for
keys, bits + 32 / D for values; `order` is learned once for a model and kept in its tables, 2 bytes a channel.

Paper: Su et al. 2025, "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive
Rotations", arXiv:2501.16383.
Differs from the authors' code: the matrices are applied here instead of folded into the projections of keys, values
and outputs, which is the same by linearity and also right behind a norm or a bias of keys; as many heads are turned
together as divide their number, up to four; the groups of values are heads whatever G is; tokens in full are the first
`sinks` instead of those that hold the 20 largest hidden numbers of the prompt, which a cache does not see; ranges
shrink about their middle, not about 0 (the same for middles of 0; a group far from 0 would lose its numbers); low and
scale are stored in float16 and low is not a whole number of steps; the range is divided by 2^bits - 1, not bits^2 - 1.
Stage: memory, decode
Inventory: none, an addition
Lesson: lessons/29-random-rotations-of-caches.md
Golden: kvcache/rotatekv
"""

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.hadamard import check_hadamard, turn
from refllm.methods.kvcache._coded import CodedStore, split_axis
from refllm.methods.kvcache.kivi import dequantize_groups, quantize_groups
from refllm.model.cached import cached_values
from refllm.model.model import Model

CLIP = {2: 0.8}  # bits: share of a group's range that is kept; 1 for others
WIDEST = 1024  # numbers that are turned together


def rotatekv(
    layer: int,
    *,
    bits: int = 2,
    group_size: int = 128,
    heads: int = 4,
    sinks: int = 4,
    recent: int = 0,
    tables: dict[str, np.ndarray] | None = None,
) -> "RotateKVStore":
    """The store of one layer; in a recipe the tables are learned on the calibration text.

    Parameters
    ----------
    layer : int
        Which order of channels is used.
    bits : int
        Of a code, 2 to 8.
    group_size : int
        G: channels of all heads of a key that share a scale; the whole key where it has fewer. Must divide it.
    heads : int
        That are turned together, at most; as many as divide the number of heads.
    sinks, recent : int
        First and last tokens that are kept in full (the authors' code: none of the last).
    tables : dict
        "LAYER.order" (Hk * D,) uint16, a permutation, as `channel_order` gives it.

    Returns
    -------
    RotateKVStore

    Raises
    ------
    ValueError
        A number outside its range, an order that is missing or none.
    """
    order = (tables or {}).get(f"{layer}.order")
    if order is None:
        raise ValueError(
            f"rotatekv needs the order of the channels of layer {layer}: a recipe learns it; in Python give "
            "tables=rotatekv.learn(model, ids)"
        )
    return RotateKVStore(order, bits, group_size, heads, sinks, recent)


def _learn(model: Model, ids, *, heads: int = 4, **_) -> dict[str, np.ndarray]:
    """See `refllm.methods.apply`: the order of the channels of every layer."""
    found = cached_values(model, ids, pre_rope=True)
    return {f"{layer}.order": channel_order(K, heads) for layer, (K, _) in enumerate(found)}


rotatekv.learn = _learn


class RotateKVStore(CodedStore):
    """Codes, scales and lows of turned keys, all heads of a token in one row, and of turned values, head by head.

    Parameters
    ----------
    order : (Hk * D,) uint16
    bits, group_size, heads, sinks, recent : int
        As in `rotatekv`.
    """

    name = "rotatekv"
    pre_rope = True
    rounds_own = True
    limit = 2000.0  # so that what is turned, up to sqrt(WIDEST) as large, is float16

    def __init__(self, order: np.ndarray, bits: int, group_size: int, heads: int, sinks: int = 0, recent: int = 0):
        if not 2 <= bits <= 8:
            raise ValueError(f"rotatekv bits must be 2 to 8, got {bits}")
        if group_size < 1 or heads < 1:
            raise ValueError(f"rotatekv group_size and heads must be positive, got {group_size} and {heads}")
        if order.dtype != np.uint16 or order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(len(order))):
            raise ValueError(
                f"rotatekv order must hold 0 .. n - 1 once each, uint16, got {order.dtype} {order.shape}: learn it "
                "again"
            )
        self.order, self.bits, self.heads = order, bits, heads
        self.group_size = min(group_size, len(order))
        if len(order) % self.group_size:
            raise ValueError(
                f"rotatekv group_size must divide the {len(order)} channels of a key's heads, got {group_size}"
            )
        super().__init__(recent, sinks)

    def _check_width(self, side, shape):
        Hk, D = shape[-3], shape[-1]
        if side == "key":
            if Hk * D != len(self.order):
                raise ValueError(
                    f"rotatekv has an order of {len(self.order)} channels, got {Hk} heads of {D}: learn it again"
                )
            D *= together(Hk, self.heads)
        check_hadamard(D, f"what rotatekv turns of a {side}")
        if D > WIDEST:
            raise ValueError(f"rotatekv turns up to {WIDEST} channels together, got {D}: take fewer heads")

    def _encode(self, side, x):
        turned = turn_keys(x, self.heads)[..., self.order] if side == "k" else turn(x)
        size = self.group_size if side == "k" else turned.shape[-1]
        codes, scale, low = round_groups(split_axis(turned, -1, size), self.bits)
        return {"codes": pack_bits(codes.reshape(turned.shape), self.bits), "scale": scale, "low": low}

    def _decode(self, side, arrays, dtype):
        scale, low, D = arrays["scale"], arrays["low"], self._width(side)
        size = self.group_size if side == "k" else D
        codes = unpack_bits(arrays["codes"], self.bits, scale.shape[-1] * size)
        turned = dequantize_groups(split_axis(codes, -1, size), scale, low, dtype).reshape(codes.shape)
        if side == "v":
            return turn(turned, back=True)
        return turn_keys_back(turned[..., np.argsort(self.order)], D, self.heads)


def together(count: int, heads: int) -> int:
    """How many of `count` heads are turned together: the largest divisor of their number up to `heads`.

    Examples
    --------
    >>> [together(count, 4) for count in (32, 6, 5)]
    [4, 3, 1]
    """
    return next(n for n in range(min(count, heads), 0, -1) if count % n == 0)


def turn_keys(k: np.ndarray, heads: int) -> np.ndarray:
    """Keys of a token as one row of all heads, groups of heads turned by a Hadamard matrix.

    Parameters
    ----------
    k : (..., Hk, T, D) float32 or float64
        Before RoPE.
    heads : int
        As in `rotatekv`.

    Returns
    -------
    (..., T, Hk * D) like k

    Examples
    --------
    >>> turn_keys(np.array([[[4.0]], [[0.0]], [[0.0]], [[0.0]]]), heads=4).tolist()
    [[2.0, 2.0, 2.0, 2.0]]
    """
    Hk, T, D = k.shape[-3:]
    rows = k.swapaxes(-3, -2).reshape(*k.shape[:-3], T, Hk * D)
    return turn(split_axis(rows, -1, together(Hk, heads) * D)).reshape(rows.shape)


def turn_keys_back(rows: np.ndarray, D: int, heads: int) -> np.ndarray:
    """What `turn_keys` was given: (..., T, Hk * D) -> (..., Hk, T, D)."""
    size = together(rows.shape[-1] // D, heads) * D
    back = turn(split_axis(rows, -1, size), back=True).reshape(rows.shape)
    return split_axis(back, -1, D).swapaxes(-3, -2)


def channel_order(K: np.ndarray, heads: int) -> np.ndarray:
    """Channels of turned keys from the one with the smallest sum to the one with the largest.

    Parameters
    ----------
    K : (..., Hk, T, D) float32 or float64
        Keys of a calibration text before RoPE.
    heads : int
        As in `rotatekv`.

    Returns
    -------
    (Hk * D,) uint16
        Row position -> channel. Channels of equal sums stay in order.

    Examples
    --------
    >>> channel_order(np.array([[[1.0, 3.0]], [[9.0, 2.0]]]), heads=1).tolist()
    [1, 0, 3, 2]
    """
    check_hadamard(together(K.shape[-3], heads) * K.shape[-1], "what rotatekv turns of a key")
    rows = turn_keys(K.astype(np.float64), heads)
    sums = rows.reshape(-1, rows.shape[-1]).sum(axis=0)
    return np.argsort(sums, kind="stable").astype(np.uint16)


def round_groups(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round each group to 2^bits even steps of its range, or of the middle 80 % of it at two bits.

    Parameters
    ----------
    x : (..., G) float32 or float64, one group along the last axis
    bits : int

    Returns
    -------
    codes : (..., G) uint8
    scale, low : (...) float16
        As in `refllm.methods.kvcache.kivi.quantize_groups`, with its minimum as low.

    Examples
    --------
    >>> codes, scale, low = round_groups(np.array([-7.5, 2.0, 7.5]), bits=2)
    >>> codes.tolist(), scale.tolist(), low.tolist()
    ([0, 2, 3], 4.0, -6.0)
    """
    lowest, highest = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    middle, half = (highest + lowest) / 2, CLIP.get(bits, 1.0) * (highest - lowest) / 2
    return quantize_groups(np.clip(x, middle - half, middle + half), bits)
