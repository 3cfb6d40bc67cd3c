"""The suites finish/teal and finish/amber. Ids are never reused and never renumbered."""

import math
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import nearest, to_f32
from refllm.evaluate.golden.suites.rtn_notes import note

_BITS = {"class": "bits"}
_NEAR = {"class": "allclose", "rtol": 1e-5, "atol": 0.0}


def _suite(name, title, header, notes, cases, version="1.0.0") -> SuiteSpec:
    head = manifest_head(
        __name__, f"finish/{name}", title, header, "lessons/25-activation-sparsity.md", version=version
    )
    notes = notes | {"BadParams": note("MALFORMED", "A param out of range.")}
    source = {"kind": "first_principles", "name": "the header above, one number after another"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])


def _case(id, comment, flags, inputs, expected=None, **params) -> CaseSpec:
    given = {name: values("f32", rows) for name, rows in inputs.items()}
    if expected is None:
        return CaseSpec(id, comment, tuple(flags.split()), given, result="invalid", error="value", params=params)
    kinds = {"threshold": ("f32", _BITS), "factor": ("f32", _NEAR), "kept": ("u8", _BITS)}
    kinds |= {"codes": ("i8", _BITS), "scale": ("f32", _BITS)}
    outputs = {name: Output(kinds[name][1], values(kinds[name][0], rows)) for name, rows in expected.items()}
    return CaseSpec(id, comment, tuple(flags.split()), given, outputs, params=params)


# --- finish/teal -----------------------------------------------------------------------------------------------------


def _teal(id, comment, flags, calibration, x, sparsity) -> CaseSpec:
    sizes = sorted(abs(v) for row in calibration for v in row)
    count = math.ceil(Fraction(sparsity) * len(sizes))
    tau = sizes[count - 1] if count else 0.0
    kept = [[int(abs(v) > tau) for v in row] for row in x]
    inputs = {"calibration": calibration, "x": x}
    return _case(id, comment, flags, inputs, {"threshold": [[tau]], "kept": kept}, sparsity=sparsity)


def teal_suite() -> SuiteSpec:
    """The suite finish/teal."""
    header = [
        "Inputs calibration f32 [n, in], x f32 [tokens, in]. Param sparsity in [0, 1). threshold f32 [1, 1]: the "
        "ceil(sparsity n in)-th smallest of all |calibration|, 0 if that is none. kept u8 [tokens, in]: 1 where |x| > "
        "threshold.",
    ]
    notes = {
        "Strict": note("OFF_BY_ONE", "An input equal to the threshold does not count."),
        "Magnitude": note("BASIC", "The quantile is that of |x|."),
        "Calibrated": note("ORDER", "The threshold is that of calibration, whatever x holds."),
        "Zero": note("DEGENERATE", "sparsity 0: all but zeros count."),
    }
    cases = [
        _teal(1, "half of 8, a tie at the threshold", "Strict Magnitude", [[1, -2, 3, -4], [5, 6, -7, 8]],
              [[4, -4, 5, -5]], 0.5),
        _teal(2, "loud and quiet tokens", "Calibrated", [[1, 2, 3, 4]], [[9, 8, 7, 6], [1, 2, 0.5, 3]], 0.75),
        _teal(3, "nothing but zeros goes", "Zero", [[0, 1, 0, 2]], [[0, 0.25, -1, 0]], 0.0),
        _case(40, "sparsity 1", "BadParams", {"calibration": [[1.0]], "x": [[1.0]]}, sparsity=1.0),
    ]  # fmt: skip
    return _suite("teal", "Inputs above a calibrated threshold", header, notes, cases)


# --- finish/amber ----------------------------------------------------------------------------------------------------


def _percentile(ordered, q):
    at = Fraction(q) * (len(ordered) - 1) / 100
    below = at.numerator // at.denominator
    above = ordered[min(below + 1, len(ordered) - 1)]
    return ordered[below] + (above - ordered[below]) * (at - below)


def _factors(w):
    flat = sorted(Fraction(v) for row in w for v in row)
    low, high = (_percentile(flat, q) for q in ("0.5", "99.5"))
    clipped = [[min(max(Fraction(v), low), high) for v in row] for row in w]
    every = [v for row in clipped for v in row]
    mean = sum(every) / len(every)
    variance = sum((v - mean) ** 2 for v in every) / len(every) or 1
    norms = [math.sqrt(sum((v - mean) ** 2 for v in column) / variance) for column in zip(*clipped, strict=True)]
    least = min((x for x in norms if x), default=1.0)
    return [x / least for x in norms]


