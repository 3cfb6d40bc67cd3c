"""mx: floats of 4, 6 or 8 bits with a power of two for every 32 of them.

    X = 2^(floor(log2 amax) - emax)    code = nearest element to w / X, at most the largest    w^ = X element

`mx` is OCP's microscaling: the scale is a byte that is only an exponent (E8M0), so the largest of a block may clip:
7 becomes 6 in MXFP4. `nvfp4` spends more on scales: blocks of 16, an E4M3 scale each, one float32 for the tensor. `fp8`
has a float32 scale for a block of 128 x 128 weights (DeepSeek-V3's layout) or for a row; `fp6` one float16 for a row,
which is how FP6-LLM stores weights: W6A16 is this with float activations.

Paper: Rouhani et al. 2023, "Microscaling Data Formats for Deep Learning", arXiv:2310.10537, Algorithm 1; Xia et al.
2024, "FP6-LLM: Efficiently Serving Large Language Models Through FP6-Centric Algorithm-System Co-Design",
arXiv:2401.14112, section 2; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 3.3.
Differs from microxcaling's default: ties go to even. fp6: the scale is rounded to float16 before codes are computed, as
everywhere here.
Stage: memory, decode
Inventory: 2, 4, 6
Lesson: lessons/04-number-formats.md
Golden: formats/microscale, formats/nvfp4, quant/small_float
Baseline: none, the formats are fixed and no other method has their size
"""

import numpy as np

from refllm.formats import microscale
from refllm.kernels.packed import encode_codes
from refllm.kernels.packed.records import CodeWeight
from refllm.kernels.stats import Stats

ELEMENTS = {
    "fp4_e2m1": microscale.MXFP4,
    "fp6_e2m3": microscale.MXFP6_E2M3,
    "fp6_e3m2": microscale.MXFP6_E3M2,
    "fp8_e4m3": microscale.MXFP8_E4M3,
    "fp8_e5m2": microscale.MXFP8_E5M2,
}


def mx(
    W: np.ndarray, stats: Stats | None = None, *, element: str = "fp4_e2m1", scale_rule: str = "floor"
) -> CodeWeight:
    """Microscaling floats: blocks of 32 columns.

    Parameters
    ----------
    W : (out, in) float, finite; in a multiple of 32
    stats : ignored
        Part of every weight method's call.
    element : str
        fp4_e2m1, fp6_e2m3, fp6_e3m2, fp8_e4m3 or fp8_e5m2.
    scale_rule : str
        floor (OCP), ceil, rceil or even: see refllm.formats.microscale.

    Returns
    -------
    CodeWeight
        4.25, 6.25 or 8.25 bits a weight.

    Raises
    ------
    ValueError
        NaN or Inf in W, a width that is no multiple of 32, an unknown element or rule.

    Examples
    --------
    >>> mx(np.float32([[6, 7, -1, 0.25] * 8])).dense()[0, :4].tolist()
    [6.0, 6.0, -1.0, 0.0]
    """
    if element not in ELEMENTS:
        raise ValueError(f"element must be one of {', '.join(ELEMENTS)}, got {element!r}")
    return encode_codes.microscaled(W, ELEMENTS[element], scale_rule)


def nvfp4(W: np.ndarray, stats: Stats | None = None) -> CodeWeight:
    """NVIDIA's FP4: E2M1 with an E4M3 scale for 16 columns and a float32 scale for the tensor.

    Parameters
    ----------
    W : (out, in) float, finite; in a multiple of 16
    stats : ignored

    Returns
    -------
    CodeWeight
        4.5 bits a weight.

    Raises
    ------
    ValueError
        NaN or Inf in W, a width that is no multiple of 16.

    Examples
    --------
    >>> nvfp4(np.float32([[6, 3, -1, 0.25] * 4])).dense()[0, :4].tolist()
    [6.0, 3.0, -1.0, 0.0]
    """
    return encode_codes.nvfp4(W)


def fp8(W: np.ndarray, stats: Stats | None = None, *, block_rows: int = 128, block_columns: int = 128) -> CodeWeight:
    """FP8 E4M3 with a float32 scale for a block of rows and columns.

    Parameters
    ----------
    W : (out, in) float, finite
    stats : ignored
    block_rows, block_columns : int
        1 or more; the last blocks may be smaller. block_columns = -1: the whole row.

    Returns
    -------
    CodeWeight

    Raises
    ------
    ValueError
        NaN or Inf in W, a block without weights.

    Examples
    --------
    >>> fp8(np.float32([[448, 17, -1]])).dense().tolist()
    [[448.0, 16.0, -1.0]]
    """
    return _in_blocks(W, "FP8_E4M3FN", block_rows, block_columns, "float32")


def fp6(W: np.ndarray, stats: Stats | None = None, *, element: str = "e3m2", block_columns: int = -1) -> CodeWeight:
    """FP6 with a float16 scale for a row, or for a block of its columns.

    Parameters
    ----------
    W : (out, in) float, finite
    stats : ignored
    element : str
        e3m2 or e2m3.
    block_columns : int
        1 or more, or -1: the whole row.

    Returns
    -------
    CodeWeight

    Raises
    ------
    ValueError
        NaN or Inf in W, an unknown element, a block without weights, a scale beyond float16.

    Examples
    --------
    >>> fp6(np.float32([[28, 17, -1]])).dense().tolist()
    [[28.0, 16.0, -1.0]]
    """
    if element not in ("e3m2", "e2m3"):
        raise ValueError(f"element must be e3m2 or e2m3, got {element!r}")
    return _in_blocks(W, f"FP6_{element.upper()}", 1, block_columns, "float16")


def _in_blocks(W: np.ndarray, table: str, block_rows: int, block_columns: int, scale_dtype: str) -> CodeWeight:
    if block_rows < 1 or (block_columns < 1 and block_columns != -1):
        raise ValueError(f"a block needs rows and columns (or -1: a whole row), got {block_rows} x {block_columns}")
    W = np.asarray(W)
    columns = W.shape[1] if block_columns == -1 and W.ndim == 2 else block_columns
    return encode_codes.small_float(W, table, (block_rows, columns), scale_dtype)
