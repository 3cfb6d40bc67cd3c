"""How a code becomes a number where it is not the number itself: what the `table` of a tiling.Form names.

    IQ4, FP4, BINARY        whole numbers that fit a byte: looked up as bytes, then treated like codes
    FP8_E4M3FN ...          small floats with a sign: their bits are moved into a float32
    SIXTEEN                 one of sixteen floats
    MANY                    one of 256 floats
    OF_ROWS                 one of up to sixteen floats of the row's own
    HALF, SINGLE            no code at all: a float16 or a float32

Integer products (int8 activations) exist for codes that are numbers and for whole numbers; the others have float ones.
"""

import numpy as np

from refllm.formats.blocks.lookup import FP4_DOUBLED, IQ4_LEVELS
from refllm.formats.dtypes import FP6_E2M3, FP6_E3M2, FP8_E4M3FN, FP8_E4M3FNUZ, FP8_E5M2, FP8_E5M2FNUZ, UE4M3

WHOLE = {"IQ4": IQ4_LEVELS, "FP4": FP4_DOUBLED, "BINARY": np.array([-1, 1], np.int8)}
SMALL = {form.name: form for form in (FP8_E4M3FN, FP8_E5M2, FP8_E4M3FNUZ, FP8_E5M2FNUZ, FP6_E2M3, FP6_E3M2, UE4M3)}
SIXTEEN, MANY, OF_ROWS = "sixteen", "many", "of_rows"
HALF, SINGLE = "half", "single"


def whole_bytes(table: str) -> tuple[np.ndarray, int]:
    """A table of whole numbers as bytes from 0 on, and the offset that is to be subtracted from them.

    Examples
    --------
    >>> values, offset = whole_bytes("BINARY")
    >>> values.tolist(), offset
    ([0, 2], 1)
    """
    offset = -int(WHOLE[table].min())
    return (WHOLE[table].astype(np.int16) + offset).astype(np.uint8), offset


def of_floats(dtype: np.dtype) -> str:
    """The table of floats that lie as such."""
    return HALF if dtype == np.float16 else SINGLE


def table_of(name: str, entries: np.ndarray) -> tuple[str, int]:
    """The table of a CodeWeight, and what to subtract from its codes where they are numbers.

    Parameters
    ----------
    name : str
        As in CodeWeight.table.
    entries : (2^bits,) float32

    Returns
    -------
    table : str
        "" for codes that are numbers, above an offset.
    offset : int
        INTn codes are in two's complement: with their top bit turned round they are numbers above 2^(n-1).
    """
    if name.startswith("INT"):
        return "", len(entries) // 2
    if name in SMALL:
        return name, 0
    return (SIXTEEN if len(entries) <= 16 else MANY), 0
