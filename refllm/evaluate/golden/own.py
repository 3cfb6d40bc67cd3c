"""refllm's own implementation of every op of the suites it ships: what `refllm golden verify` judges by default."""

import numpy as np

from refllm.evaluate.golden import (
    own_attention,
    own_checkpoints,
    own_kv_codes,
    own_latents,
    own_outliers,
    own_sequence,
)


def implementation(op: str, params: dict, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Answer one case.

    Parameters
    ----------
    op : str
    params : dict
    inputs : dict of arrays

    Returns
    -------
    dict of arrays

    Raises
    ------
    NotImplementedError
        An op that refllm does not have.
    ValueError
        An input that must be rejected.

    Examples
    --------
    >>> params = {"bits": 4, "group_size": -1, "symmetric": True, "scale_dtype": "float16"}
    >>> implementation("quant.rtn", params, {"w": np.float32([[7, -1]])})["codes"].tolist()
    [[15, 7]]
    """
    if op not in _OPS:
        raise NotImplementedError(f"refllm has no op {op!r}; it has {', '.join(_OPS)}")
    return _OPS[op](params, **inputs)


def _rtn(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.formats.bits import unpack_bits
    from refllm.methods.quant.rtn import rtn

    record = rtn(w, **params)
    codes = unpack_bits(record.codes, record.bits, record.columns)
    outputs = {"codes": codes, "packed": record.codes, "scale": record.scale, "w_hat": record.dense()}
    if record.zero_point is None:
        return outputs
    zero_point = unpack_bits(record.zero_point, record.bits, record.scale.shape[1])
    return outputs | {"zero_point": zero_point, "packed_zero_point": record.zero_point}


def _blockwise(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed.records import is_record
    from refllm.methods.quant.nf4 import fp4, nf4

    record = {"nf4": nf4, "fp4": fp4}[params["table"]](w, **{k: v for k, v in params.items() if k != "table"})
    outputs = {"codes": record.unpacked(), "w_hat": record.dense()}
    if not is_record(record.scale):
        return outputs | {"absmax": record.scale[0]}
    inner = record.scale
    return outputs | {"absmax": inner.unpacked()[0], "nested_absmax": inner.scale[0], "offset": inner.offset}


def _kquants(params: dict, layers: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.blockwise.kquants import layer_types

    mix, gqa, n = params["mix"], params["heads_per_group"], int(layers)
    code = {"Q2_K": 0, "Q3_K": 1, "Q4_K": 2, "Q5_K": 3, "Q6_K": 4}
    types = [[code[t] for t in layer_types(mix, i, n, gqa)] for i in range(n)]
    embedding = code["Q6_K" if params["tied_embeddings"] else mix[:4]]
    return {"types": np.array(types, np.uint8), "embedding": np.array([embedding], np.uint8)}


def _allocate(params: dict, loss: np.ndarray, nbytes: np.ndarray, budget: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.allocation import allocate

    return {"choice": allocate(loss, nbytes, int(budget))}


def _small_float(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed.encode_codes import small_float

    block = params["block_rows"], params["block_columns"]
    record = small_float(w, params["table"], block, params["scale_dtype"])
    return {"codes": record.unpacked(), "scale": record.scale, "w_hat": record.dense()}


def _omse(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.quant.omse import omse

    record = omse(w, **params)
    outputs = {"codes": record.unpacked(), "scale": record.scale, "w_hat": record.dense()}
    return outputs if record.zero_point is None else outputs | {"zero_point": record.scales()[1].astype(np.uint8)}


def _hqq(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.quant.hqq import hqq

    record = hqq(w, **params)
    return {
        "codes": record.unpacked(),
        "scale": record.scale,
        "minimum": record.minimum,
        "w_hat": record.dense(),
    }


def _aciq(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.quant.aciq import aciq

    record = aciq(w, **params)
    return {"codes": record.unpacked(), "scale": record.scale, "minimum": record.minimum}


def _squeezellm(params: dict, w: np.ndarray, fisher: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed.records import Sum
    from refllm.methods.quant.squeezellm import squeezellm

    record = squeezellm(w, None, fisher=fisher, **params)
    lut, mask = record, np.zeros(w.shape, np.uint8)
    outputs = {"w_hat": record.dense(), "mask": mask}
    if isinstance(record, Sum):
        lut, kept = record.terms
        mask.reshape(-1)[kept.places] = 1
        outputs["values"] = kept.values
    return outputs | {"codes": lut.unpacked(), "tables": lut.tables}


def _exl2(params: dict, w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.stats import Stats
    from refllm.methods.blockwise.exl2 import Rounder

    record = Rounder(params["steps"])(w, Stats(x), params["mix"])
    inner = record.weight
    outputs = {"order": record.order, "groups": inner.groups.astype(np.int64), "level": inner.levels()}
    outputs |= {"scale": inner.scale, "codes": inner.unpacked(), "w_hat": record.dense()}
    return outputs | {"nbytes": np.array(record.nbytes)}


def _exl2_choose(params: dict, error: np.ndarray, nbytes: np.ndarray, budget: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.blockwise.exl2 import choose

    return {"choice": choose(error, nbytes, int(budget), moves=1)[0]}


def _billm(params: dict, w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.stats import Stats
    from refllm.methods.quant.billm import billm

    record = billm(w, Stats(x), **params)
    planes = zip(("signs", "second", "salient"), record.unpacked(), strict=True)
    outputs = {name: plane.astype(np.uint8) for name, plane in planes}
    return outputs | {"mean": record.mean, "scale": record.scale, "w_hat": record.dense()}


def _binary(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.quant.binary import binary

    record = binary(w, **params)
    outputs = {"codes": record.unpacked(), "scale": record.scale, "minimum": record.minimum}
    return outputs | {"w_hat": record.dense()}


def _pq(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.quant.pq import pq

    record = pq(w, **params)
    return {"w_hat": record.dense(), "nbytes": np.array(record.nbytes)}


class _InOrder:
    """Gives things their own order where a generator is asked for a random one."""

    def permutation(self, count: int) -> range:
        """0, 1, 2 ..."""
        return range(count)


def _aqlm_search(params: dict, w, h, books, codes, scale) -> dict[str, np.ndarray]:
    from refllm.methods.quant.aqlm import Additive, beam_search, loss

    start = Additive(codes, books.astype(np.float64), scale.astype(np.float64))
    found = beam_search(w.astype(np.float64), h, start, 1, _InOrder())
    return {"codes": found.codes, "loss": np.array(loss(w, h, found) * len(w))}


def _vqllm(params: dict, codes: np.ndarray, books: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed.records import VectorWeight
    from refllm.methods.finish.vqllm import hit_rates, vqllm

    record = VectorWeight.pack(codes, books, None)
    done = vqllm(record, record.dense())
    return {"codes": done.unpacked(), "books": done.codebooks, "hits": np.array(hit_rates(done, **params))}


def _rtn_matmul(params, x, packed, scale, packed_zero_point=None) -> dict[str, np.ndarray]:
    from refllm.kernels.packed import matmul
    from refllm.kernels.packed.records import IntWeight

    if params["symmetric"] != (packed_zero_point is None):
        raise ValueError("zero points come with affine weights only")
    weight = IntWeight(packed, scale, packed_zero_point, params["bits"], params["group_size"], params["columns"])
    return {"y": matmul(x, weight)}


def _gptq(params: dict, w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.packed.records import Reordered
    from refllm.kernels.stats import Stats
    from refllm.methods.quant.gptq import gptq

    record = gptq(w, Stats(x), **params)
    reordered = isinstance(record, Reordered)
    inner = record.weight if reordered else record
    columns, groups = inner.columns, inner.scale.shape[1]
    order = record.order if reordered else np.arange(columns)
    codes, g_idx = np.empty(inner.shape, np.uint8), np.empty(columns, np.int32)
    codes[:, order] = inner.unpacked()
    g_idx[order] = np.arange(columns) // (columns // groups)
    outputs = {"codes": codes, "scale": inner.scale, "g_idx": g_idx}
    return outputs if inner.zero_point is None else outputs | {"zero_point": inner.scales()[1].astype(np.uint8)}


def _salient(params: dict, w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.stats import Stats
    from refllm.methods.quant.salient import salient

    record = salient(w, Stats(x), **params)
    kept = np.flatnonzero(record.second.mask()[0])
    columns = record.second.values.reshape(len(kept), len(w)).T
    return {"kept": kept, "columns": columns} | _integers(record.first)


def _integers(record) -> dict[str, np.ndarray]:
    scale, zero_point = record.scales()
    return {"codes": record.unpacked(), "scale": scale, "zero_point": zero_point.astype(np.uint8)}


def _awq(params: dict, w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.grids import MinMaxGrid
    from refllm.kernels.scales import CLIP_STEPS, clip_limits
    from refllm.kernels.stats import Stats
    from refllm.methods.blockwise.awq import best_scale, linear_change, pack

    grid, stats = MinMaxGrid(params["bits"], params["group_size"]), Stats(x)
    s, errors = best_scale({"w": w}, stats, linear_change(w, stats), lambda W: grid, params["duo_scaling"])
    scaled, inputs = (w * s).astype(np.float32), (x / s).astype(np.float32)
    amax = np.abs(scaled).reshape(len(w), -1, grid.group_size).max(axis=-1)
    limits = clip_limits(scaled, inputs, grid) / np.where(amax == 0, 1, amax)
    steps = np.where(amax == 0, 0, np.rint((1 - limits) * CLIP_STEPS)).astype(np.int64)
    ratio = np.array(int(np.argmin(errors)))
    return {"ratio": ratio, "s": s, "clip_step": steps} | _integers(pack(scaled, grid, inputs))


def _omniquant(params: dict, w: np.ndarray, **more: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels import fused
    from refllm.kernels.autograd import Tensor, parameter
    from refllm.kernels.stats import Stats
    from refllm.methods.blockwise.omniquant import Plan, first_scales, pack, rounded_weight

    if "amax" in more:
        return {"s": first_scales(more["amax"], np.abs(w).max(axis=0), params["alpha"])}
    x, plan = Stats(more["x"]).X, Plan(params["bits"], params["group_size"], symmetric=params["symmetric"])
    c_hi, c_lo, s = (parameter(values) for values in (*more["c"][..., None], more["s"]))
    learned, scaled = {"w.hi": c_hi, "w.lo": c_lo}, Tensor(w) * s
    change = fused.linear(Tensor(x) / s, rounded_weight(scaled, learned, "w", plan)) - Tensor(x @ w.T)
    loss = (change * change).sum() / float(change.data.size)
    stored = _integers(pack(scaled, learned, "w", plan))
    loss.backward()
    return stored | {"loss": loss.data, "of_c": np.stack([c_hi.grad, c_lo.grad])[..., 0], "of_s": s.grad}


def _lkd(params: dict, w: np.ndarray, v: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels import fused
    from refllm.kernels.autograd import Tensor, parameter
    from refllm.kernels.stats import Stats
    from refllm.kernels.straight_through import nearest
    from refllm.methods.blockwise.lkd import Plan, pack
    from refllm.model.reconstruct import mean_square

    plan, student, x = Plan(**params), parameter(v), Stats(x).X
    packed = pack(v, plan).weight
    out = fused.linear(plan.at_linears(Tensor(x)), nearest(student, plan.grid(v.shape[1])))
    loss = mean_square(out, [x @ w.T])
    loss.backward()
    return {"codes": packed.unpacked(), "loss": loss.data, "of_v": student.grad}


def _magnitude(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.prune.magnitude import magnitude

    return _sparse(magnitude(w, **params))


def _wanda(params: dict, w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels.stats import Stats
    from refllm.methods.prune.wanda import wanda

    return _sparse(wanda(w, Stats(x), **params))


def _sparse(record) -> dict[str, np.ndarray]:
    from refllm.formats.bits import unpack_bits
    from refllm.kernels.packed.records import Sparse24

    outputs = {"values": record.values}
    if isinstance(record, Sparse24):
        pairs = unpack_bits(record.indices, 4, record.columns // 4)
        mask = np.zeros((*pairs.shape, 4), np.uint8)
        np.put_along_axis(mask, np.stack([pairs & 3, pairs >> 2], axis=-1).astype(np.intp), 1, axis=-1)
        return outputs | {"mask": mask.reshape(record.shape), "indices": record.indices}
    mask = unpack_bits(record.bitmask, 1, record.columns)
    return outputs | {"mask": mask, "bitmask": record.bitmask, "row_offsets": record.row_offsets}


def _svd(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.lowrank.svd import svd

    record = svd(w, **params)
    w_hat = record.dense()
    error = np.sum((w.astype(np.float64) - w_hat) ** 2)
    return {"a": record.A, "b": record.B, "w_hat": w_hat, "error": np.array(error), "rank": np.array(record.A.shape[1])}


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


def _kivi(params: dict, k: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.methods.kvcache.kivi import kivi

    store = kivi(0, **{name: value for name, value in params.items() if name != "chunks"})
    for count in params["chunks"]:
        new = slice(store.length, store.length + count)
        K, V, _ = store.extend(k[:, new], v[:, new], np.arange(new.start, new.stop))
    parts = store.parts()
    full = [parts[name].shape[-2] if name in parts else 0 for name in ("k_full", "v_full")]
    stored = {name: part for name, part in parts.items() if not name.endswith("full")}
    return stored | {"k_hat": K, "v_hat": V, "full": np.array(full), "nbytes": np.array(store.nbytes)}


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


class _Listed:
    """Hands out listed numbers where a generator of random ones is asked for."""

    def __init__(self, numbers):
        self._numbers = iter(numbers)

    def random(self) -> float:
        """The next number of the list, in place of a draw."""
        return float(next(self._numbers))


def _accept(params: dict, p, q, drafted=None, uniforms=None) -> dict[str, np.ndarray]:
    from refllm.methods.runtime.speculative import accept

    if drafted is None:
        return _acceptance_law(lambda token, u, w: accept(p, q, [token], _Listed((u, w))), q[0])
    accepted, next_id = accept(p, q, drafted.tolist(), _Listed(uniforms))
    return {"accepted": np.array(accepted), "next_id": np.array(next_id)}


def _acceptance_law(accept, q: np.ndarray) -> dict[str, np.ndarray]:
    """What `accept(token, u, w) -> (accepted, next id)` does with uniform u and w, measured by bisection."""
    tokens = np.flatnonzero(q)
    acceptance = np.zeros_like(q)
    for token in tokens:
        acceptance[token] = _length(lambda u, token=token: accept(token, u, 0.5)[0] == 1)
    outputs = {"acceptance": acceptance}
    turned_down = np.zeros_like(q)
    if (acceptance[tokens] < 1).any():
        token = tokens[np.argmin(acceptance[tokens])]
        up_to = [_length(lambda w, i=i: accept(token, _LAST_BELOW_1, w)[1] <= i) for i in range(q.size)]
        outputs["residual"] = turned_down = np.diff(up_to, prepend=0.0)
    reached = q * acceptance
    return outputs | {"distribution": reached + (1 - reached.sum()) * turned_down}


def _length(holds) -> float:
    """Length of the interval [0, x) of uniform numbers on which a statement holds."""
    low, high = 0.0, 1.0
    if holds(_LAST_BELOW_1):
        return high
    for _ in range(53):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def _float_encode(params: dict, x: np.ndarray) -> dict[str, np.ndarray]:
    codes = _number_format(params).encode(x, nan="zero")
    return {"codes": codes.view(np.float16) if params["format"] == "FP16" else codes}


def _float_decode(params: dict, codes: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": _number_format(params).decode(codes)}


def _number_encode(params: dict, x: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _small_number(params).encode(x)}


def _number_decode(params: dict, codes: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": _small_number(params).decode(codes)}


def _stochastic(params: dict, x: np.ndarray) -> dict[str, np.ndarray]:
    form, rng = _small_number(params), np.random.default_rng(params["seed"])
    codes = form.encode(np.repeat(x[:, None], params["n"], axis=1), rounding="stochastic", rng=rng)
    return {"codes": codes, "x_hat": form.decode(codes)}


def _small_number(params: dict):
    from refllm.formats.dtypes import FORMATS

    if params["format"] not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {params['format']!r}")
    return FORMATS[params["format"]]


def _number_format(params: dict):
    from refllm.formats.dtypes import FLOATS

    formats = {form.name: form for form in FLOATS}
    if params["format"] not in formats:
        raise ValueError(f"format must be one of {', '.join(formats)}, got {params['format']!r}")
    return formats[params["format"]]


def _mx_encode(params: dict, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.formats.microscale import MX_FORMATS

    if params["format"] not in MX_FORMATS:
        raise ValueError(f"format must be one of {', '.join(MX_FORMATS)}, got {params['format']!r}")
    form = MX_FORMATS[params["format"]]
    codes, scales = form.encode(x, nonfinite="nan")
    return {"codes": codes, "scales": scales, "w_hat": form.decode(codes, scales)}


def _nvfp4_encode(params: dict, x: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.formats.microscale import NVFP4

    codes, scales, global_scale = NVFP4.encode(x)
    w_hat = NVFP4.decode(codes, scales, global_scale)
    return {"codes": codes, "scales": scales, "global_scale": global_scale, "w_hat": w_hat}


def _rope(params: dict, x: np.ndarray, positions: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """In the layout asked for, and in the other one on permuted elements."""
    from refllm.kernels import rope

    D, scaling = x.shape[-1], {"scaling": "linear", "factor": params["factor"]} if "factor" in params else {}
    angles = rope.cos_sin(rope.Rope(theta=params["theta"], **scaling), D, positions)
    half, pairs = rope.interleaved_to_half_split(1, D), rope.half_split_to_interleaved(1, D)
    if params["layout"] == "half_split":
        return {"rotate": {"y": rope.rotate(x, *angles)},
                "permuted": {"y": rope.rotate_interleaved(x[..., pairs], *angles)[..., half]}}  # fmt: skip
    return {"rotate_interleaved": {"y": rope.rotate_interleaved(x, *angles)},
            "permuted": {"y": rope.rotate(x[..., half], *angles)[..., pairs]}}  # fmt: skip


def _rope_permute(params: dict, w: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.kernels import rope

    heads = params["num_heads"] if params["tensor"] == "q" else params["num_kv_heads"]
    orders = {"to_half_split": rope.interleaved_to_half_split, "to_interleaved": rope.half_split_to_interleaved}
    return {"permuted": w[orders[params["direction"]](heads, len(w) // heads)]}


def _gguf_encode(params: dict, x: np.ndarray, importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
    from refllm.kernels.packed import encode_gguf

    return {"blocks": encode_gguf(params["type"], x, importance)}


def _gguf_decode(params: dict, blocks: np.ndarray) -> dict[str, np.ndarray]:
    from refllm.formats.blocks import BLOCKS

    if params["type"] not in BLOCKS:
        raise ValueError(f"type must be one of {', '.join(BLOCKS)}, got {params['type']!r}")
    return {"x": BLOCKS[params["type"]].decode(blocks)}


_LAST_BELOW_1 = 1 - 2.0**-53
_OPS = {
    "quant.rtn": _rtn,
    "quant.rtn.matmul": _rtn_matmul,
    "quant.blockwise": _blockwise,
    "quant.gptq": _gptq,
    "quant.small_float": _small_float,
    "blockwise.kquants": _kquants,
    "blockwise.allocate": _allocate,
    "quant.omse": _omse,
    "quant.hqq": _hqq,
    "quant.aciq": _aciq,
    "quant.squeezellm": _squeezellm,
    "blockwise.exl2": _exl2,
    "blockwise.exl2.choose": _exl2_choose,
    "quant.billm": _billm,
    "quant.binary": _binary,
    "quant.pq": _pq,
    "quant.aqlm.search": _aqlm_search,
    "finish.vqllm": _vqllm,
    "prune.magnitude": _magnitude,
    "quant.salient": _salient,
    "blockwise.awq": _awq,
    "blockwise.omniquant": _omniquant,
    "blockwise.lkd": _lkd,
    "prune.wanda": _wanda,
    "lowrank.svd": _svd,
    "transform.quarot": _quarot,
    "transform.dartquant": _dartquant,
    "transform.smoothattention": _smoothattention,
    "quant.qoq": _qoq,
    "kvcache.kivi": _kivi,
    "attention.attend": _attend,
    "runtime.accept": _accept,
    "formats.gguf.encode": _gguf_encode,
    "formats.gguf.decode": _gguf_decode,
    "model.rope.apply": _rope,
    "model.rope.permute": _rope_permute,
    "formats.float.encode": _float_encode,
    "formats.float.decode": _float_decode,
    "formats.number.encode": _number_encode,
    "formats.number.decode": _number_decode,
    "formats.number.stochastic": _stochastic,
    "formats.mx.encode": _mx_encode,
    "formats.nvfp4.encode": _nvfp4_encode,
    **own_attention.OPS,
    **own_checkpoints.OPS,
    **own_kv_codes.OPS,
    **own_latents.OPS,
    **own_outliers.OPS,
    **own_sequence.OPS,
}
