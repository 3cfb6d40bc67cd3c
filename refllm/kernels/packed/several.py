"""Several weights with one input as one job: their tiles are counted through, and whoever takes a slice goes on across
the end of one weight into the next.

A decoded token multiplies one vector by several weights again and again (q, k and v; gate and up). One after another,
each product would round the vector anew, call its kernel from Python, and wait for the last slice of the one before.
"""

from functools import cache

from numba import types

from refllm.kernels.packed.compile import compile_address
from refllm.kernels.packed.lane_memory import word
from refllm.kernels.packed.team import call

FIELDS = 4  # of a product: address of its kernel, of its weight, bytes from a row's beginning to its results, tiles


def several_products(products, x, x_scale, x_sums, y, stride, panels, first, last):
    """The tiles first <= tile < last of all products together; called as one of them is (tile_kernels.product_text).

    products : address of int64: how many, then FIELDS of each. y : address of a row's results, of all side by side.
    """
    begin = 0
    for i in range(word(products, 0)):
        field = 1 + FIELDS * i
        end = begin + word(products, field + 3)
        start, stop = max(first, begin), min(last, end)
        if start < stop:
            own = y + word(products, field + 2)
            what = word(products, field + 1), x, x_scale, x_sums, own, stride, panels, start - begin, stop - begin
            call(word(products, field), what)
        begin = end


@cache
def several_address() -> int:
    """Address of the compiled several_products."""
    return compile_address(several_products, types.void(*[types.intp] * 9))
