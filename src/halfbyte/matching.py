"""Whether a network's inputs look like those it was trained on: batch norms remember what their layers put out in training."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.model import Inputs, Moments, QModel, value_name
from halfbyte.run import run

SHIFT, SPREAD = 1.0, 3.0  # deviations, and a ratio: data of the right kind stay far inside, whatever they show
_FIRST = 3  # deeper layers differ with what the pictures show, the first with how they were prepared
_DOUBT = 0.15  # squared deviations; below, sampling a few pictures explains it
_CLEARLY = 0.25  # a repair has to leave less than this share of the distance


@dataclass(frozen=True)
class Match:
    """shift: how far the first layers' outputs lie from their moments, in standard deviations (median over channels); spread:
    the ratio of standard deviations; distance: both as one squared figure. repair: what would bring them close, if anything
    tried does, as words and as options of the command line; exact: it is a usual slip, not a fit.
    """

    shift: float
    spread: float
    distance: float
    repaired: float = math.inf
    repair: str = ""
    options: str = ""
    exact: bool = False

    @property
    def off(self) -> bool:
        """Too far from the training data to be of the same kind."""
        return self.shift > SHIFT or not 1 / SPREAD <= self.spread <= SPREAD or self.repairable

    @property
    def repairable(self) -> bool:
        """One of the repairs brings the inputs clearly nearer."""
        return self.distance > _DOUBT and self.repaired < _CLEARLY * self.distance


def match(m: QModel, inputs: Inputs) -> Match | None:
    """Compare with the batch norms' moments; None where the network has none near its inputs."""
    known = [value_name(n) for n in m.graph.nodes if "value" in n.meta and value_name(n) in m.moments][:_FIRST]
    if not known or not inputs:
        return None
    shift, spread, distance = _distance(m, inputs, known)
    best = Match(shift, spread, distance)
    for words, options, exact, change in _slips(inputs[0]):
        with torch.no_grad():
            repaired = _distance(m, (change(inputs[0]), *inputs[1:]), known)[2]
        if repaired < (1.0 if exact else 0.5) * best.repaired:  # a usual slip is likelier than a fit
            best = Match(shift, spread, distance, repaired, words, options, exact)
    return best


@torch.no_grad()
def _distance(m: QModel, inputs: Inputs, known: list[str]) -> tuple[float, float, float]:
    seen: dict[str, Tensor] = {}

    def tap(name: str, x: Tensor) -> Tensor:
        if name in known:
            seen[name] = x
        return x

    run(m.as_float(), inputs, tap, stop=known[-1])
    found = [_off(seen[name], m.moments[name]) for name in known if name in seen]
    shift, spread = found[0][:2]
    return shift, spread, sum(f[2] for f in found) / len(found)


def _off(x: Tensor, moments: Moments) -> tuple[float, float, float]:
    """Of one value: shift, ratio of spreads, and both squared (medians over the channels that vary)."""
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
        yield "the colours are in the opposite order (RGB and BGR)", "--color bgr", True, lambda t: t.flip(1)
    low, high = float(x.min()), float(x.max())
    axes = (0, 2, 3)
    if high > 2:
        yield "pixels of 0..255 where 0..1 is expected", "--mean 0 --std 255", True, lambda t: t / 255
        yield "pixels of 0..255 where -1..1 is expected", "--mean 127.5 --std 127.5", True, lambda t: t / 127.5 - 1
    else:
        yield "pixels of 0..1 where 0..255 is expected", "--mean 0 --std 1", True, lambda t: t * 255
    if low >= -1e-6 and high <= 1 + 1e-6:
        yield "pixels of 0..1 where -1..1 is expected", "--mean 127.5 --std 127.5", True, lambda t: t * 2 - 1
    fitted = "mean and standard deviation are missing or others than in training"
    yield (
        fitted,
        "--mean MEAN --std STD",
        False,
        lambda t: (t - t.mean(axes, keepdim=True)) / t.std(axes, keepdim=True).clamp(min=1e-6),
    )
