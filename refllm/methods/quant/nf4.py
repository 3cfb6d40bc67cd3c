"""nf4: four bits whose sixteen values are quantiles of the normal distribution, in blocks, with 8-bit scales.

    absmax = max |w| over a block of 64        code = nearest of 16 values to w / absmax        w^ = value[code] absmax

Blocks run through the row-major weight and across the ends of rows. The scales cost 32 / 64 bits a weight in float32;
double quantisation codes them in turn, in blocks of 256, after their mean is taken away:

    offset = mean(absmax)    absmax ~ map[code8] absmax2 + offset    4 + 8 / 64 + 32 / (64 256) = 4.127 bits a weight

The values of NF4 lie densely around 0, where weights are: 8 positive ones, 0, and 7 negative. FP4 has a sign, two bits
of exponent and one of mantissa (not E2M1: its exponents run the other way and its codes are not in order).

Paper: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 3; Dettmers et
al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861 (blocks, the map of the scales).
Differs from bitsandbytes: nothing in the codes of the weights. The 8-bit codes of the scales are those of its PyTorch
text; its compiled CPU code takes a neighbouring code for about one scale in a thousand. Codes are stored low nibble
first; formats/checkpoints/bitsandbytes.py has its order, high nibble first.
Stage: memory, decode
Inventory: 5, 16
Lesson: lessons/14-codebooks.md
Golden: quant/blockwise
Baseline: rtn:bits=4,group=64,symmetric=true
"""

import numpy as np

from refllm.kernels.packed.encode_codes import blockwise
from refllm.kernels.packed.records import CodeWeight
from refllm.kernels.stats import Stats

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has


def nf4(W: np.ndarray, stats: Stats | None = None, *, block_size: int = 64, double_quant: bool = True) -> CodeWeight:
    """NormalFloat in blocks.

    Parameters
    ----------
    W : (out, in) float, finite
    stats : ignored
        Part of every weight method's call.
    block_size : int
        Weights that share a scale: 32, 64, ... 4096. The last block of a weight may be shorter.
    double_quant : bool
        Scales as 8-bit codes.

    Returns
    -------
    CodeWeight

    Raises
    ------
    ValueError
        NaN or Inf in W, another block size.

    Examples
    --------
    >>> nf4(np.array([[-2.0, 0.0, 0.6, 2.0]])).unpacked().tolist()
    [[0, 7, 11, 15]]
    """
    return _blocks(W, "NF4", block_size, double_quant)


def fp4(W: np.ndarray, stats: Stats | None = None, *, block_size: int = 64, double_quant: bool = True) -> CodeWeight:
    """bitsandbytes' 4-bit float in blocks: like nf4, with the values 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and signs.

    Inventory: 4, 16
    Baseline: none, on weights that look normal it is behind nf4 and behind an even grid

    Parameters
    ----------
    W, stats, block_size, double_quant :
        As for `nf4`.

    Returns
    -------
    CodeWeight

    Raises
    ------
    ValueError
        As `nf4`.

    Examples
    --------
    >>> fp4(np.array([[-12.0, 0.0, 5.5, 4.0]]), double_quant=False).dense().round(3).tolist()
    [[-12.0, 0.0, 6.0, 4.0]]
    """
    return _blocks(W, "FP4_BNB", block_size, double_quant)


def _blocks(W: np.ndarray, table: str, block_size: int, double_quant: bool) -> CodeWeight:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    return blockwise(W, table, block_size, double_quant)
