"""Plain NumPy implementations of blockwise.exl2 and its choice, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import itertools
import math

import numpy as np

from tests.golden_mutants_methods import require

BUGS = {
    "blockwise.exl2": {
        "ascending": "Order",
        "last_of_equals_first": "Order",
        "rest_first": "Mix",
        "floor_of_share": "Mix",
        "tail_group_padded": "ShortGroup",
        "plain_levels": "SquaredLevels",
        "squares": "Power",
        "full_range": "HalfRange",
        "exact_scale": "RoundedScale",
        "no_compensation": "Compensation",
        "fitted_to_original": "Updated",
        "gptq_damping": "Damping",
        "dead_weight_zero": "DeadInput",
        "codes_only": "Bytes",
        "nan_to_zero": "NonFinite",
        "tail_left_out": "BadMix",
        "last_pair_swapped": "Random",
    },
    "blockwise.exl2.choose": {
        "over_budget": "Budget",
        "largest_option": "AllBest",
        "first_option": "Cheapest",
        "plain_sum": "Powers",
        "largest_error_only": "SpendsRest",
        "no_check": "BadBudget",
    },
}


def cut(bug, mix, columns):
    groups, left = [], columns
    parts = mix.split()[::-1] if bug == "rest_first" else mix.split()
    for part in parts:
        head, size = part.split("/")
        bits, _, share = head.partition("@")
        wanted = min(columns * int(share or 100) / 100, left)
        count = math.floor(wanted / int(size)) if bug == "floor_of_share" and share else math.ceil(wanted / int(size))
        for _ in range(count):
            groups.append((int(bits), min(int(size), left)))
            left -= groups[-1][1]
    require(left == 0, bug, "tail_left_out")
    return groups if left == 0 else [*groups, (groups[-1][0], left)]


def exl2(bug, params, w, x):
    if bug == "nan_to_zero":
        w, x = np.nan_to_num(w), np.nan_to_num(x, posinf=1)
    require(np.isfinite(w).all() and np.isfinite(x).all(), bug, "nan_to_zero")
    groups = cut(bug, params["mix"], w.shape[1])
    w, x, n = w.astype(np.float64), x.astype(np.float64), w.shape[1]
    H = x.T @ x
    diagonal = np.diag(H).copy()
    if bug == "dead_weight_zero":
        w[:, diagonal == 0] = 0
    order = np.argsort(diagonal if bug == "ascending" else -diagonal, kind="stable")
    if bug == "last_of_equals_first":
        order = n - 1 - np.argsort(-diagonal[::-1], kind="stable")
    H = H + (0.01 if bug == "gptq_damping" else 0.12) * diagonal.mean() * np.eye(n)
    U = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    now, codes, w_hat = w[:, order].copy(), np.zeros(w.shape, np.uint8), np.zeros(w.shape, np.float32)
    original, levels, scales, start = now.copy(), [], [], 0
    for bits, size in groups:
        half = 2 ** (bits - 1)
        part = (original if bug == "fitted_to_original" else now)[:, start : start + size]
        base = (np.abs(part).max(axis=1) + 1e-12) / (half - (1 if bug == "full_range" else 0.5))
        level = np.clip(np.rint(16 * np.sqrt(base / base.max())), 1, 16)
        relative = level / 16 if bug == "plain_levels" else (level / 16) ** 2
        totals = []
        for p in np.linspace(0.7, 1.2, params["steps"] + 1):
            s = (p * relative * base.max())[:, None]
            error = np.abs(np.clip(np.rint(part / s), -half, half - 1) * s - part)
            totals.append((error ** (2 if bug == "squares" else 3.5)).sum())
        exact = np.linspace(0.7, 1.2, params["steps"] + 1)[np.argmin(totals)] * base.max()
        scale = np.float16(exact)
        step = relative * (exact if bug == "exact_scale" else np.float64(scale))
        for j in range(start, start + size):
            code = np.clip(np.rint(now[:, j] / step), -half, half - 1)
            codes[:, j], q = code + half, (code * step).astype(np.float32)
            w_hat[:, order[j]] = q
            if bug != "no_compensation":
                now[:, j + 1 :] -= ((now[:, j] - q) / U[j, j])[:, None] * U[j, j + 1 :]
        levels.append(level)
        scales.append(scale)
        start += size
    if bug == "last_pair_swapped" and n >= 10:
        codes[:, -2:] = codes[:, -2:][:, ::-1]
    shown = groups
    if bug == "tail_group_padded":
        sizes = {int(part[0]): int(part.split("/")[1]) for part in params["mix"].split()}
        shown = [(b, sizes[b]) for b, _ in groups]
    nbytes = len(w) * sum(-(-b * size // 8) for b, size in shown)
    if bug != "codes_only":
        nbytes += len(groups) * (-(-len(w) // 2) + 6) + 4 * n
    return {"order": order.astype(np.int32), "groups": np.array(shown), "level": np.array(levels, np.uint8),
            "scale": np.array(scales), "codes": codes, "w_hat": w_hat, "nbytes": np.array(nbytes)}  # fmt: skip


def choose(bug, params, error, nbytes, budget):
    every, budget = np.arange(len(error)), int(budget)
    fits = lambda c: nbytes[every, c].sum() <= budget or bug == "over_budget"
    tried = [list(c) for c in itertools.product(range(error.shape[1]), repeat=len(error)) if fits(list(c))]
    require(bool(tried), bug, "no_check")
    if bug == "largest_option":
        return {"choice": np.array(max(tried, key=lambda c: nbytes[every, c].sum()))}
    if (bug == "first_option" and budget < 10) or not tried:
        return {"choice": np.zeros(len(error), np.int64)}
    power = 1 if bug == "plain_sum" else 2
    if bug == "largest_error_only":
        return {"choice": np.array(min(tried, key=lambda c: (error[every, c].max(), nbytes[every, c].sum())))}
    return {"choice": np.array(min(tried, key=lambda c: (error[every, c] ** power).sum()))}


_OPS = {"blockwise.exl2": exl2, "blockwise.exl2.choose": choose}


def mutant(bug):
    """implementation(op, params, inputs) with one mistake, or none."""
    return lambda op, params, inputs: _OPS[op](bug, params, **inputs)
