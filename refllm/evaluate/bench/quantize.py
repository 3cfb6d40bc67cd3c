"""`refllm bench quantize`: seconds to encode a matrix as GGUF blocks, and to apply a recipe to a model."""

from collections.abc import Callable, Sequence

import numpy as np

from refllm.evaluate.bench.rounds import Candidate, Rounds, take_turns
from refllm.formats.blocks import BLOCKS
from refllm.kernels.packed import encode_gguf

TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")


def check_types(types: Sequence[str], shapes: Sequence[Sequence[int]] = ()) -> None:
    """Raise ValueError for the first that is no GGUF type, or whose blocks do not fit a shape."""
    for name in types:
        if name not in BLOCKS:
            raise ValueError(f"unknown GGUF type {name!r}; known: {', '.join(BLOCKS)}")
        for rows, columns in shapes:
            if columns % BLOCKS[name].block_size:
                size = BLOCKS[name].block_size
                raise ValueError(f"{rows}x{columns}: {columns} columns are no multiple of {size}, as {name} needs")


def measure_encoders(
    shape: tuple[int, int],
    types: Sequence[str] = TYPES,
    *,
    peers: Sequence = (),
    rounds: int = 5,
    on_step: Callable[[str], None] | None = None,
) -> dict:
    """Time the encoders of GGUF blocks: NumPy's text, refllm's compiled one, peers'.

    Parameters
    ----------
    shape : (out, in)
    types : sequence of str
    peers : sequence of refllm.evaluate.bench.peers.Peer
    rounds : int
    on_step : callable, optional
        Called with a line of progress.

    Returns
    -------
    dict
        rows (same_bytes: share of blocks that are refllm's byte for byte) and other_work.
    """
    say = on_step or (lambda text: None)
    W = np.random.default_rng(0).standard_normal(shape, np.float32)
    rows, others = [], []
    for name in types:
        encoders = {"refllm": lambda W, name=name: encode_gguf(name, W), "numpy": BLOCKS[name].encode}
        encoders |= {peer.name: encode for peer in peers if (encode := peer.encoder(name)) is not None}
        say(f"{name}: comparing bytes")
        mine = encoders["refllm"](W)
        size = BLOCKS[name].bytes_per_block
        same = {program: _same_blocks(encode(W), mine, size) for program, encode in encoders.items()}
        turns = [Candidate(program, lambda encode=encode: encode(W)) for program, encode in encoders.items()]
        found = take_turns(
            turns, rounds, on_round=lambda done, total, name=name: say(f"{name}: round {done + 1}/{total}")
        )
        others.append(found.other_work)
        rows += [_row(program, name, found, same, W) for program in encoders]
    return {"rows": rows, "other_work": max((work for work in others if work is not None), default=None)}


def _same_blocks(found: np.ndarray, mine: np.ndarray, size: int) -> float:
    if found.shape != mine.shape:
        return 0.0
    return float((found.reshape(-1, size) == mine.reshape(-1, size)).all(axis=1).mean())


def _row(program: str, type_name: str, found: Rounds, same: dict[str, float], W: np.ndarray) -> dict:
    timing = found.timings[program]
    ratios = {other: found.ratio(program, other) for other in found.timings if other not in (program, "numpy")}
    return {
        "shape": list(W.shape),
        "program": program,
        "type": type_name,
        "seconds": timing.median,
        "lower": timing.lower,
        "upper": timing.upper,
        "mweights_per_s": W.size / timing.median / 1e6,
        "same_bytes": same[program],
        "x_numpy": found.ratio(program, "numpy"),
        "ratios": ratios if program == "refllm" else {},
    }


def measure_recipes(
    model, recipes: Sequence[str], calibration=None, *, rounds: int = 3, on_step: Callable[[str], None] | None = None
) -> dict:
    """Time `compress` of a whole model by each recipe, in turns.

    Parameters
    ----------
    model : refllm.model.model.Model
    recipes : sequence of str
    calibration : (M,) integers, optional
        For recipes that need it.
    rounds : int
    on_step : callable, optional
        Called with a line of progress.

    Returns
    -------
    dict
        rows and other_work.
    """
    from refllm.methods.apply import compress, needs_calibration

    say = on_step or (lambda text: None)
    ids = lambda recipe: calibration if needs_calibration(recipe) else None
    turns = [Candidate(recipe, lambda recipe=recipe: compress(model, recipe, ids(recipe))) for recipe in recipes]
    found = take_turns(turns, rounds, on_round=lambda done, total: say(f"recipes: round {done + 1}/{total}"))
    parameters = sum(int(np.prod(weight.shape)) for weight in model.weights.values())
    rows = [
        {
            "model": model.name,
            "recipe": recipe,
            "seconds": timing.median,
            "lower": timing.lower,
            "upper": timing.upper,
            "mweights_per_s": parameters / timing.median / 1e6,
        }
        for recipe, timing in found.timings.items()
    ]
    return {"rows": rows, "other_work": found.other_work}
