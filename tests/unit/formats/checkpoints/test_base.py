"""Units along an axis, and the table of tensors: what is packed has the shapes and dtypes that STORED says."""

import numpy as np
import pytest

from refllm.formats import checkpoints
from refllm.formats.checkpoints.base import Grouped, dense_words, dequantize, group_index, pack_axis, unpack_axis

KINDS = {"I32": "int32", "I64": "int64", "I8": "int8", "U8": "uint8", "U16": "uint16", "F16": "float16"}
KINDS |= {"F32": "float32", "F8_E4M3": "uint8"}


def form(name, variant=None):
    return next(f for f in checkpoints.STORED if f.name == name and variant in (None, f.variant))


def assert_as_described(described, tensors, sizes, scale="float32"):
    """Every tensor is in the table, with its shape and dtype."""
    assert tensors.keys() <= {tensor.name for tensor in described.tensors}
    for name, array in tensors.items():
        tensor = described.tensor(name)
        assert array.shape == tensor.sizes(sizes), name
        assert array.dtype.name == (scale if tensor.dtype == "scale" else KINDS[tensor.dtype]), name
        assert array.flags.c_contiguous and array.dtype.isnative, name


def describe_cases():
    rng = np.random.default_rng(0)
    out, columns, groups = 64, 96, 3
    sizes = {"out": out, "in": columns, "groups": groups}
    scale = rng.random((out, groups)).astype(np.float32)
    codes = lambda bits, *shape: rng.integers(0, 1 << bits, shape or (out, columns), dtype=np.uint8)
    for bits in (2, 3, 4, 8):
        yield form("gptq", f"{bits} bits"), checkpoints.gptq_pack(codes(bits), scale, bits=bits), sizes
    yield form("awq", "gemm, 4 bits"), checkpoints.awq_pack(codes(4), scale), sizes
    yield form("awq", "gemv, 4 bits"), checkpoints.awq_gemv_pack(codes(4), scale), sizes | {"width": 4}
    for bits in range(1, 9):
        tensors = checkpoints.compressed_tensors_pack(codes(bits), scale, codes(bits, out, groups), bits=bits)
        yield form("pack-quantized", f"{bits} bits"), tensors, sizes
    tensors = checkpoints.compressed_tensors_pack(
        codes(8), scale, codes(8, out, groups), bits=8, format="int-quantized", g_idx=np.arange(columns) % groups
    )
    yield form("int-quantized"), tensors, sizes
    yield form("nvfp4-pack-quantized"), checkpoints.nvfp4_pack(codes(4), codes(8, out, 6), 3.0), sizes
    yield form("mxfp4-pack-quantized"), checkpoints.mxfp4_pack(codes(4), codes(8, out, 3)), sizes
    yield form("float-quantized"), checkpoints.float_quantized_pack(codes(8), scale), sizes
    for quant_type in ("nf4", "fp4"):
        for double in (False, True):
            tensors = checkpoints.bitsandbytes_pack(
                codes(4), rng.random(96), quant_type=quant_type, double_quant=double
            )
            text = tensors[f"weight.quant_state.bitsandbytes__{quant_type}"]
            variant = quant_type + (", double quantised" if double else "")
            yield form("bitsandbytes", variant), tensors, sizes | {"blocks": 96, "bytes": text.size}
    int8 = codes(8).view(np.int8)
    yield form("bitsandbytes", "int8"), checkpoints.int8_pack(int8, scale[:, 0]), sizes
    yield form("fp8"), checkpoints.fp8_block_pack(codes(8), scale[:1, :1]), sizes
    experts = checkpoints.gpt_oss_pack(codes(4, 2, out, columns), codes(8, 2, out, 3))
    yield form("mxfp4"), experts, sizes | {"experts": 2}
    trits = codes(8) % 3
    for order in ("x86", "arm"):
        yield form("I2_S", f"{order} order"), {"weight": checkpoints.i2_s_pack(trits, 1.0, order=order)}, sizes
    yield form("bitnet"), checkpoints.bitnet_pack(trits, 2.0), sizes
    for bits in (2, 4, 8):
        tensors = checkpoints.matmul_nbits_pack(codes(bits), scale, codes(bits, out, groups), bits=bits)
        yield form("MatMulNBits", f"{bits} bits"), tensors, sizes | {"block_size": 32}
    W = rng.standard_normal((out, columns)).astype(np.float32)
    kept = np.tile(np.array([1, 3]), (out, columns // 4))
    yield form("2:4"), checkpoints.sparse24_pack(W[:, ::2], kept), sizes
    yield form("bitmask"), checkpoints.bitmask_pack(W, W > 0), sizes | {"kept": int((W > 0).sum())}
    yield form("CSR"), checkpoints.csr_pack(W, W > 0), sizes | {"kept": int((W > 0).sum())}
    swizzled = checkpoints.swizzle_scales(codes(8, 130, 5))
    yield form("32-4-4 swizzle"), {"scales": swizzled}, {"rows": 130, "columns": 5}


def test_every_format_is_described_as_it_is_stored():
    seen = []
    for described, tensors, sizes in describe_cases():
        assert_as_described(described, tensors, sizes)
        seen.append(described)
    assert seen and {id(f) for f in seen} == {id(f) for f in checkpoints.STORED}
    assert len({(f.name, f.variant) for f in checkpoints.STORED}) == len(checkpoints.STORED)


def test_a_shape_that_does_not_come_out_whole_is_refused():
    with pytest.raises(ValueError, match=r"qweight: in \* 4 / 32 is 1.25"):
        form("gptq", "4 bits").tensor("qweight").sizes({"in": 10, "out": 8})


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("word", ["i4", "u1"])
@pytest.mark.parametrize("axis", [0, 1])
def test_dense_words_are_one_bit_stream(bits, word, axis):
    """The slow twin: a line of codes is one integer, cut into words."""
    rng = np.random.default_rng(bits)
    size = np.dtype(word).itemsize
    for n in (1, 5, 31, 32, 33, 70):
        codes = rng.integers(0, 1 << bits, (3, n), dtype=np.uint8)
        layout = dense_words(bits, 8 * size)
        packed = pack_axis(codes if axis else codes.T, layout, axis, word)
        lines = packed if axis else packed.T
        for line, row in zip(lines, codes, strict=True):
            number = sum(int(code) << bits * i for i, code in enumerate(row))
            assert line.tobytes() == number.to_bytes(-(-n * bits // (8 * size)) * size, "little")
        assert np.array_equal(unpack_axis(packed, layout, axis, n), codes if axis else codes.T)


def test_unpacking_ignores_bits_behind_the_last_code():
    packed = np.array([[0x21, 0xF3]], np.uint8)
    assert unpack_axis(packed, dense_words(4, 8), 1, 3).tolist() == [[1, 2, 3]]


def test_dequantize_is_exact_for_float16_scales():
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    scale = np.array([[65504.0]], np.float16)
    w = dequantize(Grouped(codes, scale, np.array([[255]], np.uint8)), 8)
    assert w.dtype == np.float32 and w[0].tolist() == [65504.0 * (q - 255) for q in range(256)]
    assert dequantize(Grouped(codes, scale), 8)[0, 0] == -128 * 65504.0


def test_groups_of_columns():
    assert group_index(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    short = Grouped(np.ones((1, 5), np.uint8), np.array([[1, 2, 4]], np.float16), np.zeros((1, 3), np.uint8))
    assert dequantize(short, 4, group_size=2)[0].tolist() == [1, 1, 2, 2, 4]
    for columns, groups in ((5, 2), (0, 1), (4, 0)):
        with pytest.raises(ValueError, match="do not divide"):
            group_index(columns, groups)
