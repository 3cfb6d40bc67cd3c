"""EXL2's mixes of widths within one matrix: which there are, how columns are cut, how a group is fitted and rounded.

A mix is written "6@5/32 3@20/64 2/64": 6 bits in groups of 32 for the 5 % of columns with the largest inputs, 3 bits in
groups of 64 for the next 20 %, 2 bits in groups of 64 for the rest. Whole groups are taken until a share is reached.
"""

import math
from dataclasses import dataclass

import numpy as np

from refllm.kernels.obs import obs_sweep
from refllm.kernels.packed.records import ColumnGroups, Reordered, as_float

DAMP = 0.12
LEVELS = 16
POWER_STEPS = 96  # of p, from 0.70 to 1.20
TINY = np.float16(2.0**-24)

# Options for q and k, v, o of a layer; and for gate, up, down. From the fewest bits to the most.
ATTENTION = tuple(
    (qk, qk, v, o)
    for qk, v, o in (
        ("3@5/64 2/64", "3@5/64 2/64", "3@5/64 2/64"),
        ("3@10/64 2/64", "3@25/64 2/64", "3@10/64 2/64"),
        ("3@10/64 2/64", "4@10/128 3/128", "3@10/64 2/64"),
        ("3@10/64 2/64", "4@10/128 3/128", "4@10/128 3/128"),
        ("4@10/128 3/128", "4@10/128 3/128", "4@10/128 3/128"),
        ("4@10/128 3/128", "4@10/64 3/64", "4@10/128 3/128"),
        ("4/128", "4/128", "4/128"),
        ("4/128", "4/64", "4/128"),
        ("4/64", "4/32", "4/64"),
        ("4/32", "4/32", "4/32"),
        ("5@10/128 4/128", "5@10/64 4/64", "5@10/128 4/128"),
        ("5@10/64 4/64", "5@10/32 4/32", "5@10/64 4/64"),
        ("5@10/64 4/64", "5/64", "5@10/64 4/64"),
        ("5@10/32 4/32", "5/32", "5@10/32 4/32"),
        ("6@10/128 5/128", "6/128", "6@10/128 5/128"),
        ("6@10/32 5/32", "6/32", "6@10/32 5/32"),
        ("6/128", "6/128", "6/128"),
        ("6/32", "8/32", "6/32"),
        ("8/128", "8/128", "8/128"),
    )
)
MLP = (
    ("3@5/64 2/64", "3@5/64 2/64", "6@5/32 3@20/64 2/64"),
    ("3@10/64 2/64", "3@25/64 2/64", "6@5/32 3@20/64 2/64"),
    ("3@10/64 2/64", "3@30/64 2/64", "5@5/32 3/32"),
    ("3@10/64 2/64", "3@30/64 2/64", "5@5/32 4/32"),
    ("4@10/128 3/128", "4@25/128 3/128", "8@5/32 4@10/128 3/128"),
    ("4@10/32 3/32", "4@25/32 3/32", "8@5/32 4@10/32 3/32"),
    ("4@10/32 3/32", "4@25/32 3/32", "8@5/32 4/128"),
    ("4/128", "4/32", "8@5/32 4/128"),
    ("4/32", "4/32", "8@5/32 4/32"),
    ("5@10/128 4/128", "5@25/128 4/128", "8@5/32 5@10/128 4/128"),
    ("5@10/32 4/32", "5@25/32 4/32", "8@5/32 5@10/32 4/32"),
    ("6@10/128 5/128", "6@25/128 5/128", "8@5/32 6@10/128 5/128"),
    ("6@10/32 5/32", "6@25/32 5/32", "8@5/32 6@10/32 5/32"),
    ("6/128", "6/128", "8@5/32 6/128"),
    ("8@10/128 6/128", "8@10/128 6/128", "8@15/128 6/128"),
    ("8@10/128 6/128", "8@10/128 6/128", "8/128"),
    ("8/128", "8/128", "8/128"),
)


