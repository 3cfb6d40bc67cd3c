"""walk: every layer's inputs against a loop that rebuilds the half-compressed model from scratch and runs it whole.

Linears inside a layer are expected to see that layer's original activations, as in SparseGPT and Wanda.
"""

from dataclasses import replace

import numpy as np
import pytest

from refllm.model.llama import forward
from refllm.model.walk import layer_linears, walk, windows
from tests.models import ARCHITECTURES, random_model

IDS = np.random.default_rng(0).integers(0, 64, 50)


def halved(weights, layers):
    """The weights with the seven linears of these layers replaced by something clearly different."""
    changed = {name: weights[name] * np.float32(0.5) for layer in layers for name in layer_linears(layer)}
    return weights | changed


def whole_pass_inputs(model, rows):
    """Inputs of every linear from full forward passes: {name: (tokens, in)}."""
    seen = {}

    def observe(names, x):
        for name in names:
            seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).copy())

    for row in rows:
        forward(model, row, observe=observe)
    return {name: np.concatenate(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_later_layers_see_what_compressed_layers_give(architecture):
    original = random_model(architecture, num_layers=3)
    model = replace(original, weights=dict(original.weights))
    rows = IDS[:48].reshape(3, 16)  # two tokens of the tail are dropped
    visited = []
    for layer, stats in walk(model, IDS, window=16):
        visited.append(layer)
        assert set(stats) == set(layer_linears(layer))
        half_done = replace(original, weights=halved(original.weights, range(layer)))
        expected = whole_pass_inputs(half_done, rows)
        for name in layer_linears(layer):
            np.testing.assert_array_equal(stats[name].X, expected[name])
        if layer:  # the comparison can fail: the uncompressed model has other inputs here
            untouched = whole_pass_inputs(original, rows)
            for name in layer_linears(layer):
                assert np.abs(stats[name].X - untouched[name]).max() > 1e-3
        model.weights.update(halved(model.weights, [layer]))
    assert visited == [0, 1, 2]


def test_linears_that_share_an_input_share_one_stats():
    _, stats = next(walk(random_model(), IDS))
    q, k, v, o, gate, up, down = (stats[name] for name in layer_linears(0))
    assert q is k is v and gate is up
    assert len({id(s) for s in (q, o, gate, down)}) == 4
    assert q.n == len(IDS)


def test_windows_are_separate_contexts():
    """Two equal windows give equal inputs: nothing is attended to across the border."""
    _, stats = next(walk(random_model(), np.tile(IDS[:8], 2), window=8))
    for s in stats.values():
        np.testing.assert_array_equal(s.X[:8], s.X[8:])


def test_windows_never_exceed_the_context():
    model = random_model(context_length=16)
    _, stats = next(walk(model, IDS))
    assert stats[layer_linears(0)[0]].n == 48


@pytest.mark.parametrize(("n", "length", "shape"), [(7, 3, (2, 3)), (6, 3, (2, 3)), (2, 3, (1, 2)), (1, 1, (1, 1))])
def test_windows_cut_in_order(n, length, shape):
    cut = windows(np.arange(n), length)
    assert cut.shape == shape
    assert cut.ravel().tolist() == list(range(cut.size))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 8), int), r"one stream of token ids \(T,\), got shape \(2, 8\)"),
        ([], "no token ids"),
        ([1, 64], "token id 64 is outside the vocabulary"),
        ([0.5], "integers"),
    ],
)
def test_bad_calibration_is_one_clear_line(ids, message):
    with pytest.raises(ValueError, match=message):
        next(walk(random_model(), ids))
