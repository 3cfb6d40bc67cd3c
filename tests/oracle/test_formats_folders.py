"""Quantised folders against transformers: what compressed-tensors and bitsandbytes write loads here, and ours there.

Weights are compared as numbers, every one of them. Two things differ and are named where they do: transformers gives
4-bit floats of compressed-tensors in bfloat16, and the CPU kernel of bitsandbytes 0.50 takes the wrong scale for blocks
that run across the ends of rows.
"""

import json
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest

from refllm.formats.blocks import BLOCKS
from refllm.formats.checkpoints import bitsandbytes_dequantize
from refllm.formats.dtypes import BF16
from refllm.formats.gguf import read_gguf
from refllm.formats.tensors import read_safetensors
from refllm.kernels.packed.encode_codes import blockwise, int8_rows
from refllm.kernels.packed.records import CodeWeight, is_record
from refllm.methods.apply import compress
from refllm.model.convert import convert, save
from refllm.model.load import load
from tests.models import random_model

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=64, intermediate_size=128, head_dim=16)
needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="transformers needs accelerate for this")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of plain float32 weights."""
    place = tmp_path_factory.mktemp("plain")
    save(random_model(**SIZES), place / "native", "native")
    convert(place / "native", place / "hf")
    return place / "hf"


def from_pretrained(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def dense(model):
    return {name: w if isinstance(w, np.ndarray) else w.dense() for name, w in model.weights.items()}


def compare(agreement, ours, theirs, oracle, name, note, through=lambda array: array):
    """One row of the table for the packed weights; all weights must be equal."""
    packed = [key for key, weight in ours.weights.items() if is_record(weight)]
    assert packed
    numbers = dense(ours)
    numbers |= {key: through(numbers[key]) for key in packed}
    different = {key: int((numbers[key] != theirs[key]).sum()) for key in numbers}
    compared, differ = sum(numbers[key].size for key in packed), sum(different[key] for key in packed)
    agreement(oracle, version(oracle), name, compared=compared, different=differ, note=note)
    assert not any(different.values()), {key: count for key, count in different.items() if count}


# ---------------------------------------------------------------- compressed-tensors

SCHEMES = {
    "W4 g32": ("pack-quantized", dict(num_bits=4, strategy="group", group_size=32)),
    "W4 g32 asymmetric": ("pack-quantized", dict(num_bits=4, strategy="group", group_size=32, symmetric=False)),
    "W3 g32": ("pack-quantized", dict(num_bits=3, strategy="group", group_size=32)),
    "W8 channel": ("pack-quantized", dict(num_bits=8, strategy="channel")),
    "int8 channel": ("int-quantized", dict(num_bits=8, strategy="channel")),
    "int8 channel asymmetric": ("int-quantized", dict(num_bits=8, strategy="channel", symmetric=False)),
    "int8 tensor": ("int-quantized", dict(num_bits=8, strategy="tensor")),
    "int8 tensor asymmetric": ("int-quantized", dict(num_bits=8, strategy="tensor", symmetric=False)),
    "W4 tensor asymmetric": ("pack-quantized", dict(num_bits=4, strategy="tensor", symmetric=False)),
    "naive int8": ("naive-quantized", dict(num_bits=8, strategy="channel")),
    "fp8 channel": ("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
    "fp8 tensor": ("float-quantized", dict(num_bits=8, type="float", strategy="tensor")),
    "fp8 blocks": ("float-quantized", dict(num_bits=8, type="float", strategy="block", block_structure=[32, 32])),
    "nvfp4": ("nvfp4-pack-quantized", dict(num_bits=4, type="float", strategy="tensor_group", group_size=16)),
    "mxfp4": ("mxfp4-pack-quantized", dict(num_bits=4, type="float", strategy="group", group_size=32)),
}
IGNORED = ["lm_head", "re:.*layers.1.mlp.(up|down)_proj"]


def bounds(weight, args):
    """Smallest and largest weight that share a scale."""
    if args.strategy == "tensor":
        return weight.min(), weight.max()
    if args.strategy == "block":
        rows, columns = args.block_structure
        tiles = weight.reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    groups = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
    return groups.amin(-1), groups.amax(-1)


def write_compressed_tensors(plain, out, form, arguments):
    """apply_quantization_config, scales from the weights, ModelCompressor.compress_model, save_pretrained."""
    from compressed_tensors import quantization as ct
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    if form.startswith("mxfp4"):
        arguments = arguments | {"scale_dtype": torch.uint8}
    args = ct.QuantizationArgs(**arguments)
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=args)
    model = from_pretrained(plain)
    config = ct.QuantizationConfig(config_groups={"group_0": scheme}, format=form, ignore=IGNORED)
    ct.apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        options = {}
        if args.strategy == "tensor_group":
            module.weight_global_scale.data = (448 * 6 / module.weight.abs().max()).reshape(1).float()
            options["global_scale"] = module.weight_global_scale.data
        scale, zero = calculate_qparams(*bounds(module.weight.data, args), args, **options)
        for name, value in (("weight_scale", scale), ("weight_zero_point", zero)):
            if hasattr(module, name):
                parameter = getattr(module, name)
                parameter.data = value.reshape(parameter.shape).to(parameter.dtype)
        module.quantization_status = ct.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["config_groups"]["group_0"]["format"] == form


def decompressed(folder, mixed=False):
    """Weights as transformers has them when it decompresses a folder while loading.

    With several config groups it must decompress afterwards: the other way it takes the first group's for all. That way
    in turn cannot take zero points, which it expects unpacked.
    """
    if mixed:
        from compressed_tensors.compressors import ModelCompressor

        model = from_pretrained(folder)
        ModelCompressor.from_pretrained_model(model).decompress_model(model)
    else:
        model = from_pretrained(folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    return {name: array.float().numpy() for name, array in model.state_dict().items()}


@pytest.fixture
def quiet():
    pytest.importorskip("compressed_tensors")
    from loguru import logger

    logger.disable("compressed_tensors")  # "the provided format does not match the inferred one", for each module
    yield
    logger.enable("compressed_tensors")


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_loads_here(plain, tmp_path, agreement, quiet, name):
    form, arguments = SCHEMES[name]
    write_compressed_tensors(plain, tmp_path, form, arguments)
    ours = load(tmp_path)
    assert not is_record(ours.weights["model.layers.1.mlp.up_proj.weight"])
    through, note = (lambda array: array), "theirs loads here"
    if "fp4" in form:  # theirs is bfloat16
        through, note = (lambda array: BF16.decode(BF16.encode(array))), "theirs loads here; rounded to bfloat16 there"
    compare(agreement, ours, decompressed(tmp_path), "compressed-tensors", f"{form} {name}", note, through)


OURS = {
    "pack-quantized W4 g32": "rtn:bits=4,group=32,symmetric=true",
    "pack-quantized W4 g32 asymmetric": "rtn:bits=4,group=32",
    "pack-quantized W3 channel": "rtn:bits=3,group=-1,symmetric=true",
    "pack-quantized W8 tensor": "rtn:bits=8,group=0,symmetric=true",
    "pack-quantized W4 tensor asymmetric": "rtn:bits=4,group=0",
    "pack-quantized mixed": "rtn:group=32,symmetric=true,only=attn+rtn:bits=8,symmetric=true,only=mlp.up",
}


@pytest.mark.parametrize("name", [*OURS, "nvfp4-pack-quantized", "float-quantized fp8 channel"])
def test_ours_loads_in_compressed_tensors(plain, tmp_path, agreement, quiet, name):
    through = lambda array: array
    if name in OURS:
        ours = compress(load(plain), OURS[name])
        save(ours, tmp_path / "m", "compressed-tensors")
    elif name == "nvfp4-pack-quantized":
        convert(plain, tmp_path / "m", "NVFP4")
        ours, through = load(tmp_path / "m"), lambda array: BF16.decode(BF16.encode(array))
    else:
        write_compressed_tensors(plain, tmp_path / "first", *SCHEMES["fp8 channel"])
        ours = load(tmp_path / "first")
        save(ours, tmp_path / "m", "compressed-tensors")
    theirs = decompressed(tmp_path / "m", mixed="mixed" in name)
    compare(agreement, ours, theirs, "compressed-tensors", name, "ours loads there", through)


# ---------------------------------------------------------------- bitsandbytes

BITS = {
    "NF4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "NF4_DOUBLE": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "FP4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "INT8": dict(load_in_8bit=True),
}


def of_bitsandbytes(model):
    """Weights as bitsandbytes dequantises them."""
    import bitsandbytes.functional as bnb

    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        if type(weight).__name__ == "Params4bit":
            weight = bnb.dequantize_4bit(weight.data, weight.quant_state)
        elif weight.dtype == torch.int8:
            scale = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
            weight = bnb.int8_vectorwise_dequant(weight.data, scale)
        found[f"{name}.weight"] = weight.detach().float().numpy()
    return found


@needs_accelerate
@pytest.mark.parametrize("name", BITS)
def test_bitsandbytes_both_ways(plain, tmp_path, agreement, name):
    pytest.importorskip("bitsandbytes")
    theirs = from_pretrained(plain, quantization_config=transformers.BitsAndBytesConfig(**BITS[name]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    compare(agreement, ours, of_bitsandbytes(theirs), "bitsandbytes", name, "theirs loads here")
    save(ours, tmp_path / "again", "bitsandbytes")
    back = of_bitsandbytes(from_pretrained(tmp_path / "again"))
    compare(agreement, ours, back, "bitsandbytes", name, "theirs, stored again here, loads there")
    convert(plain, tmp_path / "ours", name)
    mine, back = load(tmp_path / "ours"), from_pretrained(tmp_path / "ours")
    compare(agreement, mine, of_bitsandbytes(back), "bitsandbytes", name, "ours loads there")
    with torch.no_grad():
        assert torch.isfinite(back(torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize("table", ["NF4", "FP4_BNB"])
@pytest.mark.parametrize("shape", [(1024, 1024), (999, 1001)])
def test_bitsandbytes_encodes_the_same_numbers(agreement, table, shape):
    bnb = pytest.importorskip("bitsandbytes.functional")
    W = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    record, kind = blockwise(W, table), {"NF4": "nf4", "FP4_BNB": "fp4"}[table]
    packed, state = bnb.quantize_4bit(torch.from_numpy(W), blocksize=64, quant_type=kind)
    assert np.array_equal(state.absmax.numpy(), record.scale[0])
    high_first = np.stack([packed.numpy().ravel() >> 4, packed.numpy().ravel() & 15], axis=1).reshape(-1)[: W.size]
    theirs, ours = high_first.reshape(shape), record.unpacked()
    # FP4 has two zeros, and bitsandbytes gives small numbers of one sign the second.
    zeros = ((theirs & 7) == 0) & ((ours & 7) == 0) if kind == "fp4" else np.zeros(shape, bool)
    different = (theirs != ours) & ~zeros
    note = "codes; the two zeros count as one" if kind == "fp4" else "codes"
    agreement("bitsandbytes", version("bitsandbytes"), table, compared=W.size, different=different.sum(), note=note)
    assert not different.any()


def test_bitsandbytes_int8_of_half_precision(agreement):
    bnb = pytest.importorskip("bitsandbytes.functional")
    W = np.random.default_rng(4).standard_normal((1024, 1024)).astype(np.float16)
    record = int8_rows(W)
    codes, scale, _ = bnb.int8_vectorwise_quant(torch.from_numpy(W.copy()))
    different = int((codes.numpy() != record.unpacked().view(np.int8)).sum())
    agreement("bitsandbytes", version("bitsandbytes"), "INT8", compared=W.size, different=different, note="codes")
    assert different == 0 and np.array_equal(scale.numpy(), record.scale[:, 0])


def test_blocks_across_the_ends_of_rows():
    """Flat blocks: its portable code agrees with refllm, its CPU kernel does not and misses the weight by far."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    default = pytest.importorskip("bitsandbytes.backends.default.ops")
    W = np.random.default_rng(5).standard_normal((64, 96)).astype(np.float32)
    packed, state = bnb.quantize_4bit(torch.from_numpy(W), blocksize=64, quant_type="nf4")
    arguments = (packed.reshape(-1), state.absmax, state.code, 64, W.shape, torch.float32)
    portable = default._dequantize_4bit_compute(*arguments).reshape(W.shape).numpy()
    assert np.array_equal(portable, blockwise(W).dense())
    step = np.abs(W).max() * 0.16  # half of the widest step of NF4
    assert np.abs(portable - W).max() < step
    kernel = bnb.dequantize_4bit(packed, state).numpy()
    assert np.abs(kernel - W).max() < step or version("bitsandbytes") == "0.50.2"


