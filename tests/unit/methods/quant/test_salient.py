"""salient: which columns stay, that they stay exactly, and what they cost."""

import numpy as np
import pytest

from refllm.kernels.packed.records import BlockSparse, IntWeight, Sum
from refllm.kernels.stats import Stats
from refllm.methods.quant.rtn import rtn
from refllm.methods.quant.salient import kept_channels, salient
from refllm.methods.record import report


def example(seed=0, out=24, columns=200, tokens=50):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(tokens, columns)).astype(np.float32)
    X[:, [7, 90]] *= 30
    W = rng.normal(size=(out, columns)).astype(np.float32)
    W[:, [7, 90]] /= 2  # by its weights nobody would choose them
    return W, X


def test_kept_columns_are_float16_and_the_others_those_of_rtn():
    W, X = example()
    record = salient(W, Stats(X), bits=3, group_size=20)
    plain = rtn(W, bits=3, group_size=20).dense()
    dense = record.dense()
    assert kept_channels(W, Stats(X), 0.01, "activation").tolist() == [7, 90]
    assert np.array_equal(dense[:, [7, 90]], W[:, [7, 90]].astype(np.float16).astype(np.float32))
    others = np.delete(np.arange(200), [7, 90])
    assert np.array_equal(dense[:, others], plain[:, others])


def test_bytes_are_codes_and_kept_columns_and_a_bit_for_every_column():
    W, X = example()
    record = salient(W, Stats(X), bits=4, group_size=20)
    assert type(record) is Sum and (type(record.first), type(record.second)) == (IntWeight, BlockSparse)
    assert record.nbytes == rtn(W, bits=4, group_size=20).nbytes + 2 * 24 * 2 + 25


def test_activations_find_what_weights_do_not():
    """The experiment: large inputs and weights of one size; only by activation is the error small."""
    for seed in range(5):
        W, X = example(seed)
        stats = Stats(X)
        errors = [
            report("w", W, record, stats).output_error
            for record in (
                rtn(W, bits=3, group_size=20),
                salient(W, stats, bits=3, group_size=20, by="weight"),
                salient(W, stats, bits=3, group_size=20),
            )
        ]
        assert errors[2] < errors[0] / 5 and errors[2] < errors[1] / 5


def test_counts_and_ties():
    W, X = np.ones((1, 4), np.float32), np.ones((1, 4), np.float32)
    assert kept_channels(W, Stats(X), 0.01, "activation").tolist() == [0]  # at least one; of equals the first
    assert kept_channels(W, Stats(X), 0.74, "weight").tolist() == [0, 1]
    assert np.array_equal(salient(W, Stats(X), group_size=-1, fraction=1.0).dense(), W)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(fraction=0), "above 0 and at most 1, got 0"),
        (dict(fraction=1.5), "above 0 and at most 1, got 1.5"),
        (dict(by="size"), "by must be one of activation, weight, got 'size'"),
        (dict(group_size=3), "group_size 3 does not divide the 4 columns"),
    ],
)
def test_knobs_that_make_no_sense(knobs, message):
    W = np.ones((1, 4), np.float32)
    with pytest.raises(ValueError, match=message):
        salient(W, Stats(np.ones((1, 4), np.float32)), **dict(group_size=-1) | knobs)


def test_a_kept_weight_beyond_float16_is_refused():
    W = np.array([[70000.0, 1.0]], np.float32)
    with pytest.raises(ValueError, match="float16"):
        salient(W, Stats(np.array([[2.0, 1.0]], np.float32)), group_size=-1, scale_dtype="float32")
