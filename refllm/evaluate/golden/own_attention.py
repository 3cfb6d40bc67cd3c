"""refllm's answers to the suites of attention: exact, on codes and sparse, see `refllm.evaluate.golden.own`."""

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


def _minference(params: dict, q, k, q_positions, k_positions) -> dict[str, np.ndarray]:
    from importlib import import_module

    from refllm.kernels import sparse_attention as sparse

    module, p, at = import_module("refllm.methods.attention.minference"), params, (q_positions, k_positions)
    module.minference(q, k, k, *at, **p)  # refuses what is out of range
    if p["pattern"] == "a_shape":
        return {"blocks": module.a_shape(*at, p["sink"], p["local"], p["block"], len(q)).astype(np.uint8)}
    if p["pattern"] == "block":
        allowed = sparse.per_query_head(sparse.visible_blocks(*at, None, p["block"], p["block"]), len(q))
        scores = sparse.block_scores(q, k, allowed, p["scale"], p["block"], p["block"])
        return {"blocks": sparse.keep_best(scores, np.array(p["top"]), allowed).astype(np.uint8)}
    A = module.last_weights(q, k, *at, p["last"], p["scale"])
    columns, offsets = module.top_columns(A, p["vertical"]), module.top_offsets(A, *at, p["slash"])
    outputs = {"columns": columns, "offsets": offsets, "blocks": module.slash_blocks(offsets, *at, p["block"])}
    return {name: mask.astype(np.uint8) for name, mask in outputs.items()}


def _adaspa(params: dict, q, k, q_positions, k_positions) -> dict[str, np.ndarray]:
    from importlib import import_module

    from refllm.kernels.online_softmax import walk_tiles
    from refllm.kernels.sparse_attention import per_query_head, visible_blocks

    module, at = import_module("refllm.methods.attention.adaspa"), (q_positions, k_positions)
    q, k, block, sparsity = q.astype(np.float64), k.astype(np.float64), params["block"], params["sparsity"]
    lse = walk_tiles(q, k, k, *at, scale=params["scale"])[1]
    W = module.block_mass(q, k, lse, *at, scale=params["scale"], block=block)
    allowed = per_query_head(visible_blocks(*at, None, block, block), len(q))
    blocks = module.block_mask(W, allowed, sparsity, adaptive=params["adaptive"])
    blocks |= module.text_blocks(q.shape[1], k.shape[1], params["text"], block) & allowed
    each = module.head_sparsities(W, allowed, sparsity) if params["adaptive"] else np.full(len(q), sparsity)
    return {"mass": W, "sparsity": each, "blocks": blocks.astype(np.uint8)}


def _rainfusion(params: dict, q, k, q_positions, k_positions) -> dict[str, np.ndarray]:
    from importlib import import_module

    module, p, n = import_module("refllm.methods.attention.rainfusion"), params, k.shape[1]
    grid = module.check_grid(p["frames"], p["height"], p["width"], n, q.shape[1])
    rows, order = np.arange(0, grid[0] * grid[1] * grid[2], grid[0]), module.window_order(grid, n)
    masks = [module.kind_mask(kind, grid, n, p["bandwidth"]) for kind in ("temporal", "spatial")]
    recalls = np.stack([module.recall(q, k, mask, rows, scale=p["scale"]) for mask in masks])
    at = q_positions[order], k_positions[order]
    blocks = module.window_blocks(q[:, order], k[:, order], *at, grid, p["sparsity"], p["block"], scale=p["scale"])
    return {"recalls": recalls, "order": order, "blocks": blocks.astype(np.uint8)}


def _attend(params: dict, **arrays: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Every attention that claims to be exact, the tiled ones with tiles that cut the small cases up."""
    from refllm.kernels.attention import attend
    from refllm.methods.attention.flash import flash_v1_with_lse, flash_with_lse
    from refllm.methods.attention.split import flash_decoding_with_lse

    answers = {"attend": {"o": attend(**arrays, **params)}}
    for name, call, knobs in (
        ("flash", flash_with_lse, {}),
        ("flash, tiles of 2 x 3", flash_with_lse, {"block_q": 2, "block_k": 3}),
        ("flash_v1", flash_v1_with_lse, {}),
        ("flash_decoding, 3 parts", flash_decoding_with_lse, {"splits": 3, "block_k": 1}),
        ("flash_v1, small tiles", flash_v1_with_lse, {"sram": 8 * arrays["q"].shape[-1]}),
    ):
        answers[name] = dict(zip(("o", "lse"), call(**arrays, **params, **knobs), strict=True))
    return answers


OPS = {
    "attention.attend": _attend,
    "attention.fp8": _fp8,
    "attention.sage": _sage,
    "attention.minference": _minference,
    "attention.adaspa": _adaspa,
    "attention.rainfusion": _rainfusion,
}
