"""Whether a network's inputs look like those it was trained on: batch norms remember what their layers put out in training."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from halfbyte.model import Inputs, QModel, value_name
from halfbyte.run import in_batches, run

SHIFT, SPREAD = 1.0, 3.0  # deviations, and a ratio: data of the right kind stay far inside, whatever they show
_DOUBT = 0.15  # squared deviations; below, sampling a few pictures explains it
_RIGHT = 0.2  # of the samples: chance does not set so many right
_CLEARLY = 0.35  # a repair has to leave less than this share of the distance
_SURE = 2.33  # standard deviations of Wilcoxon's statistic: chance alone reaches them once in a hundred networks
_IMAGENET = "those of ImageNet, less mean and over deviation,"
# the ways in which pixels are given, the narrowest first: each as options for pixels of 0..255
_CONVENTIONS = {
    "0..1": "--mean 0 --std 255",
    "-1..1": "--mean 127.5 --std 127.5",
    _IMAGENET: "--mean 123.675,116.28,103.53 --std 58.395,57.12,57.375",
    "0..255": "--mean 0 --std 1",
}
_SWAPPED = "the colours are in the opposite order (RGB and BGR)"


@dataclass(frozen=True)
class Match:
    """shift: how far the first layers' outputs lie from their moments, in standard deviations (median over channels); spread:
    the ratio of standard deviations; distance: both as one squared figure. repair: what would bring them close, if anything
    tried does, as words and as options of the command line; exact: it is a usual slip, not a fit. right: share of labelled samples
    that the float network has right, as they are and repaired. surer: how much surer of its decisions the float network is with
    the colours in the opposite order, as Wilcoxon's signed-rank statistic over the samples, in standard deviations.
    """

    shift: float
    spread: float
    distance: float
    repaired: float = math.inf
    repair: str = ""
    options: str = ""
    exact: bool = False
    right: float | None = None
    repaired_right: float | None = None
    surer: float = 0.0

    @property
    def off(self) -> bool:
        """Too far from the training data to be of the same kind."""
        return self.shift > SHIFT or not 1 / SPREAD <= self.spread <= SPREAD or self.repairable

    @property
    def corrected(self) -> bool:
        """With one of the repairs the float network has clearly more samples right."""
        return self.right is not None and self.repaired_right is not None and self.repaired_right - self.right > _RIGHT

    @property
    def repairable(self) -> bool:
        """One of the repairs brings the inputs clearly nearer, or the decisions, or makes the network surer of them."""
        nearer = self.distance > _DOUBT and self.repaired < _CLEARLY * self.distance
        return self.corrected or nearer or self.surer > _SURE


def match(m: QModel, inputs: Inputs, labels: Tensor | None = None) -> Match | None:
    """Compare with the batch norms' moments; None where the network has none, there are no labels, and no slip shows."""
    # deeper layers differ with what the pictures show, the first with how they were prepared
    first = next((value_name(n) for n in m.graph.nodes if "value" in n.meta and value_name(n) in m.moments), None)
    if not inputs:
        return None

    def judged(x: Tensor) -> tuple[float, float, float, float | None]:
        given = (x, *inputs[1:])
        near = (0.0, 1.0, 0.0) if first is None else _distance(m, given, first)
        return (*near, None if labels is None else _right(m, given, labels))

    shift, spread, distance, right = judged(inputs[0])
    best = Match(shift, spread, distance, right=right)
    for words, options, exact, change in _slips(inputs[0]):
        if not exact and best.repairable and best.exact:
            break  # a usual slip is likelier than a fit, which always comes near
        _, _, repaired, set_right = judged(change(inputs[0]))
        better = repaired < (1.0 if exact else 0.6) * best.repaired
        if labels is not None and best.repaired_right is not None and set_right is not None:
            better = (set_right, -repaired) > (best.repaired_right, -best.repaired)
        if better:
            best = Match(shift, spread, distance, repaired, words, options, exact, right, set_right)
    if not best.repairable and (surer := _surer(m, inputs)) > _SURE:
        return replace(best, repair=f"{_SWAPPED}: the other way round the network is surer of itself,", options="--color bgr",
                       exact=True, surer=surer, repaired_right=None)  # fmt: skip
    return None if first is None and labels is None else best


