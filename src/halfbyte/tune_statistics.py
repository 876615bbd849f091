"""Tuning of statistics: each channel gets the mean and the spread back that quantization has taken from it (arXiv 2006.10518).

CalibTIP rebuilds the batch norms behind quantized layers, lets them see calibration data, and folds them again ("para-
normalization"). On a folded network the same is done to each layer directly: a factor on the scale of the weight's grid, so that
the integer weights stay, and a new bias. The wanted statistics are those of the float network on the same samples, and not what the
batch norms remember: both networks then see the same pictures, so that what is peculiar to the samples cancels, nothing changes where
nothing was rounded, and networks without batch norms, or with channels scaled by equalization, are served alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid, dequantize, quantize
from halfbyte.calibrate import Progress, bias_floor, silent
from halfbyte.correct import check_bias_bits
from halfbyte.errors import UsageError
from halfbyte.graph import bias_of, groups, input_axis, layers, weight_of
from halfbyte.losses import noise_to_signal
from halfbyte.model import Inputs, LogEntry, QModel, value_name
from halfbyte.ops import CONV_TRANSPOSE
from halfbyte.reconstruct import split, why_not
from halfbyte.run import fixed_batch, portions
from halfbyte.walk import Frontier, walk

_HELD_OUT = 4  # statistics need few samples, a decision more: one sample of so many decides
_DEAD = 1e-2  # a channel that has a smaller share of its variance left has nothing to scale
_LARGEST = 4.0  # factor on a scale, and its inverse


def tune_statistics(
    m: QModel, data: Iterable[Inputs], *, budget: int | None = None, progress: Progress = silent
) -> QModel:
    """Give each channel of each layer its float mean and standard deviation back. Use after weights have been chosen.

    data: unlabelled batches; 64 samples will do. The last quarter of each is held out: the model stays as it was unless its
    outputs do better there, and a channel unless its own error does not grow. Layers follow each other in graph order, each with
    everything before it quantized and tuned. No integer weight changes and no gradient is used: a weight's scale is multiplied by
    ``f = std_float / std_quantized``, its bias becomes ``f (b - mean_quantized) + mean_float``. Where one scale is shared by all
    channels, or is a power of two, the bias alone takes the mean. budget: bytes of running values to hold in memory. Raises
    :class:`UsageError` for a model without grids and for a target whose biases have too few bits.
    """
    if not m.grids or m.target is None:
        raise UsageError("there are no statistics to tune yet: call place and calibrate before tune_statistics")
    check_bias_bits(m.target)
    fit, held = (list(portions(m, part)) for part in split(data, _HELD_OUT, fixed_batch(m)))
    order = {layer: i for i, layer in enumerate(layers(m.graph), 1)}

    def visit(now: QModel, layer: fx.Node, x: Frontier, y: Frontier) -> QModel:
        progress("tune_statistics", order[layer], len(order))
        reason = why_not(now, layer)
        if reason:
            return now.logged(LogEntry("tune_statistics", value_name(layer), f"left as it is: {reason}"))
        return _tuned(now, layer, x, y, len(fit))

    tuned = walk(m, [*fit, *held], visit, budget=budget)
    before, after = (noise_to_signal(v, held, m.as_float()) for v in (m, tuned))
    figures = {"method": "tune_statistics", "before": before, "after": after, "kept": after < before}
    text = f"noise-to-signal at the outputs on held-out samples {before:.4g} before, {after:.4g} after"
    if after < before:
        return tuned.logged(LogEntry("tune_statistics", None, f"kept: {text}", figures))
    return m.logged(LogEntry("tune_statistics", None, f"undone: {text}", figures))


@dataclass
class _Moments:
    """Sums over what a layer puts out in both networks, float64 [channels]."""

    count: int = 0
    sums: list[Tensor] = field(default_factory=list)

    def add(self, found: Tensor, wanted: Tensor) -> None:
        """More values, [channels, values] each."""
        a, b = found.double(), wanted.double()
        new = [a.sum(1), a.square().sum(1), b.sum(1), b.square().sum(1)]
        self.sums = [s + n for s, n in zip(self.sums, new, strict=True)] if self.sums else new
        self.count += found.shape[1]

    def repair(self) -> tuple[Tensor, Tensor, Tensor]:
        """The factor, the mean found and the mean wanted, [channels]."""
        mean, square, wanted, wanted_square = (s / self.count for s in self.sums)
        var, wanted_var = square - mean.square(), wanted_square - wanted.square()
        alive = (wanted_var > 1e-12 * wanted_square) & (var >= _DEAD * wanted_var)
        ratio = (wanted_var / torch.where(alive, var, torch.ones_like(var))).clamp(min=0).sqrt()
        factor = torch.where(alive, ratio, torch.ones_like(ratio)).clamp(1 / _LARGEST, _LARGEST)
        return factor.float(), mean.float(), wanted.float()


def _tuned(m: QModel, layer: fx.Node, x: Frontier, y: Frontier, count: int) -> QModel:
    """The model with this layer's statistics repaired, as told by the first ``count`` batches."""
    weight, bias = weight_of(layer), bias_of(layer)
    assert weight is not None
    grid = m.grid(value_name(weight))
    assert grid is not None
    codes = quantize(m.parameters[str(weight.target)], grid)
    b = None if bias is None else m.parameters[str(bias.target)]
    w = dequantize(codes, grid)
    outputs = [layer.target(t, w, b, *layer.args[3:]) for t in x]  # type: ignore[operator]
    pairs = [(_channels(layer, a), _channels(layer, t)) for a, t in zip(outputs, y, strict=True)]
    moments = _Moments()
    for found, wanted in pairs[:count]:
        moments.add(found, wanted)
    factor, mean, target = moments.repair()
    if not _own_scales(m, layer, grid):
        factor = torch.ones_like(factor)
    shift = factor * mean if b is None else target  # without a bias the mean goes where the factor takes it
    better = _better(pairs[count:], factor, mean, shift)
    factor = torch.where(better, factor, torch.ones_like(factor))
    tuned, grids = dict(m.tuned), dict(m.grids)
    if bias is not None and b is not None:
        new_bias = torch.where(better, factor * b + (target - factor * mean), b)
        floor = bias_floor(replace(m, tuned={**tuned, str(bias.target): new_bias}), layer, grid)
        room = torch.ones_like(better) if floor is None else floor <= grid.scale * factor
        factor = torch.where(room, factor, torch.ones_like(factor))
        tuned[str(bias.target)] = torch.where(room, new_bias, b)
        better = better & room
    if bool((factor != 1).any()):
        new = replace(grid, scale=grid.scale * (factor if grid.group is None else factor[:, None]))
        tuned[str(weight.target)], grids[value_name(weight)] = dequantize(codes, new), new
    return replace(m, tuned=tuned, grids=grids).logged(_entry(layer, factor, better))


