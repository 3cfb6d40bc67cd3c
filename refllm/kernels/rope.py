"""Rotary position embedding: frequencies with every scaling in use, the rotation in both layouts, the map between.

Position p turns the pair i of a head by the angle p * inv_freq_i, inv_freq_i = theta^(-2i/D):
    (a, b) -> (a cos - b sin, a sin + b cos)
Two layouts say which elements form pair i: half-split (Hugging Face): (x_i, x_{i+D/2}); interleaved (Meta, GGUF
`llama`): (x_{2i}, x_{2i+1}). refllm runs half-split; loaders permute.

Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864, Eq. 34.
Scalings: Chen et al. 2023, arXiv:2306.15595 (linear); Llama 3.1 model code (llama3); Peng et al. 2023, "YaRN",
arXiv:2309.00071, section 3. Angles are float64 until cos and sin are cast; the reference codes use float32.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer.

    Parameters
    ----------
    theta : float
        Base of the frequencies.
    scaling : None, "linear", "llama3" or "yarn"
        The fields below belong to one scaling each and are ignored by the others.
    factor : float
        How many times longer the context is than `original_context`.
    low_freq_factor, high_freq_factor : float
        llama3: wavelengths above original/low are divided by `factor`, those below original/high are kept.
    original_context : int
        Tokens; the context before scaling (llama3, yarn).
    beta_fast, beta_slow : float
        yarn: rotations within `original_context` that bound the ramp.
    attention_factor : float, optional
        yarn: multiplies cos and sin; None means 0.1 ln(factor) + 1.
    freq_divisors : tuple of D/2 floats, optional
        What a GGUF file stores as `rope_freqs.weight`; instead of `scaling`, never with it.

    Raises
    ------
    ValueError
        An unknown scaling, a theta or factor that is not positive, a missing original context, bounds of a ramp in the
        wrong order, divisors beside a scaling.
    """

    theta: float
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    freq_divisors: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.scaling not in (None, "linear", "llama3", "yarn"):
            raise ValueError(f"rope scaling must be linear, llama3 or yarn, got {self.scaling!r}")
        if not self.theta > 0:
            raise ValueError(f"rope theta must be positive, got {self.theta}")
        if not self.factor > 0:
            raise ValueError(f"rope factor must be positive, got {self.factor}")
        if self.scaling in ("llama3", "yarn") and self.original_context <= 0:
            raise ValueError(f"rope scaling {self.scaling} needs original_context (tokens before scaling), got none")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.scaling == "llama3" and not low < high:
            raise ValueError(f"rope low_freq_factor must be below high_freq_factor, got {low} and {high}")
        fast, slow = self.beta_fast, self.beta_slow
        if self.scaling == "yarn" and not (0 < slow < fast and self.theta > 1):
            raise ValueError(f"yarn needs theta > 1 and beta_fast > beta_slow > 0, got {self.theta}, {fast} and {slow}")
        if self.freq_divisors is not None and self.scaling is not None:
            raise ValueError(f"give rope freq_divisors or scaling, not both (scaling is {self.scaling!r})")


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair.

    Parameters
    ----------
    rope : Rope
    head_dim : int
        D, even.

    Returns
    -------
    (D/2,) float64, decreasing for the unscaled rope

    Raises
    ------
    ValueError
        freq_divisors of another length.

    Examples
    --------
    >>> inverse_frequencies(Rope(theta=100.0), 4).tolist()
    [1.0, 0.1]
    """
    inv_freq = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.freq_divisors is not None:
        if len(rope.freq_divisors) != head_dim // 2:
            expected, got = head_dim // 2, len(rope.freq_divisors)
            raise ValueError(f"freq_divisors must hold head_dim/2 = {expected} numbers, got {got}")
        return inv_freq / np.asarray(rope.freq_divisors, dtype=np.float64)
    if rope.scaling == "linear":
        return inv_freq / rope.factor
    if rope.scaling == "llama3":
        return _llama3(inv_freq, rope)
    if rope.scaling == "yarn":
        return _yarn(inv_freq, rope, head_dim)
    return inv_freq


def _llama3(inv_freq: np.ndarray, rope: Rope) -> np.ndarray:
    wavelength = 2 * np.pi / inv_freq
    # 1 where the wave is short against the original context (kept), 0 where it is long (divided), linear between.
    keep = (rope.original_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq


def _yarn(inv_freq: np.ndarray, rope: Rope, head_dim: int) -> np.ndarray:
    def pair_with(rotations: float) -> float:
        """The (fractional) pair index that turns this often within the original context."""
        return head_dim * np.log(rope.original_context / (rotations * 2 * np.pi)) / (2 * np.log(rope.theta))

    low = max(np.floor(pair_with(rope.beta_fast)), 0)
    high = min(np.ceil(pair_with(rope.beta_slow)), head_dim - 1)  # D - 1, not D/2 - 1: as published
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)


def cos_sin(rope: Rope, head_dim: int, positions: np.ndarray, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position and pair, yarn's attention factor included.

    Parameters
    ----------
    positions : (..., T) integer
        Absolute, from 0.

    Returns
    -------
    cos, sin : (..., T, D/2) of `dtype`
    """
    angle = np.asarray(positions, dtype=np.float64)[..., None] * inverse_frequencies(rope, head_dim)
    factor = 1.0
    if rope.scaling == "yarn":
        default = 0.1 * np.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        factor = default if rope.attention_factor is None else rope.attention_factor
    return (factor * np.cos(angle)).astype(dtype), (factor * np.sin(angle)).astype(dtype)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate the half-split pairs (x_i, x_{i+D/2}).

    Parameters
    ----------
    x : (..., T, D)
    cos, sin : (..., T, D/2), broadcast over heads

    Returns
    -------
    (..., T, D), a new array

    Examples
    --------
    >>> rotate(np.array([[1.0, 0.0]]), np.array([[0.0]]), np.array([[1.0]])).tolist()
    [[0.0, 1.0]]
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def rotate_interleaved(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate the interleaved pairs (x_{2i}, x_{2i+1}); otherwise as `rotate`.

    Examples
    --------
    >>> rotate_interleaved(np.array([[1.0, 0.0]]), np.array([[0.0]]), np.array([[1.0]])).tolist()
    [[0.0, 1.0]]
    """
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def interleaved_to_half_split(num_heads: int, head_dim: int) -> np.ndarray:
    """Row order that turns an interleaved q or k projection into a half-split one: `W[order]`.

    Give k_proj its own head count (the kv heads): permuting it with the query heads is the classic grouped-query bug.

    Returns
    -------
    (num_heads * head_dim,) int64

    Examples
    --------
    >>> interleaved_to_half_split(1, 4).tolist()
    [0, 2, 1, 3]
    """
    order = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return order.swapaxes(1, 2).reshape(-1)


def half_split_to_interleaved(num_heads: int, head_dim: int) -> np.ndarray:
    """The inverse of `interleaved_to_half_split`.

    Examples
    --------
    >>> half_split_to_interleaved(1, 4).tolist()
    [0, 2, 1, 3]
    >>> half_split_to_interleaved(1, 6).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    order = np.arange(num_heads * head_dim).reshape(num_heads, 2, head_dim // 2)
    return order.swapaxes(1, 2).reshape(-1)
