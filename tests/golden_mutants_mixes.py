"""Plain implementations of blockwise.kquants and blockwise.allocate, with one mistake at a time switched on.

BUGS: {op: {mistake: the flag that must be among the failing ones}}. `mutant(None)` has no mistake.
"""

import numpy as np

BUGS = {
    "blockwise.kquants": {
        "thirds_from_0": "UseMore",
        "one_layer_more": "FirstLayers",
        "never_grouped": "Grouped",
        "base_output": "Output",
        "embedding_as_head": "Tied",
    },
    "blockwise.allocate": {
        "next_larger": "Hull",
        "last_tensor": "Ties",
        "ends_at_once": "GoesOn",
        "from_the_first": "Cheapest",
        "no_check": "BadParams",
        "least_loss": "Random",
    },
}
TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def kquants(bug, params, layers):
    n, mix, base = int(layers), params["mix"], params["mix"][:4]
    types = np.full((n, 7), TYPES.index(base))
    extra = 1 if bug == "one_layer_more" else 0
    for i in range(n):
        start = 0 if bug == "thirds_from_0" else n // 8
        more = i < n // 8 or i >= 7 * n // 8 or (i - start) % 3 == 2
        v, o, down = base, base, base
        if mix == "Q2_K":
            v = "Q4_K" if params["heads_per_group"] >= 4 and bug != "never_grouped" else "Q3_K"
            o = down = "Q3_K"
        elif mix == "Q3_K_M":
            v, o = "Q5_K" if i < 2 + extra else "Q4_K", "Q4_K"
            down = "Q5_K" if i < n // 16 + extra else "Q4_K"
        elif mix == "Q4_K_S":
            v = "Q5_K" if i < 4 + extra else "Q4_K"
            down = "Q5_K" if i < n // 8 + extra else "Q4_K"
        elif more:
            v = down = "Q6_K"
        if bug == "base_output":
            o = base
        types[i, [2, 3, 6]] = [TYPES.index(t) for t in (v, o, down)]
    tied = params["tied_embeddings"] or bug == "embedding_as_head"
    return {"types": types.astype(np.uint8), "embedding": np.array([4 if tied else TYPES.index(base)], np.uint8)}


def allocate(bug, params, loss, nbytes, budget):
    tensors = range(len(loss))
    choice = [int(np.lexsort((loss[t], nbytes[t]))[0]) for t in tensors]
    if bug == "from_the_first":
        choice = [0] * len(loss)
    left = int(budget) - sum(nbytes[t, choice[t]] for t in tensors)
    if left < 0 and bug != "no_check" and bug != "from_the_first":
        raise ValueError("budget")
    stopped = set()
    while True:
        steps = []
        for t in tensors:
            for o in range(loss.shape[1]):
                gain, cost = loss[t, choice[t]] - loss[t, o], nbytes[t, o] - nbytes[t, choice[t]]
                if t in stopped or gain <= 0 or cost <= 0:
                    continue
                first = t if bug == "last_tensor" else -t
                key = (gain / cost, first, cost)
                if bug == "next_larger":
                    key = (0, first, -cost)
                if bug == "least_loss":
                    key = (gain, first, cost)
                steps.append((key, t, o, cost))
        if not steps:
            break
        _, t, o, cost = max(steps)
        if cost > left:
            stopped.add(t)
            if bug == "ends_at_once":
                break
        else:
            choice[t], left = o, left - cost
    return {"choice": np.array(choice)}


_OPS = {"blockwise.kquants": kquants, "blockwise.allocate": allocate}


def mutant(bug):
    """implementation(op, params, inputs) with one mistake, or none."""
    return lambda op, params, inputs: _OPS[op](bug, params, **inputs)
