"""Plain NumPy implementations of the ops of the methods beside rtn, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

SPARSE = {
    "signed_score": "Magnitude",
    "unstable_ties": "StableTies",
    "highest_index_first": "StableTies",
    "threshold": "Threshold",
    "round_count": "SparsityFloor",
    "exact_count": "SparsityFloor",
    "other_scope": "Scope",
    "groups_along_out": "Transposed",
    "removed_not_kept": "KeptNotRemoved",
    "high_nibble_first": "NibbleOrder",
    "second_index_low": "NibbleOrder",
    "zero_indices": "FewNonzeros",
    "high_bit_first": "BitOrder",
    "flat_bits": "OddSize",
    "nibbles_run_on": "OddSize",
    "ends_not_offsets": "RowOffsets",
    "truncated_values": "ValueRounding",
    "rounded_score": "ScoreBeforeRounding",
    "float16_always": "Float32Values",
    "keeps_one": "Everything",
    "zeros_dropped": "Everything",
    "last_pair_swapped": "Random",
    "no_finite_check": "NonFinite",
    "tail_kept": "WidthNotDividing",
    "saturates": "ValueOverflow",
    "no_params_check": "BadParams",
    "flattens": "BadShape",
}
_MAGNITUDE_ONLY = (
    "signed_score threshold exact_count other_scope truncated_values float16_always keeps_one zeros_dropped "
    "nibbles_run_on"
)
BUGS = {
    "prune.magnitude": SPARSE,
    "prune.wanda": {bug: flag for bug, flag in SPARSE.items() if bug not in _MAGNITUDE_ONLY.split()}
    | {
        "mean_abs": "NormNotMean",
        "largest_input": "NormNotMean",
        "deviation": "NormNotMean",
        "norm_of_rows": "NormAxis",
        "norm_on_rows": "NormAxis",
        "dead_input_one": "DeadInput",
        "float32_sum": "StatisticRange",
        "over_the_matrix": "Scope",
    },
    "quant.salient": {
        "largest_input": "MeanNotMax",
        "weight_ignored": "ByWeight",
        "floor_to_none": "AtLeastOne",
        "last_of_equals": "StableTies",
        "grid_without_kept": "AllFitted",
        "kept_twice": "CodesOfKept",
        "no_params_check": "BadParams",
    },
    "blockwise.awq": {
        "largest_input": "MeanNotMax",
        "not_normalised": "Normalised",
        "ratios_reach_one": "Ratios",
        "activations_only": "DuoScaling",
        "no_floor": "DeadInput",
        "judged_by_rows": "PartsOfGroups",
        "against_the_clipped": "AgainstTheOriginal",
        "zero_in_range": "OneSign",
        "no_least_range": "SmallRange",
        "tail_kept": "GroupNotDividing",
        "nan_to_zero": "NonFinite",
    },
    "blockwise.omniquant": {
        "factor": "Logit",
        "amax_clipped": "TwoEnds",
        "rint_stops": "StraightThrough",
        "scale_stops": "ThroughScale",
        "zero_stops": "ThroughZero",
        "clip_passes": "ClipStops",
        "weights_only": "Inputs",
        "ends_stop": "ThroughEnds",
        "range_of_values": "ZeroInRange",
        "no_least_step": "LeastStep",
        "exact_scale": "StoredScale",
        "full_range": "Symmetric",
        "ends_alike": "LongerEnd",
        "alpha_swapped": "FirstScales",
        "no_floor": "FirstFloor",
        "tail_kept": "GroupNotDividing",
        "nan_to_zero": "NonFinite",
        "noise": "Random",
    },
    "lowrank.svd": {
        "s_in_a": "SqrtSplit",
        "sign_of_lapack": "SignConvention",
        "sign_in_b_only": "SignConvention",
        "v_for_vt": "Orientation",
        "full_matrices": "Shape",
        "smallest_kept": "LargestKept",
        "unsquared_error": "SquaredError",
        "rank_rounds": "RankFloor",
        "rank_of_smaller_side": "RankFloor",
        "capped_at_break_even": "BreakEven",
        "distinct_values_only": "EqualValues",
        "divides_by_s": "Deficient",
        "float16_always": "Float32Factors",
        "saturates": "FactorOverflow",
        "nan_to_zero": "NonFinite",
        "no_params_check": "BadParams",
        "flattens": "BadShape",
        "noise": "Random",
    },
    "kvcache.kivi": {
        "keys_per_token": "KeysPerChannel",
        "values_per_channel": "ValuesPerToken",
        "late_block": "ResidualBoundary",
        "short_window": "ResidualBoundary",
        "keys_token_by_token": "KeysByBlock",
        "quantise_first": "FullPrecisionCall",
        "blocks_from_the_call": "ChunkInvariance",
        "one_group": "Groups",
        "first_head": "Heads",
        "three_bits_in_nibbles": "BitStream",
        "high_code_first": "BitStream",
        "divide_by_2_to_bits": "ScaleDivisor",
        "ties_away": "TieToEven",
        "exact_scale": "ScaleRoundedFirst",
        "min_to_nearest": "MinRoundedDown",
        "no_clip": "Clip",
        "zero_scale_nan": "ConstantGroup",
        "smallest_scale": "ScaleUnderflow",
        "float16_range": "Range",
        "float16_window": "Nbytes",
        "noise": "Random",
        "no_range_check": "Float16Overflow",
        "no_finite_check": "NonFinite",
        "no_group_check": "GroupNotDividing",
        "no_params_check": "BadParams",
    },
    "attention.attend": {
        "tiled_heads": "GqaOrder",
        "top_left": "CausalOffset",
        "no_self": "CausalSelf",
        "window_too_wide": "WindowSelf",
        "window_without_self": "WindowSelf",
        "places_not_positions": "PositionsNotOrder",
        "head_0_positions": "HeadPositions",
        "no_softcap": "Softcap",
        "cap_before_scale": "Softcap",
        "finite_mask": "FullyMasked",
        "nan_where_masked": "FullyMasked",
        "no_maximum": "ScoreRange",
        "maximum_of_all": "MaskedMaximum",
        "one_key_is_zero": "OneKey",
        "root_of_d": "Scale",
        "value_dim_is_dim": "ValueDim",
        "lse_in_base_2": "Lse",
        "not_divided": "Normalise",
        "no_rescale": "TileRescale",
        "half_weights": "Precision",
        "modulo_heads": "HeadCount",
        "noise": "Random",
    },
    "runtime.accept": {
        "accept_p": "AcceptRatio",
        "accept_if_above": "AcceptRatio",
        "residual_is_p": "Residual",
        "absolute_residual": "Residual",
        "not_normalised": "ResidualNormalised",
        "no_bonus": "BonusToken",
        "goes_on": "StopAtRejection",
        "first_row": "PositionRow",
        "one_uniform": "UniformOrder",
        "accept_equal": "ZeroProbability",
        "rejects_equal": "EqualDistributions",
        "empty_is_0": "EmptyResidual",
        "one_hot_accepts": "OneHot",
        "greedy_takes_draft": "Greedy",
        "disjoint_from_q": "Disjoint",
        "needs_a_draft": "NothingDrafted",
        "draws_left": "DrawBoundary",
        "law_of_q": "ExactDistribution",
    },
    "model.rope.apply": {
        "other_layout": "RopeLayout",
        "restarts": "Position",
        "places": "Position",
        "theta_10000": "Theta",
        "steps_of_1_over_d": "Frequency",
        "no_factor": "LinearScaling",
        "first_head": "Heads",
        "last_token_noise": "Random",
    },
    "model.rope.permute": {
        "heads_of_q": "RopePermuteGqa",
        "heads_a_group": "RopePermuteGqa",
        "backwards": "Direction",
        "neighbours_stay": "RopeLayout",
        "last_rows_swapped": "Random",
    },
}


def mutant(bug):
    """An implementation `f(op, params, inputs)` of all these ops with one mistake, or none."""

    def implementation(op, params, inputs):
        with np.errstate(all="ignore"):
            return _OPS[op](bug, op, params, **inputs)

    return implementation


def require(condition, bug, check):
    if not condition and bug != check:
        raise ValueError(check)


# --- pruning ---------------------------------------------------------------------------------------------------------


def prune(bug, op, params, w, x=None):
    pattern, sparsity = params["pattern"], params.get("sparsity")
    if bug == "flattens":
        w = w.reshape(1, -1) if w.ndim != 2 else w
        x = x if x is None or x.shape[1] == w.shape[1] else np.resize(x, (len(x), w.shape[1]))
    require(w.ndim == 2 and (x is None or x.shape[1:] == w.shape[1:]), bug, "flattens")
    require(np.isfinite(w).all() and (x is None or np.isfinite(x).all()), bug, "no_finite_check")
    kind = pattern.split(":") if ":" in pattern else None
    fine = sparsity is None if kind else pattern == "unstructured" and 0 <= (sparsity or 0) <= 1
    require(fine and (not kind or int(kind[0]) < int(kind[1])), bug, "no_params_check")
    if not fine:
        kind, sparsity = None, min(max(sparsity or 0.5, 0), 1)
    scores = prune_scores(bug, w, x)
    if kind:
        mask = n_of_m(bug, scores, *map(int, kind))
    else:
        per_row = params.get("per_row", False) or x is not None
        per_row ^= bug in ("other_scope", "over_the_matrix")
        mask = unstructured(bug, scores, 0.5 if sparsity is None else sparsity, per_row)
    if bug == "zeros_dropped":
        mask &= (w != 0).astype(np.uint8)
    if bug == "last_pair_swapped" and w.size > 20:
        mask[-1] = mask[-1][::-1]
    return prune_store(bug, w, mask, pattern, params["dtype"])


def prune_scores(bug, w, x):
    w = w.astype(np.float16) if bug == "rounded_score" else w
    size = w if bug == "signed_score" else np.abs(w)
    if x is None:
        return size.astype(np.float64)
    wide = x.astype(np.float32 if bug == "float32_sum" else np.float64)
    norm = np.sqrt((wide * wide).sum(axis=0)).astype(np.float64)
    if bug == "mean_abs":
        norm = np.abs(wide).mean(axis=0)
    if bug == "largest_input":
        norm = np.abs(wide).max(axis=0)
    if bug == "deviation":
        norm = wide.std(axis=0)
    if bug == "dead_input_one":
        norm = np.where(norm == 0, 1, norm)
    if bug in ("norm_of_rows", "norm_on_rows") and x.shape[0] == x.shape[1]:
        norm = np.sqrt((wide * wide).sum(axis=1)) if bug == "norm_of_rows" else norm[:, None]
    return size.astype(np.float64) * norm


def lowest(bug, scores, count):
    """Mask of one row."""
    if bug == "threshold":
        return (scores > np.sort(scores)[min(count, scores.size - 1)]).astype(np.uint8)
    order = np.argsort(scores, kind="stable")
    if bug == "highest_index_first":
        order = scores.size - 1 - np.argsort(scores[::-1], kind="stable")
    if bug == "unstable_ties":
        order = np.lexsort((np.arange(scores.size) * 7 % 5, scores))
    mask = np.ones(scores.size, np.uint8)
    mask[order[: scores.size - 1 if bug == "keeps_one" and count == scores.size else count]] = 0
    return mask


def unstructured(bug, scores, sparsity, per_row):
    from fractions import Fraction

    rows = scores if per_row else scores.reshape(1, -1)
    n = rows.shape[1]
    counts = {"round_count": round(sparsity * n), "exact_count": int(Fraction(sparsity) * n)}
    return np.array([lowest(bug, row, counts.get(bug, int(sparsity * n))) for row in rows]).reshape(scores.shape)


def n_of_m(bug, scores, n, m):
    if bug == "groups_along_out" and scores.shape[0] % m == 0:
        return n_of_m(None, scores.T, n, m).T.copy()
    tail = scores.shape[1] % m
    require(not tail, bug, "tail_kept")
    whole = scores.shape[1] - tail
    gone = n if bug == "removed_not_kept" else m - n
    rows = [[lowest(bug, g, gone) for g in row[:whole].reshape(-1, m)] for row in scores]
    mask = np.array(rows, np.uint8).reshape(len(scores), whole)
    return np.pad(mask, ((0, 0), (0, tail)), constant_values=1)


def prune_store(bug, w, mask, pattern, dtype):
    dtype = "float16" if bug == "float16_always" else dtype
    keep = mask.astype(bool)
    kept = w[keep].astype(dtype)
    if bug == "truncated_values" and dtype == "float16":
        kept = np.where(np.abs(kept.astype(np.float64)) > np.abs(w[keep]), np.nextafter(kept, np.float16(0)), kept)
    if bug == "saturates":
        kept = np.clip(kept, -65504, 65504).astype(dtype)
    require(np.isfinite(kept).all(), bug, "no_finite_check")
    out = {"mask": mask, "values": kept}
    if pattern == "2:4" and w.shape[1] % 4 == 0:
        chosen = np.argsort(1 - mask.reshape(len(w), -1, 4), axis=-1, kind="stable")[..., :2]
        if bug in ("threshold", "zeros_dropped") or (keep.sum() != w.size // 2):
            kept = np.resize(kept, w.size // 2)
        if bug == "zero_indices":
            value = np.take_along_axis(w.reshape(len(w), -1, 4), chosen, axis=-1)
            chosen = np.where(value == 0, 0, chosen)
        first, second = chosen[..., 0], chosen[..., 1]
        nibbles = second | first << 2 if bug == "second_index_low" else first | second << 2
        nibbles = np.pad(nibbles, ((0, 0), (0, nibbles.shape[1] % 2)), constant_values=bug == "nibbles_run_on")
        low, high = nibbles[:, ::2], nibbles[:, 1::2]
        indices = high | low << 4 if bug == "high_nibble_first" else low | high << 4
        return out | {"values": kept.reshape(len(w), -1), "indices": indices.astype(np.uint8)}
    bits = np.packbits(mask, axis=1, bitorder="big" if bug == "high_bit_first" else "little")
    if bug == "flat_bits":
        flat = np.packbits(mask, bitorder="little")
        bits = np.resize(np.pad(flat, (0, bits.size - flat.size)), bits.shape)
    counts = mask.sum(axis=1)
    offsets = np.cumsum(counts) - (0 if bug == "ends_not_offsets" else counts)
    return out | {"bitmask": bits, "row_offsets": offsets.astype(np.uint32)}


# --- AWQ -------------------------------------------------------------------------------------------------------------


def salient(bug, op, params, w, x):
    n = w.shape[1]
    require(0 < params["fraction"] <= 1 and x.shape[1] == n, bug, "no_params_check")
    x = np.resize(x, (len(x), n))
    size = np.abs(x).max(axis=0) if bug == "largest_input" else np.abs(x).mean(axis=0)
    if params["by"] == "weight" and bug != "weight_ignored":
        size = (w.astype(np.float64) ** 2).sum(axis=0)
    count = int(params["fraction"] * n)
    count = count if bug == "floor_to_none" else max(1, count)
    order = np.argsort(size, kind="stable")[::-1] if bug == "last_of_equals" else np.argsort(-size, kind="stable")
    kept = np.sort(order[:count])
    fitted = w.copy()
    if bug == "grid_without_kept":
        fitted[:, kept] = 0
    codes, scale, zero = awq_grid(w, params, np.minimum, np.maximum, fitted)
    if bug != "kept_twice":
        codes[:, kept] = np.repeat(zero, params["group_size"], axis=1)[:, kept]
    return {"kept": kept, "columns": w[:, kept].astype(np.float16), "codes": codes, "scale": scale, "zero_point": zero}


def awq_grid(w, params, low, high, fitted=None, least=0.0):
    """Codes, scale, zero point; `low` and `high` say whether the range is made to hold zero."""
    levels = 2 ** params["bits"] - 1
    g = (w if fitted is None else fitted).reshape(len(w), -1, params["group_size"])
    lo, hi = low(g.min(axis=-1), np.float32(0)), high(g.max(axis=-1), np.float32(0))
    scale = (np.maximum(hi - lo, np.float32(least)) / np.float32(levels)).astype(np.float16)
    step = scale.astype(np.float32)
    zero = np.clip(np.nan_to_num(np.rint(-lo / step)), 0, levels)
    codes = np.rint(w.reshape(g.shape) / step[..., None]) + zero[..., None]
    codes = np.clip(np.nan_to_num(codes), 0, levels).astype(np.uint8).reshape(w.shape)
    return codes, scale, zero.astype(np.uint8)


def awq(bug, op, params, w, x):
    if bug == "nan_to_zero":
        w, x = np.nan_to_num(w), np.nan_to_num(x)
    require(np.isfinite(w).all() and np.isfinite(x).all(), bug, "nan_to_zero")
    g = params["group_size"]
    require(w.shape[1] % g == 0, bug, "tail_kept")
    w, x = w[:, : w.shape[1] // g * g], x[:, : w.shape[1] // g * g]
    own = lambda edge, zero: edge
    low, high = (np.minimum, np.maximum) if bug == "zero_in_range" else (own, own)
    grid = lambda v: awq_grid(v, params, low, high, least=0.0 if bug == "no_least_range" else 1e-5)

    def rounded(v):
        codes, scale, zero = grid(v)
        spread = lambda a: np.repeat(a.astype(np.float64), g, axis=1)
        return (codes - spread(zero)) * spread(scale)

    a = np.abs(x).astype(np.float64)
    a = a.max(axis=0) if bug == "largest_input" else a.mean(axis=0)
    top = np.abs(w.astype(np.float64)).reshape(len(w), -1, g)
    m = (top / (top.max(axis=-1, keepdims=True) + 1e-6)).reshape(w.shape).mean(axis=0)
    best, least, number = None, np.inf, 0
    for i in range(20):
        r = i / 19 if bug == "ratios_reach_one" else i / 20
        s = a**r
        if params["duo_scaling"] and bug != "activations_only":
            s = s / (m ** (1 - r) + 1e-4)
        s = np.maximum(s, 1e-12 if bug == "no_floor" else 1e-4)
        s = s if bug == "not_normalised" else s / np.sqrt(s.max() * s.min())
        error = np.mean((x.astype(np.float64) @ (rounded((w * s).astype(np.float32)) / s - w).T) ** 2)
        if error < least * (1 - 1e-9):
            best, least, number = s, error, i
    scaled, inputs = (w * best).astype(np.float32), (x / best).astype(np.float32).astype(np.float64)
    amax = np.abs(scaled.reshape(len(w), -1, g)).max(axis=-1)
    step, errors = np.zeros(amax.shape, np.int64), np.full(amax.shape, np.inf)
    cut_at = lambda limit: np.clip(scaled, -np.repeat(limit, g, axis=1), np.repeat(limit, g, axis=1))
    for i in range(10):
        cut = cut_at(amax * np.float32(1 - i / 20))
        change = rounded(cut) - (cut if bug == "against_the_clipped" else scaled)
        parts = np.einsum("ngk,rgk->nrg", inputs.reshape(len(x), -1, g), change.reshape(*amax.shape, g))
        if bug == "judged_by_rows":
            parts = np.broadcast_to(parts.sum(axis=-1, keepdims=True), parts.shape)
        error = (parts**2).mean(axis=0)
        better = error < errors * (1 - 1e-9)
        step[better], errors[better] = i, error[better]
    codes, scale, zero = grid(cut_at(amax * (1 - step / 20).astype(np.float32)))
    return {"ratio": np.array(number), "s": best, "clip_step": step, "codes": codes, "scale": scale, "zero_point": zero}


def omniquant(bug, op, params, w, **more):
    if "amax" in more:
        alpha = 1 - params["alpha"] if bug == "alpha_swapped" else params["alpha"]
        least = 0.1 if bug == "no_floor" else 1e-5
        a, m = np.maximum(more["amax"], least), np.maximum(np.abs(w).max(axis=0), least)
        return {"s": np.maximum(a**alpha / m ** (1 - alpha), 0 if bug == "no_floor" else 1e-2)}
    x, s, c = more["x"], more["s"], more["c"]
    if bug == "nan_to_zero":
        w, x = np.nan_to_num(w), np.nan_to_num(x)
    require(np.isfinite(w).all() and np.isfinite(x).all(), bug, "nan_to_zero")
    bits, g = params["bits"], params["group_size"]
    require(w.shape[1] % g == 0, bug, "tail_kept")
    w, x, s = (a[..., : w.shape[1] // g * g] for a in (w, x, s))
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    v = (w * s).reshape(len(w), -1, g)
    share = (c / 4 if bug == "factor" else 1 / (1 + np.exp(-c)))[..., None]  # hi, lo: [out, groups, 1]
    ends, places = [], []
    for sign in (1, -1):
        at = np.argmax(sign * v, axis=-1)[..., None]
        value = np.take_along_axis(v, at, -1)
        taken = np.ones(value.shape, bool) if bug == "range_of_values" else sign * value > 0
        ends.append(np.where(taken, value, 0))
        places.append((np.arange(g) == at) & taken)
    if bug == "amax_clipped":
        larger = ends[0] >= -ends[1]
        share = np.where(np.stack([larger, ~larger]), share, 1)
    hi, lo = share * np.stack(ends)
    upper = (hi >= -lo).astype(float)
    if params["symmetric"]:
        divisor = levels / 2 if bug == "full_range" else half - 1
        step, by_hi, by_lo = np.maximum(hi, -lo) / divisor, upper / divisor, (upper - 1) / divisor
    else:
        step, by_hi, by_lo = (hi - lo) / levels, 1 / levels, -1 / levels
    least = 1e-8 if bug == "no_least_step" else 1e-5
    free = ((step >= least) & (step <= 1e4)).astype(float)
    step = np.clip(step, least, 1e4)
    stored = step.astype(np.float16)
    scale = step if bug == "exact_scale" else stored.astype(np.float64)
    exact = np.full(scale.shape, half) if params["symmetric"] else -lo / scale
    zero, zero_free = np.clip(np.rint(exact), 0, levels), 0.0 if params["symmetric"] or bug == "zero_stops" else 1.0
    zero_free = zero_free * ((np.rint(exact) >= 0) & (np.rint(exact) <= levels))
    codes = np.rint(v / scale) + zero
    low = 1 if bug == "ends_alike" and params["symmetric"] else 0
    inside = ((codes >= low) & (codes <= levels)) | (bug == "clip_passes")
    codes = np.clip(codes, low, levels)
    v_hat = (codes - zero) * scale
    x_s = x / s
    r = (x_s @ v_hat.reshape(len(w), -1).T - x @ w.T) * (1 + 1e-4 * (bug == "noise" and x.shape[1] > 5))
    of_y = 2 * r / r.size
    of_v_hat = (of_y.T @ x_s).reshape(v.shape)
    passes = inside & (bug != "rint_stops")
    of_v = of_v_hat * passes
    of_zero = (of_v_hat * (passes * 1.0 - 1) * scale).sum(axis=-1, keepdims=True) * zero_free
    of_step = (of_v_hat * ((codes - zero) - passes * v / scale)).sum(axis=-1, keepdims=True)
    of_step = of_step + of_zero * lo / scale**2
    of_step = of_step * free * (bug != "scale_stops")
    of_ends = np.stack([of_step * by_hi, of_step * by_lo - of_zero / scale])
    slope = np.full(share.shape, 0.25) if bug == "factor" else share * (1 - share)
    of_c = (of_ends * np.stack(ends) * slope)[..., 0]
    if bug != "ends_stop":
        of_v = of_v + (of_ends * share * np.stack(places)).sum(axis=0)
    of_s = (of_v.reshape(w.shape) * w).sum(axis=0)
    if bug != "weights_only":
        of_s = of_s - (of_y @ v_hat.reshape(w.shape) * x).sum(axis=0) / s**2
    back = lambda a: a[..., 0]
    return {
        "scale": back(stored), "codes": codes.reshape(w.shape).astype(np.uint8), "loss": np.array(np.mean(r**2)),
        "of_c": of_c, "of_s": of_s, "zero_point": back(zero).astype(np.uint8),
    }  # fmt: skip


# --- low rank --------------------------------------------------------------------------------------------------------


def svd(bug, op, params, w):
    if bug == "flattens":
        w = np.atleast_2d(w)
    require(w.ndim == 2, bug, "flattens")
    if bug == "nan_to_zero":
        w = np.nan_to_num(w, posinf=0, neginf=0)
    require(np.isfinite(w).all(), bug, "nan_to_zero")
    rank, ratio = params.get("rank"), params.get("ratio")
    limit = w.size / sum(w.shape)
    fine = not (rank is not None and ratio is not None) and (ratio is None or ratio <= 1)
    if rank is None or not fine:
        fraction = 0.5 if ratio is None else ratio
        rank = round(fraction * limit) if bug == "rank_rounds" else int(fraction * limit)
        rank = int(fraction * min(w.shape)) if bug == "rank_of_smaller_side" else rank
    require(fine and 1 <= rank <= min(w.shape), bug, "no_params_check")
    rank = min(max(rank, 1), min(w.shape))
    if bug == "capped_at_break_even":
        rank = max(1, min(rank, int(limit)))
    dtype = "float16" if bug == "float16_always" else params["dtype"]
    U, S, Vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    if bug == "distinct_values_only":
        distinct = np.abs(np.diff(S, prepend=S[0] + 1)) > 1e-6
        U, S, Vt = U[:, distinct], S[distinct], Vt[distinct]
        rank = min(rank, len(S))
    if bug == "full_matrices" and w.shape[1] > w.shape[0]:  # columns of V for rows of V^T
        Vt = np.linalg.svd(w.astype(np.float64))[2].T[: len(S)]
    if bug == "v_for_vt" and Vt.shape[0] == Vt.shape[1]:
        Vt = Vt.T
    if bug == "smallest_kept":
        U, S, Vt = U[:, ::-1], S[::-1], Vt[::-1]
    root = np.sqrt(S[:rank])
    A, B = U[:, :rank] * root, root[:, None] * Vt[:rank]
    if bug == "divides_by_s":
        A = w @ (Vt[:rank].T / np.where(S[:rank] < 1e-12, 0, root))
    if bug == "s_in_a":
        A, B = U[:, :rank] * S[:rank], Vt[:rank]
    if bug != "sign_of_lapack":
        sign = np.where(np.take_along_axis(B, np.abs(B).argmax(axis=1)[:, None], 1) < 0, -1, 1)
        A, B = (A if bug == "sign_in_b_only" else A * sign.T), B * sign
    else:
        A[:, 0], B[0] = -A[:, 0], -B[0]
    if bug == "noise" and w.shape == (6, 5):
        A = A * 1.01
    if bug == "saturates":
        A, B = np.clip(A, -65504, 65504), np.clip(B, -65504, 65504)
    a, b = A.astype(dtype), B.astype(dtype)
    require((np.isfinite(a).all() and np.isfinite(b).all()) or bug == "divides_by_s", bug, "saturates")
    w_hat = a.astype(np.float32) @ b.astype(np.float32)
    error = np.sum((w.astype(np.float64) - w_hat) ** 2)
    error = np.sqrt(error) if bug == "unsquared_error" else error
    return {"a": a, "b": b, "w_hat": w_hat, "error": np.array(error), "rank": np.array(rank)}


# --- key-value cache -------------------------------------------------------------------------------------------------


def kivi(bug, op, params, k, v):
    bits, G, R = params["bits"], params["group_size"], params["residual"]
    require(1 <= bits <= 8 and R >= 1, bug, "no_params_check")
    bits, R = min(max(bits, 1), 8), max(R, G)
    divides = k.shape[2] % G == 0 and v.shape[2] % G == 0 and R % G == 0
    require(divides, bug, "no_group_check")
    if not divides:
        R, k, v = R - R % G, k[..., : k.shape[2] // G * G], v[..., : v.shape[2] // G * G]
    finite = np.isfinite(k).all() and np.isfinite(v).all()
    require(finite, bug, "no_finite_check")
    limit = 65504 * min(1, (2**bits - 1) / 2)
    require(not finite or max(np.abs(k).max(), np.abs(v).max()) <= limit, bug, "no_range_check")
    if bug == "first_head":
        k, v = (np.repeat(x[:1], len(x), axis=0) for x in (k, v))
    S, last = k.shape[1], params["chunks"][-1]
    before = S if bug == "quantise_first" else S - last
    stored, _, full = kivi_state(bug, k, v, bits, G, R, S, params["chunks"])
    _, (k_hat, v_hat), _ = kivi_state(bug, k, v, bits, G, R, before, params["chunks"][:-1])
    wide = 2 if bug == "float16_window" else 4
    nbytes = sum(x.nbytes for x in stored.values()) + wide * len(k) * (full[0] * k.shape[2] + full[1] * v.shape[2])
    return stored | {"k_hat": k_hat, "v_hat": v_hat, "full": np.array(full), "nbytes": np.array(nbytes)}


def kivi_state(bug, k, v, bits, G, R, tokens, chunks):
    k_hat, v_hat = k.copy(), v.copy()
    due = tokens // R * R
    if bug == "late_block":
        due = max(tokens - 1, 0) // R * R
    if bug == "keys_token_by_token":
        due = max(tokens - R, 0) // G * G
    if bug == "blocks_from_the_call":  # every call is cut into blocks of its own
        due = sum(c // R * R for c in chunks)
    stored = {}
    n_v = max(0, tokens - R + (bug == "short_window"))
    if due:
        block = R if due % R == 0 else G
        x = k[:, :due].reshape(len(k), -1, block, k.shape[2]).swapaxes(2, 3)
        if bug == "keys_per_token" and block == k.shape[2]:
            x = x.swapaxes(2, 3)
        back, parts = kivi_quantise(bug, x, bits, min(G, block))
        if bug == "keys_per_token" and block == k.shape[2]:
            back = back.swapaxes(2, 3)
        k_hat[:, :due] = back.swapaxes(2, 3).reshape(len(k), due, -1)
        stored |= {f"k_{n}": x for n, x in parts.items()}
    if n_v:
        x = v[:, :n_v]
        if bug == "values_per_channel":
            width = np.ptp(v[:, :], axis=1, keepdims=True)
            x = np.where(width > 0, x / np.where(width > 0, width, 1), x)
        back, parts = kivi_quantise(bug, x, bits, G)
        v_hat[:, :n_v] = back
        stored |= {f"v_{n}": x for n, x in parts.items()}
    return stored, (k_hat, v_hat), [tokens - due, tokens - n_v]


def kivi_quantise(bug, x, bits, G):
    shape = x.shape
    size = shape[-1] if bug == "one_group" else G
    g = x.reshape(*shape[:-1], -1, size)
    lowest_of = g.min(axis=-1, keepdims=True)
    low = lowest_of.astype(np.float16)
    if bug != "min_to_nearest":
        low = np.where(low > lowest_of, np.nextafter(low, np.float16(-np.inf)), low)
    above = g - low.astype(np.float32)
    levels = 2**bits - 1
    span = above.max(axis=-1, keepdims=True)
    span = span.astype(np.float16).astype(np.float32) if bug == "float16_range" else span
    exact = span / np.float32(2**bits if bug == "divide_by_2_to_bits" else levels)
    scale = exact.astype(np.float16)
    if bug == "smallest_scale":
        scale = np.where((scale == 0) & (exact > 0), np.float16(2**-24), scale)
    step = (exact if bug == "exact_scale" else scale).astype(np.float32)
    step = step if bug == "zero_scale_nan" else np.where(step > 0, step, np.float32(1))
    steps = above / step
    steps = steps if bug == "no_clip" else np.clip(steps, 0, levels)
    codes = np.floor(steps + np.float32(0.5)) if bug == "ties_away" else np.rint(steps)
    if bug == "noise" and x.size > 60:
        codes[..., 0] = levels - codes[..., 0]
    low, scale = (a[..., 0] for a in (low, scale))
    wide = scale.astype(np.float32)[..., None]
    if bug == "zero_scale_nan":
        wide = np.where(wide == 0, np.nan, wide)
    back = (codes.astype(np.float32) * wide + low.astype(np.float32)[..., None]).reshape(shape)
    codes = np.nan_to_num(codes).astype(np.int64).reshape(shape) & levels
    return back, {"codes": kivi_pack(bug, codes, bits), "scale": scale, "min": low}


def kivi_pack(bug, codes, bits):
    width = 4 if bits == 3 and bug == "three_bits_in_nibbles" else bits
    order = np.arange(width)
    if bug == "high_code_first":
        codes = codes.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape)
    stream = ((codes[..., None] >> order) & 1).astype(np.uint8).reshape(*codes.shape[:-1], -1)
    return np.packbits(stream, axis=-1, bitorder="little")


# --- attention -------------------------------------------------------------------------------------------------------


def attend(bug, op, params, q, k, v, q_positions, k_positions):
    H, T, D = q.shape
    Hk, S, _ = k.shape
    require(H % Hk == 0, bug, "modulo_heads")
    scale, window, cap = params["scale"], params.get("window"), params.get("softcap")
    scale = D**-0.5 if bug == "root_of_d" else scale
    o, lse = np.zeros((H, T, v.shape[2])), np.zeros((H, T))
    for h in range(H):
        kv = h % Hk if bug in ("tiled_heads", "modulo_heads") else h // (H // Hk)
        at = k_positions[0 if bug == "head_0_positions" else kv] if k_positions.ndim == 2 else k_positions
        if bug == "places_not_positions":
            at = np.arange(S) + at.min()
        where = q_positions - q_positions[0] + at.min() if bug == "top_left" else q_positions
        distance = where[:, None] - at
        seen = distance > 0 if bug == "no_self" else distance >= 0
        if window is not None:
            seen &= distance < window + (bug == "window_too_wide") - (bug == "window_without_self")
        scores = q[h].astype(np.float64) @ k[kv].T.astype(np.float64)
        if cap is not None and bug == "cap_before_scale":
            scores = scale * cap * np.tanh(scores / cap)
        else:
            scores = scale * scores
            scores = scores if cap is None or bug == "no_softcap" else cap * np.tanh(scores / cap)
        for t in range(T):
            o[h, t], lse[h, t] = attend_row(bug, scores[t], seen[t], v[kv].astype(np.float64))
    if bug == "value_dim_is_dim":
        o = np.resize(o, (H, T, D))
    if bug == "noise" and S > 8:
        o = o * (1 + 1e-3)
    return {"o": o.astype(np.float32), "lse": lse.astype(np.float32)}


def attend_row(bug, scores, seen, v):
    if not seen.any():
        if bug == "finite_mask":
            return v.mean(axis=0), -1e9
        return np.full(v.shape[1], np.nan if bug == "nan_where_masked" else 0), -np.inf
    s, x = scores[seen], v[seen]
    top = {"no_maximum": 0, "maximum_of_all": np.float32(scores.max())}.get(bug, s.max())
    w = np.exp(np.float32(s - top)).astype(np.float64)
    if bug == "half_weights":
        w = (w / w.sum()).astype(np.float16).astype(np.float64) * w.sum()
    total = w.sum()
    if bug == "no_rescale":
        tops = np.maximum.accumulate(s)
        w = np.exp(s - tops)
        total = w.sum()
    if bug == "one_key_is_zero" and len(s) == 1:
        return np.zeros(v.shape[1]), 0.0
    lse = top + np.log(total)
    return w @ x / (1 if bug == "not_divided" else total), lse / np.log(2) if bug == "lse_in_base_2" else lse


# --- speculative decoding --------------------------------------------------------------------------------------------


def accept(bug, op, params, p, q, drafted=None, uniforms=None):
    if drafted is None:
        return acceptance_law(bug, p[0], q[0])
    numbers = iter(np.repeat(uniforms[:1], 9) if bug == "one_uniform" else uniforms)
    if bug == "needs_a_draft" and not len(drafted):
        return {"accepted": np.array(0), "next_id": np.array(int(p[0].argmax()))}
    kept, stopped = 0, None
    for i, x in enumerate(drafted):
        row = 0 if bug == "first_row" else i
        a, b = p[row], q[row]
        u = next(numbers)
        ok = u * b[x] < a[x]
        ok |= bug == "accept_equal" and u * b[x] == a[x]
        ok = u < a[x] if bug == "accept_p" else ok
        ok = a[x] >= b[x] if bug == "accept_if_above" else ok
        ok &= not (bug == "rejects_equal" and a[x] == b[x])
        ok |= bug == "one_hot_accepts" and b.max() == 1
        ok |= bug == "greedy_takes_draft" and a.max() == 1
        kept += ok
        if not ok:
            stopped = (a, b) if stopped is None else stopped
            if bug != "goes_on":
                break
    if stopped is None:
        row = p[len(drafted) - 1 if bug == "no_bonus" and len(drafted) else len(drafted)]
        return {"accepted": np.array(kept), "next_id": np.array(pick(bug, row, next(numbers)))}
    rest = residual(bug, *stopped)
    if not rest.any():
        rest = np.eye(1, len(rest))[0] if bug == "empty_is_0" else stopped[0]
    return {"accepted": np.array(kept), "next_id": np.array(pick(bug, rest, next(numbers)))}


def residual(bug, p, q):
    if bug == "residual_is_p":
        return p
    if bug == "absolute_residual":
        return np.abs(p - q)
    if bug == "disjoint_from_q" and not (p * q).any():
        return q
    return np.maximum(p - q, 0)


def pick(bug, weights, u):
    total = 1 if bug == "not_normalised" else weights.sum()
    found = np.searchsorted(np.cumsum(weights), u * total, side="left" if bug == "draws_left" else "right")
    return min(int(found), len(weights) - 1)


def acceptance_law(bug, p, q):
    ratio = np.where(q > 0, np.minimum(1, p / np.where(q > 0, q, 1)), 0)
    ratio = np.where(q > 0, p, 0) if bug == "accept_p" else ratio
    rest = residual(bug, p, q)
    rest = rest / rest.sum() if rest.any() and bug != "not_normalised" else rest
    kept = q * ratio
    distribution = q if bug == "law_of_q" else kept + (1 - kept.sum()) * rest
    return {"acceptance": ratio, "residual": rest, "distribution": distribution}


# --- rotary embedding ------------------------------------------------------------------------------------------------


def rope(bug, op, params, x, positions):
    D = x.shape[-1]
    if bug == "restarts":
        positions = positions - positions.min()
    if bug == "places":
        positions = positions[0] + np.arange(len(positions))
    theta = 1e4 if bug == "theta_10000" else params["theta"]
    step = 1 if bug == "steps_of_1_over_d" else 2
    angle = positions[:, None] * theta ** (-step * np.arange(D // 2) / D)
    angle = angle / (1 if bug == "no_factor" else params.get("factor", 1))
    half = (params["layout"] == "half_split") ^ (bug == "other_layout")
    a, b = (x[..., : D // 2], x[..., D // 2 :]) if half else (x[..., 0::2], x[..., 1::2])
    y = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    y = np.concatenate(y, axis=-1) if half else np.stack(y, axis=-1).reshape(x.shape)
    if bug == "first_head":
        y[1:] = y[0]
    if bug == "last_token_noise" and x.size > 60:
        y[:, -1] += 1e-3
    return {"y": y.astype(np.float32)}


def rope_permute(bug, op, params, w):
    heads = params["num_heads"] if params["tensor"] == "q" or bug == "heads_of_q" else params["num_kv_heads"]
    if bug == "heads_a_group" and params["tensor"] == "k":
        heads = params["num_heads"] // params["num_kv_heads"]
    half = len(w) // heads // 2
    to_half = (params["direction"] == "to_half_split") ^ (bug == "backwards")
    inner = (half, 2) if to_half else (2, half)
    out = w.reshape(heads, *inner, -1).swapaxes(1, 2).reshape(w.shape)
    if bug == "neighbours_stay":
        out = w.copy()
    if bug == "last_rows_swapped" and params["num_heads"] == params["num_kv_heads"] == 4:
        out[-2:] = out[:-3:-1].copy()
    return {"permuted": out}


_OPS = {
    "model.rope.apply": rope,
    "model.rope.permute": rope_permute,
    "prune.magnitude": prune,
    "prune.wanda": prune,
    "quant.salient": salient,
    "blockwise.awq": awq,
    "blockwise.omniquant": omniquant,
    "lowrank.svd": svd,
    "kvcache.kivi": kivi,
    "attention.attend": attend,
    "runtime.accept": accept,
}
