"""Checkpoint arrays against the software whose files they are: a million random values and random bytes, bit for bit.

GPTQ is compared with auto-round's PyTorch layers, AWQ with compressed-tensors' converter, 2:4 metadata with torch.
Every comparison goes into the agreement table; where two oracles differ, the test says which convention is whose.
"""

import warnings
from importlib.metadata import version

import numpy as np
import pytest

from refllm.formats import checkpoints
from refllm.formats.checkpoints.dynamic_map import dynamic_map, encode_absmax

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
N = 1024  # matrices are N x N: 2^20 values


def different(ours: np.ndarray, theirs) -> int:
    """How many elements have other bits; two NaNs are alike."""
    theirs = theirs.numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (
        ours.shape,
        theirs.shape,
        ours.dtype,
        theirs.dtype,
    )
    a, b = (np.ascontiguousarray(x).view(f"u{x.itemsize}") for x in (ours, theirs))
    nan = np.isnan(ours) & np.isnan(theirs) if ours.dtype.kind == "f" else False
    return int(np.count_nonzero((a != b) & ~np.asarray(nan)))


def dense(seed: int) -> np.ndarray:
    """Normal weights with zeros, rows of other sizes and outliers, (N, N) float32."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((N, N)).astype(np.float32) * 0.02
    W[10], W[11, ::2] = 0, -0.0
    W[12:20] *= 1e-6
    W[20, ::97] = 30
    return W


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
        from bitsandbytes import functional
    return functional


@pytest.mark.parametrize("double", [False, True], ids=["absmax", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(N, N), (7, 33), (513, 65)], ids=str)
def test_bitsandbytes_4_bits(bnb, agreement, quant_type, double, shape):
    """Their tensors, read; their codes and scales, stored: the same bytes, the JSON text included."""
    W = dense(1)[: shape[0], : shape[1]].copy()
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(W), blocksize=64, quant_type=quant_type, compress_statistics=double
    )
    theirs = {f"weight.{name}": t.numpy() for name, t in state.as_dict(packed=True).items()} | {
        "weight": packed.numpy()
    }
    wrong = different(checkpoints.bitsandbytes_dequantize(theirs), bnb.dequantize_4bit(packed, state))
    read = checkpoints.bitsandbytes_unpack(theirs)
    blocks = np.pad(np.abs(W).ravel(), (0, -W.size % 64)).reshape(-1, 64).max(axis=1)
    ours = checkpoints.bitsandbytes_pack(
        read.codes,
        blocks,
        quant_type=quant_type,
        dtype="float32",
        double_quant=double,
        offset=state.offset.item() if double else None,
    )
    assert list(ours.keys() ^ theirs.keys()) == []
    other = {name: different(ours[name], theirs[name]) for name in ours}
    absmax = other.pop("weight.absmax")  # double: their compiled code takes a code nearby, see below
    note = f"{shape[0]} x {shape[1]}: decoded, and all tensors" + (" but the codes of absmax" if double else "")
    name = f"{quant_type}{', double' if double else ''}"
    agreement("bitsandbytes", version("bitsandbytes"), name, W.size, wrong + sum(other.values()), note)
    assert wrong == 0 and not any(other.values()) and (absmax <= 3 + 0.005 * len(blocks) if double else absmax == 0)


def test_bitsandbytes_double_quantisation(bnb, agreement):
    """Map and codes of absmax are those of bitsandbytes' PyTorch text; its C++ looks codes up in a coarse table."""
    absmax = np.abs(np.random.default_rng(2).standard_normal(N * N)).astype(np.float32)
    assert different(dynamic_map(), bnb.create_dynamic_map()) == 0
    codes, nested, offset = encode_absmax(absmax)
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default
    given = (torch.from_numpy(absmax - offset), bnb.create_dynamic_map(), 256)
    theirs, scale = quantize._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *given)
    wrong = different(codes, theirs) + different(nested, scale)
    native = different(codes, quantize(*given)[0])
    release = version("bitsandbytes")
    agreement("bitsandbytes", release, "absmax codes", codes.size, wrong, "PyTorch text")
    agreement(
        "bitsandbytes", release, "absmax codes", codes.size, native, "compiled CPU code: coarse table, documented"
    )
    assert wrong == 0 and native < 0.005 * codes.size


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_random_bytes(bnb, agreement, quant_type):
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (N * N // 2, 1), dtype=np.uint8)
    absmax = rng.standard_normal(N * N // 64).astype(np.float32) * np.float32(10.0) ** rng.integers(
        -40, 38, N * N // 64
    )
    absmax = absmax.astype(np.float32)
    tensors = checkpoints.bitsandbytes_pack(np.zeros((N, N), np.uint8), absmax, quant_type=quant_type)
    ours = checkpoints.bitsandbytes_dequantize(tensors | {"weight": data})
    theirs = torch.ops.bitsandbytes.dequantize_4bit.default(
        torch.from_numpy(data), torch.from_numpy(absmax), 64, quant_type, (N, N), torch.float32
    )
    wrong = different(ours, theirs)
    agreement("bitsandbytes", version("bitsandbytes"), quant_type, ours.size, wrong, "random bytes decoded")
    assert wrong == 0


def test_bitsandbytes_int8(bnb, agreement):
    rng = np.random.default_rng(4)
    codes, scb, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(torch.from_numpy(dense(4)).half(), 0.0)
    ours = checkpoints.int8_dequantize(checkpoints.int8_pack(codes.numpy(), scb.numpy()))
    wrong = different(ours, bnb.int8_vectorwise_dequant(codes, scb))
    data = rng.integers(-128, 128, (N, N), dtype=np.int8)
    scale = np.abs(rng.standard_normal(N)).astype(np.float32)
    ours = checkpoints.int8_dequantize(checkpoints.int8_pack(data, scale))
    wrong += different(ours, bnb.int8_vectorwise_dequant(torch.from_numpy(data), torch.from_numpy(scale)))
    agreement("bitsandbytes", version("bitsandbytes"), "int8", 2 * ours.size, wrong, "decoded, random bytes too")
    assert wrong == 0


def signed(codes: np.ndarray, bits: int):
    return torch.from_numpy((codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_compressed_tensors_words(agreement, bits):
    """Codes and zero points packed, words of random bits unpacked, shapes that fill no whole word."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rng, compared, wrong = np.random.default_rng(bits), 0, 0
    for shape in ((N, N), (33, 37), (5, 1), (1, 65), (64, 31)):
        codes = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
        zero = rng.integers(0, 1 << bits, (shape[0], 1), dtype=np.uint8)
        ours = checkpoints.compressed_tensors_pack(codes, np.ones(zero.shape, np.float32), zero, bits=bits)
        wrong += different(ours["weight_packed"], helpers.pack_to_int32(signed(codes, bits), bits))
        theirs = helpers.pack_to_int32(signed(zero, bits), bits, packed_dim=0).contiguous()
        wrong += different(ours["weight_zero_point"], theirs)
        words = rng.integers(0, 1 << 32, ours["weight_packed"].shape, dtype=np.uint32).view(np.int32)
        read = checkpoints.compressed_tensors_unpack(ours | {"weight_packed": words}, bits=bits).codes
        theirs = helpers.unpack_from_int32(torch.from_numpy(words), bits, torch.Size(shape))
        wrong += different(signed(read, bits).numpy(), theirs.to(torch.int8))
        compared += 2 * codes.size + zero.size
    release = version("compressed-tensors")
    agreement(
        "compressed-tensors", release, f"pack-quantized, {bits} bits", compared, wrong, "packed; random words unpacked"
    )
    assert wrong == 0


def test_compressed_tensors_decoded(agreement):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs

    rng, release = np.random.default_rng(0), version("compressed-tensors")
    data = rng.integers(0, 256, (N, N), dtype=np.uint8)
    scale = rng.standard_normal((N, N // 128)).astype(np.float32)
    decode = lambda codes, scale, zero=None, **args: forward.dequantize(
        x_q=codes, scale=scale, zero_point=zero, args=QuantizationArgs(**args), dtype=torch.float32
    )
    for bits in (4, 8):
        codes, zero = data & (1 << bits) - 1, rng.integers(0, 1 << bits, scale.shape, dtype=np.uint8)
        for given in (None, zero):
            kind = {"num_bits": bits, "type": "int", "group_size": 128, "strategy": "group", "symmetric": given is None}
            theirs = decode(
                signed(codes, bits), torch.from_numpy(scale), None if given is None else signed(given, bits), **kind
            )
            packed = checkpoints.compressed_tensors_pack(codes, scale, given, bits=bits)
            wrong = different(checkpoints.compressed_tensors_dequantize(packed, bits=bits), theirs)
            note = "symmetric" if given is None else "with zero points"
            agreement("compressed-tensors", release, f"int{bits}", data.size, wrong, f"decoded, {note}")
            assert wrong == 0
    column = np.abs(scale[:, :1])
    theirs = decode(
        torch.from_numpy(data).view(torch.float8_e4m3fn),
        torch.from_numpy(column),
        num_bits=8,
        type="float",
        strategy="channel",
        symmetric=True,
    )
    ours = checkpoints.float_quantized_dequantize(checkpoints.float_quantized_pack(data, column))
    wrong = different(ours, theirs)
    agreement("compressed-tensors", release, "float-quantized", data.size, wrong, "random bytes decoded")
    assert wrong == 0


def test_compressed_tensors_fp4(agreement):
    """nvfp4 agrees everywhere; of mxfp4 the scale code 255, NaN by OCP, is an infinity there."""
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rng, release = np.random.default_rng(0), version("compressed-tensors")
    data = rng.integers(0, 256, (N, N), dtype=np.uint8)
    values = helpers.unpack_fp4_from_uint8(torch.from_numpy(data), N, 2 * N, torch.float32)
    assert different(data, helpers.pack_fp4_to_uint8(values)) == 0
    args = QuantizationArgs(num_bits=4, type="float", group_size=16, strategy="tensor_group", symmetric=True)
    scale, divisor = rng.integers(0, 256, (N, N // 8), dtype=np.uint8), np.array([37.7], np.float32)
    theirs = dequantize(
        x_q=values,
        scale=torch.from_numpy(scale).view(torch.float8_e4m3fn).to(torch.float32),
        args=args,
        global_scale=torch.from_numpy(divisor),
        dtype=torch.float32,
    )
    tensors = {"weight_packed": data, "weight_scale": scale, "weight_global_scale": divisor}
    wrong = different(checkpoints.nvfp4_dequantize(tensors), theirs)
    read = checkpoints.nvfp4_unpack(tensors)
    wrong += sum(different(t, tensors[name]) for name, t in checkpoints.nvfp4_pack(*read).items())
    agreement(
        "compressed-tensors", release, "nvfp4-pack-quantized", 2 * data.size, wrong, "random bytes decoded, packed"
    )
    args = QuantizationArgs(num_bits=4, type="float", group_size=32, strategy="group", symmetric=True)
    scale = rng.integers(0, 256, (N, N // 16), dtype=np.uint8)
    powers = decompress_mx_scale(torch.from_numpy(scale)).to(torch.float32)
    theirs = dequantize(x_q=values, scale=powers, args=args, dtype=torch.float32).numpy()
    tensors, known = {"weight_packed": data, "weight_scale": scale}, np.repeat(scale != 255, 32, axis=1)
    ours = checkpoints.mxfp4_dequantize(tensors)
    wrong_mx, nan = different(ours[known], theirs[known]), different(ours[~known], theirs[~known])
    agreement("compressed-tensors", release, "mxfp4-pack-quantized", int(known.sum()), wrong_mx, "random bytes decoded")
    agreement(
        "compressed-tensors",
        release,
        "mxfp4-pack-quantized",
        int((~known).sum()),
        nan,
        "scale 255: NaN (OCP) there infinite",
    )
    assert wrong == wrong_mx == 0 and not np.isfinite(theirs[~known]).any()


def test_awq_as_compressed_tensors_converts_it(agreement):
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    rng = np.random.default_rng(0)
    qweight, qzeros = (rng.integers(0, 1 << 32, (n, N // 8), dtype=np.uint32).view(np.int32) for n in (N, N // 128))
    scales = rng.standard_normal((N // 128, N)).astype(np.float16)
    ours = checkpoints.awq_unpack({"qweight": qweight, "qzeros": qzeros, "scales": scales})
    given = (torch.from_numpy(qweight), torch.from_numpy(scales), torch.from_numpy(qzeros))
    codes, scale, zero = converters.AutoAWQConverter(group_size=128)._convert_gemm_module(*given)
    wrong = different(signed(ours.codes, 4).numpy(), codes.contiguous().to(torch.int8))
    wrong += different(signed(ours.zero_point, 4).numpy(), zero.contiguous().to(torch.int8))
    wrong += different(ours.scale, scale.contiguous())
    back = checkpoints.awq_pack(*ours[:3])
    wrong += sum(different(back[name], t) for name, t in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)))
    agreement(
        "compressed-tensors", version("compressed-tensors"), "AWQ gemm", 2 * N * N, wrong, "random words, both ways"
    )
    assert wrong == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("module", "kind"), [("qlinear_torch_zp", "gptq"), ("qlinear_torch", "gptq_v2")])
def test_gptq_of_auto_round(agreement, bits, module, kind):
    """Packed by their layers, and random words decoded by their forward pass of the unit vectors."""
    layer = pytest.importorskip(f"auto_round_extension.torch.{module}", exc_type=Exception).QuantLinear(
        bits, 128, N, N, False
    )
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (N, N), dtype=np.uint8)
    scale = (rng.integers(1, 5, (N, N // 128)) / 64).astype(np.float16)
    zero = rng.integers(kind == "gptq", 1 << bits, scale.shape, dtype=np.uint8)
    ours = checkpoints.gptq_pack(codes, scale, zero, bits=bits, checkpoint_format=kind)
    weight = checkpoints.gptq_dequantize(ours, bits=bits, checkpoint_format=kind)
    linear = torch.nn.Linear(N, N, bias=False)
    linear.weight.data = torch.from_numpy(weight)
    layer.device = "cpu"
    layer.pack(linear, torch.from_numpy(scale).float(), torch.from_numpy(zero.astype(np.int32)), device="cpu")
    names = ("qweight", "qzeros", "scales")
    wrong = sum(different(ours[name], getattr(layer, name)) for name in names)
    words = {name: rng.integers(0, 1 << 32, ours[name].shape, dtype=np.uint32).view(np.int32) for name in names[:2]}
    layer.qweight, layer.qzeros = (torch.from_numpy(words[name]) for name in names[:2])
    theirs = layer(torch.eye(N)).T.contiguous()
    decoded = checkpoints.gptq_dequantize(ours | words, bits=bits, checkpoint_format=kind, full_zero="plus_one")
    wrong += int(np.count_nonzero(decoded != theirs.numpy()))
    agreement(
        "auto-round", version("auto-round"), f"{kind}, {bits} bits", 2 * N * N, wrong, "packed; random words decoded"
    )
    assert wrong == 0


def run_matmul_nbits(ort, tensors, columns: int, bits: int, block_size: int):
    """Y = I B^T of ONNX Runtime's CPU kernel: the weight as it decodes it, (out, in)."""
    onnx = pytest.importorskip("onnx")
    inputs = [("B", tensors["B"]), ("S", tensors["scales"])]
    inputs += [("Z", tensors["zero_points"])] if "zero_points" in tensors else []
    rows = len(tensors["B"])
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["A", *(name for name, _ in inputs)],
        ["Y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=block_size,
    )
    info = lambda name, width: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, width])
    arrays = [onnx.numpy_helper.from_array(array, name) for name, array in inputs]
    graph = onnx.helper.make_graph([node], "g", [info("A", columns)], [info("Y", rows)], arrays)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"A": np.eye(columns, dtype=np.float32)})[0].T


