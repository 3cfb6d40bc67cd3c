"""Tasks: multiple choice, last word, and answers to be generated, scored as lm-evaluation-harness scores them.

A file holds one JSON object a line; its keys tell the kind:

    query, choices, gold                        choice    ARC, PIQA: "query\\nAnswer:" + " choice"
    ctx, endings, label                         choice    HellaSwag: the context as it stands + " ending"
    question, choices, answer                   choice    MMLU: the choices lettered, "Answer:" + " A"
    context_options, continuation, gold         choice    WinoGrande: which context makes the continuation likelier
    context, continuation                       word      LAMBADA: is every token of " continuation" the likeliest?
    prompt, answer                              contains  passkey: does the generated text contain the answer?
    question, answer ("... #### 18")            number    GSM8K: is the last number of the generated text the answer?

A continuation is scored by the sum of the log-probabilities of its tokens. `acc` takes the largest sum; `acc_norm` the
largest sum divided by the choice's length in characters, the space before it not counted; the first of equals wins. The
boundary is found by encoding context and continuation together, since tokens may cross a space. Text that does not fit
into the context window loses its left end.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refllm.evaluate.measure import log_probabilities
from refllm.model.llama import forward
from refllm.model.model import Model
from refllm.model.sample import generate_ids


@dataclass(frozen=True)
class Item:
    """One item: `pairs` of (context, continuation) to score, or a prompt as the only context to continue.

    Parameters
    ----------
    pairs : tuple of (str, str)
    gold : int or str
        Index of the right pair, or the text that is asked for.
    lengths : tuple of int
        Characters of each choice.
    new_tokens : int
        Of a generated answer.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int | str
    lengths: tuple[int, ...] = ()
    new_tokens: int = 0


def read_task(path: str, limit: int | None = None) -> tuple[str, list[Item]]:
    """The kind of a task file, and its items.

    Raises
    ------
    ValueError
        A line that is no JSON object of a known form; the message names the line.
    """
    kind, items = "", []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(items) >= limit:
                break
            if not line.strip():
                continue
            try:
                found, item = _item(json.loads(line))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{path}, line {number}: not an item of a known task ({error!r:.120})") from None
            if kind and found != kind:
                raise ValueError(f"{path}, line {number}: {found!r} after items of kind {kind!r}; one kind a file")
            kind = found
            items.append(item)
    return kind, items


def _item(row: dict) -> tuple[str, Item]:
    if "context_options" in row:
        pairs = [(context, " " + row["continuation"]) for context in row["context_options"]]
        return "choice", _choice(pairs, row["gold"], [row["continuation"]] * len(pairs))
    if "endings" in row:
        context, choices, gold = row["ctx"], row["endings"], row["label"]
    elif "query" in row:
        context, choices, gold = row["query"].rstrip() + "\nAnswer:", row["choices"], row["gold"]
    elif "choices" in row:
        letters = [chr(65 + i) for i in range(len(row["choices"]))]
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, row["choices"], strict=True))
        context, choices, gold = f"{row['question'].strip()}\n{listed}Answer:", letters, row["answer"]
    elif "continuation" in row:
        return "word", Item(((row["context"], " " + row["continuation"]),), 0)
    elif "prompt" in row:
        return "contains", Item(((row["prompt"], ""),), str(row["answer"]), new_tokens=16)
    else:
        answer = row["answer"].split("####")[1].strip().replace(",", "")
        return "number", Item(((f"Question: {row['question']}\nAnswer:", ""),), answer, new_tokens=256)
    return "choice", _choice([(context, " " + choice) for choice in choices], gold, choices)


def _choice(pairs, gold, texts) -> Item:
    if not 0 <= int(gold) < len(pairs):
        raise ValueError(f"gold {gold} is not one of {len(pairs)} choices")
    return Item(tuple(pairs), int(gold), tuple(map(len, texts)))


def score(model: Model, kind: str, items: list[Item], on_item: Callable[[int], None] | None = None) -> dict:
    """Score all items.

    Returns
    -------
    dict
        items; acc, and for `choice` acc_norm; for `word` perplexity of the word (per item, not per token).
    """
    scored = []
    for done, item in enumerate(items, 1):
        scored.append(_SCORES[kind](model, item))
        if on_item is not None:
            on_item(done)
    means = {key: float(np.mean([row[key] for row in scored])) for key in scored[0]}
    if kind == "word":
        means["perplexity"] = float(np.exp(-means.pop("log_probability")))
    return {"items": len(items), **means}


def _score_choice(model: Model, item: Item) -> dict:
    sums = np.array([log_likelihood(model, *pair)[0] for pair in item.pairs])
    return {
        "acc": sums.argmax() == item.gold,
        "acc_norm": (sums / np.maximum(item.lengths, 1)).argmax() == item.gold,
    }


def _score_word(model: Model, item: Item) -> dict:
    total, greedy = log_likelihood(model, *item.pairs[0])
    return {"acc": greedy, "log_probability": total}


def _score_contains(model: Model, item: Item) -> dict:
    return {"acc": item.gold.lower() in _continued(model, item).lower()}


def _score_number(model: Model, item: Item) -> dict:
    text = _continued(model, item).split("\nQuestion:")[0].replace(",", "")
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    return {"acc": bool(numbers) and float(numbers[-1]) == float(item.gold)}


_SCORES = {"choice": _score_choice, "word": _score_word, "contains": _score_contains, "number": _score_number}


def log_likelihood(model: Model, context: str, continuation: str) -> tuple[float, bool]:
    """Sum of log-probabilities of a continuation's tokens, and whether each of them is the likeliest one.

    Spaces at the end of the context move to the continuation, where most vocabularies have them.
    """
    encode = model.tokenizer.encode
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    before, whole = encode(context), encode(context + continuation)
    if not before:  # something must stand before the first token that is scored
        before = [_first_id(model)]
        whole = before + whole
    targets = np.array(whole[len(before) :])
    if not len(targets):
        raise ValueError(f"the continuation {continuation!r:.40} adds no token to its context")
    fed = np.array(whole[:-1])[-model.config.context_length :]
    logits = forward(model, fed)[-len(targets) :]
    if len(logits) < len(targets):
        raise ValueError(f"the continuation has {len(targets)} tokens, the context window {len(fed)}")
    chosen = np.take_along_axis(log_probabilities(logits), targets[:, None], axis=-1)
    return float(chosen.sum()), bool((logits.argmax(axis=-1) == targets).all())


def _first_id(model: Model) -> int:
    for token in (model.config.bos_token_id, *model.config.eos_token_ids):
        if token is not None:
            return token
    raise ValueError("an empty context needs a model with a BOS or end-of-text token")


def _continued(model: Model, item: Item) -> str:
    room = model.config.context_length - item.new_tokens
    if room < 1:
        raise ValueError(f"a context of {model.config.context_length} has no room for {item.new_tokens} new tokens")
    ids = model.tokenizer.encode(item.pairs[0][0])[-room:]
    return model.tokenizer.decode(list(generate_ids(model, ids, item.new_tokens)))
