"""razor: heads that look things up keep every token; all others keep the ends and one token for what lies between.

Few heads use what stands far away: echo heads look at earlier copies of the present token, induction heads at the token
after such a copy. Random tokens written `repeats` times find them, on the model itself and without any text. With
weights A, queries i from the second copy on, and j = i - U, i - 2 U, .. the places of earlier copies (BOS left out):

    echo = mean over i of sum over j of A[i, j]        induction = mean over i of sum over j of A[i, j + 1]

A key-value head has the largest score of its query heads. All heads of all layers are ranked together; the first
round(induction * heads) by induction and the first round(echo * heads) by echo are retrieval heads.

After a prompt of N tokens any other head keeps the first N0 = sinks and the last L = max(recent, N // divisor) tokens.
The N_d tokens between them become one compensation token, the mean of their rotated keys and values, that counts N_d
times; what it adds to its score is ln N_d, after the scale:

    out = (sum over kept of e^s_j v_j + N_d e^s v^) / (sum over kept of e^s_j + N_d e^s)        s = scale q . k^

Nothing is dropped where N_d would be below 2. Tokens that come later are kept; with `moving` the last L stay and what
falls out of the window joins the mean. `extend` returns the mean in place of every token it stands for, which is the
same sum; `attend` counts it N_d times.

Paper: Tang et al. 2024, "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads", arXiv:2407.15891.
Differs from the authors' code: the random tokens are drawn from the whole vocabulary, and as many as the context has
room for; with a sliding window the compensation token counts the dropped tokens that the window still shows.
Stage: memory, decode
Inventory: 38
Lesson: lessons/22-retrieval-heads.md
Golden: kvcache/razor
"""

import numpy as np

from refllm.kernels.attention import attend, attention_weights, mix, visible
from refllm.kernels.nn import softmax
from refllm.model.llama import forward
from refllm.model.model import Model
from refllm.model.stores import PromptStore, check_amounts

_QUERIES = 256  # of the search at a time


def razor(
    layer: int,
    *,
    heads: str = "search",
    sinks: int = 4,
    recent: int = 4000,
    divisor: int = 5,
    moving: bool = False,
    induction: float = 0.14,
    echo: float = 0.01,
    tokens: int = 2500,
) -> "RazorStore":
    """The store of one layer: `new_cache(model, policy=partial(razor, heads="1.0/1.1"))`.

    Parameters
    ----------
    layer : int
    heads : str
        The retrieval heads, LAYER.KEY_VALUE_HEAD joined by /, or "none" or "all". In a recipe "search": they are
        searched once, when the model is compressed, and stored with it. In Python `heads_text(retrieval_heads(model))`.
    sinks : int
        N0: first tokens that every head keeps.
    recent, divisor : int
        Of a prompt of N tokens the last max(recent, N // divisor) stay in every head.
    moving : bool
        Whether the window moves on with later tokens, instead of growing.
    induction, echo : float
        Shares of all key-value heads of the model, for the search.
    tokens : int
        U of the search, at most. A small model does not copy over thousands of tokens: then few scores differ from 0,
        and other heads are found than with 128 (docs/results/kv-cache.md).

    Returns
    -------
    RazorStore

    Raises
    ------
    ValueError
        A number out of range, heads that are not of this form, or no heads.
    """
    _check(sinks, recent, divisor, induction, echo, tokens)
    if heads == "search":
        raise ValueError(
            "razor needs the retrieval heads: a recipe searches them; in Python give heads=heads_text(retrieval_heads("
            "model)), or heads=none or all"
        )
    return RazorStore(parse_heads(heads, layer), sinks, recent, divisor, moving)


def _check(sinks, recent, divisor, induction, echo, tokens) -> None:
    check_amounts("razor", sinks=sinks, recent=recent)
    if tokens < 1:
        raise ValueError(f"razor tokens must be positive, got {tokens}")
    if divisor < 1 or not (0 <= induction <= 1 and 0 <= echo <= 1):
        raise ValueError(
            f"razor needs a divisor from 1 on and shares from 0 to 1, got {divisor}, induction {induction}, echo {echo}"
        )


