"""Quantised folders: every layout written here loads with the same numbers, bit for bit; nothing else loads quietly."""

import json

import numpy as np
import pytest

from refllm.cli import main
from refllm.formats.checkpoints import awq_gemv_pack, awq_unpack, gptq_pack
from refllm.formats.errors import FormatError
from refllm.formats.tensors import read_safetensors, write_safetensors
from refllm.kernels.grids import AffineGrid, SymmetricGrid
from refllm.kernels.packed import matmul
from refllm.kernels.packed.records import CodeWeight, IntWeight, Reordered, is_record
from refllm.methods.apply import compress
from refllm.model.convert import convert, save
from refllm.model.describe import describe
from refllm.model.llama import forward
from refllm.model.load import load
from tests.models import random_model

SIZES = dict(hidden_size=64, intermediate_size=96, num_kv_heads=2, head_dim=16)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model():
    return random_model(**SIZES)


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    save(model, tmp_path_factory.mktemp("plain") / "model", "native")
    out = tmp_path_factory.mktemp("plain") / "hf"
    convert(tmp_path_factory.getbasetemp() / "plain0" / "model", out)
    return out


def dense(weight):
    return weight if isinstance(weight, np.ndarray) else weight.dense()


def assert_same(found, expected):
    assert set(found.weights) == set(expected.weights)
    for name, weight in expected.weights.items():
        assert is_record(found.weights[name]) == is_record(weight), name
        assert np.array_equal(dense(found.weights[name]).view(np.int32), dense(weight).view(np.int32)), name


INTEGERS = [
    ("rtn:bits=4,group=32", "gptq"),
    ("rtn:bits=2,group=16", "gptq"),
    ("rtn:bits=8,group=-1", "gptq"),
    ("rtn:bits=3,group=32,symmetric=true", "gptq"),
    ("rtn:bits=4,group=0,symmetric=true", "gptq"),
    ("rtn:bits=4,group=32", "awq"),
    ("rtn:bits=4,group=-1,symmetric=true", "awq"),
    ("rtn:bits=4,group=32", "compressed-tensors"),
    ("rtn:bits=3,group=-1", "compressed-tensors"),
    ("rtn:bits=5,group=16,symmetric=true,scale_dtype=float32", "compressed-tensors"),
    ("rtn:bits=4,group=32,symmetric=true+rtn:bits=8,group=-1,only=lm_head", "compressed-tensors"),
    ("rtn:bits=4,group=32+rtn:bits=4,group=32,only=lm_head", "gptq"),
    ("rtn:bits=4,group=32+rtn:bits=4,group=32,only=lm_head", "awq"),
    ("rtn:bits=4,group=32,only=mlp", "awq"),
    ("rtn:bits=4,group=32,only=mlp", "compressed-tensors"),
    ("rtn:bits=4,group=32,symmetric=true", "gguf"),
    ("rtn:bits=5,group=-1,symmetric=true", "gguf"),
    ("rtn:bits=8,group=0,symmetric=true", "gguf"),
]


@pytest.mark.parametrize(("recipe", "form"), INTEGERS)
def test_integer_weights_come_back(model, tmp_path, recipe, form):
    small = compress(model, recipe)
    out = tmp_path / ("model.gguf" if form == "gguf" else "model")
    save(small, out, form)
    found = load(out)
    assert_same(found, small)
    assert found.config == small.config


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_columns_in_another_order(model, tmp_path, form):
    rng, weights = np.random.default_rng(1), dict(model.weights)
    small = compress(model, "rtn:bits=4,group=32")
    for name, weight in small.weights.items():
        if is_record(weight):
            order = rng.permutation(weight.columns).astype(np.int32)
            grid = AffineGrid(4, 32)
            sorted_columns = model.weights[name][:, order]
            scale, zero = grid.fit(sorted_columns)
            weights[name] = Reordered(
                IntWeight.pack(grid, grid.encode(sorted_columns, scale, zero), scale, zero), order
            )
            assert np.abs(weights[name].dense() - model.weights[name]).max() <= 0.51 * scale.max()  # in its own order
    small = type(model)(model.config, weights)
    save(small, tmp_path / "model", form)
    found = load(tmp_path / "model")
    assert_same(found, small)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    weight = found.weights[f"{Q}.weight"]
    expected = x.astype(np.float64) @ weight.dense().T.astype(np.float64)
    for activations, bound in (("float32", 1e-5), ("int8", 0.3)):
        assert np.abs(matmul(x, weight, activations) - expected).max() < bound


