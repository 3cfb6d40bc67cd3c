"""Tokenizer: ids, special tokens only where asked, streaming; loading from a folder; GGUF vocabularies."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.formats.errors import FormatError
from refllm.formats.gguf_vocab import PRE_TOKENIZERS, pre_tokenizer, tokenizer_from_gguf, tokenizer_to_gguf
from refllm.formats.tokenizer import Tokenizer, load_tokenizer


def byte_level_metadata(pre="gpt-2", merges=("h e", "l l", "he ll", "hell o", "Ġ w"), **extra) -> dict:
    """A byte-level vocabulary: every byte, the merges, two special tokens and one user-defined."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<|im_end|>", *letters, *(merge.replace(" ", "") for merge in merges), "@@user@@"]
    types = [3, 3, 3, *[1] * (len(tokens) - 4), 4]
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": list(merges), "token_type": np.int32(types),
            "bos_token_id": 0, "eos_token_id": 1} | extra  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def pieces_metadata(pieces: dict[str, float], **extra) -> dict:
    """A SentencePiece vocabulary: unknown, BOS, EOS, all bytes, then the pieces with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    keys = {"model": "llama", "tokens": tokens, "token_type": np.int32([2, 3, 3] + [6] * 256 + [1] * len(pieces)),
            "scores": np.float32([0] * 259 + list(pieces.values())), "unknown_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2} | extra  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


BYTE_LEVEL = tokenizer_from_gguf(byte_level_metadata())


def tokens_of(tokenizer: Tokenizer, text: str, **options) -> list[str]:
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text, **options)]


def test_byte_level_merges():
    assert tokens_of(BYTE_LEVEL, "hello w") == ["hello", "Ġw"]
    assert tokens_of(BYTE_LEVEL, "hell") == ["hell"]
    assert tokens_of(BYTE_LEVEL, "é") == ["Ã", "©"]
    assert BYTE_LEVEL.encode("") == []


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_byte_level_decode_inverts_encode(text):
    ids = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.decode(ids) == text
    stream = BYTE_LEVEL.stream()
    assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == text


def test_special_tokens_are_parsed_only_when_asked():
    text = "he</s>"
    assert BYTE_LEVEL.encode(text, special=True) == [*BYTE_LEVEL.encode("he"), 1]
    plain = BYTE_LEVEL.encode(text)
    assert 1 not in plain
    assert BYTE_LEVEL.decode(plain) == text
    assert BYTE_LEVEL.encode(text, special=True)[-1] == 1  # the setting of one call does not leak into the next
    assert 1 not in BYTE_LEVEL.encode(text)
    assert tokens_of(BYTE_LEVEL, "x@@user@@") == ["x", "@@user@@"]  # user-defined tokens always are


def test_decode_leaves_special_tokens_out_unless_asked():
    ids = [0, *BYTE_LEVEL.encode("hello"), 1]
    assert BYTE_LEVEL.decode(ids) == "hello"
    assert BYTE_LEVEL.decode(ids, special=True) == "<s>hello</s>"


def test_bos_is_added_as_the_model_says_or_as_asked():
    assert BYTE_LEVEL.encode("he")[0] != 0
    assert BYTE_LEVEL.encode("he", add_bos=True)[0] == 0
    with_bos = tokenizer_from_gguf(byte_level_metadata(add_bos_token=True))
    assert with_bos.encode("he")[0] == 0
    assert with_bos.encode("he", add_bos=False)[0] != 0
    without = byte_level_metadata()
    del without["tokenizer.ggml.bos_token_id"]
    with pytest.raises(ValueError, match="no BOS token"):
        tokenizer_from_gguf(without).encode("he", add_bos=True)


def test_the_stream_waits_for_whole_characters():
    ids = BYTE_LEVEL.encode("aé🙂b")
    stream = BYTE_LEVEL.stream()
    assert [stream.push(i) for i in ids] == ["a", "", "é", "", "", "", "🙂", "b"]
    stream = BYTE_LEVEL.stream()
    assert stream.push(ids[1]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.finish() == ""


def test_a_stream_keeps_the_spaces_that_decoding_a_single_id_would_drop():
    tokenizer = tokenizer_from_gguf(pieces_metadata({"▁": -3, "h": -2, "▁h": -1}))
    ids = tokenizer.encode("h h hé")
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "h", " h", " h", "", "é"]
    assert tokenizer.decode(ids[-4:-3]) == "h"  # alone, the space before it is taken for the text's beginning


SPLITS = {
    "gpt-2": ["I", "'ll", "Ġpay", "Ġ1234", ".", "50", "Ġ", "Ġnow", "Ċ", "Ċ", "x"],
    "smollm": ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", ".", "5", "0", "Ġ", "Ġnow", "Ċ", "Ċ", "x"],
    "llama-bpe": ["I", "'ll", "Ġpay", "Ġ", "123", "4", ".", "50", "Ġ", "Ġnow", "ĊĊ", "x"],
    "qwen2": ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", ".", "5", "0", "Ġ", "Ġnow", "ĊĊ", "x"],
    "default": ["I", "'", "ll", "Ġpay", "Ġ", "123", "4", ".", "50", "Ġ", "Ġnow", "Ċ", "Ċ", "x"],
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_split_as_their_models_do(name):
    pieces = [piece for piece, _ in pre_tokenizer(name).pre_tokenize_str("I'll pay 1234.50  now\n\nx")]
    assert pieces == SPLITS[name]


def greedy_pieces(text: str, pieces: dict[str, float]) -> list[str]:
    """SentencePiece's rule as stated: again and again merge the pair whose joint piece scores best, left first."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-pieces[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in pieces]
        if not pairs:
            break
        i = min(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    result = []
    for symbol in symbols:
        result += [symbol] if symbol in pieces else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return result


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((-1, -2), ["▁", "ab", "c"]), ((-2, -1), ["▁", "a", "bc"])],  # the better score merges first, wherever it stands
)
def test_the_best_score_merges_first(scores, expected):
    pieces = {"▁": -9, "a": -9, "b": -9, "c": -9, "ab": scores[0], "bc": scores[1]}
    assert tokens_of(tokenizer_from_gguf(pieces_metadata(pieces)), "abc", add_bos=False) == expected
    assert greedy_pieces("abc", pieces) == expected


