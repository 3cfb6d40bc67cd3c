"""The native folder: every bit comes back, every tampering is one line, a failed write leaves nothing."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from refllm.formats import tensors
from refllm.formats.errors import FormatError
from refllm.formats.tensors import read_safetensors, write_safetensors
from refllm.formats.tokenizer import Tokenizer
from refllm.kernels.packed.records import VectorWeight, is_record, meta, parts
from refllm.methods.apply import compress
from refllm.model.llama import forward
from refllm.model.native import load_native, save_native
from tests.models import ARCHITECTURES, random_model

IDS = np.random.default_rng(0).integers(0, 64, 30)
RECIPES = (
    "rtn:group=16",
    "rtn:bits=8,group=-1,symmetric=true",
    "rtn:bits=3,group=0,scale_dtype=float32",
    "rtn:group=16,only=embed_tokens",
    "wanda",
    "wanda:pattern=2:4",
    "svd:rank=9",
    "wanda:pattern=2:4+rtn:group=8",
    "wanda:sparsity=0.5+rtn:group=8",
    "svd:rank=8+rtn:bits=8,group=8",
    "svd:rank=8+magnitude",
    "rtn:group=16,only=mlp+svd:rank=8,only=attn",
)


def small_model(recipe="rtn:group=16", architecture="llama", **overrides):
    return compress(random_model(architecture, **overrides), recipe, IDS)


def assert_same_weights(a, b):
    assert list(a) == list(b)
    for name, weight in a.items():
        if is_record(weight):
            assert weight.kind == b[name].kind and meta(weight) == meta(b[name])
            arrays, others = parts(weight), parts(b[name])
        else:
            arrays, others = {"": weight}, {"": b[name]}
        assert arrays.keys() == others.keys()
        for part, array in arrays.items():
            other = others[part]
            assert (array.dtype, array.shape, array.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_record_comes_back_bit_for_bit(recipe, tmp_path):
    model = small_model(recipe)
    assert save_native(model, tmp_path / "m") == tmp_path / "m"
    back = load_native(tmp_path / "m")
    assert_same_weights(model.weights, back.weights)
    assert (back.config, back.name, back.recipe) == (model.config, model.name, model.recipe)
    np.testing.assert_array_equal(forward(back, IDS), forward(model, IDS))


def test_vectors_of_codebooks_come_back(tmp_path):
    model, rng = random_model(), np.random.default_rng(0)
    for layer in range(model.config.num_layers):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        rows, columns = model.weights[name].shape
        codes = rng.integers(0, 300, (rows, columns // 4, 2))
        books = rng.standard_normal((2, 2, 300, 4), np.float32).astype(np.float16)
        model.weights[name] = VectorWeight.pack(codes, books, np.ones((rows, 1), np.float16))
    save_native(model, tmp_path / "m")
    back = load_native(tmp_path / "m")
    assert_same_weights(model.weights, back.weights)
    np.testing.assert_array_equal(forward(back, IDS), forward(model, IDS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_config_and_both_dense_types_come_back(architecture, dtype, tmp_path):
    model = small_model("rtn:bits=8,group=-1", architecture, dtype=dtype)
    save_native(model, tmp_path / "m")
    back = load_native(tmp_path / "m")
    assert back.config == model.config and hash(back.config) == hash(model.config)
    assert_same_weights(model.weights, back.weights)


def test_ropes_with_tuples_come_back(tmp_path):
    from refllm.kernels.rope import Rope

    rope = Rope(theta=1e4, freq_divisors=(1.0, 1.5, 2.0, 4.0))
    model = random_model(rope=rope)
    save_native(model, tmp_path / "m")
    assert load_native(tmp_path / "m").config.rope == rope


def test_same_model_same_bytes_and_the_file_is_what_reports_count(tmp_path):
    model = small_model("wanda:pattern=2:4+rtn:group=8")
    for folder in "ab":
        save_native(model, tmp_path / folder)
    for name in ("refllm.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    stored = read_safetensors(tmp_path / "a" / "model.safetensors")[0]
    assert sum(t.nbytes for t in stored.values()) == sum(weight.nbytes for weight in model.weights.values())


def test_the_tokenizer_travels_along(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    vocabulary = {"a": 0, "b": 1, "ab": 2, "</s>": 3}
    backend = Backend(BPE(vocabulary, [("a", "b")]))
    model = replace(small_model(), tokenizer=Tokenizer(backend, eos_token_ids=(3,)))
    save_native(model, tmp_path / "m")
    back = load_native(tmp_path / "m").tokenizer
    assert back.encode("abba") == model.tokenizer.encode("abba") == [2, 1, 0]
    assert back.eos_token_ids == (3,)
    save_native(replace(model, tokenizer=None), tmp_path / "m", overwrite=True)
    assert load_native(tmp_path / "m").tokenizer is None  # the old tokenizer.json is gone


# --- writing ---------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Like Ctrl-C: not an Exception."""


