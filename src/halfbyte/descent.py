"""The layer solver: weights on a grid that minimise the local loss, by descent over the integers.

For patches x_hat that the quantized network gives a layer and outputs y that the float network expects of it,

    E || y - W_hat x_hat - b ||^2 = tr[(W_hat - W*) G (W_hat - W*)^T] + const,

with G the covariance of x_hat, b the difference of the means and W* as in :mod:`halfbyte.corrections`. Rounding W* is the quadratic
problem of AdaRound (arXiv 2004.10568, equation 13). A greedy pass rounds one input after another and lets the rest make up for it
(arXiv 2208.07339, arXiv 2210.17323); cyclic descent over the integers then improves every code in turn, all outputs at once, until
none moves; and the scales follow in closed form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from halfbyte.affine import Grid, fake_quantize, power_of_two
from halfbyte.corrections import choose, damped, mean_bias
from halfbyte.errors import UsageError, check_choice
from halfbyte.graph import blocks, unblocks
from halfbyte.grids import MSE, shaped
from halfbyte.local import Problem, Solution
from halfbyte.products import cholesky, product

_BLOCK = 64  # columns between two updates of all other columns
# Neighbouring positions say much the same, so it takes several for each that counts; of few inputs, as in depthwise layers, less is
# to be known: so many rows an input do, 8192 at least.
_LEAST_ROWS, _ENOUGH_ROWS, _ENOUGH = 32768, 8192, 512
# Second moments of few rows are uncertain, the more the more inputs there are; codes chosen by them are held to the diagonal.
_LEAST_DAMPING, _SHRINKAGE = 0.01, 0.2
_SETTLED = 1e-3  # a sweep that moves no larger share of the codes was the last
Rounding = Literal["free", "adjacent"]


@dataclass(frozen=True)
class Descent:
    """Descent over the integers, the default below eight bits.

    rows: patches gathered for each input of a layer (32768 at least, of few inputs 8192, or all that there are). damping: shares
    of G's mean diagonal, of which W* takes the one that does best on samples that choose, looked for from the middle one outward;
    besides them W* = W, which ignores the input error, and W* = W D, gains of the inputs alone. rounding: ``free`` moves codes
    anywhere on the grid, ``adjacent`` only to the two neighbours of W* / s. scales: factors on the scale of least squared error to
    start from. sweeps: passes over the inputs between two fits of the scales; rounds: how often the scales are fitted.
    """

    rows: float = 24.0
    damping: tuple[float, ...] = (0.003, 0.03, 0.3, 3.0, 30.0)
    rounding: Rounding = "free"
    scales: tuple[float, ...] = (0.9, 1.0)
    sweeps: int = 2
    rounds: int = 2
    residual: bool = True
    unrounded: bool = False
    iterations: Literal[0] = 0
    name: Literal["descent"] = "descent"

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, Rounding)
        if self.rows <= 0 or not self.scales or min(self.scales) <= 0 or any(d < 0 for d in self.damping):
            raise UsageError(f"rows and scales must be positive, and damping not negative: {self}")
        if self.sweeps < 1 or self.rounds < 0:
            raise UsageError(f"sweeps must be positive, and rounds not negative: {self}")

    @torch.no_grad()
    def solve(self, p: Problem) -> Solution:
        """The layer's weight and bias, on a grid."""
        layer, w = p.layer, p.weight
        parts = blocks(layer, w).flatten(2)  # [groups, outputs, inputs and taps]
        inputs = parts.shape[2]
        least = min(_LEAST_ROWS, max(_ENOUGH_ROWS, _ENOUGH * inputs))
        correction, moments = choose(p, max(least, int(self.rows * inputs)), self.damping)
        best = correction.of(moments, parts)
        gram = damped(moments.gram, max(_LEAST_DAMPING, _SHRINKAGE * inputs / moments.rows))
        target = unblocks(layer, best.reshape(blocks(layer, w).shape), w.shape)
        power = unblocks(
            layer, gram.diagonal(dim1=1, dim2=2)[:, None].expand_as(best).reshape(blocks(layer, w).shape), w.shape
        )
        start = MSE().weight(target, p.form, p.pairs, power)
        if p.floor is not None and start.group is None:
            floor = power_of_two(p.floor) if p.form.power_of_two else p.floor
            start = replace(start, scale=torch.maximum(start.scale, floor))
        if p.pairs and p.form.bits == 8:  # the limits that keep pairs from saturating hold for nearest rounding
            rounded, grid = fake_quantize(target, start), start
        else:
            rounded, grid = self._rounded(p, target, best, gram, start)
        bias = mean_bias(p, moments, blocks(layer, rounded).flatten(2))
        return Solution(rounded, grid, None if bias is None else bias.flatten().to(p.bias), str(correction))

    def _rounded(self, p: Problem, target: Tensor, best: Tensor, gram: Tensor, start: Grid) -> tuple[Tensor, Grid]:
        """Codes and scales of least loss, from several starts."""
        rows = _Rows(p, best, gram, start, target)
        rows.begin(self.scales, self.rounding)
        for _ in range(self.rounds):
            rows.descend(self.sweeps, self.rounding)
            rows.refit()
        rows.descend(self.sweeps, self.rounding)
        return rows.result(target)