@st.composite
def vocabularies(draw):
    """Pieces over a few letters, each with its own score; every piece longer than one letter has a split in the set."""
    pieces = ["a", "b", "c", "▁"]
    for _ in range(draw(st.integers(0, 12))):
        joint = draw(st.sampled_from(pieces)) + draw(st.sampled_from(pieces))
        if joint not in pieces and len(joint) <= 6:
            pieces.append(joint)
    scores = draw(st.permutations(range(len(pieces))))
    return {piece: -float(score) for piece, score in zip(pieces, scores, strict=True)}


@given(vocabularies(), st.text("abc", min_size=3, max_size=12) | st.text("abcdé ", max_size=12))
def test_sentencepiece_scores_become_the_same_segmentation(pieces, text):
    tokenizer = tokenizer_from_gguf(pieces_metadata(pieces))
    got = tokens_of(tokenizer, text, add_bos=False)
    assert "".join(got) == "".join(greedy_pieces(text, pieces)) or not text
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if _unambiguous(pieces):
        assert got == (greedy_pieces(text, pieces) if text else [])


def _unambiguous(pieces: dict[str, float]) -> bool:
    """No piece can be made in two ways: BPE ranks the ways, SentencePiece takes the leftmost place."""
    ways = lambda piece: sum(piece[:i] in pieces and piece[i:] in pieces for i in range(1, len(piece)))
    return all(ways(piece) <= 1 for piece in pieces)


def test_sentencepiece_defaults():
    tokenizer = tokenizer_from_gguf(pieces_metadata({"▁": -3, "h": -2, "▁h": -1}))
    assert tokens_of(tokenizer, "h h") == ["<s>", "▁h", "▁h"]  # BOS and the leading space are this kind's defaults
    assert tokens_of(tokenizer, "hé") == ["<s>", "▁h", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hé h")) == "hé h"
    bare = tokenizer_from_gguf(
        pieces_metadata({"▁": -3, "h": -2, "▁h": -1}, add_space_prefix=False, add_bos_token=False)
    )
    assert tokens_of(bare, "h h") == ["h", "▁h"]
    assert bare.decode(bare.encode(" h")) == " h"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; known: gpt-2, smollm"),
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'; known: gpt2, llama"),
        ({"model": 3}, "tokenizer.ggml.model must be str, got 3"),
        ({"tokens": 3}, "tokens must be an array of strings"),
        ({"tokens": ["a", "a"], "token_type": np.int32([1, 1])}, "holds 'a' twice"),
        ({"token_type": np.int32([1])}, "token_type must be an array of"),
        ({"merges": ["hello"]}, "two tokens and a space"),
        ({"merges": ["x yz"]}, "does not fit together"),
        ({"bos_token_id": 9999}, "bos_token_id must be an id below"),
        ({"eos_token_id": "x"}, "eos_token_id must be an id below"),
        ({"add_bos_token": 1}, "add_bos_token must be bool"),
    ],
)
def test_a_vocabulary_that_is_not_understood_is_named(changes, message):
    with pytest.raises(FormatError, match=rf"some\.gguf: .*{message}"):
        tokenizer_from_gguf(byte_level_metadata(**changes), path="some.gguf")


