"""gguf: every weight in one of llama.cpp's block types.

    Q4_0            w = d (q - 8)                         32 weights share d: the number of largest magnitude, / -8
    Q4_K and kin    w = d sc q - dmin mn                  256 weights share d and dmin, 32 (or 16) the integers sc, mn

The scales of K-quants are found by a weighted search, block by block, on the weights alone. With an importance matrix
(`imatrix`) the error of a column counts as much as its inputs are large: the mean of x_j^2 over the calibration text.

Paper: none; ggml-org 2023, "k-quants" (llama.cpp pull request 1684) and "imatrix" (4861), the published code.
Differs from llama.cpp: nothing in the bytes (refllm.formats.blocks). A width that the blocks do not divide is an error;
`kquants` has the fallbacks.
Stage: memory, decode
Inventory: 8, 20
Lesson: lessons/17-mixed-precision.md
Golden: formats/gguf_encode, formats/gguf_decode
Baseline: none, the types are fixed and no other method has their size
"""

import numpy as np

from refllm.formats.blocks import BLOCKS
from refllm.kernels.packed import encode_gguf
from refllm.kernels.packed.records import GGUFBlocks
from refllm.kernels.stats import Stats


def gguf(W: np.ndarray, stats: Stats | None = None, *, type: str = "Q4_0", imatrix: bool = False) -> GGUFBlocks:
    """Encode as GGUF blocks.

    Parameters
    ----------
    W : (out, in) float, finite
    stats : Stats, optional
        Calibration inputs; read with `imatrix`.
    type : str
        Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0.
    imatrix : bool
        Weigh errors by the inputs. Types without a search know no importance.

    Returns
    -------
    GGUFBlocks

    Raises
    ------
    ValueError
        NaN or Inf in W, an unknown type, a width that its blocks do not divide, `imatrix` without calibration or for a
        type that knows no importance.

    Examples
    --------
    >>> gguf(np.full((2, 32), 8, np.float32)).dense()[0, :2].tolist()
    [8.0, 8.0]
    """
    if type not in BLOCKS or BLOCKS[type].activations_only:
        known = ", ".join(name for name, form in BLOCKS.items() if not form.activations_only)
        raise ValueError(f"type must be one of {known}, got {type!r}")
    W = np.asarray(W)
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"a weight must be a non-empty [out, in] matrix, got shape {W.shape}")
    if not np.isfinite(W).all():
        raise ValueError("the weight holds NaN or Inf; quantization needs finite values")
    if imatrix and stats is None:
        raise ValueError("imatrix needs calibration inputs")
    importance = (stats.sum_squares / stats.n).astype(np.float32) if imatrix else None
    return GGUFBlocks(encode_gguf(type, W.astype(np.float32), importance), type, W.shape[1])
