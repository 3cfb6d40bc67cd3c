"""The key-value cache, with a slot for every method that shrinks it.

A cache is one *store* per layer. A store is any object with

    extend(k, v, positions, queries) -> (K, V, key_positions)   take new tokens, return what this call attends over
    truncate(length)                                            forget every token at position >= length
    nbytes                                                      bytes of everything it keeps
    pre_rope                                                    True: keys come unrotated, the caller rotates the result
    join(stores)                                                optional: called once, with the stores of all layers,
                                                                for those that share what they keep
    rollback                                                    optional: tokens of its own that a call may take back
    prompt_length                                               optional: tokens of a prompt that comes in several calls
    endless                                                     optional: True if it needs no positions beyond its size
    device_nbytes                                               optional: nbytes without what it keeps in host memory
    attend(q, k, v, positions, scale, window, softcap)          optional: extend, and attention over what it returns,
                                                                in the store's own way (from packed codes, say)

with k, v : (B, Hk, T, D), positions : (T,), queries : (B, H, T, D), K, V : (B, Hk, S, D), key_positions : (S,),
(Hk, S) or (B, Hk, S). `policy(layer) -> store` is the seam of the KV methods. Positions are explicit, so a store that
evicts or merges tokens moves nothing else; `refllm.model.stores` has what such stores share. Layers extend their stores
in their order. Lesson: lessons/02-prefill-decode-cache.md.
"""

from collections.abc import Callable
from math import inf

import numpy as np


class DenseStore:
    """Keeps every key and value as they come, in arrays that double when full.

    Parameters
    ----------
    dtype : numpy dtype, optional
        Stored type; None keeps the type of the first keys. float16 halves the cache; keys and values return widened.
    """

    pre_rope = False

    def __init__(self, dtype=None):
        self.dtype = dtype
        self.length = 0
        self.keys = self.values = self._positions = None

    def extend(self, k, v, positions, queries=None):
        """Append T tokens; return views of all S = length tokens. See the module docstring for shapes."""
        self.truncate(positions[0])  # nothing to forget, unless an earlier call was interrupted half-way
        end = self.length + k.shape[-2]
        K, V = (x[..., :end, :] for x in self.reserve(end, k, v))
        K[..., self.length :, :] = k
        V[..., self.length :, :] = v
        self._positions[self.length : end] = positions
        self.length = end
        return K.astype(k.dtype, copy=False), V.astype(v.dtype, copy=False), self._positions[:end]

    def reserve(self, count, k, v):
        """The arrays of keys and values (B, Hk, room, D), with room for `count` tokens of the kind of k and v."""
        if self.keys is None:
            self.keys, self.values = (np.empty((*x.shape[:-2], 0, x.shape[-1]), self.dtype or x.dtype) for x in (k, v))
            self._positions = np.empty(0, np.int64)
        if count > self.keys.shape[-2]:
            room = max(count, 2 * self.keys.shape[-2], 16)
            self.keys, self.values = (_grown(x, room, axis=-2) for x in (self.keys, self.values))
            self._positions = _grown(self._positions, room, axis=0)
        return self.keys, self.values

    def claim(self, start, count):
        """Tokens at the positions start .. start + count - 1 have been written to those places; nothing is behind."""
        if count == 1:  # in thirty layers, each token
            self._positions[start] = start
        else:
            self._positions[start : start + count] = np.arange(start, start + count)
        self.length = start + count

    def truncate(self, length):
        """Forget the tokens at positions >= length (a rejected draft); positions are appended in order."""
        if self.length and self._positions[self.length - 1] >= length:
            self.length = int(np.searchsorted(self._positions[: self.length], length))

    @property
    def nbytes(self):
        """Bytes of the stored keys and values; room kept for growth does not count."""
        if self.keys is None:
            return 0
        return self.keys[..., : self.length, :].nbytes + self.values[..., : self.length, :].nbytes


def _grown(x: np.ndarray, room: int, axis: int) -> np.ndarray:
    shape = list(x.shape)
    shape[axis] = room
    bigger = np.empty(shape, x.dtype)
    bigger[(Ellipsis, slice(x.shape[axis]), slice(None)) if axis == -2 else slice(x.shape[0])] = x
    return bigger


class KVCache:
    """One store per layer and the number of tokens seen.

    Parameters
    ----------
    num_layers : int
    context_length : int
        Positions the model was made for; the forward pass refuses to go beyond, unless all stores are endless.
    policy : callable, optional
        `policy(layer) -> store`; None keeps everything (`DenseStore`).

    Attributes
    ----------
    length : int
        Tokens seen so far = position of the next token, whatever the stores have kept of them.
    batch : int or None
        Sequences side by side, fixed by the first call.
    stores : list
    compiled : optional
        What refllm.model.compiled has prepared for this cache.
    """

    def __init__(self, num_layers: int, context_length: int, policy: Callable | None = None):
        self.stores = [DenseStore() if policy is None else policy(layer) for layer in range(num_layers)]
        self.context_length = inf if all(getattr(s, "endless", False) for s in self.stores) else context_length
        for store in self.stores:
            if hasattr(store, "join"):
                store.join(self.stores)
        self.length = 0
        self.batch = None
        self.compiled = None

    def check_batch(self, batch: int) -> None:
        """Fix the batch size at the first call; raise a ValueError where a later one brings another."""
        if self.batch not in (None, batch):
            raise ValueError(f"the cache holds a batch of {self.batch}, got {batch}: use a new cache for another batch")
        self.batch = batch

    @property
    def nbytes(self) -> int:
        """Bytes that all layers store now."""
        return sum(store.nbytes for store in self.stores)

    @property
    def device_nbytes(self) -> int:
        """Bytes of that which lie where attention is computed: less than `nbytes` where a store uses host memory."""
        return sum(getattr(store, "device_nbytes", store.nbytes) for store in self.stores)

    def truncate(self, length: int) -> None:
        """Roll back to the first `length` tokens.

        Raises
        ------
        ValueError
            A length above the tokens seen, or a store that cannot bring back what it has given up.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll the cache back to {length} tokens: it has seen {self.length}")
        for store in self.stores:
            store.truncate(length)
        self.length = length


def new_cache(model, policy: Callable | None = None, *, prompt_length: int | None = None) -> KVCache:
    """An empty cache for `forward(model, ids, cache=...)`.

    Parameters
    ----------
    model : Model
    policy : callable, optional
        `policy(layer) -> store`. None takes the model's own (`kivi` in its recipe, say), else the dense cache.
    prompt_length : int, optional
        For stores that compress a prompt once it has been read: how long it is, where it comes in several calls. None:
        the first call is the prompt.

    Returns
    -------
    KVCache
    """
    config = model.config
    cache = KVCache(config.num_layers, config.context_length, policy or model.runtime.cache_policy)
    for store in cache.stores:
        if hasattr(store, "prompt_length"):
            store.prompt_length = prompt_length
    return cache
