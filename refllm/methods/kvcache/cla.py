"""cla: groups of neighbouring layers read the keys and values of the first of them.

    layers i with i mod share = 0 own their cache; the next share - 1 layers attend with their own queries over it

The cache shrinks to 1 / share and the traffic of a decode step with it. An architecture, not a compressor: layers that
read foreign keys have to be trained so. On a model that was not, this shows what is given up; where the layers of a
group compute the same keys and values it is exact. With share = 1 every layer keeps its own.

Paper: Brandon et al. 2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention", arXiv:2405.12981,
section 3.
Differs from it: no training, so weights of k and v that nobody reads are still in the model.
Stage: memory, decode
Inventory: none, a background method of the layer dimension
Lesson: lessons/19-five-dimensions.md
Golden: kvcache/cla
Baseline: none, share = 1 is the plain cache
"""

import numpy as np

from refllm.model.cache import DenseStore


def cla(layer: int, *, share: int = 2) -> DenseStore:
    """The store of one layer: `new_cache(model, policy=cla)`.

    Parameters
    ----------
    layer : int
    share : int
        Layers that read one cache, 1 or more.

    Returns
    -------
    DenseStore
        Or one that keeps nothing and reads its group's.

    Raises
    ------
    ValueError
        A share below 1.
    """
    if share < 1:
        raise ValueError(f"cla share must be 1 or more, got {share}")
    return OwnStore() if layer % share == 0 else ReadStore(layer - layer % share)


class OwnStore(DenseStore):
    """A dense store that others read."""

    def extend(self, k, v, positions, queries=None):
        """As of the dense store; a gap in the positions is an error, for the others count tokens."""
        if positions[0] > self.length or not np.array_equal(positions, positions[0] + np.arange(k.shape[-2])):
            raise ValueError(f"cla keeps every token: positions must go on from {self.length}, got {positions}")
        return super().extend(k, v, positions)

    def parts(self) -> dict[str, np.ndarray]:
        """Exactly what is stored."""
        if self.keys is None or not self.length:
            return {}
        return {"keys": self.keys[..., : self.length, :], "values": self.values[..., : self.length, :]}


class ReadStore:
    """Keeps nothing: the keys and values of another layer of the same cache are what it returns.

    Parameters
    ----------
    owner : int
        The layer it reads.
    """

    pre_rope = False
    nbytes = 0

    def __init__(self, owner: int):
        self._owner = owner
        self._store: OwnStore | None = None

    def join(self, stores: list) -> None:
        """Called once by the cache, with the stores of all layers."""
        self._store = stores[self._owner]

    def extend(self, k, v, positions, queries=None):
        """What the owner holds, this call's tokens included: its layer comes earlier in every pass.

        Raises
        ------
        ValueError
            Keys of another shape than the owner's.
        """
        K, V = (x[..., : self._store.length, :] for x in (self._store.keys, self._store.values))
        if (K.shape[-3], K.shape[-1], V.shape[-1]) != (k.shape[-3], k.shape[-1], v.shape[-1]):
            raise ValueError(f"cla shares keys between layers of one shape, got {K.shape} and {k.shape}")
        return K.astype(k.dtype, copy=False), V.astype(v.dtype, copy=False), np.arange(self._store.length)

    def truncate(self, length: int) -> None:
        """Nothing is kept here; the owner forgets."""

    def parts(self) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}