def parse_heads(text: str, layer: int) -> list[int] | None:
    """The retrieval heads of a layer; None for all.

    Examples
    --------
    >>> parse_heads("0.1/2.0/2.3", 2), parse_heads("none", 0), parse_heads("all", 0)
    ([0, 3], [], None)
    """
    if text in ("none", "all"):
        return [] if text == "none" else None
    try:
        pairs = [tuple(map(int, pair.split("."))) for pair in text.split("/")]
        return sorted({head for at, head in pairs if at == layer})
    except ValueError:
        raise ValueError(f"razor heads must be like 0.1/2.0 (layer.head), none or all, got {text!r}") from None


def heads_text(heads: list[tuple[int, int]]) -> str:
    """What the knob `heads` takes.

    Examples
    --------
    >>> heads_text([(0, 1), (2, 0)]), heads_text([])
    ('0.1/2.0', 'none')
    """
    return "/".join(f"{layer}.{head}" for layer, head in heads) or "none"


def _prepare(
    model: Model | None,
    *,
    heads="search",
    sinks=4,
    recent=4000,
    divisor=5,
    induction=0.14,
    echo=0.01,
    tokens=2500,
    **_,
):
    """See `refllm.methods.apply`: the heads where they are to be searched; without a model a stand-in for them."""
    _check(sinks, recent, divisor, induction, echo, tokens)
    if heads != "search":
        return {}
    if model is None:
        return {"heads": "none"}
    return {"heads": heads_text(retrieval_heads(model, induction=induction, echo=echo, tokens=tokens))}


razor.prepare = _prepare


# --- the search ------------------------------------------------------------------------------------------------------


def retrieval_heads(model: Model, *, induction: float = 0.14, echo: float = 0.01, **search) -> list[tuple[int, int]]:
    """The (layer, key-value head) that keep everything, by `head_scores(model, **search)` and `choose`."""
    return choose(*head_scores(model, **search), induction, echo)


def choose(induction_scores: np.ndarray, echo_scores: np.ndarray, induction: float, echo: float) -> list:
    """The union of the best heads by either score.

    Parameters
    ----------
    induction_scores, echo_scores : (layers, Hk)
        All are ranked together; of equal ones the first.
    induction, echo : float
        Shares of all heads; the counts are rounded to the nearest, halves to even.

    Returns
    -------
    list of (layer, head), rising

    Examples
    --------
    >>> choose(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([[0.5, 0.0], [0.0, 0.0]]), 0.5, 0.25)
    [(0, 0), (0, 1), (1, 0)]
    """
    chosen = set()
    for scores, share in ((induction_scores, induction), (echo_scores, echo)):
        order = np.argsort(-scores.ravel(), kind="stable")[: round(scores.size * share)]
        chosen |= {tuple(int(i) for i in np.unravel_index(place, scores.shape)) for place in order}
    return sorted(chosen)


