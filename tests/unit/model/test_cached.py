"""What a cache is handed, and what the loss minds of it."""

import numpy as np
import pytest

from refllm.kernels.nn import log_softmax
from refllm.kernels.rope import cos_sin, rotate
from refllm.model.cache import DenseStore, KVCache
from refllm.model.cached import cache_sensitivity, cached_values
from refllm.model.llama import forward
from tests.models import ARCHITECTURES, LATENT, random_model

IDS = np.random.default_rng(0).integers(0, 64, 21)


@pytest.mark.parametrize("architecture", (*ARCHITECTURES, *LATENT))
def test_windows_start_at_position_zero_and_the_tail_is_dropped(architecture):
    model = random_model(architecture)
    found = cached_values(model, IDS, pre_rope=False, window=10)
    assert len(found) == model.config.num_layers
    for n in range(2):
        cache = KVCache(model.config.num_layers, 128)
        forward(model, IDS[10 * n : 10 * n + 10], cache=cache)
        for (K, V), store in zip(found, cache.stores, strict=True):
            assert K.shape[0] == V.shape[0] == 2
            np.testing.assert_array_equal(K[n], store.keys[0, :, :10])
            np.testing.assert_array_equal(V[n], store.values[0, :, :10])


def test_unrotated_keys_are_the_rotated_ones_before_rope():
    model = random_model(dtype=np.float64)
    rotated, plain = (cached_values(model, IDS, pre_rope=pre_rope) for pre_rope in (False, True))
    cos, sin = cos_sin(model.config.rope, 8, np.arange(len(IDS)), np.float64)
    for (K, V), (k, v) in zip(rotated, plain, strict=True):
        np.testing.assert_array_equal(K, rotate(k, cos, sin))
        np.testing.assert_array_equal(V, v)


class Nudged(DenseStore):
    """Adds something to one number of a key or a value."""

    def __init__(self, at, step, pre_rope):
        super().__init__()
        self.at, self.step, self.pre_rope = at, step, pre_rope

    def extend(self, k, v, positions, queries=None):
        side, *place = self.at
        k, v = k.copy(), v.copy()
        (k, v)[side][(0, *place)] += self.step
        return super().extend(k, v, positions, queries)


@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("side", [0, 1])
def test_sensitivities_are_squared_slopes_of_the_loss(pre_rope, side):
    """Against central differences of the readable forward pass in float64; the slopes are float32."""
    model = random_model()
    exact = random_model(dtype=np.float64)
    window = IDS[:12]
    found = cache_sensitivity(model, window, pre_rope=pre_rope)

    def loss(layer, at, step):
        cache = KVCache(2, 128, lambda i: Nudged(at, step if i == layer else 0.0, pre_rope))
        logits = log_softmax(forward(exact, window, cache=cache))
        return -logits[np.arange(11), window[1:]].mean()

    rng = np.random.default_rng(side)
    for layer in range(2):
        assert found[layer][side].shape == (1, 2, 12, 8)
        for _ in range(6):
            place = tuple(int(rng.integers(n)) for n in (2, 12, 8))
            slope = (loss(layer, (side, *place), 1e-4) - loss(layer, (side, *place), -1e-4)) / 2e-4
            np.testing.assert_allclose(np.sqrt(found[layer][side][0][place]), abs(slope), rtol=2e-3, atol=1e-6)
        assert not found[layer][0][0, :, -1].any()  # nothing that is scored reads the last key


def test_refusals():
    with pytest.raises(ValueError, match="one stream of token ids"):
        cached_values(random_model(), IDS[None], pre_rope=True)
    with pytest.raises(ValueError, match="windows of 2 tokens"):
        cache_sensitivity(random_model(), IDS[:1], pre_rope=True)
    with pytest.raises(ValueError, match="training knows plain Llama only"):
        cache_sensitivity(random_model("gemma3"), IDS, pre_rope=True)
