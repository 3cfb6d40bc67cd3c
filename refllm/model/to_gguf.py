"""A model -> a GGUF file. What `from_gguf` undoes is done here: names, rotary order, Gemma's w + 1."""

import os
from collections import Counter
from collections.abc import Callable

import numpy as np

from refllm.formats.blocks import BLOCKS
from refllm.formats.dtypes import BF16, FP16
from refllm.formats.gguf import write_gguf
from refllm.formats.gguf_vocab import tokenizer_to_gguf
from refllm.kernels.packed import encode_gguf
from refllm.kernels.packed.records import GGUFBlocks, Record, is_record
from refllm.kernels.rope import Rope, half_split_to_interleaved, inverse_frequencies
from refllm.model.config import ModelConfig
from refllm.model.from_gguf import GEMMA_FULL_EVERY, GEMMA_NORMS, GLOBAL_NAMES, LAYER_NAMES, MLP_NORMS
from refllm.model.model import Model
from refllm.model.quantized import fitting
from refllm.model.quantized.gguf_blocks import storable

GGUF_TYPES = ("F32", "F16", "BF16", *(name for name, form in BLOCKS.items() if not form.activations_only))
# What a matrix gets whose rows no block of the wanted type divides, as llama-quantize does it; F16 if that fails too.
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
}
# general.file_type
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14,
    "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39,
    "Q1_0": 40,
}  # fmt: skip
_FILE_TYPE_GUESSED = 1024


def to_gguf(model: Model, path: str | os.PathLike, type_name: str | None = "F32") -> dict[str, str]:
    """Write a model as a GGUF file; returns the matrices that had to get another type (see `convert`).

    Packed weights are written as blocks that hold exactly the same numbers; a ValueError names one for which there are
    none. `type_name` is what the others are encoded as; None: the narrowest of F16, BF16 and F32 that is exact.
    """
    config = model.config
    if config.special:
        raise ValueError(f"GGUF files of {config.architecture} ({config.special}) are not written; native can")
    architecture = "llama" if config.architecture == "mistral" else config.architecture
    names = _gguf_names(config)
    tensors, others = {}, {}
    for name, weight in model.weights.items():
        if is_record(weight):
            blocks = _blocks(weight, name)
            stored_type, array = blocks.type_name, blocks.data
        else:
            stored_type, array = None, weight.astype(np.float32, copy=False)
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_heads if ".q_proj." in name else config.num_kv_heads
            array = array[half_split_to_interleaved(heads, config.head_dim)]
        if name.endswith("norm.weight"):
            array = array + np.float32(config.norm_offset)
        if stored_type is None:
            wanted = type_name or narrowest_exact(array)
            stored_type = "F32" if array.ndim == 1 else fitting_type(wanted, array.shape[-1])
            if stored_type not in ("F32", wanted):
                others[name] = stored_type
            array = encode(array, stored_type, name)
        tensors[names(name)] = (stored_type, array)
    if (divisors := frequency_divisors(config.rope, config.head_dim)) is not None:
        tensors["rope_freqs.weight"] = ("F32", divisors)
    commonest = Counter(stored for stored, _ in tensors.values()).most_common(1)[0][0]
    metadata = _gguf_metadata(model, architecture, type_name or commonest)
    write_gguf(path, metadata, tensors)
    return others


def _blocks(record: Record, name: str) -> GGUFBlocks:
    try:
        return storable(record)
    except ValueError as error:
        raise ValueError(f"{name} cannot be stored as gguf: {error}; {fitting(record)} can") from None


def narrowest_exact(array: np.ndarray) -> str:
    """F16, BF16 or F32: the first that changes no number of a float32 array."""
    for name in ("F16", "BF16"):
        try:
            stored = encode(array, name, "")
        except ValueError:
            continue
        if np.array_equal(BF16.decode(stored) if name == "BF16" else stored.astype(np.float32), array):
            return name
    return "F32"


def fitting_type(type_name: str, columns: int) -> str:
    """This type if its blocks divide the rows, else the one of FALLBACKS, else F16."""
    for name in (type_name, FALLBACKS.get(type_name, "F16")):
        if name not in BLOCKS or columns % BLOCKS[name].block_size == 0:
            return name
    return "F16"


