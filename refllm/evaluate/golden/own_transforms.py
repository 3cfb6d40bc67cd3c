"""refllm's answers to the suites of rotations and scales moved between weights."""

import numpy as np


def _quarot(params: dict, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """An input turned at run time, or a rotation folded into weights."""
    if "w" in inputs:
        from refllm.kernels.packed import matmul
        from refllm.kernels.packed.rotated import Rotated

        record = Rotated.of(inputs["w"], params["inner"])
        x = inputs["x"]
        return {"stored": record.weight, "turned": record.turned(x), "y": matmul(x, record)}
    return _folded(**inputs)


def _one_layer(d: int, heads: int, kv_heads: int, head_dim: int):
    """A config for ops that move numbers between the weights of a layer."""
    from refllm.kernels.rope import Rope
    from refllm.model.config import ModelConfig

    return ModelConfig(
        "llama", vocab_size=2, hidden_size=d, num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        intermediate_size=2, context_length=2, norm_eps=1e-5, rope=Rope(1e4), tied_embeddings=False, output_bias=True,
    )  # fmt: skip


def _folded(gain, reader, writer, bias, q) -> dict[str, np.ndarray]:
    """In a model of one layer whose other weights are zeros: q_proj reads the residual stream, o_proj writes to it."""
    from refllm.model.equivalent import fold_norms, rotate_residual
    from refllm.model.model import Model
    from refllm.model.names import expected_shapes

    config = _one_layer(len(gain), len(reader) // 2, 1, 2)
    weights = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(config).items()}
    names = ("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.o_proj.weight", "self_attn.o_proj.bias")
    norm, read, write, added = (f"model.layers.0.{name}" for name in names)
    weights |= {norm: gain, read: reader, write: writer, added: bias}
    turned = rotate_residual(fold_norms(Model(config, weights)), q).weights
    return {"reader": turned[read], "writer": turned[write], "bias": turned[added][None]}


def _smoothattention(params: dict, keys: np.ndarray, q: np.ndarray, k: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.transform.smoothattention import factors
    from refllm.model.equivalent import divide_keys

    kv_heads, _, D = keys.shape
    s = factors(np.abs(keys).max(axis=1), params["alpha"])
    of_q, of_k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    weights = {of_q: q, of_k: k}
    divide_keys(weights, _one_layer(q.shape[1], len(q) // D, kv_heads, D), 0, s)
    return {"factors": s, "q": weights[of_q], "k": weights[of_k]}


def _qoq(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.formats.bits import unpack_bits
    from refllm.methods.quant.qoq import qoq

    record = qoq(w, **params)
    level, zero = (a.astype(np.uint8) for a in record.levels())
    codes = unpack_bits(record.codes, 4, record.columns)
    outputs = {"scale": record.scale, "level": level, "zero": zero, "codes": codes}
    return outputs | {"int8": record.int8().astype(np.int8), "w_hat": record.dense()}


def _dartquant(params: dict, x: np.ndarray, z: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.transform.dartquant import qr, qr_gradient, whip

    q, r = qr(z)
    loss, of_q = whip(x, q)
    gradient = qr_gradient(q, r, of_q)
    return {"loss": np.array(loss), "q": q, "gradient": gradient, "z_next": z - params["rate"] * gradient}


OPS = {
    "transform.quarot": _quarot,
    "transform.dartquant": _dartquant,
    "transform.smoothattention": _smoothattention,
    "quant.qoq": _qoq,
}