# ---------------------------------------------------------------- fp8


@needs_accelerate
def test_block_fp8_loads_there(tmp_path, agreement):
    # Multiples of 128 or less: for 200 rows and 2 scales, transformers 5.23 takes blocks of 100.
    save(random_model(**SIZES | {"intermediate_size": 256}), tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "m", "FP8")
    ours, theirs = load(tmp_path / "m"), from_pretrained(tmp_path / "m")
    weights = {name: array.float().numpy() for name, array in theirs.state_dict().items()}
    compare(agreement, ours, weights, "transformers", "fp8 blocks of 128", "ours loads there, dequantised on the CPU")


def test_block_fp8_by_torch(tmp_path, agreement):
    """The file read by torch alone: its E4M3 times the scales, smaller last blocks included."""
    safetensors = pytest.importorskip("safetensors.torch")
    save(random_model(**SIZES | {"intermediate_size": 200}), tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "m", "FP8")
    compared = different = 0
    tensors, ours = safetensors.load_file(tmp_path / "m" / "model.safetensors"), load(tmp_path / "m")
    for name, weight in ours.weights.items():
        if isinstance(weight, CodeWeight):
            scale = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            expected = tensors[name].float() * scale[: weight.shape[0], : weight.shape[1]]
            compared += expected.numel()
            different += int((expected.numpy() != weight.dense()).sum())
    agreement("torch", torch.__version__, "fp8 blocks of 128", compared, different, "ours, read by torch")
    assert compared and not different


