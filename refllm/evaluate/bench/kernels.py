"""`refllm bench kernels`: one product after another, packed weights against NumPy's float32 and against peers."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from refllm.evaluate.bench import bandwidth
from refllm.evaluate.bench.products import Product, Task, code_bits, numpy_product, refllm_product
from refllm.evaluate.bench.rounds import SPREAD, Candidate, Rounds, take_turns

TYPES = ("Q4_0", "Q4_K", "Q8_0", "w4", "w8")
ACTIVATIONS = ("int8", "float32")
BASE = "numpy float32"


def measure_products(
    shape: tuple[int, int],
    types: Sequence[str] = TYPES,
    *,
    activations: Sequence[str] = ACTIVATIONS,
    tokens: int = 1,
    threads: int = 1,
    peers: Sequence = (),
    rounds: int = 21,
    spread: int = SPREAD,
    read_bytes: int = bandwidth.READ_BYTES,
    on_step: Callable[[str], None] | None = None,
) -> dict:
    """Time x W^T for one shape, all ways in turns.

    Parameters
    ----------
    shape : (out, in)
    types : sequence of str
        GGUF types and names of `products.KINDS`.
    activations : sequence of str
        float32, int8.
    tokens : int
        Rows of x.
    threads : int
        Of peers and of the measured read; refllm and NumPy have theirs from the environment of this process.
    peers : sequence of refllm.evaluate.bench.peers.Peer
    rounds : int
    spread : int
        Bytes that all products' copies of a weight have together, for one token.
    read_bytes : int
        Size of the array that measures the memory.
    on_step : callable, optional
        Called with a line of progress.

    Returns
    -------
    dict
        rows, bandwidth_gbytes_per_s (measured in the same rounds), other_work.
    """
    say = on_step or (lambda text: None)
    rng = np.random.default_rng(0)
    W = rng.standard_normal(shape, np.float32)
    x = rng.standard_normal((tokens, shape[1]), np.float32)
    builders: list[Callable[[Task], Product]] = [numpy_product]
    builders += [partial(refllm_product, type_name=t, activations=a) for t in types for a in activations]
    for peer in peers:
        builders += peer.products(types)
    task = Task(W, x, threads, spread // len(builders))
    products = []
    for number, build in enumerate(builders):
        say(f"{shape[0]}x{shape[1]}: preparing {number + 1}/{len(builders)}")
        product = build(task)
        product.run()
        products.append((product, product.error()))
    turns = [Candidate(product.name, product.run, product.copies) for product, _ in products]
    turns.append(bandwidth.read_candidate(threads, read_bytes))
    show = lambda done, total: say(f"{shape[0]}x{shape[1]}: round {done + 1}/{total}")
    found = take_turns(turns, rounds, running_start=True, on_round=show)
    read = read_bytes / found.timings[bandwidth.NAME].median / 1e9
    return {
        "rows": [_row(product, error, found, products, task, read) for product, error in products],
        "bandwidth_gbytes_per_s": read,
        "other_work": found.other_work,
    }


def _row(product: Product, error: float, found: Rounds, products: list, task: Task, read: float) -> dict:
    timing = found.timings[product.name]
    rate = product.nbytes / timing.median / 1e9
    row = {
        "shape": list(task.W.shape),
        "tokens": len(task.x),
        "program": product.program,
        "type": product.type,
        "detail": product.detail,
        "weight_bytes": product.nbytes,
        "copies": product.copies,
        "seconds": timing.median,
        "lower": timing.lower,
        "upper": timing.upper,
        "gbytes_per_s": rate,
        "bandwidth_share": rate / read,
        "gflops": 2 * task.W.size * len(task.x) / timing.median / 1e9,
        "relative_error": error,
        "x_numpy": found.ratio(product.name, BASE),
        "ratios": {},
        "x_peers": {},
    }
    if product.program == "refllm":
        others = [other for other, _ in products if other.program not in ("refllm", "numpy")]
        row["ratios"] = {other.name: found.ratio(product.name, other.name) for other in others}
        row["x_peers"] = _counterparts(product, others, found)
    return row


def _counterparts(product: Product, others: list[Product], found: Rounds) -> dict[str, float]:
    """Against each peer: its row of the same type, else its fastest whose codes have at least as many bits."""
    ratios = {}
    for program in dict.fromkeys(other.program for other in others):
        mine = [other for other in others if other.program == program]
        same = [other for other in mine if other.type == product.type]
        wide = [other for other in mine if code_bits(other.type) >= code_bits(product.type)]
        if same or wide:
            ratios[program] = min(found.ratio(product.name, other.name) for other in same or wide)
    return ratios
