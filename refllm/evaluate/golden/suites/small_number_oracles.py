"""What other software answered for integers and lists of values: hexadecimal codes, one byte each, written down once.

The generator compares them with the definition and refuses to write if they differ.
"""

from refllm.evaluate.golden.build import values
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe
from refllm.evaluate.golden.suites.small_number_definition import middles

_TRUNCATE = ({"rounding": "nearest"}, {"rounding": "toward_zero"})
_WRAP = ({"overflow": "saturate"}, {"overflow": "wrap"})
_LIST = {"NF4": (), "FP4_BNB": ({"fp4_zero": "code_0"}, {"fp4_zero": "code_8"})}
_CODES = {
    ("INT2", "whole"): (
        "00010203000102030001020300010203000102030001020300010203000102030001020300010203"
    ),
    ("INT2", "random"): (
        "000103010001000301010000000001000303000103000000010000000303000003030001000000030100000000000000"
    ),
    ("INT4", "whole"): (
        "0c0d0e0f000102030405060708090a0b0c0d0e0f000102030405060708090a0b0c0d0e0f00010203"
    ),
    ("INT4", "random"): (
        "03020e0f0d0e0d020d0f0e0302020001000d0e020e0f0f0d0103000f0d010200010003000e0e0d01020f0300020e000f"
    ),
    ("NF4", "random"): (
        "0f0100020704020a0c08030b010e0e0e050b06030a010100050f0d010c0e0b030c0d04010e0004080c0d050a010b0c05"
        "010f0a020e0d0e030a0e050f0402060e"
    ),
    ("NF4", "middles"): "0f000102030405060708090a0b0c0d0e",
    ("FP4_BNB", "random"): (
        "030a0b0d090c0a0705060c040a0202020f040e0c070a0a0b0e03050a0503040d05020c0a020b0f0605020e070a04050f"
        "0a03070d0205020c07020e030f0d0e02"
    ),
    ("FP4_BNB", "middles"): "030b0a0d0c0f0e09080106070405020b",
}  # fmt: skip


def answers() -> list[tuple]:
    """(group's head, id, format, comment, flags, x, conventions, those of the other, codes) of each answer."""
    found = []
    for i, ((name, what), text) in enumerate(_CODES.items()):
        whens = _LIST.get(name) or (() if name in _LIST else _WRAP if what == "whole" else _TRUNCATE)
        head = {"params": {"format": name}, "source": _source(name)}
        flags = {"whole": "Clip", "middles": "Midpoint", "random": "Random"}[what]
        comment = f"{head['source']['name']}'s answer, {what}"
        codes = list(bytes.fromhex(text))
        theirs = dict(whens[-1]) if whens else {}
        found.append((head, 2000 + i, name, comment, flags, _numbers(name, what), whens, theirs, codes))
    return found


def _source(name: str) -> dict:
    run = {"kind": "upstream_run"}
    if name in _LIST:
        call = f"quantize_4bit(x, blocksize=64, quant_type={'nf4' if name == 'NF4' else 'fp4'!r})"
        return run | {"name": "bitsandbytes", "version": "0.50.2", "call": call}
    return run | {"name": "ml_dtypes", "version": "0.6.0", "call": f"x.astype(ml_dtypes.{name.lower()})"}


def _numbers(name: str, what: str):
    """x; for bitsandbytes with a 1 in front, so that nothing is scaled."""
    if what == "whole":
        return values("f32", [float(n) for n in range(-20, 20)])
    if what == "middles":
        between = [float(m) for m in middles(name)]
        return values("f32", [1.0, *between, *([-1.0] if len(between) % 2 == 0 else [])])
    if name in _LIST:
        return values("f32", [1.0, *(float(v) for v in dyadic(4250, 24, -23, 63))])
    bits = int(name[3:])
    recipe = (4244 + bits, 12, -10 if name == "INT2" else -9)
    return values("f32", [float(v) for v in dyadic(*recipe, 48)], recipe=dyadic_recipe(*recipe))
