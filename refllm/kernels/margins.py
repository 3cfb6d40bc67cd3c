"""How safe rounding decisions are: the distance of values from their rounding boundaries against the error of float64.

A code that depends on sums is the same on every machine if the machines add in one order (refllm does), or if the value
before rounding lies further from every boundary than sums in another order can move it. `sweep_bound` says how far that
is for the values of `obs_sweep`, and `margins` counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

UNIT = 2.0**-53  # of float64


@dataclass(frozen=True)
class Margins:
    """Rounding decisions, and how many of them an implementation with other sums may take otherwise.

    Parameters
    ----------
    decisions : int
    closest : float
        Distance of the closest value from a boundary, in rounding steps; infinity where nothing is decided.
    safety : float
        The smallest ratio of distance and error bound: above 1, every correct float64 implementation agrees.
    unsafe : int
        Decisions whose ratio is at most 1.
    """

    decisions: int
    closest: float
    safety: float
    unsafe: int


def margins(
    values: np.ndarray,
    errors: np.ndarray,
    low: np.ndarray | float = -np.inf,
    high: np.ndarray | float = np.inf,
    *,
    by_float32: bool = False,
) -> Margins:
    """Distances of numbers from the halves between integers.

    Parameters
    ----------
    values : float array
        Before rounding, in steps.
    errors : float array that broadcasts to it
        What float64 may have changed them by, in steps.
    low, high : float, or float arrays that broadcast to values
        Results are clipped to these integers: no boundary lies beyond them.
    by_float32 : bool
        Numbers are rounded to float32 first, as refllm.kernels.grids does: what becomes a half goes to its even
        neighbour, whose boundary then lies half a float32 step beyond the half.

    Examples
    --------
    >>> margins(np.array([0.1, 2.25, 9.5]), 0.3, 0, 9)
    Margins(decisions=3, closest=0.25, safety=0.8333333333333334, unsafe=1)
    """
    boundary = np.clip(np.floor(values) + 0.5, low + 0.5, high - 0.5)
    if by_float32:
        step = np.spacing(np.abs(boundary).astype(np.float32)).astype(np.float64)
        boundary += np.where(np.floor(boundary) % 2 == 0, step, -step) / 2
    distance = np.abs(values - boundary)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(distance > 0, distance / errors, 0.0)
    if not ratio.size:
        return Margins(0, np.inf, np.inf, 0)
    return Margins(ratio.size, float(distance.min()), float(ratio.min()), int((ratio <= 1).sum()))


def total(several: Iterable[Margins]) -> Margins:
    """Margins of several sets of decisions together."""
    several = list(several)
    return Margins(
        sum(m.decisions for m in several),
        min((m.closest for m in several), default=np.inf),
        min((m.safety for m in several), default=np.inf),
        sum(m.unsafe for m in several),
    )


def sweep_bound(W: np.ndarray, Q: np.ndarray, E: np.ndarray, U: np.ndarray, H: np.ndarray, tokens: int) -> np.ndarray:
    """How far float64 may move the values that `obs_sweep` hands to project, if none before is projected otherwise.

    To first order, for sums in any order, if U is the inverse of a Cholesky factor of H. (The factor of an explicit
    H^-1 carries a further condition number.) With R = U^-1, value j is w_j + sum_{k < j} (w - q)_k R_kj / R_jj. An H
    that is off by d sqrt(H_ii H_jj), d = gamma of the tokens and of the factorisation, moves it by at most

        d v_j / R_jj sum_{m < j} (|W - Q| |R|)_m v_m          v = |U| sqrt(diag H)

    and rounding in U and in the sweep by 2 gamma U_jj (|E| |U| |R| |U| |R|)_j (Higham, Accuracy and Stability of
    Numerical Algorithms, chapters 8, 10, 14).

    Parameters
    ----------
    W : (out, in) float64
    Q, E : (out, in) float64
        What obs_sweep returned.
    U : (in, in) float64
    H : (in, in) float64
        Damped; U's own.
    tokens : int
        Rows that were added up in H.

    Returns
    -------
    (out, in) float64
        In the unit of W.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> sweep_bound(one, one, 0 * one, one, one, tokens=10).item() < 1e-15  # the first value is the weight itself
    True
    """
    n = len(U)
    gamma = lambda k: k * UNIT / (1 - k * UNIT)
    R = np.abs(np.linalg.inv(U))
    U, E = np.abs(U), np.abs(E)
    v = U @ np.sqrt(np.diag(H))
    terms = (np.abs(W - Q) @ R) * v
    before = np.cumsum(terms, axis=1) - terms
    of_h = (gamma(tokens) + gamma(n + 1)) * before * v / np.diag(R)
    of_sweep = 2 * gamma(n) * (E @ U @ R @ U @ R) * np.diag(U)
    return of_h + of_sweep + gamma(3) * np.abs(Q + E * np.diag(U))
