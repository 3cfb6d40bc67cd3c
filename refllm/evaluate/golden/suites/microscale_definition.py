"""What formats/microscale and formats/nvfp4 expect, block by block in exact fractions."""

from fractions import Fraction

from refllm.evaluate.golden.suites.exact import nearest, to_f32
from refllm.evaluate.golden.suites.number_definition import FORMATS, encode, largest, sign_of, value

MX = {
    "MXFP8_E4M3": "FP8_E4M3FN",
    "MXFP8_E5M2": "FP8_E5M2",
    "MXFP6_E2M3": "FP6_E2M3",
    "MXFP6_E3M2": "FP6_E3M2",
    "MXFP4": "FP4_E2M1",
    "MXINT8": "INT8",
}
RULES = ("floor", "ceil", "rceil", "even")
CONVENTIONS = ("compressed_tensors", "modelopt", "torchao")


def floor_log2(x: Fraction) -> int:
    """The largest k with 2^k <= x."""
    k = x.numerator.bit_length() - x.denominator.bit_length()
    return k if Fraction(2) ** k <= x else k - 1


def element_max(element: str) -> Fraction:
    """The largest element."""
    return Fraction(127, 64) if element == "INT8" else largest(element)


def scale_exponent(amax: Fraction, element: str, rule: str) -> int:
    """s of a block's scale 2^s."""
    if amax == 0:
        return -127
    if rule == "rceil":
        quotient = to_f32(amax / element_max(element))
        s = -127 if quotient == 0 else floor_log2(quotient) + (quotient != Fraction(2) ** floor_log2(quotient))
        return min(max(s, -127), 127)
    k = floor_log2(amax)
    mantissa_bits = 6 if element == "INT8" else FORMATS[element][1]
    if rule == "ceil":
        k += amax != Fraction(2) ** k
    if rule == "even":
        k += amax + Fraction(2) ** (k - mantissa_bits - 1) >= Fraction(2) ** (k + 1)
    return min(max(k - floor_log2(element_max(element)), -127), 127)


def element_code(x: Fraction, minus: bool, element: str, ties: str) -> int:
    """Code of a scaled magnitude and its sign."""
    if element == "INT8":
        below = int(x * 64)
        q = nearest(x * 64, ties) if ties != "zero" else below + (x * 64 - below > Fraction(1, 2))
        q = min(q, 127)
        return (-q if minus else q) % 256
    most = largest(element)
    code = encode(element, float(min(x, most)), ties=ties)
    return code | (sign_of(element) if minus else 0)


def element_value(code: int, element: str) -> Fraction:
    """The number of an element's code."""
    if element == "INT8":
        return Fraction(code - 256 * (code >= 128), 64)
    sign = sign_of(element)
    return value(element, code & ~sign) * (-1 if code & sign else 1)


def mx(rows: list[list[float]], name: str, scale_rule: str = "floor", ties: str = "even") -> dict:
    """codes, scales and decoded numbers of finite rows."""
    element, found = MX[name], {"codes": [], "scales": [], "w_hat": []}
    for row in rows:
        codes, scales, decoded = [], [], []
        for start in range(0, len(row), 32):
            block = row[start : start + 32]
            s = scale_exponent(max(abs(Fraction(x)) for x in block), element, scale_rule)
            scales.append(s + 127)
            for x in block:
                code = element_code(abs(Fraction(x)) / Fraction(2) ** s, _minus(x), element, ties)
                codes.append(code)
                decoded.append(_signed(to_f32(element_value(code, element) * Fraction(2) ** s), code, element))
        for key, part in zip(found, (codes, scales, decoded), strict=True):
            found[key].append(part)
    return found


def nvfp4(rows: list[list[float]], convention: str = "compressed_tensors", ties: str = "even") -> dict:
    """codes, scales, the tensor's scale and decoded numbers of finite rows, every operation rounded to float32."""
    amax = max((abs(Fraction(x)) for row in rows for x in row), default=Fraction(0))
    g = Fraction(1)
    if amax:
        g = to_f32(2688 * to_f32(1 / amax)) if convention == "compressed_tensors" else to_f32(amax / 2688)
    found = {"codes": [], "scales": [], "w_hat": []}
    for row in rows:
        codes, scales, decoded = [], [], []
        for start in range(0, len(row), 16):
            block = [(abs(Fraction(x)), _minus(x)) for x in row[start : start + 16]]
            scale = _nvfp4_scale(max(x for x, _ in block), g, convention)
            scales.append(scale)
            s = value("FP8_E4M3FN", scale)
            step = to_f32(s / g) if convention == "compressed_tensors" else to_f32(s * g)
            for x, minus in block:
                if convention == "torchao":
                    scaled = to_f32(x * to_f32(to_f32(1 / g) / s))
                else:
                    # A step of 0 is only there for what is to become 0: the codes are 0 or the largest.
                    scaled = to_f32(x / step) if step else 6 * Fraction(x > 0)
                code = element_code(scaled, minus, "FP4_E2M1", ties)
                codes.append(code)
                decoded.append(_signed(to_f32(element_value(code, "FP4_E2M1") * step), code, "FP4_E2M1"))
        for key, part in zip(found, (codes, scales, decoded), strict=True):
            found[key].append(part)
    return found | {"global_scale": float(g)}


def _nvfp4_scale(amax: Fraction, g: Fraction, convention: str) -> int:
    """E4M3 code of a block's scale."""
    if convention == "compressed_tensors":
        code = encode("FP8_E4M3FN", float(to_f32(g * to_f32(amax / 6))))
        return code or encode("FP8_E4M3FN", 0.125)
    if convention == "modelopt":
        wanted = to_f32(amax / to_f32(6 * g))
        return encode("FP8_E4M3FN", float(wanted or 1))
    return encode("FP8_E4M3FN", max(float(to_f32(to_f32(amax / 6) / g)), 2.0**-6))


def _minus(x: float) -> bool:
    return str(float(x)).startswith("-")


def _signed(x: Fraction, code: int, element: str) -> float:
    return -0.0 if x == 0 and element != "INT8" and code & sign_of(element) else float(x)