def failing(error):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["fsync", "description", "tokenizer"])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_write_leaves_what_was_there(error, where, existing, tmp_path, monkeypatch):
    """fsync is called inside the tensor file and again inside refllm.json; the folder is renamed only after both."""
    model, old = small_model(), small_model("svd:rank=8")
    if existing:
        save_native(old, tmp_path / "m")
    if where == "fsync":
        monkeypatch.setattr("refllm.formats.files.os.fsync", failing(error))
    elif where == "description":
        monkeypatch.setattr("refllm.model.native.json.dump", failing(error))
    else:
        backend = type("Broken", (), {"save": failing(error)})()
        model = replace(model, tokenizer=backend)
    with pytest.raises(type(error)):
        save_native(model, tmp_path / "m", overwrite=existing)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["m"] if existing else [])
    if existing:
        assert_same_weights(load_native(tmp_path / "m").weights, old.weights)


def test_a_half_written_tensor_file_leaves_nothing(tmp_path, monkeypatch):
    """The disk fills after some tensors."""
    calls = []

    def some_then_full(array, *arguments, **options):
        calls.append(array)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return np_contiguous(array)

    np_contiguous = np.ascontiguousarray
    model = small_model()
    monkeypatch.setattr(tensors.np, "ascontiguousarray", some_then_full)
    with pytest.raises(OSError, match=r"No space left on device.*nothing was left behind") as caught:
        save_native(model, tmp_path / "m")
    monkeypatch.undo()
    assert len(calls) == 4 and os.listdir(tmp_path) == []
    assert "\n" not in str(caught.value)