# The types of `convert` that are codes, and the layout that stores them.
ENCODED = {"NF4": "bitsandbytes", "NF4_DOUBLE": "bitsandbytes", "FP4": "bitsandbytes", "INT8": "bitsandbytes",
           "FP8": "fp8", "NVFP4": "compressed-tensors"}  # fmt: skip


@pytest.mark.parametrize("type_name", ENCODED)
def test_float_codes_come_back(model, plain, tmp_path, type_name):
    convert(plain, tmp_path / "first", type_name)
    first = load(tmp_path / "first")
    weight = first.weights[f"{Q}.weight"]
    assert isinstance(weight, CodeWeight) and weight.nbytes < 64 * 64 * 1.1
    error = np.abs(weight.dense() - model.weights[f"{Q}.weight"]).max()
    assert 0 < error < 0.2  # a quarter of the widest step of four bits
    save(first, tmp_path / "again", ENCODED[type_name])
    assert_same(load(tmp_path / "again"), first)
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert both[0] == both[1]
    save(first, tmp_path / "native")
    assert_same(load(tmp_path / "native"), first)


def test_a_packed_model_runs(model, plain, tmp_path):
    ids = np.arange(12) % 64
    for type_name in ENCODED:
        convert(plain, tmp_path / type_name, type_name)
        packed, unpacked = load(tmp_path / type_name), load(tmp_path / type_name, dense=True)
        assert np.abs(forward(packed, ids) - forward(unpacked, ids)).max() < 1e-4


