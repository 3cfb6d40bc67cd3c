"""The bug museum: defects that were shipped, as executable mutants, each with its thread.

    exhibit.py    what a mutant is
    numbers.py    small floats, microscaling, quantisers, integer products
    layouts.py    GGUF blocks and checkpoints
    methods.py    attention, rotary embedding, caches, speculative decoding
    matrix.py     which cases kill which mutant, and what the doctor says

A golden suite is worth what it kills: every mutant must fail at least one case, and the doctor should name it.

Known defects of two kinds are missing, since no suite has an op that could show them: eviction budgets (NVIDIA/kvpress
264: short contexts keep no token at all) and protocols of perplexity (EleutherAI/lm-evaluation-harness 2301).
"""

from refllm.evaluate.golden.museum import layouts, methods, numbers
from refllm.evaluate.golden.museum.exhibit import Mutant as Mutant

MUTANTS = {mutant.name: mutant for room in (numbers.ROOM, layouts.ROOM, methods.ROOM) for mutant in room.mutants}


def __getattr__(name: str):
    """A mutant as a function, so that `--impl refllm.evaluate.golden.museum:NAME` finds it."""
    if name in MUTANTS:
        return MUTANTS[name].answer
    raise AttributeError(f"the museum has no {name!r}")
