"""SPARK's code: all 256 numbers by its rules bit by bit, streams by a reader that goes from left to right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.spark import CODES, ROUNDED, decode_long, decode_rows, encode_rows
from tests.strategies import PROPERTY

NUMBERS = np.arange(256, dtype=np.uint8)


def slow_code(v):
    """A string of bits."""
    b = f"{v:08b}"
    if v <= 7:
        return "0" + b[5:]
    if b[0] == b[3]:
        return "1" + b[1] + b[2] + b[0] + b[4:]
    return "1" + b[1] + b[2] + ("01111" if b[0] == "0" else "10000")


def slow_read(bits):
    """Numbers of a string of bits, and what is left of it."""
    numbers = []
    while len(bits) >= 4:
        c = [int(bit) for bit in bits[:4]]
        if not c[0]:
            numbers.append(4 * c[1] + 2 * c[2] + c[3])
            bits = bits[4:]
            continue
        if len(bits) < 8:
            break
        low = int(bits[4:8], 2)
        numbers.append((128 + 16) * c[3] + 64 * c[1] + 32 * c[2] + low)
        bits = bits[8:]
    return numbers, bits


def bits_of(stream):
    return "".join(f"{byte & 15:04b}{byte >> 4:04b}" for byte in stream)


def test_all_numbers():
    for v in range(256):
        code = slow_code(v)
        assert int(code, 2) == CODES[v] and len(code) == (4 if v <= 7 else 8)
        assert slow_read(code) == ([ROUNDED[v]], "")
    for c in range(128, 256):
        assert slow_read(f"{c:08b}") == ([decode_long(np.uint8(c))], "")


def test_what_is_exact_and_what_is_not():
    spans = [(0, 15), (32, 47), (64, 79), (96, 111), (144, 159), (176, 191), (208, 223), (240, 255)]
    exact = [v for low, high in spans for v in range(low, high + 1)]
    assert np.flatnonzero(ROUNDED == NUMBERS).tolist() == exact and len(exact) == 128
    moved = ROUNDED.astype(int) - NUMBERS
    assert moved.min() == -16 and moved.max() == 16
    assert np.array_equal(ROUNDED[ROUNDED], ROUNDED) and (np.diff(ROUNDED.astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("v", "code", "back"),
    [(5, "0101", 5), (8, "10001000", 8), (18, "10001111", 15), (31, "10001111", 15), (130, "10010000", 144),
     (170, "10110000", 176), (177, "10110001", 177), (210, "11010010", 210)],
)  # fmt: skip
def test_examples(v, code, back):
    assert slow_code(v) == code and CODES[v] == int(code, 2) and ROUNDED[v] == back


@PROPERTY
@given(st.data(), st.integers(1, 9), st.integers(1, 5), st.integers(0, 8))
def test_streams(data, n, rows, shift):
    """Every mix of lengths: the vectorised reader finds the codes that the slow one finds, row by row."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    numbers = rng.integers(0, 256, (rows, n)).astype(np.uint8) >> rng.integers(0, shift + 1, (rows, n)).astype(np.uint8)
    stream, row_bytes = encode_rows(numbers)
    start = 0
    for row, size in zip(numbers, row_bytes, strict=True):
        bits = "".join(map(slow_code, row))
        assert bits_of(stream[start : start + size]) == bits + "0" * (-len(bits) % 8)
        start += size
    assert start == stream.size
    assert decode_rows(stream, row_bytes, n).tolist() == ROUNDED[numbers].tolist()
    again, same = encode_rows(ROUNDED[numbers])
    assert np.array_equal(again, stream) and np.array_equal(same, row_bytes)
    # A mean of 8 - 4 P(v <= 7) bits, and padding.
    assert 8 * stream.size == 8 * numbers.size - 4 * (numbers <= 7).sum() + 4 * ((numbers <= 7).sum(axis=1) % 2).sum()


@PROPERTY
@given(st.lists(st.integers(0, 255), min_size=1, max_size=12), st.integers(1, 12))
def test_any_bytes_are_read_as_the_slow_reader_does_or_refused(some, n):
    stream, bits = np.array(some, np.uint8), bits_of(some)
    numbers, left = slow_read(bits)
    whole = not left and (len(numbers) == n or (len(numbers) == n + 1 and bits[-4:] == "0000" and _ends_short(bits)))
    if whole:
        assert decode_rows(stream, np.array([len(some)]), n).tolist() == [numbers[:n]]
    else:
        with pytest.raises(ValueError, match=f"must hold {n} whole codes"):
            decode_rows(stream, np.array([len(some)]), n)


def _ends_short(bits):
    """Whether the last nibble is a code of its own."""
    return slow_read(bits[:-4])[1] == ""


@pytest.mark.parametrize("row_bytes", [[0, 2], [1, 2], [1]])
def test_lengths_must_fit(row_bytes):
    with pytest.raises(ValueError, match="must fill 2 bytes"):
        decode_rows(np.zeros(2, np.uint8), np.array(row_bytes), 2)
