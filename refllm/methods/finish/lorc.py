"""lorc: repair what rounding did by a matrix of low rank, stored beside the codes.

    E = W - W^ = U diag(S) V^T        A = U_m diag(sqrt S_m)        B = diag(sqrt S_m) V_m^T        W^ + A B

No matrix of rank m takes more of the error away: ||W - W^ - A B||^2 = sum over i > m of S_i^2. Rounding errors have no
low rank, so little is repaired for a few bytes; where it pays is where a few rows or columns were rounded badly. Split
this way both factors have the same scale, which is what lets them be stored in 8 bits as well.

The stage follows one that packs: `zeroquant_fp+lorc:rank=8` is ZeroQuant-FP with LoRC, `zeroquant+lorc` ZeroQuant-V2.

Paper: Yao et al. 2023, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank
Compensation", arXiv:2303.08302, section 4.
Differs from it: factors are float16 after a float64 decomposition, or 8-bit codes with a scale per row of A and of B;
the authors' code is not public.
Stage: memory, prefill
Inventory: 21
Lesson: lessons/12-outliers.md
Golden: finish/lorc
Baseline: none, the same weight with factors beside it
"""

from dataclasses import replace

import numpy as np

from refllm.kernels.factors import truncated
from refllm.kernels.grids import PER_CHANNEL, SymmetricGrid
from refllm.kernels.packed.inputs import RoundedInputs
from refllm.kernels.packed.records import IntWeight, LowRank, Record, Sum, as_float
from refllm.kernels.stats import Stats


def lorc(
    record: Record, W: np.ndarray, stats: Stats | None = None, *, rank: int = 8, factor_bits: int | None = None
) -> Record:
    """Low-rank compensation.

    Parameters
    ----------
    record : packed record
        Where it says how its inputs are rounded, the factors meet the same inputs.
    W : (out, in) float
        What was packed.
    stats : ignored
        Part of every finishing stage's call.
    rank : int
        1 to min(out, in).
    factor_bits : int, optional
        2 to 8: factors as integers; None: float16.

    Returns
    -------
    Sum, or the record that rounds inputs with a Sum inside

    Raises
    ------
    ValueError
        A rank out of range, factor_bits out of range, an error of another shape or that is not finite.

    Examples
    --------
    >>> from refllm.kernels.packed.sparse import Plain
    >>> W = np.float32([[1.0, 2.0], [3.0, 4.0]])
    >>> lorc(Plain(np.float32([[1.0, 2.0], [3.0, 0.0]])), W, rank=1).dense().tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    if not 1 <= rank <= min(record.shape):
        raise ValueError(f"rank must lie between 1 and {min(record.shape)} for shape {record.shape}, got {rank}")
    if W.shape != record.shape:
        raise ValueError(f"the weight has shape {W.shape}, its packed form {record.shape}")
    error = W.astype(np.float64) - record.dense()
    if not np.isfinite(error).all():
        raise ValueError("the error of the packed weight holds NaN or Inf")
    repair = LowRank(*(_stored(factor, factor_bits) for factor in truncated(error, rank)))
    if isinstance(record, RoundedInputs):
        return replace(record, weight=Sum(record.weight, repair))
    return Sum(record, repair)


def _stored(factor: np.ndarray, bits: int | None):
    if bits is None:
        return as_float(factor, "float16")
    grid = SymmetricGrid(bits, PER_CHANNEL)
    scale, _ = grid.fit(factor)
    return IntWeight.pack(grid, grid.encode(factor, scale), scale, None)
