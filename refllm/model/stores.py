"""What the stores that give tokens up have in common: a prompt read in full, then steps, and when each is settled.

    prompt    its calls attend over all tokens so far; when it has been read, the method gives up what it does not keep
    step      every later call: it attends over what the method shows it, its own tokens among them; then the method
              gives up what has become too much

The prompt is the first call, or the first `prompt_length` tokens where that is set (`new_cache(model,
prompt_length=...)`), in calls of any length: what is stored after it, and all that follows, is the same. A later call
of several tokens (a speculative pass) is one step. Tokens never change their positions.
"""

import numpy as np


class Tokens:
    """Keys, values and positions of the tokens that are kept; grows at the end, can be cut there or thinned out.

    Attributes
    ----------
    count : int
    per_head : bool
        Whether heads hold other tokens: positions are then (..., Hk, count), else (count,).
    """

    def __init__(self):
        self.count = 0
        self.per_head = False
        self._arrays = None  # keys, values, positions, with room at the end

    @property
    def keys(self) -> np.ndarray:
        """(..., Hk, count, D), a view."""
        return self._arrays[0][..., : self.count, :]

    @property
    def values(self) -> np.ndarray:
        """(..., Hk, count, Dv), a view."""
        return self._arrays[1][..., : self.count, :]

    @property
    def positions(self) -> np.ndarray:
        """(count,), or (..., Hk, count), int32."""
        return self._arrays[2][..., : self.count]

    def append(self, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """Add (..., Hk, T, D), (..., Hk, T, Dv) and the positions (T,) that all heads share."""
        if self._arrays is None:
            self._arrays = [k[..., :0, :], v[..., :0, :], np.zeros(0, np.int32)]
        end = self.count + k.shape[-2]
        room = self._arrays[2].shape[-1]
        if end > room:
            room = max(end, 2 * room, 16)
            self._arrays = [_with_room(x, room, axis) for x, axis in zip(self._arrays, (-2, -2, -1), strict=True)]
        for array, new in zip(self._arrays[:2], (k, v), strict=True):
            array[..., self.count : end, :] = new
        self._arrays[2][..., self.count : end] = positions
        self.count = end

    def keep(self, places: np.ndarray) -> None:
        """Keep only these places, rising: (n,) in all heads, or (..., Hk, n)."""
        if places.ndim == 1:
            self._arrays = [self.keys[..., places, :], self.values[..., places, :], self.positions[..., places]]
        else:
            shape = self.keys.shape[:-1]
            at = np.take_along_axis(np.broadcast_to(self.positions, shape), places, axis=-1)
            self._arrays = [*(np.take_along_axis(x, places[..., None], -2) for x in (self.keys, self.values)), at]
            self.per_head = True
        self.count = places.shape[-1]

    def heads(self, chosen: np.ndarray) -> "Tokens":
        """The tokens of some heads, copied; of positions that all heads share."""
        part = Tokens()
        part.append(self.keys[..., chosen, :, :], self.values[..., chosen, :, :], self.positions)
        return part

    def cut(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        self.count = count

    def parts(self) -> dict[str, np.ndarray]:
        """Views of what is stored; positions only where they are not the same in all heads."""
        if not self.count:
            return {}
        parts = {"keys": self.keys, "values": self.values}
        return parts | {"positions": self.positions} if self.per_head else parts


def _with_room(x: np.ndarray, room: int, axis: int) -> np.ndarray:
    shape = list(x.shape)
    shape[axis] = room
    bigger = np.empty(shape, x.dtype)
    bigger[(..., slice(x.shape[axis]), *[slice(None)] * (-1 - axis))] = x
    return bigger


class PromptStore:
    """A store of the protocol in `refllm.model.cache`; a method says what it keeps in three places.

        _seen(q)        what this call attends over: (K, V, key_positions); everything unless it says otherwise
        _end_prompt()   the prompt has been read
        _end_step()     a step has been attended

    Attributes
    ----------
    length : int
        Tokens seen, whatever is left of them.
    new : int
        Tokens of the last call.
    prompt : int or None
        Tokens of the prompt, once it has been read.
    prompt_length : int or None
        Set before the first call where the prompt comes in several calls; None: the first call is the prompt.
    rollback : int
        Where above 0, what a call makes due is given up only when the next one begins, so that its tokens can be taken
        back. No attention sees a difference; `nbytes` is larger in between.
    """

    pre_rope = False
    name = "the store"

    def __init__(self):
        self.prompt_length = None
        self.rollback = 0
        self._clear()

    def _clear(self) -> None:
        self.length = self.new = 0
        self.prompt = None
        self.tokens = Tokens()
        self._layout = None  # shapes and types of the first call
        self._due = False  # the last call is not settled yet
        self._floor = 0  # fewer tokens than this it cannot go back to

    def _seen(self, q):
        return self.tokens.keys, self.tokens.values, self._returned(self.tokens.positions)

    def _end_prompt(self) -> None:
        pass

    def _end_step(self) -> None:
        pass

    def extend(self, k, v, positions, queries=None):
        """Take T tokens; return what this call attends over.

        Parameters
        ----------
        k : (..., Hk, T, D), v : (..., Hk, T, Dv) float32 or float64
        positions : (T,) integer
            Must go on where the store ends; going on earlier (a call was interrupted half-way) means `truncate` first.
        queries : (..., H, T, D)
            For methods that rank tokens.

        Returns
        -------
        K : (..., Hk, S, D), V : (..., Hk, S, Dv)
        key_positions : (S,), or (Hk, S), or (B, Hk, S) in a batch, int64

        Raises
        ------
        ValueError
            Positions that leave a gap, shapes or types other than those of the first call, a call that goes beyond the
            end of a prompt whose length was given.
        """
        self._take(k, v, positions)
        seen = self._seen(queries)
        self._finish()
        return seen

    def _take(self, k, v, positions) -> None:
        """Check and append the tokens of a call; what the last one has left undone is done before."""
        start, count = (int(positions[0]) if len(positions) else self.length), k.shape[-2]
        if start > self.length or not np.array_equal(positions, np.arange(start, start + count)):
            raise ValueError(f"{self.name}: positions must go on from {self.length}, got {np.asarray(positions)}")
        layout = [(x.shape[:-2], x.shape[-1], x.dtype.name) for x in (k, v)]
        if start > 0 and layout != self._layout:
            raise ValueError(f"keys and values must stay as in the first call, {self._layout}, got {layout}")
        self.truncate(start)
        self._settle()
        end = self.prompt_length
        if self.prompt is None and end is not None and start < end < start + count:
            raise ValueError(
                f"{self.name}: the prompt ends after {end} tokens, but a call goes from {start} to {start + count}; "
                "split it there"
            )
        self._layout = layout
        self._append(k, v, positions)
        self.new, self.length = count, start + count

    def _append(self, k, v, positions) -> None:
        self.tokens.append(k, v, positions)

    def _finish(self) -> None:
        self._due = True
        if not self.rollback:
            self._settle()

    def _settle(self) -> None:
        if not self._due:
            return
        self._due = False
        if self.prompt is not None:
            self._end_step()
        elif self.prompt_length is None or self.length >= self.prompt_length:
            self.prompt = self.length
            self._end_prompt()

    def _give_up(self, places: np.ndarray) -> None:
        """Keep these places of the tokens only; there is no way back behind the tokens seen so far."""
        if places.shape[-1] < self.tokens.count:
            self.tokens.keep(places)
            self._floor = self.length

    def truncate(self, length: int) -> None:
        """Forget the tokens at positions >= length; they are the last that came.

        Raises
        ------
        ValueError
            What was given up depended on them, so it would have to come back. The store is then unchanged.
        """
        if length >= self.length:
            return
        if length <= 0:
            self._clear()
            return
        if length < self._floor:
            raise ValueError(
                f"{self.name} cannot go back from {self.length} to {length} tokens: what it has given up does not come "
                f"back; set rollback = {self.length - length} on the store before the call, or start a new cache"
            )
        self._cut(self.length - length)
        self.length = length
        if self.prompt is not None:
            self.prompt = min(self.prompt, length)

    def _cut(self, count: int) -> None:
        """Forget the last `count` tokens."""
        self.tokens.cut(self.tokens.count - count)

    def parts(self) -> dict[str, np.ndarray]:
        """Views of exactly what is stored, by name."""
        return self.tokens.parts()

    @property
    def nbytes(self) -> int:
        """Bytes of everything in `parts`; room kept for growth does not count."""
        return sum(part.nbytes for part in self.parts().values())

    @staticmethod
    def _returned(positions: np.ndarray) -> np.ndarray:
        """Positions as the protocol wants them: a batch of one has none of its own."""
        return (positions[0] if positions.ndim == 3 and len(positions) == 1 else positions).astype(np.int64)


def amount(wanted: int | float, of: int) -> int:
    """A budget in tokens: an int counts them, a float is a share of the prompt, rounded down.

    Examples
    --------
    >>> amount(64, 1000), amount(0.25, 1001)
    (64, 250)
    """
    return int(wanted * of) if isinstance(wanted, float) else wanted


def check_amounts(method: str, **amounts: int | float) -> None:
    """Raise a ValueError for a budget that is no number from 0 on."""
    for name, value in amounts.items():
        if not value >= 0 or value == float("inf"):
            raise ValueError(f"{method} {name} must be tokens (an int) or a share of the prompt (a float), got {value}")


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` highest scores along the last axis, rising; the first of equals wins.

    Parameters
    ----------
    scores : (..., n)
    count : int
        All of them where it is above n.

    Returns
    -------
    (..., min(count, n)) int64

    Examples
    --------
    >>> highest(np.array([3.0, 5.0, 3.0, 3.0]), 2).tolist()
    [0, 1]
    """
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.sort(order[..., :count], axis=-1)
