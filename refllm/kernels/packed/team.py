"""A team of threads inside one compiled call: every member runs the same text, and they meet at barriers.

Handing work to a Python thread costs about 50 us, a barrier a tenth of one. So a text that needs many steps (a decoded
token has hundreds of products) is called once on every thread, with its number and theirs; each does its share of every
step, outputs divided and sums never, and waits where it needs what the others have made.

A member that waits looks at a counter in a loop; after `SPINS` looks it gives its processor away at every further one,
for the one it waits for may have lost its own to another program. Whoever gives a shared processor away gets it back
milliseconds later, so an ordinary wait must end before: with 2,000 looks, decoding beside a busy program kept a quarter
of its speed, with 20,000 nearly half.
"""

import ctypes
import sys
import threading
from collections.abc import Callable
from functools import cache, partial

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from refllm.kernels.packed.compile import jitable
from refllm.kernels.packed.threads import begin

SPINS = 20_000  # some 40 us
_one_at_a_time = threading.Lock()  # two teams that share helpers could each wait for one that never starts


@intrinsic
def call(typing, address, arguments):
    """Call the C function void(intp, ...) at an address."""

    def generate(context, b, sig, args):
        kind = ir.IntType(64)
        values = [b.extract_value(args[1], i) for i in range(len(sig.args[1]))]
        function = ir.FunctionType(ir.VoidType(), [kind] * len(values))
        b.call(b.inttoptr(args[0], function.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.intp, arguments), generate


def _pointer(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def add_atomic(typing, address, value):
    """Add to the 64-bit integer at an address; returns what was there. Every thread sees such steps in one order."""

    def generate(context, b, sig, args):
        return b.atomic_rmw("add", _pointer(b, args[0]), args[1], "seq_cst")

    return types.intp(types.intp, types.intp), generate


@intrinsic
def load_atomic(typing, address):
    """The 64-bit integer at an address, and everything its writer wrote before it."""

    def generate(context, b, sig, args):
        return b.load_atomic(_pointer(b, args[0]), "seq_cst", 8)

    return types.intp(types.intp), generate


@intrinsic
def _store_atomic(typing, address, value):
    """Write the 64-bit integer at an address, after everything before it."""

    def generate(context, b, sig, args):
        b.store_atomic(args[1], _pointer(b, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@jitable
def barrier(meeting, threads):
    """Wait until all members are here.

    meeting : address of a Meeting's words.
    """
    if threads > 1:
        arrived, generation = meeting, meeting + 64  # in cache lines of their own
        now = load_atomic(generation)
        if add_atomic(arrived, 1) == threads - 1:
            _store_atomic(arrived, 0)
            _store_atomic(generation, now + 1)
        else:
            looks = 0
            while load_atomic(generation) == now:
                looks += 1
                if looks > SPINS:
                    call(load_atomic(meeting + 128), ())


@jitable
def share(count, thread, threads):
    """The part of range(count) that is one member's: first, last."""
    return count * thread // threads, count * (thread + 1) // threads


@cache
def yield_address() -> int:
    """Address of the function by which a thread gives its processor away: sched_yield, or Windows' SwitchToThread."""
    function = ctypes.windll.kernel32.SwitchToThread if sys.platform == "win32" else ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value


def new_meeting() -> np.ndarray:
    """The memory of a barrier; its address is `.ctypes.data`."""
    words = np.zeros(24, np.int64)
    words[16] = yield_address()
    return words


def run_team(run: Callable[[int, int], object], threads: int) -> None:
    """Call run(thread, threads) for every member at once; it must release the interpreter lock."""
    if threads == 1:
        run(0, 1)
        return
    with _one_at_a_time:
        helpers = begin([partial(run, thread, threads) for thread in range(1, threads)])
        run(0, threads)
        for helper in helpers:
            helper.result()
