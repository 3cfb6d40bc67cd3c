"""How the compiled forward pass reaches the keys and values of a cache: as they are, or in codes.

A store of the first kind is a DenseStore; one of the second has `packing`, the form of its codes, and the methods that
`CodedCache` calls (methods/kvcache/kivi). Both kinds here put addresses into the records of the layers
(kernels/packed/plan.py) before a step, and count its tokens after it.
"""

import numpy as np

from refllm.model.cache import DenseStore, KVCache
from refllm.model.config import ModelConfig


def cache_kind(cache: KVCache):
    """DenseCache or CodedCache, or None for other stores, and for several kinds in one cache."""
    stores = cache.stores
    if all(type(store) is DenseStore and store.dtype in (None, np.float32) for store in stores):
        return DenseCache
    forms = {getattr(store, "packing", None) for store in stores}
    return CodedCache if len(forms) == 1 and None not in forms else None


class DenseCache:
    """Keys and values in float32 arrays, which all stores fill alike: the first one tells for all."""

    side = 0  # groups of codes side by side

    def __init__(self, stores: list, config: ModelConfig):
        self.stores = stores
        self._none = np.empty((1, config.num_kv_heads, 0, config.head_dim), np.float32)
        self._known, self.room = None, 0  # the first store's keys, and for how many tokens there is room

    def takes(self, tokens: int) -> bool:
        """Whether so many tokens at once can be attended now."""
        return True

    def kernels(self, table: np.ndarray, together: set[int]) -> None:
        """Put the kernels of attention into a table, for so many heads together."""
        from refllm.kernels.packed.token_attention import attend_address

        for n in together:
            table[n] = attend_address(n)

    def prepare(self, layers: np.ndarray, position: int, tokens: int) -> None:
        """Room for the next tokens in every store, and the addresses of arrays that have moved."""
        end = position + tokens
        if self._known is self.stores[0].keys is not None and end <= self.room:
            return
        for layer, store in zip(layers, self.stores, strict=True):
            store.truncate(position)
            keys, values = store.reserve(end, self._none, self._none)
            layer["keys"], layer["values"] = keys.ctypes.data, values.ctypes.data
            layer["room"] = layer["value_room"] = keys.shape[-2]
        self._known, self.room = self.stores[0].keys, self.stores[0].keys.shape[-2]

    def finish(self, position: int, tokens: int) -> None:
        """Count the new tokens."""
        for store in self.stores:
            store.claim(position, tokens)


class CodedCache:
    """Keys and values in codes, and the last ones in float32 behind them, where a step writes its own; one token only.

    What a step makes due is coded after it, for all layers together.
    """

    def __init__(self, stores: list, config: ModelConfig):
        from refllm.kernels.packed.kv_attention import WORDS

        self.stores, self.room = stores, -1  # one more than the last position; none yet
        _, group, residual = stores[0].packing
        self.side = max(residual, config.head_dim) // group
        self._moves = -1  # of the first store's arrays when all addresses were asked for
        self._none = np.empty((1, config.num_kv_heads, 0, config.head_dim), np.float32)
        self._windows = [config.window(layer) for layer in range(config.num_layers)]
        self._bytes = 4 * config.head_dim  # of a token's key
        self._table = np.zeros((len(stores), len(WORDS)), np.int64)
        self._column = {name: self._table[:, place] for place, name in enumerate(WORDS)}

    def takes(self, tokens: int) -> bool:
        """As in DenseCache. Stores that may have to go back hold back what they would code: that is for `extend`."""
        return tokens == 1 and not any(store.rollback for store in self.stores)

    def kernels(self, table: np.ndarray, together: set[int]) -> None:
        """As in DenseCache."""
        from refllm.kernels.packed.kv_attention import coded_address

        bits, group, _ = self.stores[0].packing
        for n in together:
            table[n] = coded_address(bits, group, n)

    def prepare(self, layers: np.ndarray, position: int, tokens: int) -> None:
        """As in DenseCache. Arrays grow and shrink at every step, in all stores alike: the first one tells how far."""
        column, one = self._column, self.stores[0]
        if self.room != position:
            for store in self.stores:
                store.go_on(position, self._none)
            self._moves = -1
        words = one.coded_words(self._none)
        if one.moves == self._moves:
            self._table += np.array(words) - self._table[0]
        else:
            self._table[:] = [words, *(store.coded_words(self._none) for store in self.stores[1:])]
            self._moves = one.moves
        column["start"][:] = [max(0, position + 1 - window) if window else 0 for window in self._windows]
        layers["coded"] = self._table.ctypes.data + self._table.strides[0] * np.arange(len(self.stores))
        for side, into, room in (("k", "keys", "room"), ("v", "values", "value_room")):
            rest, tail = column[f"{side}_rest"], column[f"{side}_tail"]
            layers[into] = rest + self._bytes * (tail - 1 - position)  # the token at `position` is the last of the rest
            layers[room] = column[f"{side}_rest_head"] // self._bytes
        self.room = position + 1

    def finish(self, position: int, tokens: int) -> None:
        """As in DenseCache."""
        type(self.stores[0]).claim_all(self.stores)
