"""Pictures. Matplotlib is imported when one is drawn, with a backend that needs no screen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refllm.formats.files import atomic_write

_MARKERS = "osD^vP*Xh<>"
_FLOOR = 1e-6  # nats: below it KL is rounding, and a logarithmic axis has no zero
_CEILING = 20  # times the smallest perplexity: what lies above is drawn there, or the rest would lie in a line
_NAMES = 12  # points that have their names beside them; more have numbers
_MARKER = 5  # half the width of a marker, in pixels
_AROUND = (0, 180, 90, 270, 45, 315, 135, 225)  # degrees at which a label is tried: to the right first


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
    from matplotlib.ticker import LogFormatter

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
        style = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 5, "color": f"C{i % 10}", "linestyle": "none"}
        costs, *heights = zip(*mine, strict=True)
        for axes, values in zip((left, right), heights, strict=True):
            axes.plot(costs, values, label=family, **style)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4 if listed else 3, fontsize=9)
    left.set_yscale("log")
    left.set_ylabel(f"KL to the base, nats per token ({floor:.1g} and less drawn there)")
    right.set_ylabel("share of questions answered" if asked else "perplexity")
    if not asked and max(row["perplexity"] for row in rows) > ceiling / 2:
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter(LogFormatter())
        right.set_ylabel(f"perplexity ({ceiling:.3g} and more drawn there)")
    weights = "bits per weight, everything stored, embedding included"
    cache = "bytes of the cache a token, host memory left out"
    for axes in (left, right):
        axes.set_xlabel(cache if asked else weights)
        axes.grid(True, alpha=0.3)
        axes.margins(x=0.12, y=0.08)
        if not asked and max(costs := [point[0] for point in points]) > 2.5 * min(costs):
            _doubling(axes, costs)
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
        _label(axes, [(point[0], point[which]) for point in points], names)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _point(row: dict, asked: bool, floor: float, ceiling: float) -> tuple[float, float, float]:
    """Cost, KL or the floor, and perplexity or the ceiling, or the share of answers found."""
    divergence = max(row["kl_to_base"], floor)
    if not asked:
        return row["bits_per_weight"], divergence, min(row["perplexity"], ceiling)
    found = row["recall"].values()
    return row["cache_bytes"]["device_bytes_per_token"], divergence, sum(found) / len(found)


def _doubling(axes, costs: Sequence[float]) -> None:
    """A logarithmic axis with ticks that say bits: most methods lie between 2 and 8, the base at 16 or 32."""
    axes.set_xscale("log", base=2)
    ticks = [bits for bits in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32) if min(costs) / 1.3 < bits < max(costs) * 1.3]
    axes.set_xticks(ticks, [str(bits) for bits in ticks])
    axes.set_xticks([], minor=True)


def _label(axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Name every point: beside it, or with a line to the nearest place where nothing is covered."""
    at = axes.transData.transform(points)
    covered = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in at]
    for i in np.lexsort(at.T[::-1]):
        label = axes.annotate(
            names[i], points[i], xytext=(0, 0), fontsize=7.5, textcoords="offset pixels", ha="center", va="center",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        label.set_in_layout(False)  # or many labels would leave no room for the panels
        extent = label.get_window_extent()
        size = np.array([extent.width, extent.height]) / 2
        away, box = _free(at[i], size, np.array(covered), axes.bbox)
        label.xyann = tuple(box[:2] + size - at[i])
        label.arrow_patch.set_visible(away > 0)
        covered.append(tuple(box))


def _free(point: np.ndarray, size: np.ndarray, covered: np.ndarray, panel) -> tuple[int, np.ndarray]:
    """Pixels to the nearest place for a box of half-width and half-height `size`, and the box [x0, y0, x1, y1].

    0 pixels is right beside the marker. A panel without room gets the box there, whatever it covers.
    """
    for away in range(0, 400, 4):
        for degrees in _AROUND if away == 0 else range(0, 360, 15):
            direction = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
            centre = point + direction * (size + _MARKER + 1 + away)
            box = np.concatenate([centre - size, centre + size])
            apart = (box[:2] >= covered[:, 2:]) | (box[2:] <= covered[:, :2])
            inside = (box[:2] > panel.min).all() and (box[2:] < panel.max).all()
            if inside and apart.any(axis=1).all():
                return away, box
    return 0, np.concatenate([point - size, point + size])
