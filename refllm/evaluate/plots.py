"""Pictures. Matplotlib is imported when one is drawn, with a backend that needs no screen."""

from collections.abc import Sequence
from pathlib import Path

from refllm.formats.files import atomic_write

_MARKERS = "osD^vP*Xh<>"
_FLOOR = 1e-6  # nats: below it KL is rounding, and a logarithmic axis has no zero
_CEILING = 20  # times the smallest perplexity: what lies above is drawn there, or the rest would lie in a line
_NAMES = 24  # points that have their names beside them; more have numbers


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
    shows the mean share of answers found. Many points have numbers, and a list beside them says which recipes they are.

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
    floor = min((row["kl_to_base"] for row in rows if row["kl_to_base"] > 2 * _FLOOR), default=2 * _FLOOR) / 2
    ceiling = _CEILING * min(row["perplexity"] for row in rows)
    points, listed = [_point(row, asked, floor, ceiling) for row in rows], len(rows) > _NAMES
    figure = Figure(figsize=(20 if listed else 13, 8 if listed else 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right, *beside = figure.subplots(1, 3 if listed else 2)
    for i, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
        mine = [point for row, point in zip(rows, points, strict=True) if row["family"] == family]
        style = {"marker": _MARKERS[i % len(_MARKERS)], "color": f"C{i % 10}", "linestyle": "none", "label": family}
        costs, *heights = zip(*mine, strict=True)
        for axes, values in zip((left, right), heights, strict=True):
            axes.plot(costs, values, **style)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4 if listed else 3, fontsize=9)
    left.set_yscale("log")
    left.set_ylabel(f"KL to the base, nats per token ({floor:.1g} and less drawn there)")
    right.set_ylabel("share of questions answered" if asked else "perplexity")
    if not asked and max(row["perplexity"] for row in rows) > ceiling / 2:
        right.set_yscale("log")
        right.set_ylabel(f"perplexity ({ceiling:.3g} and more drawn there)")
    weights = "bits per weight, everything stored, embedding included"
    cache = "bytes of the cache a token, host memory left out"
    for axes in (left, right):
        axes.set_xlabel(cache if asked else weights)
        axes.grid(True, alpha=0.3)
        axes.margins(x=0.12, y=0.08)
    names = [row["recipe"] for row in rows]
    if listed:
        numbers = [str(number) for number in range(1, len(names) + 1)]
        lines = [f"{number:>3} {name}" for number, name in zip(numbers, names, strict=True)]
        size = min(8.0, 480 / len(lines))
        lines = beside[0].text(0, 1, "\n".join(lines), fontsize=size, family="monospace", va="top", linespacing=1.15)
        lines.set_in_layout(False)
        beside[0].set_axis_off()
        names = numbers
    figure.draw_without_rendering()  # the layout is final before labels are placed in it
    for axes, which in ((left, 1), (right, 2)):
        places = [(point[0], point[which], name) for point, name in zip(points, names, strict=True)]
        _label(axes, places, width=18 if listed else 190)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _point(row: dict, asked: bool, floor: float, ceiling: float) -> tuple[float, float, float]:
    """Cost, KL or the floor, and perplexity or the ceiling, or the share of answers found."""
    divergence = max(row["kl_to_base"], floor)
    if not asked:
        return row["bits_per_weight"], divergence, min(row["perplexity"], ceiling)
    found = row["recall"].values()
    return row["cache_bytes"]["device_bytes_per_token"], divergence, sum(found) / len(found)


def _label(axes, points: Sequence[tuple[float, float, str]], width: float) -> None:
    """Name every point; labels, so many pixels wide, that would cover each other move away, on a line."""
    pixels = axes.transData.transform
    taken: list[tuple[float, float]] = []
    for *point, name in sorted(points):
        x, y = pixels(point)
        beside = [b for a, b in taken if abs(x - a) < width]
        heights = (y + shift for step in range(200) for shift in (4.0 * step, -4.0 * step))
        inside = (at for at in heights if axes.bbox.y0 < at < axes.bbox.y1)
        shift = next((at for at in inside if all(abs(at - b) >= 13 for b in beside)), y) - y
        taken.append((x, y + shift))
        right_half = x > axes.bbox.x0 + 0.6 * axes.bbox.width
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0} if shift else None
        label = axes.annotate(
            name, point, xytext=(-6 if right_half else 6, shift * 72 / axes.figure.dpi), fontsize=7.5,
            textcoords="offset points", ha="right" if right_half else "left", va="center", arrowprops=line,
        )  # fmt: skip
        label.set_in_layout(False)  # or many labels would leave no room for the panels
