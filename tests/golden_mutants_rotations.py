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


_OPS = {"transform.quarot": quarot, "transform.dartquant": dartquant}
