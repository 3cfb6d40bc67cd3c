"""2:4 metadata words, bitmasks and CSR: by hand, against the records that compute with them, and what is refused."""

import numpy as np
import pytest

from refllm.formats.checkpoints import (
    bitmask_pack,
    bitmask_unpack,
    csr_pack,
    csr_unpack,
    sparse24_dense,
    sparse24_pack,
    sparse24_unpack,
)
from refllm.kernels.packed.records import Sparse24, SparseBitmask


def test_metadata_words_by_hand():
    columns = np.array([[0, 1, 0, 2, 0, 3, 1, 2]])
    tensors = sparse24_pack(np.arange(1, 9, dtype=np.float32).reshape(1, 8), columns)
    assert [hex(w) for w in tensors["metadata"][0]] == ["0x9c84"]
    assert sparse24_dense(tensors)[0].tolist() == [1, 2, 0, 0, 3, 0, 4, 0, 5, 0, 0, 6, 0, 7, 8, 0]


def test_metadata_has_the_bytes_of_the_record():
    W = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    mask = np.argsort(np.argsort(np.abs(W).reshape(5, 8, 4), axis=-1), axis=-1).reshape(5, 32) >= 2
    record = Sparse24.compress(W, mask)
    where = np.nonzero(mask)[1].reshape(5, 16) % 4
    tensors = sparse24_pack(record.values, where)
    assert tensors["metadata"].astype("<u2").tobytes() == record.indices.tobytes()
    assert np.array_equal(sparse24_dense(tensors), record.dense())
    signed = {name: t.view(np.int16).astype(">i2") if name == "metadata" else t for name, t in tensors.items()}
    assert np.array_equal(sparse24_unpack(signed)[1], where)


def test_bitmask_is_that_of_the_record():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((4, 13)).astype(np.float16) * (rng.random((4, 13)) < 0.4)
    tensors, record = bitmask_pack(np.asfortranarray(W)), SparseBitmask.compress(W)
    for name in ("values", "bitmask", "row_offsets"):
        assert np.array_equal(tensors[name], getattr(record, name))
    back, mask = bitmask_unpack(tensors, 13)
    assert np.array_equal(back, W) and np.array_equal(mask, W != 0)
    assert tensors["bitmask"][0].tobytes() == np.packbits(W[0] != 0, bitorder="little").tobytes()


def test_kept_zeros_and_empty_rows():
    W = np.array([[0, -0.0, 3], [0, 0, 0]], np.float32)
    mask = np.array([[0, 1, 1], [0, 0, 0]], bool)
    for back in (bitmask_unpack(bitmask_pack(W, mask), 3)[0], csr_unpack(csr_pack(W, mask), 3)):
        assert np.array_equal(back, W) and np.signbit(back[0, 1])
    assert csr_pack(W)["indptr"].tolist() == [0, 1, 1] and csr_pack(W, mask)["indices"].tolist() == [1, 2]
    empty = np.zeros((0, 5), np.float32)
    assert csr_unpack(csr_pack(empty), 5).shape == bitmask_unpack(bitmask_pack(empty), 5)[0].shape == (0, 5)


def test_csr_is_scipys():
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    W = (rng.standard_normal((7, 9)) * (rng.random((7, 9)) < 0.3)).astype(np.float32)
    tensors, scipys = csr_pack(W), csr_matrix(W)
    for name in ("data", "indices", "indptr"):
        assert (
            np.array_equal(tensors[name], getattr(scipys, name)) and tensors[name].dtype == getattr(scipys, name).dtype
        )
    assert np.array_equal(csr_unpack(tensors, 9), W)


def _csr(**change):
    good = {
        "data": np.ones(2, np.float32),
        "indices": np.array([0, 2], np.int32),
        "indptr": np.array([0, 1, 2], np.int32),
    }
    return good | {name: np.asarray(value, good[name].dtype) for name, value in change.items()}


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("16 columns", lambda: sparse24_pack(np.ones((1, 4)), np.array([[0, 1, 0, 1]]))),
        ("ascending", lambda: sparse24_pack(np.ones((1, 8)), np.array([[1, 0] * 4]))),
        ("ascending", lambda: sparse24_pack(np.ones((1, 8)), np.array([[0, 4] * 4]))),
        ("alike", lambda: sparse24_pack(np.ones((1, 8)), np.array([[0, 1]]))),
        (
            "ascending",
            lambda: sparse24_unpack({"values": np.ones((1, 8), "f4"), "metadata": np.zeros((1, 1), np.uint16)}),
        ),
        (
            "metadata must be",
            lambda: sparse24_unpack({"values": np.ones((1, 8), "f4"), "metadata": np.zeros((1, 2), np.uint16)}),
        ),
        ("a mask alike", lambda: bitmask_pack(np.ones((2, 3), "f4"), np.ones((3, 2), bool))),
        ("a mask alike", lambda: csr_pack(np.ones((2, 3), int))),
        (
            "keeps 3 weights, there are 2",
            lambda: bitmask_unpack(bitmask_pack(np.ones((1, 3), "f4")) | {"values": np.ones(2, "f4")}, 3),
        ),
        (
            "row_offsets",
            lambda: bitmask_unpack(bitmask_pack(np.ones((2, 3), "f4")) | {"row_offsets": np.array([0, 2])}, 3),
        ),
        ("take 2 words", lambda: bitmask_unpack(bitmask_pack(np.ones((1, 3), "f4")), 9)),
        ("ascend from 0 to 2", lambda: csr_unpack(_csr(indptr=[0, 2, 1]), 3)),
        ("ascend from 0 to 2", lambda: csr_unpack(_csr(indptr=[1, 1, 2]), 3)),
        ("lie in 0..1", lambda: csr_unpack(_csr(), 2)),
        ("lie in 0..2", lambda: csr_unpack(_csr(indices=[-1, 0]), 3)),
        ("stands twice", lambda: csr_unpack(_csr(indices=[1, 1], indptr=[0, 2, 2]), 3)),
        ("equally long", lambda: csr_unpack(_csr(indices=[1]), 3)),
    ],
)
def test_what_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
