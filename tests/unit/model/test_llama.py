"""refllm.model.llama: the forward pass against a loop-and-float64 twin (tests/twins.py), its seams, what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from refllm.kernels.attention import attend
from refllm.kernels.nn import silu
from refllm.kernels.rope import Rope, cos_sin, rotate
from refllm.model.cache import DenseStore, new_cache
from refllm.model.llama import check_ids, forward
from refllm.model.model import Runtime
from tests.models import ARCHITECTURES, random_model
from tests.twins import slow_logits

IDS = np.random.default_rng(7).integers(0, 64, 23)  # more than any window, an odd number

# Every switch of ModelConfig at once, in a combination no real model has: rules must not lean on each other.
EVERYTHING = dict(
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    qk_norm=True,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    attention_softcap=3.0,
    logit_softcap=5.0,
    sliding_window=4,
    sliding_layers=(True, False, True),
    rope=Rope(500.0, "yarn", 4.0, original_context=64, beta_fast=8.0),
    rope_local=Rope(1e3, "llama3", 8.0, original_context=32),
)


def relative(a, b):
    """Largest difference, as a fraction of the largest logit."""
    return np.abs(a - b).max() / np.abs(b).max()


def in_pieces(model, ids, sizes):
    """Logits of ids fed through one cache in calls of these sizes."""
    cache, out, start = new_cache(model), [], 0
    for size in sizes:
        out.append(forward(model, ids[..., start : start + size], cache=cache))
        start += size
    assert start == ids.shape[-1] == cache.length
    return np.concatenate(out, axis=-2)


# The mathematics


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_slow_twin(architecture):
    model = random_model(architecture, np.float64)
    assert relative(forward(model, IDS), slow_logits(model, IDS)) < 1e-12


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_equals_the_slow_twin_with_everything_on(architecture):
    model = random_model(architecture, np.float64, **EVERYTHING)
    assert relative(forward(model, IDS), slow_logits(model, IDS)) < 1e-12


PLAIN = dict(
    activation="silu",
    attention_scale=None,
    attention_softcap=None,
    embedding_scale=1.0,
    logit_softcap=None,
    norm_offset=0.0,
    post_norms=False,
    qk_norm=False,
    rope=Rope(500.0),
    rope_local=None,
    sliding_layers=(False,) * 3,
    sliding_window=5,
)


@pytest.mark.parametrize("switch", PLAIN)
def test_every_switch_of_the_twin_test_matters(switch):
    """Set to its plain value it moves the logits: the comparison above would notice it ignored."""
    model = random_model("gemma3", np.float64, **EVERYTHING)
    changed = replace(model, config=replace(model.config, **{switch: PLAIN[switch]}))
    assert relative(forward(changed, IDS), forward(model, IDS)) > 1e-3


@pytest.mark.parametrize("projection", ["q", "k", "v", "o", "gate", "up", "down"])
def test_every_bias_of_the_twin_test_matters(projection):
    model = random_model("gemma3", np.float64, **EVERYTHING)
    kept = {name: w for name, w in model.weights.items() if not name.endswith(f"{projection}_proj.bias")}
    assert len(model.weights) - len(kept) == 3
    assert relative(forward(replace(model, weights=kept), IDS), forward(model, IDS)) > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_is_float32_and_near_float64(architecture):
    wide, narrow = random_model(architecture, np.float64), random_model(architecture, np.float32)
    exact, rounded = forward(wide, IDS), forward(narrow, IDS)
    assert (exact.dtype, rounded.dtype) == (np.float64, np.float32)
    assert 0 < relative(rounded, exact) < 2e-5


def test_tied_head_is_the_embedding_unscaled():
    tied = random_model("gemma3", np.float64)
    untied = replace(tied, config=replace(tied.config, tied_embeddings=False))
    untied.weights["lm_head.weight"] = tied.weights["model.embed_tokens.weight"]
    np.testing.assert_array_equal(forward(tied, IDS), forward(untied, IDS))


def test_swapping_gate_and_up_changes_the_output():
    model = random_model("llama", np.float64)
    gate, up = (f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up"))
    swapped = replace(model, weights=model.weights | {gate: model.weights[up], up: model.weights[gate]})
    assert relative(forward(swapped, IDS), forward(model, IDS)) > 1e-2


def test_later_tokens_do_not_touch_earlier_logits():
    model = random_model("qwen3", np.float64)
    changed = IDS.copy()
    changed[15:] = (changed[15:] + 1) % 64
    a, b = forward(model, IDS), forward(model, changed)
    np.testing.assert_allclose(a[:15], b[:15], rtol=0, atol=1e-12)
    assert np.all(np.abs(a[15:] - b[15:]).max(axis=1) > 1e-3)


def test_sliding_layers_alone_cannot_see_beyond_layers_times_window():
    model = random_model("mistral", np.float64)  # 2 layers of 7 keys: position 22 reaches back to 22 - 2 * 6 = 10
    for position, seen in ((9, False), (10, True)):
        changed = IDS.copy()
        changed[position] = (changed[position] + 1) % 64
        moved = np.abs(forward(model, changed)[-1] - forward(model, IDS)[-1]).max()
        assert (moved > 1e-6) == seen, position


# One call, chunks, tokens, batches


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_call_equals_chunks_equals_tokens(architecture, everything, dtype, bound):
    model = random_model(architecture, dtype, **(EVERYTHING if everything else {}))
    whole = forward(model, IDS)
    for sizes in ([23], [1] * 23, [9, 1, 6, 7], [22, 1]):
        pieces = in_pieces(model, IDS, sizes)
        assert pieces.dtype == dtype
        assert relative(pieces, whole) < bound, sizes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_equals_its_sequences(architecture):
    model = random_model(architecture, np.float64)
    ids = np.stack([IDS, IDS[::-1], np.zeros_like(IDS)])
    batch = forward(model, ids)
    assert batch.shape == (3, 23, 64)
    for row, logits in zip(ids, batch, strict=True):
        assert relative(logits, forward(model, row)) < 1e-12
    assert relative(in_pieces(model, ids, [10, 12, 1]), batch) < 1e-12


def test_batch_of_one_keeps_its_axis():
    model = random_model()
    np.testing.assert_array_equal(forward(model, IDS[None])[0], forward(model, IDS))


def test_last_only():
    model = random_model("qwen2", np.float64)
    assert relative(forward(model, IDS, last_only=True), forward(model, IDS)[-1:]) < 1e-12
    assert forward(model, np.stack([IDS, IDS]), last_only=True).shape == (2, 1, 64)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, list])
def test_ids_of_any_integer_type(dtype):
    model = random_model()
    ids = IDS.tolist() if dtype is list else IDS.astype(dtype)
    np.testing.assert_array_equal(forward(model, ids), forward(model, IDS))


def test_inputs_are_only_read():
    model = random_model("gemma3")
    before = {name: w.copy() for name, w in model.weights.items()}
    for w in model.weights.values():
        w.flags.writeable = False
    ids = IDS.copy()
    ids.flags.writeable = False
    forward(model, ids, cache=new_cache(model))
    for name, w in model.weights.items():
        np.testing.assert_array_equal(w, before[name])


# observe=


def observed(model, ids, **options):
    seen = {}

    def observe(names, x):
        for name in names:
            assert name not in seen
            seen[name] = x.copy()

    return forward(model, ids, observe=observe, **options), seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_observe_names_every_linear_once_and_changes_nothing(architecture):
    model = random_model(architecture)
    logits, seen = observed(model, IDS)
    np.testing.assert_array_equal(logits, forward(model, IDS))
    linears = {name for name, w in model.weights.items() if w.ndim == 2}
    assert set(seen) == (linears if model.config.tied_embeddings else linears - {"model.embed_tokens.weight"})
    for name, x in seen.items():
        assert x.shape == (1, 23, model.weights[name].shape[1])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_observe_sees_exactly_the_inputs(architecture):
    """Every product is recomputed from what was observed, and what follows from the products is found again."""
    model = random_model(architecture, np.float64, num_layers=1)
    passed = []

    def spy(q, k, v, *args, **options):
        passed.append((q, k, v))
        return attend(q, k, v, *args, **options)

    logits, seen = observed(model, IDS, attend=spy)
    w = model.weights

    def product(name):
        name = f"model.layers.0.{name}_proj"
        return seen[name + ".weight"] @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    cos, sin = cos_sin(model.config.rope, 8, np.arange(23), np.float64)
    for name, got in zip("qkv", passed[0], strict=True):
        expected = product(f"self_attn.{name}").reshape(1, 23, -1, 8).swapaxes(1, 2)
        expected = expected if name == "v" else rotate(expected, cos, sin)
        np.testing.assert_allclose(got, expected, atol=1e-13)
    p = np.arange(23)
    mixed = attend(*passed[0], p, p, scale=8**-0.5).swapaxes(1, 2).reshape(1, 23, 32)
    np.testing.assert_array_equal(seen["model.layers.0.self_attn.o_proj.weight"], mixed)
    down = seen["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_allclose(down, silu(product("mlp.gate")) * product("mlp.up"), atol=1e-13)
    x = w["model.embed_tokens.weight"][IDS] + product("self_attn.o")[0] + product("mlp.down")[0]
    head = "model.embed_tokens.weight" if model.config.tied_embeddings else "lm_head.weight"
    normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * w["model.norm.weight"]
    np.testing.assert_allclose(seen[head][0], normed, atol=1e-12)
    np.testing.assert_array_equal(seen[head][0] @ w[head].T, logits)


def test_observed_products_count_the_flops():
    """2 * parameters * tokens for the linears; the head only where logits are asked for."""
    model = random_model("qwen3", num_layers=3)
    flops = 0

    def observe(names, x):
        nonlocal flops
        flops += sum(2 * model.weights[name].size * x.shape[0] * x.shape[1] for name in names)

    forward(model, IDS, observe=observe, last_only=True)
    c = model.config
    wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    per_layer = c.hidden_size * (2 * wide + 2 * narrow + 3 * c.intermediate_size)
    assert flops == 2 * per_layer * c.num_layers * 23 + 2 * c.vocab_size * c.hidden_size


# attend=


def test_attend_gets_shapes_positions_and_options():
    model = random_model("gemma3", np.float64, attention_softcap=4.0)
    calls = []

    def spy(q, k, v, q_positions, k_positions, **options):
        calls.append((q.shape, k.shape, v.shape, q_positions.tolist(), k_positions.tolist(), options))
        return attend(q, k, v, q_positions, k_positions, **options)

    cache = new_cache(model)
    forward(model, IDS[:5], cache=cache)
    logits = forward(model, IDS[5:7], cache=cache, attend=spy)
    assert relative(logits, forward(model, IDS)[5:7]) < 1e-12
    shapes = (1, 4, 2, 8), (1, 2, 7, 8), (1, 2, 7, 8)
    common = dict(scale=12**-0.5, softcap=4.0)
    assert calls == [
        (*shapes, [5, 6], [0, 1, 2, 3, 4, 5, 6], common | dict(window=5)),
        (*shapes, [5, 6], [0, 1, 2, 3, 4, 5, 6], common | dict(window=None)),
    ]


def test_attend_argument_goes_before_the_models_own():
    silent = lambda q, k, v, *args, **options: np.zeros_like(q)
    model = random_model("llama")
    muted = replace(model, runtime=Runtime(attend=silent))
    np.testing.assert_array_equal(forward(muted, IDS), forward(model, IDS, attend=silent))
    np.testing.assert_array_equal(forward(muted, IDS, attend=attend), forward(model, IDS))
    assert relative(forward(muted, IDS), forward(model, IDS)) > 1e-2


def test_attention_scale_of_the_config():
    model = random_model("llama")
    assert model.config.score_scale == 8**-0.5
    assert replace(model.config, attention_scale=0.25).score_scale == 0.25


# The cache policy


class RollingStore(DenseStore):
    """Only what some query of this call can still see: W - 1 old keys and the new ones."""

    def __init__(self, window):
        super().__init__()
        self.window = window

    def extend(self, k, v, positions, queries=None):
        K, V, key_positions = super().extend(k, v, positions, queries)
        first = np.searchsorted(key_positions, positions[0] - self.window + 1)
        kept = K[..., first:, :].copy(), V[..., first:, :].copy(), key_positions[first:].copy()
        super().__init__()
        super().extend(*kept)
        return kept


class UnrotatedStore(DenseStore):
    """Keys before the rotation, and in reverse: positions alone must put them right, head by head."""

    pre_rope = True

    def extend(self, k, v, positions, queries=None):
        K, V, key_positions = super().extend(k, v, positions, queries)
        key_positions = np.stack([key_positions, key_positions[::-1]])  # 2 kv heads, the second back to front
        turn = lambda x: np.stack([x[:, 0], x[:, 1, ::-1]], axis=1)
        return turn(K), turn(V), key_positions


@pytest.mark.parametrize("sizes", [[1] * 23, [9, 1, 6, 7], [23]])
def test_rolling_buffer_equals_the_full_cache(sizes):
    model = random_model("mistral", np.float64)
    rolling = replace(model, runtime=Runtime(cache_policy=lambda layer: RollingStore(model.config.window(layer))))
    assert relative(in_pieces(rolling, IDS, sizes), forward(model, IDS)) < 1e-12


def test_rolling_buffer_keeps_no_more_than_the_window():
    model = random_model("mistral", np.float64)
    cache = new_cache(model, policy=lambda layer: RollingStore(7))
    for token in IDS:
        forward(model, [token], cache=cache)
    assert cache.nbytes == 2 * 2 * 2 * 7 * 8 * 8  # K and V, 2 layers, Hk 2, W 7, D 8, 8 bytes


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_store_of_unrotated_keys_with_positions_per_head(architecture):
    model = random_model(architecture, np.float64)
    unrotated = replace(model, runtime=Runtime(cache_policy=lambda layer: UnrotatedStore()))
    assert relative(in_pieces(unrotated, IDS, [9, 1, 13]), forward(model, IDS)) < 1e-12


# Bad input


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no token ids"),
        (np.zeros((0, 4), int), "no token ids"),
        ([0, 64], r"token id 64 is outside the vocabulary 0\.\.63"),
        ([0, -1], "token id -1 is outside"),
        ([2**63], "outside|must be integers"),
        ([1.0], "must be integers of shape .* got float64"),
        ([True], "must be integers .* got bool"),
        (["a"], "must be integers"),
        (5, r"shape \(\)"),
        (np.zeros((1, 2, 3), int), r"shape \(1, 2, 3\)"),
        ([[1, 2], [3]], "ragged: a batch must hold sequences of one length"),
        (None, "must be integers"),
    ],
)
def test_bad_ids_are_one_clear_line(ids, message):
    with pytest.raises(ValueError, match=message) as error:
        forward(random_model(), ids)
    assert "\n" not in str(error.value)


def test_check_ids_widens():
    assert check_ids(np.array([3], np.uint8), 4).dtype == np.int64


def test_context_is_usable_to_the_last_position_and_no_further():
    model = random_model(context_length=23)
    cache = new_cache(model)
    forward(model, IDS[:22], cache=cache)
    before = cache.nbytes
    with pytest.raises(ValueError, match="context of 23 tokens is full: 22 seen, 2 more given"):
        forward(model, [1, 2], cache=cache)
    assert (cache.length, cache.nbytes) == (22, before)
    assert relative(forward(model, IDS[22:], cache=cache), forward(model, IDS)[22:]) < 1e-5
    with pytest.raises(ValueError, match="context of 23 tokens is full: 0 seen, 24 more given"):
        forward(model, [0] * 24)


def test_a_cache_serves_one_batch_size():
    model = random_model()
    cache = new_cache(model)
    forward(model, [IDS, IDS], cache=cache)
    with pytest.raises(ValueError, match="holds a batch of 2, got 1"):
        forward(model, [1], cache=cache)


def test_a_call_that_failed_half_way_can_be_repeated():
    model = random_model("llama", np.float64)
    cache = new_cache(model)
    forward(model, IDS[:9], cache=cache)
    calls = []

    def fails_in_layer_1(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attend(*args, **options)

    with pytest.raises(KeyboardInterrupt):
        forward(model, IDS[9:15], cache=cache, attend=fails_in_layer_1)
    assert cache.length == 9
    assert relative(forward(model, IDS[9:], cache=cache), forward(model, IDS)[9:]) < 1e-12
