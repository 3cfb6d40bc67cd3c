"""kivi: two-bit keys per channel and values per token, with a window of recent tokens kept in full.

A few channels of the keys are large in every token, so keys are grouped along the tokens of one channel; values have no
such channels, so they are grouped along the channels of one token. With G = group_size and R = residual:

    keys    blocks of R tokens, groups of G consecutive tokens of one channel; the last S mod R tokens stay in full
    values  single tokens,      groups of G consecutive channels of one token; the last min(S, R) tokens stay in full
    scale = (max - min) / (2^bits - 1)    code = rint(clip((x - min) / scale, 0, 2^bits - 1))    x^ = scale * code + min

A call attends over what was quantised before it, the window, and its own tokens in full; only then what has become due
is quantised. So prefill attends over unquantised tokens, a decode step quantises after its own attention, and what is
stored after S tokens is the same however they came in. Bits per quantised element: bits + 32 / G.

Paper: Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv:2402.02750, section 4.
Differs from the authors' code: tokens in full keep the type they come in (there: float16), and the arithmetic is in
that type; min is rounded to float16 *downwards* (no difference on float16 input), so nothing falls below the grid; a
constant group divides by 1 instead of 0.
Stage: memory, decode
Inventory: 47
Lesson: lessons/02-prefill-decode-cache.md
Golden: kvcache/kivi
"""

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.attention import attend
from refllm.kernels.packed import backend
from refllm.methods.kvcache._coded import Growing, check_order, split_axis

_FLOAT16_MAX = 65504.0


def kivi(layer: int, *, bits: int = 2, group_size: int = 32, residual: int = 128) -> "KiviStore":
    """The store of one layer: `new_cache(model, policy=kivi)`.

    Parameters
    ----------
    layer : int
        Every layer is treated alike.
    bits : int
        Of a code, 1 to 8.
    group_size : int
        G: tokens (keys) or channels (values) that share a scale and a minimum. Must divide the head dimension.
    residual : int
        R: tokens kept in full; a multiple of G.

    Returns
    -------
    KiviStore

    Raises
    ------
    ValueError
        A number outside its range.
    """
    return KiviStore(bits, group_size, residual)


