"""The suite formats/bitsandbytes. Ids are never reused: packing 1.., reading the same 101.., rejected 301.."""

import itertools
import json
from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, SuiteSpec
from refllm.evaluate.golden.suites import checkpoint_notes, checkpoint_oracles
from refllm.evaluate.golden.suites.checkpoint_definition import (
    SOURCE,
    case,
    checked,
    head,
    invalid,
    random_codes,
    random_scales,
)
from refllm.evaluate.golden.suites.exact import to_f32

HEADER = [
    "Params: direction (pack, unpack), quant_type (nf4, fp4, int8), blocksize, double_quant, dtype (only noted).",
    "nf4, fp4, pack: inputs codes u8 [out, in], scale f32 [blocks], the largest magnitude of each block of `blocksize` "
    "codes of the row-major weight, and for double_quant offset f32 [1]. Outputs are the tensors that bitsandbytes "
    "serialises: weight u8 [ceil(n / 2), 1], the first code of a pair in the high nibble; absmax f32 [blocks]; "
    "quant_map "
    "f32 [16]; quant_state, the bytes of the JSON text.",
    "double_quant: absmax is u8 codes, and nested_absmax f32 [ceil(blocks / 256)] and nested_quant_map f32 [256] come "
    "with it. c = scale - offset; nested_absmax = the largest |c| of 256; a code is the number of middles of "
    "neighbouring "
    "values of the map below c (1 / nested_absmax), every operation in float32; nested_absmax counts as at least "
    "1e-38.",
    "unpack: the stored tensors -> codes, scale f32 [blocks], w_hat f32 [out, in] = quant_map[code] scale.",
    "int8: weight i8 [out, in] and SCB f32 [out] on both sides; unpack gives codes i8, scale f32 [out] and w_hat = "
    "(code "
    "SCB) (1/127), each product rounded to float32, 1/127 being the nearest float32.",
    "Names: the files have them behind the weight's name, as weight.absmax; quant_state is "
    "weight.quant_state.bitsandbytes__nf4 or __fp4.",
]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(float(to_f32(Fraction(x) / 12)) for x in (0, Fraction(1, 16), 8, 12, 4, 6, 2, 3))
TABLES = {"nf4": NF4, "fp4": FP4 + tuple(-x + 0.0 for x in FP4)}


