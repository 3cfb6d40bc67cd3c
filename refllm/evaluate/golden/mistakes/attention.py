"""Mistakes of attention, rotary embedding, caches and speculative decoding: small definitions with one twist each."""

from collections.abc import Iterator

import numpy as np

from refllm.evaluate.golden.mistakes.base import Given, Hypothesis


def predict(given: Given) -> Iterator[Hypothesis]:
    """Predictions for attention.attend, model.rope.apply, model.rope.permute, kvcache.kivi, runtime.accept."""
    if given.op in _OPS:
        yield from _OPS[given.op](given)


# --- attention -------------------------------------------------------------------------------------------------------

_ATTENTION = {
    "heads-interleaved": {"heads": "modulo"},
    "mask-top-left": {"places": "query"},
    "no-self": {"self_seen": False},
    "window-one-wide": {"wider": 1},
    "window-one-narrow": {"wider": -1},
    "window-ignored": {"window": None},
    "positions-ignored": {"places": "both"},
    "first-head-positions": {"places": "head"},
    "softcap-ignored": {"softcap": None},
    "softcap-before-scale": {"cap_first": True},
    "masked-mean": {"masked": "mean"},
    "masked-nan": {"masked": "nan"},
    "no-maximum": {"maximum": "none"},
    "maximum-of-masked": {"maximum": "all"},
    "scale-of-root-d": {"scale": "root"},
    "scale-missing": {"scale": "one"},
    "lse-base-2": {"lse": "base 2"},
    "mask-missing": {"places": "none"},
}


def _attention(given: Given) -> Iterator[Hypothesis]:
    for mistake, twist in _ATTENTION.items():
        outputs = attention(given.inputs, given.params, **twist)
        yield Hypothesis(mistake, "", outputs)
        yield Hypothesis(mistake, "whatever the lse", outputs | {"lse": None})


def attention(inputs, params, *, heads="divide", places="", self_seen=True, wider=0, masked="", maximum="", lse="",
              cap_first=False, **replaced) -> dict[str, np.ndarray]:  # fmt: skip
    """The outputs of attention.attend as its header defines them, but for the twists."""
    q, k, v = (inputs[name].astype(np.float64) for name in "qkv")
    options = params | replaced
    scale = {"root": q.shape[-1] ** -0.5, "one": 1.0}.get(options["scale"], params["scale"])
    window, softcap = options.get("window"), options.get("softcap")
    h = np.arange(len(q))
    of = h % len(k) if heads == "modulo" else h // max(len(q) // len(k), 1) % len(k)
    k, v = k[of], v[of]
    ours, theirs = _positions(inputs, places, of, q.shape[1], k.shape[1])
    seen = theirs <= ours if self_seen else theirs < ours
    if window is not None:
        seen &= theirs > ours - window - wider
    seen |= places == "none"
    raw = np.einsum("htd,hsd->hts", q, k)
    if cap_first and softcap:
        score = softcap * np.tanh(raw / softcap) * scale
    else:
        score = raw * scale
        score = softcap * np.tanh(score / softcap) if softcap else score
    if maximum == "none":
        score = score.astype(np.float32)
    return _mixed(score, seen, v, masked, maximum, lse)


def _positions(inputs, places, of, queries, keys):
    ours, theirs = inputs["q_positions"][None, :, None], np.atleast_2d(inputs["k_positions"])
    theirs = theirs[of if len(theirs) > 1 else [0] * len(of)][:, None, :]
    if places == "head":
        theirs = np.repeat(theirs[:1], len(of), axis=0)
    if places in ("query", "both"):
        theirs = np.broadcast_to(np.arange(keys), theirs.shape)
        ours = np.arange(queries)[None, :, None] + (keys - queries if places == "both" else 0)
    return ours, theirs


def _mixed(score, seen, v, masked, maximum, lse):
    hidden = np.where(seen, score, -np.inf)
    top = (score if maximum == "all" else hidden).max(-1, keepdims=True, initial=-np.inf)
    top = np.zeros_like(top) if maximum == "none" else top
    nothing = ~seen.any(-1, keepdims=True)
    if masked == "mean":
        hidden = np.where(nothing, 0, hidden)
        top = np.where(nothing, 0, top)
    elif masked != "nan":
        top = np.where(nothing, 0, top)
    real = score.dtype
    weights = np.exp((hidden - top).astype(np.float32 if maximum else real))
    total = weights.sum(-1, keepdims=True)
    o = np.einsum("hts,hsd->htd", weights, v.astype(weights.dtype))
    o = o / (total if masked or maximum else np.where(total == 0, 1, total))
    value = (np.log(total) + top)[..., 0]
    return {"o": o, "lse": value / np.log(2) if lse else value}


