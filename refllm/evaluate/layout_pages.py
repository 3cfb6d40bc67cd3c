"""Pages and pictures of packed layouts, made from their descriptions: docs/formats.

    python -m refllm.evaluate.layout_pages docs/formats

writes one page and one picture a layout and an index. A test compares them with what the code says.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from refllm.formats import dtypes
from refllm.formats.blocks import BLOCKS
from refllm.formats.checkpoints import STORED, Stored
from refllm.formats.files import atomic_write
from refllm.formats.layouts import Digits, Field, Layout

BIT, ROW, ACROSS = 14, 22, 8  # pixels of one bit, of one line of bytes; bytes a line
STRATEGIES = """\
Property tests of a reader or a writer can draw fields and units from the same descriptions, edges included; hypothesis
comes with `pip install 'refllm[test]'`. More in [strategies.py](../../refllm/formats/strategies.py).

```python
import numpy as np
from hypothesis import given
from refllm.formats.blocks import BLOCKS
from refllm.formats.strategies import units_of

@given(units_of(BLOCKS["Q4_0"].layout, finite=True))
def test_my_reader(units):  # (n, 18) uint8
    np.testing.assert_array_equal(my_reader(units), BLOCKS["Q4_0"].decode(units))
```""".splitlines()
COLOURS = ("#a6cee3", "#b2df8a", "#fdbf6f", "#fb9a99", "#cab2d6", "#ffff99", "#8dd3c7", "#d9d9d9")


def picture(layout: Layout) -> str:
    """The bits of one unit as SVG: a strip a byte, its highest bit on the left, a box a piece of a number.

    `q17` is number 17 of field q; `q17:4` the piece of it that begins with its bit 4; one bit shows the number only.
    """
    lines = -(-layout.nbytes // ACROSS)
    across = min(ACROSS, layout.nbytes)
    width, height = 34 + across * (8 * BIT + 6), 18 + lines * ROW
    style = 'font-family="monospace" font-size="9" text-anchor="middle"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {style}>',
        f"<title>{escape(layout.name)}: {layout.nbytes} bytes, {layout.elements} elements</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<g fill="#666">',
        *(_text(_left(column) + 4 * BIT, 12, f"+{column}") for column in range(across)),
        *(_text(16, 32 + line * ROW, str(line * ACROSS)) for line in range(lines)),
        "</g>",
    ]
    pieces = [(field, *piece) for field in layout.fields for piece in _pieces(layout, field)]
    out.append('<g fill="#eee" stroke="#555" stroke-width="0.6">')
    out += [_box(byte, 0, 8) for byte in range(layout.nbytes)]
    for number, field in enumerate(layout.fields):
        out.append(f'<g fill="{COLOURS[number % len(COLOURS)]}">')
        out += [_box(byte, shift, bits) for owner, byte, shift, bits, _ in pieces if owner is field]
        out.append("</g>")
    out.append("</g>")
    out += [_label(byte, shift, bits, label) for _, byte, shift, bits, label in pieces]
    return "\n".join([*out, "</svg>"]) + "\n"


def _left(column: int) -> int:
    return 32 + column * (8 * BIT + 6)


def _text(x: float, y: int, text: str, attributes: str = "") -> str:
    return f'<text x="{x:g}" y="{y}"{attributes}>{escape(text)}</text>'


def _corner(byte: int, shift: int, bits: int) -> tuple[int, int]:
    """Left and upper edge of the box of bits shift .. shift + bits - 1 of a byte."""
    return _left(byte % ACROSS) + (8 - shift - bits) * BIT, 18 + byte // ACROSS * ROW


def _box(byte: int, shift: int, bits: int) -> str:
    x, y = _corner(byte, shift, bits)
    return f'<rect x="{x}" y="{y}" width="{bits * BIT}" height="18"/>'


def _label(byte: int, shift: int, bits: int, label: str) -> str:
    """Text in the middle of a box, smaller if it must be."""
    x, y = _corner(byte, shift, bits)
    size = min(9, int(1.6 * bits * BIT / len(label)))
    return _text(x + bits * BIT / 2, y + 13, label, f' font-size="{size}"' if size < 9 else "")


def _pieces(layout: Layout, field: Field) -> list[tuple[int, int, int, str]]:
    """(byte, shift, bits, label) of every piece of a field; bits of one number that lie side by side are one piece."""
    if isinstance(field.parts, Digits):
        held: dict[int, list[int]] = {}
        for i, (byte, _) in enumerate(layout.digit_places(field.name)):
            held.setdefault(byte, []).append(i)
        return [(byte, 0, 8, f"{field.name}{min(these)},{min(these) + _step(these)}..") for byte, these in held.items()]
    pieces = []
    for i, place in enumerate(layout.positions(field.name).tolist()):
        start = 0
        for k in range(1, len(place) + 1):
            if k == len(place) or place[k] != place[k - 1] + 1 or place[k] % 8 == 0:
                name = f"{field.name}{i}" if field.count > 1 else field.name
                label = name if start == 0 and k == len(place) else f"{name}:{start}"
                label = str(i) if k - start == 1 and field.count > 1 else label  # one bit has room for a number only
                pieces.append((place[start] // 8, place[start] % 8, k - start, label))
                start = k
    return pieces


def _step(these: list[int]) -> int:
    return these[1] - these[0] if len(these) > 1 else 0


def layout_section(layout: Layout) -> list[str]:
    """A layout as Markdown lines: its size, its fields and its picture."""
    unit = f"{_plural(layout.nbytes, 'byte')} hold {_plural(layout.elements, 'element')}"
    rows = [
        f"| `{field.name}` | {field.count} | {_bits(field)} | {field.dtype} | {_where(field)} | {field.text} |"
        for field in layout.fields
    ]
    return [
        f"{unit}: **{layout.bits_per_element:g} bits an element**.",
        "",
        "| field | numbers | bits | type | where number i lies | meaning |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"![bits of {layout.name}](img/{file_name(layout.name)}.svg)",
        "",
    ]


def gguf_page(form) -> str:
    """The page of a GGUF block type."""
    meaning = (sys.modules[form.terms.__module__].__doc__ or "").splitlines()
    formula = [line.strip() for line in meaning if line.strip().startswith(f"{form.name} ")]
    lines = [
        f"# {form.name}",
        "",
        f"GGUF block type {form.type_id}. The rows of a tensor are cut into blocks of {form.block_size}.",
        "",
        *(["```text", *formula, "```", ""] if formula else []),
        *layout_section(form.layout),
        _source(sys.modules[form.terms.__module__]),
    ]
    return "\n".join([*lines, ""])


def checkpoint_page(forms: Sequence[Stored]) -> str:
    """The page of the forms of one checkpoint format."""
    lines = [f"# {forms[0].name}", "", f"Written by {forms[0].source}.", ""]
    drawn: set[str] = set()
    for form in forms:
        lines += [f"## {form.variant}", ""] if form.variant else []
        lines += ["```text", f"weight[o, i] = {form.weight}", "```", "", f"Zero point: {form.zero_point}.", ""]
        lines += ["| tensor | holds | shape | type | packed along | unit | note |", "|---|---|---|---|---|---|---|"]
        for tensor in form.tensors:
            unit = f"[{tensor.layout.name}](#{_anchor(tensor.layout.name)})" if tensor.layout else ""
            shape = ", ".join(tensor.shape)
            kind = "of the scales" if tensor.dtype == "scale" else tensor.dtype
            lines.append(
                f"| `{tensor.name}` | {tensor.holds} | `[{shape}]` | {kind} | {tensor.along} | {unit} | {tensor.note} |"
            )
        lines.append("")
    for tensor in (tensor for form in forms for tensor in form.tensors):
        if tensor.layout and tensor.layout.name not in drawn:
            drawn.add(tensor.layout.name)
            lines += [f"## {tensor.layout.name}", "", *layout_section(tensor.layout)]
    return "\n".join(lines)


def numbers_page() -> str:
    """The page of the small number formats."""
    lines = [
        "# Numbers of 16 bits and fewer",
        "",
        "`refllm.formats.dtypes`: each has `encode` and `decode`. Numbers are exact; `max` is the largest finite one.",
        "",
        "| format | bits | sign, exponent, mantissa | bias | max | least normal | least subnormal | infinity and NaN |",
        "|---|---|---|---|---|---|---|---|",
    ]
    specials = {
        "ieee": "as IEEE 754",
        "fn": "no infinity; NaN: all bits of exponent and mantissa set",
        "fnuz": "no infinity, no -0; NaN: the code of -0",
        "finite": "none",
    }
    for form in dtypes.FLOATS:
        m, low = form.mantissa_bits, 1 - form.bias
        normal, least = f"2^{low}", f"2^{low - m}" if m else "none"
        if not form.has_zero:
            normal = f"2^{-form.bias}"
        parts = f"{int(form.signed)}, {form.exponent_bits}, {m}"
        lines.append(
            f"| {form.name} | {form.bits} | {parts} | {form.bias} | {form.max:.6g} | {normal} | {least} | "
            f"{specials[form.specials]} |"
        )
    lines += ["", "| format | bits | codes |", "|---|---|---|"]
    for form in dtypes.INTEGERS:
        lines.append(f"| {form.name} | {form.bits} | {form.low} to {form.high}, stored as {_stored_as(form)} |")
    for form in dtypes.CODEBOOKS:
        values = ", ".join(f"{float(value):.6g}" for value in form.decode(np.arange(1 << form.bits, dtype=np.uint8)))
        lines.append(f"| {form.name} | {form.bits} | {values} |")
    return "\n".join([*lines, "", _source(dtypes), ""])


def _stored_as(form) -> str:
    return f"the number + {form.offset}" if form.offset else "two's complement"


def index_page() -> str:
    """The index: every layout with its bits per weight."""
    lines = [
        "# Number formats and packed layouts",
        "",
        "Generated by `python -m refllm.evaluate.layout_pages docs/formats` from the descriptions that also pack and",
        "unpack. Bytes are in file order, numbers little-endian, bit 0 is the lowest of a byte; `i` counts the numbers",
        "of a field from 0, `//` and `%` are whole division and remainder. Golden vectors: [golden.md](../golden.md).",
        "",
        *STRATEGIES,
        "",
        "* [Numbers of 16 bits and fewer](numbers.md): floats, integers, NF4",
        "",
        "## GGUF blocks",
        "",
        "| type | id | block | bytes | bits/weight | encoder |",
        "|---|---|---|---|---|---|",
    ]
    for form in BLOCKS.values():
        writes = ("yes, with importance" if form.takes_importance else "yes") if form.encode_fields else "no"
        link = f"[{form.name}](gguf-{file_name(form.name)}.md)"
        sizes = f"{form.block_size} | {form.bytes_per_block} | {form.bits_per_weight:g}"
        lines.append(f"| {link} | {form.type_id} | {sizes} | {writes} |")
    lines += ["", "## Tensors of checkpoints", "", "| format | forms | written by |", "|---|---|---|"]
    for name, forms in _by_name().items():
        variants = "; ".join(form.variant for form in forms if form.variant) or "one"
        lines.append(f"| [{name}]({file_name(name)}.md) | {variants} | {forms[0].source} |")
    return "\n".join([*lines, ""])


def _by_name() -> dict[str, list[Stored]]:
    """The forms of each name, which make a page."""
    pages: dict[str, list[Stored]] = {}
    for form in STORED:
        pages.setdefault(form.name, []).append(form)
    return pages


def pages() -> dict[str, str]:
    """Every file of docs/formats by its path in that folder."""
    files = {"README.md": index_page(), "numbers.md": numbers_page()}
    layouts = {form.layout.name: form.layout for form in BLOCKS.values()}
    for form in BLOCKS.values():
        files[f"gguf-{file_name(form.name)}.md"] = gguf_page(form)
    for name, forms in _by_name().items():
        files[f"{file_name(name)}.md"] = checkpoint_page(forms)
        layouts |= {t.layout.name: t.layout for form in forms for t in form.tensors if t.layout}
    return files | {f"img/{file_name(name)}.svg": picture(layout) for name, layout in layouts.items()}


def write(folder: Path) -> None:
    """Write the pages; files of the folder that are no longer made are removed."""
    made = pages()
    for path in [*folder.glob("*.md"), *folder.glob("img/*.svg")]:
        if path.relative_to(folder).as_posix() not in made:
            path.unlink()
    for name, text in made.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target, "w") as file:
            file.write(text)


def _source(module) -> str:
    path = module.__name__.replace(".", "/")
    path += "/__init__.py" if hasattr(module, "__path__") else ".py"
    return f"Code: [`{path}`](../../{path})."


def _anchor(heading: str) -> str:
    """The anchor that Markdown viewers give a heading."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def file_name(name: str) -> str:
    """Lower case, only letters, digits and hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _bits(field: Field) -> str:
    return "8/5" if isinstance(field.parts, Digits) else str(field.bits)


def _where(field: Field) -> str:
    """The formulas of a field for people."""
    if isinstance(field.parts, Digits):
        return f"base-3 digit `{field.parts.place}` (0 first) of byte `{field.parts.byte}`"
    size = len(field.parts)
    if size > 1 and all(part.width == 1 for part in field.parts):
        return f"a little-endian bit stream, {size} bits a number"
    if size > 1 and all(part.width == 8 for part in field.parts):
        return f"bytes `{field.parts[0].byte}` to `{field.parts[-1].byte}`"
    words = []
    for part in field.parts:
        whole = size == 1
        bits = "" if whole else f"bits {part.low}..{part.low + part.width - 1}: "
        shift = f", from bit `{part.shift}` on" if part.width < 8 else ""
        words.append(f"{bits}byte `{part.byte}`{shift}")
    return "; ".join(words)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
