"""The benchmark of products runs what it says, refuses wrong products, and takes its ratios from what it measured."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from refllm.evaluate.bench.bandwidth import measure_bandwidth, read_candidate
from refllm.evaluate.bench.kernels import measure_products
from refllm.evaluate.bench.products import (
    KINDS,
    Product,
    Task,
    check_types,
    code_bits,
    copied,
    numpy_product,
    packed_weight,
    refllm_product,
)

SMALL = {"rounds": 3, "spread": 5000, "read_bytes": 1 << 16}


class FakePeer:
    """A program with a product of each type it is asked for, and one of 8 bits."""

    name = "peer"

    def __init__(self, wrong: bool = False):
        self.wrong = wrong

    def products(self, types):
        return [partial(self._product, type_name=name) for name in dict.fromkeys([*types, "int8"]) if name != "w4a"]

    def _product(self, task, type_name):
        product = numpy_product(task)
        expected = -product.expected if self.wrong else product.expected
        return replace(product, program=self.name, type=type_name, detail="fake", expected=expected)


def test_rows_of_a_small_product():
    steps = []
    found = measure_products(
        (8, 64), ("w4a", "Q8_0"), activations=("int8", "float32"), peers=[FakePeer()], on_step=steps.append, **SMALL
    )
    rows = {(row["program"], row["type"], row["detail"]): row for row in found["rows"]}
    assert list(rows) == [
        ("numpy", "float32", ""),
        ("refllm", "w4a", "int8"),
        ("refllm", "w4a", "float32"),
        ("refllm", "Q8_0", "int8"),
        ("refllm", "Q8_0", "float32"),
        ("peer", "Q8_0", "fake"),
        ("peer", "int8", "fake"),
    ]
    base = rows["numpy", "float32", ""]
    assert base["weight_bytes"] == 8 * 64 * 4 and base["x_numpy"] == 1 and base["relative_error"] == 0
    for row in found["rows"]:
        assert 0 < row["lower"] <= row["seconds"] <= row["upper"] and row["relative_error"] < 0.02
        assert row["gbytes_per_s"] == pytest.approx(row["weight_bytes"] / row["seconds"] / 1e9)
        assert row["bandwidth_share"] == pytest.approx(row["gbytes_per_s"] / found["bandwidth_gbytes_per_s"])
        assert row["x_numpy"] == pytest.approx(base["seconds"] / row["seconds"])
    assert steps[0] == "8x64: preparing 1/7" and steps[-1] == "8x64: round 4/4"


def test_counterparts_of_peers():
    found = measure_products((8, 64), ("w4a", "Q8_0"), activations=("int8",), peers=[FakePeer()], **SMALL)
    _, w4a, q8, peer_q8, peer_int8 = found["rows"]
    # of the same type where there is one, else the fastest with at least as many bits
    assert q8["x_peers"] == {"peer": pytest.approx(peer_q8["seconds"] / q8["seconds"])}
    fastest = min(peer_q8["seconds"], peer_int8["seconds"])
    assert w4a["x_peers"] == {"peer": pytest.approx(fastest / w4a["seconds"])}
    assert set(w4a["ratios"]) == {"peer Q8_0 fake", "peer int8 fake"} and peer_q8["ratios"] == {}


def test_a_wrong_product_is_not_timed():
    with pytest.raises(ValueError, match="peer Q8_0 fake: the product is wrong"):
        measure_products((8, 64), ("Q8_0",), peers=[FakePeer(wrong=True)], **SMALL)


def test_a_product_of_another_shape_is_wrong():
    product = Product("p", "Q4_0", "", 1, 1, int, lambda: np.zeros((1, 3)), np.ones((1, 4), np.float32))
    with pytest.raises(ValueError, match=r"p Q4_0: the product has shape \(1, 3\), expected \(1, 4\)"):
        product.error()


@pytest.mark.parametrize(
    ("nbytes", "tokens", "copies"), [(100, 1, 100), (300, 1, 34), (50_000, 1, 3), (100, 512, 3), (1, 1, 512)]
)
def test_copies_fill_the_share(nbytes, tokens, copies):
    task = Task(np.zeros((1, 1)), np.zeros((tokens, 1)), threads=1, share=10_000)
    assert task.copies(nbytes) == copies


def test_copies_share_no_memory():
    W = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for weight, arrays in ((W, lambda w: [w]), (packed_weight("w4a", W), lambda w: [w.codes, w.scale, w.zero_point])):
        copies = copied(weight, 3)
        assert copies[0] is weight and len(copies) == 3
        for a in arrays(copies[1]):
            assert not any(np.shares_memory(a, b) for other in (copies[0], copies[2]) for b in arrays(other))
        for a, b in zip(arrays(copies[0]), arrays(copies[2]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_turn_multiplies_by_every_copy(monkeypatch):
    """One vector by all in one call, several tokens by each on its own."""
    from refllm.evaluate.bench import products

    calls = []
    monkeypatch.setattr(products, "matmul", lambda x, weight, activations: calls.append([weight]) or x)
    monkeypatch.setattr(products, "matmul_each", lambda x, weights, activations: calls.append(weights) or [x])
    for tokens, count in ((1, 4), (2, 3)):
        calls.clear()
        task = Task(np.ones((4, 64), np.float32), np.ones((tokens, 64), np.float32), threads=1, share=1000)
        product = refllm_product(task, "Q8_0", "int8")
        product.run()
        assert [len(weights) for weights in calls] == ([count] if tokens == 1 else [1] * count)
        assert len({id(weight) for weights in calls for weight in weights}) == product.copies == count


@pytest.mark.parametrize("kind", [*KINDS, "Q4_0"])
def test_kinds_are_what_they_are_called(kind):
    weight = packed_weight(kind, np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32))
    assert weight.shape == (4, 256) and code_bits(kind) <= 8 * weight.nbytes / 1024 < code_bits(kind) + 1


def test_names_are_checked():
    with pytest.raises(ValueError, match="unknown type 'w5'; known: w4"):
        measure_products((8, 64), ("w5",), **SMALL)
    with pytest.raises(ValueError, match="8x100: 100 columns are no multiple of 32, as Q4_0 needs"):
        check_types(("w8", "Q4_0"), [(8, 100)])


def test_read_bandwidth():
    found = measure_bandwidth(2, rounds=2, read_bytes=1 << 16)
    assert [row["threads"] for row in found["rows"]] == [1, 2]
    assert all(0 < row["lower"] <= row["gbytes_per_s"] <= row["upper"] for row in found["rows"])


def test_the_read_reads_everything():
    assert read_candidate(threads=3, nbytes=8 * 1000).turn() == 1000 * 999 // 2  # 0 + 1 + ...
