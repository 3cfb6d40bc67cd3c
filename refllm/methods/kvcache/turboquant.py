"""turboquant: turn a vector at random, and its numbers are Gaussian: one table of codes for all of them, without data.

    n = |x|    y = sqrt(D) P x / n    code_i = nearest Lloyd-Max centroid to y_i    x^ = n P^T y^ / sqrt(D)

P is a random rotation, the same for all tokens and heads of a layer, and drawn anew from the seed instead of stored.
The numbers of y are nearly normal and nearly independent, whatever x was, so the best table for the normal distribution
is the best for them: a squared error of .363, .117, .0345, .0095 |x|^2 at 1, 2, 3, 4 bits (on average over rotations),
near what any code can reach.

That code makes vectors shorter, and scores smaller. Keys therefore spend one bit of theirs on the signs of the residual
r = x / n - x^ / n behind a Gaussian matrix S [D, D], by which scores are right on average (and noisier):

    k^ = x^ + n |r| sqrt(pi / 2) / D  S^T sign(S r)          E <q, k^> = <q, x>          (QJL)

A key has bits - 1 + 1 bits and two float16 (n, |r|), a value `bits` and one: bits + 32 / D and bits + 16 / D a number.

Paper: Zandieh et al. 2025, "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
arXiv:2504.19874.
Differs from it: the table is that of the normal distribution, not of the coordinates of a sphere, for every D.
Stage: memory, decode
Inventory: none, an addition
Lesson: lessons/29-random-rotations-of-caches.md
Golden: kvcache/turboquant
"""

from functools import cache
from itertools import pairwise
from math import erf, exp, pi, sqrt

import numpy as np

from refllm.formats.bits import pack_bits, unpack_bits
from refllm.kernels.hadamard import random_rotation
from refllm.kernels.kmeans_1d import nearest_1d
from refllm.methods.kvcache._coded import CodedStore


def turboquant(
    layer: int, *, bits: int = 4, prod: bool = True, rotation: str = "orthogonal", seed: int = 0, recent: int = 0
) -> "TurboQuantStore":
    """The store of one layer: `new_cache(model, policy=turboquant)`.

    Parameters
    ----------
    layer : int
        Seeds the rotation, with `seed`.
    bits : int
        A number's, 2 to 4; of a key's one is the sign.
    prod : bool
        False: keys are coded as values are.
    rotation : str
        orthogonal (drawn evenly from all), or hadamard (random signs in front of a Hadamard matrix).
    seed : int
    recent : int
        Last tokens that are kept in full (the paper: none).

    Returns
    -------
    TurboQuantStore

    Raises
    ------
    ValueError
        A number outside its range, another rotation.
    """
    return TurboQuantStore(bits, prod, rotation, (seed, layer), recent)


