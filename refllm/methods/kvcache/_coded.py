"""What the stores that code every token by itself have in common; a method says how one side is coded and decoded.

A token's keys and values are coded as soon as it is neither one of the first `sinks` tokens nor one of the last
`recent`, which are kept as they come. A call attends over what was coded before it and over its own tokens in full;
with `rounds_own` it sees its own tokens coded, too. Since no token's codes depend on another token, what is stored
after S tokens is the same however they came in, and codes can be dropped again at the end.

`Growing` and `split_axis` serve stores that code tokens in blocks as well (kivi).
"""

import numpy as np


class CodedStore:
    """A store of the protocol in `refllm.model.cache`.

    A method has `_encode(side, x)`, which gives a dict of arrays (..., tokens, n), and `_decode(side, arrays, dtype)`,
    which gives (..., Hk, tokens, D) of them; `side` is "k" or "v". What tokens have different numbers of comes token by
    token in arrays of one axis, behind an array of the others, and `_end` says where a token's numbers end.

    Parameters
    ----------
    recent : int
        Last tokens that are kept in full.
    sinks : int
        First tokens that are kept in full.

    Attributes
    ----------
    length : int
        Tokens stored; their positions are 0 .. length - 1.
    rollback : int
        Last tokens of a call that must be able to come back although `recent` is above 0: they count as not seen yet
        until the next call begins. No attention sees a difference.
    """

    pre_rope = False
    rounds_own = False
    name = "the store"
    limit = 65504.0  # of float16, in which scales are stored

    def __init__(self, recent: int = 0, sinks: int = 0):
        if recent < 0 or sinks < 0:
            raise ValueError(f"{self.name} keeps 0 or more tokens in full, got recent {recent}, sinks {sinks}")
        self.recent, self.sinks, self.rollback = recent, sinks, 0
        self._clear()

    def _clear(self) -> None:
        self.length = 0
        self._first = None  # shapes and types of the first call
        self._codes = {"k": {}, "v": {}}
        self._sinks, self._full = ({side: Growing(-2) for side in "kv"} for _ in range(2))

    @property
    def coded(self) -> int:
        """Tokens in codes."""
        return next((grown.count for grown in self._codes["k"].values()), 0)

    def _width(self, side: str) -> int:
        """D of one side."""
        return self._first["kv".index(side)][1]

    def extend(self, k, v, positions, queries=None):
        """Append T tokens; return keys and values of all S tokens as the attention of this call is to see them.

        Parameters
        ----------
        k : (..., Hk, T, D), v : (..., Hk, T, Dv) float32 or float64
            Finite, of magnitudes up to `limit`.
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
            Positions that leave a gap, NaN, Inf, numbers too large, shapes or types other than those of the first
            call, a width the codes cannot take. The store is then unchanged.
        """
        self._take(k, v, positions)
        if self.rounds_own and not self.rollback:
            self._settle(self.length - self.recent)
        K, V = self._seen("k", k.dtype), self._seen("v", v.dtype)
        self._settle(self.length - self.recent - self.rollback)
        return K, V, np.arange(self.length)

    def _take(self, k, v, positions) -> None:
        """Check new tokens and put them behind those in full."""
        for side, x in (("key", k), ("value", v)):
            if not (np.abs(x) <= self.limit).all():  # NaN compares false
                raise ValueError(f"{self.name} stores float16: {side}s must be finite and at most {self.limit:g}")
            self._check_width(side, x.shape)
        start, layout = check_order(self.name, self.length, self._first, k, v, positions)
        self.truncate(start)
        self._settle(self.length - self.recent)  # what `rollback` has held back
        self._first = layout
        for side, x in (("k", k), ("v", v)):
            full, sinks = self._full[side], self._sinks[side]
            full.append(x)
            if sinks.count < self.sinks:
                first = full.view[..., : self.sinks - sinks.count, :]
                sinks.append(first)
                full.drop(first.shape[-2])
        self.length += k.shape[-2]

    def _check_width(self, side: str, shape: tuple[int, ...]) -> None:
        """Raise a ValueError for a (..., Hk, T, D) that cannot be coded."""

    def _end(self, side: str, name: str, tokens: int) -> int:
        """Where the first `tokens` coded ones end along the axis that an array of codes grows on."""
        return tokens

    def _due(self, until: int) -> int:
        """Tokens in full that are to be coded, of those before `until`."""
        return max(0, until - self._sinks["k"].count - self.coded)

    def _settle(self, until: int) -> None:
        """Code the tokens before `until`."""
        due = self._due(until)
        if not due:
            return
        for side in "kv":
            full = self._full[side]
            for name, array in self._encode(side, full.view[..., :due, :]).items():
                self._codes[side].setdefault(name, Growing(-min(array.ndim, 2))).append(array)
            full.drop(due)

    def _seen(self, side: str, dtype) -> np.ndarray:
        """All tokens of one side as attention sees them, a new array."""
        seen = [self._sinks[side].view] if self._sinks[side].count else []
        if self.coded:
            stored = {name: grown.view for name, grown in self._codes[side].items()}
            seen.append(self._decode(side, stored, dtype))
        full = self._full[side].view
        due = self._due(self.length - self.recent) if self.rounds_own else 0
        if due:  # these will be coded when the next call begins
            seen.append(self._decode(side, self._encode(side, full[..., :due, :]), dtype))
        return np.concatenate([*seen, full[..., due:, :]], axis=-2)

    def truncate(self, length: int) -> None:
        """Forget the tokens at positions >= length, leaving what a store that never saw them would hold.

        Always possible where `recent` is 0, by tokens that are all in full, by `rollback` of the last call, and to 0.

        Raises
        ------
        ValueError
            A token that would be back among the recent ones is in codes. The store is then unchanged.
        """
        if length >= self.length:
            return
        if length <= 0:
            self._clear()
            return
        sinks = self._sinks["k"].count
        if self.recent and length > sinks and self.coded > max(0, length - self.recent - sinks):
            raise ValueError(
                f"{self.name} cannot go back from {self.length} to {length} tokens: of the {self.recent} it would have "
                f"to keep in full some are coded; set rollback = {self.length - length} on the store before the call, "
                "or start a new cache"
            )
        settled = sinks + self.coded
        for side in "kv":
            self._sinks[side].cut(length)
            for name, grown in self._codes[side].items():
                grown.cut(self._end(side, name, max(0, length - sinks)))
            self._full[side].cut(max(0, length - settled))
        self.length = length

    def parts(self) -> dict[str, np.ndarray]:
        """Views of exactly what is stored: the arrays of codes with k_ or v_ in front, k_sinks, k_full and so on."""
        named = {}
        for side in "kv":
            named |= {f"{side}_{name}": grown for name, grown in self._codes[side].items()}
            named |= {f"{side}_sinks": self._sinks[side], f"{side}_full": self._full[side]}
        return {name: grown.view for name, grown in sorted(named.items()) if grown.count}

    @property
    def nbytes(self) -> int:
        """Bytes of everything in `parts`; room kept for growth does not count."""
        return sum(part.nbytes for part in self.parts().values())