@torch.no_grad()
def _surer(m: QModel, inputs: Inputs) -> float:
    """Wilcoxon's signed-rank statistic of entropies with the colours as they are and in the opposite order; 0 for other networks.

    Channels by themselves say little about their order: in most pictures red, green and blue spread alike. Each sample is
    compared with itself, so that it does not matter what it shows; and each channel is brought to mean 0 and deviation 1 both
    times, so that statistics in the wrong order do not matter either.
    """
    if inputs[0].ndim != 4 or inputs[0].shape[1] != 3 or not inputs[0].is_floating_point():
        return 0.0
    unsure = []
    for x in (_standard(inputs[0]), _standard(inputs[0]).flip(1)):
        outputs = in_batches(m, (x, *inputs[1:]), partial(run, m.as_float()))
        if len(outputs) != 1 or outputs[0].ndim != 2 or outputs[0].shape[1] < 2:
            return 0.0
        log = outputs[0].double().log_softmax(1)
        unsure.append((-(log.exp() * log).sum(1)).clamp(min=1e-12).log())
    return signed_rank(unsure[0] - unsure[1])


def signed_rank(change: Tensor) -> float:
    """Wilcoxon's signed-rank statistic of [samples] differences, in standard deviations from what chance gives; 0 if none differs."""
    change = change[change != 0]
    count = len(change)
    if not count:
        return 0.0
    ranks = change.abs().argsort().argsort().double() + 1
    expected, variance = count * (count + 1) / 4, count * (count + 1) * (2 * count + 1) / 24
    return float((ranks[change > 0].sum() - expected) / variance**0.5)


@torch.no_grad()
def _right(m: QModel, inputs: Inputs, labels: Tensor) -> float | None:
    """The share of samples that the float network has right."""
    outputs = in_batches(m, inputs, partial(run, m.as_float()))
    if len(outputs) != 1 or outputs[0].ndim != 2:
        return None
    return float((outputs[0].argmax(1).cpu() == labels.cpu()).float().mean())


@torch.no_grad()
def _distance(m: QModel, inputs: Inputs, first: str) -> tuple[float, float, float]:
    """Of a value: shift, ratio of spreads, and both squared (medians over the channels that vary)."""
    (x,), moments = run(m.as_float(), inputs, stop=first), m.moments[first]
    flat = x.movedim(1, 0).flatten(1)
    alive = moments.std > 1e-3 * moments.std.max()
    mean, std = moments.mean[alive], moments.std[alive].clamp(min=1e-12)
    shift = (flat.mean(1)[alive] - mean).abs() / std
    ratio = flat.std(1)[alive].clamp(min=1e-12) / std
    both = shift.square() + ratio.log().square()
    return float(shift.median()), float(ratio.median()), float(both.median())


Change = Callable[[Tensor], Tensor]


def _slips(x: Tensor) -> Iterator[tuple[str, str, bool, Change]]:
    """Usual slips of pre-processing and what undoes them: words, options, whether it is exact, the change to the input."""
    if x.ndim != 4 or not x.is_floating_point():
        return
    if x.shape[1] == 3:
        yield _SWAPPED, "--color bgr", True, lambda t: t.flip(1)
    found = _convention(x)
    if found is not None:
        mean, std = _statistics(found, x)
        for expected, options in _CONVENTIONS.items():
            if expected != found and (x.shape[1] == 3 or expected != _IMAGENET):
                m, s = _statistics(expected, x)
                words = f"pixels as {found} where {expected} is expected"
                yield words, options, True, lambda t, m=m, s=s: (t * std + mean - m) / s  # type: ignore[misc]
    fitted = "mean and standard deviation are missing or others than in training"
    yield fitted, "--mean MEAN --std STD", False, _standard
    if x.shape[1] == 3:
        swapped = f"{_SWAPPED} before mean and standard deviation"
        yield swapped, "--color bgr", False, lambda t: _standard(t).flip(1)


def _convention(x: Tensor) -> str | None:
    """As what the pixels are given, by the ends of what they reach; None where no usual way of scaling gives such ends."""
    low, high = (t.movedim(1, 0).flatten(1) for t in (x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)))
    for name in _CONVENTIONS:
        if x.shape[1] != 3 and name == _IMAGENET:
            continue
        mean, std = (t.flatten() for t in _statistics(name, x))
        pixels = low.amin(1) * std + mean, high.amax(1) * std + mean
        if bool((pixels[0] > -1).all()) and bool((pixels[1] < 256).all()):
            return name
    return None


def _statistics(convention: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of pixels of 0..255, shaped to fit pictures."""
    words = _CONVENTIONS[convention].split()
    mean, std = (torch.tensor([float(v) for v in words[i].split(",")]).view(1, -1, 1, 1).to(x) for i in (1, 3))
    return mean, std


def _standard(x: Tensor) -> Tensor:
    """Each channel of all pictures together with mean 0 and deviation 1."""
    axes = (0, 2, 3)
    return (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True).clamp(min=1e-6)
