"""minicache: neighbouring layers of the deeper half share one direction a token, each keeping its own length.

Layers l - 1 and l = first, first + 2, ... form pairs; keys and values of a pair, token by token and head by head:

    m = ||x||      e = x / m      Omega = angle between e_(l-1) and e_l
    e = sin((1 - t) Omega) / sin(Omega) e_(l-1) + sin(t Omega) / sin(Omega) e_l          the direction both share
    x^_l = m_l e   x^_(l-1) = m_(l-1) e                                                  what is read
    delta = Omega / pi; tokens with delta >= max - gamma (max - min) keep both originals

A call attends over what was merged before it and over everything else in full; behind the attention of the deeper layer
whole blocks of tokens that both layers have seen are merged. What is stored after S tokens is the same however they
came in. Where the angle is almost 0 or almost pi, e is the straight mean (1 - t) e_(l-1) + t e_l, brought to length 1;
of opposite directions with t = 1/2 the deeper layer's is taken.

Paper: Liu et al. 2024, "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models",
arXiv:2405.14366, section 4.
Differs from it: the paper merges a whole prompt and then token by token; here blocks are merged, and the range of
delta is that of a block, so that chunks of a prompt change nothing; the newest tokens, less than a block, stay in full.
Directions keep the type they come in.
Stage: memory, decode
Inventory: 43
Lesson: lessons/19-five-dimensions.md
Golden: kvcache/minicache
Baseline: none, the only method of the layer dimension
"""

import numpy as np

RULES = ("threshold", "top")
STRAIGHT = 1e-6  # sines below this do not divide


def minicache(
    layer: int, *, first: int | None = None, t: float = 0.6, gamma: float = 0.05, rule: str = "threshold",
    block: int = 64,
) -> "MiniStore":  # fmt: skip
    """The store of one layer: `new_cache(model, policy=minicache)`.

    Parameters
    ----------
    layer : int
    first : int, optional
        The deeper layer of the first pair, 1 at least. None: half of the layers.
    t : float
        0 to 1: weight of the deeper layer.
    gamma : float
        0 to 1: how much of the range of distances keeps its originals (threshold), or what part of the tokens (top,
        rounded up). 1 loses nothing.
    rule : str
        threshold or top.
    block : int
        Tokens that are merged together.

    Returns
    -------
    MiniStore

    Raises
    ------
    ValueError
        A number outside its range.
    """
    if not (0 <= t <= 1 and 0 <= gamma <= 1):
        raise ValueError(f"minicache t and gamma must lie between 0 and 1, got {t} and {gamma}")
    if block < 1 or (first is not None and first < 1):
        raise ValueError(f"minicache block and first must be 1 or more, got {block} and {first}")
    if rule not in RULES:
        raise ValueError(f"minicache rule must be one of {', '.join(RULES)}, got {rule!r}")
    return MiniStore(layer, first, t, gamma, rule, block)