def _amber(id, comment, flags, w, x, only="kept", **params) -> CaseSpec:
    params = {"n": 2, "m": 4, "score": "amber", "block": 1} | params
    factor, b, m = _factors(w), params["block"], params["m"]
    kept = []
    for row in x:
        score = [abs(v) * (f if params["score"] == "amber" else 1) for v, f in zip(row, factor, strict=True)]
        units = [math.fsum(s * s for s in score[i : i + b]) for i in range(0, len(score), b)]
        flags_of = []
        for start in range(0, len(units), m):
            best = sorted(range(start, start + m), key=lambda i: (-units[i], i))[: params["n"]]
            flags_of += [int(i in best) for i in range(start, start + m) for _ in range(b)]
        kept.append(flags_of)
    f32 = lambda v: [[float(to_f32(Fraction(a))) for a in v]]
    found = {"factor": f32(factor), "kept": kept}
    if bits := params.get("bits"):
        found |= _rounded([[v * k for v, k in zip(*rows, strict=True)] for rows in zip(x, kept, strict=True)], bits)
    return _case(id, comment, flags, {"w": w, "x": x}, {n: found[n] for n in only.split()}, **params)


def _rounded(x, bits) -> dict:
    """Tokens by themselves; exact scales only."""
    most = (1 << (bits - 1)) - 1
    scales = [Fraction(max(map(abs, row))) / most for row in x]
    if any(to_f32(s) != s for s in scales):
        raise ValueError("the scale is to be a float32")
    codes = [[nearest(Fraction(v) / (s or 1)) for v in row] for row, s in zip(x, scales, strict=True)]
    return {"codes": codes, "scale": [[float(s)] for s in scales]}


def amber_suite() -> SuiteSpec:
    """The suite finish/amber."""
    header = [
        "Inputs w f32 [out, in], x f32 [tokens, in]. Params n, m, score, block. factor f32 [1, in]: w is "
        "clipped to its "
        "0.5 and 99.5 percentiles (linear between ranks, over all of w), less its mean, over its standard deviation "
        "(of all, not n - 1); Euclidean norms of its columns over the smallest that is not 0.",
        "score = |x| factor (amber) or |x| (magnitude). Units are `block` consecutive inputs, scored by the "
        "root of the "
        "sum of squares. kept u8 [tokens, in]: of every m consecutive units the n with the largest scores, "
        "among equals "
        "those of lower index.",
        "Param bits, if it is there: what is kept is rounded, the others being 0: scale f32 [tokens, 1] = the "
        "largest |kept| of the token / (2^(bits-1) - 1); codes i8 = rint(kept / scale), 0 where the scale is 0.",
    ]
    notes = {
        "Clip": note("BASIC", "Outliers of the weight are clipped before norms are taken."),
        "Column": note("LAYOUT", "Norms run over outputs: one factor for each input."),
        "TieLower": note("ROUNDING", "Among equals the lower index is kept."),
        "ExactlyN": note("DEGENERATE", "Exactly n units are kept, zeros among them if need be."),
        "Block": note("LAYOUT", "Inputs of a block are kept or dropped together."),
        "Shape": note("SHAPE", "The width is a multiple of m block."),
        "OwnScale": note("ORDER", "First the pattern, then the scale: an input that is dropped has no say in it."),
        "Divisor": note("OFF_BY_ONE", "2^(bits-1) - 1: 127, 7, 1."),
        "Empty": note("DEGENERATE", "A token of zeros has scale 0 and codes 0."),
    }
    w = [[1.0, 0.25, -1, 40], [-1, 0.5, 2, 1], [1, -0.25, -2, -1], [-1, 0.25, 1, 1]]
    flat = [[1.0, -1, 1, -1] * 2, [-1.0, 1, -1, 1] * 2]
    cases = [
        _amber(1, "a weight of 40 in the last column", "Clip Column", w, [[1, 2, 1, 1.5], [4, 1, 1, 1]],
               "factor kept"),
        _amber(2, "equal inputs and zeros, 1:2 and 2:4", "TieLower ExactlyN", flat, [[1, -1, 1, 1, 0, 0, 0, 5]],
               score="magnitude"),
        _amber(3, "blocks of two", "Block", flat, [[3, 0, 2, 2.25, 1, 1, 0, 1.5]], score="magnitude", n=1, m=2,
               block=2),
        _amber(4, "a loud input in a column of small weights, 4 bits", "OwnScale Divisor",
               [[8.0, 0, 0.125, 4], [-8, 0, -0.125, -4]], [[7, 1, 40, -3.25], [-3.5, 2, -20, 1.75]], "kept codes scale",
               bits=4),
        _amber(5, "nothing but zeros", "Empty", flat, [[0] * 8], "codes scale", score="magnitude", bits=8),
        _case(40, "n above m", "BadParams", {"w": w, "x": [[1.0] * 4]}, n=5, m=4, score="amber", block=1),
        _case(41, "4 columns for 2:4 in blocks of 2", "Shape", {"w": w, "x": [[1.0] * 4]}, n=2, m=4, score="amber",
              block=2),
    ]  # fmt: skip
    return _suite("amber", "The n best of every m inputs", header, notes, cases, "1.1.0")
