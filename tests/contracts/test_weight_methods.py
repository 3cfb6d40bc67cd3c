"""What every method of quant, prune and lowrank promises, whatever it does inside.

Runs for every name in the families' `__all__`; VARIANTS adds knobs that change the record. A new method needs no line.
"""

import inspect
import re

import numpy as np
import pytest

from refllm.kernels.packed import matmul
from refllm.kernels.packed.inputs import RoundedInputs
from refllm.kernels.packed.records import KINDS, IntWeight, LowRank, Reordered, TwoLevel, from_parts, meta, parts
from refllm.kernels.stats import Stats
from refllm.methods.recipes import FINISH, WEIGHT_FAMILIES, methods, parse
from refllm.methods.record import report

VARIANTS = {
    "qoq": (dict(group_size=32), dict(group_size=-1)),
    "rtn": (
        dict(bits=8, symmetric=True, group_size=-1),
        dict(bits=3, group_size=32),
        dict(bits=2, group_size=0),
        dict(bits=4, scale_dtype="float32"),
    ),
    "nf4": (dict(block_size=32), dict(double_quant=False), dict(block_size=4096)),
    "fp4": (dict(block_size=32), dict(double_quant=False)),
    "gptq": (
        dict(bits=3, group_size=32, act_order=True),
        dict(bits=8, group_size=-1, symmetric=True, act_order=True),
        dict(bits=2, group_size=0, scale_dtype="float32"),
        dict(group_size=16, static_groups=True, act_order=True, symmetric=True),
        dict(group_size=32, group_grid="updated", block=48),
    ),
    "omse": (dict(bits=2, symmetric=True, group_size=-1), dict(p=2.4, group_size=32), dict(dual=True)),
    "hqq": (dict(bits=1, group_size=-1), dict(bits=3, group_size=32, p=1.0), dict(scale_dtype="float32")),
    "aciq": (dict(bits=2, law="normal"), dict(allocate=False, correct="both"), dict(bits=8, correct="none")),
    "llm_int8": (dict(threshold=2.0), dict(threshold=0.0)),
    "zeroquant": (dict(bits=8, group_size=-1), dict(bits=3, group_size=32, activation_bits=6), dict(group_size=0)),
    "zeroquant_fp": (dict(constraint="m1"), dict(constraint="m2", group_size=16), dict(group_size=-1)),
    "olive": (dict(normals="flint"), dict(normals="best", low=50, high=120), dict(scale_dtype="float32")),
    "spark": (dict(group_size=0), dict(group_size=32), dict(inputs=True), dict(scale_dtype="float32")),
    "pq": (dict(vector=4, books=2), dict(vector=2, spans=4), dict(bits=1, vector=8, books=2), dict(vector=2, spans=0)),
    "aqlm": (dict(vector=4, books=2, beam=3, rounds=2, steps=10), dict(rounds=0), dict(bits=3, steps=5)),
    "squeezellm": (dict(bits=4), dict(bits=2, outliers=0, sensitive=0)),
    "billm": (dict(by="magnitude"), dict(search="weights", block=32), dict(block=50)),
    "binary": (dict(group_size=16), dict(group_size=-1)),
    "salient": (dict(bits=3, group_size=32, fraction=0.1), dict(by="weight", group_size=-1)),
    "magnitude": (dict(per_row=True), dict(pattern="2:4"), dict(pattern="4:8"), dict(sparsity=0.9)),
    "wanda": (dict(pattern="2:4"), dict(pattern="1:4"), dict(sparsity=0.9), dict(dtype="float32")),
    "svd": (dict(rank=3), dict(ratio=1.0), dict(dtype="float32")),
}
PACKING = set(WEIGHT_FAMILIES) - {FINISH}  # those that take a dense weight
NAMES = sorted(name for name, (family, _) in methods().items() if family in PACKING)
CASES = [
    pytest.param(name, knobs, id=name + "".join(f",{k}={v}" for k, v in knobs.items()))
    for name in NAMES
    for knobs in ({}, *VARIANTS.get(name, ()))
]
every_case = pytest.mark.parametrize(("name", "knobs"), CASES)