def test_only_model_folders_are_replaced(tmp_path):
    model = small_model()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not empty and not a model folder"):
        save_native(model, tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "keep me"
    save_native(model, tmp_path / "m")
    with pytest.raises(FileExistsError, match="already holds a model"):
        save_native(model, tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        save_native(model, tmp_path / "file")


# --- tampering -------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "m"
    save_native(small_model("wanda:pattern=2:4,only=attn+rtn:group=8,only=attn+rtn:group=16,only=mlp"), folder)
    document = json.loads((folder / "refllm.json").read_text())
    arrays = {name: t.stored() for name, t in read_safetensors(folder / "model.safetensors")[0].items()}
    return document, arrays


def edited(change):
    """Apply `change(document, arrays)` to deep copies."""

    def apply(saved):
        document, arrays = json.loads(json.dumps(saved[0])), dict(saved[1])
        change(document, arrays)
        return document, arrays

    return apply


def put(*path, value):
    def change(document, arrays):
        at = document
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


def drop(*path):
    def change(document, arrays):
        at = document
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return change


def array(name, value=None, rename=None):
    """Replace an array by value(array), rename it, or (neither) remove it."""

    def change(document, arrays):
        old = arrays.pop(name)
        if value is not None or rename is not None:
            arrays[rename or name] = old if value is None else value(old)

    return change


TAMPERED = {
    "another version": (put("format", value="refllm/2"), "format 'refllm/2' is not 'refllm/1'"),
    "no version": (drop("format"), "format None is not 'refllm/1'"),
    "no weights": (drop("weights"), "exactly format .*, weights .dict. are expected"),
    "an unknown key": (put("extra", value=1), "exactly format .* got format, .*extra"),
    "a recipe that is no text": (put("recipe", value=5), "recipe .str."),
    "weights that are a list": (put("weights", value=[]), "weights .dict."),
    "no config": (put("config", value={}), "bad config"),
    "an unknown config field": (put("config", "flavour", value=1), "bad config: .*flavour"),
    "a config of wrong size": (put("config", "hidden_size", value=64), "has shape .*the config calls for"),
    "a size that is no integer": (put("config", "num_layers", value="2"), "bad config: config num_layers must be a"),
    "a rope that is a number": (put("config", "rope", value=7), "bad config"),
    "a rope that is null": (put("config", "rope", value=None), "bad config"),
    "no rope": (drop("config", "rope"), "bad config"),
    "a rope of negative theta": (put("config", "rope", "theta", value=-1.0), "bad config: rope theta"),
    "more layers than weights": (put("config", "num_layers", value=3), "the checkpoint lacks model.layers.2"),
    "fewer layers": (put("config", "num_layers", value=1), "tensors the config does not call for: model.layers.1"),
    "an unknown kind": (put("weights", Q, "kind", value="int5"), f"weight {Q}: unknown kind of packed weight 'int5'"),
    "a kind that is a list": (put("weights", Q, "kind", value=[]), "unknown kind of packed weight"),
    "no kind": (drop("weights", Q, "kind"), "unknown kind of packed weight None"),
    "a nested kind": (put("weights", Q, "values", "kind", value="bitmask"), f"weight {Q}: sparse24|bitmask"),
    "a described weight too many": (put("weights", "ghost", value=None), "tensor ghost is missing"),
    "a description that is text": (put("weights", Q, value="int"), "must be described by an object or null"),
    "missing meta": (drop("weights", Q, "columns"), "meta 'columns' must be int, got None"),
    "extra meta": (put("weights", Q, "color", value=1), "unexpected color"),
    "bits that are text": (put("weights", Q, "values", "bits", value="4"), "meta 'bits' must be int, got '4'"),
    "bits that are true": (put("weights", Q, "values", "bits", value=True), "meta 'bits' must be int, got True"),
    "other bits": (put("weights", Q, "values", "bits", value=8), "codes must be uint8"),
    "a group that does not divide": (put("weights", Q, "values", "group_size", value=5), "5 does not divide the 16"),
    "a missing dense tensor": (array(NORM), f"tensor {NORM} is missing"),
    "a missing part": (array(Q + ".indices"), f"weight {Q}: sparse24: part 'indices' is missing"),
    "a missing nested part": (array(Q + ".values.scale"), f"weight {Q}: int: part 'scale' is missing"),
    "an extra part": (array(NORM, rename=Q + ".more"), "is missing|unexpected more"),
    "an undescribed tensor": (
        lambda document, arrays: arrays.update(other=np.zeros(2, np.float32)),
        "tensors that refllm.json does not describe: other",
    ),
    "an extra nested part": (
        lambda document, arrays: arrays.update({Q + ".values.more": np.zeros(2, np.float32)}),
        f"weight {Q}: int: unexpected more",
    ),
    "codes of another dtype": (array(Q + ".values.codes", lambda a: a.astype(np.int16)), "codes must be uint8"),
    "codes of another shape": (array(Q + ".values.codes", lambda a: a[:, 1:]), "codes must be uint8"),
    "scales of another dtype": (array(Q + ".values.scale", lambda a: a.astype(np.float64)), "scale must be float16"),
    "scales that are NaN": (array(Q + ".values.scale", lambda a: a * np.float16(np.nan)), "scale holds NaN"),
    "impossible indices": (array(Q + ".indices", lambda a: a * 0), "two different columns in ascending order"),
    "a float16 norm": (array(NORM, lambda a: a.astype(np.float16)), f"weight {NORM} must be finite float32 or float64"),
    "a norm that is NaN": (array(NORM, lambda a: a * np.float32(np.nan)), f"weight {NORM} must be finite"),
    "a norm of another shape": (array(NORM, lambda a: a[1:]), rf"{NORM} has shape \(31,\)"),
    "an empty name": (put("weights", "", value=None), "tensor  is missing"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_one_line(what, saved, tmp_path):
    change, message = TAMPERED[what]
    document, arrays = edited(change)(saved)
    assert (document, set(arrays)) != (saved[0], set(saved[1])) or any(arrays[n] is not saved[1][n] for n in arrays)
    (tmp_path / "refllm.json").write_text(json.dumps(document))
    write_safetensors(tmp_path / "model.safetensors", arrays)
    with pytest.raises(FormatError, match=message) as caught:
        load_native(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_untampered_folder_loads(saved, tmp_path):
    (tmp_path / "refllm.json").write_text(json.dumps(saved[0]))
    write_safetensors(tmp_path / "model.safetensors", saved[1])
    assert len(load_native(tmp_path).weights) == len(saved[0]["weights"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "refllm/1", "format": "refllm/1"}', "\x00", '{"a": NaN}'])
def test_a_description_that_is_no_json_is_one_line(text, saved, tmp_path):
    (tmp_path / "refllm.json").write_text(text)
    with pytest.raises(FormatError) as caught:
        load_native(tmp_path)
    assert "\n" not in str(caught.value) and "refllm.json" in str(caught.value)


def test_a_truncated_tensor_file_names_the_byte(saved, tmp_path):
    (tmp_path / "refllm.json").write_text(json.dumps(saved[0]))
    write_safetensors(tmp_path / "model.safetensors", saved[1])
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(FormatError, match="byte"):
        load_native(tmp_path)
