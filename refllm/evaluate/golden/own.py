"""refllm's own implementation of every op of the suites it ships: what `refllm golden verify` judges by default."""

import numpy as np

from refllm.evaluate.golden import (
    own_acceptance,
    own_attention,
    own_checkpoints,
    own_formats,
    own_kv_codes,
    own_latents,
    own_outliers,
    own_sequence,
    own_transforms,
    own_weights,
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


_OPS = {
    **own_weights.OPS,
    **own_transforms.OPS,
    **own_kv_codes.OPS,
    **own_attention.OPS,
    **own_acceptance.OPS,
    **own_formats.OPS,
    **own_checkpoints.OPS,
    **own_latents.OPS,
    **own_outliers.OPS,
    **own_sequence.OPS,
}
