"""The compiled forward pass on a real model: SmolLM2 as `refllm fetch smollm2` brings it, 2,048 positions.

With int8 activations also another file of it, where `refllm bench files` has made one.
"""

from dataclasses import replace

import numpy as np
import pytest

import refllm
from refllm.formats.errors import FormatError
from refllm.formats.files import cache_dir, data_path

pytestmark = pytest.mark.oracle
WINDOW = 512
Q4_0 = cache_dir() / "bench" / "SmolLM2-135M-Instruct.Q4_0.gguf"


def loaded(source):
    try:
        return refllm.load(source)
    except (FormatError, OSError, ValueError) as error:
        pytest.skip(f"no SmolLM2 here: {error}")


@pytest.fixture(scope="module")
def model():
    return loaded("smollm2")


@pytest.fixture(scope="module")
def windows(model):
    return windows_of(model)


def windows_of(model):
    ids = model.tokenizer.encode(data_path("tiny/eval.txt").read_text(encoding="utf-8"))[: 4 * WINDOW]
    return np.array(ids).reshape(4, WINDOW)


def in_one_call(model, windows):
    return np.concatenate([refllm.forward(model, window) for window in windows])


def token_by_token(model, windows):
    logits = []
    for window in windows:
        cache = refllm.new_cache(model)
        logits += [refllm.forward(model, [i], cache=cache) for i in window]
    return np.concatenate(logits)


def readable_pass(model, windows):
    with pytest.MonkeyPatch.context() as context:
        context.setenv("REFLLM_KERNELS", "numpy")
        return in_one_call(model, windows)


@pytest.fixture(scope="module")
def readable(model, windows):
    return readable_pass(model, windows)


def nll(logits, windows):
    x = logits.astype(np.float64).reshape(*windows.shape, -1)[:, :-1]
    x -= x.max(axis=-1, keepdims=True)
    wanted = np.take_along_axis(x, windows[:, 1:, None], axis=-1)[..., 0]
    return float((np.log(np.exp(x).sum(axis=-1)) - wanted).mean())


@pytest.mark.parametrize("run", [in_one_call, token_by_token])
def test_the_same_next_tokens_as_the_readable_pass(model, windows, readable, run):
    logits = run(model, windows)
    error = np.abs(logits - readable).max() / np.abs(readable).max()
    same = logits.argmax(axis=-1) == readable.argmax(axis=-1)
    assert error < 1e-4  # 30 layers of float32 sums in another order
    assert same.mean() >= 0.98
    gap = readable.max(axis=-1) - np.take_along_axis(readable, logits.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    assert (gap[~same] <= 2e-4 * np.abs(readable).max()).all()  # where they differ, two tokens were equally likely


@pytest.fixture(scope="module", params=["smollm2", Q4_0], ids=["Q4_1", "Q4_0"])
def rounded(request):
    """A model with int8 activations, windows of text, and what the readable pass makes of them."""
    if request.param == Q4_0 and not Q4_0.exists():
        pytest.skip(f"no {Q4_0}")
    model = loaded(request.param)
    model = replace(model, runtime=replace(model.runtime, activations="int8"))
    windows = windows_of(model)
    return model, windows, readable_pass(model, windows)


@pytest.mark.parametrize("run", [in_one_call, token_by_token])
def test_the_same_next_tokens_with_int8_activations(rounded, run):
    """Both passes round activations to the same codes: every position is the same in all bits.

    Unless a float64 sum in another order was rounded to another float32 somewhere: from there on differences grow to
    the size of the rounding to 8 bits, and about three in a hundred of the positions behind have another next token.
    """
    model, windows, expected = rounded
    logits = run(model, windows)
    assert (logits.argmax(axis=-1) == expected.argmax(axis=-1)).mean() >= 0.98
    assert (logits == expected).all(axis=-1).mean() >= 0.9


@pytest.mark.parametrize("run", [in_one_call, token_by_token])
def test_int8_activations_cost_less_than_7_in_1000_of_perplexity(model, windows, readable, run):
    rounded = replace(model, runtime=replace(model.runtime, activations="int8"))
    assert nll(run(rounded, windows), windows) - nll(readable, windows) < np.log(1.007)
