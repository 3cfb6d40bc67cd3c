"""Chat formats in code. A model's own Jinja template is looked at to recognise its format and is never run.

A prompt is a list of parts, plain text or `Special`; only the format's own specials become special tokens, so a message
that contains "<|im_end|>" stays a message. Differences from the templates: Llama 3.1's dates and tools are left out.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace


class Special(str):
    """The text of one special token."""


@dataclass(frozen=True)
class ChatFormat:
    """name; stop = text of the token that ends an answer; bos = a conversation begins with BOS; render, see below.

    render(format, messages) -> parts, ending where the assistant is to speak; default_system is what the model expects
    when the conversation gives no system message ("" for nothing).
    """

    name: str
    stop: str
    bos: bool
    render: Callable[["ChatFormat", Sequence[Mapping[str, str]]], list[str]]
    default_system: str = ""


def _chatml(form: ChatFormat, messages: Sequence[Mapping[str, str]]) -> list[str]:
    if form.default_system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": form.default_system}, *messages]
    parts: list[str] = []
    for message in messages:
        parts += [Special("<|im_start|>"), f"{message['role']}\n{message['content']}", Special("<|im_end|>"), "\n"]
    return [*parts, Special("<|im_start|>"), "assistant\n"]


def _llama3(form: ChatFormat, messages: Sequence[Mapping[str, str]]) -> list[str]:
    parts: list[str] = []
    for message in [*messages, {"role": "assistant", "content": ""}]:
        head = [Special("<|start_header_id|>"), message["role"], Special("<|end_header_id|>")]
        parts += [*head, f"\n\n{message['content'].strip()}", Special("<|eot_id|>")]
    return parts[:-1]


def _gemma(form: ChatFormat, messages: Sequence[Mapping[str, str]]) -> list[str]:
    parts: list[str] = []
    for message in _system_into_user(messages, "{system}\n\n{user}"):
        role = "model" if message["role"] == "assistant" else message["role"]
        text = f"{role}\n{message['content'].strip()}"
        parts += [Special("<start_of_turn>"), text, Special("<end_of_turn>"), "\n"]
    return [*parts, Special("<start_of_turn>"), "model\n"]


def _zephyr(form: ChatFormat, messages: Sequence[Mapping[str, str]]) -> list[str]:
    parts: list[str] = []
    for message in messages:
        parts += [f"<|{message['role']}|>\n{message['content']}", Special("</s>"), "\n"]
    return [*parts, "<|assistant|>\n"]


def _llama2(form: ChatFormat, messages: Sequence[Mapping[str, str]]) -> list[str]:
    parts: list[str] = []
    for message in _system_into_user(messages, "<<SYS>>\n{system}\n<</SYS>>\n\n{user}"):
        content = message["content"].strip()
        if message["role"] == "user":
            parts += [Special("<s>")] if parts else []
            parts.append(f"[INST] {content} [/INST]")
        else:
            parts += [f" {content} ", Special("</s>")]
    return parts


def _mistral(form: ChatFormat, messages: Sequence[Mapping[str, str]]) -> list[str]:
    parts: list[str] = []
    for message in _system_into_user(messages, "{system}\n\n{user}"):
        user = message["role"] == "user"
        parts += [f"[INST] {message['content']} [/INST]"] if user else [message["content"], Special("</s>")]
    return parts


def _system_into_user(messages: Sequence[Mapping[str, str]], template: str) -> Sequence[Mapping[str, str]]:
    """Formats without a system turn put its text before the first user message."""
    if messages[0]["role"] != "system":
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise ValueError("in this chat format a system message must be followed by a user message")
    content = template.replace("{system}", messages[0]["content"].strip()).replace("{user}", messages[1]["content"])
    return [{"role": "user", "content": content}, *messages[2:]]


# In the order of detection: the text that gives the format away, then the format.
FORMATS = (
    ("<|im_start|>", ChatFormat("chatml", "<|im_end|>", False, _chatml)),
    ("<|start_header_id|>", ChatFormat("llama-3", "<|eot_id|>", True, _llama3)),
    ("<start_of_turn>", ChatFormat("gemma", "<end_of_turn>", True, _gemma)),
    ("<<SYS>>", ChatFormat("llama-2", "</s>", True, _llama2)),
    ("[INST]", ChatFormat("mistral", "</s>", True, _mistral)),
    ("<|assistant|>", ChatFormat("zephyr", "</s>", True, _zephyr)),
)
_CHATML_SYSTEM = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]+)<\|im_end\|>")


def detect_chat_format(template: str, special_tokens: Mapping[str, int]) -> ChatFormat | None:
    """The format a template's text or, without a template, the special tokens give away; None for a plain model."""
    for mark, form in FORMATS:
        if mark in template or (not template and mark in special_tokens):
            system = _CHATML_SYSTEM.search(template) if form.name == "chatml" else None
            return replace(form, default_system=system[1]) if system else form
    return None


def chat_prompt(tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt of a conversation as text, without BOS, ending where the assistant is to speak.

    Parameters
    ----------
    tokenizer : refllm.formats.tokenizer.Tokenizer
    messages : sequence of {"role": "system", "user" or "assistant", "content": str}

    Raises
    ------
    ValueError
        The model has no known chat format, or the messages are not a conversation.
    """
    return "".join(_parts(tokenizer, messages))


def chat_ids(tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of the same prompt, BOS included where the format begins with it.

    Special tokens come from the format only: text in a message that looks like one is encoded as characters.
    """
    parts, specials = _parts(tokenizer, messages), tokenizer.special_tokens
    bos = tokenizer.add_bos or (tokenizer.chat_format.bos and tokenizer.bos_token_id is not None)
    if not any(token in message["content"] for message in messages for token in specials):
        return tokenizer.encode("".join(parts), add_bos=bos, special=True)
    ids = [tokenizer.bos_token_id] if bos else []
    for part in parts:
        ids += [specials[part]] if isinstance(part, Special) else tokenizer.encode(part, add_bos=False)
    return ids


def _parts(tokenizer, messages: Sequence[Mapping[str, str]]) -> list[str]:
    form = tokenizer.chat_format
    if form is None:
        names = ", ".join(form.name for _, form in FORMATS)
        raise ValueError(f"this model has no known chat format ({names}); use generate with a plain prompt")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != [("user", "assistant")[i % 2] for i in range(len(turns))] or turns[-1] != "user":
        raise ValueError(
            f"messages must be an optional system, then user and assistant in turn, user last; got {roles}"
        )
    return form.render(form, messages)
