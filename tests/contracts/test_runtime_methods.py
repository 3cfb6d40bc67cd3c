"""Every way to run a model says what plain generation says."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.methods import runtime
from refllm.model.llama import forward
from refllm.model.model import Runtime
from refllm.model.sample import Sampling, generate_ids, probabilities
from tests.models import ARCHITECTURES, random_model

ALL = pytest.mark.parametrize("name", runtime.__all__)


@ALL
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_identical(name, architecture):
    """In float64: a near tie may turn on the last bit, because products of other shapes sum in another order."""
    model = random_model(architecture, np.float64)
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, 64, 12)
        expected = list(generate_ids(model, ids, 30, stop_ids=()))
        assert list(getattr(runtime, name)(model, ids, 30, stop_ids=())) == expected
        bound = random_model(architecture, np.float64, runtime=Runtime(generate=getattr(runtime, name)))
        assert list(generate_ids(bound, ids, 30, stop_ids=())) == expected


@ALL
@settings(max_examples=30, deadline=None)
@given(
    prompt=st.integers(1, 16),
    max_tokens=st.integers(0, 20),
    stops=st.sets(st.integers(0, 63), max_size=20),
    defaults=st.booleans(),
)
def test_stops_and_full_context_end_the_text_alike(name, prompt, max_tokens, stops, defaults):
    model = random_model(dtype=np.float64, context_length=16, eos_token_ids=tuple(range(0, 64, 9)))
    ids = np.arange(prompt) % 3
    stop_ids = None if defaults else tuple(stops)
    expected = list(generate_ids(model, ids, max_tokens, stop_ids=stop_ids))
    assert list(getattr(runtime, name)(model, ids, max_tokens, stop_ids=stop_ids)) == expected


@ALL
@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=3), Sampling(0.8, top_k=5, seed=4), Sampling(2.0, top_p=0.5)])
def test_sampled_tokens_pass_the_filters_and_follow_the_seed(name, sampling):
    """The distribution itself is tested method by method; here: nothing that a filter removed ever comes."""
    model = random_model(dtype=np.float64)
    run = partial(getattr(runtime, name), model, [5, 9, 5], 25, stop_ids=())
    tokens = list(run(sampling))
    assert tokens == list(run(sampling))
    logits = forward(model, [5, 9, 5, *tokens])[2:-1]
    allowed = probabilities(logits, sampling)[np.arange(25), tokens] > 0
    assert allowed.all()


@ALL
def test_prefill_is_reported_once_and_bad_prompts_are_refused(name):
    calls = []
    run = partial(getattr(runtime, name), random_model())
    tokens = run([1, 2], 4, stop_ids=(), on_prefill=lambda: calls.append("prefill"))
    next(tokens)
    assert calls == ["prefill"] and len(list(tokens)) == 3 and calls == ["prefill"]
    for ids, message in (
        ([], "no token ids"),
        ([64], "token id 64 is outside the vocabulary"),
        ([0.5], "must be integers"),
        ([[1, 2]], "one sequence of ids"),
        ([1] * 129, "context of 128 tokens is full"),
    ):
        with pytest.raises(ValueError, match=message):
            next(run(ids, 4))