class MiniStore:
    """Keys and values of one layer, merged with a neighbour's; the store protocol of `refllm.model.cache`.

    Parameters
    ----------
    layer, first, t, gamma, rule, block :
        As in `minicache`.

    Attributes
    ----------
    length : int
        Tokens stored; their positions are 0 .. length - 1.
    rollback : int
        How many of its own tokens a call must be able to take back, 0 unless set: they count as not seen yet, and what
        they make due is merged when the next call begins.
    """

    pre_rope = False

    def __init__(self, layer: int, first: int | None, t: float, gamma: float, rule: str, block: int):
        self.layer, self.first, self.t, self.gamma, self.rule, self.block = layer, first, t, gamma, rule, block
        self.rollback, self.length = 0, 0
        self.pair: tuple[MiniStore, MiniStore] | None = None
        self._tails: list = [None, None]  # keys and values not yet merged, (..., Hk, tokens, D)
        self.merged: list = [None, None]  # of keys and values, in the deeper layer's store only

    def join(self, stores: list) -> None:
        """Find the layer this one is merged with; called once by the cache, with the stores of all layers."""
        first = max(1, len(stores) // 2) if self.first is None else self.first
        deeper = self.layer if (self.layer - first) % 2 == 0 else self.layer + 1
        if first <= deeper < len(stores):
            self.pair = stores[deeper - 1], stores[deeper]

    def extend(self, k, v, positions, queries=None):
        """Append T tokens; return keys and values of all S tokens as the attention of this call is to see them.

        Parameters
        ----------
        k : (..., Hk, T, D), v : (..., Hk, T, Dv) float32 or float64
        positions : (T,) integer
            Must go on where the store ends; going on earlier (a call was interrupted half-way) means `truncate` first.
        queries :
            Not used.

        Returns
        -------
        K, V : new arrays, (..., Hk, S, D) and (..., Hk, S, Dv)
        key_positions : (S,) int64

        Raises
        ------
        ValueError
            Positions that leave a gap, or two layers of a pair with different shapes.
        """
        start = int(positions[0])
        if start > self.length or not np.array_equal(positions, np.arange(start, start + k.shape[-2])):
            raise ValueError(f"minicache keeps every token: positions must go on from {self.length}, got {positions}")
        self.truncate(start)
        if self._is_deeper(False):
            _merge_due(*self.pair, self.length)  # what `rollback` has held back
        for side, x in enumerate((k, v)):
            tail = self._tails[side]
            self._tails[side] = x.copy() if tail is None else np.concatenate([tail, x], axis=-2)
        self.length += k.shape[-2]
        K, V = (self._read(side) for side in (0, 1))
        if self._is_deeper(True):
            _merge_due(*self.pair, self.length - max(store.rollback for store in self.pair))
        return K, V, np.arange(self.length)

    def _is_deeper(self, which: bool) -> bool:
        return self.pair is not None and self.pair[which] is self

    def _read(self, side: int) -> np.ndarray:
        tail = self._tails[side]
        merged = None if self.pair is None else self.pair[1].merged[side]
        if merged is None:
            return tail.copy()
        return np.concatenate([merged.restored(int(self._is_deeper(True))), tail], axis=-2)

    def _merged_tokens(self) -> int:
        merged = None if self.pair is None else self.pair[1].merged[0]
        return 0 if merged is None else merged.tokens

    def truncate(self, length: int) -> None:
        """Forget the tokens at positions >= length.

        Always possible for tokens that are not merged, back to 0, and by `rollback` tokens of the last call.

        Raises
        ------
        ValueError
            A merged token would have to come back. The store is then unchanged.
        """
        if length >= self.length:
            return
        if length <= 0:
            self.length, self._tails, self.merged = 0, [None, None], [None, None]
            if self.pair is not None:
                self.pair[1].merged = [None, None]
            return
        merged = self._merged_tokens()
        if length < merged:
            raise ValueError(
                f"minicache cannot go back from {self.length} to {length} tokens: {merged} are merged; set rollback = "
                f"{self.length - length} on the stores before the call, or start a new cache"
            )
        self._tails = [tail[..., : length - merged, :] for tail in self._tails]
        self.length = length

    def parts(self) -> dict[str, np.ndarray]:
        """Exactly what is stored: tails in full, and in the deeper layer's store what the pair shares.

        Returns
        -------
        dict
            k_tail and v_tail (..., Hk, tokens, D); k_direction, v_direction (..., Hk, tokens, D); k_length, v_length
            (2, ..., Hk, tokens), the shallower layer first; k_kept, v_kept (2, count, D), the originals; k_place,
            v_place (count,) int32, their flat places in (..., Hk, tokens). What is empty is left out.
        """
        named = {}
        for side, tail, merged in zip("kv", self._tails, self.merged, strict=True):
            if tail is not None and tail.shape[-2]:
                named[f"{side}_tail"] = tail
            if merged is not None:
                named |= {f"{side}_{name}": array for name, array in merged.arrays().items() if array.size}
        return named

    @property
    def nbytes(self) -> int:
        """Bytes of everything in `parts`."""
        return sum(part.nbytes for part in self.parts().values())


def _merge_due(shallow: MiniStore, deep: MiniStore, length: int) -> None:
    """Merge whole blocks among the first `length` tokens, which both layers have seen."""
    block = deep.block
    for a, b in zip(shallow._tails, deep._tails, strict=True):  # said at the first call, not when a block is full
        if a is not None and b is not None and (a.shape[:-2], a.shape[-1]) != (b.shape[:-2], b.shape[-1]):
            raise ValueError(
                f"minicache merges layers of one shape, got {a.shape} and {b.shape} (after palu: use search=uniform)"
            )
    for _ in range((min(length, shallow.length, deep.length) - deep._merged_tokens()) // block):
        for side in (0, 1):
            a, b = shallow._tails[side], deep._tails[side]
            new = merge(a[..., :block, :], b[..., :block, :], deep.t, deep.gamma, deep.rule)
            before = deep.merged[side]
            deep.merged[side] = new if before is None else before.followed_by(new)
            shallow._tails[side], deep._tails[side] = a[..., block:, :].copy(), b[..., block:, :].copy()


class Merged:
    """Tokens of two layers: a shared direction (..., tokens, D), two lengths (2, ..., tokens), and kept originals.

    Parameters
    ----------
    direction, length : arrays
    keep : (..., tokens) bool
    originals : (2, count, D)
        In the order of the places of `keep` as it lies in memory.
    """

    def __init__(self, direction: np.ndarray, length: np.ndarray, keep: np.ndarray, originals: np.ndarray):
        self.direction, self.length, self.keep, self.originals = direction, length, keep, originals

    @property
    def tokens(self) -> int:
        """Merged tokens."""
        return self.direction.shape[-2]

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored; places instead of a mask."""
        place = np.flatnonzero(self.keep).astype(np.int32)
        return {"direction": self.direction, "length": self.length, "kept": self.originals, "place": place}

    def restored(self, which: int) -> np.ndarray:
        """Keys or values (..., tokens, D) of the shallower (0) or the deeper layer (1)."""
        x = self.length[which][..., None] * self.direction
        x[self.keep] = self.originals[which]
        return x

    def followed_by(self, new: "Merged") -> "Merged":
        """These tokens and, behind them, others of the same heads."""
        keep = np.concatenate([self.keep, new.keep], axis=-1)
        originals = np.empty((2, np.count_nonzero(keep), self.direction.shape[-1]), self.direction.dtype)
        old = np.arange(keep.shape[-1])[np.nonzero(keep)[-1]] < self.tokens  # which of the kept ones were there
        originals[:, old], originals[:, ~old] = self.originals, new.originals
        return Merged(
            np.concatenate([self.direction, new.direction], axis=-2),
            np.concatenate([self.length, new.length], axis=-1),
            keep,
            originals,
        )


def merge(a: np.ndarray, b: np.ndarray, t: float = 0.6, gamma: float = 0.05, rule: str = "threshold") -> Merged:
    """Merge keys (or values) of a shallower and a deeper layer.

    Parameters
    ----------
    a, b : (..., tokens, D) float32 or float64
        Of the shallower and the deeper layer. The tokens of a head are compared with each other for `rule`.
    t, gamma, rule :
        As in `minicache`.

    Returns
    -------
    Merged

    Examples
    --------
    >>> both = merge(np.array([[3.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 4.0], [2.0, 0.0]]), t=0.5, gamma=0.0)
    >>> both.keep.tolist(), both.direction.round(3).tolist(), both.length.tolist()
    ([True, False], [[0.707, 0.707], [1.0, 0.0]], [[3.0, 1.0], [4.0, 2.0]])
    """
    x = np.stack([a, b]).astype(np.float64)
    length = np.sqrt(np.sum(x * x, axis=-1))
    unit = x / np.where(length > 0, length, 1)[..., None]
    omega = np.arccos(np.clip(np.sum(unit[0] * unit[1], axis=-1), -1, 1))
    sine = np.sin(omega)
    bent = sine >= STRAIGHT
    divisor = np.where(bent, sine, 1)
    of_a = np.where(bent, np.sin((1 - t) * omega) / divisor, 1 - t)[..., None]
    of_b = np.where(bent, np.sin(t * omega) / divisor, t)[..., None]
    direction = of_a * unit[0] + of_b * unit[1]
    norm = np.sqrt(np.sum(direction * direction, axis=-1, keepdims=True))
    opposite = norm < STRAIGHT  # or both zero
    direction = np.where(opposite, unit[1], direction / np.where(opposite, 1, norm))
    keep = kept(omega / np.pi, gamma, rule)
    dtype = a.dtype
    return Merged(direction.astype(dtype), length.astype(dtype), keep, np.stack([a[keep], b[keep]]))


def kept(delta: np.ndarray, gamma: float, rule: str) -> np.ndarray:
    """Which tokens keep their originals: the most distant ones.

    Parameters
    ----------
    delta : (..., tokens)
        Distances 0 to 1.

    Returns
    -------
    (..., tokens) bool

    Examples
    --------
    >>> kept(np.array([0.1, 0.5, 0.3, 0.5]), 0.25, "threshold").tolist()
    [False, True, False, True]
    >>> kept(np.array([0.1, 0.5, 0.3, 0.5]), 0.25, "top").tolist()
    [False, True, False, False]
    """
    if rule == "threshold":
        high, low = delta.max(axis=-1, keepdims=True), delta.min(axis=-1, keepdims=True)
        return delta >= high - gamma * (high - low) if gamma < 1 else np.ones(delta.shape, bool)
    keep = np.zeros(delta.shape, bool)
    count = int(np.ceil(gamma * delta.shape[-1] - 1e-9))
    np.put_along_axis(keep, np.argsort(-delta, axis=-1, kind="stable")[..., :count], True, axis=-1)
    return keep
