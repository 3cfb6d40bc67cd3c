"""GGUF blocks against libgguf (ggml's own C) and gguf-py: a million numbers encoded, random bytes decoded, edge blocks.

What ggml leaves to the machine, because it converts numbers to bytes that do not fit, is left out by name:
OVERFLOWING_INVERSE (blocks so small that 1/d is infinite) and MXFP4 blocks below 2^-125.
"""

from importlib.metadata import version

import numpy as np
import pytest

from refllm.formats.blocks import BLOCKS
from refllm.kernels.packed import encode_gguf

libgguf = pytest.importorskip("libgguf")
gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.oracle

LIBGGUF = [name for name, form in BLOCKS.items() if form.type_id in libgguf._SUPPORTED_QUANTIZED_QTYPES]
IMPORTANT = [name for name in LIBGGUF if BLOCKS[name].takes_importance]
GGUF_PY_ENCODES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
GGUF_PY_DECODES = [name for name in LIBGGUF if name != "Q1_0"]
COLUMNS, ROWS = 1024, 1024


def values(seed: int) -> np.ndarray:
    """A million numbers: normal, of very different sizes from row to row, on rounding boundaries, with outliers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ROWS, COLUMNS))
    x[256:512] *= np.exp(3 * rng.standard_normal((256, 1)))
    x[512:768] = np.round(x[512:768] * 4) / 8
    x[768:896] = np.where(rng.random((128, COLUMNS)) < 0.01, 50 * x[768:896], x[768:896])
    x[896:] = np.abs(x[896:]) * rng.choice([-1, 1], (128, 1))
    return x.astype(np.float32)


def edges() -> np.ndarray:
    """Rows of 256: zeros of both signs, constants, one number, equal magnitudes, large, small, all levels in order."""
    i = np.arange(256)
    one_hot = (i == 77).astype(float)
    rows = [
        0 * i,
        -0.0 * i,
        0 * i + 1,
        0 * i - 3.7,
        one_hot,
        -one_hot,
        np.where(i % 2, 1.0, -1.0),
        np.where(i % 2, -1.0, 1.0),
    ]
    rows += [i - 128.0, 128.0 - i, i / 255, -i / 255, i % 16 - 8.0, i % 32 - 16.0, i % 3 - 1.0, (i % 7 - 3) / 2]
    rows += [(i - 128) * scale for scale in (1e-3, 1e-6, 1e-10, 1e-14, 1e-17, 100.0, 400.0)]
    rows += [np.where(i < 16, 0.0, i - 100.0), np.where(i >= 240, 0.0, i - 100.0), np.where(i == 0, 500.0, one_hot)]
    rows += [
        np.where(i % 5, 0.0, -0.0),
        np.where(i % 5, -0.0, 0.0),
        np.where(i % 4, -0.0, 3.0),
        np.where(i % 4, 0.0, 3.0),
    ]
    rows += [2.0 ** (i % 24 - 12), -(2.0 ** (i % 24 - 12)), np.nextafter(np.float32(4), 0) * one_hot, 4.0 * one_hot]
    return np.stack(rows).astype(np.float32)


def importances() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "uniform": rng.random(COLUMNS).astype(np.float32),
        "wide": np.exp(4 * rng.standard_normal(COLUMNS)).astype(np.float32),
        "sparse": np.where(rng.random(COLUMNS) < 0.7, 0, rng.random(COLUMNS)).astype(np.float32),
        "ones": np.ones(COLUMNS, np.float32),
    }


def same_floats(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equal bits, or both NaN."""
    return (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))


@pytest.mark.parametrize("name", LIBGGUF)
def test_a_million_values_encode_as_in_libgguf(name, agreement):
    x = values(1)
    expected = libgguf.quantize_rows(x, BLOCKS[name].type_id)
    ours, compiled = BLOCKS[name].encode(x), encode_gguf(name, x)
    different = int((ours != expected).sum())
    agreement("libgguf", version("libgguf"), name, compared=x.size, different=different, note="encode")
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(compiled, expected)


@pytest.mark.parametrize("kind", importances())
@pytest.mark.parametrize("name", IMPORTANT)
def test_importance_counts_as_in_libgguf(name, kind, agreement):
    x, importance = values(2), importances()[kind]
    if kind != "uniform":
        x = x[::8]
    expected = libgguf.quantize_rows(x, BLOCKS[name].type_id, importance)
    ours = encode_gguf(name, x, importance)
    different = int((ours != expected).sum())
    agreement(
        "libgguf", version("libgguf"), name, compared=x.size, different=different, note=f"encode, {kind} importance"
    )
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(BLOCKS[name].encode(x[:32], importance), expected[:32])


@pytest.mark.parametrize("name", LIBGGUF)
def test_edge_blocks_encode_as_in_libgguf(name, agreement):
    x, form = edges(), BLOCKS[name]
    expected = libgguf.quantize_rows(x, form.type_id)
    agreement("libgguf", version("libgguf"), name, x.size, int((form.encode(x) != expected).sum()), note="edge blocks")
    np.testing.assert_array_equal(form.encode(x), expected)
    if form.takes_importance:
        importance = np.random.default_rng(3).random(256).astype(np.float32)
        expected = libgguf.quantize_rows(x, form.type_id, importance)
        np.testing.assert_array_equal(form.encode(x, importance), expected)
        np.testing.assert_array_equal(encode_gguf(name, x, importance), expected)


@pytest.mark.parametrize("name", LIBGGUF)
def test_random_bytes_decode_as_in_libgguf(name, agreement):
    form = BLOCKS[name]
    blocks = -(-1_000_000 // form.block_size // 8) * 8
    data = np.random.default_rng(4).integers(0, 256, (8, blocks // 8 * form.bytes_per_block), dtype=np.uint8)
    ours, expected = form.decode(data), libgguf.dequantize_rows(data, form.type_id)
    different = int((~same_floats(ours, expected)).sum())
    agreement("libgguf", version("libgguf"), name, compared=ours.size, different=different, note="decode random bytes")
    assert different == 0


@pytest.mark.parametrize("name", GGUF_PY_DECODES)
def test_random_bytes_decode_as_in_gguf_py(name, agreement):
    form = BLOCKS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert form.type_id == kind
    blocks = -(-1_000_000 // form.block_size // 8) * 8
    data = np.random.default_rng(5).integers(0, 256, (8, blocks // 8 * form.bytes_per_block), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, kind)
    ours = form.decode(data)
    different = int((~same_floats(ours, expected)).sum())
    zeros = int((~same_floats(ours, expected) & (ours == expected)).sum())
    note = "decode random bytes" + (f"; {zeros} are zeros of the other sign" if zeros else "")
    agreement("gguf", version("gguf"), name, compared=ours.size, different=different, note=note)
    assert different == zeros


@pytest.mark.parametrize("name", GGUF_PY_ENCODES)
def test_a_million_values_encode_as_in_gguf_py(name, agreement):
    x = values(6)
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    ours = encode_gguf(name, x)
    agreement("gguf", version("gguf"), name, x.size, int((ours != expected).sum()), note="encode")
    np.testing.assert_array_equal(ours, expected)
