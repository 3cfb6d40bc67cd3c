"""dynamic: round the inputs of packed weights at run time, every token with a scale of its own (W8A8, W4A4).

    symmetric    s_t = ratio amax_t / (2^(b-1) - 1)      q = clip(rint(x / s_t))
    affine       s_t = ratio (hi_t - lo_t) / (2^b - 1)   q = clip(rint(x / s_t) + z_t)   z_t = rint(-ratio lo_t / s_t)

    Y = s_t s_o (q_x q_w^T - z_t sum_k q_w)

Codes meet codes in whole numbers; the two scales come afterwards, which is why they may differ from token to token and
from output to output, but not from input to input: s_k cannot be taken out of a sum over k. Nothing is calibrated, and
what one token is rounded to does not depend on the others. One channel that is a hundred times larger than the rest
takes the whole range of every token, and the rest is left with the few codes around zero: that is what `smoothquant`,
`osplus`, `llm_int8` and the rotations are for.

The stage acts on weights stored as codes (rtn, GPTQ, GGUF); W8A8 is `rtn:bits=8,symmetric=true,group=-1+dynamic`, W4A4
`rtn:bits=4,symmetric=true,group=-1+dynamic:bits=4`.

Paper: Yao et al. 2022, "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
arXiv:2206.01861, section 4.1; Ashkboos et al. 2024, "QuaRot", arXiv:2404.00456 (the affine grid and the clip ratio).
Differs from QuaRot's code: a token of zeros keeps a scale of 0, and one that holds NaN or Inf gives NaN.
Stage: prefill
Inventory: 7, 9
Lesson: lessons/12-outliers.md
Golden: activations/dynamic
"""

from refllm.kernels.packed.activations import Rounding

KERNELS = {Rounding(8): "int8", Rounding(4): "int4"}  # what the compiled forward pass does itself


def dynamic(*, bits: int = 8, clip_ratio: float = 1.0, symmetric: bool = True) -> str | Rounding:
    """Inputs rounded per token.

    Parameters
    ----------
    bits : int
        2 to 8. 8 and 4, symmetric and without clipping, run in the compiled forward pass; others in NumPy's and the
        integer kernels, one linear after another.
    clip_ratio : float
        In (0, 1]: so much of a token's range is kept, the rest saturates; QuaRot takes 0.9 for 4 bits.
    symmetric : bool
        False: a grid from the least to the largest number of each token.

    Returns
    -------
    str or Rounding
        What `refllm.kernels.packed.matmul` takes as its activations.

    Raises
    ------
    ValueError
        bits or clip_ratio out of range.

    Examples
    --------
    >>> dynamic(), dynamic(bits=4, clip_ratio=0.9)
    ('int8', Rounding(bits=4, clip_ratio=0.9, symmetric=True))
    """
    how = Rounding(bits, clip_ratio, symmetric)
    return KERNELS.get(how, how)
