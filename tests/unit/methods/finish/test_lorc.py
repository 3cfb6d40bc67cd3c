"""lorc: Eckart and Young for the error, where the factors go, and what they cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kernels.packed import matmul
from refllm.kernels.packed.inputs import StaticInputs, TokenInputs
from refllm.kernels.packed.records import IntWeight, LowRank, Sum
from refllm.methods.apply import check, compress
from refllm.methods.finish import lorc
from refllm.methods.quant import rtn, zeroquant_fp
from tests.models import random_model
from tests.strategies import PROPERTY, weights

IDS = np.arange(40)


def example(out=16, columns=24, seed=0):
    W = np.random.default_rng(seed).standard_normal((out, columns), np.float32)
    return rtn(W, bits=3, group_size=8), W


@PROPERTY
@given(weights(columns=st.just(8)), st.integers(1, 6))
def test_the_error_left_is_that_of_the_dropped_singular_values(W, rank):
    record = rtn(W, bits=2, group_size=4)
    rank = min(rank, *W.shape)
    repaired = lorc(record, W, rank=rank)
    error = W.astype(np.float64) - record.dense()
    S = np.linalg.svd(error, compute_uv=False)
    left = np.linalg.norm(W - repaired.dense().astype(np.float64))
    # float16 factors move each of their products by 2^-10 at most, and by their least number where they are tiny.
    assert left <= np.sqrt(np.sum(S[rank:] ** 2)) + 2.0**-9 * S.sum() + 1e-5


def test_full_rank_repairs_everything():
    record, W = example()
    assert np.abs(lorc(record, W, rank=16).dense() - W).max() < 2e-3 * np.abs(W - record.dense()).max()


def test_more_rank_is_never_worse():
    record, W = example()
    errors = [np.linalg.norm(lorc(record, W, rank=r).dense() - W) for r in range(1, 17)]
    assert errors == sorted(errors, reverse=True) and errors[0] < np.linalg.norm(record.dense() - W)


def test_it_decomposes_the_error_and_not_the_weight():
    record, W = example()
    W = W + 100 * np.outer(np.ones(16), np.ones(24)).astype(np.float32)  # rank 1 and large, and in the codes already
    record = rtn(W, bits=8, group_size=8)
    assert np.abs(lorc(record, W, rank=1).second.dense()).max() < 1


def test_a_badly_rounded_row_costs_one_rank():
    record, W = example()
    wrong = W.copy()
    wrong[5] = 0
    record = rtn(wrong, bits=8, group_size=8)
    assert np.linalg.norm(lorc(record, W, rank=1).dense() - W) < 0.05 * np.linalg.norm(record.dense() - W)


def test_factors_lie_beside_the_codes_and_count():
    record, W = example()
    repaired = lorc(record, W, rank=4)
    assert isinstance(repaired, Sum) and repaired.first is record and isinstance(repaired.second, LowRank)
    assert repaired.nbytes == record.nbytes + 2 * 4 * (16 + 24)
    small = lorc(record, W, rank=4, factor_bits=8)
    assert isinstance(small.second.A, IntWeight) and small.nbytes == record.nbytes + 4 * (16 + 24) + 2 * (16 + 4)
    plain = np.linalg.norm(repaired.dense() - W)
    assert np.linalg.norm(small.dense() - W) < 1.01 * plain


def test_inside_rounded_inputs_the_factors_meet_the_same_inputs():
    W = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    record = lorc(zeroquant_fp(W), W, rank=3)
    assert isinstance(record, TokenInputs) and isinstance(record.weight, Sum)
    X = np.random.default_rng(1).standard_normal((5, 64), np.float32)
    np.testing.assert_allclose(matmul(X, record), record.rounded(X) @ record.dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["gptq:bits=3,group=16+lorc:rank=4", "rtn:bits=4,group=16+lorc:rank=2+static"])
def test_it_follows_whatever_packs(recipe):
    model = random_model("llama", np.float32)
    check(model, recipe, IDS)
    plain, repaired = {}, {}
    first = recipe.split("+")[0]
    for recipe_, reports in ((first, plain), (recipe.removesuffix("+static"), repaired)):
        compress(model, recipe_, IDS, on_report=lambda r, to=reports: to.update({r.name: r}))
    assert all(repaired[name].weight_error < plain[name].weight_error for name in plain)
    assert all(repaired[name].nbytes > plain[name].nbytes for name in plain)
    last = compress(model, recipe, IDS).weights["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(last, StaticInputs if recipe.endswith("static") else Sum)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, W: lorc(r, W, rank=0), r"rank must lie between 1 and 16 for shape \(16, 24\), got 0"),
        (lambda r, W: lorc(r, W, rank=17), "got 17"),
        (lambda r, W: lorc(r, W[:, 1:]), r"the weight has shape \(16, 23\), its packed form \(16, 24\)"),
        (lambda r, W: lorc(r, W * np.nan), "the error of the packed weight holds NaN or Inf"),
        (lambda r, W: lorc(r, W, factor_bits=9), "bits must be 2 to 8, got 9"),
        (lambda r, W: compress(random_model("llama", np.float32), "lorc", IDS), "it follows a stage that packs"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*example())
