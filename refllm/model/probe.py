"""What a model of the story world has learned: distance to the entropy floor, recall by distance, songs, heads.

`measure` computes everything from `logits_of(ids)`, so the same figures can be taken of a model in training, of the
bundled one and of any compressed form of it; `full_report` is what the end of the training log holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from refllm.kernels.attention import attend
from refllm.model.llama import forward
from refllm.model.model import Model
from refllm.model.world import Story, World

DISTANCES = (25, 50, 100, 200, 300, 400)
GROUPS = {
    "objects": ("object-place", "object-person"),
    "people": ("likes", "home"),
    "songs": ("song",),
    "sums": ("sum",),
}


def encode_stories(stories: list[Story], index: Mapping[str, int], bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Stories as a batch. index : token -> id.

    Returns
    -------
    ids, targets : int64 [n, T]
        ids starts with `bos`; targets is ids shifted by one, -1 after a story's end.
    """
    length = max(len(story.tokens) for story in stories)
    ids = np.full((len(stories), length), bos, np.int64)
    targets = np.full((len(stories), length), -1, np.int64)
    for row, story in enumerate(stories):
        n = len(story.tokens)
        targets[row, :n] = [index[token] for token in story.tokens]
        ids[row, 1:n] = targets[row, : n - 1]
    return ids, targets


def measure(
    logits_of: Callable, stories: Iterable[Story], index: Mapping[str, int], bos: int, *, rows: int = 8, after: int = 0
) -> dict:
    """Loss against the floor on the same tokens, and what the model recalls.

    Parameters
    ----------
    logits_of : callable
        ids [B, T] -> logits [B, T, V].
    stories : iterable of Story
        With their spans and log-probabilities.
    index : mapping
        Token of the world -> id.
    bos : int
        Id that starts every story.
    rows : int
        Stories a forward pass.

    Returns
    -------
    dict
        tokens; loss and floor (nats per token, same tokens); ppl, floor_ppl, ratio; `recall`: group -> distance bin ->
        [share right, questions] where an answer is right when every token of it is the most likely one (so greedy
        decoding would write it); songs: share of the words of known songs; sums: share of results.
    """
    stories = list(stories)
    nats, tokens = 0.0, 0
    right: dict[tuple[str, str], list[int]] = {}
    for start in range(0, len(stories), rows):
        part = stories[start : start + rows]
        ids, targets = encode_stories(part, index, bos)
        logits = np.asarray(logits_of(ids))
        best = logits.argmax(axis=-1)
        on = targets >= 0
        chosen = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        top = logits.max(axis=-1)
        norm = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
        nats += float((norm - chosen)[on].sum(dtype=np.float64))
        tokens += int(on.sum())
        for row, story in enumerate(part):
            hits = best[row] == targets[row]
            for span in story.spans:
                tally = right.setdefault((span.kind, _bin(span.distance)), [0, 0])
                if span.kind == "song":
                    tally[0] += int(hits[span.start : span.stop].sum())
                    tally[1] += span.stop - span.start
                else:
                    tally[0] += int(hits[span.start : span.stop].all())
                    tally[1] += 1
    floor = -sum(story.log_probability for story in stories) / tokens
    loss = nats / tokens
    result = {
        "tokens": tokens,
        "loss": loss,
        "floor": floor,
        "ppl": float(np.exp(loss)),
        "floor_ppl": float(np.exp(floor)),
    }
    result["ratio"] = float(np.exp(loss - floor))
    return _rounded(result) | _recall(right)


def _bin(distance: int) -> str:
    for low, high in zip((0, *DISTANCES), DISTANCES, strict=False):
        if distance < high:
            return f"{low}-{high}"
    return f"{DISTANCES[-1]}+"


def _rounded(values: dict) -> dict:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}


def _recall(right: dict[tuple[str, str], list[int]]) -> dict:
    bins = [_bin(d - 1) for d in (*DISTANCES, 10**9)]

    def share(kinds, distance=None):
        tallies = [t for (kind, at), t in right.items() if kind in kinds and distance in (None, at)]
        hits, n = sum(t[0] for t in tallies), sum(t[1] for t in tallies)
        return [round(hits / n, 4), n] if n else None

    recall = {
        group: {at: share(GROUPS[group], at) for at in bins if share(GROUPS[group], at)}
        for group in ("objects", "people")
    }
    kinds = {kind: share((kind,)) for group in ("objects", "people") for kind in GROUPS[group] if share((kind,))}
    return {"recall": recall, "kinds": kinds, "songs": share(("song",)), "sums": share(("sum",))}


