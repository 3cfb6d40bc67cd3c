"""Results of a benchmark for people: tables, what they were measured on, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from refllm.evaluate.bench.rounds import BUSY
from refllm.evaluate.tables import nbytes, significant, table

FEW = 8  # tokens up to which a product waits for its weights
_UNITS = {"kernels": "GB/s", "decode": "tokens/s", "prefill": "tokens/s", "quantize": "million weights/s"}


def text(result: dict) -> str:
    """Tables of a result of `refllm.evaluate.bench.worker.run`, and two lines on how it was measured."""
    blocks = _TABLES[result["what"]](result)
    return "\n".join([*blocks, *footer(result)])


def footer(result: dict) -> list[str]:
    """Rounds, threads, bandwidth; machine and versions."""
    machine, threads = result["machine"], result["threads"]
    versions = {"Python": machine["python"], **machine["versions"], **result["programs"]}
    bandwidth = result.get("bandwidth_gbytes_per_s")
    facts = [f"medians of {result['rounds']} rounds in turns", f"{threads} thread{'s' if threads > 1 else ''} each"]
    facts += [f"memory read {bandwidth:.1f} GB/s in the same rounds"] if bandwidth else []
    if result.get("busy"):
        facts.append(f"{result['busy']} processor{'s' if result['busy'] > 1 else ''} kept busy on purpose")
    work = result.get("other_work")
    facts += [] if work is None else [f"other work took {work:.0%} of the processors"]
    return [
        ", ".join(facts),
        f"{machine['cpu']}, {machine['cpus']} processors, {machine['system']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
    ]


def noise(result: dict) -> str | None:
    """A warning where other work took so much of the processors that the numbers mean little; else None."""
    work = result.get("other_work")
    wanted = result.get("busy", 0) / result["machine"]["cpus"]
    if work is None or work - wanted <= BUSY:
        return None
    return f"other work took {work:.0%} of the processors while this was measured: repeat it on a quiet machine"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _quartiles(row: dict, scale: float = 1.0) -> str:
    return f"{significant(row['lower'] * scale)}-{significant(row['upper'] * scale)}"


def _peers(rows: Sequence[dict], key: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row[key]))


def _kernels(result: dict) -> list[str]:
    blocks = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if tuple(row["shape"]) == shape]
        peers, tokens = _peers(rows, "x_peers"), rows[0]["tokens"]
        few = tokens <= FEW  # more are bound by arithmetic, not by memory
        header = ["program", "weights", "activations", "size", "median\nus", "quartiles\nus"]
        header += ["GB/s", "of read"] if few else ["GFLOP/s"]
        header += ["x NumPy", *(f"x {peer}" for peer in peers)]
        cells = [
            [
                row["program"],
                row["type"],
                row["detail"],
                nbytes(row["weight_bytes"]),
                significant(row["seconds"] * 1e6),
                _quartiles(row, 1e6),
                *([significant(row["gbytes_per_s"]), f"{row['bandwidth_share']:.0%}"] if few else []),
                *([] if few else [significant(row["gflops"])]),
                _ratio(row["x_numpy"]),
                *(_ratio(row["x_peers"].get(peer)) for peer in peers),
            ]
            for row in rows
        ]
        title = f"{shape[0]}x{shape[1]}, {tokens} token{'s' if tokens > 1 else ''}"
        blocks += [title, table(header, cells, left=3), ""]
    return blocks


def _generation(result: dict) -> list[str]:
    rows, decode = result["rows"], result["what"] == "decode"
    peers = _peers(rows, "ratios")
    header = ["file", "program", "tokens/s", "quartiles", *(["GB/s", "of read"] if decode else []), "same\ntop-1"]
    cells = [
        [
            row["file"],
            " ".join(filter(None, (row["program"], row["detail"]))),
            significant(row["tokens_per_s"]),
            _quartiles(row),
            *([significant(row["gbytes_per_s"]), f"{row['bandwidth_share']:.0%}"] if decode else []),
            f"{row['same_top1']:.0%}",
            *(_ratio(row["ratios"].get(peer)) for peer in peers),
        ]
        for row in rows
    ]
    how = f"written one by one behind {rows[0]['context']} others" if decode else "read at once"
    title = f"{result['what']}: {rows[0]['tokens']} tokens {how}"
    return [title, table([*header, *(f"x {peer}" for peer in peers)], cells, left=2), ""]


def _quantize(result: dict) -> list[str]:
    blocks = []
    encoders = [row for row in result["rows"] if "type" in row]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in encoders):
        rows = [row for row in encoders if tuple(row["shape"]) == shape]
        peers = _peers(rows, "ratios")
        header = ["type", "program", "ms", "quartiles", "Mweights/s", "same\nbytes", "x NumPy"]
        cells = [
            [
                row["type"],
                row["program"],
                significant(row["seconds"] * 1e3),
                _quartiles(row, 1e3),
                significant(row["mweights_per_s"]),
                f"{row['same_bytes']:.2%}",
                _ratio(row["x_numpy"]),
                *(_ratio(row["ratios"].get(peer)) for peer in peers),
            ]
            for row in rows
        ]
        header += [f"x {peer}" for peer in peers]
        blocks += [f"{shape[0]}x{shape[1]} float32 -> GGUF blocks", table(header, cells, left=2), ""]
    recipes = [row for row in result["rows"] if "recipe" in row]
    if recipes:
        cells = [
            [row["recipe"], significant(row["seconds"]), _quartiles(row), significant(row["mweights_per_s"])]
            for row in recipes
        ]
        blocks += [f"compress {recipes[0]['model']}", table(["recipe", "s", "quartiles", "Mweights/s"], cells), ""]
    return blocks


def _bandwidth(result: dict) -> list[str]:
    cells = [[str(row["threads"]), significant(row["gbytes_per_s"]), _quartiles(row)] for row in result["rows"]]
    return [table(["threads", "read GB/s", "quartiles"], cells)]


_TABLES = {
    "kernels": _kernels,
    "decode": _generation,
    "prefill": _generation,
    "quantize": _quantize,
    "bandwidth": _bandwidth,
}


def panels(result: dict) -> list[dict]:
    """What the picture shows, one panel a shape or file.

    Returns
    -------
    list of dict
        title, unit, roof (what reading memory allows, or None), bars: (label, program, value, lower, upper).
    """
    what, found = result["what"], {}
    for row in result["rows"]:
        if what == "kernels":
            many = row["tokens"] > FEW
            title = f"{row['shape'][0]}x{row['shape'][1]}, {row['tokens']} token{'s' if row['tokens'] > 1 else ''}"
            value = row["gflops" if many else "gbytes_per_s"]
            spread = [value * row["seconds"] / row[end] for end in ("upper", "lower")]
            label, roof = f"{row['type']} {row['detail']}", None if many else result["bandwidth_gbytes_per_s"]
            unit = "GFLOP/s" if many else "GB/s of packed weights"
        elif what in ("decode", "prefill"):
            title, label, value, spread = row["file"], row["detail"], row["tokens_per_s"], [row["lower"], row["upper"]]
            roof = 1e9 * result["bandwidth_gbytes_per_s"] / row["weight_bytes"] if what == "decode" else None
            unit = _UNITS[what]
        else:
            title, label = row.get("model") or "x".join(map(str, row["shape"])), row.get("recipe") or row["type"]
            value, roof, unit = row["mweights_per_s"], None, _UNITS[what]
            spread = [value * row["seconds"] / row[end] for end in ("upper", "lower")]
        panel = found.setdefault(title, {"title": title, "unit": unit, "roof": roof, "bars": []})
        program = row.get("program", "refllm")
        panel["bars"].append((f"{program} {label}".strip(), program, value, *spread))
    return list(found.values())


def draw(result: dict, path: str | Path) -> None:
    """Bars with their quartiles, one panel a shape or file; a dashed line where memory alone would stop.

    Parameters
    ----------
    result : dict
        Of kernels, decode, prefill or quantize.
    path : path
        A .png file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from refllm.evaluate.plots import check_target
    from refllm.formats.files import atomic_write

    check_target(path)
    shown = panels(result)
    columns = min(2, len(shown))
    lines = [line for text in footer(result) for line in wrap(text, 80 * columns)]
    height = 0.9 + 0.25 * max(len(panel["bars"]) for panel in shown)  # inches a panel
    figure = Figure(
        figsize=(6.5 * columns, 0.2 * len(lines) + height * -(-len(shown) // columns)), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    programs = list(dict.fromkeys(bar[1] for panel in shown for bar in panel["bars"]))
    grid = figure.subplots(-(-len(shown) // columns), columns, squeeze=False).flat
    for axes, panel in zip(grid, shown, strict=False):
        _bars(axes, panel, programs)
    for axes in [*grid][len(shown) :]:
        axes.remove()
    figure.suptitle("\n".join(lines), fontsize=7)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _bars(axes, panel: dict, programs: list[str]) -> None:
    labels, owners, values, lower, upper = zip(*panel["bars"], strict=True)
    places = range(len(labels))
    errors = [[v - l for v, l in zip(values, lower, strict=True)], [u - v for v, u in zip(values, upper, strict=True)]]
    errors = [[max(0.0, error) for error in side] for side in errors]
    colors = [f"C{programs.index(owner) % 10}" for owner in owners]
    axes.barh(places, values, xerr=errors, color=colors, error_kw={"linewidth": 1})
    for place, value, end in zip(places, values, upper, strict=True):
        axes.annotate(f"  {significant(value)}", (max(value, end), place), fontsize=7, va="center")
    axes.margins(x=0.12)
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    if panel["roof"] is not None:
        axes.axvline(panel["roof"], color="black", linestyle="--", linewidth=1)
    axes.set_xlabel(panel["unit"] + (", dashed: memory read" if panel["roof"] is not None else ""), fontsize=8)
    axes.set_title(panel["title"], fontsize=9)
    axes.grid(True, axis="x", alpha=0.3)