class TurboQuantStore(CodedStore):
    """Codes and norms of every token and head, signs and norms of the residuals of keys.

    Parameters
    ----------
    bits, prod, rotation, recent :
        As in `turboquant`.
    seed : (int, int)
    """

    name = "turboquant"
    limit = 2048.0  # so that norms of up to 1023 channels are float16

    def __init__(self, bits: int, prod: bool, rotation: str, seed: tuple[int, int], recent: int = 0):
        if not 2 <= bits <= 4:
            raise ValueError(f"turboquant bits must be 2 to 4, got {bits}")
        random_rotation(4, rotation, np.random.default_rng(0), "a vector")  # says what is wrong with the kind
        self.bits, self.prod, self.rotation, self.seed = bits, prod, rotation, seed
        super().__init__(recent)

    def _clear(self):
        super()._clear()
        self._drawn = {}

    def _check_width(self, side, shape):
        if shape[-1] > 1023:
            raise ValueError(f"turboquant codes up to 1023 channels, got a {side} of {shape[-1]}")
        self._matrices(shape[-1])  # a width that the rotation cannot have

    def _matrices(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """P and S for vectors of this width."""
        if width not in self._drawn:
            rng = np.random.default_rng([*self.seed, width])
            turning = random_rotation(width, self.rotation, rng, "a head")
            self._drawn[width] = turning, rng.standard_normal((width, width))
        return self._drawn[width]

    def _encode(self, side, x):
        turning, S = self._matrices(x.shape[-1])
        signs = self.prod and side == "k"
        bits = self.bits - signs
        codes, norm = encode(x, turning, bits)
        arrays = {"codes": pack_bits(codes, bits), "norm": norm[..., None]}
        if signs:
            signs, residual = encode_residual(x, codes, turning, S, bits)
            arrays |= {"signs": pack_bits(signs, 1), "residual": residual[..., None]}
        return arrays

    def _decode(self, side, arrays, dtype):
        width = self._width(side)
        turning, S = self._matrices(width)
        bits = self.bits - ("signs" in arrays)
        unit = decode(unpack_bits(arrays["codes"], bits, width), turning, bits)
        if "signs" in arrays:
            unit += decode_residual(unpack_bits(arrays["signs"], 1, width), arrays["residual"][..., 0], S)
        return (unit * arrays["norm"]).astype(dtype)


@cache
def centroids(bits: int) -> np.ndarray:
    """The 2^bits numbers that stand for a normal variable with the least squared error, rising, float32 numbers.

    Lloyd's step on the density itself: each centroid becomes the mean of what is nearest to it.

    Examples
    --------
    >>> centroids(2).round(4).tolist()
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    half = 1 << (bits - 1)
    c = [(i + 0.5) * 2.5 / half for i in range(half)]  # the positive ones; the others mirror them
    density = lambda t: exp(-t * t / 2) / sqrt(2 * pi)
    below = lambda t: erf(t / sqrt(2)) / 2
    for _ in range(5000):
        edges = [0.0, *((a + b) / 2 for a, b in pairwise(c)), 40.0]
        pairs = list(pairwise(edges))
        moved = [(density(a) - density(b)) / (below(b) - below(a)) for a, b in pairs]
        done = max(abs(a - b) for a, b in zip(c, moved, strict=True)) < 1e-13
        c = moved
        if done:
            break
    table = np.array([*(-x for x in reversed(c)), *c], np.float32).astype(np.float64)
    table.flags.writeable = False
    return table


def encode(x: np.ndarray, turning: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and norms.

    Parameters
    ----------
    x : (..., D) float32 or float64
    turning : (D, D)
        P, orthogonal.
    bits : int
        1 to 4.

    Returns
    -------
    codes : (..., D) uint8
        A number halfway between two centroids takes the lower one. Zeros have codes that do not matter.
    norm : (...) float16

    Examples
    --------
    >>> codes, norm = encode(np.array([3.0, -4.0]), np.eye(2), bits=1)
    >>> codes.tolist(), norm.item()
    ([1, 0], 5.0)
    """
    unit, norm = _unit(x)
    y = np.sqrt(x.shape[-1]) * (unit @ turning.T)
    codes = nearest_1d(y.reshape(1, -1), centroids(bits)[None]).reshape(x.shape)
    return codes, norm.astype(np.float16)


def _unit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    norm = np.sqrt((x * x).sum(axis=-1))
    return x / np.where(norm > 0, norm, 1)[..., None], norm


def decode(codes: np.ndarray, turning: np.ndarray, bits: int) -> np.ndarray:
    """What the codes stand for, times sqrt(D) turned back: (..., D) float64, to be multiplied by the norm.

    Examples
    --------
    >>> decode(np.array([1, 0], np.uint8), np.eye(2), bits=1).round(3).tolist()
    [0.564, -0.564]
    """
    return centroids(bits)[codes] @ turning / np.sqrt(codes.shape[-1])


def encode_residual(x, codes, turning, S, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Signs of what `decode` misses, behind S, and its norm.

    Parameters
    ----------
    x, codes, turning, bits :
        As handed to `encode`, and returned.
    S : (D, D)
        Normal numbers.

    Returns
    -------
    signs : (..., D) uint8
        1 where S r is not negative.
    norm : (...) float16
    """
    r = _unit(x)[0] - decode(codes, turning, bits)
    return (r @ S.T >= 0).astype(np.uint8), np.sqrt((r * r).sum(axis=-1)).astype(np.float16)


def decode_residual(signs: np.ndarray, norm: np.ndarray, S: np.ndarray) -> np.ndarray:
    """A vector whose product with any q is that of the residual on average over S: (..., D) float64."""
    return norm[..., None].astype(np.float64) * (np.sqrt(pi / 2) / len(S)) * ((2.0 * signs - 1) @ S)