def encode(array: np.ndarray, type_name: str, name: str) -> np.ndarray:
    """float32 -> what a file of this type stores; a value beyond the type's range is a ValueError naming the tensor."""
    try:
        if type_name in BLOCKS:
            return encode_gguf(type_name, array)
        if type_name == "F32":
            return array
        form = {"BF16": BF16, "F16": FP16}[type_name]
        codes = form.encode(array, overflow="ieee")
        if not np.isfinite(form.decode(codes)).all():
            raise ValueError(f"a value is beyond the range of {type_name}")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return codes.view(np.float16) if type_name == "F16" else codes


def _gguf_names(config: ModelConfig) -> Callable[[str], str]:
    norms = GEMMA_NORMS if config.architecture == "gemma3" else MLP_NORMS
    layer = {new: old for old, new in (LAYER_NAMES | norms).items()}
    whole = {new: old for old, new in GLOBAL_NAMES.items()}

    def rename(name: str) -> str:
        if name in whole:
            return whole[name]
        _, _, number, rest = name.split(".", 3)
        stem, kind = rest.rsplit(".", 1)
        return f"blk.{number}.{layer[stem]}.{kind}"

    return rename


def frequency_divisors(rope: Rope, head_dim: int) -> np.ndarray | None:
    """What llama3 scaling divides the plain frequencies by, as GGUF stores it."""
    if rope.freq_divisors is not None:
        return np.asarray(rope.freq_divisors, np.float32)
    if rope.scaling != "llama3":
        return None
    return (inverse_frequencies(Rope(rope.theta), head_dim) / inverse_frequencies(rope, head_dim)).astype(np.float32)


def _gguf_metadata(model: Model, architecture: str, type_name: str) -> dict[str, object]:
    config, rope = model.config, model.config.rope
    own: dict[str, object] = {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": rope.theta,
        "vocab_size": config.vocab_size,
    }
    if rope.scaling in ("linear", "yarn"):
        own |= {"rope.scaling.type": rope.scaling, "rope.scaling.factor": rope.factor}
    if rope.scaling == "yarn":
        if rope.attention_factor is not None:
            raise ValueError("GGUF cannot say a yarn attention_factor of its own")
        own |= {"rope.scaling.original_context_length": rope.original_context}
        own |= {"rope.scaling.yarn_beta_fast": rope.beta_fast, "rope.scaling.yarn_beta_slow": rope.beta_slow}
    if config.sliding_window is not None:
        own["attention.sliding_window"] = config.sliding_window
        if config.sliding_layers != _usual_sliding(config):
            own["attention.sliding_window_pattern"] = np.array(config.sliding_layers)
    if config.rope_local is not None:
        if config.rope_local.scaling is not None:
            raise ValueError("GGUF cannot say a rope scaling of the sliding layers")
        own["rope.freq_base_swa"] = config.rope_local.theta
    for key, value in (
        ("attention.scale", config.attention_scale),
        ("attn_logit_softcapping", config.attention_softcap),
        ("final_logit_softcapping", config.logit_softcap),
    ):
        if value is not None:
            own[key] = float(value)
    metadata: dict[str, object] = {"general.architecture": architecture}
    metadata |= {
        "general.name": model.name or "model",
        "general.file_type": _FILE_TYPES.get(type_name, _FILE_TYPE_GUESSED),
    }
    if type_name in BLOCKS:
        metadata["general.quantization_version"] = 2
    metadata |= {f"{architecture}.{key}": value for key, value in own.items()}
    if model.tokenizer is None:
        return metadata | {"tokenizer.ggml.model": "no_vocab"} | _bare_ids(config)
    return metadata | tokenizer_to_gguf(model.tokenizer, config.vocab_size)


def _usual_sliding(config: ModelConfig) -> tuple[bool, ...]:
    """What a reader assumes of a file that gives a window but no pattern."""
    every = GEMMA_FULL_EVERY if config.architecture == "gemma3" else 0
    return tuple(not every or (layer + 1) % every != 0 for layer in range(config.num_layers))


def _bare_ids(config: ModelConfig) -> dict[str, int]:
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": next(iter(config.eos_token_ids), None)}
    return {f"tokenizer.ggml.{key}": value for key, value in ids.items() if value is not None}
