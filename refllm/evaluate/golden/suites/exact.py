"""Exact arithmetic for the generators: every rounding is one explicit call, everything between is a fraction."""

from collections.abc import Callable
from fractions import Fraction

MASK64 = (1 << 64) - 1


def nearest(x: Fraction, ties: str = "even") -> int:
    """The nearest integer; a tie goes to "even" or "away" from zero.

    Examples
    --------
    >>> [nearest(Fraction(n, 2)) for n in (1, 3, 5, -1, -3)], nearest(Fraction(5, 2), "away")
    ([0, 2, 2, 0, -2], 3)
    """
    below = x.numerator // x.denominator
    rest = x - below
    half = Fraction(1, 2)
    if rest != half:
        return below + (rest > half)
    if ties == "even":
        return below + below % 2
    return below + (x > 0)


def _step(x: Fraction, precision: int, least_exponent: int) -> Fraction:
    """Distance of the floats around x."""
    if x == 0:
        return Fraction(2) ** least_exponent
    a = abs(x)
    exponent = a.numerator.bit_length() - a.denominator.bit_length()
    if Fraction(2) ** exponent > a:
        exponent -= 1
    return Fraction(2) ** max(exponent - precision + 1, least_exponent)


def f16_margin(x: Fraction) -> Fraction:
    """How far x lies from the midpoint of two float16, in steps between them: 0 (on it) to 1/2."""
    steps = x / _step(x, 11, -24)
    return abs(steps - steps.numerator // steps.denominator - Fraction(1, 2))


def _to_float(x: Fraction, precision: int, least_exponent: int, largest: int | Fraction) -> Fraction:
    """Round to `precision` significant bits, ties to even; subnormals end at 2^least_exponent."""
    step = _step(x, precision, least_exponent)
    rounded = nearest(x / step) * step
    if abs(rounded) > largest:
        raise OverflowError(f"{float(x):.6g} is beyond {precision} bit floats of at most {float(largest):.6g}")
    return rounded


def to_f16(x: Fraction) -> Fraction:
    """The nearest float16; OverflowError beyond 65504.

    Examples
    --------
    >>> float(to_f16(Fraction(1, 7))), float(to_f16(Fraction(1, 2**24) * 5 / 2)) * 2**24
    (0.142822265625, 2.0)
    """
    return _to_float(x, 11, -24, 65504)


def to_f32(x: Fraction) -> Fraction:
    """The nearest float32."""
    return _to_float(x, 24, -149, (2 - Fraction(1, 2**23)) * 2**127)


def f32_step(x: Fraction) -> Fraction:
    """Distance of the float32 around x.

    Examples
    --------
    >>> float(f32_step(Fraction(5, 2))) * 2**22
    1.0
    """
    return _step(x, 24, -149)


def to_f64(x: Fraction) -> Fraction:
    """The nearest float64."""
    return _to_float(x, 53, -1074, (2 - Fraction(1, 2**52)) * 2**1023)


def splitmix64(seed: int, n: int) -> list[int]:
    """SplitMix64 with Python integers."""
    out = []
    for i in range(1, n + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        out.append(z ^ (z >> 31))
    return out


def dyadic(seed: int, bits: int, exp2: int, n: int) -> list[Fraction]:
    """The recipe splitmix64_dyadic: (top `bits` bits - half) * 2^exp2."""
    return [((z >> (64 - bits)) - (1 << (bits - 1))) * Fraction(2) ** exp2 for z in splitmix64(seed, n)]


def dyadic_recipe(seed: int, bits: int, exp2: int) -> dict:
    """The same as the manifest writes it."""
    return {"kind": "splitmix64_dyadic", "seed": f"{seed:#018x}", "bits": bits, "exp2": exp2}


def pack_low_first(codes: list[int], bits: int) -> list[int]:
    """One row of codes as one little-endian bit stream, zero bits up to a whole byte.

    Examples
    --------
    >>> [hex(b) for b in pack_low_first([1, 2, 15], 4)]
    ['0x21', '0xf']
    """
    stream = 0
    for i, code in enumerate(codes):
        stream |= code << (i * bits)
    return list(stream.to_bytes((len(codes) * bits + 7) // 8, "little"))


class Unclear(ValueError):
    """Numbers that make no golden case: a decision lies too near to its boundary, or what is to be shown is not."""


def first_clear(make: Callable, start: int):
    """What `make(seed)` gives for the first seed from `start` on for which no decision lies near a boundary.

    Raises
    ------
    ValueError
        If `make` raises Unclear for 10,000 seeds in a row; any other error it raises is passed on.
    """
    for seed in range(start, start + 10_000):
        try:
            return make(seed)
        except Unclear as error:
            last = error
    raise ValueError(f"no seed from {start} on keeps away from the boundaries: {last}")


def first_seed(accepts: Callable[[int], bool], start: int) -> int:
    """The first seed from `start` on that is accepted."""
    seed = start
    while not accepts(seed):
        seed += 1
    return seed