def head_scores(model: Model, *, tokens: int = 2500, repeats: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Induction and echo score of every key-value head on random tokens written several times.

    Parameters
    ----------
    model : Model
    tokens : int
        U, at most; fewer where the context has no room for BOS and `repeats` times as many.
    repeats : int
    seed : int

    Returns
    -------
    induction, echo : (layers, Hk) float64
    """
    config = model.config
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    tokens = min(tokens, (config.context_length - len(bos)) // repeats)
    special = {*bos, *config.eos_token_ids}
    ordinary = np.array([i for i in range(config.vocab_size) if i not in special])
    rng = np.random.default_rng(seed)
    drawn = rng.choice(ordinary, tokens, replace=tokens > len(ordinary))
    found = []

    def spy(q, k, v, q_positions, k_positions, **rule):
        parts, sums = [], np.zeros((2, config.num_heads))
        for start in range(0, q.shape[-2], _QUERIES):
            rows = slice(start, start + _QUERIES)
            weights = attention_weights(q[..., rows, :], k, q_positions[rows], k_positions, **rule)
            parts.append(mix(weights, v))
            sums += copied(weights[0].reshape(config.num_heads, -1, k.shape[-2]), start - len(bos), tokens, len(bos))
        found.append(sums.reshape(2, config.num_kv_heads, -1).max(axis=-1) / (tokens * (repeats - 1)))
        return np.concatenate(parts, axis=-2)

    forward(model, np.concatenate([bos, np.tile(drawn, repeats)]).astype(np.int64), attend=spy, last_only=True)
    induction, echo = np.stack(found, axis=1)
    return induction, echo


def copied(weights: np.ndarray, first: int, tokens: int, skipped: int) -> np.ndarray:
    """What some queries give to earlier copies of their tokens.

    Parameters
    ----------
    weights : (H, T, S)
    first : int
        Place of the first query in the text without BOS.
    tokens : int
        U, the distance of copies.
    skipped : int
        Columns of BOS.

    Returns
    -------
    (2, H) float64
        Sums over queries from the second copy on: to the token after each copy (induction), to the copy itself (echo).
    """
    sums = np.zeros((2, len(weights)))
    for row in range(weights.shape[1]):
        i = first + row
        if i >= tokens:
            copies = np.arange(i % tokens, i, tokens) + skipped
            for kind, places in enumerate((copies + 1, copies)):
                sums[kind] += weights[:, row, places].sum(axis=-1, dtype=np.float64)
    return sums


# --- the store -------------------------------------------------------------------------------------------------------


class RazorStore(PromptStore):
    """One layer: `tokens` in full for retrieval heads (all heads until something is dropped), `others` for the rest.

    Attributes
    ----------
    retrieval : list of int, or None
        Key-value heads that keep every token; None for all.
    others : Tokens or None
        First and last tokens of the other heads, once something has been dropped.
    dropped : int
        N_d.
    """

    name = "razor"

    def __init__(self, retrieval: list[int] | None, sinks: int, recent: int, divisor: int, moving: bool):
        self.retrieval, self.sinks, self.recent = retrieval, sinks, recent
        self.divisor, self.moving = divisor, moving
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.others = None
        self.dropped = 0
        self._sum = None  # of the dropped keys and values, side by side: (..., heads, D + Dv) float64

    def _append(self, k, v, positions) -> None:
        heads = k.shape[-3]
        if self.retrieval is not None and any(head >= heads for head in self.retrieval):
            raise ValueError(f"razor heads name key-value head {max(self.retrieval)}, the model has {heads} a layer")
        if self.others is None:
            super()._append(k, v, positions)
            return
        full, rest = self._split(heads)
        super()._append(k[..., full, :, :], v[..., full, :, :], positions)
        self.others.append(k[..., rest, :, :], v[..., rest, :, :], positions)

    def _split(self, heads: int) -> tuple[np.ndarray, np.ndarray]:
        full = np.isin(np.arange(heads), self.retrieval)
        return np.flatnonzero(full), np.flatnonzero(~full)

    def _end_prompt(self) -> None:
        """Drop the middle of what the other heads hold, if that saves something."""
        window = max(self.recent, self.prompt // self.divisor)
        held = self.tokens if self.others is None else self.others
        gone = held.count - self.sinks - window
        if self.retrieval is None or gone + self.dropped < 2 or gone < 1:
            return
        if self.others is None:
            full, rest = self._split(self.tokens.keys.shape[-3])
            if not len(rest):
                return
            self.tokens, held = self.tokens.heads(full), self.tokens.heads(rest)
            self.others = held
        part = slice(self.sinks, self.sinks + gone)
        new = np.concatenate([held.keys[..., part, :], held.values[..., part, :]], axis=-1)
        before = np.zeros_like(new[..., :1, :], np.float64) if self._sum is None else self._sum[..., None, :]
        # One after the other, so that it does not matter how many come at once.
        self._sum = np.concatenate([before, new], axis=-2).sum(axis=-2)
        self.dropped += gone
        places = np.arange(held.count)
        held.keep(places[(places < part.start) | (places >= part.stop)])
        self._floor = self.length

    def _end_step(self) -> None:
        if self.moving:
            self._end_prompt()

    def compensation(self, dtype) -> tuple[np.ndarray, np.ndarray]:
        """Mean key and value of what was dropped: (..., heads, 1, D) and (..., heads, 1, Dv)."""
        mean = (self._sum / self.dropped)[..., None, :].astype(dtype)
        width = self.others.keys.shape[-1]
        return mean[..., :width], mean[..., width:]

    def _seen(self, q):
        if self.others is None:
            return super()._seen(q)
        full, rest = self._split(self.tokens.keys.shape[-3] + self.others.keys.shape[-3])
        sides = []
        for whole, held, mean in zip(
            (self.tokens.keys, self.tokens.values),
            (self.others.keys, self.others.values),
            self.compensation(self.tokens.keys.dtype),
            strict=True,
        ):
            side = np.empty((*whole.shape[:-3], len(full) + len(rest), *whole.shape[-2:]), whole.dtype)
            side[..., full, :, :] = whole
            repeated = np.broadcast_to(mean, (*mean.shape[:-2], self.dropped, mean.shape[-1]))
            kept = (held[..., : self.sinks, :], repeated, held[..., self.sinks :, :])
            side[..., rest, :, :] = np.concatenate(kept, axis=-2)
            sides.append(side)
        return *sides, np.arange(self.length)

    def attend(self, q, k, v, positions, *, scale, window=None, softcap=None):
        """Attention over what `extend` returns, each compensation token met once and counted N_d times.

        Parameters and result are those of `refllm.kernels.attention.attend`.
        """
        self._take(k, v, positions)
        rule = dict(scale=scale, window=window, softcap=softcap)
        if self.others is None:
            out = attend(q, *self._seen(q)[:2], positions, np.arange(self.length), **rule)
        else:
            out = self._attend_parts(q, k.shape[-3], positions, rule)
        self._finish()
        return out

    def _attend_parts(self, q, heads, positions, rule):
        full, rest = self._split(heads)
        by_head = q.reshape(*q.shape[:-3], heads, -1, *q.shape[-2:])  # (..., Hk, g, T, D)
        chosen = lambda part: by_head[..., part, :, :, :].reshape(*q.shape[:-3], -1, *q.shape[-2:])
        out = np.empty((*by_head.shape[:-1], self.others.values.shape[-1]), q.dtype)
        of_heads = lambda x, part: x.reshape(*x.shape[:-3], len(part), -1, *x.shape[-2:])
        if len(full):
            whole = self.tokens
            seen = attend(chosen(full), whole.keys, whole.values, positions, whole.positions, **rule)
            out[..., full, :, :, :] = of_heads(seen, full)
        seen = self._compensated(chosen(rest), positions, **rule)
        out[..., rest, :, :, :] = of_heads(seen, rest)
        return out.reshape(*q.shape[:-1], -1)

    def _compensated(self, q, positions, scale, window, softcap):
        held, (k_mean, v_mean) = self.others, self.compensation(q.dtype)
        keys, values = (np.concatenate(pair, axis=-2) for pair in ((held.keys, k_mean), (held.values, v_mean)))
        grouped = q.reshape(*q.shape[:-3], keys.shape[-3], -1, *q.shape[-2:])
        scores = scale * np.matmul(grouped, np.swapaxes(keys, -1, -2)[..., None, :, :].astype(np.float64))
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        mask = visible(positions, held.positions, window)
        counted = visible(positions, self.sinks + np.arange(self.dropped), window).sum(axis=-1)  # N_d, or what is seen
        with np.errstate(divide="ignore"):
            offset = np.log(counted)[:, None]
        offsets = np.concatenate([np.where(mask, 0.0, -np.inf), offset], axis=-1)
        return mix(softmax(scores + offsets), values)

    def _cut(self, count: int) -> None:
        super()._cut(count)
        if self.others is not None:
            self.others.cut(self.others.count - count)

    def parts(self) -> dict[str, np.ndarray]:
        """Views of exactly what is stored: tokens of retrieval heads, `other_` ones of the rest, sum of the dropped."""
        parts = super().parts() if self.tokens.count else {}
        if self.others is None:
            return parts
        return parts | {f"other_{name}": part for name, part in self.others.parts().items()} | {"sum": self._sum}
