"""GGUF blocks with one mistake at a time: refllm's encoders and decoders, spoilt.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

from contextlib import ExitStack, nullcontext
from unittest.mock import patch

import numpy as np

from refllm.evaluate.golden.own import implementation
from refllm.formats.blocks import BLOCKS, kquants, lookup, scale_search, simple, ternary

BUGS = {
    "formats.gguf.decode": {
        "nibbles_swapped": "BitOrder",
        "pairs_not_halves": "BitOrder",
        "scale_of_the_next": "Random",
        "no_signed_zero": "SignedZero",
        "subnormals_flushed": "Subnormal",
        "signed_as_unsigned": "Extremes",
        "pads": "OddSize",
        "no_params_check": "BadParams",
    },
    "formats.gguf.encode": {
        "last_byte_lost": "Random",
        "nibbles_swapped": "NibbleOrder",
        "one_step_of_search": "Search",
        "minimum_stays": "Search",
        "not_requantized": "Requantized",
        "divides_by_zero": "AllZeroGroup",
        "plus_zero_scale": "AllZeroGroup",
        "minus_zero_counts": "NegativeZero",
        "ties_even": "TieAway",
        "ties_down": "TieUp",
        "ties_from_zero": "TieTowardZero",
        "unsigned_scale": "AbsmaxNegative",
        "subnormals_flushed": "Subnormal",
        "minimum_subtracted_first": "OneSided",
        "importance_ignored": "Importance",
        "importance_never_zero": "ImportanceZero",
        "mean_of_the_block": "RowMean",
        "no_finite_check": "NonFinite",
        "saturates": "ScaleOverflow",
        "pads": "OddSize",
        "no_importance_check": "BadImportance",
        "no_params_check": "BadParams",
    },
}


def mutant(bug):
    """An implementation of both ops with one mistake, or with none."""

    def answer(op, params, inputs):
        if bug == "no_params_check" and params["type"] not in BLOCKS:
            params = params | {"type": "Q4_0"}
        if params["type"] not in BLOCKS:
            raise ValueError("no such type")
        if op == "formats.gguf.decode":
            return {"x": _decode(bug, params["type"], inputs["blocks"].copy())}
        return {"blocks": _encode(bug, params["type"], inputs["x"].copy(), inputs.get("importance"))}

    return answer


def _padded(array, size):
    return np.pad(array, [(0, 0), (0, -array.shape[1] % size)])


def _decode(bug, name, blocks):
    form = BLOCKS[name]
    if bug == "pads":
        blocks = _padded(blocks, form.bytes_per_block)
    if bug == "nibbles_swapped":
        blocks = blocks << 4 | blocks >> 4
    if bug == "signed_as_unsigned" and blocks.shape[1] % form.bytes_per_block == 0:
        fields = form.layout.unpack(blocks.reshape(-1, form.bytes_per_block))
        fields = {key: value.view(np.uint8) if value.dtype == np.int8 else value for key, value in fields.items()}
        with np.errstate(all="ignore"):
            return form.terms(**fields).decode().reshape(len(blocks), -1)
    x = implementation("formats.gguf.decode", {"type": name}, {"blocks": blocks})["x"]
    if bug == "pairs_not_halves":
        return x.reshape(len(x), -1, 2, 16).transpose(0, 1, 3, 2).reshape(x.shape)
    if bug == "no_signed_zero":
        return x + np.float32(0)
    if bug == "subnormals_flushed":
        return np.where(np.abs(x) < 2**-14, np.float32(0), x)
    return np.roll(x, 16, axis=1) if bug == "scale_of_the_next" else x


class OneStep:
    """Searches that end after their first try."""

    make_qx = staticmethod(lambda x, nmax, w: scale_search.make_qx(x, nmax, np.ones_like(w)))
    make_q3 = staticmethod(lambda x, nmax: scale_search.make_qx(x, nmax, np.ones_like(x)))
    make_qkx = staticmethod(lambda x, nmax, w, *rest: scale_search.make_qkx(x, nmax, w, rest[0], rest[1], 0))
    make_qp = staticmethod(scale_search.make_qp)
    fit_levels = staticmethod(lambda x, levels, w, tries: scale_search.fit_levels(x, levels, w, 0))


def _minimum_stays(x, nmax, w, rmin, rdelta, nstep, absolute=False):
    """Every try of make_qkx on its own, from the same minimum."""
    best = None
    for step in range(nstep + 1):
        scale, low, codes = scale_search.make_qkx(x, nmax, w, rmin + rdelta * step, 0.0, 0, absolute)
        off = scale[:, None] * codes - low[:, None] - x
        error = (w * (np.abs(off) if absolute else off * off)).sum(axis=1)
        if best is not None:
            keep = best[0] <= error
            scale, low = np.where(keep, best[1], scale), np.where(keep, best[2], low)
            codes, error = np.where(keep[:, None], best[3], codes), np.where(keep, best[0], error)
        best = error, scale, low, codes
    return best[1:]


class MinimumStays(OneStep):
    make_qx, make_q3 = staticmethod(scale_search.make_qx), staticmethod(scale_search.make_q3)
    make_qkx = staticmethod(_minimum_stays)
    fit_levels = staticmethod(scale_search.fit_levels)


def _patched(bug):
    """What of refllm is another thing meanwhile."""
    if bug == "not_requantized":
        return patch.object(kquants, "_requantized", lambda x, d, low, old, least, most: old.reshape(len(x), 256))
    stack = ExitStack()
    if bug == "ties_even":
        for module in (simple, ternary):
            stack.enter_context(patch.object(module, "round_half_away", np.rint))
    if bug == "unsigned_scale":
        for module in (simple, kquants, lookup, scale_search):
            stack.enter_context(patch.object(module, "signed_largest", lambda x: np.abs(x).max(axis=1, keepdims=True)))
    return stack if bug in ("ties_even", "unsigned_scale") else nullcontext()


def _encode(bug, name, x, importance):
    form = BLOCKS[name]
    if bug == "pads":
        x = _padded(x, form.block_size)
    if bug == "no_finite_check":
        x = np.nan_to_num(x, posinf=1.0, neginf=-1.0)
    if bug == "saturates":
        x = np.clip(x, -60000, 60000) if np.isfinite(x).all() else x
    if bug == "ties_down":
        x = np.where(x == np.rint(x), x, np.nextafter(x, np.float32(-np.inf)))
    if bug == "ties_from_zero" and name.endswith("FP4"):
        x = np.where(np.abs(x) == np.abs(x).max(), x, np.nextafter(x, np.copysign(np.float32(np.inf), x)))
    if bug == "subnormals_flushed" and np.abs(x).max() < 2**-14:
        x = x * 0
    if bug == "minimum_subtracted_first" and x.min() < -5 < 5 < x.max():
        x = x - x.min(axis=1, keepdims=True)
    if bug == "importance_ignored":
        importance = None
    if bug == "importance_never_zero" and importance is not None and not importance.any():
        importance = importance + 1
    if bug == "no_importance_check" and importance is not None:
        good = form.takes_importance and importance.shape == x.shape[1:] and (importance >= 0).all()
        importance = importance if good else None
    if bug == "mean_of_the_block" and importance is not None and importance.shape == x.shape[1:]:
        importance = np.tile(importance, (len(x), 1)).reshape(-1, form.block_size)
        rows = [_plain(form, block[None], of[None]) for block, of in
                zip(x.reshape(-1, form.block_size), importance, strict=True)]  # fmt: skip
        return np.concatenate(rows, axis=1).reshape(len(x), -1)
    search = {"one_step_of_search": OneStep, "minimum_stays": MinimumStays}.get(bug, scale_search)
    with _patched(bug):
        blocks = _plain(form, x, importance, search)
    return _spoilt(bug, form, x, blocks)


def _plain(form, x, importance, search=scale_search):
    blocks, weights = form.prepare(x, importance)
    out = np.empty((len(blocks), form.bytes_per_block), np.uint8)
    form.encode_blocks(blocks, weights, out, search)
    return form.finish(out, x.shape)


def _spoilt(bug, form, x, blocks):
    """Mistakes in the bytes."""
    if bug == "nibbles_swapped":
        return blocks << 4 | blocks >> 4
    if bug == "last_byte_lost":
        blocks[:, -1] ^= 1
    if bug == "divides_by_zero" and not x.any():
        blocks[:] = 0xFF
    if bug == "plus_zero_scale" and not x.any() and form.name in ("Q4_0", "Q5_0"):
        blocks[:, 1] = 0
    if bug == "minus_zero_counts" and np.signbit(x[x == 0]).any():
        blocks[:, 1] ^= 0x80
    return blocks
