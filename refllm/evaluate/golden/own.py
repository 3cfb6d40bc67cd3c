"""refllm's own implementation of every op of the suites it ships: what `refllm golden verify` judges by default."""

import numpy as np


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


def _rtn_matmul(params, x, packed, scale, packed_zero_point=None) -> dict[str, np.ndarray]:
    from refllm.kernels.packed import matmul
    from refllm.kernels.packed.records import IntWeight

    if params["symmetric"] != (packed_zero_point is None):
        raise ValueError("zero points come with affine weights only")
    weight = IntWeight(packed, scale, packed_zero_point, params["bits"], params["group_size"], params["columns"])
    return {"y": matmul(x, weight)}


_OPS = {"quant.rtn": _rtn, "quant.rtn.matmul": _rtn_matmul}
