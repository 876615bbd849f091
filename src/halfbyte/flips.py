"""How many decisions noise turns over, estimated from few samples: every sample's margins are paired with every sample's errors.

A count of changed decisions says little on a few hundred samples: where one in a hundred changes, it is off by half as much. But
how near a sample is to a change (its margins) and how far quantization moves it (its errors) hardly depend on each other. So the
mean is taken over all pairs of one sample's margins and another's errors, a two-sample U-statistic (Hoeffding, Annals of
Mathematical Statistics 1948), whose spread comes from its two projections. Where they do depend it is most often because samples
that are clear have large scores and so large errors: then the estimate is too high rather than too low.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_RANKS = 8  # classes that may win: the likeliest ones
_ERRORS = 256  # samples whose errors are tried on all others
_AT_ONCE = 256  # samples whose pairs are held at once
_LEAST_PROBABILITY = 1e-12
_UNSEEN = 50.0  # points of a sample that changes as often as not


def are_probabilities(scores: Tensor) -> bool:
    """Whether class scores [N, classes] are probabilities already."""
    return bool((scores >= 0).all()) and bool(((scores.sum(1) - 1).abs() < 1e-3).all())


@dataclass(frozen=True)
class Decided:
    """Of some samples: the likeliest classes [N, K] of the float network, by how much each stays behind the best [N, K], the errors
    of these scores less that of the best [N, K], and labels [N] if there are any.
    """

    classes: Tensor
    margins: Tensor
    errors: Tensor
    labels: Tensor | None

    @staticmethod
    def of(wanted: Tensor, got: Tensor, labels: Tensor | None = None) -> "Decided":
        """From the float network's scores and the quantized one's, both [N, classes]; of probabilities the logarithms are taken."""
        wanted, got = wanted.detach().double().cpu(), got.detach().double().cpu()
        if are_probabilities(wanted):  # their errors vanish where a sample is clear; those of logits do not
            wanted, got = (t.clamp(min=_LEAST_PROBABILITY).log() for t in (wanted, got))
        top = wanted.topk(min(_RANKS, wanted.shape[1]), dim=1)
        errors = (got - wanted).gather(1, top.indices)
        return Decided(
            top.indices,
            top.values[:, :1] - top.values,
            errors - errors[:, :1],
            None if labels is None else labels.cpu(),
        )

    @staticmethod
    def joined(parts: Iterable["Decided"]) -> "Decided":
        """All samples of several portions."""
        held = list(parts)
        labels = None if any(p.labels is None for p in held) else torch.cat([p.labels for p in held])  # type: ignore[misc]
        classes, margins, errors = (torch.cat([getattr(p, k) for p in held]) for k in ("classes", "margins", "errors"))
        return Decided(classes, margins, errors, labels)


@dataclass(frozen=True)
class Points:
    """Estimated points (hundredths of the samples): by_sample [N], over all errors; by_error [M], over all samples."""

    by_sample: Tensor
    by_error: Tensor

    @property
    def mean(self) -> float:
        """The estimate."""
        return float(self.by_sample.mean())

    def most(self, doubt: float) -> float:
        """The truth lies above this with a chance of about ``doubt``.

        There may be samples nearer to a change than all that were seen; one more, which changes as often as not, stands for them.
        """
        every = torch.cat([self.by_sample, self.by_sample.new_full((1,), _UNSEEN)])
        variance = every.var(correction=0) / len(every) + self.by_error.var(correction=0) / len(self.by_error)
        return float(every.mean()) + statistics.NormalDist().inv_cdf(1 - doubt) * math.sqrt(float(variance))


def points(d: Decided) -> Points:
    """Points that the errors cost: right decisions lost less those gained, or without labels decisions that change."""
    count = len(d.margins)
    tried = torch.linspace(0, count - 1, min(count, _ERRORS)).round().long()
    first = torch.arange(d.classes.shape[1]).expand_as(d.classes) == 0
    right = (first if d.labels is None else d.classes == d.labels[:, None]).double()
    by_sample, by_error = [], torch.zeros(len(tried), dtype=torch.float64)
    for at in range(0, count, _AT_ONCE):
        rows = slice(at, at + _AT_ONCE)
        best = (d.errors[tried] - d.margins[rows, None]).argmax(2)  # [rows, tried]: which rank wins
        lost = right[rows, :1] - right[rows].gather(1, best)
        by_sample.append(100 * lost.mean(1))
        by_error += 100 * lost.sum(0) / count
    return Points(torch.cat(by_sample), by_error)


def least_samples(limit: float, doubt: float) -> int:
    """So many samples are needed to show a limit in points, if none is anywhere near a change."""
    return math.ceil(_UNSEEN * (1 + statistics.NormalDist().inv_cdf(1 - doubt)) / limit) - 1