def filled_stories(world: World, needed: int, plain: int, length: int = 511, name: str = "probe") -> list[Story]:
    """Held-out stories with at least `needed` questions about objects, and about people, in every distance bin.

    The first `plain` stories are taken as they come. Later ones are kept only if they hold a question for a bin that is
    not full yet: a choice that looks at the text alone, never at a model.
    """
    last = _bin(DISTANCES[-1])
    group_of = {kind: group for group in ("objects", "people") for kind in GROUPS[group]}
    missing = {(group, _bin(d - 1)): needed for group in ("objects", "people") for d in DISTANCES}
    stories, number = [], 0
    while len(stories) < plain or max(missing.values()) > 0:
        story = world.story(f"{name} {number}", length)
        number += 1
        keys = [(group_of[s.kind], _bin(s.distance)) for s in story.spans if s.kind in group_of]
        keys = [key for key in keys if key[1] != last]
        if len(stories) < plain or any(missing[key] > 0 for key in keys):
            stories.append(story)
            for key in keys:
                missing[key] -= 1
    return stories


def attention_weights(model: Model, ids: np.ndarray) -> list[np.ndarray]:
    """Softmax weights of every layer, [B, H, T, T] each, caught at the `attend` seam.

    Attending to one-hot values instead of the real ones returns the weights themselves.
    """
    caught = []

    def spy(q, k, v, q_positions, k_positions, **settings):
        one_hot = np.broadcast_to(np.eye(k.shape[-2], dtype=v.dtype), (*v.shape[:-1], v.shape[-2]))
        caught.append(attend(q, k, one_hot, q_positions, k_positions, **settings))
        return caught[-1] @ np.repeat(v, q.shape[-3] // v.shape[-3], axis=-3)

    forward(model, ids, attend=spy)
    return caught


def head_scores(model: Model, ids: np.ndarray, bos: int, *, length: int = 40, rows: int = 32, seed: int = 0) -> dict:
    """Previous-token and induction score of every head on random tokens written twice.

    Elhage et al. 2021, "A mathematical framework for transformer circuits"; Olsson et al. 2022, "In-context learning
    and induction heads", arXiv:2209.11895.

    Parameters
    ----------
    ids : integers
        Tokens to draw from.
    bos : int
    length, rows : int
        `rows` sequences bos, r_1..r_length, r_1..r_length; no token twice among r_1..r_length.

    Returns
    -------
    dict
        previous, induction : [L][H] mean attention, in the second half, to the position before, and to the position
        after the first occurrence of the present token. Even attention would give about 1 / (1.5 length).
        copied : share of the second half's tokens (but the first) that are predicted right.
    """
    rng = np.random.default_rng(seed)
    half = np.stack([rng.permutation(ids)[:length] for _ in range(rows)])
    batch = np.concatenate([np.full((rows, 1), bos), half, half], axis=1)
    now = np.arange(length + 1, 2 * length + 1)
    mean = lambda weights, at: [round(float(head), 4) for head in weights[:, :, now, at].mean(axis=(0, 2))]
    layers = attention_weights(model, batch)
    predicted = forward(model, batch).argmax(axis=-1)
    return {
        "previous": [mean(weights, now - 1) for weights in layers],
        "induction": [mean(weights, now - length + 1) for weights in layers],
        "copied": round(float((predicted[:, now[:-1]] == batch[:, now[1:]]).mean()), 4),
    }


def full_report(model: Model, index: Mapping[str, int], world: World, *, needed: int = 300, plain: int = 160) -> dict:
    """All measurements of a trained model of the story world.

    Parameters
    ----------
    model : Model
    index : mapping
        Token of the world -> id.
    world : World
    needed : int
        Questions per group and distance bin.
    plain : int
        Stories of the perplexity measurement.

    Returns
    -------
    dict
        `measure` of the plain stories; recall, kinds, songs and sums of the filled ones; `heads` (`head_scores`).
    """
    bos = model.config.bos_token_id
    logits_of = lambda ids: forward(model, ids)
    stories = filled_stories(world, needed, plain)
    whole = measure(logits_of, stories, index, bos)
    text = measure(logits_of, stories[:plain], index, bos)
    keep = ("tokens", "loss", "floor", "ppl", "floor_ppl", "ratio")
    heads = head_scores(model, np.array([index[token] for token in world.vocabulary]), bos)
    return {key: text[key] for key in keep} | {key: whole[key] for key in whole if key not in keep} | {"heads": heads}
