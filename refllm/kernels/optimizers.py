"""AdamW, Muon and the learning-rate schedule: pure functions on arrays, in place.

AdamW: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", arXiv:1711.05101, Algorithm 2.
Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Optimizer:
    """AdamW, with Muon for the matrices of the layers when `muon_rate` is given.

    rate : AdamW's learning rate. muon_rate : Muon's, on every matrix but embeddings; None = AdamW everywhere.
    betas, eps : AdamW's. momentum : Muon's. decay : decoupled weight decay, on matrices only. clip : bound on the
    global gradient norm, None = no clipping. rates : (part of a name, AdamW's rate for it) in place of `rate`, the
    first part that matches.
    """

    rate: float
    muon_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    decay: float = 0.0
    clip: float | None = 1.0
    rates: tuple[tuple[str, float], ...] = ()

    def rate_of(self, name: str) -> float:
        """AdamW's rate for a tensor."""
        return next((rate for part, rate in self.rates if part in name), self.rate)

    def uses_muon(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether Muon updates this tensor."""
        embedding = "embed_tokens" in name or name.startswith("lm_head")
        return self.muon_rate is not None and len(shape) == 2 and not embedding


@dataclass(frozen=True)
class Schedule:
    """Factor on the learning rates: linear warm-up, then constant until `decay_from`, then down to `final`.

    warmup, decay_from, steps : steps; without decay_from it is the usual warm-up and cosine. shape : "cosine" or
    "linear".
    """

    steps: int
    warmup: int = 0
    decay_from: int | None = None
    final: float = 0.0
    shape: str = "cosine"

    def __post_init__(self):
        if self.shape not in ("cosine", "linear"):
            raise ValueError(f"schedule shape must be cosine or linear, got {self.shape!r}")
        start = self.warmup if self.decay_from is None else self.decay_from
        if not 0 <= self.warmup <= start <= self.steps:
            raise ValueError(
                f"schedule needs 0 <= warmup <= decay_from <= steps, got {self.warmup}, {start}, {self.steps}"
            )

    def factor(self, step: int) -> float:
        """Factor for step 0, 1, ..., steps - 1."""
        start = self.warmup if self.decay_from is None else self.decay_from
        if step < self.warmup:
            return (step + 1) / self.warmup
        if step < start:
            return 1.0
        done = (step - start) / max(1, self.steps - start)
        fall = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.final + (1 - self.final) * fall


def adamw_update(value, gradient, first, second, step: int, rate: float, optimizer: Optimizer) -> None:
    """One AdamW step, in place. value, gradient, first, second : equal shapes; step counts from 0."""
    low, high = optimizer.betas
    first *= low
    first += (1 - low) * gradient
    second *= high
    second += (1 - high) * gradient * gradient
    if value.ndim >= 2 and optimizer.decay:
        value *= 1 - rate * optimizer.decay
    spread = np.sqrt(second / (1 - high ** (step + 1)))
    spread += optimizer.eps
    value -= (rate / (1 - low ** (step + 1))) * first / spread


def muon_update(value, gradient, first, rate: float, optimizer: Optimizer) -> None:
    """One Muon step, in place: Nesterov momentum, made orthogonal, then a decoupled decay. value : [out, in]."""
    first *= optimizer.momentum
    first += gradient
    direction = orthogonalise(gradient + optimizer.momentum * first)
    rows, columns = value.shape
    value *= 1 - rate * optimizer.decay
    value -= (rate * max(1.0, rows / columns) ** 0.5) * direction


def orthogonalise(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
    """Push the singular values of a matrix towards 1 (they end between 0.7 and 1.2), keeping its singular vectors.

    Newton-Schulz iteration with the quintic s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5, applied to X / ||X||_F.
    """
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * (square @ square)) @ x
    return x.T if tall else x
