"""Plain NumPy implementations of the caches that code every token by itself, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

BUGS = {
    "kvcache.qserve": {
        "whole_zero": "Zero",
        "exact_scale": "Stored",
        "one_grid_a_token": "Head",
        "divide_by_2_to_bits": "Divisor",
        "high_code_first": "Packed",
        "scale_one_where_constant": "Constant",
        "zero_saturates": "Narrow",
        "ties_away": "Ties",
    },
    "kvcache.llmqat": {
        "a_step_a_head": "Heads",
        "one_step_for_all": "Tokens",
        "divide_by_half_range": "Divisor",
        "twos_complement": "Offset",
        "no_limit": "Gradient",
        "limit_included": "Limit",
        "clipped_at_the_limit": "Limit",
        "zero_step_is_one_code": "ZeroToken",
        "ties_away": "Ties",
    },
}


def mutant(bug):
    """An implementation `f(op, params, inputs)` of all these ops with one mistake, or none."""

    def implementation(op, params, inputs):
        with np.errstate(all="ignore"):
            return _OPS[op](bug, **params, **{name: x.astype(np.float64) for name, x in inputs.items()})

    return implementation


def rounded(bug, x):
    return np.sign(x) * np.floor(np.abs(x) + 0.5) if bug == "ties_away" else np.rint(x)


def packed(bug, codes, bits):
    if bug == "high_code_first" and codes.shape[-1] % 2 == 0:
        codes = codes.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape)
    stream = ((codes.astype(np.int64)[..., None] >> np.arange(bits)) & 1).astype(np.uint8)
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def qserve(bug, x, bits):
    axes = (0, 2) if bug == "one_grid_a_token" else 2
    low, high = (np.broadcast_to(f(x, axis=axes, keepdims=True), (*x.shape[:2], 1)) for f in (np.min, np.max))
    levels = 2**bits - 1
    exact = (high - low) / (levels + (bug == "divide_by_2_to_bits"))
    scale = exact.astype(np.float16)
    used = exact if bug == "exact_scale" else scale.astype(np.float64)
    zero = (-low / used).astype(np.float16)
    if bug == "zero_saturates":
        zero = np.clip(zero, -65504, 65504)
    if bug == "whole_zero":
        zero = np.rint(zero)
    one = (scale == 0) | ~np.isfinite(zero)
    filled = np.float16(1) if bug == "scale_one_where_constant" else ((low + high) / 2).astype(np.float16)
    scale, zero = np.where(one, filled, scale), np.where(one, np.float16(-1), zero)
    codes = rounded(bug, np.clip(x / np.where(one, 1, used) + zero, 0, levels))
    codes = np.where(one, 0, codes)
    back = ((codes - zero.astype(np.float64)) * scale).astype(np.float32)
    return {"codes": packed(bug, codes, bits), "scale": scale, "zero": zero, "x_hat": back}


def llmqat(bug, x, bits):
    most = 2 ** (bits - 1) - 1
    axes = {"a_step_a_head": 2, "one_step_for_all": None}.get(bug, (0, 2))
    source = np.clip(x, -2, 2) if bug == "clipped_at_the_limit" else x
    step = np.abs(source).max(axis=axes, keepdims=True) / (most + (bug == "divide_by_half_range"))
    step = np.broadcast_to(step.astype(np.float32), (*x.shape[:2], 1))
    codes = rounded(bug, source / np.where(step > 0, step, 1).astype(np.float64))
    codes = np.clip(codes, -most, most)
    if bug == "zero_step_is_one_code":
        codes = np.where(step == 0, -most, codes)
    back = (codes * step).astype(np.float32)
    stored = codes % 2**bits if bug == "twos_complement" else codes + most
    inside = np.abs(x) <= 2 if bug == "limit_included" else np.abs(x) < 2
    inside = np.ones(x.shape) if bug == "no_limit" else inside
    return {
        "codes": packed(bug, stored, bits),
        "step": step[0, :, 0],
        "x_hat": back,
        "gradient": inside.astype(np.float32),
    }


_OPS = {"kvcache.qserve": qserve, "kvcache.llmqat": llmqat}
