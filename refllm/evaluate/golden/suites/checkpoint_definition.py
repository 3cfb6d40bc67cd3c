"""What the suites of checkpoint formats expect: words from Python integers, weights from exact fractions.

A matrix is a list of rows. A line of codes becomes one large integer, which is cut into words.
"""

from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, values
from refllm.evaluate.golden.suites.exact import splitmix64, to_f32

BITS = {"class": "bits"}
ANY_ZERO = {"class": "bits", "zero_sign": "ignore"}
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
SOURCE = {"kind": "first_principles", "name": "the header above, in Python integers and exact fractions"}


def words(codes: list[int], bits: int, size: int = 32, per_word: int | None = None) -> list[int]:
    """Codes, low bits first, as words of `size` bits: one stream, or `per_word` codes in each word and a gap behind.

    Examples
    --------
    >>> [hex(w) for w in words([0, 1, 2, 3, 4, 5, 6, 7, 8], 4)]
    ['0x76543210', '0x8']
    """
    if per_word:
        parts = [codes[i : i + per_word] for i in range(0, len(codes), per_word)]
        return [word for part in parts for word in words(part, bits, size)]
    number = 0
    for i, code in enumerate(codes):
        number |= code << (bits * i)
    count = -(-len(codes) * bits // size)
    return [number >> (size * w) & ((1 << size) - 1) for w in range(count)]


def signed(word: int, size: int = 32) -> int:
    """The two's complement number with these bits."""
    return word - (1 << size) if word >> (size - 1) else word


def transposed(rows: list[list]) -> list[list]:
    """Columns as rows."""
    return [list(column) for column in zip(*rows, strict=True)]


def line_words(rows: list[list[int]], bits: int, per_word: int | None = None) -> list[list[int]]:
    """Each row as signed 32-bit words."""
    return [[signed(word) for word in words(row, bits, per_word=per_word)] for row in rows]


def awq_words(row: list[int]) -> list[int]:
    """Eight codes a word, nibble n holding code AWQ[n]."""
    eights = [row[i : i + 8] for i in range(0, len(row), 8)]
    return [signed(words([eight[n] for n in AWQ], 4)[0]) for eight in eights]


def weights(codes, scale, zero, g_idx, middle: int = 0) -> list[list[float]]:
    """scale (code - zero point), each product rounded to float32 once; zero None: `middle` everywhere."""
    found = []
    for o, row in enumerate(codes):
        line = []
        for i, code in enumerate(row):
            g = g_idx[i]
            z = middle if zero is None else zero[o][g]
            line.append(float(to_f32(Fraction(scale[o][g]) * (code - z))))
        found.append(line)
    return found


def even_groups(columns: int, groups: int) -> list[int]:
    """The group of each column, all equally long."""
    return [i // (columns // groups) for i in range(columns)]


def random_codes(seed: int, rows: int, columns: int, bits: int, low: int = 0) -> list[list[int]]:
    """The top bits of SplitMix64, those below `low` replaced by it."""
    flat = [max(z >> (64 - bits), low) for z in splitmix64(seed, rows * columns)]
    return [flat[r * columns : (r + 1) * columns] for r in range(rows)]


def random_scales(seed: int, rows: int, columns: int) -> list[list[float]]:
    """Float16 numbers between 1/64 and 1/8, exact."""
    flat = [(1024 + (z >> 54)) / 2.0 ** (14 + i % 3) for i, z in enumerate(splitmix64(seed, rows * columns))]
    return [flat[r * columns : (r + 1) * columns] for r in range(rows)]


def case(id: int, comment: str, flags: str, params: dict, inputs: dict, expected: dict, result="valid") -> CaseSpec:
    """A case from {name: (dtype, nested numbers)}; an expected value may also be an Output, None is left out."""
    made = {}
    for name, given in expected.items():
        if given is not None:
            output = (
                Output(ANY_ZERO if name == "w_hat" else BITS, values(*given)) if isinstance(given, tuple) else given
            )
            made[name] = output
    return CaseSpec(id, comment, tuple(flags.split()), arrays(inputs), made, result, params=params)


def variants(dtype: str, name: str, nested: dict, compare: dict = BITS) -> Output:
    """An output that depends on a convention: {value of the convention: nested numbers}, refllm's own first."""
    return Output(compare, variants=tuple(({name: word}, values(dtype, rows)) for word, rows in nested.items()))


def arrays(inputs: dict) -> dict:
    """{name: (dtype, nested)} as values, None left out."""
    return {name: values(*given) for name, given in inputs.items() if given is not None}


def invalid(id: int, comment: str, flags: str, params: dict, inputs: dict, error: str = "value") -> CaseSpec:
    """A case that must be rejected."""
    return CaseSpec(id, comment, tuple(flags.split()), arrays(inputs), result="invalid", error=error, params=params)


def head(name: str, title: str, header: list[str], module: str) -> dict:
    """The head of a manifest."""
    return {
        "suite": f"formats/{name}",
        "suite_version": "1.0.0",
        "lesson": "lessons/05-packed-layouts.md",
        "op": f"formats.{name}",
        "title": title,
        "header": header,
        "generator": {"name": f"refllm golden regen, suites/{module}.py", "version": "1"},
    }


def checked(frozen: bool, oracle: str, version: str, call: str) -> dict:
    """The source of a group whose expected values another program gave, too.

    Raises
    ------
    ValueError
        The answers that were written down differ from the definition.
    """
    if not frozen:
        raise ValueError(f"what {oracle} {version} answered differs from the definition: {call}")
    return SOURCE | {"cross_checked": [{"oracle": oracle, "version": version, "agreement": "bit_exact", "note": call}]}
