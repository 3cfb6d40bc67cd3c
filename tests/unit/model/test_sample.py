"""refllm.model.sample: every filter at its boundary, ties, draws, and the generating loop."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.model import Runtime
from refllm.model.sample import Sampling, draw, generate_ids, probabilities
from tests.models import random_model

# Probabilities of powers of two: their logarithms differ by ln 2 and every sum is exact.
EIGHTHS = np.array([0.125, 0.5, 0.25, 0.125])


def p_of(p, **options):
    return probabilities(np.log(np.asarray(p)), Sampling(**{"temperature": 1.0} | options))


# Filters


def test_no_filter_is_the_softmax():
    np.testing.assert_allclose(p_of(EIGHTHS), EIGHTHS, rtol=1e-15)


def test_temperature_is_a_power_of_the_distribution():
    squared = np.array([1, 16, 4, 1]) / 22
    np.testing.assert_allclose(p_of(EIGHTHS, temperature=0.5), squared, rtol=1e-14)
    np.testing.assert_allclose(p_of(EIGHTHS, temperature=1e12), 0.25, rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_temperature_zero_is_the_first_of_the_largest(dtype):
    logits = np.array([[1, 3, 3, 2], [-5, -5, -5, -5], [-np.inf, 0, 1e4, 1e4]], dtype)
    np.testing.assert_array_equal(probabilities(logits, Sampling()).argmax(axis=1), [1, 0, 2])
    np.testing.assert_array_equal(probabilities(logits, Sampling()).sum(axis=1), 1)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
def test_the_smallest_temperatures_are_greedy_without_overflow(temperature):
    p = probabilities(np.array([1e4, 9e3, 1e4, -1e4], np.float32), Sampling(temperature=temperature))
    np.testing.assert_array_equal(p, [0.5, 0, 0.5, 0])


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(0, EIGHTHS), (1, [0, 1, 0, 0]), (2, [0, 2 / 3, 1 / 3, 0]), (4, EIGHTHS), (99, EIGHTHS)],
)
def test_top_k(top_k, expected):
    np.testing.assert_allclose(p_of(EIGHTHS, top_k=top_k), expected, rtol=1e-14)


def test_top_k_ties_go_to_the_lowest_ids():
    np.testing.assert_array_equal(p_of([0.25] * 4, top_k=2), [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(p_of(EIGHTHS, top_k=3) > 0, [True, True, True, False])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.874, 3), (0.876, 4), (1.0, 4)],
)
def test_top_p_keeps_the_token_that_crosses(top_p, kept):
    assert np.count_nonzero(p_of(EIGHTHS, top_p=top_p)) == kept


def test_top_p_exactly_reached_stops_there():
    # logits of 0 give exactly 1/4 each; 0.5 is reached by two tokens and the third is not needed
    p = probabilities(np.zeros(4), Sampling(temperature=1.0, top_p=0.5))
    np.testing.assert_array_equal(p, [0.5, 0.5, 0, 0])


def test_top_p_keeps_a_head_of_the_sorted_list():
    """A long tail of tiny probabilities: rounding must not drop a token and keep a less likely one."""
    logits = np.random.default_rng(0).normal(size=20_000) * 4
    for top_p in (0.5, 0.999999, 1 - 1e-12):
        p = probabilities(logits, Sampling(temperature=1.0, top_p=top_p))
        kept = logits[p > 0]
        assert kept.min() > logits[p == 0].max()


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.24, 4), (0.26, 2), (0.49, 2), (0.51, 1), (1.0, 1)])
def test_min_p_is_relative_to_the_likeliest(min_p, kept):
    assert np.count_nonzero(p_of(EIGHTHS, min_p=min_p)) == kept


def test_filters_apply_one_after_the_other():
    # top-k leaves 1/2 1/4 as 2/3 1/3: a top-p of 0.6 is reached by the first alone (it is not by 1/2)
    np.testing.assert_array_equal(p_of(EIGHTHS, top_k=2, top_p=0.6), [0, 1, 0, 0])
    assert np.count_nonzero(p_of(EIGHTHS, top_p=0.6)) == 2
    # temperature first: halved differences bring every token within the reach of min_p 0.45
    assert np.count_nonzero(p_of(EIGHTHS, temperature=2.0, min_p=0.45)) == 4


def test_impossible_tokens_stay_impossible():
    p = probabilities(np.array([0.0, -np.inf, 0.0]), Sampling(temperature=3.0))
    np.testing.assert_array_equal(p, [0.5, 0, 0.5])


logits_strategy = st.integers(1, 12).flatmap(lambda n: arrays(np.float64, n, elements=st.floats(-30, 30)))


def test_top_k_of_one_is_greedy_where_probabilities_round_to_the_same_number():
    logits = np.array([0.0, 1e-120, 0.0])
    np.testing.assert_array_equal(probabilities(logits, Sampling(temperature=2.0, top_k=1)), [0, 1, 0])


@given(
    logits_strategy,
    st.builds(
        Sampling,
        temperature=st.floats(0.1, 10),
        top_k=st.integers(0, 14),
        top_p=st.floats(0.01, 1),
        min_p=st.floats(0, 1),
    ),
)
def test_properties_of_every_combination(logits, sampling):
    p = probabilities(logits, sampling)
    assert p.sum() == pytest.approx(1, rel=1e-12)
    assert p[np.argmax(logits)] > 0
    if sampling.top_k:
        assert np.count_nonzero(p) <= sampling.top_k
    # nothing kept is less likely than something dropped
    if np.any(p == 0):
        assert logits[p > 0].min() >= logits[p == 0].max() - 1e-9
    # a batch is its rows
    both = probabilities(np.stack([logits, logits[::-1]]), sampling)
    np.testing.assert_array_equal(both[0], p)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(temperature=-0.1), "temperature must be 0 or more"),
        (dict(temperature=float("nan")), "temperature must be 0 or more"),
        (dict(top_k=-1), "top_k must be 0 or more"),
        (dict(top_k=2.5), "top_k must be an integer"),
        (dict(top_p=1.01), "top_p must be between"),
        (dict(top_p=0.0), "top_p must be above 0"),
        (dict(min_p=1.5), "min_p must be between"),
        (dict(seed=-1), "seed must be an integer"),
        (dict(seed=0.5), "seed must be an integer"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


# Draws


class FixedUniform:
    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.49, 1), (0.5, 3), (0.74, 3), (0.75, 4), (1 - 2.0**-53, 4)])
def test_draw_never_takes_a_token_of_probability_zero(u, token):
    assert draw(np.array([0, 0.5, 0, 0.25, 0.25, 0]), FixedUniform(u)) == token


def test_draw_stays_inside_when_the_sum_falls_short_of_one():
    assert draw(np.full(10, 0.1) * (1 - 1e-9), FixedUniform(1 - 2.0**-53)) == 9


def test_draws_follow_the_distribution():
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(EIGHTHS, rng) for _ in range(4000)], minlength=4)
    # standard deviation of a count is below sqrt(4000 / 4) = 32: five of them
    np.testing.assert_allclose(counts, 4000 * EIGHTHS, atol=160)


# Generation


def greedy_without_cache(model, ids, n):
    ids = list(ids)
    for _ in range(n):
        ids.append(int(np.argmax(forward(model, ids)[-1])))
    return ids[-n:]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_generation_equals_recomputing_everything(architecture):
    model = random_model(architecture, np.float64)
    expected = greedy_without_cache(model, [1, 5, 9], 20)
    assert list(generate_ids(model, [1, 5, 9], 20, stop_ids=())) == expected


def test_same_seed_same_text_other_seed_other_text():
    model = random_model("llama")
    text = lambda seed: list(generate_ids(model, [1, 5], 30, Sampling(temperature=5.0, seed=seed), stop_ids=()))
    assert text(4) == text(4)
    assert text(4) != text(5)


def test_stop_ids_end_the_text_and_are_not_part_of_it():
    model = random_model("llama", np.float64)
    text = list(generate_ids(model, [1, 5, 9], 20, stop_ids=()))
    stop = text[7]
    assert list(generate_ids(model, [1, 5, 9], 20, stop_ids=(stop,))) == text[: text.index(stop)]
    stopping = replace(model, config=replace(model.config, eos_token_ids=(stop,)))
    assert list(generate_ids(stopping, [1, 5, 9], 20)) == text[: text.index(stop)]
    assert list(generate_ids(stopping, [1, 5, 9], 20, stop_ids=())) == text


def test_generation_ends_where_the_context_is_full():
    model = random_model("llama", context_length=10)
    assert len(list(generate_ids(model, [1, 2, 3], 50, stop_ids=()))) == 8  # 7 more positions, and what the last says
    assert len(list(generate_ids(model, [1] * 10, 50, stop_ids=()))) == 1
    with pytest.raises(ValueError, match="context of 10 tokens is full"):
        list(generate_ids(model, [1] * 11, 50))


def test_no_tokens_asked_for_gives_none():
    calls = []
    assert list(generate_ids(random_model(), [1], 0, on_prefill=lambda: calls.append(1))) == []
    assert calls == [1]


def test_prefill_is_reported_once_before_the_first_token():
    log = []
    for token in generate_ids(random_model(), [1, 2], 3, stop_ids=(), on_prefill=lambda: log.append("prefill")):
        log.append(token)
    assert log[0] == "prefill" and log.count("prefill") == 1 and len(log) == 4


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "no token ids"), ([[1, 2]], r"one sequence of ids \(T,\), got shape \(1, 2\)"), ([64], "64")],
)
def test_bad_prompts_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        next(generate_ids(random_model(), ids, 3))


def test_runtime_generate_takes_over_with_the_same_call():
    calls = []

    def other(model, ids, max_tokens, sampling, *, stop_ids, on_prefill):
        calls.append((ids.tolist(), max_tokens, sampling, stop_ids))
        yield from (7, 8)

    model = random_model(runtime=Runtime(generate=other))
    assert list(generate_ids(model, [1, 5], 9)) == [7, 8]
    assert calls == [([1, 5], 9, Sampling(), (2,))]


def test_the_models_cache_policy_is_used():
    layers = []

    def policy(layer):
        layers.append(layer)
        return new_cache(random_model()).stores[0]

    list(generate_ids(random_model(runtime=Runtime(cache_policy=policy)), [1], 1))
    assert layers == [0, 1]
