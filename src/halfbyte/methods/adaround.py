"""AdaRound: learn for each weight whether it is rounded up or down (Nagel et al. 2020, arXiv 2004.10568).

On a grid that stays as it is, the weight becomes

    W_soft = s (clamp(floor(W / s) + h(V) + z, lo, hi) - z),   h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)

(equations 22 and 23, zeta = 1.1 and gamma = -0.1), and the regularizer ``sum(1 - |2 h(V) - 1|^beta)`` (equation 24) draws every
h to 0 or 1 while beta falls. V starts where h is the fraction that rounding down leaves, so that W_soft is W.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from halfbyte.affine import Grid, dequantize, expand, fake_quantize, round_even
from halfbyte.formats import Format
from halfbyte.local import Problem, Solution
from halfbyte.reparam import Leaves, Part, Reparam, check, fit

_ZETA, _GAMMA = 1.1, -0.1
_LONG = 10_000  # more iterations than this take smaller steps
_DECIDED = (0.01, 0.99)
_ENOUGH = 0.999  # share of the roundings that must be decided
_NEAR = 1e-3  # of a step


def rectified(v: Tensor) -> Tensor:
    """The rectified sigmoid h(V)."""
    return (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def annealed(beta: tuple[float, float], warm_start: float, progress: float) -> float:
    """Beta after a share of the iterations: the first value during the warm start, then along half a cosine to the second."""
    start, end = beta
    r = max(0.0, (progress - warm_start) / (1 - warm_start))
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * r))


@dataclass(frozen=True)
class UpOrDown(Reparam):
    """The weight as a function of V; leaf: ``v``, shaped as the weight.

    near: weights no further than this share of a step from a code keep that code, and have nothing to learn.
    """

    regularization: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2
    near: float = 0.0

    def split(self, x: Tensor, g: Grid) -> tuple[Tensor, Tensor]:
        """The code below each weight, without the zero-point, and the fraction above it; 0 where there is no choice."""
        real = x / expand(g.scale, g, x)
        nearest = round_even(real)
        close = (real - nearest).abs() <= self.near
        below = torch.where(close, nearest, torch.floor(real))
        fixed = close | (self._inside(below, g) == self._inside(below + 1, g))  # the latter are beyond the limits
        return below, torch.where(fixed, 0.0, real - below)

    def init(self, x: Tensor, f: Format, g: Grid) -> Leaves:
        """V with h(V) the fraction: ``-ln((zeta - gamma) / (fraction - gamma) - 1)``."""
        fraction = self.split(x, g)[1]
        return {"v": -torch.log((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1)}

    def soft(self, leaves: Leaves, x: Tensor, f: Format, g: Grid) -> Tensor:
        """The weight between its two codes."""
        below, fraction = self.split(x, g)
        h = torch.where(fraction > 0, rectified(leaves["v"]), 0.0)
        return dequantize(self._inside(below + h, g), g)

    def penalty(self, leaves: Leaves, f: Format, progress: float) -> Tensor:
        """The regularizer, summed over all weights; none during the warm start."""
        if progress < self.warm_start:
            return torch.zeros((), device=leaves["v"].device)
        beta = annealed(self.beta, self.warm_start, progress)
        return self.regularization * (1 - (2 * rectified(leaves["v"]) - 1).abs().pow(beta)).sum()

    def hard(self, leaves: Leaves, x: Tensor, f: Format, g: Grid) -> tuple[Tensor, Format, Grid]:
        """Up where V >= 0, else down."""
        below, fraction = self.split(x, g)
        up = (leaves["v"] >= 0) & (fraction > 0)
        return fake_quantize(dequantize(self._inside(below + up.float(), g), g), g), f, g

    def decided(self, leaves: Leaves, x: Tensor, g: Grid) -> float:
        """The share of the weights whose h is all but 0 or 1."""
        h = rectified(leaves["v"])[self.split(x, g)[1] > 0]
        low, high = _DECIDED
        return float(((h < low) | (h > high)).double().mean()) if h.numel() else 1.0

    @staticmethod
    def _inside(codes: Tensor, g: Grid) -> Tensor:
        """Codes with the zero-point, within the limits."""
        lo, hi, zero = (expand(t, g, codes).float() for t in (g.lo, g.hi, g.zero))
        return torch.clamp(codes + zero, lo, hi)


@dataclass(frozen=True)
class AdaRound:
    """Adaptive rounding. The grid and the bias stay as they are.

    iterations, batch: steps of Adam and samples in each. rate: Adam's; None takes 1e-2 up to 10,000 iterations and 1e-3
    beyond. regularization: weight of the regularizer beside the error, which is a sum over channels. beta: first and last
    exponent. warm_start: the share of the iterations without regularizer. Raises :class:`UsageError` for an option out of range.
    """

    iterations: int = 10_000
    batch: int = 32
    rate: float | None = None
    regularization: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2
    residual: bool = False
    unrounded: bool = False
    name: Literal["adaround"] = "adaround"

    def __post_init__(self) -> None:
        inf = float("inf")
        check(
            self.name,
            iterations=(self.iterations, 1, inf),
            batch=(self.batch, 1, inf),
            rate=(self.steps, 1e-9, inf),
            regularization=(self.regularization, 0, inf),
            first_beta=(self.beta[0], self.beta[1], inf),
            last_beta=(self.beta[1], 1, inf),
            warm_start=(self.warm_start, 0, 0.99),
        )

    @property
    def steps(self) -> float:
        """Adam's rate."""
        if self.rate is not None:
            return self.rate
        return 1e-2 if self.iterations <= _LONG else 1e-3

    def solve(self, p: Problem) -> Solution:
        """The weight with every value at the code below or above it."""
        # Where pairs of products may saturate, two codes below and above their weights are as small as two nearest ones, except
        # that a weight on a code may seem to lie just above it.
        near = _NEAR if p.pairs and p.form.bits == 8 else 0.0
        method = UpOrDown(self.regularization, self.beta, self.warm_start, near)
        part = Part(method, p.form, p.grid, {"v": self.steps})
        found = fit(p, part, iterations=self.iterations, batch=self.batch)
        decided = method.decided(found.leaves, p.weight, p.grid)
        note = f"{decided:.2%} of the roundings decided"
        if decided <= _ENOUGH:
            note += ", too few: raise the rate or the iterations"
        return Solution(found.weight, found.grid, None, note)
