"""Weights in groups, inputs per token, as one stage: ZeroQuant's integers and ZeroQuant-FP's floats.

    zeroquant       s = amax / 2^(b-1)     q = clip(rint(w / s), -2^(b-1), 2^(b-1) - 1)     inputs: int8 per token
    zeroquant_fp    s = amax / 6           q = nearest FP4 E2M1 of w / s                    inputs: FP8 E4M3 per token

A group of weights has a scale of its own, and so has every token; what is stored says both, so the model runs so
wherever it is loaded. DeepSpeed divides by 2^(b-1), not by 2^(b-1) - 1: the grid is finer, and the largest positive
number of a group saturates by one step.

FP4 codes are cheap to turn into FP8 where scales are related by powers of two, for then only exponents are added:

    m1      s <- 2^ceil(log2 s)                                    a power of two, at least s
    m2      s <- s_max / 2^ceil(log2(s_max / s))                   a power of two below the largest scale, at most s

m2 rounds down, so the largest weights of a group may saturate, at half of their size in the worst case.

ZeroQuant-V2 and -FP repair the error of rounding by a matrix of low rank: `zeroquant+lorc:rank=8`.

Paper: Yao et al. 2022, "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
arXiv:2206.01861, section 4; Wu et al. 2023, "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using
Floating-Point Formats", arXiv:2307.09782, section 3.
Differs from them: layer-by-layer distillation is `lkd`; integers have no asymmetric form; scales of weights are stored
as float16 and rounded before codes are computed; a group of zeros takes the scale of an amax of 1. The constraints
follow the papers' abstracts: their code is not public.
Stage: prefill, memory
Inventory: 21
Lesson: lessons/12-outliers.md
Golden: quant/zeroquant
Baseline: none, rtn leaves the inputs alone
"""

import numpy as np

from refllm.formats.dtypes import FP4_E2M1
from refllm.kernels.grids import TwosGrid, group_count
from refllm.kernels.packed.inputs import E4M3, TokenInputs
from refllm.kernels.packed.records import CodeWeight, IntWeight, as_float
from refllm.kernels.stats import Stats

CONSTRAINTS = ("none", "m1", "m2")


def zeroquant(
    W: np.ndarray,
    stats: Stats | None = None,
    *,
    bits: int = 4,
    group_size: int = 64,
    activation_bits: int = 8,
) -> TokenInputs:
    """Integers in groups, inputs rounded per token.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : ignored
        Part of every weight method's call.
    bits : int
        2 to 8, of the weights.
    group_size : int
        As in `rtn`.
    activation_bits : int
        2 to 8.

    Returns
    -------
    TokenInputs
        Around an IntWeight.

    Raises
    ------
    ValueError
        NaN or Inf in W, a group_size that does not divide, bits out of range, a scale beyond float16.

    Examples
    --------
    >>> record = zeroquant(np.array([[8.0, -8.0, 1.0, 0.4]]), group_size=-1)
    >>> record.dense().tolist(), record.form
    ([[7.0, -8.0, 1.0, 0.0]], 'int8')
    """
    if not 2 <= activation_bits <= 8:
        raise ValueError(f"activation_bits must be 2 to 8, got {activation_bits}")
    grid = TwosGrid(bits, group_size)
    scale, _ = grid.fit(W)
    return TokenInputs(IntWeight.pack(grid, grid.encode(W, scale), scale, None), f"int{activation_bits}")


def zeroquant_fp(
    W: np.ndarray, stats: Stats | None = None, *, group_size: int = 64, constraint: str = "none"
) -> TokenInputs:
    """FP4 weights in groups, FP8 inputs per token.

    Parameters
    ----------
    W : (out, in) float32 or float64, finite
    stats : ignored
        Part of every weight method's call.
    group_size : int
        Columns that share a scale, or -1: whole rows.
    constraint : str
        none, m1 or m2: how scales are related.

    Returns
    -------
    TokenInputs
        Around a CodeWeight.

    Raises
    ------
    ValueError
        NaN or Inf in W, a group_size that does not divide, another constraint, a scale beyond float16.

    Examples
    --------
    >>> record = zeroquant_fp(np.array([[6.0, -1.4, 0.3, 2.6]]), group_size=-1)
    >>> record.dense().tolist(), record.form
    ([[6.0, -1.5, 0.5, 3.0]], 'e4m3')
    """
    W = np.asarray(W)
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint must be one of {', '.join(CONSTRAINTS)}, got {constraint!r}")
    if group_size == 0:
        raise ValueError("group_size must be positive or -1 (a scale per row), got 0")
    TwosGrid(8, group_size, "float32").fit(W)  # refuses what is no finite matrix, or does not divide
    W = W.astype(np.float32) if W.dtype.kind != "f" else W
    groups = W.reshape(len(W), group_count(W.shape[1], group_size), -1)
    amax = np.abs(groups).max(axis=-1).astype(np.float64)
    scale = as_float(constrain(np.where(amax > 0, amax, 1.0) / FP4_E2M1.max, constraint), "float16")
    scale = np.maximum(scale, np.finfo(np.float16).smallest_subnormal)
    codes = FP4_E2M1.encode((groups / scale.astype(W.dtype)[..., None]).reshape(W.shape))
    return TokenInputs(CodeWeight.pack(codes, scale, FP4_E2M1.name, (1, groups.shape[2])), E4M3)


def constrain(scale: np.ndarray, constraint: str) -> np.ndarray:
    """Scales related by powers of two.

    Parameters
    ----------
    scale : float64, positive
        Of one weight.
    constraint : str
        none, m1 or m2.

    Examples
    --------
    >>> constrain(np.array([3.0, 1.0, 0.7]), "m1").tolist(), constrain(np.array([3.0, 1.0, 0.8]), "m2").tolist()
    ([4.0, 1.0, 1.0], [3.0, 0.75, 0.75])
    """
    if constraint == "m1":
        return _power_above(scale)
    if constraint == "m2":
        return scale.max() / _power_above(scale.max() / scale)
    return scale


def _power_above(x: np.ndarray) -> np.ndarray:
    """2^ceil(log2 x); by the exponent, for a logarithm may be off beside a power of two."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(1.0, np.where(fraction == 0.5, exponent - 1, exponent))
