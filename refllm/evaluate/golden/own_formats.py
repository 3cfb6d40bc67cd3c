"""refllm's answers to the suites of number formats, GGUF blocks and rotary layouts."""

import numpy as np


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


OPS = {
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
}
