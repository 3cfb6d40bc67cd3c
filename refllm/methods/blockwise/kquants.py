"""kquants: llama.cpp's mixes: which tensor of a model gets which K-quant.

Not all tensors mind alike. The values' projection is small and feeds everything that attention reads; the last product
of the feed-forward part adds straight to the residual stream; the head makes every logit. A mix gives these more bits,
and of the first two only in some layers: use_more(i, n) = i < n/8, or i >= 7n/8, or every third of those between.

    mix       base    v_proj                       down_proj                      o_proj    head, tied embedding
    Q2_K      Q2_K    Q3_K; Q4_K with GQA >= 4     Q3_K                           Q3_K      Q6_K
    Q3_K_M    Q3_K    Q5_K in two layers, Q4_K     Q5_K in the first 1/16, Q4_K   Q4_K      Q6_K
    Q4_K_S    Q4_K    Q5_K in four layers          Q5_K in the first 1/8                    Q6_K
    Q4_K_M    Q4_K    Q6_K where use_more          Q6_K where use_more                      Q6_K
    Q5_K_M    Q5_K    Q6_K where use_more          Q6_K where use_more                      Q6_K

Where a block of 256 does not divide a row, the type falls back to one of 32 (Q4_K to Q5_0, Q6_K to Q8_0 ...), and to
float16 where that does not either. Norms and biases stay floats.

Paper: none; ggml-org 2023, "k-quants" (llama.cpp pull request 1684), the published code (llama_tensor_get_type).
Differs from llama.cpp: models with experts and its special rules for 70B and Falcon are left out.
Stage: memory, decode
Inventory: 20
Lesson: lessons/17-mixed-precision.md
Golden: blockwise/kquants
Baseline: none, a mix has a size of its own
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refllm.formats.blocks import BLOCKS
from refllm.kernels.packed import encode_gguf
from refllm.kernels.packed.records import GGUFBlocks, Plain, as_float
from refllm.kernels.stats import Stats
from refllm.methods.record import Report, report
from refllm.model.config import ModelConfig
from refllm.model.equivalent import EMBEDDING, HEAD
from refllm.model.model import Model
from refllm.model.to_gguf import FALLBACKS
from refllm.model.walk import layer_linears, walk

MIXES = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M")
MANY_HEADS = 4  # query heads per key-value head


def kquants(
    model: Model,
    ids: np.ndarray | None = None,
    *,
    on_report: Callable[[Report], None] | None = None,
    mix: str = "Q4_K_M",
    imatrix: bool = False,
) -> Model:
    """Every matrix in the type that a mix gives it.

    Parameters
    ----------
    model : Model
    ids : (T,) integers, optional
        Calibration tokens; needed with `imatrix`.
    on_report : callable, optional
    mix : str
        Q2_K, Q3_K_M, Q4_K_S, Q4_K_M or Q5_K_M.
    imatrix : bool
        Weigh errors by the mean square of the inputs of the uncompressed model. The embedding has none.

    Returns
    -------
    Model
        Linears, embedding and head packed.

    Raises
    ------
    ValueError
        An unknown mix, `imatrix` without tokens, NaN or Inf in a weight.
    """
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {mix!r}")
    if imatrix and ids is None:
        raise ValueError("imatrix needs calibration tokens: give --calibration FILE (in Python: calibration=ids)")
    types, seen = tensor_types(model.config, mix), {}
    if ids is not None:
        for _, stats in walk(model, ids):  # of the uncompressed model, as llama-imatrix measures
            seen |= stats
    weights = dict(model.weights)
    for name, wanted in types.items():
        W = np.asarray(model.weights[name], np.float32)
        stats = seen.get(name)
        record = encode(W, wanted, stats if imatrix else None)
        weights[name] = record
        if on_report is not None:
            on_report(report(name, W, record, stats))
    return replace(model, weights=weights)


def encode(W: np.ndarray, wanted: str, stats: Stats | None) -> GGUFBlocks | Plain:
    """A matrix in this type or what it falls back to; errors weighed by the inputs where there are some."""
    columns = W.shape[1]
    if columns % BLOCKS[wanted].block_size:
        wanted = FALLBACKS[wanted]
    if columns % BLOCKS[wanted].block_size:
        return Plain(as_float(W, "float16"))
    importance = None
    if stats is not None and BLOCKS[wanted].takes_importance:
        importance = (stats.sum_squares / stats.n).astype(np.float32)
    return GGUFBlocks(encode_gguf(wanted, W, importance), wanted, columns)


def use_more(i: int, n: int) -> bool:
    """Whether layer i of n is one of those that get more bits.

    Examples
    --------
    >>> [i for i in range(32) if use_more(i, 32)]
    [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    """
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def layer_types(mix: str, i: int, n: int, heads_per_group: int) -> list[str]:
    """Types of q, k, v, o, gate, up and down in layer i of n."""
    base = mix[:4]
    more = "Q6_K" if use_more(i, n) else base
    v, o, down = {
        "Q2_K": ("Q4_K" if heads_per_group >= MANY_HEADS else "Q3_K", "Q3_K", "Q3_K"),
        "Q3_K_M": ("Q5_K" if i < 2 else "Q4_K", "Q4_K", "Q5_K" if i < n // 16 else "Q4_K"),
        "Q4_K_S": ("Q5_K" if i < 4 else "Q4_K", base, "Q5_K" if i < n // 8 else "Q4_K"),
    }.get(mix, (more, base, more))
    return [base, base, v, o, base, base, down]


def tensor_types(config: ModelConfig, mix: str) -> dict[str, str]:
    """{weight name: K-quant} of every matrix, before any fallback."""
    if config.special:
        raise ValueError(f"llama.cpp's table names the seven linears of a Llama layer, not {config.special}; try gguf")
    n, group = config.num_layers, config.num_heads // config.num_kv_heads
    types = {EMBEDDING: "Q6_K" if config.tied_embeddings else mix[:4]}
    for layer in range(n):
        types |= dict(zip(layer_linears(layer), layer_types(mix, layer, n, group), strict=True))
    return types if config.tied_embeddings else types | {HEAD: "Q6_K"}
