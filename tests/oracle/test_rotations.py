"""Hadamard matrices against SciPy's, the Whip loss and its gradient through QR against torch's own differentiation."""

from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest

from refllm.kernels.hadamard import hadamard
from refllm.methods.transform.dartquant import qr, qr_gradient, whip

pytestmark = pytest.mark.oracle


@pytest.mark.skipif(find_spec("scipy") is None, reason="scipy is missing")
def test_sylvester_matrices(agreement):
    from scipy.linalg import hadamard as theirs

    sizes = [1 << k for k in range(9)]
    different = sum(int(np.sum(theirs(n) != hadamard(n))) for n in sizes)
    agreement("scipy", version("scipy"), "Sylvester", sum(n * n for n in sizes), different)
    assert different == 0


@pytest.mark.skipif(find_spec("torch") is None, reason="pip install '.[oracles]' brings torch")
@pytest.mark.parametrize("d", [2, 16, 64])
def test_a_step_of_dartquant(d, agreement):
    """torch leaves the signs of R open; the loss, and so its gradient, does not see them."""
    import torch

    rng = np.random.default_rng(d)
    X, Z = rng.normal(size=(200, d)) * np.exp(rng.normal(size=d)), rng.normal(size=(d, d))
    theirs = torch.tensor(Z, requires_grad=True)
    loss = torch.exp(-(torch.tensor(X) @ torch.linalg.qr(theirs)[0]).abs()).sum(dim=-1).mean()
    loss.backward()
    Q, R = qr(Z)
    mine, of_q = whip(X, Q)
    gap = np.abs(qr_gradient(Q, R, of_q) - theirs.grad.numpy()) / np.abs(theirs.grad.numpy()).max()
    agreement("torch", torch.__version__, f"Whip through QR, d = {d}", d * d, np.sum(gap > 1e-11), f"{gap.max():.0e}")
    assert mine == pytest.approx(loss.item(), rel=1e-13) and gap.max() < 1e-11
