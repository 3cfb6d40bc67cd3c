"""refllm's answers to the suite of speculative acceptance, see `refllm.evaluate.golden.own`."""

import numpy as np

_LAST_BELOW_1 = 1 - 2.0**-53


class _Listed:
    """Hands out listed numbers where a generator of random ones is asked for."""

    def __init__(self, numbers):
        self._numbers = iter(numbers)

    def random(self) -> float:
        """The next number of the list, in place of a draw."""
        return float(next(self._numbers))


def _accept(params: dict, p, q, drafted=None, uniforms=None) -> dict[str, np.ndarray]:
    from refllm.methods.runtime.speculative import accept

    if drafted is None:
        return _acceptance_law(lambda token, u, w: accept(p, q, [token], _Listed((u, w))), q[0])
    accepted, next_id = accept(p, q, drafted.tolist(), _Listed(uniforms))
    return {"accepted": np.array(accepted), "next_id": np.array(next_id)}


def _acceptance_law(accept, q: np.ndarray) -> dict[str, np.ndarray]:
    """What `accept(token, u, w) -> (accepted, next id)` does with uniform u and w, measured by bisection."""
    tokens = np.flatnonzero(q)
    acceptance = np.zeros_like(q)
    for token in tokens:
        acceptance[token] = _length(lambda u, token=token: accept(token, u, 0.5)[0] == 1)
    outputs = {"acceptance": acceptance}
    turned_down = np.zeros_like(q)
    if (acceptance[tokens] < 1).any():
        token = tokens[np.argmin(acceptance[tokens])]
        up_to = [_length(lambda w, i=i: accept(token, _LAST_BELOW_1, w)[1] <= i) for i in range(q.size)]
        outputs["residual"] = turned_down = np.diff(up_to, prepend=0.0)
    reached = q * acceptance
    return outputs | {"distribution": reached + (1 - reached.sum()) * turned_down}


def _length(holds) -> float:
    """Length of the interval [0, x) of uniform numbers on which a statement holds."""
    low, high = 0.0, 1.0
    if holds(_LAST_BELOW_1):
        return high
    for _ in range(53):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


OPS = {
    "runtime.accept": _accept,
}
