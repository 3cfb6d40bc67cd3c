"""A random Llama whose tokens are the 256 bytes, "ZZ", BOS and EOS: all a command needs, in milliseconds."""

from dataclasses import replace

from refllm.formats.tokenizer import Tokenizer
from tests.models import random_model


def byte_tokenizer(add_bos: bool = True) -> Tokenizer:
    """Byte-level BPE with one merge: one id a byte, "ZZ" = 256, <bos> = 257 and <eos> = 258."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "ZZ"])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[("Z", "Z")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    return Tokenizer(backend, 257, [258], add_bos=add_bos)


def byte_model(add_bos: bool = True, **overrides):
    """A random Llama over bytes; `overrides` are fields of ModelConfig."""
    values = {"vocab_size": 259, "context_length": 128, "bos_token_id": 257, "eos_token_ids": (258,)} | overrides
    return replace(random_model("llama", **values), tokenizer=byte_tokenizer(add_bos), name="bytes")