def read(folder):
    """Arrays and dtypes of a folder, and its quantization_config."""
    tensors = read_safetensors(folder / "model.safetensors")[0]
    arrays = {name: tensor.stored() for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return arrays, dtypes, json.loads((folder / "config.json").read_text())


def write(folder, arrays, dtypes, config):
    kept = {name: dtypes[name] for name in arrays if name in dtypes}
    write_safetensors(folder / "model.safetensors", arrays, dtypes=kept)
    (folder / "config.json").write_text(json.dumps(config))


def test_gptq_by_the_words_of_the_file(model, tmp_path):
    save(compress(model, "rtn:bits=4,group=32"), tmp_path / "m", "gptq")
    arrays, _, config = read(tmp_path / "m")
    plus = {"gptq": 1, "gptq_v2": 0}[config["quantization_config"]["checkpoint_format"]]
    words, zeros, scales = (arrays[f"{DOWN}.{name}"].astype(np.int64) for name in ("qweight", "qzeros", "scales"))
    scales = arrays[f"{DOWN}.scales"]
    weight = load(tmp_path / "m").weights[f"{DOWN}.weight"].dense()
    for o in range(64):
        for i in range(96):
            code = int(words[i // 8, o]) >> 4 * (i % 8) & 15
            zero = (int(zeros[i // 32, o // 8]) >> 4 * (o % 8) & 15) + plus
            assert weight[o, i] == float(scales[i // 32, o]) * (code - zero)


def test_awq_by_the_words_of_the_file(model, tmp_path):
    save(compress(model, "rtn:bits=4,group=32"), tmp_path / "m", "awq")
    arrays, *_ = read(tmp_path / "m")
    words, zeros = (arrays[f"{DOWN}.{name}"] for name in ("qweight", "qzeros"))
    weight = load(tmp_path / "m").weights[f"{DOWN}.weight"].dense()
    nibble = [0, 4, 1, 5, 2, 6, 3, 7]  # of output 8 c + k
    for o in range(64):
        for i in range(96):
            code, zero = (int(w) >> 4 * nibble[o % 8] & 15 for w in (words[i, o // 8], zeros[i // 32, o // 8]))
            assert weight[o, i] == float(arrays[f"{DOWN}.scales"][i // 32, o]) * (code - zero)


@pytest.mark.parametrize("group", [32, -1])
def test_awq_gemv(tmp_path, group):
    """Read like the same weights in gemm; what is written is gemm."""
    model = random_model(hidden_size=64, intermediate_size=128, num_kv_heads=2, head_dim=16)
    small = compress(model, f"rtn:bits=4,group={group}")
    save(small, tmp_path / "m", "awq")
    arrays, dtypes, config = read(tmp_path / "m")
    for name in [name for name in arrays if name.endswith("qweight")]:
        module = name.removesuffix(".qweight")
        tensors = {key: arrays[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales")}
        codes, scale, zero, _ = awq_unpack(tensors)
        arrays |= {f"{module}.{key}": array for key, array in awq_gemv_pack(codes, scale, zero).items()}
    config["quantization_config"]["version"] = "GEMV"
    write(tmp_path / "m", arrays, dtypes, config)
    found = load(tmp_path / "m")
    assert_same(found, small)
    assert "along in" in describe(tmp_path / "m")["conventions"]["packing"]
    save(found, tmp_path / "again", "awq")
    assert read(tmp_path / "again")[2]["quantization_config"]["version"] == "gemm"


def test_the_older_file_of_gptq(model, tmp_path):
    small = compress(model, "rtn:bits=4,group=32")
    save(small, tmp_path / "m", "gptq")
    config = json.loads((tmp_path / "m/config.json").read_text())
    quantization = config.pop("quantization_config")
    quantization.pop("quant_method")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/quantize_config.json").write_text(json.dumps(quantization))
    assert_same(load(tmp_path / "m"), small)


def test_a_zero_point_0_needs_v2(model, tmp_path):
    weights = dict(model.weights)
    weights[f"{Q}.weight"] = np.abs(weights[f"{Q}.weight"])
    small = compress(type(model)(model.config, weights), "rtn:bits=4,group=32")
    save(small, tmp_path / "m", "gptq")
    assert read(tmp_path / "m")[2]["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert_same(load(tmp_path / "m"), small)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("stored", "label"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_a_label_that_lies(tmp_path, bits, stored, label):
    model = random_model(**SIZES)
    save(compress(model, f"rtn:bits={bits},group=32,symmetric=true"), tmp_path / "m", "gptq")
    arrays, dtypes, config = read(tmp_path / "m")
    for name in [name for name in arrays if name.endswith("qzeros")]:
        scale = arrays[name.replace("qzeros", "scales")].T
        arrays[name] = gptq_pack(np.zeros((len(scale), 96), int), scale[:, :1], bits=bits, checkpoint_format=stored)[
            "qzeros"
        ]
        arrays[name] = np.repeat(arrays[name], scale.shape[1], axis=0)
    config["quantization_config"]["checkpoint_format"] = label
    write(tmp_path / "m", arrays, dtypes, config)
    with pytest.raises(FormatError, match=f"the label lies.*write checkpoint_format '{stored}'"):
        load(tmp_path / "m")
    assert "the label lies" in describe(tmp_path / "m")["reason"]
    config["quantization_config"]["checkpoint_format"] = stored
    write(tmp_path / "m", arrays, dtypes, config)
    load(tmp_path / "m")


def one_for_all(folder, form="pack-quantized"):
    """A folder with one scale and zero point a tensor, from one whose rows all have the same."""
    arrays, dtypes, config = read(folder)
    for name in [name for name in arrays if name.endswith("weight_scale")]:
        module = name.removesuffix(".weight_scale")
        arrays[name] = arrays[name][:1].reshape(1)
        zero = arrays[f"{module}.weight_zero_point"][0, 0] & 15
        arrays[f"{module}.weight_zero_point"] = np.int8([zero - 8])
        dtypes[f"{module}.weight_zero_point"] = "I8"
        if form == "int-quantized":
            rows, columns = arrays.pop(f"{module}.weight_shape")
            words = arrays.pop(f"{module}.weight_packed").view(np.uint8)
            codes = np.stack([words & 15, words >> 4], axis=-1).reshape(rows, -1)[:, :columns]
            arrays[f"{module}.weight"], dtypes[f"{module}.weight"] = codes.astype(np.int8) - np.int8(8), "I8"
    config["quantization_config"]["format"] = form
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["format"], group["weights"]["strategy"] = form, "tensor"
    write(folder, arrays, dtypes, config)


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_one_scale_and_zero_point_a_tensor(model, tmp_path, form):
    small = compress(model, "rtn:bits=4,group=0")
    save(small, tmp_path / "m", "compressed-tensors")
    one_for_all(tmp_path / "m", form)
    assert_same(load(tmp_path / "m"), small)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("weight_zero_point", None, "symmetric = false, but there is no weight_zero_point"),
        ("weight_zero_point", np.int8([0, 0]), r"needs one weight_zero_point, I8 of -8..7, got I8 of shape \(2,\)"),
        ("weight_zero_point", np.int8([8]), r"got I8 of shape \(1,\): 8"),
        ("weight_zero_point", np.int32([8]), "got I32"),
        ("weight_scale", np.float32([1, 1]), r"needs one weight_scale, got \(2,\)"),
        ("weight_scale", None, "needs one weight_scale, got none"),
    ],
)
def test_one_scale_and_zero_point_a_tensor_that_are_wrong(model, tmp_path, name, value, why):
    save(compress(model, "rtn:bits=4,group=0"), tmp_path / "m", "compressed-tensors")
    one_for_all(tmp_path / "m")
    arrays, dtypes, config = read(tmp_path / "m")
    del arrays[f"{Q}.{name}"], dtypes[f"{Q}.{name}"]
    write(tmp_path / "m", arrays | ({} if value is None else {f"{Q}.{name}": value}), dtypes, config)
    with pytest.raises(FormatError, match=f"{Q}: .*{why}"):
        load(tmp_path / "m")


def change(key, value):
    def edit(arrays, config):
        config["quantization_config"][key] = value

    return edit


def change_weights(key, value):
    def edit(arrays, config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value

    return edit


def drop(name):
    return lambda arrays, config: arrays.pop(f"{Q}.{name}")


def replace(name, value):
    def edit(arrays, config):
        arrays[f"{Q}.{name}"] = value(arrays[f"{Q}.{name}"])

    return edit


def add_weight(arrays, config):
    arrays[f"{Q}.weight"] = np.zeros((64, 64), np.float32)


def only_weight(arrays, config):
    for name in [name for name in arrays if name.startswith(f"{Q}.")]:
        del arrays[name]
    add_weight(arrays, config)


BAD = [
    ("gptq", change("quant_method", "spqr"), r"quant_method must be one of gptq, awq.*got 'spqr'"),
    ("gptq", change("quant_method", None), "got None"),
    ("gptq", change("rotation", "hadamard"), "rotation = 'hadamard' is not supported"),
    ("gptq", change("new_key", 1), "keys that are not understood: new_key"),
    ("gptq", change("bits", 5), "bits = 5 is not supported"),
    ("gptq", change("bits", True), "bits = True"),
    ("gptq", change("checkpoint_format", "marlin"), "checkpoint_format = 'marlin'"),
    ("gptq", change("group_size", 64), f"{Q}: group_size 64 of 64 inputs makes 1 groups, the scales have 2"),
    ("gptq", change("sym", True), "the config says symmetric, but a zero point is"),
    ("gptq", change("lm_head", True), "the config says lm_head is quantised, but its weight is F32"),
    ("gptq", change("modules_in_block_to_quantize", [["mlp.up_proj"]]), f"leaves {Q} in floats, but there are"),
    ("gptq", drop("qweight"), f"{Q}: qweight is missing"),
    ("gptq", drop("qzeros"), f"{Q}: qzeros is missing"),
    ("gptq", drop("scales"), f"{Q}: scales is missing"),
    ("gptq", replace("g_idx", lambda a: a[::-1].copy()), "g_idx is not in order although desc_act is false"),
    ("gptq", replace("g_idx", lambda a: np.where(a < 2, 0, a).astype(np.int32)), "groups must be equally long"),
    ("gptq", replace("g_idx", lambda a: a + 1), "g_idx names groups"),
    ("gptq", replace("qweight", lambda a: a[:-1].copy()), Q),
    ("gptq", replace("qweight", lambda a: a.astype(np.int64)), "qweight must be I32, got I64"),
    ("gptq", replace("scales", lambda a: a * np.float16("nan")), "NaN"),
    ("gptq", add_weight, f"{Q} is stored twice"),
    ("gptq", only_weight, f"the config says {Q} is quantised, but its weight is F32"),
    ("awq", change("version", "gemv_fast"), "version = 'gemv_fast' is not supported"),
    ("awq", change("version", "gemv"), f"{Q}: AWQ .gemv. stores"),
    ("awq", change("bits", 8), "bits = 8"),
    ("awq", change("zero_point", False), "the config says symmetric, but a zero point is"),
    ("awq", change("w_bit", 3), "w_bit = 3"),
    ("awq", change("q_group_size", 64), "contradict each other"),
    ("awq", change("modules_to_not_convert", ["q_proj"]), f"leaves {Q} in floats"),
    ("awq", change("modules_to_not_convert", ["("]), "is no pattern"),
    ("awq", replace("qzeros", lambda a: a[:1].copy()), Q),
    ("compressed-tensors", change("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme = .* is not supported"),
    ("compressed-tensors", change("quantization_status", "frozen"), "quantization_status = 'frozen'"),
    ("compressed-tensors", change("format", "marlin-24"), "format = 'marlin-24'"),
    ("compressed-tensors", change("ignore", ["re:("]), "is no pattern"),
    ("compressed-tensors", change("ignore", ["lm_head", "re:.*self_attn.*"]), f"leaves {Q} in floats"),
    ("compressed-tensors", change("ignore", ["LlamaAttention"]), "names a class of modules"),
    ("compressed-tensors", change("config_groups", {}), "config_groups = {}"),
    ("compressed-tensors", change_weights("num_bits", 3), "weight_packed"),
    ("compressed-tensors", change_weights("group_size", 0), "needs a group_size"),
    ("compressed-tensors", change_weights("symmetric", True), "symmetric = true, but there is a weight_zero_point"),
    ("compressed-tensors", change_weights("type", "float"), "does not hold 4-bit float"),
    ("compressed-tensors", change_weights("mystery", 1), "group_0: keys that are not understood: mystery"),
    ("compressed-tensors", drop("weight_shape"), f"{Q}: weight_shape is missing"),
    ("compressed-tensors", drop("weight_zero_point"), "there is no weight_zero_point"),
    ("compressed-tensors", replace("weight_shape", lambda a: a[::-1] * 2), Q),
    ("NF4_DOUBLE", change("load_in_8bit", True), "exactly one of"),
    ("NF4_DOUBLE", change("bnb_4bit_quant_type", "fp4"), f"{Q}: the config says fp4"),
    ("NF4_DOUBLE", change("bnb_4bit_use_double_quant", False), "scales are quantised"),
    ("NF4_DOUBLE", change("bnb_4bit_quant_storage", "bfloat16"), "bnb_4bit_quant_storage = 'bfloat16'"),
    ("NF4_DOUBLE", drop("weight.nested_absmax"), "nested_absmax is missing"),
    ("NF4_DOUBLE", drop("weight.quant_state.bitsandbytes__nf4"), "quant_state"),
    ("NF4_DOUBLE", replace("weight.absmax", lambda a: a[:-1].copy()), "weight.absmax must have 64 numbers"),
    ("INT8", drop("SCB"), "SCB is missing"),
    ("INT8", replace("weight_format", lambda a: a + 1), "weight_format"),
    ("FP8", change("weight_block_size", [64, 64]), "weight_scale_inv of a weight"),
    ("FP8", change("weight_block_size", None), "weight_block_size = None"),
    ("FP8", change("fmt", "e5m2"), "fmt = 'e5m2'"),
    ("FP8", drop("weight_scale_inv"), "weight_scale_inv is missing"),
    ("FP8", replace("weight", lambda a: a.view(np.int8)), "weight must be F8_E4M3, got I8"),
    ("FP8", replace("weight", lambda a: a | 0x7F), "codes hold NaN or Inf of FP8_E4M3FN"),
    ("NVFP4", drop("weight_global_scale"), "weight_global_scale is missing"),
    ("NVFP4", replace("weight_global_scale", lambda a: a * 0), "weight_global_scale must be positive"),
]  # fmt: skip


@pytest.fixture(scope="module")
def written(model, plain, tmp_path_factory):
    """Arrays, dtypes and config of one folder of every form."""
    place, forms = tmp_path_factory.mktemp("forms"), {}
    small = compress(model, "rtn:bits=4,group=32")
    for form in ("gptq", "awq", "compressed-tensors"):
        save(small, place / form, form)
        forms[form] = read(place / form)
    for type_name in ("NF4_DOUBLE", "INT8", "FP8", "NVFP4"):
        convert(plain, place / type_name, type_name)
        forms[type_name] = read(place / type_name)
    return forms


@pytest.mark.parametrize(("form", "edit", "message"), BAD)
def test_bad_folders_are_named(written, tmp_path, form, edit, message):
    arrays, dtypes, config = written[form]
    arrays, dtypes, config = dict(arrays), dict(dtypes), json.loads(json.dumps(config))
    before = dict(arrays)
    edit(arrays, config)
    for name, array in arrays.items():  # a changed array has the dtype it now has
        if before.get(name) is not array and array.dtype != before.get(name, array).dtype:
            dtypes.pop(name, None)
    write(tmp_path, arrays, dtypes, config)
    with pytest.raises(FormatError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_what_a_layout_cannot_store(model, tmp_path):
    cases = [
        ("rtn:bits=4,group=32", "bitsandbytes", "q_proj.weight cannot be stored as bitsandbytes.*native, gptq, awq"),
        ("rtn:bits=4,group=32", "fp8", "cannot be stored as fp8"),
        ("rtn:bits=3,group=32", "awq", "3 bits; 4 can be stored; native, gptq, compressed-tensors can"),
        ("rtn:bits=5,group=32", "gptq", "5 bits; 2, 3, 4 or 8 can be stored; native, compressed-tensors can"),
        ("rtn:bits=4,group=32,scale_dtype=float32", "gptq", "scales are stored as float16"),
        ("rtn:bits=4,group=32,only=mlp", "gptq", "q_proj.weight is not quantised"),
        ("rtn:bits=4,group=32,only=attn+rtn:bits=8,group=32,only=mlp", "gptq", "proj.weight has bits=8.* one setting"),
        ("rtn:bits=4,group=32,only=embed", "gptq", "embed_tokens.weight is packed"),
        ("wanda:pattern=2:4", "compressed-tensors", "2:4 sparse values"),
        ("rtn:bits=4,group=32", "gguf", "q_proj.weight cannot be stored as gguf: Q4_1 stores scale times zero point"),
        ("rtn:bits=3,group=32,symmetric=true", "gguf", "hold 4, 5 and 8 bits"),
        ("rtn:bits=4,group=16,symmetric=true", "gguf", "blocks have 32 columns, its groups 16"),
    ]  # fmt: skip
    for recipe, form, message in cases:
        out = tmp_path / ("m.gguf" if form == "gguf" else "m")
        small = compress(model, recipe, np.arange(64) if "wanda" in recipe else None)
        with pytest.raises(ValueError, match=message):
            save(small, out, form)
        assert not out.exists()
    with pytest.raises(ValueError, match="no linear is packed"):
        save(model, tmp_path / "m", "awq")
    with pytest.raises(ValueError, match=r"must end in \.gguf"):
        save(model, tmp_path / "m", "gguf")


def test_floats_beside_the_codes_get_the_narrowest_type_that_is_exact(model, tmp_path):
    weights = {name: w.astype(np.float16).astype(np.float32) for name, w in model.weights.items()}
    half = compress(type(model)(model.config, weights), "rtn:bits=4,group=32")
    save(half, tmp_path / "m", "awq")
    _, dtypes, config = read(tmp_path / "m")
    assert dtypes["model.embed_tokens.weight"] == "F16" and config["torch_dtype"] == "float16"
    assert_same(load(tmp_path / "m"), half)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("gptq", {"zero point": "v1", "group size": "32", "packing": "along in", "column order": "as stored"}),
        ("awq", {"zero point": "as they are", "packing": "0,2,4,6,1,3,5,7"}),
        ("compressed-tensors", {"format": "pack-quantized", "zero point": "along out", "ignored modules": "lm_head"}),
        ("NF4_DOUBLE", {"format": "nf4, double", "packing": "high nibble first", "ignored modules": "lm_head"}),
        ("FP8", {"group size": "128 x 128", "packing": "multiplies", "activations": "as floats"}),
    ],
)
def test_inspect_names_the_conventions(written, tmp_path, form, expected, capsys):
    write(tmp_path, *written[form])
    report = describe(tmp_path)
    assert report["reason"] is None and report["conventions"]["rope layout"] == "half-split pairs"
    for name, text in expected.items():
        assert text in report["conventions"][name]
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name}: {report['conventions'][name]}\n" in out for name in expected)


def test_the_command_line(plain, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["compress", str(plain), str(out), "--recipe", "rtn:bits=4,group=32", "--format", "awq"]) == 0
    assert load(out).weights[f"{Q}.weight"].kind == "int"
    assert main(["compress", str(plain), str(tmp_path / "x"), "--recipe", "rtn:group=32", "--format", "fp8"]) == 1
    assert "cannot be stored as fp8" in capsys.readouterr().err
    assert main(["convert", str(plain), str(tmp_path / "nf4"), "--type", "nf4"]) == 0


def test_symmetric_codes_need_no_zero_points(model, tmp_path):
    save(compress(model, "rtn:bits=4,group=32,symmetric=true"), tmp_path / "m", "awq")
    weight = load(tmp_path / "m").weights[f"{Q}.weight"]
    assert weight.zero_point is None and weight.grid == SymmetricGrid(4, 32)