def example(out=12, columns=128, tokens=40, seed=0, dtype=np.float32):
    """A weight and inputs whose columns differ in size, both read-only."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(out, columns)).astype(dtype)
    X = (rng.normal(size=(tokens, columns)) * np.exp(rng.normal(size=columns))).astype(dtype)
    W.flags.writeable = X.flags.writeable = False
    return W, X


def run(name, knobs, W, X):
    return methods()[name][1](W, Stats(X), **knobs)


def stored(record):
    return {part: array.tobytes() for part, array in parts(record).items()}


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_weight_stats_and_typed_knobs(name):
    family, function = methods()[name]
    first, second, *rest = inspect.signature(function).parameters.values()
    assert (first.name, second.name) == ("W", "stats")
    assert second.default in (inspect.Parameter.empty, None)
    for knob in rest:
        assert knob.kind is knob.KEYWORD_ONLY and knob.default is not knob.empty
        if knob.name == "fisher":  # filled in by compress
            assert knob.default is None
            continue
        assert re.fullmatch(r"(int|float|bool|str)( \| None)?", inspect.formatannotation(knob.annotation)), knob
    assert function.__module__ == f"refllm.methods.{family}.{function.__module__.rsplit('.', 1)[1]}"


@every_case
def test_result_is_a_record_of_the_right_shape(name, knobs):
    for dtype in (np.float32, np.float64):
        W, X = example(dtype=dtype)
        record = run(name, knobs, W, X)
        assert type(record) in KINDS.values() and record.shape == W.shape
        dense = record.dense()
        assert dense.shape == W.shape and dense.dtype == np.float32 and np.isfinite(dense).all()


@every_case
def test_inputs_are_left_alone_and_same_input_gives_same_bytes(name, knobs):
    W, X = example()  # read-only: writing into them would raise
    before = W.tobytes(), X.tobytes()
    first = run(name, knobs, W, X)
    assert (W.tobytes(), X.tobytes()) == before
    copies = W.copy(), X.copy()
    assert stored(run(name, knobs, *copies)) == stored(first)
    assert (copies[0].tobytes(), copies[1].tobytes()) == before
    strided = np.zeros((2 * W.shape[0], 2 * W.shape[1]), np.float32)
    strided[::2, ::2] = W
    assert stored(run(name, knobs, strided[::2, ::2], X)) == stored(first)
    copies[0][:] = 0  # a record must not look at the caller's array
    assert stored(first) == stored(run(name, knobs, W, X))


@every_case
def test_nbytes_is_the_sum_of_what_is_stored(name, knobs):
    W, X = example()
    record = run(name, knobs, W, X)
    assert record.nbytes == sum(len(data) for data in stored(record).values())
    assert report("w", W, record).bits_per_weight == 8 * record.nbytes / W.size
    if not (name == "svd" and knobs.get("dtype") == "float32"):
        assert record.nbytes < 4 * W.size  # smaller than float32


@every_case
def test_parts_and_meta_bring_it_back(name, knobs):
    W, X = example()
    record = run(name, knobs, W, X)
    back = from_parts(record.kind, parts(record), meta(record))
    assert stored(back) == stored(record) and meta(back) == meta(record)
    np.testing.assert_array_equal(back.dense(), record.dense())


def sizes(record):
    """(out, in): the magnitudes a product adds up, for the error bound."""
    if isinstance(record, Reordered):
        inner = sizes(record.weight)
        out = np.empty_like(inner)
        out[:, record.order] = inner
        return out
    record = record.flat if isinstance(record, TwoLevel) else record
    if isinstance(record, IntWeight):
        codes = record.unpacked().astype(np.float64)
        scale, zero_point = record.scales()
        spread = lambda a: np.repeat(a.astype(np.float64), codes.shape[1] // a.shape[1], axis=1)
        return spread(scale) * (codes + spread(zero_point))
    if isinstance(record, LowRank):
        return np.abs(record.A).astype(np.float64) @ np.abs(record.B)
    return np.abs(record.dense()).astype(np.float64)


@every_case
def test_matmul_is_the_product_with_the_dense_weight(name, knobs):
    """Float32 sums of in (+ rank) products in any order: at most gamma = k u / (1 - k u) of the sum of magnitudes.

    k counts the additions, the products, one rounding of each decoded weight and one of the result.
    """
    W, X = example()
    record = run(name, knobs, W, X)
    if isinstance(record, RoundedInputs):
        check_rounded(record, X)
        return
    exact = X.astype(np.float64) @ record.dense().astype(np.float64).T
    k = W.shape[1] + 4 + (2 * record.A.shape[1] if isinstance(record, LowRank) else 0)
    allowed = k * 2.0**-24 / (1 - k * 2.0**-24) * (np.abs(X).astype(np.float64) @ sizes(record).T)
    for x in (X, X[:1], X[0]):
        y = matmul(x, record)
        assert y.dtype == np.float32 and y.shape == (*x.shape[:-1], W.shape[0])
        rows = len(x) if x.ndim == 2 else 1
        assert (np.abs(y.reshape(rows, -1) - exact[:rows]) <= allowed[:rows]).all()


def check_rounded(record, X):
    """The same with the inputs as the record rounds them; the integer path adds a scale and a zero point."""
    dense = record.dense().astype(np.float64)
    for x in (X, X[:1]):
        seen = record.rounded(x).astype(np.float64)
        allowed = (X.shape[1] + 12) * 2.0**-23 * (np.abs(seen).max(axis=1, keepdims=True) * np.abs(dense).sum(axis=1))
        y = matmul(x, record)
        assert y.dtype == np.float32 and (np.abs(y - seen @ dense.T) <= allowed).all()
    assert np.array_equal(matmul(X[0], record), matmul(X[:1], record)[0])


@every_case
def test_inputs_twice_as_large_change_no_byte(name, knobs):
    W, X = example()
    assert stored(run(name, knobs, W, X)) == stored(run(name, knobs, W, 2 * X))


@every_case
@pytest.mark.parametrize("shape", [(1, 128), (12, 100), (12, 102), (1, 1), (5, 3)], ids=str)
def test_awkward_shapes_are_right_or_named(name, knobs, shape):
    W, X = example(*shape)
    try:
        record = run(name, knobs, W, X)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message
        # The number that does not fit, and what it does not fit.
        assert len(set(re.findall(r"\d+(?:\.\d+)?", message))) >= 2 and str(shape[1]) in message
    else:
        assert record.shape == shape and np.isfinite(record.dense()).all()


@every_case
def test_zero_rows_stay_zero(name, knobs):
    W, X = example()
    W = W.copy()
    W[[0, 5]] = 0
    dense = run(name, knobs, W, X).dense()
    assert np.abs(dense[[0, 5]]).max() <= 1e-6
    assert np.abs(dense[[1, 2, 3, 4]]).max() > 0
    assert np.abs(run(name, knobs, np.zeros_like(W), X).dense()).max() == 0


@every_case
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(name, knobs, value):
    W, X = example()
    W = W.copy()
    W[3, 7] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        run(name, knobs, W, X)


def baseline_of(name):
    """The recipe that the method's or else its module's `Baseline:` line names; None where it says none."""
    function = methods()[name][1]
    module = inspect.getmodule(function)
    line = re.search(r"^Baseline: (.+)$", f"{inspect.getdoc(function)}\n{module.__doc__}", re.MULTILINE)
    assert line, f"{module.__name__} has no line Baseline: RECIPE (or: none, why)"
    return None if line[1].startswith("none") else line[1]


@pytest.mark.parametrize("name", NAMES)
def test_no_worse_than_its_baseline(name):
    """At the same size, measured on the outputs of its own calibration inputs, summed over ten weights."""
    recipe = baseline_of(name)
    if recipe is None:
        return
    (stage,) = parse(recipe)
    ours = theirs = 0.0
    for seed in range(10):
        W, X = example(32, 128, 200, seed=seed)
        stats = Stats(X)
        mine = report("w", W, methods()[name][1](W, stats), stats)
        other = report("w", W, stage.function(W, stats, **stage.knobs), stats)
        assert mine.nbytes <= other.nbytes
        ours, theirs = ours + mine.output_error, theirs + other.output_error
    assert ours <= theirs
