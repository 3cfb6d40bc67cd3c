"""refllm's own implementation of the ops about rounded inputs and outliers, and about codes made for them."""

import numpy as np


def _dynamic(params: dict, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed.activations import Rounding

    codes, scale, zero = Rounding(**params).steps(x)
    return {"codes": codes, "scale": scale} | ({} if zero is None else {"zero": zero})


def _static(params: dict, calibration: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed.sparse import Plain
    from refllm.kernels.stats import Stats
    from refllm.methods.finish.static import static

    made = static(Plain(np.ones((1, x.shape[1]), np.float32)), None, Stats(calibration), **params)
    outputs = {"codes": made.steps(x)[0], "scale": made.scale}
    return outputs if made.zero_point is None else outputs | {"zero_point": made.zero_point}


def _llm_int8(params: dict, w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed import matmul
    from refllm.methods.quant.llm_int8 import llm_int8

    record = llm_int8(w, **params)
    steps, scale, _ = record.steps(x)
    return {
        "w_codes": (record.weight.unpacked().astype(np.int16) - 128).astype(np.int8),
        "w_scale": record.weight.scale,
        "x_codes": steps,
        "x_scale": scale,
        "outliers": record.outliers(x)[None].astype(np.uint8),
        "y": matmul(x, record),
    }


def _zeroquant(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.quant.zeroquant import zeroquant, zeroquant_fp

    method = {"integer": zeroquant, "float": zeroquant_fp}[params["form"]]
    record = method(w, **{name: value for name, value in params.items() if name != "form"}).weight
    return {"codes": record.unpacked(), "scale": record.scale, "w_hat": record.dense()}


def _olive(params: dict, w: np.ndarray, scale: np.ndarray | None = None) -> dict[str, np.ndarray]:
    from refllm.kernels.pairs import encode_pairs, pair_table, round_pairs
    from refllm.methods.quant.olive import olive

    if scale is None:
        record = olive(w, **params)
        return {"codes": record.unpacked()[..., 0], "scale": record.scale, "w_hat": record.dense()}
    codes = encode_pairs(round_pairs(w / scale, params["normals"]), params["normals"])
    decoded = pair_table(params["normals"])[codes].astype(np.float32).reshape(w.shape)
    return {"codes": codes, "w_hat": decoded * scale}


def _spark(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.quant.spark import spark

    record = spark(w, **params)
    outputs = {name: getattr(record, name) for name in ("stream", "signs", "scale")}
    return outputs | {"row_bytes": record.row_bytes.astype(np.int64), "w_hat": record.dense()}


def _lorc(params: dict, w: np.ndarray, w_hat: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed.sparse import Plain
    from refllm.methods.finish.lorc import lorc

    repaired = lorc(Plain(w_hat), w, **params).dense()
    return {"repaired": repaired, "error": np.array(np.sum((w.astype(np.float64) - repaired) ** 2))}


def _smoothquant(params: dict, absmax, gain, first, second) -> dict[str, np.ndarray]:
    from refllm.methods.transform.smoothquant import inverted_scales, scales
    from refllm.model.equivalent import scale_gain, scale_weight

    rule = inverted_scales if params.get("inverted") else scales
    s = rule(absmax[0], [first, second], params["alpha"])
    weights = {"gain": gain[0], "first": first, "second": second}
    scale_gain(weights, "gain", 1 / s, 0.0)
    for name in ("first", "second"):
        scale_weight(weights, name, columns=s)
    return weights | {"s": s[None], "gain": weights["gain"][None]}


def _osplus(params: dict, x: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    from importlib import import_module

    from refllm.kernels.grids import SymmetricGrid
    from refllm.kernels.packed.activations import Rounding

    module = import_module("refllm.methods.transform.osplus")
    high, low, bits = x.max(axis=0), x.min(axis=0), params["bits"]
    grid = SymmetricGrid(bits, -1, "float32")
    loss = module.rounded_loss(lambda x, weights: x @ weights[0].T, x[None], [w], Rounding(bits), grid)
    s, t = module.search(high, low, loss, params["steps"])
    return {"s": s[None], "t": np.array(t), "z": module.shift(high, low)[None]}


def _teal(params: dict, calibration: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed.sparse import Plain
    from refllm.kernels.stats import Stats
    from refllm.methods.finish.teal import teal

    record = teal(Plain(np.ones((1, x.shape[1]), np.float32)), None, Stats(calibration), **params)
    return {"threshold": record.threshold, "kept": record.kept(x).astype(np.uint8)}


def _amber(params: dict, w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed.sparse import Plain
    from refllm.methods.finish.amber import amber, column_factors

    record = amber(Plain(w), w, **params)
    found = {"factor": column_factors(w), "kept": record.kept(x).astype(np.uint8)}
    if "bits" in params:
        found["codes"], found["scale"], _ = record.steps(x)
    return found


OPS = {
    "finish.teal": _teal,
    "finish.amber": _amber,
    "activations.dynamic": _dynamic,
    "finish.static": _static,
    "finish.lorc": _lorc,
    "quant.llm_int8": _llm_int8,
    "quant.zeroquant": _zeroquant,
    "quant.olive": _olive,
    "quant.spark": _spark,
    "transform.smoothquant": _smoothquant,
    "transform.osplus": _osplus,
}
