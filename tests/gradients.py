"""Check of a gradient against central differences in float64, for every entry.

The bound is derived per entry. With h the step, D(h) the central difference and e = sum(w f) the scalar that is
differentiated: truncation is about f''' h^2 / 6, a third of |D(2h) - D(h)|, bounded here by all of it; rounding is at
most (error of e at two points) / 2h, and an operator loses at most a few hundred roundings of 2^-53 of sum |w f|.
"""

import numpy as np

from refllm.kernels import autograd as ag

STEP = 1e-4
ROUNDING = 300 * 2.0**-53


def assert_gradients(operator, *arrays):
    """The pulled gradient of sum(w * operator(arrays)) equals central differences for every entry of every array."""
    leaves = [ag.parameter(a.copy()) for a in arrays]
    out = operator(*leaves)
    weights = np.random.default_rng(7).normal(size=out.shape)
    (out * weights).sum().backward()
    size = np.abs(out.data * weights).sum()

    def value(which, at, offset):
        moved = [a.copy() for a in arrays]
        moved[which][at] += offset
        return float((operator(*[ag.Tensor(a) for a in moved]).data * weights).sum())

    for which, array in enumerate(arrays):
        assert leaves[which].grad.shape == array.shape
        for at in np.ndindex(array.shape):
            near, far = ((value(which, at, h) - value(which, at, -h)) / (2 * h) for h in (STEP, 2 * STEP))
            bound = abs(far - near) + ROUNDING * size / STEP
            assert abs(leaves[which].grad[at] - near) <= bound, (which, at)


def normal(*shape, seed=0):
    """Seeded standard normal numbers of a shape, float64."""
    return np.random.default_rng(seed + sum(shape)).normal(size=shape)