def test_no_vocabulary_is_none():
    assert tokenizer_from_gguf({}) is None
    assert tokenizer_from_gguf({"tokenizer.ggml.model": "no_vocab"}) is None


TEXTS = ("hello w 12 345", "  two\n\n three ", "don't", "é🙂", "</s>", "@@user@@ hello")


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_byte_level_vocabulary_goes_to_gguf_and_back(pre):
    first = tokenizer_from_gguf(byte_level_metadata(pre, add_bos_token=True))
    metadata = tokenizer_to_gguf(first, first.vocab_size + 5)
    assert metadata["tokenizer.ggml.pre"] == pre
    assert len(metadata["tokenizer.ggml.tokens"]) == first.vocab_size + 5  # as many as the embedding has rows
    again = tokenizer_from_gguf(metadata)
    assert again.vocab_size == first.vocab_size
    assert [again.encode(text) for text in TEXTS] == [first.encode(text) for text in TEXTS]
    assert again.eos_token_ids == first.eos_token_ids


def test_a_sentencepiece_vocabulary_goes_to_gguf_and_back():
    pieces = {"▁": -9, "h": -8, "e": -7, "▁h": -1, "he": -2, "▁he": -3}
    for prefix in (True, False):
        first = tokenizer_from_gguf(pieces_metadata(pieces, add_space_prefix=prefix))
        metadata = tokenizer_to_gguf(first, first.vocab_size)
        assert metadata["tokenizer.ggml.model"] == "llama"
        assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
        for drop in ((), ("tokenizer.ggml.merges",)):  # by its merges, and by scores alone as other readers do
            again = tokenizer_from_gguf({key: value for key, value in metadata.items() if key not in drop})
            assert [again.encode(text) for text in TEXTS] == [first.encode(text) for text in TEXTS]


def test_what_gguf_cannot_say_is_refused():
    from tokenizers import normalizers

    odd = tokenizer_from_gguf(byte_level_metadata())
    odd.backend.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="no known pre-tokenizer gives the same ids"):
        tokenizer_to_gguf(odd, 300)
    with pytest.raises(ValueError, match="the embedding only 10 rows"):
        tokenizer_to_gguf(BYTE_LEVEL, 10)


def test_saved_and_loaded_again(tmp_path):
    template = "{{ '<|im_start|>' }}"
    metadata = byte_level_metadata(add_bos_token=True) | {"tokenizer.chat_template": template}
    first = tokenizer_from_gguf(metadata)
    first.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert [again.encode(text) for text in TEXTS] == [first.encode(text) for text in TEXTS]
    for name in ("bos_token_id", "eos_token_ids", "add_bos", "vocab_size", "special_tokens", "chat_template"):
        assert getattr(again, name) == getattr(first, name), name
    assert again.eos_token_ids == (1, 2)  # </s>, and <|im_end|> from the chat format
    assert again.backend.encode("he").ids[0] == 0  # programs that know only tokenizer.json add BOS too


def test_ids_come_from_the_files_of_the_folder(tmp_path):
    BYTE_LEVEL.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").unlink()
    bare = load_tokenizer(tmp_path)
    assert (bare.bos_token_id, bare.eos_token_ids, bare.add_bos) == (None, (), False)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    assert load_tokenizer(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    assert load_tokenizer(tmp_path).eos_token_ids == (2, 1)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "</s>"}, "eos_token": "<s>"}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_ids) == (1, (2, 1, 0))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nope>"}))
    with pytest.raises(FormatError, match="names token '<nope>'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 99999}))
    with pytest.raises(FormatError, match="BOS or EOS id 99999 is not in this vocabulary"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file_is_one_line(tmp_path):
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    for text in ("", "{", '{"version": "1.0"}', "[1]", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(FormatError, match=r"not a tokenizer\.json") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
