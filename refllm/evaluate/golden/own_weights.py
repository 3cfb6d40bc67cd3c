"""refllm's answers to the suites of compressed weights, see `refllm.evaluate.golden.own`."""

import numpy as np


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


OPS = {
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
}
