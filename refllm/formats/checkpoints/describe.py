"""How a checkpoint format is described: its tensors, what they hold, how they are packed, their shapes.

Every module of a format has STORED, a tuple of `Stored`; the package has all of them. Pages and tests are made from it.
"""

import math
import re
from dataclasses import dataclass

from refllm.formats.layouts import Layout


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint format.

    Parameters
    ----------
    name : str
        As in the file, behind the module's name.
    holds : str
        What its numbers mean, in one phrase.
    layout : Layout or None
        Unit of packed codes; None: plain numbers of `dtype`.
    along : str
        The axis of the weight along which units follow each other: "in", "out", "flat" (row-major over the whole
        weight), "groups"; "" where nothing is packed.
    shape : tuple of str
        Formulas of `out`, `in` and the sizes that the format names (`groups`, `blocksize` ...).
    dtype : str
        As in a safetensors header: I32, F16, U8, F8_E4M3 ...; "scale" is the dtype of the scales that were packed.
    note : str

    Examples
    --------
    >>> Tensor("qweight", "codes", None, "in", ("in / 8", "out"), "I32").sizes({"in": 64, "out": 16})
    (8, 16)
    """

    name: str
    holds: str
    layout: Layout | None
    along: str
    shape: tuple[str, ...]
    dtype: str
    note: str = ""

    def sizes(self, known: dict[str, int]) -> tuple[int, ...]:
        """The shape for known sizes, by name."""
        names = {f"{name}_": value for name, value in known.items()} | {"ceil": math.ceil}
        found = []
        for formula in self.shape:
            for name in known:
                formula = re.sub(rf"\b{name}\b", f"{name}_", formula)  # "in" is a word of Python
            value = eval(formula, {"__builtins__": {}}, names)  # a constant of refllm's own source
            if value != int(value):
                raise ValueError(f"{self.name}: {formula.replace('_', '')} is {value} for {known}, not a whole number")
            found.append(int(value))
        return tuple(found)


@dataclass(frozen=True)
class Stored:
    """A checkpoint format: its tensors and what they decode to.

    Parameters
    ----------
    name : str
        As the configuration of a checkpoint calls it.
    variant : str
        Which form of it: "4 bits", "nf4, double quantised" ...
    weight : str
        The weight w[o, i] as a formula of the numbers stored.
    zero_point : str
        The convention; "none" where the codes are numbers.
    tensors : tuple of Tensor
    source : str
        The software whose files these are.
    """

    name: str
    variant: str
    weight: str
    zero_point: str
    tensors: tuple[Tensor, ...]
    source: str

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        return next(tensor for tensor in self.tensors if tensor.name == name)