def _channels(layer: fx.Node, y: Tensor) -> Tensor:
    """What a layer puts out as [channels, values]."""
    return y.movedim(input_axis(layer), 0).flatten(1)


def _own_scales(m: QModel, layer: fx.Node, grid: Grid) -> bool:
    """Whether each output channel has a scale of its own that may take any value."""
    form = m.plan[value_name(layer.args[1])]  # type: ignore[arg-type]
    mixed = layer.target is CONV_TRANSPOSE and groups(layer) > 1
    return form is not None and not form.power_of_two and grid.axis is not None and not mixed


def _better(pairs: list[tuple[Tensor, Tensor]], factor: Tensor, mean: Tensor, shift: Tensor) -> Tensor:
    """Which channels do not lose by ``factor (y - mean) + shift`` on held-out values, bool [channels]."""
    before, after = torch.zeros_like(factor), torch.zeros_like(factor)
    for found, wanted in pairs:
        before += (found - wanted).square().sum(1)
        after += (factor[:, None] * (found - mean[:, None]) + shift[:, None] - wanted).square().sum(1)
    return after <= before


def _entry(layer: fx.Node, factor: Tensor, better: Tensor) -> LogEntry:
    changed = factor[factor != 1]
    scaled = f"{len(changed)} of {len(factor)} channels scaled"
    if len(changed):
        scaled += f" by {float(changed.min()):.3g} to {float(changed.max()):.3g}"
    text = f"{scaled}, {int((~better).sum())} left as they are"
    return LogEntry("tune_statistics", value_name(layer), text)
