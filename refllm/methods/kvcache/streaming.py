"""streaming: keep the first few tokens and the most recent ones, and count positions inside the cache.

Softmax weights sum to 1, so a head that finds nothing to look at still puts its weight somewhere: on the first tokens,
whatever they are. With S = sinks and R = recent, the query at position t sees

    tokens 0 .. S - 1  and  t - R + 1 .. t,  as if they stood side by side: the key j of the sinks at  first - S + j

where `first` is the oldest recent token that is seen. Only distances matter to the rotation, so moving the few sinks
up to the window is the same as counting all positions from 0 inside the cache: no distance is ever larger than S + R,
and the text may be longer than the context the model was made for. Keys are stored unrotated. This is the one method
here that moves positions; with absolute ones it would be "sinks and a window", another method.

The prompt attends over all of itself. A later call of T tokens sees the sinks, R - 1 tokens before it and its own.

Paper: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453, section 3.2.
Differs from the authors' code: the queries keep their absolute positions and the sinks move, there both are counted
inside the cache (equal but for rounding); a prompt longer than the cache is cut after it, not before the next step.
Stage: memory, decode
Inventory: none, background of the sequence dimension
Lesson: lessons/21-which-tokens.md
Golden: kvcache/streaming
"""

import numpy as np

from refllm.model.stores import PromptStore


def streaming(layer: int, *, sinks: int = 4, recent: int = 512) -> "StreamingStore":
    """The store of one layer: `new_cache(model, policy=streaming)`.

    Parameters
    ----------
    layer : int
        Every layer is treated alike.
    sinks : int
        S: first tokens that stay for good.
    recent : int
        R: tokens a query sees beside them, its own included. 0: only its own.

    Returns
    -------
    StreamingStore

    Raises
    ------
    ValueError
        A negative number.
    """
    return StreamingStore(sinks, recent)


class StreamingStore(PromptStore):
    """Unrotated keys and values of the sinks and the window; see `refllm.model.stores`."""

    pre_rope = True
    endless = True
    name = "streaming"

    def __init__(self, sinks: int, recent: int):
        if sinks < 0 or recent < 0:
            raise ValueError(f"streaming sinks and recent must be 0 or more tokens, got {sinks} and {recent}")
        self.sinks, self.recent = sinks, recent
        super().__init__()

    def _seen(self, q):
        if self.prompt is None:
            return super()._seen(q)
        places = self._places(max(self.recent - 1, 0) + self.new)
        at = self.tokens.positions[places].astype(np.int64)
        sinks = min(self.sinks, len(at))
        if len(at) > sinks:
            at[:sinks] = at[sinks] - sinks + np.arange(sinks)
        return self.tokens.keys[..., places, :], self.tokens.values[..., places, :], at

    def _places(self, recent: int) -> np.ndarray:
        """The sinks and the last `recent` tokens."""
        count = self.tokens.count
        places = np.arange(count)
        return places[(places < self.sinks) | (places >= count - recent)]

    def _end_prompt(self) -> None:
        self._give_up(self._places(self.recent))

    _end_step = _end_prompt