class _Rows:
    """Codes of all outputs on the way to the least loss. Everything is [groups, K, outputs]: a column's codes lie together."""

    def __init__(self, p: Problem, best: Tensor, gram: Tensor, start: Grid, like: Tensor) -> None:
        self.p, self.gram, self.start = p, gram, start
        self.target = best.transpose(1, 2).contiguous()
        self.diagonal = gram.diagonal(dim1=1, dim2=2)
        self.scale, zero, lo, hi = (self._spread(t, like) for t in (start.scale, start.zero, start.lo, start.hi))
        self.lo, self.hi = (lo - zero).float(), (hi - zero).float()
        self.codes = torch.zeros_like(self.target)
        self.shares: dict[int, Sequence[Tensor]] = {}

    def _spread(self, t: Tensor, like: Tensor) -> Tensor:
        """A grid's numbers as [groups, K or 1, outputs]."""
        g, k, o = self.target.shape
        if t.ndim == 2:
            each = t.repeat_interleave(self.start.group or 1, 1)[:, :k]
            return each.reshape(g, o, k).transpose(1, 2).contiguous()
        if t.ndim == 1:
            return t.reshape(g, 1, o)
        return t.reshape(1, 1, 1).expand(g, 1, o).contiguous()

    def limits(self, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """The least and largest code that each weight may take, [groups, K or 1, outputs]."""
        if rounding == "free":
            return self.lo, self.hi
        down = torch.floor(self.target / self.scale)
        return down.clamp(self.lo, self.hi), (down + 1).clamp(self.lo, self.hi)

    def begin(self, factors: tuple[float, ...], rounding: Rounding) -> None:
        """From every factor on the scale, nearest rounding and the greedy pass; each output keeps the best."""
        upper = _unit_factor(self.gram)
        scale, best = self.scale, torch.full_like(self.target[:, 0], float("inf"))
        factors = (1.0,) if self.p.form.power_of_two else factors
        tried = []
        shared = self.start.axis is None  # one scale for all outputs: the best in sum, not the best of each
        for factor in factors:
            wide = scale * factor
            self.scale = wide if self.p.floor is None or factor == 1.0 else torch.maximum(wide, self._floor())
            for codes in (self._nearest(rounding), self._greedy(upper, rounding)):
                self.codes = codes
                tried.append((self.losses(), self.scale, codes))
        if shared:
            _, self.scale, self.codes = min(tried, key=lambda t: float(t[0].sum()))
            return
        kept_scale, kept = scale.clone(), torch.zeros_like(self.target)
        for losses, at, codes in tried:
            better = (losses < best)[:, None]
            best = torch.minimum(best, losses)
            kept_scale = torch.where(better.expand_as(at), at, kept_scale)
            kept = torch.where(better, codes, kept)
        self.scale, self.codes = kept_scale, kept

    def _floor(self) -> Tensor:
        """The least scale for which the bias fits int32."""
        floor = self.p.floor
        assert floor is not None
        return floor.reshape(self.target.shape[0], 1, -1) if floor.ndim else floor.reshape(1, 1, 1)

    def _nearest(self, rounding: Rounding) -> Tensor:
        return torch.round(self.target / self.scale).clamp(*self.limits(rounding))

    def _greedy(self, upper: Tensor, rounding: Rounding) -> Tensor:
        """Round one input after another; those that follow make up for its error (GPTQ's order and blocks)."""
        left, codes = self.target.clone(), torch.empty_like(self.target)
        lows, highs = (self._each(t) for t in self.limits(rounding))
        for begin, end in self._cuts():
            scale = self._scale_of(begin)
            waiting, wanted = left[:, begin:end] / scale, self.target[:, begin:end] / scale
            errors = torch.empty_like(waiting)
            each = zip(*map(_apart, (waiting, wanted, codes[:, begin:end], errors)), strict=True)
            spread = upper[:, begin:end, begin:end, None].unbind(1)
            for i, (now, aim, code, error) in enumerate(each):
                torch.round(now, out=code).clamp_(lows[begin + i], highs[begin + i])
                torch.sub(aim, code, out=error)
                waiting.addcmul_(spread[i], error)  # those before are not read again
            if end < left.shape[1]:
                left[:, end:].baddbmm_(upper[:, begin:end, end:].transpose(1, 2), errors.mul_(scale))
        return codes

    def _cuts(self) -> Iterator[tuple[int, int]]:
        """Blocks of inputs, [begin, end), within each of which an output has one scale."""
        k = self.target.shape[1]
        width = (self.p.form.group or k) if self.scale.shape[1] > 1 else k
        for first in range(0, k, width):
            last = min(k, first + width)
            for begin in range(first, last, _BLOCK):
                yield begin, min(last, begin + _BLOCK)

    def _scale_of(self, i: int) -> Tensor:
        """The scales of an input, [groups, 1, outputs]."""
        return self.scale[:, i : i + 1] if self.scale.shape[1] > 1 else self.scale

    def _each(self, t: Tensor) -> Sequence[Tensor]:
        """Each input's numbers, [groups, 1, outputs]; the same for all where one number holds for all inputs."""
        return _apart(t) if t.shape[1] > 1 else [t] * self.target.shape[1]

    def _shares(self, begin: int, end: int) -> Sequence[Tensor]:
        """What a step of each input of a block adds to the excess of all of them, [groups, end - begin, 1]."""
        if begin not in self.shares:
            block = self.gram[:, begin:end, begin:end] / self.diagonal[:, begin:end, None]
            self.shares[begin] = block[..., None].unbind(2)
        return self.shares[begin]

    def residual(self) -> Tensor:
        """G (s q - W*), [groups, K, outputs]."""
        return product(self.gram, self._errors().transpose(1, 2))

    def _errors(self) -> Tensor:
        return (self.codes * self.scale).sub_(self.target)

    def losses(self) -> Tensor:
        """The local loss of each output, [groups, outputs], less its constant."""
        return self.residual().mul_(self._errors()).sum(1)

    def descend(self, sweeps: int, rounding: Rounding) -> None:
        """Give every code in turn its best value while the others stay; until hardly any moves."""
        lows, highs = (self._each(t) for t in self.limits(rounding))
        errors = self._errors().transpose(1, 2).contiguous()
        for _ in range(sweeps):
            before = self.codes.clone()
            for begin, end in self._cuts():
                scale = self._scale_of(begin)
                # How far each code is too large: G (s q - W*) in steps of the code, kept up to date within the block.
                excess = product(self.gram[:, begin:end], errors).div_(self.diagonal[:, begin:end, None] * scale)
                shares, steps = self._shares(begin, end), torch.empty_like(excess)
                parts = (before[:, begin:end], excess, self.codes[:, begin:end], steps)
                each = zip(*map(_apart, parts), strict=True)
                for i, (old, now, code, step) in enumerate(each):
                    torch.sub(old, now, out=code).round_().clamp_(lows[begin + i], highs[begin + i])
                    torch.sub(code, old, out=step)
                    excess.addcmul_(shares[i], step)  # those before are not read again
                found = (self.codes[:, begin:end] * scale).sub_(self.target[:, begin:end])
                errors[:, :, begin:end] = found.transpose(1, 2)
            if int((self.codes != before).sum()) <= _SETTLED * before.numel():
                return

    def refit(self) -> None:
        """The best scale for the codes as they are: ``<W* G, Q> / <Q G, Q>``, group after group where there are groups."""
        if self.p.form.power_of_two:
            return
        if self.scale.shape[1] == 1:
            weighted = product(self.gram, self.codes.transpose(1, 2))
            above, below = (self.target * weighted).sum(1, keepdim=True), (self.codes * weighted).sum(1, keepdim=True)
            if self.start.axis is None:
                above, below = above.sum().expand_as(above), below.sum().expand_as(below)
            fits = (below > 0) & (above > 0)
            scale = torch.where(fits, above / below.clamp(min=1e-30), self.scale)
            self.scale = scale if self.p.floor is None else torch.maximum(scale, self._floor())
            return
        width = self.p.form.group or 1
        residual = self.residual()
        for begin in range(0, self.codes.shape[1], width):
            part = slice(begin, begin + width)
            q = self.codes[:, part]
            below = (q * (self.gram[:, part, part] @ q)).sum(1, keepdim=True)
            step = torch.where(below > 0, -(residual[:, part] * q).sum(1, keepdim=True) / below.clamp(min=1e-30), 0.0)
            old = self.scale[:, part]
            new = torch.where(old + step > 0.25 * old, old + step, old)
            residual += self.gram[:, :, part] @ ((new - old) * q)
            self.scale = torch.cat([self.scale[:, :begin], new, self.scale[:, begin + width :]], 1)

    def result(self, like: Tensor) -> tuple[Tensor, Grid]:
        """The weight in its own shape, exactly on the grid."""
        form, layer = self.p.form, self.p.layer
        if self.scale.shape[1] > 1:
            scale = self.scale.transpose(1, 2).reshape(like.shape[0], -1)[:, :: form.group or 1].contiguous()
        elif form.axis is None:
            scale = self.scale.flatten()[0]
        else:
            scale = shaped(self.scale.flatten(), like, form)
        grid = replace(self.start, scale=scale)
        parts = (self.codes * self.scale).transpose(1, 2)
        found = unblocks(layer, parts.reshape(blocks(layer, like).shape), like.shape).contiguous()
        return fake_quantize(found, grid), grid


def _apart(t: Tensor) -> Sequence[Tensor]:
    """[groups, 1, outputs] for each input of [groups, inputs, outputs]."""
    return t[:, None].unbind(2)


def _unit_factor(gram: Tensor) -> Tensor:
    """U of G = U D U^T, unit upper triangular, [groups, K, K]: row i tells how the inputs behind i make up for its error."""
    lower = cholesky(gram.flip(1, 2))
    if lower is None:
        lower = torch.linalg.cholesky(damped(gram, 0.01).flip(1, 2).double()).to(gram)
    upper: Tensor = (lower / lower.diagonal(dim1=1, dim2=2)[:, None]).flip(1, 2)
    return upper
