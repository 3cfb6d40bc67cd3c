"""Tables for a terminal: aligned columns, units in the header, made for lines of about 120 characters."""

from collections.abc import Sequence
from math import isfinite


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align columns; the first `left` to the left, the others to the right. Header cells may hold line breaks.

    Examples
    --------
    >>> print(table(["name", "bits"], [["a", "4"], ["long", "16"]]))
    name  bits
    ----------
    a        4
    long    16
    """
    heads = [cell.split("\n") for cell in header]
    depth = max(map(len, heads))
    heads = [[""] * (depth - len(head)) + head for head in heads]  # header cells stand at the bottom
    lines = [list(line) for line in zip(*heads, strict=True)]
    widths = [max(len(line[i]) for line in [*lines, *rows]) for i in range(len(header))]
    show = lambda cells: "  ".join(
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([*map(show, lines), rule, *map(show, rows)])


def nbytes(count: float | None) -> str:
    """Bytes in decimal units: 1.05 MB, 98.4 MB, 512 B.

    Examples
    --------
    >>> nbytes(1_048_576), nbytes(512), nbytes(None)
    ('1.05 MB', '512 B', '-')
    """
    if count is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{significant(count / size)} {unit}"
    return f"{count:.0f} B"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent between 0.0001 and a million.

    Examples
    --------
    >>> significant(1234.5), significant(0.01234), significant(0), significant(float("nan"))
    ('1,234', '0.0123', '0', '-')
    """
    if value is None or not isfinite(value):
        return "inf" if value == float("inf") else "-"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])  # of the rounded number: 9.999 becomes 10.0
    if exponent >= 0:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}"
    return f"{value:.{digits}g}"


def compare_table(result: dict) -> str:
    """The rows of `refllm.evaluate.compare.compare` for people, and how they were measured."""
    header = [
        "recipe", "bits/\nweight", "weights", "peak\nmemory", "KV bytes\n/token", "prefill\ntok/s", "decode\ntok/s",
        "perplexity", "KL,\nnats", "same\ntop-1",
    ]  # fmt: skip
    rows = [
        [
            row["recipe"],
            f"{row['bits_per_weight']:.2f}",
            nbytes(row["weight_bytes"]),
            nbytes(row["peak_rss_bytes"]),
            f"{row['kv_bytes_per_token']:,.0f}",
            significant(row["prefill_tokens_per_s"]),
            significant(row["decode_tokens_per_s"]),
            significant(row["perplexity"], 4),
            f"{row['kl_to_base']:.4f}",
            f"{100 * row['top1_agreement']:.1f}%",
        ]
        for row in result["rows"]
    ]
    tasks = list(next((row["recall"] for row in result["rows"] if "recall" in row), {}))
    if tasks:
        header += [f"{task.rsplit('/', 1)[-1]}\nrecall" for task in tasks]
        header += ["stored\n/token", "on device\n/token", "fetched\n/step"]
        for cells, row in zip(rows, result["rows"], strict=True):
            cells += [f"{100 * row['recall'][task]:.1f}%" for task in tasks]
            cells += [f"{count:,.0f}" for count in row["cache_bytes"].values()]
    note = (
        f"protocol {result['protocol']}: {result['tokens_scored']:,} tokens scored in windows of {result['window']}, "
        f"KL and top-1 against the uncompressed model\n"
        f"speed: {result['prompt_tokens']} tokens read, {result['new_tokens']} written, batch 1, "
        f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}, {result['activations']} activations"
    )
    if tasks:
        note += "\nrecall: questions answered, and bytes of the cache when the answer is written"
    return f"{table(header, rows)}\n{note}"
