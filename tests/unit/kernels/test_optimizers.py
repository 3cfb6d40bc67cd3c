"""AdamW against the published algorithm, Muon's orthogonalisation against the SVD, the schedule by hand."""

from dataclasses import replace

import numpy as np
import pytest

from refllm.kernels.optimizers import Optimizer, Schedule, adamw_update, orthogonalise


def test_adamw_against_the_published_algorithm():
    optimizer = Optimizer(rate=0.1, betas=(0.8, 0.9), eps=1e-3, decay=0.5)
    value, first, second = np.array([[1.0, -2.0]]), np.zeros((1, 2)), np.zeros((1, 2))
    m = v = np.zeros((1, 2))
    want = value.copy()
    for step, gradient in enumerate(np.random.default_rng(0).normal(size=(5, 1, 2))):
        adamw_update(value, gradient, first, second, step, 0.1, optimizer)
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        m_hat, v_hat = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.9 ** (step + 1))
        want = want - 0.1 * 0.5 * want - 0.1 * m_hat / (np.sqrt(v_hat) + 1e-3)
    assert np.allclose(value, want, rtol=1e-13)


@pytest.mark.parametrize("shape", [(6, 6), (3, 9), (9, 3)])
def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values(shape):
    rng = np.random.default_rng(1)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    matrix = u * np.geomspace(1, 0.05, min(shape)) @ vt
    core = u.T @ orthogonalise(matrix) @ vt.T
    assert np.abs(core - np.diag(np.diag(core))).max() < 1e-12
    assert np.diag(core).min() > 0.6 and np.diag(core).max() < 1.3


def test_muon_takes_matrices_of_layers_only():
    optimizer = Optimizer(rate=1e-3, muon_rate=0.01)
    assert optimizer.uses_muon("model.layers.0.mlp.up_proj.weight", (4, 4))
    assert not optimizer.uses_muon("model.embed_tokens.weight", (4, 4))
    assert not optimizer.uses_muon("lm_head.weight", (4, 4))
    assert not optimizer.uses_muon("model.norm.weight", (4,))
    assert not replace(optimizer, muon_rate=None).uses_muon("model.layers.0.mlp.up_proj.weight", (4, 4))


def test_rates_by_name():
    optimizer = Optimizer(rate=0.1, rates=(("let.", 0.2), ("let.keys", 0.3)))
    assert [optimizer.rate_of(name) for name in ("a.hi", "let.values", "let.keys")] == [0.1, 0.2, 0.2]


def test_schedule_by_hand():
    cosine = Schedule(steps=10, warmup=2, final=0.1)
    assert [cosine.factor(s) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert cosine.factor(6) == pytest.approx(0.1 + 0.9 * 0.5)
    linear = Schedule(steps=10, warmup=2, decay_from=6, final=0.2, shape="linear")
    assert [linear.factor(s) for s in range(2, 7)] == [1.0] * 5
    assert linear.factor(9) == pytest.approx(0.2 + 0.8 * 0.25)


@pytest.mark.parametrize(
    "wrong", [dict(warmup=11), dict(warmup=5, decay_from=4), dict(decay_from=11), dict(shape="step")]
)
def test_schedule_refuses(wrong):
    with pytest.raises(ValueError, match="schedule"):
        Schedule(steps=10, **wrong)
