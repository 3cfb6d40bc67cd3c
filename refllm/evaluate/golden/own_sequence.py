"""refllm's answers to the suites of stores that give tokens up, see `refllm.evaluate.golden.own`."""

import numpy as np


def _calls(store, chunks: list[int], k, v, q=None):
    """Feed a store; what its last call returned."""
    start, seen = 0, None
    for count in chunks:
        part = slice(start, start + count)
        seen = store.extend(k[:, part], v[:, part], np.arange(part.start, part.stop), None if q is None else q[:, part])
        start = part.stop
    return seen


def _of_heads(positions: np.ndarray, heads: int) -> np.ndarray:
    return np.broadcast_to(positions, (heads, positions.shape[-1])).astype(np.int64)


def _streaming(params: dict, k: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.streaming import streaming

    store = streaming(0, sinks=params["sinks"], recent=params["recent"])
    keys, _, at = _calls(store, params["chunks"], k, k)
    kept = store.tokens.positions.astype(np.int64)
    return {"seen": keys[0, :, 0].astype(np.int64), "distance": store.length - 1 - at, "kept": kept}


def _h2o(params: dict, q: np.ndarray, k: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.h2o import h2o

    store = h2o(0, heavy=params["heavy"], recent=params["recent"])
    _calls(store, params["chunks"], k, k, q)
    return {"kept": _of_heads(store.tokens.positions, len(k)), "scores": store.scores}


def _snapkv(params: dict, q: np.ndarray, k: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.snapkv import snapkv

    store = snapkv(0, **params)
    _calls(store, [k.shape[1]], k, k, q)
    return {"kept": _of_heads(store.tokens.positions, len(k))}


def _razor(params: dict, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.razor import choose, razor

    if "induction" in arrays:
        return {"heads": np.array(choose(arrays["induction"], arrays["echo"], *params["shares"]))}
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    store = razor(0, divisor=10**6, **params)
    last = k.shape[1] - 1
    store.extend(k[:, :last], v[:, :last], np.arange(last))
    o = store.attend(q, k[:, last:], v[:, last:], np.array([last]), scale=0.5)
    return {"o": o[:, 0], "dropped": np.array(store.dropped)}


def _freekv(params: dict, q: np.ndarray, k: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.freekv import freekv

    knobs = {name: value for name, value in params.items() if name != "chunks"}
    store = freekv(0, skip_layers=0, **knobs)
    at = _calls(store, params["chunks"], k, k, q)[2]
    corrected = np.zeros(len(k), np.uint8) if store.corrected is None else store.corrected.astype(np.uint8)
    return {"seen": _of_heads(at, len(k)), "recalled": np.array(store.recalled), "corrected": corrected}


def _pqcache(params: dict, q: np.ndarray, k: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.pqcache import pqcache

    store = pqcache(0, **{name: value for name, value in params.items() if name != "steps"})
    at = _calls(store, [k.shape[1] - params["steps"], *[1] * params["steps"]], k, k, q)[2]
    return {"seen": _of_heads(at, len(k)), "recalled": np.array(store.recalled)}


OPS = {
    "kvcache.streaming": _streaming,
    "kvcache.h2o": _h2o,
    "kvcache.snapkv": _snapkv,
    "kvcache.razor": _razor,
    "kvcache.freekv": _freekv,
    "kvcache.pqcache": _pqcache,
}
