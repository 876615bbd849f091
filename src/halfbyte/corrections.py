"""The weight W* of least loss before it is rounded: how far a layer makes up for what the layers before it have lost.

For patches x_hat that the quantized network gives a layer and outputs y that the float network expects of it,

    W* = (E[y x_hat^T] + d W)(G + d I)^-1,   G = E[x_hat x_hat^T],

about the means. W* makes up for the errors of the layers before as far as x_hat tells them; the damping d says how far the samples
are trusted. Where they say little, W* is drawn to W D instead of W: the layers before, each fitted with noisy inputs, put out a
little less of their signals than they should, and gains D of the inputs, one for each, are known from few samples. Some of the
samples choose among these, and then all of them are fitted. What counts there is above all what an error comes to over all
positions of a sample: the layers behind add it up, while errors that differ from position to position average out.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.graph import blocks
from halfbyte.local import Problem
from halfbyte.products import cholesky, product, solved
from halfbyte.second_moments import Accumulator, Patches, SecondMoments, gathered, pooled

_CHOOSING = 4  # one sample of so many chooses among corrections, before it is fitted itself
_SHARED = 0.8  # the weight of errors that all positions of a sample share
_ALIKE = 1e-6  # losses that differ by less differ in rounding
_UNSURE = 0.3  # draws gains of the inputs to 1: a share of what the samples say of each alone
_GAINS = (0.0, 2.0)  # whatever the samples say


@dataclass(frozen=True)
class Correction:
    """How W* comes from what the samples say: drawn to W, or to W D, or one of these itself where there is no damping."""

    taps: int
    damping: float | None = None
    gains: bool = False

    def __str__(self) -> str:
        to = "W D" if self.gains else "W"
        return f"W* = {to}" if self.damping is None else f"damping {self.damping:g} to {to}"

    def of(self, moments: SecondMoments, w: Tensor) -> Tensor:
        """W*, [groups, outputs, K]."""
        to = gained(moments, w, self.taps) if self.gains else w
        return to if self.damping is None else corrected(moments, to, self.damping)


def choose(p: Problem, rows: int, dampings: Collection[float]) -> tuple[Correction, SecondMoments]:
    """The correction that does best, not rounded, on the samples that choose, and the moments of all samples.

    rows: patches to gather, about. dampings: shares of G's mean diagonal; from the middle one, smaller and then larger ones are
    tried as long as each does better than the one before. Besides them W* = W, which ignores the input error, and W* = W D are tried.
    """
    fitted, judges = observed(p, rows)
    centred = p.bias is not None
    moments, judge = fitted.moments(centred=centred), Judge(judges, p)
    parts = blocks(p.layer, p.weight)
    w, taps = parts.flatten(2), parts.shape[3]
    chosen, least = Correction(taps), float("inf")
    to = torch.cat([w, gained(moments, w, taps)], 1)

    def tried(damping: float | None) -> float:
        nonlocal chosen, least
        both = to if damping is None else corrected(moments, to, damping)
        losses = [judge(found, mean_bias(p, moments, found)) for found in both.chunk(2, 1)]
        for gains, loss in zip((False, True), losses, strict=True):
            if loss < least - _ALIKE:
                chosen, least = Correction(taps, damping, gains), loss
        return min(losses)

    tried(None)
    if dampings:
        several, middle = sorted(dampings), len(dampings) // 2
        start = tried(several[middle])
        for side in (several[:middle][::-1], several[middle + 1 :]):
            losses = [start]
            for damping in side:
                losses.append(tried(damping))
                if losses[-1] >= losses[-2]:
                    break
            if min(losses) < start:
                break
    if not judges.means:
        return chosen, moments
    return chosen, pooled(moments, judge.moments if centred else judges.sums.moments(centred=False))


@dataclass(frozen=True)
class Choosing:
    """Of samples that choose: sums over their patches, and the means of each, [groups, samples, K] and [..., outputs]."""

    sums: Accumulator = field(default_factory=Accumulator)
    means: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, count: int, patches: Patches) -> None:
        """Patches of so many samples, one after another."""
        self.sums.add(patches)
        x, y = (t.reshape(len(t), count, -1, t.shape[2]).mean(2) for t in (patches.inputs, patches.outputs))
        self.means.append((x, y))


def observed(p: Problem, rows: int) -> tuple[Accumulator, Choosing]:
    """What the samples say that do not choose, and what those say that do."""
    fitted, choosing, seen = Accumulator(), Choosing(), 0
    for patches, x in zip(gathered(p.layer, p.inputs, p.targets, rows, p.generator()), p.inputs, strict=True):
        n, some = len(x), (seen + len(x)) // _CHOOSING - seen // _CHOOSING
        seen += n
        at = patches.inputs.shape[1] * (n - some) // n
        if some < n:
            fitted.add(Patches(patches.inputs[:, :at], patches.outputs[:, :at]))
        if some:
            choosing.add(some, Patches(patches.inputs[:, at:], patches.outputs[:, at:]))
    return fitted, choosing


class Judge:
    """The error of weights over positions, and over the means of whole samples, both relative to the variance of the outputs.

    Where no sample was spared to choose, those that decide about the layer in the end do.
    """

    def __init__(self, choosing: Choosing, p: Problem) -> None:
        if not choosing.means:
            choosing = Choosing()
            choosing.add(1, p.held_out)
        self.moments = choosing.sums.moments(centred=True)
        self.x, self.y = (torch.cat(parts, 1) for parts in zip(*choosing.means, strict=True))
        spread = (self.y - self.y.mean(1, keepdim=True)).square().mean(1)
        self.levels = [float(t.double().sum()) for t in (self.moments.y_var, spread)]

    def __call__(self, w: Tensor, bias: Tensor | None) -> float:
        """The loss of a weight [groups, outputs, K] and bias [groups, outputs]."""
        m = self.moments
        varying = product(w, m.gram).sub_(m.cross, alpha=2).mul_(w).sum(2) + m.y_var
        shift = (w @ m.x_mean[:, :, None])[:, :, 0] - m.y_mean
        means = self.x @ w.transpose(1, 2) - self.y
        if bias is not None:
            shift, means = shift + bias, means + bias[:, None]
        losses = (varying + shift.square(), means.square().mean(1))
        over, shared = (float(t.double().sum()) / v if v > 0 else 0.0 for t, v in zip(losses, self.levels, strict=True))
        return (1 - _SHARED) * over + _SHARED * shared


def gained(moments: SecondMoments, w: Tensor, taps: int) -> Tensor:
    """W D, [groups, outputs, K]: gains D of the inputs, the same for all taps, of least squared error over all outputs."""
    groups, _, k = w.shape
    inputs = k // taps
    columns = w.transpose(1, 2)
    gram = product(columns, columns).mul_(moments.gram).reshape(groups, inputs, taps, inputs, taps).sum((2, 4))
    cross = (w * moments.cross).sum(1).reshape(groups, inputs, taps).sum(2)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    unsure = _UNSURE * diagonal + torch.finfo(w.dtype).eps * diagonal.mean(1, keepdim=True)
    unsure = torch.where(unsure > 0, unsure, torch.ones_like(unsure))
    gains = torch.linalg.solve(gram + torch.diag_embed(unsure), (cross + unsure)[:, :, None])[:, :, 0]
    found: Tensor = w * gains.clamp(*_GAINS).repeat_interleave(taps, 1)[:, None]
    return found


def corrected(moments: SecondMoments, to: Tensor, damping: float) -> Tensor:
    """W*, [groups, outputs, K]: the least squares solution, drawn ``to`` weights where the samples say little.

    Several weights may stand behind one another, [groups, several times outputs, K].
    """
    gram = damped(moments.gram, damping)
    step = gram.diagonal(dim1=1, dim2=2) - moments.gram.diagonal(dim1=1, dim2=2)
    cross = moments.cross.repeat(1, to.shape[1] // moments.cross.shape[1], 1)
    right = cross + to * step[:, None]
    factor = cholesky(gram)
    if factor is not None:
        return solved(right, factor)
    exact: Tensor = torch.linalg.solve(gram.double(), right.transpose(1, 2).double())
    return exact.transpose(1, 2).to(to)


def damped(gram: Tensor, damping: float) -> Tensor:
    """G + d I, d as a share of the mean diagonal; a dead input gets a neutral diagonal."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1)
    level = torch.where(level > 0, level, torch.ones_like(level))
    found = gram.clone()
    found.diagonal(dim1=1, dim2=2).add_(damping * level[:, None])
    return found


def mean_bias(p: Problem, moments: SecondMoments, w: Tensor) -> Tensor | None:
    """The bias [groups, outputs] that takes up the mean error of a weight."""
    return None if p.bias is None else moments.y_mean - (w @ moments.x_mean[:, :, None])[:, :, 0]
