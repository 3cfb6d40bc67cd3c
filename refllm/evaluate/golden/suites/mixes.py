"""The suites blockwise/kquants and blockwise/allocate. Ids are never reused and never renumbered."""

from fractions import Fraction

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, manifest_head, values
from refllm.evaluate.golden.suites.exact import splitmix64
from refllm.evaluate.golden.suites.rtn_notes import note

_LESSON = "lessons/17-mixed-precision.md"
_BITS = {"class": "bits"}
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TENSORS = ("q", "k", "v", "o", "gate", "up", "down")


def _head(name: str, title: str, header: list[str]) -> dict:
    return manifest_head(__name__, f"blockwise/{name}", title, header, _LESSON)


def _more(i: int, n: int) -> bool:
    first, last = n // 8, 7 * n // 8
    return i < first or i >= last or (i - first) % 3 == 2


# The table of the mixes: tensor -> its type in layer i of n, where that is not the base type.
_SPECIAL = {
    "Q2_K": {"v": lambda i, n, gqa: "Q4_K" if gqa >= 4 else "Q3_K", "down": lambda i, n, gqa: "Q3_K",
             "o": lambda i, n, gqa: "Q3_K"},
    "Q3_K_M": {"v": lambda i, n, gqa: "Q5_K" if i < 2 else "Q4_K", "o": lambda i, n, gqa: "Q4_K",
               "down": lambda i, n, gqa: "Q5_K" if i < n // 16 else "Q4_K"},
    "Q4_K_S": {"v": lambda i, n, gqa: "Q5_K" if i < 4 else "Q4_K",
               "down": lambda i, n, gqa: "Q5_K" if i < n // 8 else "Q4_K"},
    "Q4_K_M": {name: lambda i, n, gqa: "Q6_K" if _more(i, n) else "Q4_K" for name in ("v", "down")},
    "Q5_K_M": {name: lambda i, n, gqa: "Q6_K" if _more(i, n) else "Q5_K" for name in ("v", "down")},
}  # fmt: skip


def _mix(id: int, comment: str, flags: str, mix: str, layers: int, tied: bool, gqa: int = 1) -> CaseSpec:
    base = mix[:4]
    rows = [[_SPECIAL[mix].get(t, lambda i, n, gqa: base)(i, layers, gqa) for t in TENSORS] for i in range(layers)]
    expected = {
        "types": Output(_BITS, values("u8", [[TYPES.index(t) for t in row] for row in rows])),
        "embedding": Output(_BITS, values("u8", [TYPES.index("Q6_K" if tied else base)])),
    }
    params = {"mix": mix, "tied_embeddings": tied, "heads_per_group": gqa}
    inputs = {"layers": values("i64", layers)}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected, params=params)


def kquants_suite() -> SuiteSpec:
    """The suite blockwise/kquants."""
    header = [
        "Input layers, i64 []. Params: mix, tied_embeddings, heads_per_group (query heads per key-value head). "
        "Outputs: "
        "types u8 [layers, 7], of q, k, v, o, gate, up and down in every layer, and embedding u8 [1]: 0 Q2_K, 1 Q3_K, "
        "2 Q4_K, 3 Q5_K, 4 Q6_K, before any fallback of rows that 256 does not divide. A head of its own is Q6_K.",
        "more(i, n) = i < n // 8 or i >= 7 n // 8 or (i - n // 8) mod 3 = 2. The rules stand in refllm's module "
        "methods/blockwise/kquants.py as a table.",
    ]
    notes = {
        "UseMore": note("OFF_BY_ONE", "The layers with more bits: the first and last eighth, and every third between.",
                        "Counting thirds from layer 0 instead of from n // 8 gives other layers."),
        "FirstLayers": note("OFF_BY_ONE", "Fixed numbers of first layers (2, 4), and n // 16 and n // 8 of them."),
        "Grouped": note("BASIC", "Q2_K gives v Q4_K where four or more query heads share it."),
        "Output": note("BASIC", "o has more bits in Q2_K and Q3_K_M, and no other in Q4_K and Q5_K mixes."),
        "Tied": note("BASIC", "A tied embedding is the head: Q6_K. One of its own takes the base type."),
    }  # fmt: skip
    cases = [
        _mix(1, "32 layers", "UseMore Tied", "Q4_K_M", 32, False),
        _mix(2, "30 layers", "UseMore Tied", "Q4_K_M", 30, True),
        _mix(3, "7 layers: no first eighth", "UseMore", "Q5_K_M", 7, True),
        _mix(4, "32 layers", "FirstLayers Output", "Q3_K_M", 32, False),
        _mix(5, "32 layers", "FirstLayers Output", "Q4_K_S", 32, False),
        _mix(6, "one layer", "FirstLayers", "Q4_K_S", 1, True),
        _mix(7, "heads of their own", "Output Grouped", "Q2_K", 4, True),
        _mix(8, "four heads a group", "Grouped", "Q2_K", 4, True, 4),
    ]
    source = {"kind": "first_principles", "name": "the rules of llama.cpp, tensor by tensor"}
    head = _head("kquants", "Which K-quant each tensor of a mix gets", header)
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])