class KiviStore:
    """Keys and values of one layer, packed; the store protocol of `refllm.model.cache`.

    Parameters
    ----------
    bits, group_size, residual : int
        As in `kivi`.

    Attributes
    ----------
    length : int
        Tokens stored; their positions are 0 .. length - 1.
    rollback : int
        How many of its own tokens a call must be able to take back, 0 unless set. What is quantised cannot come back,
        so the last `rollback` tokens of a call count as not seen yet, and what they make due is quantised when the next
        call begins. No attention sees a difference; `nbytes` is larger in between.
    """

    pre_rope = False

    def __init__(self, bits: int, group_size: int, residual: int):
        if not 1 <= bits <= 8:
            raise ValueError(f"kivi bits must be 1 to 8, got {bits}")
        if group_size < 1:
            raise ValueError(f"kivi group_size must be positive, got {group_size}")
        if residual < 1 or residual % group_size:
            raise ValueError(f"kivi residual must be a positive multiple of group_size {group_size}, got {residual}")
        self.bits, self.group_size, self.residual = bits, group_size, residual
        self.rollback = 0
        # |x| up to this: neither a minimum nor a scale, (max - min) / (2^bits - 1), leaves the range of float16.
        self._limit = _FLOAT16_MAX * min(1.0, (2**bits - 1) / 2)
        self._clear()

    def _clear(self):
        self.length = 0
        self._first = None  # shapes and types of the first call
        # Keys grow by blocks, (..., Hk, blocks, D, -), values and tokens in full by tokens, (..., Hk, tokens, -).
        self._k_packed, self._v_packed = (_Packed(self.bits, self.group_size, axis) for axis in (-3, -2))
        self._k_full, self._v_full = Growing(axis=-2), Growing(axis=-2)

    def extend(self, k, v, positions, queries=None):
        """Append T tokens; return keys and values of all S tokens as the attention of this call is to see them.

        Parameters
        ----------
        k : (..., Hk, T, D), v : (..., Hk, T, Dv) float32 or float64
            Finite, and at most 65504 (32752 with one bit).
        positions : (T,) integer
            Must go on where the store ends. Going on earlier (a call was interrupted half-way) means `truncate` first.
        queries :
            Not used.

        Returns
        -------
        K : (..., Hk, S, D), V : (..., Hk, S, Dv) new arrays of the types of k and v
        key_positions : (S,) int64

        Raises
        ------
        ValueError
            Positions that leave a gap, a head dimension that group_size does not divide, NaN, Inf, numbers too large,
            shapes or types other than those of the first call. The store is then unchanged.
        """
        self._take(k, v, positions)
        K, V = self._k_full.view.copy(), self._v_full.view.copy()
        if self._k_packed.count:
            by_token = self._k_packed.dequantized(k.dtype).swapaxes(-1, -2)  # (..., Hk, blocks, R, D)
            K = np.concatenate([by_token.reshape(*k.shape[:-2], -1, k.shape[-1]), K], axis=-2)
        if self._v_packed.count:
            V = np.concatenate([self._v_packed.dequantized(v.dtype), V], axis=-2)
        self._quantize_until(self.length - self.rollback)
        return K, V, np.arange(self.length)

    def attend(self, q, k, v, positions, *, scale, window=None, softcap=None):
        """`extend`, and attention over what it returns; of a single token from the codes, if a kernel is to be used.

        Parameters
        ----------
        q : (..., H, T, D)
            The other parameters are those of `extend` and of `refllm.kernels.attention.attend`.

        Returns
        -------
        (..., H, T, Dv)
        """
        if not self._packed_attention(q, k, v):
            K, V, key_positions = self.extend(k, v, positions, q)
            return attend(q, K, V, positions, key_positions, scale=scale, window=window, softcap=softcap)
        from refllm.kernels.packed.kv_attention import attend_packed  # imports numba

        self._take(k, v, positions)
        sides = [
            [None if part is None else part[0] for part in (*packed.parts(), full.view)]
            for packed, full in ((self._k_packed, self._k_full), (self._v_packed, self._v_full))
        ]
        start = max(0, self.length - window) if window else 0
        out = attend_packed(
            q[0, :, 0], *sides, bits=self.bits, group=self.group_size, residual=self.residual, scale=scale, start=start,
            softcap=softcap,
        )  # fmt: skip
        self._quantize_until(self.length - self.rollback)
        return out[None, :, None]

    def _packed_attention(self, q, k, v) -> bool:
        """Whether the kernel is to be used, and takes this: one float32 token, whole vectors of 16 in a group."""
        one = q.ndim == 4 and q.shape[0] == q.shape[-2] == 1 and k.shape[-1] == v.shape[-1]
        return one and q.dtype == np.float32 and self.group_size % 16 == 0 and backend() == "numba"

    @property
    def packing(self) -> tuple[int, int, int] | None:
        """The form of the codes, if the compiled step has kernels for it (model/compiled_caches.py)."""
        return None if self.group_size % 16 else (self.bits, self.group_size, self.residual)

    def go_on(self, position: int, none: np.ndarray) -> None:
        """Make ready for compiled steps from `position` on.

        Parameters
        ----------
        none : (1, Hk, 0, D) float32
            No keys, or values, of the model's shape.

        Raises
        ------
        ValueError
            As `extend`, of shapes and types.
        """
        self._check(none, none, np.arange(position, position))
        self.truncate(position)
        self._quantize_until(self.length)

    def coded_words(self, none: np.ndarray) -> list[int]:
        """What a compiled step for the next token has to know (kernels/packed/kv_attention.WORDS).

        The token counts as there already, behind the keys and values in full. `none` as above.
        """
        words, counts = [], []
        for packed, full in ((self._k_packed, self._k_full), (self._v_packed, self._v_full)):
            full.reserve(none, 1)
            words += [packed.codes.address, packed.scale.address, packed.minimum.address, full.address]
            words += [packed.codes.head_bytes, packed.scale.head_bytes, full.head_bytes]
            counts += [packed.count, full.count + 1]
        return [*words, *counts, self.residual, 0]

    @property
    def moves(self) -> int:
        """How often any of the arrays that `coded_words` gives addresses of has been another one."""
        packed = (part for side in (self._k_packed, self._v_packed) for part in (side.codes, side.scale, side.minimum))
        return sum(part.moves for part in (*packed, self._k_full, self._v_full))

    @staticmethod
    def claim_all(stores: list["KiviStore"]) -> None:
        """Count the token that a compiled step has written into every store of a cache, and code what has become due.

        Stores of one cache are alike, so the values that leave their windows are coded together.

        Raises
        ------
        ValueError
            As `extend`, of numbers. No store has the token then.
        """
        one, keys, values = stores[0], [store._k_full for store in stores], [store._v_full for store in stores]
        for name, full in (("key", keys), ("value", values)):
            one._check_numbers(name, Growing.of_all(full, full[0].count, full[0].count + 1))
        for store, key, value in zip(stores, keys, values, strict=True):
            key.count += 1
            value.count += 1
            store.length += 1
        if one.length - one._v_packed.count > one.residual:
            coded = one._v_packed.encode(split_axis(Growing.of_all(values, 0, 1), -1, one.group_size))
            packed = [store._v_packed for store in stores]
            for name, part in zip(("codes", "scale", "minimum"), coded, strict=True):
                Growing.append_all([getattr(side, name) for side in packed], part)
            for value in values:
                value.drop(1)
        if one.length % one.residual == 0:
            for store in stores:
                store._quantize_until(store.length)

    def _take(self, k, v, positions):
        """Check new tokens and put them behind the window in full."""
        self._check(k, v, positions)
        self._quantize_until(self.length)  # what `rollback` has held back
        self._k_full.append(k)
        self._v_full.append(v)
        self.length += k.shape[-2]

    def _check(self, k, v, positions):
        for name, x in (("key", k), ("value", v)):
            if x.shape[-1] % self.group_size:
                raise ValueError(f"kivi group_size {self.group_size} does not divide the {name} head_dim {x.shape[-1]}")
            self._check_numbers(name, x)
        start, layout = check_order("kivi", self.length, self._first, k, v, positions)
        self.truncate(start)
        self._first = layout

    def _check_numbers(self, name: str, x: np.ndarray) -> None:
        if not (np.abs(x) <= self._limit).all():  # NaN compares false
            raise ValueError(f"kivi stores float16 scales: {name}s must be finite and at most {self._limit:g}")

    def _quantize_until(self, length: int) -> None:
        """Quantise what is due once `length` tokens have been attended."""
        R, G = self.residual, self.group_size
        blocks = length // R - self._k_packed.count
        if blocks > 0:
            k = self._k_full.view[..., : blocks * R, :]
            by_channel = split_axis(k, -2, R).swapaxes(-1, -2)  # (..., Hk, blocks, D, R)
            self._k_packed.append(split_axis(by_channel, -1, G))
            self._k_full.drop(blocks * R)
        tokens = length - R - self._v_packed.count
        if tokens > 0:
            self._v_packed.append(split_axis(self._v_full.view[..., :tokens, :], -1, G))
            self._v_full.drop(tokens)

    def truncate(self, length: int) -> None:
        """Forget the tokens at positions >= length, leaving what a store that never saw them would hold.

        Always possible while nothing is quantised, back to 0, and by `rollback` tokens of the last call.

        Raises
        ------
        ValueError
            A token that would be back in the window has been quantised. The store is then unchanged.
        """
        if length >= self.length:
            return
        if length <= 0:
            self._clear()
            return
        R = self.residual
        if self._k_packed.count > length // R or self._v_packed.count > max(0, length - R):
            raise ValueError(
                f"kivi cannot go back from {self.length} to {length} tokens: the window of {R} tokens it would need is "
                f"quantised; set rollback = {self.length - length} on the store before the call, or start a new cache"
            )
        self._k_full.cut(length - self._k_packed.count * R)
        self._v_full.cut(length - self._v_packed.count)
        self.length = length

    def parts(self) -> dict[str, np.ndarray]:
        """Views of exactly what is stored: codes (packed by `refllm.formats.bits`), scales, minima, tokens in full.

        Returns
        -------
        dict
            k_codes (..., Hk, blocks, D, bytes of R codes) uint8, k_scale and k_min (..., Hk, blocks, D, R / G) float16,
            v_codes (..., Hk, tokens, bytes of Dv codes) uint8, v_scale and v_min (..., Hk, tokens, Dv / G) float16,
            k_full and v_full (..., Hk, tokens, D); what is empty is left out.
        """
        named = {"k_full": self._k_full, "v_full": self._v_full}
        for side, packed in (("k", self._k_packed), ("v", self._v_packed)):
            named |= {f"{side}_codes": packed.codes, f"{side}_scale": packed.scale, f"{side}_min": packed.minimum}
        return {name: grown.view for name, grown in sorted(named.items()) if grown.count}

    @property
    def nbytes(self) -> int:
        """Bytes of everything in `parts`; room kept for growth does not count."""
        return sum(part.nbytes for part in self.parts().values())


