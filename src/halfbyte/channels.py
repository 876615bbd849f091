"""What each channel of a running value looks like: its ends, its moments, and how often it is active."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.effects import judged
from halfbyte.model import Inputs, QModel
from halfbyte.moments import propagate
from halfbyte.run import portions, run

# Real values have heavier tails than normal ones: a channel that was scaled up because it is hardly ever active must not be cut
# off on the one sample where it is.
_FAR = 12.0
# A few samples cannot say that a channel is always smaller than this share of the largest.
_UNSEEN = 16.0
_CLIPS = (1.0, 0.8, 0.63, 0.5, 0.4, 0.315, 0.25, 0.2, 0.16)  # shares of what a channel reaches


class Seen(NamedTuple):
    """Of each channel, [channels]: the least and the greatest value, the mean, the mean square, the share that is not zero."""

    low: Tensor
    high: Tensor
    mean: Tensor
    power: Tensor
    active: Tensor


def expected(m: QModel, axes: Mapping[str, int]) -> dict[str, Seen]:
    """Values according to the moments of batch norms. axes: the dimension of the channels of each wanted one."""
    found = {}
    for name, s in propagate(m).items():
        if name in axes:
            axis = axes[name]
            least, greatest = (t.movedim(axis, 0).flatten(1) for t in s.ends(_FAR))
            power = s.channels(axis, s.var + s.mean.square())
            zero = torch.special.ndtr((s.low - s.mu) / s.sigma.clamp(min=1e-30)) * (s.low == 0)
            active = 1 - s.channels(axis, zero)
            found[name] = Seen(least.amin(1), greatest.amax(1), s.channels(axis, s.mean), power, active)
    return found


@torch.no_grad()
def measured(m: QModel, data: Iterable[Inputs], axes: Mapping[str, int]) -> dict[str, Seen]:
    """Values according to data. axes: the dimension of the channels of each wanted one."""
    found: dict[str, Seen] = {}
    count: dict[str, int] = {}

    def tap(name: str, x: Tensor) -> Tensor:
        if name in axes:
            flat = x.movedim(axes[name], 0).flatten(1)
            sums = flat.sum(1), flat.square().sum(1), (flat != 0).float().sum(1)
            low, high = flat.amin(1), flat.amax(1)
            if name in found:
                old = found[name]
                low, high = torch.minimum(old.low, low), torch.maximum(old.high, high)
                sums = old.mean + sums[0], old.power + sums[1], old.active + sums[2]
            found[name] = Seen(low, high, *sums)
            count[name] = count.get(name, 0) + flat.shape[1]
        return x

    for batch in portions(m, data):
        run(m.as_float(), batch, tap)
    return {n: Seen(*_raised(s.low, s.high), *(t / count[n] for t in s[2:])) for n, s in found.items()}


def _raised(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The ends, none much nearer to zero than those of the channel that reaches farthest."""
    floor = torch.maximum(high, -low).max() / _UNSEEN
    return torch.minimum(low, -floor * (low < 0)), torch.maximum(high, floor * (high > 0))


def clipped(
    m: QModel, data: Iterable[Inputs], seen: Mapping[str, Seen], axes: Mapping[str, int], bits: int
) -> dict[str, Seen]:
    """The same, but the ends of some values are those that disturb the outputs least, each channel on a grid of its own.

    Of few bits, a grid that holds the largest value of a channel is coarse for all the others. axes: the dimension of the channels of
    these values. bits: of the grid.
    """
    effects = {n: torch.zeros(len(_CLIPS), len(seen[n].low), dtype=torch.float64) for n in axes if n in seen}
    for _, some in judged(m, data, effects):
        for name, (x, gradients) in some.items():
            effects[name] += _squares(x, gradients, axes[name], seen[name], bits)
    found = dict(seen)
    for name, effect in effects.items():
        s = seen[name]
        share = torch.tensor(_CLIPS, device=s.low.device)[effect.argmin(0).to(s.low.device)]
        low, high = _raised(s.low * share, s.high * share)
        found[name] = s._replace(low=low, high=high)
    return found


@torch.no_grad()
def _squares(x: Tensor, gradients: list[Tensor], axis: int, seen: Seen, bits: int) -> Tensor:
    """Sum of squared first-order changes of the outputs, float64 [clips, channels]."""
    flat, *slopes = (t.movedim(axis, 1).flatten(2) if t.ndim > 2 else t[:, :, None] for t in (x, *gradients))
    low, high = (t.reshape(1, -1, 1) for t in (seen.low.clamp(max=0), seen.high.clamp(min=0)))
    rows = []
    for clip in _CLIPS:
        step = ((high - low) * (clip / (2.0**bits - 1))).clamp(min=torch.finfo(x.dtype).tiny)
        least, greatest = ((end * clip / step).round() for end in (low, high))
        change = (flat / step).round_().clamp_(least, greatest).mul_(step).sub_(flat)
        rows.append(torch.stack([(change * s).sum(2).double().square().sum(0) for s in slopes]).sum(0).cpu())
    return torch.stack(rows)
