"""`refllm bench decode` and `prefill`: tokens per second of a GGUF file, refllm and peers on the same file.

    prefill   one pass over a prompt, logits of its last token (llama-bench's pp512)
    decode    one token after another behind a short prompt, logits of each (llama-bench's tg128); or behind a long one,
              where keys and values are read as much as weights, with caches of refllm's that hold less

All programs read the same tokens, a text, so that their work is the same whatever they would have written. Before
anything is timed they read it once, and the share of positions at which a peer and refllm find the same likeliest token
is reported: two programs that do not run the same model are not compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from refllm.evaluate.bench import bandwidth
from refllm.evaluate.bench.rounds import Candidate, take_turns
from refllm.formats.files import data_path
from refllm.methods.apply import compress
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.load import load
from refllm.model.model import Model

PROMPT = 8  # tokens before decoding begins
ACTIVATIONS = ("int8",)
AGREEMENT = 0.5  # below it two programs do not run the same model


class RefllmModel:
    """refllm with a model open. Peers offer the same: program, detail, start, step, logits, close.

    Parameters
    ----------
    model : Model
    activations : "int8" or "float32"
    cache : str
        A recipe for its cache; "none": keys and values as they come.
    """

    program = "refllm"

    def __init__(self, model: Model, activations: str = "int8", cache: str = "none"):
        model = compress(model, cache)
        self.model = replace(model, runtime=replace(model.runtime, activations=activations))
        self.detail = activations if cache == "none" else f"{activations} {cache}"
        self._cache = self._logits = None

    def start(self, ids: np.ndarray) -> None:
        """Forget everything and read these tokens; logits of the last."""
        self._cache = new_cache(self.model)
        self._logits = forward(self.model, ids, cache=self._cache, last_only=True)

    def step(self, token: int) -> None:
        """Read one more token."""
        self._logits = forward(self.model, [token], cache=self._cache, last_only=True)

    def logits(self) -> np.ndarray:
        """Of the last token, (V,) float32."""
        return self._logits[-1]

    def close(self) -> None:
        """Nothing is held that would not go by itself."""


def weight_bytes_per_token(model: Model) -> int:
    """Bytes of weights that one token's pass reads: all of them, but one row of an embedding that is not the head."""
    total = sum(weight.nbytes for weight in model.weights.values())
    if model.config.tied_embeddings:
        return total
    embedding = model.weights["model.embed_tokens.weight"]
    return total - embedding.nbytes + embedding.nbytes // embedding.shape[0]


def text_ids(model: Model, count: int) -> np.ndarray:
    """So many tokens of a bundled text; where there is no tokenizer, or too little text, made up ones."""
    ids = []
    if model.tokenizer is not None:
        ids = model.tokenizer.encode(data_path("tiny/eval.txt").read_text("utf-8")[: 16 * count])[:count]
    if len(ids) < count:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, count)
    return np.asarray(ids)


def measure_decode(path, *, tokens: int = 128, context: int = PROMPT, **options) -> dict:
    """Decode so many tokens behind `context` others; options and result as of `measure_file`."""

    def candidate(program, ids):
        rest = [int(i) for i in ids[context:]]

        def turn():
            for token in rest:
                program.step(token)

        return Candidate(_name(program), turn, tokens, before=lambda: program.start(ids[:context]))

    found = measure_file(path, context + tokens, candidate, tokens=tokens, **options)
    return found | {"rows": [row | {"context": context} for row in found["rows"]]}


def measure_prefill(path, *, tokens: int = 512, **options) -> dict:
    """Read a prompt of so many tokens; options and result as of `measure_file`."""
    candidate = lambda program, ids: Candidate(_name(program), lambda: program.start(ids), tokens)
    return measure_file(path, tokens, candidate, tokens=tokens, reads=1 / tokens, **options)


