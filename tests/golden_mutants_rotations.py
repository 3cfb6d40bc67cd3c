"""Plain NumPy implementations of the ops of the rotations, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

BUGS = {
    "transform.quarot": {
        "not_normalised": "Normalised",
        "divided_by_n": "Normalised",
        "from_the_left": "Side",
        "base_inside": "Outer",
        "inner_ignored": "Heads",
        "gain_kept": "GainFirst",
        "gain_after": "GainFirst",
        "reader_transposed": "ReaderSide",
        "writer_not_transposed": "WriterSide",
        "bias_kept": "Bias",
        "identity_where_none": "NoMatrix",
        "tail_kept": "BadInner",
        "any_q": "NotOrthogonal",
        "noise": "Random",
    },
    "transform.dartquant": {
        "signed": "Absolute",
        "mean_of_channels": "SumOverChannels",
        "sum_of_tokens": "MeanOverTokens",
        "unit_tokens": "RawInputs",
        "straight": "ThroughQR",
        "upper_triangle": "LowerTriangle",
        "no_inverse": "InverseR",
        "signs_of_lapack": "PositiveDiagonal",
        "slope_1_at_zero": "SlopeAtZero",
        "noise": "Random",
    },
    "transform.smoothattention": {
        "unpaired": "Paired",
        "neighbours": "HalfSplit",
        "mean": "AbsMax",
        "signed": "AbsMax",
        "other_way": "Direction",
        "tiled": "Groups",
        "always_root": "Alpha",
        "no_root": "Alpha",
        "tiny_for_dead": "DeadPair",
        "any_alpha": "BadParams",
    },
    "quant.qoq": {
        "127": "Protected",
        "exact_scale": "StoredScale",
        "of_the_weights": "FromInt8",
        "rounded_up": "IntegerLevel",
        "range_of_128": "LevelAtLeastOne",
        "zero_not_clipped": "ZeroClip",
        "post_scale": "PreScale",
        "one_scale": "RowScale",
        "ties_away": "TieToEven",
        "noise": "Random",
        "nan_to_zero": "NonFinite",
        "tail_dropped": "GroupNotDividing",
        "saturates": "ScaleOverflow",
    },
}


def mutant(bug):
    """An implementation with one mistake."""
    return lambda op, params, inputs: _OPS[op](bug, params, **inputs)


def base(n):
    """(K, B_K) of the sizes that the suite has."""
    odd = n // (n & -n)
    if odd == 1:
        return 1, np.ones((1, 1))
    if odd != 3 or n % 12:
        raise ValueError(f"no matrix of size {n}")
    i = np.arange(11)
    symbol = np.where(np.isin(np.arange(11), [1, 3, 4, 5, 9]), 1, -1)
    symbol[0] = 0
    B = np.ones((12, 12))
    B[0, 0], B[1:, 0] = 0, -1
    B[1:, 1:] = symbol[(i - i[:, None]) % 11]
    return 12, B + np.eye(12)


def rotation(bug, width, inner):
    if inner < 1 or width % inner:
        if bug != "tail_kept":
            raise ValueError("inner must divide the width")
        return np.eye(width)
    n = width // inner
    try:
        K, B = base(n)
    except ValueError:
        if bug == "identity_where_none":
            return np.eye(width)
        raise
    S = np.ones((1, 1))
    while len(S) < n // K:
        S = np.block([[S, S], [S, -S]])
    H = np.kron(S, B) if bug == "base_inside" else np.kron(B, S)
    H = H / {"not_normalised": 1, "divided_by_n": n}.get(bug, n**0.5)
    H = H.T if bug == "from_the_left" else H
    return np.kron(np.eye(inner), H) if bug == "inner_ignored" else np.kron(H, np.eye(inner))


def quarot(bug, params, **inputs):
    if "w" not in inputs:
        return folded(bug, **inputs)
    w, x = (inputs[name].astype(np.float64) for name in ("w", "x"))
    Q = rotation(bug, w.shape[1], params["inner"])
    stored, turned = w @ Q, x @ Q
    if bug == "noise" and w.size > 30:
        stored[:, -1] += 1e-2
    outputs = {"stored": stored, "turned": turned, "y": turned @ stored.T}
    return {name: array.astype(np.float32) for name, array in outputs.items()}


def folded(bug, gain, reader, writer, bias, q):
    if np.abs(q.T @ q - np.eye(len(q))).max() > 1e-6 and bug != "any_q":
        raise ValueError("q is not orthogonal")
    side = q.T if bug == "reader_transposed" else q
    read = reader @ side if bug == "gain_kept" else (reader * gain) @ side
    read = (reader @ side) * gain if bug == "gain_after" else read
    other = q if bug == "writer_not_transposed" else q.T
    turned = bias if bug == "bias_kept" else q.T @ bias
    outputs = {"reader": read, "writer": other @ writer, "bias": turned[None]}
    return {name: array.astype(np.float32) for name, array in outputs.items()}


def dartquant(bug, params, x, z):
    q, r = np.linalg.qr(z)
    if bug != "signs_of_lapack":
        signs = np.sign(np.diag(r))
        q, r = q * signs, r * signs[:, None]
    if bug == "unit_tokens":
        x = x / np.maximum(np.sqrt(np.mean(x**2, axis=1, keepdims=True)), 1e-9)
    o = x @ q
    size = o if bug == "signed" else np.abs(o)
    sign = np.where(o >= 0, 1, -1) if bug == "slope_1_at_zero" else np.sign(o)
    sign = np.ones_like(o) if bug == "signed" else sign
    n = {"sum_of_tokens": 1, "mean_of_channels": o.size}.get(bug, len(x))
    loss, of_q = np.exp(-size).sum() / n, x.T @ (-sign * np.exp(-size)) / n
    m = -of_q.T @ q
    mirrored = np.triu(m) + np.triu(m, 1).T if bug == "upper_triangle" else np.tril(m) + np.tril(m, -1).T
    gradient = of_q + q @ mirrored
    gradient = gradient if bug == "no_inverse" else gradient @ np.linalg.inv(r).T
    gradient = of_q if bug == "straight" else gradient
    gradient = gradient * (1 + 1e-4 * (bug == "noise" and len(z) > 2))
    return {"loss": np.array(loss), "q": q, "gradient": gradient, "z_next": z - params["rate"] * gradient}


def smoothattention(bug, params, keys, q, k):
    alpha = params["alpha"]
    if not 0 <= alpha <= 1 and bug != "any_alpha":
        raise ValueError("alpha lies between 0 and 1")
    heads, _, D = keys.shape
    top = {"mean": np.abs(keys).mean(axis=1), "signed": keys.max(axis=1)}.get(bug, np.abs(keys).max(axis=1))
    top = np.abs(top).astype(np.float64)
    first, second = (top[:, 0::2], top[:, 1::2]) if bug == "neighbours" else (top[:, : D // 2], top[:, D // 2 :])
    pairs = first if bug == "unpaired" else np.maximum(first, second)
    pairs = np.where(pairs > 0, pairs, 1e-5 if bug == "tiny_for_dead" else 1)
    s = pairs ** {"always_root": 0.5, "no_root": 1.0}.get(bug, alpha)
    both = np.concatenate([s, s], axis=1)
    group = len(q) // D // heads
    of_q = np.tile(both, (group, 1)) if bug == "tiled" else np.repeat(both, group, axis=0)
    both, of_q = (1 / both, 1 / of_q) if bug == "other_way" else (both, of_q)
    q, k = q * of_q.ravel()[:, None], k / both.ravel()[:, None]
    return {"factors": s, "q": q.astype(np.float32), "k": k.astype(np.float32)}


def qoq(bug, params, w):
    if bug == "nan_to_zero":
        w = np.nan_to_num(w)
    if not np.isfinite(w).all():
        raise ValueError("NaN")
    out, columns = w.shape
    width = columns if params["group_size"] == -1 else params["group_size"]
    if columns % width:
        if bug != "tail_dropped":
            raise ValueError("groups fill the row")
        w = w[:, : columns - columns % width]
    rint = (lambda v: np.sign(v) * np.floor(np.abs(v) + 0.5)) if bug == "ties_away" else np.rint
    most = 127 if bug == "127" else 119
    amax = np.abs(w).max(axis=1, keepdims=True)
    amax = np.full_like(amax, amax.max()) if bug == "one_scale" else amax
    exact = amax / np.float32(most)
    if exact.max() > 65504:
        if bug != "saturates":
            raise ValueError("beyond float16")
        exact = np.minimum(exact, np.float32(65504))
    scale = np.maximum(exact.astype(np.float16), np.float16(2.0**-24))
    divisor = np.maximum(exact, np.float32(2.0**-24)) if bug == "exact_scale" else scale.astype(np.float32)
    q0 = w / divisor if bug == "of_the_weights" else np.clip(rint(w / divisor), -most, most)
    q0 = q0.astype(np.float64).reshape(out, -1, width)
    low, high = np.minimum(q0.min(axis=2), 0), np.maximum(q0.max(axis=2), 0)
    level = np.ceil((high - low) / 15) if bug == "rounded_up" else rint((high - low) / 15)
    level = np.maximum(level, 2 if bug == "range_of_128" else 1)
    if bug == "post_scale":
        zero = -low / level
        codes = np.clip(rint((q0 - low[..., None]) / level[..., None]), 0, 15)
    else:
        zero = rint(-low / level)
        zero = zero if bug == "zero_not_clipped" else np.clip(zero, 0, 15)
        codes = np.clip(rint(q0 / level[..., None] + zero[..., None]), 0, 15)
    if bug == "noise" and w.size > 30:
        codes[..., 0] = (codes[..., 0] + 1) % 16
    int8 = (rint(codes * level[..., None] - (zero * level)[..., None])).reshape(out, -1)
    outputs = {"scale": scale, "level": level.astype(np.uint8), "zero": np.rint(zero).astype(np.uint8)}
    outputs |= {"codes": codes.reshape(out, -1).astype(np.uint8), "int8": int8.astype(np.int64).astype(np.int8)}
    return outputs | {"w_hat": (int8 * scale.astype(np.float32)).astype(np.float32)}


_OPS = {
    "transform.quarot": quarot,
    "transform.dartquant": dartquant,
    "transform.smoothattention": smoothattention,
    "quant.qoq": qoq,
}
