"""lkd: ZeroQuant's layer-by-layer knowledge distillation: train the weights behind the codes, one block at a time.

    loss of block k    mean square of  L^_k(x_k) - L_k(x_k)      x_k = L_(k-1)(... L_1(embedding)), exact for both
    L^_k               weights Q(w), scales fitted anew at every step; inputs of the linears rounded per token
    slope              d loss / d w = d loss / d Q(w): rounding passes it whole, the scale takes no part
    learned            every weight and gain of the block, by AdamW

Rounding to nearest brings every weight as near as it can, one by one. Here the block as a whole is to give what it
gave: a weight may move to a farther code where others, or a gain, make up for it. What is stored is what `zeroquant`
stores: the same grid, the same bytes, other codes. The uncompressed block is the teacher; no labels are read, and no
other block takes part, so memory is that of one block and its optimizer, and blocks could be trained side by side.

Teacher and student see the same input. With `compressed_inputs` it is the stream out of the blocks compressed before:
what a block then sees while it learns is what it will see, but its target is its own answer to that, so errors of
earlier blocks are not undone.

Paper: Yao et al. 2022, "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
arXiv:2206.01861, section 4.3.
Differs from the authors' code: learned values that make the calibration loss larger are dropped for the first ones; no
weight decay, a step looks at one window; a larger rate, as a few short texts allow no hundreds of batches; slopes go
through the scales of rounded inputs, too; scales of weights are stored as float16 and learned so; all linears have the
same bits, where the paper's W4/8 gives attention 8.
Stage: prefill, memory
Inventory: 21
Lesson: lessons/28-layer-distillation.md
Golden: blockwise/lkd
Baseline: zeroquant with the same bits and group
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from refllm.kernels import straight_through as through
from refllm.kernels.autograd import Tensor
from refllm.kernels.grids import TwosGrid, group_for
from refllm.kernels.optimizers import Optimizer
from refllm.kernels.packed.inputs import TokenInputs
from refllm.kernels.packed.records import IntWeight
from refllm.methods.record import Report, report
from refllm.model.differentiable import block_states, check_plain
from refllm.model.equivalent import check_dense, norm_readers
from refllm.model.llama import block, embed
from refllm.model.model import Model
from refllm.model.reconstruct import improve, mean_square, observe
from refllm.model.walk import layer_linears, windows


@dataclass(frozen=True)
class Plan:
    """What is rounded, and how.

    Parameters
    ----------
    bits, group_size, scale_dtype :
        Of the weights, as in `refllm.kernels.grids`; group_size None: 128, or what 128 and the width have in common.
    activation_bits : int or None
        None: inputs are not rounded.
    """

    bits: int = 4
    group_size: int | None = None
    activation_bits: int | None = 8
    scale_dtype: str = "float16"

    def grid(self, columns: int) -> TwosGrid:
        """The grid of a weight."""
        return TwosGrid(self.bits, group_for(columns, self.group_size), self.scale_dtype)

    @property
    def at_linears(self) -> Callable[[Tensor], Tensor] | None:
        """What happens to the inputs of linears."""
        if self.activation_bits is None:
            return None
        return lambda x: through.round_tokens(x, self.activation_bits, symmetric=True)


def lkd(
    model: Model,
    ids: np.ndarray,
    *,
    on_report: Callable[[Report], None] | None = None,
    bits: int = 4,
    group_size: int | None = None,
    activation_bits: int | None = 8,
    compressed_inputs: bool = False,
    epochs: int = 20,
    rate: float = 1e-4,
    step_tokens: int = 128,
    scale_dtype: str = "float16",
) -> Model:
    """Blocks that are trained, rounded, to give what they gave.

    Parameters
    ----------
    model : Model
        Dense weights of a plain Llama; not changed.
    ids : (T,) integers
        Calibration tokens.
    on_report : callable, optional
        Called with the Report of every linear: its weight before training against the record.
    bits : int
        2 to 8, of the weights.
    group_size : int, optional
        Columns that share a scale, or -1: whole rows. None: 128, or what 128 and the width have in common.
    activation_bits : int, optional
        2 to 8: inputs of the linears are rounded per token. None: they are not.
    compressed_inputs : bool
        Blocks learn on the stream out of compressed blocks; False: on the exact one, as in the paper's equation.
    epochs : int
        Passes over the calibration for every block; 0 leaves `zeroquant`.
    rate : float
        AdamW's.
    step_tokens : int
        Tokens of a window, which is what a step looks at.
    scale_dtype : str
        float16 or float32, of the stored scales.

    Returns
    -------
    Model
        IntWeight linears, in TokenInputs where inputs are rounded, and gains of their own.

    Raises
    ------
    ValueError
        Packed weights, another architecture, a group_size that does not divide a width, knobs out of range, weights or
        inputs that are not finite.
    """
    check_dense(model, "LKD trains weights")
    check_plain(model.config)
    plan = Plan(bits, group_size, activation_bits, scale_dtype)
    _check(plan, epochs, rate, step_tokens)
    tokens = windows(np.asarray(ids), min(step_tokens, model.config.context_length))
    positions = np.arange(tokens.shape[1])
    stream, done = [embed(model, row[None]) for row in tokens], replace(model, weights=dict(model.weights))
    for layer in range(model.config.num_layers):
        stats, targets = observe(model, layer, stream, positions)
        done.weights.update(learn(model, layer, stream, targets, plan, epochs=epochs, rate=rate))
        for name in layer_linears(layer):
            done.weights[name] = packed = pack(done.weights[name], plan)
            if on_report is not None:
                on_report(report(name, model.weights[name], packed, stats[name]))
        stream = [block(done, layer, x, positions) for x in stream] if compressed_inputs else targets
    return done


def _check(plan: Plan, epochs: int, rate: float, step_tokens: int) -> None:
    """Raise ValueError for knobs that make no sense."""
    plan.grid(1 << 10)  # judges bits, group_size and scale_dtype
    if plan.activation_bits is not None and not 2 <= plan.activation_bits <= 8:
        raise ValueError(f"activation_bits must be 2 to 8, or none, got {plan.activation_bits}")
    if epochs < 0 or step_tokens < 1 or not 0 <= rate < np.inf:
        raise ValueError(
            "epochs must be 0 or more, step_tokens 1 or more, rate finite and not negative; "
            f"got {epochs}, {step_tokens} and {rate}"
        )


def learn(
    model: Model,
    layer: int,
    inputs: list[np.ndarray],
    targets: list[np.ndarray],
    plan: Plan,
    *,
    epochs: int = 20,
    rate: float = 1e-4,
) -> dict[str, np.ndarray]:
    """The weights and gains of a layer whose rounded form gives `targets`, or those it has where that went wrong.

    Parameters
    ----------
    inputs, targets : lists of (1, T, d)
        Windows of the stream, and what the block is to make of them.

    Returns
    -------
    dict
        Weight name to array, not yet rounded.
    """
    first = {name: model.weights[name] for name in (*layer_linears(layer), *norm_readers(model.config, layer))}
    loss = lambda params, i: block_loss(model, layer, params, inputs[i], targets[i], plan)
    return improve(first, loss, len(inputs), Optimizer(rate, betas=(0.9, 0.999), clip=None), epochs)


def block_loss(
    model: Model, layer: int, params: dict[str, Tensor], x: np.ndarray, target: np.ndarray, plan: Plan
) -> Tensor:
    """Mean square of the difference between what the rounded block makes of x, (1, T, d), and the target."""
    rounded = dict(params)
    for name in layer_linears(layer):
        rounded[name] = through.nearest(params[name], plan.grid(params[name].shape[1]))
    out = block_states(rounded, model.config, layer, Tensor(x[0]), 1, x.shape[1], at_linears=plan.at_linears)
    return mean_square(out, [target[0]])


def pack(W: np.ndarray, plan: Plan) -> IntWeight | TokenInputs:
    """The record of a trained weight: the codes that `block_loss` has decoded."""
    grid = plan.grid(W.shape[1])
    scale, _ = grid.fit(W)
    weight = IntWeight.pack(grid, grid.encode(W, scale), scale, None)
    return weight if plan.activation_bits is None else TokenInputs(weight, f"int{plan.activation_bits}")
