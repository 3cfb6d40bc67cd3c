"""Layouts: what is packed comes back, no bit is used twice, and fields lie where their formulas say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.formats.blocks import BLOCKS
from refllm.formats.checkpoints import STORED
from refllm.formats.layouts import Bits, Digits, Field, Layout, codes, numbers, stream
from refllm.formats.strategies import fields_of, units_of
from tests.strategies import PROPERTY

TRITS = Layout("trits", 2, 8, (Field("t", 8, "u1", Digits("i // 5", "i % 5")),))
THREES = Layout("threes", 12, 32, (stream("q", 32, 3),))
SIGNED = Layout("signed", 2, 4, (codes("q", 4, 4, "i // 2", "4 * (i % 2)", dtype="i1"),))
OF_CHECKPOINTS = {tensor.layout.name: tensor.layout for form in STORED for tensor in form.tensors if tensor.layout}
LAYOUTS = [*(form.layout for form in BLOCKS.values()), *OF_CHECKPOINTS.values(), TRITS, THREES, SIGNED]
FEW = settings(PROPERTY, max_examples=20)  # of each of many layouts
OF_BITS = [x for x in LAYOUTS if not any(isinstance(field.parts, Digits) for field in x.fields)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@FEW
@given(data=st.data())
def test_fields_come_back(layout, data):
    fields = data.draw(fields_of(layout))
    back = layout.unpack(layout.pack(**fields))
    for field in layout.fields:
        found, given_ = back[field.name], fields[field.name]
        assert (found.dtype, found.shape, found.tobytes()) == (np.dtype(field.dtype), given_.shape, given_.tobytes())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@FEW
@given(data=st.data())
def test_bytes_come_back_where_numbers_own_them(layout, data):
    units = data.draw(units_of(layout, any_bytes=True))
    fields = layout.unpack(units)
    packed = layout.pack(**fields)
    for name, values in layout.unpack(packed).items():
        assert values.tobytes() == fields[name].tobytes()
    if layout in OF_BITS:  # a byte of digits stands for 243 of 256 values
        np.testing.assert_array_equal(packed, units & used_mask(layout))


def used_mask(layout):
    mask = np.zeros(layout.nbytes, np.uint8)
    for field in layout.fields:
        for place in layout.positions(field.name).reshape(-1):
            mask[place // 8] |= 1 << place % 8
    return mask


@pytest.mark.parametrize("layout", OF_BITS, ids=lambda layout: layout.name)
@settings(FEW, max_examples=5)  # a number at a time is slow
@given(data=st.data())
def test_bits_lie_at_their_positions(layout, data):
    """The slow twin: every bit of every number is read at the place that `positions` names."""
    unit = data.draw(units_of(layout, (), any_bytes=True))
    bits = np.unpackbits(unit, bitorder="little")
    for field in layout.fields:
        values = layout.unpack(unit[None])[field.name][0]
        words = values.view(f"u{values.itemsize}").astype(object)
        for i, place in enumerate(layout.positions(field.name)):
            number = sum(int(bits[p]) << k for k, p in enumerate(place))
            assert int(words[i]) & ((1 << field.bits) - 1) == number


def test_nibbles_by_hand():
    pairs = Layout("pairs", 2, 4, (codes("q", 4, 4, "i // 2", "4 * (i % 2)"),))
    assert pairs.pack(q=np.array([[1, 2, 3, 15]])).tolist() == [[0x21, 0xF3]]
    assert SIGNED.pack(q=np.array([-8, 7, -1, 0])).tolist() == [0x78, 0x0F]
    assert SIGNED.unpack(np.array([0x78, 0x0F], np.uint8))["q"].tolist() == [-8, 7, -1, 0]


def test_a_stream_of_three_bit_codes_crosses_bytes():
    q = np.arange(32) % 8
    number = sum(int(code) << 3 * i for i, code in enumerate(q))
    assert THREES.pack(q=q[None])[0].tobytes() == number.to_bytes(12, "little")


def test_base_three_by_hand():
    """Digits 2 1 0 2 1 are v = 2 81 + 27 + 2 3 + 1 = 196, stored as ceil(196 256 / 243) = 207."""
    packed = TRITS.pack(t=np.array([[2, 1, 0, 2, 1, 2, 2, 2]], np.uint8))
    assert packed.tolist() == [[207, -(-(2 * 81 + 2 * 27 + 2 * 9) * 256 // 243)]]
    every = np.array(np.meshgrid(*[range(3)] * 5, indexing="ij")).reshape(5, -1).T.astype(np.uint8)
    both = np.concatenate([every, every[:, :3]], axis=1)
    assert np.array_equal(TRITS.unpack(TRITS.pack(t=both))["t"], both)


def test_floats_are_little_endian_and_rounded_once():
    half = Layout("half", 6, 1, (numbers("d", "f2", 0), numbers("x", "f4", 2)))
    packed = half.pack(d=np.array([1 + 2**-11], np.float32), x=np.array([1.5], np.float32))
    assert packed.tolist() == [0x00, 0x3C, 0, 0, 0xC0, 0x3F]


def test_any_memory_order():
    layout = BLOCKS["Q5_1"].layout
    units = np.random.default_rng(0).integers(0, 256, (4, 3, 2 * layout.nbytes), dtype=np.uint8)[:, ::-1, ::2]
    units.flags.writeable = False
    fields = layout.unpack(units)
    for name, values in layout.unpack(np.ascontiguousarray(units)).items():
        assert values.shape == (4, 3, layout.field(name).count) and fields[name].tobytes() == values.tobytes()
    assert layout.pack(**{name: values[:0] for name, values in fields.items()}).shape == (0, 3, layout.nbytes)


def test_wrong_descriptions_are_refused():
    with pytest.raises(ValueError, match="bit 4 is used 2 times"):
        Layout("x", 1, 2, (codes("a", 1, 5, "0"), codes("b", 1, 4, "0", "4")))
    with pytest.raises(ValueError, match="outside the 1 bytes"):
        Layout("x", 1, 2, (codes("a", 2, 8, "i"),))


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match=r"signed.q holds numbers -8..7, got -9..0"):
        SIGNED.pack(q=np.array([0, 0, 0, -9]))
    with pytest.raises(ValueError, match=r"trits.t holds numbers 0..2, got 0..3"):
        TRITS.pack(t=np.array([3, 0, 0, 0, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="takes integers, got float64"):
        SIGNED.pack(q=np.zeros(4))
    with pytest.raises(ValueError, match=r"has the fields q, got \['z'\]"):
        SIGNED.pack(z=np.zeros(4, int))
    with pytest.raises(ValueError, match=r"last axes are {'q': 4}"):
        SIGNED.pack(q=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"units of 2 bytes \(uint8\), got uint8 of shape \(3,\)"):
        SIGNED.unpack(np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="got int8"):
        SIGNED.unpack(np.zeros(2, np.int8))


def test_a_number_in_parts():
    """Low four bits in byte 0, high two on top of byte 1: as Q6_K does."""
    layout = Layout("six", 2, 1, (Field("q", 1, "u1", (Bits(4, "0"), Bits(2, "1", "6", low=4))),))
    assert layout.pack(q=np.array([0b101101])).tolist() == [0b1101, 0b10000000]