def groups_of(mix: str, columns: int) -> list[tuple[int, int]]:
    """Bits and columns of every group; the last one of all may be narrower.

    Parameters
    ----------
    mix : str
        See the module.
    columns : int

    Raises
    ------
    ValueError
        A mix that is not written so, or that leaves columns over.

    Examples
    --------
    >>> groups_of("3@5/64 2/64", 200)
    [(3, 64), (2, 64), (2, 64), (2, 8)]
    """
    groups, left = [], columns
    for part in mix.split():
        width, _, size = part.partition("/")
        bits, _, share = width.partition("@")
        if not (bits.isdecimal() and size.isdecimal() and (share or "1").isdecimal() and int(size)):
            raise ValueError(f"a mix is written like '3@5/64 2/64' (bits, percent, group), got {mix!r}")
        wanted = min(columns * (int(share) / 100 if share else 1), left)
        for _ in range(math.ceil(wanted / int(size))):
            groups.append((int(bits), min(int(size), left)))
            left -= groups[-1][1]
    if left:
        raise ValueError(f"mix {mix!r} leaves {left} of {columns} columns without bits")
    return groups


@dataclass(frozen=True)
class Group:
    """How the columns of a group are rounded: level (out,) 1 to 16, scale float16, step (out,) float64."""

    level: np.ndarray
    scale: np.float16
    step: np.ndarray


def fitted(W: np.ndarray, bits: int, steps: int = POWER_STEPS) -> Group:
    """Levels of rows and the scale of a group.

        level = clip(rint(16 sqrt(amax / M)), 1, 16)    amax of a row, M of the group
        scale = p M / ((2^bits - 1) / 2)                p in 0.70 .. 1.20: least sum |error|^3.5
        step  = (level / 16)^2 scale

    Parameters
    ----------
    W : (out, columns) float64
    bits : int
    steps : int
        p takes so many equal steps.

    Returns
    -------
    Group
        Its step is that of the stored scale, which is float16.

    Examples
    --------
    >>> group = fitted(np.array([[-4.0, 2.0], [1.0, 0.25]]), 4)
    >>> group.level.tolist(), bool(0.7 <= group.scale * 7.5 / 4 <= 1.2)
    ([16, 8], True)
    """
    half = 1 << (bits - 1)
    largest = (np.abs(W).max(axis=1) + 1e-12) / (half - 0.5)
    level = np.clip(np.rint(LEVELS * np.sqrt(largest / largest.max())), 1, LEVELS)
    step = (level / LEVELS) ** 2 * largest.max()
    best, least = 1.0, np.inf
    for i in range(steps + 1):
        p = 1.2 * (i / steps) + 0.7 * (1 - i / steps)
        tried = (p * step)[:, None]
        error = np.abs(np.clip(np.rint(W / tried), -half, half - 1) * tried - W)
        total = np.sum(error * error * error * np.sqrt(error))  # only what IEEE rounds: the same on every machine
        if total < least:
            best, least = p, total
    scale = np.maximum(as_float(np.array(largest.max() * best), "float16"), TINY)
    return Group(level.astype(np.uint8), scale[()], (level / LEVELS) ** 2 * np.float64(scale))


def quantised(W: np.ndarray, order: np.ndarray, U: np.ndarray, mix: str, steps: int = POWER_STEPS) -> Reordered:
    """GPTQ's sweep over the groups of a mix.

    Parameters
    ----------
    W : (out, in) float
        In its own order.
    order : (in,) integer
        The order in which columns are rounded.
    U : (in, in) float64
        Of H^-1 = U^T U, in that order.
    mix, steps :
        See `groups_of` and `fitted`. A group is fitted to its weights as all columns before have left them.

    Returns
    -------
    Reordered of ColumnGroups
    """
    groups = groups_of(mix, W.shape[1])
    ends = np.cumsum([n for _, n in groups])
    starts = {int(end) - n: (b, n) for (b, n), end in zip(groups, ends, strict=True)}
    codes, done = np.empty(W.shape, np.uint8), []

    def project(w, j, W_now):
        if j in starts:
            bits, n = starts[j]
            done.append((fitted(W_now[:, j : j + n], bits, steps), 1 << (bits - 1)))
        group, half = done[-1]
        code = np.clip(np.rint(w / group.step), -half, half - 1)
        codes[:, j] = code + half
        return (code * group.step).astype(np.float32)

    # Blocks end where groups do: their weights are up to date when one begins.
    obs_sweep(W[:, order], U, project, math.gcd(*starts) or W.shape[1])
    level, scale = np.stack([g.level for g, _ in done]), np.array([g.scale for g, _ in done], np.float16)
    return Reordered(ColumnGroups.pack(codes, level, scale, groups), order.astype(np.int32))
