"""recall: does a model still find what stands far back, and how many bytes does its cache keep for that?

Perplexity is a mean over all tokens, most of which follow from their neighbours: a cache may lose every fact of a text
and hardly move it. Here a prompt ends with a question, the model writes on greedily, and the answer is there or not.

    facts      stories of the world the bundled model knows, cut after a question in their last third
    passkey    one fact among sentences that say nothing, at eight depths, and a question about it
    FILE       a task file with prompt and answer (`refllm.evaluate.tasks`)

Bytes are counted when the answer has been written: all that the cache stores, that of it which lies beside the
attention and not in host memory, and what a step fetched from there, each divided by the tokens read or the steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from refllm.evaluate.tasks import read_task
from refllm.model.cache import new_cache
from refllm.model.llama import forward
from refllm.model.model import Model
from refllm.model.world import World

BUNDLED = ("facts", "passkey")
ITEMS = 40
_LENGTH = 480  # tokens of a story, at most
_KINDS = ("object-place", "object-person", "likes", "home")


@dataclass(frozen=True)
class Question:
    """A prompt, what must be found in the text that follows it, and how many tokens of that are written."""

    prompt: str
    answer: str
    new_tokens: int


def questions(task: str, count: int = ITEMS, world: World | None = None) -> list[Question]:
    """The first `count` questions of a task.

    Parameters
    ----------
    task : "facts", "passkey" or the path of a task file with prompts and answers
    count : int
    world : World, optional

    Raises
    ------
    ValueError
        A file of another kind of task, or without items.
    """
    if task in BUNDLED:
        return (_facts if task == "facts" else _passkeys)(world or World(), count)
    kind, items = read_task(task, count)
    if kind != "contains":
        raise ValueError(f"{task}: recall needs items with prompt and answer, these are of kind {kind or 'none'!r}")
    return [Question(item.pairs[0][0], str(item.gold), item.new_tokens) for item in items]


def _text(tokens: Sequence[str]) -> str:
    return "".join(tokens)[1:]


def _facts(world: World, count: int) -> list[Question]:
    found, number = [], 0
    while len(found) < count:
        story = world.story(f"recall {number}", _LENGTH)
        number += 1
        late = [s for s in story.spans if s.kind in _KINDS and 3 * s.start > 2 * _LENGTH]
        if late:
            span = late[number % len(late)]
            answer = story.tokens[span.start : span.stop]
            found.append(Question(_text(story.tokens[: span.start]), _text(answer), len(answer)))
    return found


def _passkeys(world: World, count: int) -> list[Question]:
    found = []
    for number in range(count):
        rng = np.random.default_rng(number)
        pick = lambda names, rng=rng: names[rng.integers(len(names))]
        filler = [
            f"In the {pick(world.moments)} the {pick(world.weathers)} was {pick(world.moods)}." for _ in range(48)
        ]
        thing, place = pick(world.objects), pick(world.places)
        filler.insert(len(filler) * (number % 8) // 8, f"The {thing} is at {place}.")
        found.append(Question(" ".join([*filler, f"Where is the {thing}?"]), f"The {thing} is at {place}.", 6))
    return found


def prompts(model: Model, asked: Sequence[Question]) -> list[tuple[list[int], int]]:
    """Ids and number of new tokens of each question: at least what the answer takes. Long prompts lose their begin."""
    given = []
    for q in asked:
        ids = model.tokenizer.encode(q.prompt)
        count = max(q.new_tokens, len(model.tokenizer.encode(f"{q.prompt} {q.answer}")) - len(ids))
        given.append((ids[-(model.config.context_length - count) :], count))
    return given


def answers(model: Model, given: Sequence[tuple[list[int], int]], on_item: Callable[[int], None] | None = None) -> dict:
    """What the model writes, greedily, and what its cache holds then.

    Parameters
    ----------
    model : Model
    given : sequence of (ids, new tokens)
    on_item : callable, optional
        Called with the number of prompts done.

    Returns
    -------
    dict
        written: lists of ids; stored_bytes_per_token, device_bytes_per_token, recalled_bytes_per_step: means.
    """
    written, costs = [], []
    for done, (ids, count) in enumerate(given, 1):
        cache = new_cache(model)
        logits = forward(model, ids, cache=cache, last_only=True)[-1]
        out = [int(np.argmax(logits))]
        while len(out) < count:
            out.append(int(np.argmax(forward(model, out[-1:], cache=cache)[-1])))
        written.append(out)
        fetched = sum(getattr(store, "recalled", 0) for store in cache.stores)
        costs.append((cache.nbytes / cache.length, cache.device_nbytes / cache.length, fetched / max(count - 1, 1)))
        if on_item is not None:
            on_item(done)
    names = ("stored_bytes_per_token", "device_bytes_per_token", "recalled_bytes_per_step")
    return {"written": written} | dict(zip(names, map(float, np.mean(costs, axis=0)), strict=True))


def share_found(tokenizer, asked: Sequence[Question], written: Sequence[list[int]]) -> float:
    """Share of the questions whose answer stands in what was written, case and outer spaces aside."""
    texts = [tokenizer.decode(ids).lower() for ids in written]
    return float(np.mean([q.answer.strip().lower() in text for q, text in zip(asked, texts, strict=True)]))


def recall(model: Model, task: str = "facts", count: int = ITEMS) -> dict:
    """Measure one model.

    Returns
    -------
    dict
        recall: share of the answers that are found; items; the means of `answers`.

    Examples
    --------
    >>> from refllm.methods.apply import load
    >>> recall(load("tiny"), "facts", count=2)["recall"]
    1.0
    """
    asked = questions(task, count)
    found = answers(model, prompts(model, asked))
    written = found.pop("written")
    return {"recall": share_found(model.tokenizer, asked, written), "items": len(asked), **found}