def measure_file(
    path,
    context: int,
    candidate: Callable[[object, np.ndarray], Candidate],
    *,
    tokens: int,
    reads: float = 1,
    activations: Sequence[str] = ACTIVATIONS,
    caches: Sequence[str] = ("none",),
    threads: int = 1,
    peers: Sequence = (),
    rounds: int = 5,
    read_bytes: int = bandwidth.READ_BYTES,
    on_step: Callable[[str], None] | None = None,
) -> dict:
    """Time refllm and peers on one file, in turns.

    Parameters
    ----------
    path : path
        A .gguf file; without peers anything that `load` takes.
    context : int
        Tokens that are read in all.
    candidate : callable
        candidate(program, ids) -> what takes turns.
    tokens : int
        That a turn counts.
    reads : float
        How often a token's share of the work reads all weights.
    activations : sequence of str
        Of refllm: int8, float32.
    caches : sequence of str
        Recipes of refllm's caches, "none" for keys and values as they come.
    threads, peers, rounds, read_bytes, on_step :
        As in `measure_products`.

    Returns
    -------
    dict
        rows, bandwidth_gbytes_per_s, other_work.
    """
    say = on_step or (lambda text: None)
    name = Path(path).name
    say(f"{name}: loading")
    model = load(path)
    if context > model.config.context_length:
        raise ValueError(f"{name} has a context of {model.config.context_length} tokens, {context} are needed")
    ids = text_ids(model, context)
    programs = [RefllmModel(model, way, cache) for way in activations for cache in caches]
    programs += [peer.open_model(path, context) for peer in peers]
    try:
        say(f"{name}: comparing what the programs predict")
        agreement = agreements(programs, ids[: PROMPT + 64])
        turns = [candidate(program, ids) for program in programs]
        turns.append(bandwidth.read_candidate(threads, read_bytes))
        found = take_turns(turns, rounds, on_round=lambda done, total: say(f"{name}: round {done + 1}/{total}"))
    finally:
        for program in programs:
            program.close()
    read = read_bytes / found.timings[bandwidth.NAME].median / 1e9
    nbytes = weight_bytes_per_token(model)
    rows = [_row(program, found, nbytes * reads, read, agreement) for program in programs]
    for row, program in zip(rows, programs, strict=True):
        row |= {"file": name, "tokens": tokens, "weight_bytes": nbytes}
        if program.program == "refllm":
            others = {_name(other): other for other in programs if other.program != "refllm"}
            if len(caches) > 1:
                way = program.detail.split()[0]
                others["first cache"] = next(other for other in programs if other.detail.startswith(way))
            row["ratios"] = {name: found.ratio(_name(program), _name(other)) for name, other in others.items()}
    return {"rows": rows, "bandwidth_gbytes_per_s": read, "other_work": found.other_work}


def _name(program) -> str:
    return " ".join(filter(None, (program.program, program.detail)))


def _row(program, found, nbytes: float, read: float, agreement: dict[str, float]) -> dict:
    timing = found.timings[_name(program)]
    rate = nbytes / timing.median / 1e9
    return {
        "program": program.program,
        "detail": program.detail,
        "tokens_per_s": 1 / timing.median,
        "lower": 1 / timing.upper,
        "upper": 1 / timing.lower,
        "gbytes_per_s": rate,
        "bandwidth_share": rate / read,
        "same_top1": agreement[_name(program)],
        "ratios": {},
    }


def agreements(programs: Sequence, ids: np.ndarray) -> dict[str, float]:
    """Share of positions at which each program's likeliest next token is the first program's.

    Raises
    ------
    ValueError
        A program agrees less than by `AGREEMENT`.
    """
    tops = {}
    for program in programs:
        program.start(ids[:1])
        tops[_name(program)] = [int(program.logits().argmax())]
        for token in ids[1:]:
            program.step(int(token))
            tops[_name(program)].append(int(program.logits().argmax()))
    first = next(iter(tops))
    shares = {name: float(np.mean(np.equal(top, tops[first]))) for name, top in tops.items()}
    for name, share in shares.items():
        if share < AGREEMENT:
            raise ValueError(f"{name} and {first} predict the same token at {share:.0%} of positions: not one model")
    return shares
