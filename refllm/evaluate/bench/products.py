"""One product as a candidate: x W^T with copies of W stored in some way, NumPy's and refllm's own first.

Whoever builds one says what the product should be (from the matrix as it is stored), so that a fast wrong kernel, or a
peer that was called wrongly, is found before it is timed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refllm.formats import blocks
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import encode_gguf, matmul, matmul_each
from refllm.kernels.packed.records import GGUFBlocks, IntWeight, from_parts, meta, parts

KINDS = {
    "w4": SymmetricGrid(4, 128),
    "w4g32": SymmetricGrid(4, 32),
    "w4a": AffineGrid(4, 32),
    "w2a": AffineGrid(2, 64),
    "w8": SymmetricGrid(8, -1),
    "w8g128": SymmetricGrid(8, 128),
}
# Relative error ||y - y'|| / ||y'|| up to which a product counts as right; rounding x to 8 bits makes 0.005 (a scale
# for 32 numbers) to 0.015 (a scale a row).
TOLERANCE = 0.04
# Copies of one weight. Fewest: a turn's first product may have to fetch pages that the program before it gave back.
# Most: those of a few kilobytes are met in a cache all the same.
FEWEST_COPIES, MOST_COPIES = 3, 512


@dataclass(frozen=True)
class Product:
    """A way to multiply by a matrix.

    Parameters
    ----------
    program, type, detail : str
        Who, with weights stored how, and what else matters ("int8": activations rounded to 8 bits).
    nbytes : int
        Of one copy of the weight, scales included.
    copies : int
    run : callable
        Multiplies by every copy once.
    output : callable
        The product with the first copy, (tokens, out), after a run.
    expected : (tokens, out) float32
        What it should be.
    """

    program: str
    type: str
    detail: str
    nbytes: int
    copies: int
    run: Callable[[], object]
    output: Callable[[], np.ndarray]
    expected: np.ndarray

    @property
    def name(self) -> str:
        """E.g. refllm Q4_0 int8."""
        return " ".join(filter(None, (self.program, self.type, self.detail)))

    def error(self) -> float:
        """Relative error of the first copy's product after a run.

        Raises
        ------
        ValueError
            It is too large for a product that is merely rounded.
        """
        y = np.asarray(self.output(), np.float32)
        if y.shape != self.expected.shape:
            raise ValueError(f"{self.name}: the product has shape {y.shape}, expected {self.expected.shape}")
        error = float(np.linalg.norm(y - self.expected) / np.linalg.norm(self.expected))
        if not error <= TOLERANCE:
            raise ValueError(f"{self.name}: the product is wrong (relative error {error:.3g}), so it was not timed")
        return error


@dataclass(frozen=True)
class Task:
    """What every product of one measurement computes.

    Parameters
    ----------
    W : (out, in) float32
    x : (tokens, in) float32
    threads : int
    share : int
        Bytes that the copies of one weight should have together.
    """

    W: np.ndarray
    x: np.ndarray
    threads: int
    share: int

    def copies(self, nbytes: int) -> int:
        """Of a weight of this size: a turn of many tokens reads few copies, since it uses each so many times."""
        return min(MOST_COPIES, max(FEWEST_COPIES, -(-self.share // (nbytes * len(self.x)))))

    def stored(self, type_name: str) -> GGUFBlocks | IntWeight:
        """The matrix in a GGUF type or one of KINDS."""
        return packed_weight(type_name, self.W)


def code_bits(type_name: str) -> int:
    """Bits of a code, scales not counted: the first digit of the type's name.

    Examples
    --------
    >>> code_bits("Q4_K"), code_bits("w8g128"), code_bits("MXFP4")
    (4, 8, 4)
    """
    return int(re.search(r"\d+", type_name)[0])


def check_types(types, shapes=()) -> None:
    """Raise ValueError for the first name that `packed_weight` does not know, or whose blocks do not fit a shape."""
    for name in types:
        if name not in KINDS and name not in blocks.BLOCKS:
            raise ValueError(f"unknown type {name!r}; known: {', '.join((*KINDS, *blocks.BLOCKS))}")
        size = KINDS[name].group_size if name in KINDS else blocks.BLOCKS[name].block_size
        for rows, columns in shapes:
            if columns % max(size, 1):
                raise ValueError(f"{rows}x{columns}: {columns} columns are no multiple of {size}, as {name} needs")


def packed_weight(kind: str, W: np.ndarray) -> IntWeight | GGUFBlocks:
    """A weight in one of KINDS, or as GGUF blocks (Q4_0, Q8_0 ...).

    Parameters
    ----------
    kind : str
    W : (out, in) float32
    """
    check_types((kind,))
    if kind in KINDS:
        scale, zero_point = KINDS[kind].fit(W)
        return IntWeight.pack(KINDS[kind], KINDS[kind].encode(W, scale, zero_point), scale, zero_point)
    return GGUFBlocks(encode_gguf(kind, W), kind, W.shape[1])


def copied(weight, copies: int) -> list:
    """The weight and copies of it, none sharing memory with another."""
    if isinstance(weight, np.ndarray):
        return [weight] + [weight.copy() for _ in range(copies - 1)]
    fresh = lambda: {name: array.copy() for name, array in parts(weight).items()}
    return [weight] + [from_parts(weight.kind, fresh(), meta(weight)) for _ in range(copies - 1)]


def numpy_product(task: Task) -> Product:
    """NumPy's float32 product, which is that of its BLAS."""
    return _own(task, task.W, "numpy", "float32", "", "float32")


def refllm_product(task: Task, type_name: str, activations: str) -> Product:
    """refllm's product with a packed weight, by its public `matmul`."""
    return _own(task, task.stored(type_name), "refllm", type_name, activations, activations)


def _own(task: Task, weight, program: str, type_name: str, detail: str, activations: str) -> Product:
    weights, found = copied(weight, task.copies(weight.nbytes)), {}

    def run():
        if len(task.x) == 1:  # as q, k and v of a decoded token: one call, as ggml's graph of all products is one
            found["y"] = matmul_each(task.x, weights, activations)[0]
            return
        for i, copy in enumerate(weights):  # of many tokens each product rounds its own, as the peers' do
            y = matmul(task.x, copy, activations)
            if i == 0:
                found["y"] = y

    dense = weight if isinstance(weight, np.ndarray) else weight.dense()
    return Product(program, type_name, detail, weight.nbytes, len(weights), run, lambda: found["y"], task.x @ dense.T)
