"""What all formats share: which inputs and codes are accepted, and rounding a magnitude to a whole number of steps."""

from collections.abc import Callable

import numpy as np

ROUNDINGS = ("nearest", "toward_zero", "away_from_zero", "stochastic")
TIES = ("even", "away", "zero")
_CHUNK = 1 << 13  # numbers worked on at a time: the temporaries stay in the cache


def encode_chunks(x: np.ndarray, name: str, dtype: type, encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`encode` on float64 chunks of an array of floats, which float64 holds exactly.

    Raises
    ------
    ValueError
        x is not float16, float32 or float64.
    """
    x = np.asarray(x)
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise ValueError(f"{name}.encode takes float16, float32 or float64, got {x.dtype}")
    codes = np.empty(x.shape, dtype)
    flat, out = x.reshape(-1), codes.reshape(-1)
    for start in range(0, x.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            out[part] = encode(flat[part].astype(np.float64))
    return codes


def checked_codes(codes: np.ndarray, name: str, dtype: type, largest: int) -> np.ndarray:
    """Codes of the format's own dtype (of either byte order), none above `largest`.

    Raises
    ------
    ValueError
    """
    codes = np.asarray(codes)
    if codes.dtype.newbyteorder("=") != dtype:
        raise ValueError(f"{name}.decode takes {np.dtype(dtype)} codes, got {codes.dtype}")
    if largest < np.iinfo(dtype).max and (codes > largest).any():
        raise ValueError(f"{name} has the codes 0 to {largest}, got {codes.max()}")
    return codes


def check_choice(name: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a named choice is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}.encode: {argument} must be one of {', '.join(choices)}, got {value!r}")


def check_rounding(name: str, rounding: str, ties: str, rng: np.random.Generator | None) -> None:
    """Raise ValueError for an unknown rounding or tie rule, or stochastic rounding without a generator."""
    check_choice(name, "rounding", rounding, ROUNDINGS)
    check_choice(name, "ties", ties, TIES)
    if (rounding == "stochastic") != (rng is not None):
        raise ValueError(f"{name}.encode: rounding='stochastic' and rng (a numpy Generator) go together")


def round_steps(steps: np.ndarray, first: np.ndarray | int, rounding: str, ties: str, rng) -> np.ndarray:
    """Non-negative float64 numbers of steps -> whole numbers of steps, int64.

    `first` + the result is the code, whose parity decides ties that go to the even code. Stochastic rounding goes up
    with the probability of the fraction that would be lost.
    """
    if rounding == "nearest" and ties == "even" and isinstance(first, int) and first % 2 == 0:
        return np.rint(steps).astype(np.int64)
    below = np.floor(steps)
    rest = steps - below
    below = below.astype(np.int64)
    if rounding == "toward_zero":
        return below
    if rounding == "away_from_zero":
        return below + (rest > 0)
    if rounding == "stochastic":
        return below + (rng.random(steps.shape) < rest)
    if ties == "zero":
        return below + (rest > 0.5)
    if ties == "away":
        return below + (rest >= 0.5)
    return below + ((rest > 0.5) | ((rest == 0.5) & ((below + first) & 1 == 1)))
