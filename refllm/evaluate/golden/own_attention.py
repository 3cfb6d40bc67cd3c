"""refllm's own implementation of the ops about attention on codes and sparse attention."""

import numpy as np


def _fp8(params: dict, q, k, v, q_positions, k_positions) -> dict[str, np.ndarray]:
    from refllm.kernels.online_softmax import by_kv_head
    from refllm.methods.attention.fp8 import encode, flash_fp8_with_lse

    o, lse = flash_fp8_with_lse(q, k, v, q_positions, k_positions, incoherent=False, **params)
    whole = params["granularity"] == "head"
    rows = lambda name: None if whole else params[name]
    codes, scale = encode(by_kv_head(q, len(k)), rows("block_q"), "q", joint=whole)
    outputs = {"o": o, "lse": lse, "q_codes": codes.reshape(q.shape), "q_scale": scale.reshape(q.shape[:-1])}
    for name, x in (("k", k), ("v", v)):
        outputs[f"{name}_codes"], outputs[f"{name}_scale"] = encode(x, rows("block_k"), name)
    return outputs


def _sage(params: dict, q, k, v, q_positions, k_positions) -> dict[str, np.ndarray]:
    from refllm.methods.attention.sage import round_rows, sage_with_lse

    o, lse = sage_with_lse(q, k, v, q_positions, k_positions, **params)
    outputs = {"o": o, "lse": lse}
    for name, x, smooth in (("q", q, params["smooth_q"]), ("k", k, params["smooth_k"])):
        x = x.astype(np.float64)
        x = x - x.mean(axis=-2, keepdims=True) * smooth
        outputs[f"{name}_codes"], outputs[f"{name}_scale"] = round_rows(x, params["bits"], params["granularity"], name)
    return outputs


OPS = {"attention.fp8": _fp8, "attention.sage": _sage}
