"""What a predictor works with: one case, its right answer, and refllm to ask what another input would give."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from refllm.evaluate.golden.compare import Expected


@dataclass(frozen=True)
class Mistake:
    """A mistake that people have made.

    name : str
        Words joined by hyphens.
    sentence : str
        What an implementation with it does.
    mend : str
        What to do instead.
    links : tuple of str
        Where it was made before; "owner/repository/issues/N" of GitHub.
    """

    name: str
    sentence: str
    mend: str
    links: tuple[str, ...] = ()

    @property
    def urls(self) -> list[str]:
        """The links, whole."""
        return [link if link.startswith("https://") else f"https://github.com/{link}" for link in self.links]


class Hypothesis(NamedTuple):
    """What an implementation with a mistake would give.

    mistake : its name; where : what it concerns ("input qweight"), the same words in every case; outputs : only those
    that differ from the right ones: an array, None for what may be anything, or, of random answers, an Expected that
    says how they are distributed.
    """

    mistake: str
    where: str
    outputs: dict[str, np.ndarray | Expected | None]


@dataclass(frozen=True)
class Given:
    """One case.

    op, params, inputs : as an implementation gets them
    expected : dict of name to array
        Right values; float64 where they are compared within a bound.
    dtypes : dict of name to logical dtype, of inputs and outputs
    implementation : callable
        The right one: f(op, params, inputs) -> dict of arrays.
    variants : list of (words, outputs)
        What other conventions of the suite give.
    """

    op: str
    params: dict
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    dtypes: dict[str, str]
    implementation: Callable
    variants: list[tuple[str, dict[str, np.ndarray]]] = field(default_factory=list)

    def right(self, params: Mapping | None = None, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """What the right implementation gives with some params or inputs replaced; nothing where it refuses."""
        given = {name: array.copy() for name, array in (self.inputs | inputs).items()}
        try:
            with np.errstate(all="ignore"):
                answer = self.implementation(self.op, self.params | dict(params or {}), given)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, NotImplementedError):
            return {}  # what makes no sense to it predicts nothing
        if answer and all(isinstance(way, Mapping) for way in answer.values()):
            answer = {name: array for way in reversed(answer.values()) for name, array in way.items()}
        return {name: array for name, array in answer.items() if name in self.expected}

    def named(self, *words: str) -> Iterator[str]:
        """Names of inputs with one of these words in them."""
        return (name for name in self.inputs if any(word in name.lower() for word in words))


Predictor = Callable[[Given], Iterator[Hypothesis]]