def check_order(name: str, length: int, first, k, v, positions) -> tuple[int, list]:
    """Where new tokens go on, and their layout, to be compared with that of later calls.

    Parameters
    ----------
    name : str
        Of the method.
    length : int
        Tokens that are stored.
    first : list or None
        Layout of the first call.
    k, v, positions :
        As handed to `extend`.

    Raises
    ------
    ValueError
        A gap, another layout.
    """
    start = positions[0] if len(positions) else length
    if start > length or not np.array_equal(positions, np.arange(start, start + k.shape[-2])):
        raise ValueError(f"{name} keeps every token: positions must go on from {length}, got {positions}")
    layout = [(x.shape[:-2], x.shape[-1], x.dtype.name) for x in (k, v)]
    if start > 0 and layout != first:
        raise ValueError(f"keys and values must stay as in the first call, {first}, got {layout}")
    return start, layout


class Growing:
    """An array that grows at the end of one axis and is dropped from its front; appending costs amortised O(new)."""

    def __init__(self, axis: int):
        self.axis = axis
        self.count = 0
        self.moves = 0  # how often the array has been another one
        self._start = 0
        self._buffer = None

    def _part(self, start: int, stop: int) -> np.ndarray:
        return self._buffer[(..., slice(start, stop), *[slice(None)] * (-1 - self.axis))]

    @property
    def view(self) -> np.ndarray:
        """The tokens held, without a copy."""
        return self._part(self._start, self._start + self.count)

    def append(self, x: np.ndarray) -> None:
        """Add tokens at the end of the axis."""
        new = x.shape[self.axis]
        self.reserve(x, new)
        end = self._start + self.count
        self._part(end, end + new)[...] = x
        self.count += new

    def reserve(self, like: np.ndarray, new: int) -> None:
        """Room for so many more, of the shape and type of an array but for this axis."""
        if self._buffer is None:
            self._buffer = np.empty(like.shape, like.dtype)
            self._where = self._buffer.ctypes.data
            self.moves += 1
        if self._lacks(new):
            self._move(max(2 * self.count, self.count + new, 16))

    def _lacks(self, new: int) -> bool:
        return self._buffer is None or self._start + self.count + new > self._buffer.shape[self.axis]

    @property
    def address(self) -> int:
        """Where the first one is, of the first head of one sequence; 0 before anything has come."""
        return 0 if self._buffer is None else self._where + self._start * self._buffer.strides[self.axis]

    @property
    def head_bytes(self) -> int:
        """How far the next head is."""
        return 0 if self._buffer is None else self._buffer.strides[1]

    def drop(self, n: int) -> None:
        """Forget the first n."""
        self._start += n
        self.count -= n
        if 4 * max(self.count, 16) < self._buffer.shape[self.axis]:  # a prompt has passed through: give its room back
            self._move(2 * max(self.count, 16))

    def cut(self, count: int) -> None:
        """Forget all but the first `count`."""
        self.count = min(self.count, count)

    def _move(self, room: int) -> None:
        shape = list(self._buffer.shape)
        shape[self.axis] = room
        self._move_to(np.empty(shape, self._buffer.dtype))

    def _move_to(self, buffer: np.ndarray) -> None:
        """What lies behind the last one comes along: a step writes there before anybody counts it."""
        kept = min(self._buffer.shape[self.axis] - self._start, buffer.shape[self.axis])
        old = self._part(self._start, self._start + kept)
        self._buffer, self._start = buffer, 0
        self._where = buffer.ctypes.data
        self.moves += 1
        self._part(0, kept)[...] = old

    @staticmethod
    def of_all(arrays: list["Growing"], begin: int, end: int) -> np.ndarray:
        """Items begin <= i < end of arrays that are alike (one of each layer), (arrays, ...), without a copy.

        For that they lie in one array; whoever grows alone has left it, and then all are brought back.
        """
        one = arrays[0]
        whole = one._buffer.base
        if whole is None or any(array._buffer.base is not whole for array in arrays):
            whole = np.empty((len(arrays), *one._buffer.shape), one._buffer.dtype)
            for array, mine in zip(arrays, whole, strict=True):
                array._move_to(mine)
        begin, end = one._start + begin, one._start + end
        return whole[(..., slice(begin, end), *[slice(None)] * (-1 - one.axis))]

    @staticmethod
    def append_all(arrays: list["Growing"], x: np.ndarray) -> None:
        """`append` x[i] to each of arrays that are alike."""
        one, new = arrays[0], x.shape[arrays[0].axis]
        for array, mine in zip(arrays, x, strict=True) if one._lacks(new) else ():
            array.reserve(mine, new)
        Growing.of_all(arrays, one.count, one.count + new)[...] = x
        for array in arrays:
            array.count += new


def split_axis(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Axis (counted from the end) of length n * size -> two axes n, size."""
    axis += x.ndim
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