def test_block_fp8_of_transformers_loads_here(plain, tmp_path, agreement):
    """transformers writes FP8 on a GPU only; its operation runs on the CPU, and its config class gives the keys."""
    from types import SimpleNamespace

    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    safetensors = pytest.importorskip("safetensors.torch")
    config = transformers.FineGrainedFP8Config(weight_block_size=(32, 64), modules_to_not_convert=["lm_head"])
    quantize = fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))
    tensors, expected = {}, {}
    for name, weight in safetensors.load_file(plain / "model.safetensors").items():
        tensors |= quantize.convert({name: weight}) if "proj" in name else {name: weight}
        if "proj" in name:
            scale = tensors[f"{name}_scale_inv"].repeat_interleave(32, 0).repeat_interleave(64, 1)
            weight = tensors[name].float() * scale
        expected[name] = weight.numpy()
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    described = json.loads((plain / "config.json").read_text()) | {"quantization_config": config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(described))
    compare(agreement, load(tmp_path), expected, "transformers", "fp8 blocks of 32 x 64", "theirs loads here")


# ---------------------------------------------------------------- gptq, awq: no CPU kernels, so names and config


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_transformers_understands_the_config(plain, tmp_path, form):
    save(compress(load(plain), "rtn:bits=4,group=32"), tmp_path / "m", form)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    cls = {"gptq": transformers.GPTQConfig, "awq": transformers.AwqConfig}[form]
    read = cls.from_dict(config)
    assert (read.bits, read.group_size, read.quant_method) == (4, 32, form)
    assert read.format == config.get("checkpoint_format", config.get("version"))
    tensors = read_safetensors(tmp_path / "m" / "model.safetensors")[0]
    down = {n.rsplit(".", 1)[1]: (t.dtype, t.shape) for n, t in tensors.items() if "layers.0.mlp.down_proj" in n}
    expected = {"qweight": ("I32", (16, 64)), "qzeros": ("I32", (4, 8)), "scales": ("F16", (4, 64))}
    expected |= {"g_idx": ("I32", (128,))} if form == "gptq" else {"qweight": ("I32", (128, 8))}
    assert down == expected