def _chosen(loss: list[list[int]], nbytes: list[list[int]], budget: int) -> list[int]:
    """The walk along the hulls, in fractions."""
    choice = [min(range(len(row)), key=lambda o, t=t: (nbytes[t][o], loss[t][o])) for t, row in enumerate(loss)]
    stopped, left = set(), budget - sum(nbytes[t][o] for t, o in enumerate(choice))
    while True:
        steps = []
        for t, at in enumerate(choice):
            for o in range(len(loss[t])):
                if t not in stopped and nbytes[t][o] > nbytes[t][at] and loss[t][o] < loss[t][at]:
                    saved = Fraction(loss[t][at] - loss[t][o], nbytes[t][o] - nbytes[t][at])
                    steps.append((saved, -t, nbytes[t][o], o))
        if not steps:
            return choice
        _, t, size, option = max(steps)
        cost = size - nbytes[-t][choice[-t]]
        if cost > left:
            stopped.add(-t)
        else:
            choice[-t], left = option, left - cost


def _allocate(id: int, comment: str, flags: str, loss, nbytes, budget: int) -> CaseSpec:
    inputs = {"loss": values("f64", loss), "nbytes": values("i64", nbytes), "budget": values("i64", budget)}
    expected = {"choice": Output(_BITS, values("i64", _chosen(loss, nbytes, budget)))}
    return CaseSpec(id, comment, tuple(flags.split()), inputs, expected)


def _random(id: int, budget: int) -> CaseSpec:
    numbers = splitmix64(id, 6 * 5 * 2)
    loss = [sorted((int(x >> 54) for x in numbers[5 * t : 5 * t + 5]), reverse=True) for t in range(6)]
    nbytes = [sorted(int(x >> 56) + 1 for x in numbers[30 + 5 * t : 35 + 5 * t]) for t in range(6)]
    return _allocate(id, f"six tensors, five options, {budget} bytes", "Random Hull", loss, nbytes, budget)


def allocate_suite() -> SuiteSpec:
    """The suite blockwise/allocate."""
    header = [
        "Inputs loss f64 and nbytes i64, both [tensors, options], and budget i64 []. Output choice i64 "
        "[tensors]. All begin "
        "with the option of fewest bytes (of equals, of least loss). A tensor's next step goes to the option "
        "that saves "
        "most loss per byte, of equals to the largest; the best step of all tensors (of equals, the first tensor's) is "
        "taken if it fits in the budget, else that tensor stays where it is for good. Until no tensor can gain.",
        "A budget below the cheapest options is rejected.",
    ]
    notes = {
        "Hull": note("BASIC", "The next step is the steepest one, not the next larger option."),
        "Ties": note("ORDER", "Equal slopes: the first tensor, and of its options the largest."),
        "GoesOn": note("BASIC", "A step that does not fit in does not end the walk: others may."),
        "Cheapest": note("BASIC", "It begins with the fewest bytes, not with the first option."),
        "BadParams": note("MALFORMED", "The cheapest options do not fit in."),
        "Random": note("BASIC", "Random losses and bytes."),
    }
    cases = [
        _allocate(1, "an option above the hull is passed over", "Hull", [[10, 9, 0]], [[1, 2, 3]], 3),
        _allocate(2, "two equal tensors, room for one", "Ties", [[4, 0], [4, 0]], [[1, 2], [1, 2]], 3),
        _allocate(3, "two options of one slope", "Ties", [[4, 2, 0]], [[1, 2, 3]], 3),
        _allocate(4, "the best step is too large", "GoesOn", [[900, 0], [1, 0]], [[1, 50], [1, 3]], 10),
        _allocate(5, "options in any order", "Cheapest", [[0, 5, 3], [2, 7, 1]], [[9, 2, 4], [3, 1, 8]], 10),
        _random(11, 300),
        _random(12, 700),
        CaseSpec(20, "too small", ("BadParams",), {"loss": values("f64", [[1, 0]]), "nbytes": values("i64", [[5, 9]]),
                 "budget": values("i64", 4)}, result="invalid", error="value"),
    ]  # fmt: skip
    source = {"kind": "first_principles", "name": "the header above, in fractions"}
    head = _head("allocate", "Options of many tensors under one budget", header)
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases)])
