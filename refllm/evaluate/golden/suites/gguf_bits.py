"""Where the bits of GGUF blocks lie and what they mean, one number at a time: the definition of formats/gguf_*.

PLACES[type][field] is (count, where): where(i) lists the pieces of number i, low bits first, as (byte, bit, width).
"""

import math

import numpy as np

f32 = np.float32
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled
SIZES = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q8_1": (32, 36),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "Q8_K": (256, 292), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66),
    "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18),
}  # fmt: skip


def _whole(at: int, size: int = 1):
    """Little-endian numbers of `size` bytes from byte `at` on."""
    return lambda i: [(at + size * i + k, 0, 8) for k in range(size)]


def _nibble(at: int):
    return lambda i: [(at + i % 16, i // 16 * 4, 4)]


def _five(high: int, low: int):
    return lambda i: [(low + i % 16, i // 16 * 4, 4), (high + i // 8, i % 8, 1)]


def _pairs(at: int):
    """Two bits: of 128 numbers, those 32 apart share a byte."""
    return lambda i: [(at + 32 * (i // 128) + i % 32, i % 128 // 32 * 2, 2)]


def _nibble64(at: int):
    return lambda i: [(at + 32 * (i // 64) + i % 32, i % 64 // 32 * 4, 4)]


def _scale6(i: int):
    return [(4 + i, 0, 6)] if i < 4 else [(8 + i, 0, 4), (i, 6, 2)]


def _minimum6(i: int):
    return [(8 + i, 0, 6)] if i < 4 else [(8 + i, 4, 4), (4 + i, 6, 2)]


_D, _M = (1, _whole(0, 2)), (1, _whole(2, 2))
_SIX = {"d": _D, "dmin": _M, "sc": (8, _scale6), "mn": (8, _minimum6)}
PLACES = {
    "Q4_0": {"d": _D, "q": (32, _nibble(2))},
    "Q4_1": {"d": _D, "m": _M, "q": (32, _nibble(4))},
    "Q5_0": {"d": _D, "q": (32, _five(2, 6))},
    "Q5_1": {"d": _D, "m": _M, "q": (32, _five(4, 8))},
    "Q8_0": {"d": _D, "q": (32, _whole(2))},
    "Q8_1": {"d": _D, "s": _M, "q": (32, _whole(4))},
    "Q2_K": {
        "sc": (16, lambda i: [(i, 0, 4)]),
        "mn": (16, lambda i: [(i, 4, 4)]),
        "q": (256, _pairs(16)),
        "d": (1, _whole(80, 2)),
        "dmin": (1, _whole(82, 2)),
    },
    "Q3_K": {
        "q": (256, lambda i: [*_pairs(32)(i), (i % 32, i // 32, 1)]),
        "sc": (16, lambda i: [(96 + i % 8, i // 8 * 4, 4), (104 + i % 4, i // 4 * 2, 2)]),
        "d": (1, _whole(108, 2)),
    },
    "Q4_K": {**_SIX, "q": (256, _nibble64(16))},
    "Q5_K": {**_SIX, "q": (256, lambda i: [*_nibble64(48)(i), (16 + i % 32, i // 32, 1)])},
    "Q6_K": {
        "q": (256, lambda i: [(64 * (i // 128) + i % 64, i % 128 // 64 * 4, 4), *_pairs(128)(i)]),
        "sc": (16, _whole(192)),
        "d": (1, _whole(208, 2)),
    },
    "Q8_K": {"d": (1, _whole(0, 4)), "q": (256, _whole(4)), "sums": (16, _whole(260, 2))},
    "IQ4_NL": {"d": _D, "q": (32, _nibble(2))},
    "IQ4_XS": {
        "d": _D,
        "sc": (8, lambda i: [(4 + i // 2, i % 2 * 4, 4), (2 + i // 4, i % 4 * 2, 2)]),
        "q": (256, lambda i: [(8 + 16 * (i // 32) + i % 16, i % 32 // 16 * 4, 4)]),
    },
    "TQ2_0": {"q": (256, _pairs(0)), "d": (1, _whole(64, 2))},
    "MXFP4": {"e": (1, _whole(0)), "q": (32, _nibble(1))},
    "NVFP4": {"s": (4, _whole(0)), "q": (64, lambda i: [(4 + 8 * (i // 16) + i % 8, i % 16 // 8 * 4, 4)])},
    "Q1_0": {"d": _D, "q": (128, lambda i: [(2 + i // 8, i % 8, 1)])},
    "Q2_0": {"d": _D, "q": (64, lambda i: [(2 + i // 4, i % 4 * 2, 2)])},
}


def trit_place(i: int) -> tuple[int, int]:
    """Byte and digit (0 the most significant) of number i of TQ1_0."""
    if i < 160:
        return i % 32, i // 32
    return (32 + (i - 160) % 16, (i - 160) // 16) if i < 240 else (48 + (i - 240) % 4, (i - 240) // 4)


def read(name: str, block: bytes) -> dict[str, list[int]]:
    """Fields of one block, as unsigned numbers."""
    if name == "TQ1_0":
        digit = lambda byte, place: (block[byte] * 3**place % 256) * 3 // 256
        return {"q": [digit(*trit_place(i)) for i in range(256)], "d": [block[52] | block[53] << 8]}
    fields = {}
    for field, (count, where) in PLACES[name].items():
        fields[field] = []
        for i in range(count):
            number = at = 0
            for byte, bit, width in where(i):
                number |= (block[byte] >> bit) % 2**width << at
                at += width
            fields[field].append(number)
    return fields


def write(name: str, fields: dict[str, list[int]]) -> bytes:
    """One block of fields; negative numbers as two's complement."""
    block = bytearray(SIZES[name][1])
    if name == "TQ1_0":
        sums = [0] * 52
        for i, digit in enumerate(fields["q"]):
            byte, place = trit_place(i)
            sums[byte] += digit * 3 ** (4 - place)
        return bytes([-(-v * 256 // 243) for v in sums] + [fields["d"][0] % 256, fields["d"][0] // 256])
    for field, (count, where) in PLACES[name].items():
        for i, number in zip(range(count), fields[field], strict=True):
            for byte, bit, width in where(i):
                block[byte] |= number % 2**width << bit
                number >>= width
    return bytes(block)


def half_bits(x: float) -> int:
    """The bits of the nearest float16."""
    with np.errstate(over="ignore"):
        return int(np.float16(x).view(np.uint16))


def half(bits: int) -> np.float32:
    """A float16 of 16 bits, as float32."""
    return f32(np.uint16(bits).view(np.float16))


def _signed(number: int) -> np.float32:
    return f32(number - 256 if number > 127 else number)


def half_ue4m3(code: int) -> np.float32:
    """Half of a scale of NVFP4."""
    if code == 0x7F:
        return f32(0)
    exponent, mantissa = code // 8 % 16, code % 8
    return f32(math.ldexp(8 + mantissa, exponent - 11) if exponent else math.ldexp(mantissa, -10))


def decode(name: str, block: bytes) -> list[np.float32]:
    """What one block stands for, every operation rounded to float32."""
    fields = read(name, block)
    q = fields["q"]
    if name in ("MXFP4", "NVFP4"):
        scale = (lambda i: f32(math.ldexp(1, fields["e"][0] - 128))) if name == "MXFP4" else (
            lambda i: half_ue4m3(fields["s"][i // 16]))  # fmt: skip
        return [f32(FP4[code]) * scale(i) for i, code in enumerate(q)]
    if name == "Q8_K":
        d = np.uint32(fields["d"][0]).view(f32)
        return [d * _signed(code) for code in q]
    d = half(fields["d"][0])
    if name in ("Q2_K", "Q4_K", "Q5_K"):
        dmin, size = half(fields["dmin"][0]), 16 if name == "Q2_K" else 32
        sub = [(d * f32(sc), dmin * f32(mn)) for sc, mn in zip(fields["sc"], fields["mn"], strict=True)]
        return [sub[i // size][0] * f32(code) - sub[i // size][1] for i, code in enumerate(q)]
    if name in ("Q4_1", "Q5_1"):
        return [d * f32(code) + half(fields["m"][0]) for code in q]
    meaning = {
        "Q4_0": lambda i: d * f32(q[i] - 8),
        "Q5_0": lambda i: d * f32(q[i] - 16),
        "Q8_0": lambda i: d * _signed(q[i]),
        "Q8_1": lambda i: d * _signed(q[i]),
        "Q3_K": lambda i: d * f32(fields["sc"][i // 16] - 32) * f32(q[i] - 4),
        "Q6_K": lambda i: d * _signed(fields["sc"][i // 16]) * f32(q[i] - 32),
        "IQ4_NL": lambda i: d * f32(IQ4[q[i]]),
        "IQ4_XS": lambda i: d * f32(fields["sc"][i // 32] - 32) * f32(IQ4[q[i]]),
        "Q1_0": lambda i: d if q[i] else -d,
    }
    value = meaning.get(name, lambda i: d * f32(q[i] - 1))  # TQ1_0, TQ2_0, Q2_0
    return [value(i) for i in range(len(q))]
