"""Pictures. Matplotlib is imported when one is drawn, with a backend that needs no screen."""

from collections.abc import Sequence
from pathlib import Path

from refllm.formats.files import atomic_write

_MARKERS = "osD^vP*Xh<>"
_FLOOR = 1e-6  # nats: below it KL is rounding, and a logarithmic axis has no zero


def check_target(path) -> None:
    """Raise where no picture can be written, before anything is measured for it."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"the picture must be a .png file, got {path.name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")


def quality_against_size(rows: Sequence[dict], path) -> None:
    """Two panels over what a row costs: KL to the base (logarithmic), and perplexity; a marker and colour a family.

    The cost is bits per weight. Where questions were asked, it is the bytes of the cache a token, and the second panel
    shows the mean share of answers found.

    Parameters
    ----------
    rows : sequence of dict
        Of `refllm.evaluate.compare.compare`.
    path : path
        A .png file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_target(path)
    asked = all(row.get("recall") for row in rows)
    points = [_point(row, asked) for row in rows]
    figure = Figure(figsize=(13, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    families = list(dict.fromkeys(row["family"] for row in rows))
    for i, family in enumerate(families):
        mine = [point for row, point in zip(rows, points, strict=True) if row["family"] == family]
        style = {"marker": _MARKERS[i % len(_MARKERS)], "color": f"C{i % 10}", "linestyle": "none", "label": family}
        costs, *heights = zip(*mine, strict=True)
        for axes, values in zip((left, right), heights, strict=True):
            axes.plot(costs, values, **style)
    left.set_yscale("log")
    left.set_ylabel("KL to the base, nats per token (1e-6 and less drawn at 1e-6)")
    perplexities = [row["perplexity"] for row in rows]
    if not asked and max(perplexities) > 10 * min(perplexities):
        right.set_yscale("log")
    right.set_ylabel("share of questions answered" if asked else "perplexity")
    left.legend(title="family", fontsize=9)
    weights = "bits per weight, everything stored, embedding included"
    cache = "bytes of the cache a token, host memory left out"
    for axes in (left, right):
        axes.set_xlabel(cache if asked else weights)
        axes.grid(True, alpha=0.3)
        axes.margins(x=0.12, y=0.08)
    figure.draw_without_rendering()  # the layout is final before labels are placed in it
    names = [row["recipe"] for row in rows]
    for axes, which in ((left, 1), (right, 2)):
        _label(axes, [(point[0], point[which], name) for point, name in zip(points, names, strict=True)])
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _point(row: dict, asked: bool) -> tuple[float, float, float]:
    """Cost, KL, and perplexity or the share of answers found."""
    divergence = max(row["kl_to_base"], _FLOOR)
    if not asked:
        return row["bits_per_weight"], divergence, row["perplexity"]
    found = row["recall"].values()
    return row["cache_bytes"]["device_bytes_per_token"], divergence, sum(found) / len(found)


def _label(axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Name every point; labels that would cover each other move up, one line each."""
    pixels = axes.transData.transform
    taken: list[tuple[float, float]] = []
    for *point, name in sorted(points):
        x, y = pixels(point)
        shift = 0.0
        while any(abs(x - a) < 190 and abs(y + shift - b) < 13 for a, b in taken):
            shift += 4.0
        taken.append((x, y + shift))
        right_half = x > axes.bbox.x0 + 0.6 * axes.bbox.width
        axes.annotate(
            name, point, xytext=(-6 if right_half else 6, shift * 72 / axes.figure.dpi), fontsize=7.5,
            textcoords="offset points", ha="right" if right_half else "left", va="center",
        )  # fmt: skip