# --- rotary embedding ------------------------------------------------------------------------------------------------


def _rope(given: Given) -> Iterator[Hypothesis]:
    x, positions, params = given.inputs["x"], given.inputs["positions"], given.params
    other = {"half_split": "interleaved", "interleaved": "half_split"}[params["layout"]]
    yield Hypothesis("rope-layout", "", given.right({"layout": other}))
    yield Hypothesis("rope-backwards", "", {"y": _turned(x, -positions, params)})
    yield Hypothesis("positions-from-zero", "", given.right(positions=positions - positions.min(initial=0)))
    yield Hypothesis("positions-from-zero", "places", given.right(positions=np.arange(len(positions))))
    yield Hypothesis("positions-from-one", "", given.right(positions=positions + 1))
    yield Hypothesis("theta-10000", "", given.right({"theta": 10000.0}))
    if "factor" in params:
        yield Hypothesis("scaling-ignored", "", given.right({"factor": 1.0}))
        yield Hypothesis("scaling-inverted", "", given.right({"factor": 1 / params["factor"]}))
    yield Hypothesis("rope-frequency-step", "", {"y": _turned(x, positions, params, step=1)})


def _turned(x, positions, params, step=2) -> np.ndarray:
    """x rotated, the exponent of the frequencies rising by `step` / head_dim from pair to pair."""
    D = x.shape[-1]
    angle = positions[:, None] * params["theta"] ** (-step * np.arange(D // 2) / D) / params.get("factor", 1.0)
    cos, sin = np.cos(angle), np.sin(angle)
    half = params["layout"] == "half_split"
    a, b = (x[..., : D // 2], x[..., D // 2 :]) if half else (x[..., 0::2], x[..., 1::2])
    pair = a * cos - b * sin, a * sin + b * cos
    return np.concatenate(pair, -1) if half else np.stack(pair, -1).reshape(x.shape)


def _permute(given: Given) -> Iterator[Hypothesis]:
    w, p = given.inputs["w"], given.params
    other = {"to_half_split": "to_interleaved", "to_interleaved": "to_half_split"}[p["direction"]]
    yield Hypothesis("permuted-backwards", "", given.right({"direction": other}))
    yield Hypothesis("not-permuted", "", {"permuted": w})
    for heads, words in ((p["num_heads"], "all query heads"), (p["num_heads"] // p["num_kv_heads"], "heads a group"),
                         (1, "one head")):  # fmt: skip
        if p["tensor"] == "k" and p["num_heads"] != p["num_kv_heads"] and heads and len(w) % (2 * heads) == 0:
            yield Hypothesis("permuted-with-wrong-heads", words, {"permuted": w[_order(len(w), heads, p["direction"])]})


def _order(rows: int, heads: int, direction: str) -> np.ndarray:
    inner = (rows // heads // 2, 2) if direction == "to_half_split" else (2, rows // heads // 2)
    return np.arange(rows).reshape(heads, *inner).swapaxes(1, 2).reshape(-1)


# --- key-value cache -------------------------------------------------------------------------------------------------


def _kivi(given: Given) -> Iterator[Hypothesis]:
    """What attention sees; what is stored besides is left open."""
    k, v, p = given.inputs["k"], given.inputs["v"], given.params
    open_ = dict.fromkeys(given.expected.keys() - {"k_hat", "v_hat"})
    R, G, bits = p["residual"], p["group_size"], p["bits"]
    before = k.shape[1] - p["chunks"][-1]
    keys, values = before // R * R, max(before - R, 0)
    if k.shape[-1] % G or v.shape[-1] % G:
        return
    first = p["chunks"][0]
    for words, tokens in (
        ("", first // R * R),
        ("those that age out of the first call", max(first - R, 0)),
        ("all", 0),
    ):
        if len(p["chunks"]) > 1:
            yield Hypothesis("decode-keys-in-full", words, open_ | {"k_hat": _grouped(k, tokens, 1, R, G, bits)})
            both = {"k_hat": _grouped(k, tokens, 1, R, G, bits), "v_hat": _grouped(v, max(first - R, 0), 2, R, G, bits)}
            yield Hypothesis("decode-keys-in-full", f"{words} and values", open_ | both)
    yield Hypothesis("keys-per-token", "", open_ | {"k_hat": _grouped(k, keys, 2, R, G, bits)})
    yield Hypothesis("keys-per-token", "as old as values", open_ | {"k_hat": _grouped(k, values, 2, R, G, bits)})
    yield Hypothesis("values-per-channel", "", open_ | {"v_hat": _grouped(v, keys, 1, R, G, bits)})
    every = k.shape[1]
    prefill = {
        "k_hat": _grouped(k, every // R * R, 1, R, G, bits),
        "v_hat": _grouped(v, max(every - R, 0), 2, R, G, bits),
    }
    yield Hypothesis("quantised-before-use", "", prefill)


def _grouped(x, tokens: int, axis: int, R: int, G: int, bits: int) -> np.ndarray:
    """The first `tokens` tokens quantised in groups of G along an axis, the rest as it is."""
    out = x.copy()
    tokens = tokens if axis == 2 else tokens // G * G
    part = np.moveaxis(x[:, :tokens], axis, -1)
    groups = part.reshape(*part.shape[:-1], part.shape[-1] // G, G)
    low, high = groups.min(-1, keepdims=True, initial=np.inf), groups.max(-1, keepdims=True, initial=-np.inf)
    near = low.astype(np.float16)
    near = np.where(near > low, np.nextafter(near, np.float16(-np.inf)), near).astype(np.float32)
    scale = ((high - near) / np.float32(2**bits - 1)).astype(np.float16).astype(np.float32)
    codes = np.rint(np.clip((groups - near) / np.where(scale == 0, np.float32(1), scale), 0, 2**bits - 1))
    out[:, :tokens] = np.moveaxis((scale * codes + near).reshape(part.shape), -1, axis)
    return out


# --- speculative decoding --------------------------------------------------------------------------------------------

_ACCEPT = {
    "accepts-by-p": {"ratio": lambda p, q: p},
    "accepts-if-above": {"ratio": lambda p, q: float(p >= q)},
    "accepts-all": {"ratio": lambda p, q: 2.0},
    "first-unverified": {"unverified": 1},
    "residual-is-p": {"residual": lambda p, q: p},
    "residual-absolute": {"residual": lambda p, q: np.abs(p - q)},
    "residual-is-q": {"residual": lambda p, q: q},
    "no-bonus-token": {"bonus": -1},
    "goes-on-after-rejection": {"stop": False},
    "row-one-late": {"row": 1},
    "greedy-residual": {"greedy": True},
}


def _accept(given: Given) -> Iterator[Hypothesis]:
    if "drafted" not in given.inputs:
        return
    for mistake, twist in _ACCEPT.items():
        accepted, token = accept(**given.inputs, **twist)
        yield Hypothesis(mistake, "", {"accepted": np.array(accepted), "next_id": np.array(token)})


def _ratio(p: float, q: float) -> float:
    return p / q if q else 2.0 * (p > 0)


def _rest(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.maximum(p - q, 0)


def accept(
    p, q, drafted, uniforms, *, ratio=_ratio, residual=_rest, unverified=0, bonus=0, stop=True, row=0, greedy=False
) -> tuple[int, int]:
    """Tokens kept and the next one by the header of runtime/speculative, but for the twists."""
    numbers = iter(uniforms.tolist())
    kept = 0
    for i, token in enumerate(drafted.tolist()):
        at = min(i + row, len(p) - 1)
        u = next(numbers, 0.0) if i >= unverified else -1.0
        if u < ratio(float(p[at, token]), float(q[i, token])):
            kept += 1
        elif stop:
            rest = residual(p[at], q[i])
            rest = rest if rest.sum() > 0 else p[at]
            return kept, int(rest.argmax()) if greedy else draw(rest, next(numbers, 0.0))
    last = p[min(len(drafted) + bonus, len(p) - 1)]
    return kept, int(last.argmax()) if greedy else draw(last, next(numbers, 0.0))


def draw(weights: np.ndarray, u: float) -> int:
    """The first id at which the cumulative sum exceeds u times the total."""
    reached = np.cumsum(weights)
    return int(np.argmax(reached > u * reached[-1]))


_OPS = {
    "attention.attend": _attention,
    "model.rope.apply": _rope,
    "model.rope.permute": _permute,
    "kvcache.kivi": _kivi,
    "runtime.accept": _accept,
}
