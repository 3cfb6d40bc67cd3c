"""KL and agreement: invariants and a loop twin; sizes: counted by hand; speed: a clock that is set by the test."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.evaluate import measure
from refllm.evaluate.measure import PhaseTimer, divergence, kv_bytes_per_token, log_probabilities, measure_speed, sizes
from refllm.methods.apply import compress
from tests.models import random_model

rows = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(0, 5, (4, 9)))


@given(rows)
def test_a_model_agrees_with_itself(logits):
    kl, agree = divergence(logits, logits)
    assert kl.max() <= 1e-14 and agree.all()


@given(rows, rows, st.floats(-1e3, 1e3))
def test_divergence_is_the_sum_of_the_definition_and_blind_to_constants(base, logits, constant):
    kl, agree = divergence(base, logits)
    for t in range(len(base)):
        p, q = (np.exp(x[t] - x[t].max()) / np.exp(x[t] - x[t].max()).sum() for x in (base, logits))
        expected = sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))
        assert kl[t] >= 0 and abs(kl[t] - expected) < 1e-9
        assert agree[t] == (np.argmax(p) == np.argmax(q))
    moved, same = divergence(base + constant, logits - constant)
    assert np.abs(moved - kl).max() < 1e-9 and (same == agree).all()


def test_divergence_takes_the_base_first():
    # By hand: 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75); the other way round it is 0.1308.
    kl, _ = divergence(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]))
    assert kl[0] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_a_token_the_base_never_says_costs_nothing():
    kl, _ = divergence(np.array([[0.0, -np.inf]]), np.log([[0.25, 0.75]]))
    assert kl[0] == pytest.approx(np.log(4))


def test_ties_go_to_the_lowest_id_and_a_given_top_wins():
    base, logits = np.zeros((1, 3)), np.array([[0.0, 1.0, 0.0]])
    assert not divergence(base, logits)[1][0]
    assert divergence(base, logits, np.array([1]))[1][0]


def test_log_probabilities_survive_large_logits():
    out = log_probabilities(np.array([[3e38, 0.0]], np.float32))
    assert out.dtype == np.float64 and out[0, 0] == 0.0


def test_sizes_count_every_stored_byte():
    model = random_model("qwen2")
    parameters = sum(weight.size for weight in model.weights.values())
    plain = sizes(model)
    assert (plain.parameters, plain.weight_bytes, plain.bits_per_weight) == (parameters, 4 * parameters, 32.0)
    assert plain.linear_bits_per_weight == 32.0
    small = sizes(compress(model, "rtn:bits=4,group=16,symmetric=true"))
    linears = sum(w.size for n, w in model.weights.items() if "_proj.weight" in n)
    assert small.linear_bits_per_weight == 4 + 16 / 16  # codes and one float16 scale for 16 weights
    assert small.weight_bytes == 4 * (parameters - linears) + linears * 5 // 8
    assert small.bits_per_weight == 8 * small.weight_bytes / parameters


def test_kv_bytes_of_the_dense_cache_follow_the_formula():
    model = random_model("llama")
    config = model.config
    expected = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert kv_bytes_per_token(model, np.arange(3, 40)) == expected
    small = compress(model, "kivi:bits=2,group=8,residual=8")
    assert kv_bytes_per_token(small, np.arange(3, 43)) < expected / 2


def test_phases_are_timed_apart(monkeypatch):
    clock = iter([10.0, 12.0, 12.5, 13.0, 13.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer(prompt_tokens=8)
    timer.on_prefill()
    for _ in range(3):
        timer.on_token()
    speed = timer.speed()
    assert (speed.prefill_tokens_per_s, speed.decode_tokens_per_s) == (8 / 2.0, 2 / 1.0)


def test_phases_that_did_not_take_place_are_nan():
    speed = PhaseTimer(prompt_tokens=0).speed()
    assert np.isnan(speed.prefill_tokens_per_s) and np.isnan(speed.decode_tokens_per_s)


def test_speed_runs_the_generation_of_the_recipe_and_does_not_stop_at_eos():
    calls = []

    def generate(model, ids, max_tokens, sampling, *, stop_ids, on_prefill):
        calls.append((len(ids), max_tokens, stop_ids))
        on_prefill()
        yield from range(max_tokens)

    model = random_model("llama")
    model = replace(model, runtime=replace(model.runtime, generate=generate))
    speed = measure_speed(model, np.arange(3, 10), new_tokens=5, repeats=2)
    assert calls == [(7, 5, ())] * 3  # a warm-up and two that count
    assert speed.prefill_tokens_per_s > 0 and speed.decode_tokens_per_s > 0


def test_a_slow_run_ends_early_and_is_the_only_one():
    tokens = []

    def generate(model, ids, max_tokens, sampling, *, stop_ids, on_prefill):
        on_prefill()
        for token in range(max_tokens):
            tokens.append(token)
            yield token

    model = random_model("llama")
    model = replace(model, runtime=replace(model.runtime, generate=generate))
    speed = measure_speed(model, np.arange(3, 10), new_tokens=5, repeats=2, patience=0.0)
    assert tokens == [0, 1] and speed.decode_tokens_per_s > 0