# ---------------------------------------------------------------- GGUF

WRITTEN = [name for name, form in BLOCKS.items() if not form.activations_only and name != "Q2_0"]  # newer than gguf-py


def test_gguf_files_of_every_type(tmp_path, agreement):
    """gguf-py reads the file; libgguf (ggml's own code) decodes it to the numbers that refllm runs."""
    gguf, libgguf = pytest.importorskip("gguf"), pytest.importorskip("libgguf")
    save(random_model(hidden_size=256, intermediate_size=256, head_dim=64), tmp_path / "native", "native")
    for type_name in WRITTEN:
        out = tmp_path / f"{type_name}.gguf"
        convert(tmp_path / "native", out, type_name)
        check_gguf(gguf, libgguf, out, type_name, agreement)


def test_gguf_files_of_a_recipe(plain, tmp_path, agreement):
    gguf, libgguf = pytest.importorskip("gguf"), pytest.importorskip("libgguf")
    for recipe, type_name in (
        ("rtn:bits=4,group=32,symmetric=true", "Q4_0"),
        ("rtn:bits=8,group=-1,symmetric=true", "Q8_0"),
    ):
        save(compress(load(plain), recipe), tmp_path / f"{type_name}.gguf", "gguf")
        check_gguf(gguf, libgguf, tmp_path / f"{type_name}.gguf", type_name, agreement)


