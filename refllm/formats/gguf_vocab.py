"""The vocabularies embedded in GGUF files <-> `tokenizers.Tokenizer`. Two kinds are known:

* "gpt2": byte-level BPE, tokens and merges, with a named pre-tokenizer (a sequence of regular expressions);
* "llama": SentencePiece BPE, tokens and scores. Its rule (merge the neighbours whose joint piece scores highest) is
  ordinary BPE with the merges "every split of every piece into two pieces", ranked by the piece's score.

Deviations: qwen2 text is brought to NFC first as in its tokenizer.json (llama.cpp does not); a "llama" vocabulary that
also carries merges, as the ones refllm writes do, uses these.
"""

import json
import re
from collections.abc import Mapping

import numpy as np

from refllm.formats.errors import FormatError
from refllm.formats.tokenizer import Tokenizer, first_line

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the expressions that split text, applied one after another.
PRE_TOKENIZERS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_IGNORE_MERGES = ("llama-bpe",)  # a whole word that is a token is taken as it is
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type


def tokenizer_from_gguf(metadata: Mapping[str, object], path: object = None) -> Tokenizer | None:
    """The vocabulary a GGUF file embeds; None where it embeds none.

    Parameters
    ----------
    metadata : mapping
        The file's key-value pairs (`refllm.formats.gguf.GGUFFile.metadata`).

    Raises
    ------
    FormatError
        A vocabulary or pre-tokenizer that is not known, lists of different lengths, ids outside the vocabulary.
    """
    vocabulary = _GGUFVocabulary(metadata, path)
    model = vocabulary.get("model", str, "no_vocab")
    if model in ("no_vocab", "none"):
        return None
    if model not in ("gpt2", "llama"):
        raise vocabulary.fail(f"tokenizer.ggml.model is {model!r}; known: gpt2, llama, no_vocab")
    tokens = vocabulary.strings("tokens")
    types = vocabulary.numbers("token_type", len(tokens), default=_NORMAL)
    try:
        build = _byte_level_bpe if model == "gpt2" else _sentencepiece_bpe
        backend = build(vocabulary, tokens, types)
        _add_tokens(backend, tokens, types)
    except FormatError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise vocabulary.fail(f"the vocabulary does not fit together: {first_line(error)}") from None
    ids = [vocabulary.token_id(f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom")]
    add_bos = vocabulary.get("add_bos_token", bool, model == "llama")
    template = metadata.get("tokenizer.chat_template", "")
    ends = [i for i in ids[1:] if i is not None]
    if add_bos and ids[0] is not None:
        _announce_bos(backend, tokens[ids[0]], ids[0])
    return Tokenizer(
        backend, ids[0], ends, add_bos=add_bos, chat_template=template if isinstance(template, str) else ""
    )


def _announce_bos(backend, bos: str, bos_id: int) -> None:
    """Say in a saved tokenizer.json that texts begin with BOS, for other programs; `encode` adds it by itself."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing([bos, "$A"], special_tokens=[(bos, bos_id)])


class _GGUFVocabulary:
    """Typed access to the keys `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, object], path: object):
        self.metadata, self.path = metadata, path

    def fail(self, message: str) -> FormatError:
        """The error to raise, with the path of the file."""
        return FormatError(message, path=self.path)

    def get(self, key: str, kind: type, default=None):
        """tokenizer.ggml.KEY of one type. Raises FormatError for another type."""
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            raise self.fail(f"tokenizer.ggml.{key} must be {kind.__name__}, got {value!r:.80}")
        return value

    def strings(self, key: str) -> list[str]:
        """tokenizer.ggml.KEY as a list of strings. Raises FormatError if it is none."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list):
            raise self.fail(f"tokenizer.ggml.{key} must be an array of strings, got {type(value).__name__}")
        return value

    def numbers(self, key: str, length: int, default: int) -> list:
        """tokenizer.ggml.KEY as a list of `length` numbers; `default` throughout if it is missing."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return [default] * length
        if isinstance(value, list) or not hasattr(value, "tolist") or len(value) != length:
            raise self.fail(f"tokenizer.ggml.{key} must be an array of {length} numbers")
        return value.tolist()

    def token_id(self, key: str, size: int) -> int | None:
        """tokenizer.ggml.KEY as an id below `size`, None if it is missing. Raises FormatError for anything else."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and (not isinstance(value, int) or not 0 <= value < size):
            raise self.fail(f"tokenizer.ggml.{key} must be an id below {size}, got {value!r}")
        return value


def pre_tokenizer(name: str):
    """The `tokenizers` pre-tokenizer of a GGUF pre-tokenizer name: split, then bytes as printable characters."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _ids(tokens: list[str], vocabulary: _GGUFVocabulary) -> dict[str, int]:
    """Token -> id, without the placeholders that fill a vocabulary up to the embedding's rows."""
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise vocabulary.fail(f"tokenizer.ggml.tokens holds {twice!r} twice")
    return {token: i for token, i in ids.items() if token != _padding(i)}


def _padding(token_id: int) -> str:
    return f"[PAD{token_id}]"


def _byte_level_bpe(vocabulary: _GGUFVocabulary, tokens: list[str], types: list[int]):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    pre = vocabulary.get("pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        raise vocabulary.fail(f"tokenizer.ggml.pre is {pre!r}; known: {', '.join(PRE_TOKENIZERS)}")
    merges = _written_merges(vocabulary)
    ignore_merges = pre in _IGNORE_MERGES
    backend = Backend(models.BPE(vocab=_ids(tokens, vocabulary), merges=merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _written_merges(vocabulary: _GGUFVocabulary) -> list[tuple[str, str]]:
    merges = [tuple(merge.split(" ")) for merge in vocabulary.strings("merges")]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise vocabulary.fail(f"tokenizer.ggml.merges holds {' '.join(wrong)!r}; two tokens and a space were expected")
    return merges


def _sentencepiece_bpe(vocabulary: _GGUFVocabulary, tokens: list[str], types: list[int]):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    if vocabulary.get("remove_extra_whitespaces", bool, False):
        raise vocabulary.fail("tokenizer.ggml.remove_extra_whitespaces is true, which is not supported")
    ids = _ids(tokens, vocabulary)
    scores = vocabulary.numbers("scores", len(tokens), default=0)
    unknown = vocabulary.token_id("unknown_token_id", len(tokens))
    if "tokenizer.ggml.merges" in vocabulary.metadata:
        merges = _written_merges(vocabulary)
    else:
        merges = _merges_by_score(tokens, ids, types, scores)
    backend = Backend(
        models.BPE(
            vocab=ids,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=_BYTE in types,
        )
    )
    prefix = vocabulary.get("add_space_prefix", bool, True)
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if prefix else [space])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges_by_score(tokens: list[str], ids: dict[str, int], types: list[int], scores: list[float]):
    """Every split of every piece into two pieces; the best scored piece first, then the lower ids."""
    plain = {token for token, kind in zip(tokens, types, strict=True) if kind in (_NORMAL, _USER_DEFINED, _UNUSED)}
    ranked = []
    for token in plain:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain:
                ranked.append((-scores[ids[token]], ids[token], ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_tokens(backend, tokens: list[str], types: list[int]) -> None:
    """Tell the backend which tokens are special and which are matched as a whole in raw text."""
    from tokenizers import AddedToken

    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    whole = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in whole])


# Texts on which pre-tokenizers and space rules differ: digits, contractions, runs of white space, scripts, symbols.
_PROBES = (
    "Hello world",
    "  two spaces  before and after  ",
    "don't DON'T I'll we've",
    "1234567 3.14 1,000 \u00bd \u0663",
    "a\n\nb\r\n\tc \n d",
    "\u65e5\u672c\u8a9e caf\u00e9 cafe\u0301 \U0001f642\U0001f44d",
    "x=1;y+=2 //$5~^<|>#!? (a_b) [c]",
)


def tokenizer_to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, object]:
    """The keys `tokenizer.*` that embed a vocabulary in a GGUF file.

    Parameters
    ----------
    tokenizer : Tokenizer
    vocab_size : int
        Rows of the embedding; ids without a token are filled with placeholders.

    Raises
    ------
    ValueError
        GGUF has no way to say how this tokenizer works: read back, it would give other ids on the probe texts.
    """
    model = json.loads(tokenizer.backend.to_str())["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a {model['type']} tokenizer cannot be stored in GGUF; BPE was expected")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _tokens_and_types(tokenizer, vocab_size, model)
    ends = dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), tokenizer.eos_token_ids, strict=False))
    keys = {
        "tokens": tokens,
        "token_type": np.asarray(types, np.int32),
        "bos_token_id": tokenizer.bos_token_id,
        **ends,
        "add_bos_token": tokenizer.add_bos,
    }
    if merges:
        keys["merges"] = merges
    common = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    if tokenizer.chat_template:
        common["tokenizer.chat_template"] = tokenizer.chat_template
    for variant in _variants(model, tokens, types, merges):
        if _behaviour(tokenizer_from_gguf(common | variant)) == _behaviour(tokenizer):
            return common | variant
    raise ValueError("this tokenizer cannot be stored in GGUF: no known pre-tokenizer gives the same ids")


def _behaviour(tokenizer: Tokenizer) -> list:
    """Ids of the probe texts, and how they are split before any merge: ids alone can agree by chance."""
    split = tokenizer.backend.pre_tokenizer
    pieces = [] if split is None else [piece for text in _PROBES for piece, _ in split.pre_tokenize_str(text)]
    return [pieces, [tokenizer.encode(text) for text in _PROBES]]


def _tokens_and_types(tokenizer: Tokenizer, vocab_size: int, model: dict) -> tuple[list[str], list[int]]:
    backend = tokenizer.backend
    texts = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    if max(texts) >= vocab_size:
        raise ValueError(f"the tokenizer has id {max(texts)}, the embedding only {vocab_size} rows")
    added = {i: _CONTROL if token.special else _USER_DEFINED for i, token in backend.get_added_tokens_decoder().items()}
    tokens, types = [], []
    for i in range(vocab_size):
        token = texts.get(i, _padding(i))
        kind = added.get(i, _NORMAL if i in texts else _UNUSED)
        if token == model.get("unk_token"):
            kind = _UNKNOWN
        elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            kind = _BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _variants(model: dict, tokens: list[str], types: list[int], merges: list[str]):
    """The ways GGUF has to describe a BPE vocabulary, for one of them to fit."""
    if not model.get("byte_fallback"):
        for pre in PRE_TOKENIZERS:
            yield {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
        return
    # A piece scores by the first merge that makes it; single characters come after all of them.
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    scores = [
        -float(rank.get(t, len(merges) + i)) if k == _NORMAL else 0.0
        for i, (t, k) in enumerate(zip(tokens, types, strict=True))
    ]
    keys = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": np.asarray(scores, np.float32)}
    if model.get("unk_token") in tokens:
        keys["tokenizer.ggml.unknown_token_id"] = tokens.index(model["unk_token"])
    for prefix in (True, False):
        yield keys | {"tokenizer.ggml.add_space_prefix": prefix}