class _Packed:
    """Quantised groups, stored: codes (..., bytes), scale and minimum (..., groups), all growing along one axis."""

    def __init__(self, bits: int, group_size: int, axis: int):
        self.bits, self.group_size = bits, group_size
        self.codes, self.scale, self.minimum = (Growing(axis) for _ in range(3))

    @property
    def count(self) -> int:
        """Blocks (keys) or tokens (values) stored."""
        return self.codes.count

    def parts(self) -> tuple:
        """Codes, scales and minima; None where there are none yet."""
        return tuple(grown.view if grown.count else None for grown in (self.codes, self.scale, self.minimum))

    def append(self, groups: np.ndarray) -> None:
        """Quantise (..., groups, G) and store it."""
        for grown, part in zip((self.codes, self.scale, self.minimum), self.encode(groups), strict=True):
            grown.append(part)

    def encode(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Packed codes, scales and minima of (..., groups, G)."""
        codes, scale, minimum = quantize_groups(groups, self.bits)
        return pack_bits(codes.reshape(*codes.shape[:-2], -1), self.bits), scale, minimum

    def dequantized(self, dtype) -> np.ndarray:
        """(..., groups * G) of the given type."""
        scale, minimum = self.scale.view, self.minimum.view
        codes = unpack_bits(self.codes.view, self.bits, scale.shape[-1] * self.group_size)
        x = dequantize_groups(codes.reshape(*scale.shape, self.group_size), scale, minimum, dtype)
        return x.reshape(codes.shape)


def quantize_groups(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round each group to 2^bits even steps from its smallest to its largest element.

    Parameters
    ----------
    x : (..., G) float32 or float64, one group along the last axis
        In the range that `KiviStore.extend` allows.
    bits : int

    Returns
    -------
    codes : (..., G) uint8
    scale, minimum : (...) float16
        As stored; the codes are computed with these. minimum is at most the smallest element.

    Examples
    --------
    >>> codes, scale, minimum = quantize_groups(np.array([-1.0, 0.4, 0.6, 5.0]), bits=2)
    >>> codes.tolist(), scale.tolist(), minimum.tolist()
    ([0, 1, 1, 3], 2.0, -1.0)
    """
    lowest = x.min(axis=-1)
    minimum = lowest.astype(np.float16)
    with np.errstate(over="ignore"):  # the neighbour of -65504 is computed, not taken
        minimum = np.where(minimum > lowest, np.nextafter(minimum, np.float16(-np.inf)), minimum)
    levels = x.dtype.type(2**bits - 1)
    above = x - minimum[..., None].astype(x.dtype)
    scale = (above.max(axis=-1) / levels).astype(np.float16)
    step = np.where(scale > 0, scale, np.float16(1)).astype(x.dtype)  # one code for a constant group: 0
    codes = np.rint(np.clip(above / step[..., None], 0, levels))
    return codes.astype(np.uint8), scale, minimum


def dequantize_groups(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray, dtype=np.float32) -> np.ndarray:
    """scale * code + minimum; shapes as `quantize_groups` returns them.

    Examples
    --------
    >>> dequantize_groups(np.array([0, 3], np.uint8), np.float16(2.0), np.float16(-1.0)).tolist()
    [-1.0, 5.0]
    """
    scale, minimum = (np.asarray(a)[..., None].astype(dtype) for a in (scale, minimum))
    return codes.astype(dtype) * scale + minimum
