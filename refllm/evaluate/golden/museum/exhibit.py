"""What an exhibit of the museum is, and how one is entered."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Answer = dict[str, np.ndarray]


@dataclass(frozen=True)
class Mutant:
    """A defect that somebody shipped, as a wrong implementation of an op.

    name : str
    suite : str
        The suite that must catch it.
    mistakes : tuple of str
        What the doctor should call it; each of them is right.
    year : int
        When it was reported or mended.
    links : tuple of str
        Public threads.
    story : str
        One sentence.
    answer : callable
        f(op, params, inputs) -> outputs; NotImplementedError for what the software does not do.
    declared : dict
        What its authors declared, or meant: --declare.
    outputs : tuple of str
        What it gives; empty: everything.
    """

    name: str
    suite: str
    mistakes: tuple[str, ...]
    year: int
    links: tuple[str, ...]
    story: str
    answer: Callable[[str, dict, Answer], Answer]
    declared: dict[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()


def right(op: str, params: dict, inputs: Answer) -> Answer:
    """The right answer: refllm's, the first way to it where it has several."""
    from refllm.evaluate.golden.own import implementation

    answer = implementation(op, params, inputs)
    first = next(iter(answer.values()), None)
    return dict(first) if isinstance(first, dict) else dict(answer)


class Room:
    """Mutants of one subject, in order; a decorator enters one."""

    def __init__(self):
        self.mutants: list[Mutant] = []

    def enter(self, name, suite, mistakes, year, links, story, *, declared=None, outputs="") -> Callable:
        """Decorate `f(op, params, inputs)`; mistakes, links and outputs are words separated by spaces."""

        def entered(answer):
            urls = tuple(f"https://github.com/{link}" for link in links.split())
            words = (tuple(mistakes.split()), year, urls, story, answer, declared or {}, tuple(outputs.split()))
            self.mutants.append(Mutant(name, suite, *words))
            return answer

        return entered
