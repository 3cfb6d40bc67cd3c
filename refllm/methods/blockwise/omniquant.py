"""omniquant: learn by how much to clip each group, and how to scale each channel, one block after another.

    hi = sigmoid(c_hi) max(w, 0)    lo = sigmoid(c_lo) min(w, 0)    of every row or group, c = 4 at first (0.982)
    affine       s = (hi - lo) / (2^b - 1)             w^ = s (clip(rint(w / s) + z, 0, 2^b - 1) - z), z = rint(-lo / s)
    symmetric    s = max(hi, -lo) / (2^(b-1) - 1)      w^ = s clip(rint(w / s), -2^(b-1), 2^(b-1) - 1)

c_hi and c_lo are learned (`lwc`), by gradients that pass rint as if it were not there and go through s and z
(refllm.kernels.straight_through). With `let`, scales of channels are learned beside them; they are moved by hand from
one weight to the next, as in SmoothQuant, and folded in the end:

    norm -> its readers    a^alpha / w^(1 - alpha) at first, a = amax of an input, w = amax of a column of q, or of up
    v -> o                 the same, w of o; query heads of a group share it
    k -> q                 1 at first; the two channels that turn together (RoPE) share it

down has none. What a block is to give is what the uncompressed block makes of the uncompressed stream; its own input is
the compressed stream. The loss is the mean square of the difference, the optimizer AdamW, a step looks at one window.
Learning enlarges the last bits of matrix products: another machine may end with other codes, about as good.

With `activation_bits` the inputs of all linears are rounded per token, in learning and afterwards (`TokenInputs`): W4A4
is `omniquant:bits=4,group=-1,activation_bits=4`. With `attention_bits`, learning also rounds queries, keys and values,
per head and token, as the authors do for W4A4; at run time that is a matter of the cache. Only then the factor between
k and q is learned: it leaves the codes of both weights alone, whose rows have scales of their own, and cancels in the
scores, so without rounded keys its gradient is nothing but rounding errors.

Paper: Shao et al. 2023, "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models",
arXiv:2308.13137, section 3.
Differs from the authors' code: zero is kept in every range and zero points lie among the codes, so that they can be
stored; symmetric weights have no zero point (there: with disable_zero_point); channels of q and k that turn together
share a factor, which keeps the scores; grouped queries may be scaled; scales are rounded to float16 in learning, too;
learned values that make the calibration loss larger are dropped for the first ones; gradients go through zero points of
weights, where that code stops them (it rounds these without the straight-through estimator). No shifts, as there for
Llama.
Stage: decode, prefill, memory
Inventory: 18
Lesson: lessons/20-learned-rounding.md
Golden: blockwise/omniquant
Baseline: rtn with the same bits and group
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from refllm.kernels import straight_through as through
from refllm.kernels.autograd import Tensor, clip, record, sigmoid
from refllm.kernels.grids import AffineGrid, FullRangeGrid, group_count, group_for
from refllm.kernels.optimizers import Optimizer
from refllm.kernels.packed.inputs import TokenInputs
from refllm.kernels.packed.records import IntWeight
from refllm.kernels.stats import Stats
from refllm.methods.record import Report, report
from refllm.model.differentiable import block_states, check_plain
from refllm.model.equivalent import check_dense, norm_readers
from refllm.model.llama import block, embed
from refllm.model.model import Model
from refllm.model.reconstruct import constants, improve, mean_square, observe
from refllm.model.walk import layer_linears, windows

START = 4.0  # sigmoid(4) = 0.982
LEAST, MOST = 1e-5, 1e4  # of a step
LEAST_SCALE = 1e-2  # of a channel
LEAST_SIZE = 1e-5  # of an input or a weight, where the first scales are computed


@dataclass(frozen=True)
class Plan:
    """What is rounded, and how.

    Parameters
    ----------
    bits, group_size, scale_dtype :
        Of the weights, as in `refllm.kernels.grids`; group_size None: 128, or what 128 and the width have in common.
    symmetric : bool
    activation_bits, attention_bits : int or None
        None: not rounded.
    activation_symmetric : bool
    """

    bits: int = 4
    group_size: int | None = None
    scale_dtype: str = "float16"
    symmetric: bool = False
    activation_bits: int | None = None
    activation_symmetric: bool = False
    attention_bits: int | None = None

    def grid(self, columns: int) -> AffineGrid | FullRangeGrid:
        """The codes of a weight: 0 to 2^bits - 1 in both cases, around 2^(bits-1) where there is no zero point."""
        kind = FullRangeGrid if self.symmetric else AffineGrid
        return kind(self.bits, group_for(columns, self.group_size), self.scale_dtype)

    @property
    def at_linears(self) -> Callable[[Tensor], Tensor] | None:
        """What happens to the inputs of linears."""
        if self.activation_bits is None:
            return None
        return lambda x: through.round_tokens(x, self.activation_bits, self.activation_symmetric)

    @property
    def at_attention(self) -> Callable[[Tensor], Tensor] | None:
        """What happens to queries, keys and values."""
        return None if self.attention_bits is None else lambda x: through.round_tokens(x, self.attention_bits)


def omniquant(
    model: Model,
    ids: np.ndarray,
    *,
    on_report: Callable[[Report], None] | None = None,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = False,
    activation_bits: int | None = None,
    activation_symmetric: bool = False,
    attention_bits: int | None = None,
    lwc: bool = True,
    let: bool | None = None,
    alpha: float = 0.5,
    epochs: int = 20,
    clip_rate: float = 1e-2,
    let_rate: float = 5e-3,
    second_loss: bool = False,
    step_tokens: int = 128,
    scale_dtype: str = "float16",
) -> Model:
    """Learned clipping, and learned scales of channels.

    Parameters
    ----------
    model : Model
        Dense weights of a plain Llama; not changed.
    ids : (T,) integers
        Calibration tokens.
    on_report : callable, optional
        Called with the Report of every linear: its scaled weight against the record, on the scaled inputs.
    bits : int
        2 to 8.
    group_size : int, optional
        Columns that share a scale, or -1: whole rows. None: 128, or what 128 and the width have in common.
    symmetric : bool
        Weights without zero points.
    activation_bits : int, optional
        2 to 8: inputs of the linears are rounded per token. None: they are not.
    activation_symmetric : bool
        Around 0, and not from the least to the largest number of a token: coarser, but in 8 and 4 bits faster.
    attention_bits : int, optional
        2 to 8: queries, keys and values are rounded in learning.
    lwc : bool
        Learn to clip; False: ranges are those of the weights.
    let : bool, optional
        Learn scales of channels. None: where activations are rounded; the authors leave them out where only weights
        are.
    alpha : float
        How much of the inputs' size the first scales take on.
    epochs : int
        Passes over the calibration for every block; 0 keeps the first values.
    clip_rate, let_rate : float
        AdamW's, for c and for scales.
    second_loss : bool
        Add the difference from what the uncompressed block makes of the compressed stream; the authors' runs of 2 bits
        do.
    step_tokens : int
        Tokens of a window, which is what a step looks at.
    scale_dtype : str
        float16 or float32, of the stored scales.

    Returns
    -------
    Model
        IntWeight linears, in TokenInputs where activations are rounded, and the gains the scales were folded into.

    Raises
    ------
    ValueError
        Packed weights, another architecture, a group_size that does not divide a width, knobs out of range, weights or
        inputs that are not finite.
    """
    check_dense(model, "OmniQuant learns scales")
    check_plain(model.config)
    plan = Plan(bits, group_size, scale_dtype, symmetric, activation_bits, activation_symmetric, attention_bits)
    _check(plan, alpha, epochs, clip_rate, let_rate, step_tokens)
    let = activation_bits is not None if let is None else let
    settings = dict(epochs=epochs, clip_rate=clip_rate, let_rate=let_rate)
    tokens = windows(np.asarray(ids), min(step_tokens, model.config.context_length))
    positions = np.arange(tokens.shape[1])
    exact = [embed(model, row[None]) for row in tokens]
    rounded, done = list(exact), replace(model, weights=dict(model.weights))
    for layer in range(model.config.num_layers):
        stats, own = observe(model, layer, rounded, positions)
        exact = [block(model, layer, x, positions) for x in exact]
        targets = [(x, y) for x, y in zip(exact, own, strict=True)] if second_loss else [(x,) for x in exact]
        first = first_values(model, layer, stats, plan, lwc=lwc, alpha=alpha if let else None)
        learned = learn(model, layer, first, rounded, targets, plan, **settings)
        fold(model, done, layer, learned, plan, stats, on_report)
        rounded = [block(done, layer, x, positions) for x in rounded]
    return done


def _check(plan: Plan, alpha, epochs, clip_rate, let_rate, step_tokens) -> None:
    """Raise ValueError for knobs that make no sense."""
    plan.grid(1 << 10)  # judges bits, group_size and scale_dtype
    for name in ("activation_bits", "attention_bits"):
        if (bits := getattr(plan, name)) is not None and not 2 <= bits <= 8:
            raise ValueError(f"{name} must be 2 to 8, or none, got {bits}")
    if not 0 <= alpha <= 1 or epochs < 0 or step_tokens < 1 or not (0 <= clip_rate < np.inf and 0 <= let_rate < np.inf):
        raise ValueError(
            "alpha must lie between 0 and 1, epochs be 0 or more, step_tokens 1 or more, rates finite, not negative; "
            f"got {alpha}, {epochs}, {step_tokens}, {clip_rate} and {let_rate}"
        )


def first_values(
    model: Model, layer: int, stats: dict[str, Stats], plan: Plan, *, lwc: bool = True, alpha: float | None = None
) -> dict[str, np.ndarray]:
    """What is learned of a layer, as it begins.

    Parameters
    ----------
    alpha : float or None
        None: no scales of channels.

    Returns
    -------
    dict
        "{weight name}.hi" and ".lo" (out, groups, 1); "let.{name of the norm}" (d,), "let.values" (Hk, D), "let.keys"
        (Hk, D / 2).
    """
    config, values = model.config, {}
    for name in layer_linears(layer) if lwc else ():
        W = model.weights[name]
        shape = (len(W), group_count(W.shape[1], plan.grid(W.shape[1]).group_size), 1)
        values |= {f"{name}.{end}": np.full(shape, START, W.dtype) for end in ("hi", "lo")}
    if alpha is None:
        return values
    linear = lambda name: f"model.layers.{layer}.{name}_proj.weight"
    q, o, up = linear("self_attn.q"), linear("self_attn.o"), linear("mlp.up")
    dtype = model.weights[q].dtype
    sizes = lambda name: (stats[name].absmax, np.abs(model.weights[name]).max(axis=0).astype(np.float64))
    for norm, reader in zip(norm_readers(config, layer), (q, up), strict=True):
        values[f"let.{norm}"] = first_scales(*sizes(reader), alpha).astype(dtype)
    of_heads = lambda x: x.reshape(config.num_kv_heads, -1, config.head_dim).max(axis=1)
    values["let.values"] = first_scales(*map(of_heads, sizes(o)), alpha).astype(dtype)
    if plan.attention_bits is not None:
        values["let.keys"] = np.ones((config.num_kv_heads, config.head_dim // 2), dtype)
    return values


def first_scales(of_inputs: np.ndarray, of_weights: np.ndarray, alpha: float) -> np.ndarray:
    """a^alpha / w^(1 - alpha), from the largest |x| and the largest |w| of every channel.

    Examples
    --------
    >>> first_scales(np.array([4.0, 1.0]), np.array([1.0, 0.25]), 0.5).tolist()
    [2.0, 2.0]
    """
    a, w = np.maximum(of_inputs, LEAST_SIZE), np.maximum(of_weights, LEAST_SIZE)
    return np.maximum(a**alpha / w ** (1 - alpha), LEAST_SCALE)


def learn(
    model: Model,
    layer: int,
    first: dict[str, np.ndarray],
    inputs: list,
    targets: list[tuple],
    plan: Plan,
    *,
    epochs: int = 20,
    clip_rate: float = 1e-2,
    let_rate: float = 5e-3,
) -> dict[str, np.ndarray]:
    """The learned values of a layer, or the first ones where learning has made the mean loss larger.

    Parameters
    ----------
    first : dict
        From `first_values`.
    inputs : list of (1, T, d)
        Windows of the compressed stream.
    targets : list of tuples of (1, T, d)
        What the block is to give, one array or two.
    """
    loss = lambda params, i: block_loss(model, layer, params, inputs[i], targets[i], plan)
    optimizer = Optimizer(clip_rate, betas=(0.9, 0.999), clip=None, rates=(("let.", let_rate),))
    return improve(first, loss, len(inputs), optimizer, epochs)


def block_loss(
    model: Model, layer: int, learned: dict[str, Tensor], x: np.ndarray, targets: tuple[np.ndarray, ...], plan: Plan
) -> Tensor:
    """Mean square of the difference between the compressed block's output and each target, (1, T, d), summed."""
    params = scaled_weights(model, layer, learned)
    for name in layer_linears(layer):
        params[name] = rounded_weight(params[name], learned, name, plan)
    out = block_states(
        params, model.config, layer, Tensor(x[0]), 1, x.shape[1],
        at_linears=plan.at_linears, at_attention=plan.at_attention,
    )  # fmt: skip
    return mean_square(out, [target[0] for target in targets])


