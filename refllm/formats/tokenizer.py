"""Text <-> token ids: a small wrapper around `tokenizers.Tokenizer`, and the files a Hugging Face folder keeps it in.

Text is never searched for special tokens unless asked: a user who types "<|im_end|>" gets its characters.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from refllm.formats.chat import ChatFormat, detect_chat_format
from refllm.formats.errors import FormatError
from refllm.formats.files import atomic_write, read_json


class Tokenizer:
    """Encode and decode with one vocabulary.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
    bos_token_id : int or None
    eos_token_ids : sequence of int
        Ids that end a text or a turn.
    add_bos : bool
        Whether a text begins with BOS unless `encode` is told otherwise.
    chat_template : str
        The Jinja text a model carries; only looked at, never run.
    """

    def __init__(
        self,
        backend,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        add_bos: bool = False,
        chat_template: str = "",
    ):
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.add_bos = add_bos and bos_token_id is not None
        self.chat_template = chat_template
        self.chat_format: ChatFormat | None = detect_chat_format(chat_template, self.special_tokens)
        stop = self.special_tokens.get(self.chat_format.stop) if self.chat_format else None
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if stop is None else [stop])]))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that are never plain text."""
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Token ids of a text.

        Parameters
        ----------
        text : str
        add_bos : bool, optional
            Put BOS first; None does what the model was made with.
        special : bool
            Turn the text of special tokens into their ids instead of into characters.
        """
        add_bos = self.add_bos if add_bos is None else add_bos
        if add_bos and self.bos_token_id is None:
            raise ValueError("add_bos=True, but this tokenizer has no BOS token")
        self.backend.encode_special_tokens = not special
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_token_id, *ids] if add_bos else ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of token ids; special tokens are left out unless `special`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, as `load_tokenizer` reads them."""
        folder = Path(folder)
        text = lambda token_id: None if token_id is None else self.backend.id_to_token(token_id)
        eos = self.eos_token_ids
        own = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": text(self.bos_token_id),
            "eos_token": text(eos[0]) if eos else None,
            "add_bos_token": self.add_bos,
            "chat_template": self.chat_template or None,
        }
        generation = {"bos_token_id": self.bos_token_id, "eos_token_id": list(eos) or None}
        _write_json(folder / "tokenizer_config.json", own)
        _write_json(folder / "generation_config.json", generation)
        with atomic_write(folder / "tokenizer.json", "w") as file:
            file.write(self.backend.to_str(pretty=True))

    def stream(self) -> "TextStream":
        """A decoder that takes one id at a time and never shows half a character."""
        return TextStream(self)


class TextStream:
    """Text of ids that arrive one by one; the pieces joined are `decode` of all ids.

    An id is decoded together with those shown last, since some decoders treat the first id of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._shown = 0  # ids from _context on give context, those from _shown on are not shown yet

    def push(self, token_id: int) -> str:
        """The text this id completes; "" while a character still lacks bytes."""
        self._ids.append(int(token_id))
        text = self._pending()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """What is left when no more ids come."""
        text = self._pending()
        self._shown = self._context = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]


def _write_json(path: Path, values: dict) -> None:
    with atomic_write(path, "w") as file:
        json.dump({key: value for key, value in values.items() if value is not None}, file, indent=1)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a folder in Hugging Face layout.

    BOS and EOS come from tokenizer_config.json, generation_config.json and config.json where they are there.

    Raises
    ------
    FormatError
        tokenizer.json is missing or not understood, or a BOS or EOS it does not hold is named.
    """
    from tokenizers import Tokenizer as Backend

    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FormatError("no tokenizer.json in this folder", path=folder)
    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises bare Exception
        raise FormatError(f"not a tokenizer.json: {first_line(error)}", path=path) from None
    names = ("tokenizer_config", "generation_config", "config")
    own, generation, config = (_optional_json(folder / f"{name}.json") for name in names)
    bos = _token_id(backend, own.get("bos_token"), path)
    if bos is None:
        bos = config.get("bos_token_id")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = list(eos) if isinstance(eos, list) else [] if eos is None else [eos]
    own_eos = _token_id(backend, own.get("eos_token"), path)
    eos_ids += [] if own_eos is None else [own_eos]
    for token_id in [*eos_ids, *([] if bos is None else [bos])]:
        if not isinstance(token_id, int) or backend.id_to_token(token_id) is None:
            raise FormatError(f"BOS or EOS id {token_id!r} is not in this vocabulary", path=path)
    template = own.get("chat_template")
    jinja = folder / "chat_template.jinja"
    if not isinstance(template, str):
        template = jinja.read_text(encoding="utf-8") if jinja.exists() else ""
    add_bos = own.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = bos is not None and backend.encode("a").ids[:1] == [bos]
    return Tokenizer(backend, bos, eos_ids, add_bos=add_bos, chat_template=template)


def first_line(error: BaseException) -> str:
    """The first line of an error of the tokenizers package, for a one-line message."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _optional_json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _token_id(backend, token: object, path: Path) -> int | None:
    """Id of a token given as text or as the object older files hold."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    token_id = backend.token_to_id(text) if isinstance(text, str) else None
    if token_id is None:
        raise FormatError(f"tokenizer_config.json names token {text!r}, which is not in this vocabulary", path=path)
    return token_id
