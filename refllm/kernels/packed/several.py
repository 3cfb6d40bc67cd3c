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

FIELDS = 5  # of a product: address of its kernel, of its weight and of its results, bytes from token to token, tiles


def several_products(products, x, x_scale, x_sums, count, token, panels, first, last):
    """The tiles first <= tile < last of all products together.

    products : address of int64 [count, FIELDS]. x, x_scale, x_sums : as laid_out leaves them, of `panels` panels.
    token : number of the first one in the results.
    """
    begin = 0
    for i in range(count):
        field = FIELDS * i
        stride, end = word(products, field + 3), begin + word(products, field + 4)
        start, stop = max(first, begin), min(last, end)
        if start < stop:
            y = word(products, field + 2) + token * stride
            what = word(products, field + 1), x, x_scale, x_sums, y, stride, panels, start - begin, stop - begin
            call(word(products, field), what)
        begin = end


@cache
def several_address() -> int:
    """Address of the compiled several_products."""
    return compile_address(several_products, types.void(*[types.intp] * 9))