@pytest.mark.parametrize("zeros", [False, True], ids=["no-zero-points", "zero-points"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmul_nbits(agreement, bits, zeros):
    """Short last blocks, odd numbers of blocks, blocks of 16 to 256."""
    ort = pytest.importorskip("onnxruntime")
    rng, compared, wrong = np.random.default_rng(bits), 0, 0
    for rows, columns, size in (
        (N, N, 32),
        (17, 96, 32),
        (5, 80, 16),
        (9, 100, 32),
        (3, 300, 128),
        (4, 33, 16),
        (6, 640, 256),
    ):
        blocks = -(-columns // size)
        codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
        scale = (rng.integers(1, 64, (rows, blocks)) / 64).astype(np.float32)
        zero = rng.integers(0, 1 << bits, scale.shape, dtype=np.uint8) if zeros else None
        kind = {"bits": bits, "block_size": size}
        tensors = checkpoints.matmul_nbits_pack(codes, scale, zero, **kind)
        theirs = run_matmul_nbits(ort, tensors, columns, **kind)
        wrong += int(np.count_nonzero(checkpoints.matmul_nbits_dequantize(tensors, columns, **kind) != theirs))
        compared += codes.size
    note = "product with the identity, " + ("with" if zeros else "without") + " zero points"
    agreement("onnxruntime", version("onnxruntime"), f"MatMulNBits, {bits} bits", compared, wrong, note)
    assert wrong == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_onnx_runtimes_quantiser_writes_is_what_we_write(agreement, symmetric):
    ort = pytest.importorskip("onnxruntime.capi._pybind_state")
    rng, compared, wrong = np.random.default_rng(0), 0, 0
    for rows, columns, size in ((N, N, 32), (3, 40, 32), (5, 96, 16)):
        W = rng.standard_normal((columns, rows)).astype(np.float32)
        blocks = -(-columns // size)
        theirs = {"B": np.zeros((rows, blocks, size // 2), np.uint8), "scales": np.zeros(rows * blocks, np.float32)}
        zero = np.zeros(rows * -(-blocks // 2), np.uint8)
        ort.quantize_matmul_4bits(theirs["B"], W, theirs["scales"], zero, size, rows, columns, symmetric)
        theirs |= {} if symmetric else {"zero_points": zero}
        read = checkpoints.matmul_nbits_unpack(theirs, columns, block_size=size)
        ours = checkpoints.matmul_nbits_pack(*read[:3], block_size=size)
        wrong += sum(different(ours[name].reshape(t.shape), t) for name, t in theirs.items())
        compared += W.size
    note = "the tensors of its quantiser, " + ("symmetric" if symmetric else "with zero points")
    agreement("onnxruntime", version("onnxruntime"), "MatMulNBits, 4 bits", compared, wrong, note)
    assert wrong == 0


def test_fp8_blocks_of_transformers(agreement):
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    rng = np.random.default_rng(0)
    data, scale = rng.integers(0, 256, (N, N), dtype=np.uint8), rng.standard_normal((8, 8)).astype(np.float32)
    ours = checkpoints.fp8_block_dequantize(checkpoints.fp8_block_pack(data, scale))
    codes = torch.from_numpy(data).view(torch.float8_e4m3fn)
    theirs = module.Fp8Dequantize(None)._dequantize_one(codes, torch.from_numpy(scale), torch.float32)
    wrong = different(ours, theirs)
    agreement("transformers", version("transformers"), "block-FP8", ours.size, wrong, "random bytes decoded")
    assert wrong == 0


def test_gpt_oss_of_transformers(agreement):
    """They read the scale code 255 as 2^128; otherwise exact in float32."""
    module = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    tensors = {
        "blocks": rng.integers(0, 256, (4, 256, 32, 16), dtype=np.uint8),
        "scales": rng.integers(0, 256, (4, 256, 32), dtype=np.uint8),
    }
    theirs = module.convert_moe_packed_tensors(*map(torch.from_numpy, tensors.values()), dtype=torch.float32)
    theirs = theirs.transpose(1, 2).contiguous()
    same = different(checkpoints.gpt_oss_dequantize(tensors, nan_scale=False), theirs)
    known = np.repeat(tensors["scales"] != 255, 32, axis=-1)
    ours = checkpoints.gpt_oss_dequantize(tensors)
    wrong = different(ours[known], theirs.numpy()[known])
    agreement(
        "transformers", version("transformers"), "mxfp4 of gpt-oss", ours.size, same, "nan_scale=False; random bytes"
    )
    agreement(
        "transformers", version("transformers"), "mxfp4 of gpt-oss", int(known.sum()), wrong, "all scales but 255"
    )
    assert wrong == 0 and np.isnan(ours[~known]).all()


def test_bitnet_of_transformers(agreement):
    module = pytest.importorskip("transformers.integrations.bitnet")
    codes = np.random.default_rng(0).integers(0, 3, (N, N), dtype=np.uint8)
    ours = checkpoints.bitnet_pack(codes, 0.5)
    ternary = torch.from_numpy(codes.astype(np.float32) - 1)
    wrong = different(ours["weight"], module.pack_weights(ternary.clone()))
    wrong += different(
        codes.astype(np.float32) - 1, module.unpack_weights(torch.from_numpy(ours["weight"]), torch.float32)
    )
    agreement("transformers", version("transformers"), "BitNet", 2 * codes.size, wrong, "packed, unpacked")
    assert wrong == 0


@pytest.mark.parametrize("shape", [(N, N), (130, 5), (1, 1), (256, 12)], ids=str)
def test_swizzle_of_torchao(agreement, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scale = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    ours = checkpoints.swizzle_scales(scale)
    wrong = different(ours, utils.to_blocked(torch.from_numpy(scale)))
    wrong += different(checkpoints.unswizzle_scales(ours, shape), utils.from_blocked(torch.from_numpy(ours), *shape))
    agreement("torchao", version("torchao"), "32-4-4 swizzle", 2 * scale.size, wrong, f"{shape[0]} x {shape[1]}")
    assert wrong == 0


def test_sparse24_of_torch(agreement):
    """torch's metadata for CUTLASS, its permutation of the words taken back, is the plain order."""
    from torch.sparse import _semi_structured_conversions as torchs

    W = np.random.default_rng(0).standard_normal((N, N)).astype(np.float16)
    mask = np.argsort(np.argsort(np.abs(W).reshape(N, -1, 4), axis=-1), axis=-1).reshape(N, N) >= 2
    W = np.where(mask, W, np.float16(0))
    values, permuted = torchs.sparse_semi_structured_from_dense_cutlass(torch.from_numpy(W))
    offsets = torchs._calculate_meta_reordering_scatter_offsets(N, N // 16, permuted.dtype, permuted.device)
    metadata = permuted.reshape(-1)[offsets].reshape(N, N // 16)
    columns = np.nonzero(mask)[1].reshape(N, -1) % 4
    ours = checkpoints.sparse24_pack(W[mask].reshape(N, -1), columns)
    wrong = different(ours["metadata"].view(np.int16), metadata) + different(ours["values"], values.contiguous())
    wrong += different(checkpoints.sparse24_dense({"values": values.numpy(), "metadata": metadata.numpy()}), W)
    agreement("torch", torch.__version__, "2:4 metadata", 2 * W.size, wrong, "both ways")
    assert wrong == 0


def test_csr_of_torch(agreement):
    W = dense(5) * (np.random.default_rng(5).random((N, N)) < 0.3)
    W = W.astype(np.float32)
    theirs, ours = torch.from_numpy(W).to_sparse_csr(), checkpoints.csr_pack(W)
    wrong = different(ours["data"], theirs.values())
    wrong += different(ours["indices"].astype(np.int64), theirs.col_indices())
    wrong += different(ours["indptr"].astype(np.int64), theirs.crow_indices())
    wrong += int(np.count_nonzero(checkpoints.csr_unpack(ours, N) != W))
    agreement("torch", torch.__version__, "CSR", 2 * W.size, wrong, "both ways")
    assert wrong == 0