def scaled_weights(model: Model, layer: int, learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights and gains of a layer with the scales of channels moved: the same function.

    The moves are those of refllm.model.equivalent, as operators.
    """
    config, prefix = model.config, f"model.layers.{layer}."
    readers = norm_readers(config, layer)
    weights = {name: Tensor(model.weights[name]) for name in (*layer_linears(layer), *readers)}
    scales = {key.removeprefix("let."): _bounded(s) for key, s in learned.items() if key.startswith("let.")}
    q, k, v, o = (f"{prefix}self_attn.{name}_proj.weight" for name in "qkvo")
    for norm in scales.keys() & readers.keys():
        weights[norm] = weights[norm] / scales[norm]
        for name in readers[norm]:
            weights[name] = weights[name] * scales[norm]
    Hk, D, group = config.num_kv_heads, config.head_dim, config.num_heads // config.num_kv_heads
    if "values" in scales:
        channels = np.arange(Hk * D).reshape(Hk, D)
        s = scales["values"].reshape(-1)
        weights[v] = weights[v] / s.reshape(-1, 1)
        weights[o] = weights[o] * s[np.repeat(channels, group, axis=0).ravel()]
    if "keys" in scales:
        pairs = np.tile(np.arange(Hk * D // 2).reshape(Hk, -1), 2)  # channels j and j + D/2 of a head: one factor
        s = scales["keys"].reshape(-1)
        weights[k] = weights[k] / s[pairs.ravel()].reshape(-1, 1)
        weights[q] = weights[q] * s[np.repeat(pairs, group, axis=0).ravel()].reshape(-1, 1)
    return weights


def _bounded(s: Tensor) -> Tensor:
    """At least LEAST_SCALE; the gradient passes, so that a scale can come back."""
    return record(np.maximum(s.data, s.data.dtype.type(LEAST_SCALE)), (s,), lambda g: (g,))


def rounded_weight(W: Tensor, learned: dict[str, Tensor], name: str, plan: Plan) -> Tensor:
    """W rounded to its clipped grid and back, (out, in)."""
    scale, zero = clipped_grid(W, learned, name, plan)
    groups = W.reshape(*scale.shape[:2], -1)
    offset = plan.grid(W.shape[1]).offset if zero is None else zero
    return through.quantize(groups, scale, offset, (1 << plan.bits) - 1).reshape(*W.shape)


def clipped_grid(W: Tensor, learned: dict[str, Tensor], name: str, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """Scales (out, groups, 1) of a weight with its learned clipping, and zero points, None in a symmetric grid."""
    rows, columns = W.shape
    groups = W.reshape(rows, group_count(columns, plan.grid(columns).group_size), -1)
    hi, lo = through.largest(groups), through.largest(groups, -1)
    if f"{name}.hi" in learned:
        hi, lo = sigmoid(learned[f"{name}.hi"]) * hi, sigmoid(learned[f"{name}.lo"]) * lo
    if plan.symmetric:
        exact = through.magnitude(hi, lo) / float((1 << (plan.bits - 1)) - 1)
    else:
        exact = (hi - lo) / float((1 << plan.bits) - 1)
    scale = through.store(clip(exact, LEAST, MOST), plan.scale_dtype)
    return scale, None if plan.symmetric else through.zero_point(lo, scale, (1 << plan.bits) - 1)


def fold(
    model: Model,
    done: Model,
    layer: int,
    learned: dict[str, np.ndarray],
    plan: Plan,
    stats: dict[str, Stats],
    on_report: Callable[[Report], None] | None,
) -> None:
    """The layer of `model` with its scales moved and its linears packed, into `done`; what was learned is what is
    stored."""
    fixed = constants(learned)
    scaled = scaled_weights(model, layer, fixed)
    done.weights.update({name: W.data for name, W in scaled.items()})
    for name in layer_linears(layer):
        W = scaled[name].data
        done.weights[name] = packed = pack(scaled[name], fixed, name, plan)
        if on_report is not None:
            on_report(report(name, W, packed, _scaled_stats(model, layer, name, fixed, stats)))


def pack(W: Tensor, learned: dict[str, Tensor], name: str, plan: Plan) -> IntWeight | TokenInputs:
    """The record of a scaled weight: the codes that `rounded_weight` has decoded."""
    scale, zero = (None if x is None else x.data[..., 0] for x in clipped_grid(W, learned, name, plan))
    scale, zero = scale.astype(plan.scale_dtype), None if zero is None else zero.astype(np.uint8)
    grid = plan.grid(W.shape[1])
    weight = IntWeight.pack(grid, grid.encode(W.data, scale, zero), scale, zero)
    if plan.activation_bits is None:
        return weight
    return TokenInputs(weight, f"{'' if plan.activation_symmetric else 'u'}int{plan.activation_bits}")


def _scaled_stats(model: Model, layer: int, name: str, learned: dict[str, Tensor], stats: dict[str, Stats]) -> Stats:
    """The inputs of a linear after the scales in front of it were moved."""
    readers = {reader: f"let.{norm}" for norm, names in norm_readers(model.config, layer).items() for reader in names}
    key = "let.values" if name.endswith("o_proj.weight") else readers.get(name)
    if key not in learned:
        return stats[name]
    s = _bounded(learned[key]).data
    if key == "let.values":
        s = np.repeat(s, model.config.num_heads // model.config.num_kv_heads, axis=0).ravel()
    return Stats((stats[name].X / s).astype(stats[name].X.dtype))