def dynamic_map() -> list[float]:
    """The 256 values: middles of 2^i parts of 0.1 .. 1, times 10^(i - 6), both signs; 0 and 1."""
    f32 = lambda x: to_f32(Fraction(x))
    first = f32(0.1)
    found = [Fraction(0), Fraction(1)]
    for i in range(7):
        n = 1 + (1 << i)
        step = to_f32(to_f32(1 - first) / (n - 1))
        edges = [to_f32(first + step * k) if k < n // 2 else to_f32(1 - step * (n - 1 - k)) for k in range(n)]
        for a, b in itertools.pairwise(edges):
            value = to_f32(f32(10.0 ** (i - 6)) * to_f32(to_f32(a + b) / 2))
            found += [value, -value]
    return [float(x) for x in sorted(found)]


def double(scale: list[float], offset: float) -> tuple[list[int], list[float]]:
    """Codes of scales, and the scales of blocks of 256."""
    table = [Fraction(x) for x in dynamic_map()]
    middles = [to_f32(to_f32(a + b) / 2) for a, b in itertools.pairwise(table)]
    codes, nested = [], []
    for start in range(0, len(scale), 256):
        centred = [to_f32(Fraction(s) - Fraction(offset)) for s in scale[start : start + 256]]
        amax = max(abs(c) for c in centred)
        inverse = to_f32(1 / max(amax, to_f32(Fraction(1e-38))))
        codes += [sum(m < to_f32(c * inverse) for m in middles) for c in centred]
        nested.append(float(amax))
    return codes, nested


def _stored(codes, scale, quant_type, blocksize, offset, dtype) -> dict:
    flat = [code for row in codes for code in row]
    filled = flat + [TABLES[quant_type].index(0.0)] * (len(flat) % 2)
    state = {"quant_type": quant_type, "blocksize": blocksize, "dtype": dtype, "shape": [len(codes), len(codes[0])]}
    found = {
        "weight": ("u8", [[16 * filled[i] + filled[i + 1]] for i in range(0, len(filled), 2)]),
        "quant_map": ("f32", list(TABLES[quant_type])),
    }
    if offset is None:
        found["absmax"] = ("f32", scale)
    else:
        absmax, nested = double(scale, offset)
        found |= {
            "absmax": ("u8", absmax),
            "nested_absmax": ("f32", nested),
            "nested_quant_map": ("f32", dynamic_map()),
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    return found | {"quant_state": ("u8", list(json.dumps(state).encode()))}


def _decoded_scale(tensors: dict, offset: float | None) -> list[float]:
    if offset is None:
        return tensors["absmax"][1]
    table, nested = dynamic_map(), tensors["nested_absmax"][1]
    product = lambda b, code: to_f32(Fraction(table[code]) * Fraction(nested[b // 256]))
    return [float(to_f32(product(b, code) + Fraction(offset))) for b, code in enumerate(tensors["absmax"][1])]


def _four(
    id, comment, flags, codes, scale, *, quant_type="nf4", blocksize=64, offset=None, dtype="float16", state=False
):
    """Both directions of one weight; packing is asked for the JSON text only where `state`."""
    tensors = _stored(codes, scale, quant_type, blocksize, offset, dtype)
    params = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": offset is not None, "dtype": dtype}
    given = {
        "codes": ("u8", codes),
        "scale": ("f32", scale),
        "offset": ("f32", [offset]) if offset is not None else None,
    }
    expected = tensors if state else {name: t for name, t in tensors.items() if name != "quant_state"}
    decoded, columns = _decoded_scale(tensors, offset), len(codes[0])
    value = lambda o, i: Fraction(TABLES[quant_type][codes[o][i]]) * Fraction(decoded[(o * columns + i) // blocksize])
    w_hat = [[float(to_f32(value(o, i))) for i in range(columns)] for o in range(len(codes))]
    read = {"codes": ("u8", codes), "scale": ("f32", decoded), "w_hat": ("f32", w_hat)}
    return [
        case(id, comment, flags, {"direction": "pack"} | params, given, expected),
        case(100 + id, comment, flags, {"direction": "unpack"} | params, tensors, read),
    ]


def _int8(id, comment, flags, codes, scale) -> list[CaseSpec]:
    tensors = {"weight": ("i8", codes), "SCB": ("f32", scale)}
    given = {"codes": ("i8", codes), "scale": ("f32", scale)}
    step = to_f32(Fraction(1, 127))
    value = lambda o, code: float(to_f32(to_f32(Fraction(code) * Fraction(scale[o])) * step))
    w_hat = ("f32", [[value(o, code) for code in row] for o, row in enumerate(codes)])
    return [
        case(id, comment, flags, {"direction": "pack", "quant_type": "int8"}, given, tensors),
        case(
            100 + id, comment, flags, {"direction": "unpack", "quant_type": "int8"}, tensors, given | {"w_hat": w_hat}
        ),
    ]


def _layout() -> list[CaseSpec]:
    every = [list(range(8)), list(range(8, 16))]
    spread = lambda rows, columns: [[(5 * i + 3 * o) % 16 for i in range(columns)] for o in range(rows)]
    return [
        *_four(1, "nf4: codes in order", "NibbleOrder Tables", every, [1.0]),
        *_four(2, "fp4: codes in order", "NibbleOrder Tables", every, [1.0], quant_type="fp4"),
        *_four(3, "blocks of 4, rows of 6: blocks across rows, the last one short", "BlocksAcrossRows GroupBoundary",
               spread(3, 6), [1.0, 8.0, 64.0, 512.0, 4096.0], blocksize=4),
        *_four(4, "2 x 128 in blocks of 64", "GroupBoundary", spread(2, 128), [1.0, 16.0, 0.25, 3.0]),
        *_four(5, "nf4: 5 codes", "OddSize", [[1, 2, 3, 4, 5]], [2.0]),
        *_four(6, "fp4: 3 x 3 codes", "OddSize BlocksAcrossRows", spread(3, 3), [2.0, 0.5, 1.0], quant_type="fp4",
               blocksize=4),
        *_four(7, "the JSON text", "State", every, [1.0], dtype="bfloat16", state=True),
        *_four(8, "double quantisation: four scales", "DoubleQuant", spread(4, 8), [1.0, 3.0, 2.0, 2.5], blocksize=8,
               offset=2.0, state=True),
        *_four(9, "double quantisation: all scales equal", "DoubleQuant", spread(2, 8), [0.75, 0.75], blocksize=8,
               offset=0.75),
        *_four(10, "double quantisation: 300 scales, two blocks of them", "DoubleQuant DynamicMap", spread(10, 60),
               [1 + ((37 * b) % 300) / 256 + (b > 255) for b in range(300)], blocksize=2, offset=1.5),
        *_int8(21, "-127, 127, 0 and 1", "RowScale GroupBoundary", [[127, -127, 0, 1], [1, 2, -3, 64]], [2.5, 0.3125]),
        *_int8(22, "products that round twice", "RowScale", [[c * 9 - 120 for c in range(27)]],
               [float.fromhex("0x1.23456p+1")]),
    ]  # fmt: skip


def _rejected() -> list[CaseSpec]:
    codes, scale = [[1, 2, 3, 4]], [1.0]
    fine = {"codes": ("u8", codes), "scale": ("f32", scale)}
    pack = {"direction": "pack", "quant_type": "nf4", "blocksize": 64, "double_quant": False, "dtype": "float16"}
    unpack = pack | {"direction": "unpack"}
    tensors = _stored(codes, scale, "nf4", 64, None, "float16")
    text = lambda state: {"quant_state": ("u8", list(state.encode()))}
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [1, 4]}
    return [
        invalid(301, "the code 16", "OutOfRange", pack, fine | {"codes": ("u8", [[16, 0]])}),
        invalid(302, "two scales for one block", "BadShape", pack, fine | {"scale": ("f32", [1.0, 1.0])}, "shape"),
        invalid(303, "a NaN scale", "NonFinite", pack, fine | {"scale": ("f32", [float("nan")])}),
        invalid(304, "quant_type int4", "BadParams", pack | {"quant_type": "int4"}, fine),
        invalid(305, "blocksize 0", "BadParams", pack | {"blocksize": 0}, fine),
        invalid(306, "one byte short", "BadShape", unpack, tensors | {"weight": ("u8", [[0x12]])}, "shape"),
        invalid(307, "absmax of two blocks", "BadShape", unpack, tensors | {"absmax": ("f32", [1.0, 1.0])}, "shape"),
        invalid(308, "quant_map of 15 values", "BadShape", unpack, tensors | {"quant_map": ("f32", list(NF4[:15]))},
                "shape"),
        invalid(309, "the JSON text is cut off", "State", unpack, tensors | text(json.dumps(state)[:-1]), "malformed"),
        invalid(310, "the JSON text lacks blocksize", "State", unpack,
                tensors | text(json.dumps({k: v for k, v in state.items() if k != "blocksize"})), "malformed"),
        invalid(311, "the JSON text names another shape", "State", unpack,
                tensors | text(json.dumps(state | {"shape": [1, 9]})),
                "malformed"),
        invalid(312, "SCB of two rows", "BadShape", {"direction": "unpack", "quant_type": "int8"},
                {"weight": ("i8", [[1, 2]]), "SCB": ("f32", [1.0, 2.0])}, "shape"),
    ]  # fmt: skip


def suite() -> SuiteSpec:
    """The suite formats/bitsandbytes."""
    groups = [({"params": {}, "source": SOURCE}, _layout())]
    for id, quant_type in ((51, "nf4"), (52, "fp4")):
        codes = random_codes(900 + id, 12, 33, 4)
        scale = [s for row in random_scales(950 + id, 1, 25) for s in row]
        cases = _four(id, "12 x 33 in blocks of 16", "Random", codes, scale, quant_type=quant_type, blocksize=16)
        frozen = checkpoint_oracles.matches(quant_type, cases[1], ("w_hat",))
        groups.append(({"params": {}, "source": checked(frozen, *checkpoint_oracles.CALLS["bitsandbytes"])}, cases))
    cases = _int8(61, "6 x 20", "Random", [[z - 128 for z in row] for row in random_codes(999, 6, 20, 8)],
                  [s for row in random_scales(998, 1, 6) for s in row])  # fmt: skip
    frozen = checkpoint_oracles.matches("int8", cases[1], ("w_hat",))
    groups.append(({"params": {}, "source": checked(frozen, *checkpoint_oracles.CALLS["int8"])}, cases))
    groups.append(({"params": {}, "source": SOURCE}, _rejected()))
    title = "bitsandbytes checkpoints: NF4, FP4 with double quantisation, int8, to and from the serialised tensors"
    return SuiteSpec(
        head("bitsandbytes", title, HEADER, "checkpoint_bitsandbytes"), checkpoint_notes.BITSANDBYTES, groups
    )