def check_gguf(gguf, libgguf, path, type_name, agreement):
    reader, compared, different = gguf.GGUFReader(path), 0, 0
    ours = read_gguf(path).tensors
    for tensor in reader.tensors:
        if tensor.tensor_type.name != type_name:
            continue
        shape = tuple(reversed(tensor.shape.tolist()))
        rows = np.ascontiguousarray(tensor.data).reshape(shape[0], -1)
        theirs = libgguf.dequantize_rows(rows, int(tensor.tensor_type)).reshape(shape)
        mine = BLOCKS[type_name].decode(ours[tensor.name].stored())
        compared, different = compared + mine.size, different + int((mine != theirs).sum())
    agreement("libgguf", version("libgguf"), type_name, compared, different, "a file of this type")
    assert compared and not different


def test_the_state_of_bitsandbytes_by_itself(plain, tmp_path):
    """The arrays of our file, decoded by formats.checkpoints, are the record's numbers."""
    for name in ("NF4", "NF4_DOUBLE", "FP4"):
        convert(plain, tmp_path / name, name)
        tensors = read_safetensors(tmp_path / name / "model.safetensors")[0]
        for key, weight in load(tmp_path / name).weights.items():
            if isinstance(weight, CodeWeight):
                module = key.removesuffix("weight")
                own = {n.removeprefix(module): t.stored() for n, t in tensors.items() if n.startswith(module)}
                assert np.array_equal(bitsandbytes_dequantize(own), weight.dense())
