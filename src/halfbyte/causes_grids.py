"""Causes that lie in the grids: ranges that fit other data, or none; channels and values too unlike for one scale; biased rounding;
sums that do not fit their accumulators.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, fx

from halfbyte import engine
from halfbyte.affine import Grid, quantize
from halfbyte.diagnosis import Cause
from halfbyte.evidence import GAIN, Evidence
from halfbyte.graph import bias_of, by_value, input_axis, is_depthwise, layers, weight_of
from halfbyte.grids import MSE, from_range
from halfbyte.model import QModel, value_name
from halfbyte.probes import Seen

_INT32 = 2**31 - 1
_PAIR = (2**15 - 1) / 255  # the largest sum of two neighbouring codes whose products with 255 fit 16 bits
_MISFIT = 4.0  # a grid with this many times the error of the best one costs a bit or more
_DOMINATES = 8.0  # the widest channel over the median one: the median channel is left with three bits fewer
_PEAK = 4.0  # the largest magnitude over the 99.9 % quantile: two bits for one value in a thousand
_SOME_PEAK = 2.0  # where no range of few bits fits, already one bit for one value in a thousand tells why
_BIASED = 0.2  # of the error's power is the same for every sample; where biases were corrected, hardly any is
_KNEE = 24  # bits of the trial that shows how much a value's rounding costs: as good as float


def unlike(e: Evidence) -> Iterable[Cause]:
    """Ranges that fit what they were chosen on, and not what the network is used on."""
    if not e.separate:
        return
    off = e.calibration is not None and e.calibration.off and e.data is not None and not e.data.off
    values = [
        v
        for v, s in e.seen.items()
        if s.noise > _MISFIT * s.best and (off or _misfit(e.chosen_on.get(v, s)) <= _MISFIT)
    ]
    if not values or e.faultless:
        return
    gain = e.gain({v: _regrid(e.m, v, e.seen[v].best_grid) for v in values})
    if gain >= GAIN:
        worst = max(values, key=lambda v: _misfit(e.seen[v]))
        yield Cause(
            "calibration data unlike the evaluation data",
            f"{len(values)} ranges fit the calibration samples and not the data, {worst} most: {_misfit(e.seen[worst]):.0f} "
            f"times the least error; ranges from the data take {gain:.0%} of the noise away",
            _misfit(e.seen[worst]), _MISFIT, "four times the least error is a bit lost", gain + (1.0 if off else 0.05),
            e.again("--calibration SAMPLES_LIKE_THE_DATA"), values=tuple(values),
        )  # fmt: skip


def _misfit(s: Seen) -> float:
    return s.noise / max(s.best, 1e-6 * s.power, 1e-30)


def _regrid(m: QModel, value: str, grid: Grid) -> Grid:
    """The grid with the limits of a clamp, as far as the clamp had any."""
    old, form = m.grids[value], m.plan[value]
    assert form is not None  # it has a grid
    if bool((old.lo > form.lo).any()):
        return replace(grid, lo=torch.maximum(grid.zero, grid.lo))
    return grid


def ranges(e: Evidence) -> Iterable[Cause]:
    """Running values and weights whose grid is far from the one of least error."""
    basis = e.chosen_on if e.separate and e.chosen_on else e.seen
    misfits = {v: (_misfit(s), bool(s.grid.scale > s.best_grid.scale)) for v, s in basis.items()}
    fits = {v: _regrid(e.m, v, s.best_grid) for v, s in basis.items()}
    for v, grid in _weight_fits(e.m).items():
        now, best = (_weight_error(e.m, v, g) for g in (e.m.grids[v], grid))
        misfits[v] = now / max(best, 1e-30), bool((e.m.grids[v].scale / grid.scale).median() > 1)
        fits[v] = grid
    for wide, name, what in (
        (True, "too wide ranges", "most codes are never used"),
        (False, "too narrow ranges", "what lies beyond is cut off"),
    ):
        values = [v for v, (ratio, is_wide) in misfits.items() if ratio > _MISFIT and is_wide is wide]
        if not values or e.faultless:
            continue
        gain = e.gain({v: fits[v] for v in values})
        worst = max(values, key=lambda v: misfits[v][0])
        if gain >= GAIN:
            yield Cause(
                name,
                f"{len(values)} values have ranges far from that of least error, {worst} most ({misfits[worst][0]:.0f} times the "
                f"error): {what}; ranges of least error take {gain:.0%} of the noise away",
                misfits[worst][0], _MISFIT, "four times the least error is a bit lost", gain,
                e.again("--activation-range mse", "--weight-range mse"), values=tuple(values),
            )  # fmt: skip


def _weight_fits(m: QModel) -> dict[str, Grid]:
    found = {}
    for layer in layers(m.graph):
        weight = weight_of(layer)
        form = None if weight is None else m.plan.get(value_name(weight))
        if weight is not None and form is not None and value_name(weight) in m.grids and form.group is None:
            pairs = m.target is not None and m.target.narrow_products and not is_depthwise(layer)
            found[value_name(weight)] = MSE().weight(m.params[str(weight.target)], form, pairs)
    return found


def _weight_error(m: QModel, value: str, grid: Grid) -> float:
    w = m.params[str(by_value(m.graph)[value].target)]
    codes = quantize(w, grid)
    shape = [1] * w.ndim
    if grid.axis is not None:
        shape[grid.axis] = -1
    scale = grid.scale.reshape(shape) if grid.axis is not None else grid.scale
    return float((codes * scale - w).square().mean())


def uneven(e: Evidence) -> Iterable[Cause]:
    """One scale for channels, or for values, that differ by orders of magnitude."""
    if e.fine:
        return
    yield from _uneven_weights(e)
    broad = {v: _dominance(s.high, s.low) for v, s in e.seen.items()}
    misfits = {v: _misfit(s) for v, s in e.seen.items()}
    fitting = [v for v, ratio in misfits.items() if ratio <= _MISFIT]
    peaks = _peaks(e, fitting)
    # a channel dominates by what it usually is; one that is wide by rare values alone is a matter of those
    bulk = {v: _dominance(e.seen[v].usual, -e.seen[v].usual) for v in fitting}
    values = [v for v in fitting if broad[v] >= _DOMINATES and bulk[v] ** 2 >= broad[v]]
    by_channel = e.gain({v: _per_channel(e.m, v, e.seen[v]) for v in values}) if values else 0.0
    by_width = e.gain({v: _widened(e.seen[v], e.m, v) for v in peaks}) if peaks else 0.0
    if by_channel >= GAIN:
        worst = max(values, key=lambda v: (e.alone.get(v, 0.0), broad[v]))
        s = e.seen[worst]
        dead = int(((s.high - s.low) <= 0).sum())
        yield Cause(
            "dead or dominating channels",
            f"in {worst} the widest channel is {broad[worst]:.0f} times the median one"
            + (f", and {dead} of {len(s.high)} are dead" if dead else "")
            + f"; a scale for each channel would take {by_channel:.0%} of the noise away",
            broad[worst], _DOMINATES, "the median channel is left with three bits fewer", by_channel,
            e.again("--recipe low-bit"), values=tuple(values),
        )  # fmt: skip
    if by_width >= GAIN and by_channel < 0.5 * by_width:
        worst = max(peaks, key=lambda v: (e.alone.get(v, 0.0), e.seen[v].peak))
        peak, ratio = e.seen[worst].peak, misfits[worst]
        measured, least, text = peak, _PEAK, f"the largest value of {worst} is {peak:.0f} times the 99.9 % quantile"
        if peak < _PEAK:
            measured, least = ratio, _MISFIT
            text = f"the few largest values of {worst}, which are needed, cost all others {ratio:.0f} times the least error"
        yield Cause(
            "outlier activations",
            f"{text}; such values in float would take {by_width:.0%} of the noise away",
            measured, least, "a few values cost all others two bits and more", by_width,
            e.again(*(f"--keep-float '{n}'" for n in _readers(e.m, worst)[:1])), values=tuple(peaks),
        )  # fmt: skip


def _peaks(e: Evidence, fitting: list[str]) -> list[str]:
    """Values with a few far larger than all others, which are needed: fitting ones, and others unless the range is to blame."""
    found = [v for v, s in e.seen.items() if s.peak >= (_PEAK if v in fitting else _SOME_PEAK)]
    cut = {v: _regrid(e.m, v, e.seen[v].best_grid) for v in found if v not in fitting}
    return [v for v in found if v in fitting] if cut and e.gain(cut) >= GAIN else found


def _readers(m: QModel, value: str) -> list[str]:
    """Layers that read a value, perhaps through moves; the value itself if there are none."""
    nodes, group = by_value(m.graph), [value, *(v for v, root in m.ties.items() if root == value)]
    found = [value_name(u) for v in group if v in nodes for u in nodes[v].users if u in set(layers(m.graph))]
    return found or [value]


def _uneven_weights(e: Evidence) -> Iterable[Cause]:
    grids, broad = {}, {}
    for layer in layers(e.m.graph):
        weight = weight_of(layer)
        form = None if weight is None else e.m.plan.get(value_name(weight))
        if weight is None or form is None or form.axis is not None or value_name(weight) not in e.m.grids:
            continue
        w = e.m.parameters[str(weight.target)]
        reach = w.flatten(1).abs().amax(1)
        ratio = _dominance(reach, -reach)
        if ratio >= _DOMINATES:
            broad[value_name(weight)] = ratio
            grids[value_name(weight)] = MSE().weight(w, replace(form, axis=0), pairs=False)
    gain = e.gain(grids) if grids else 0.0
    if gain >= GAIN:
        worst = max(broad, key=lambda v: (e.alone.get(v, 0.0), broad[v]))
        yield Cause(
            "dead or dominating channels",
            f"{len(broad)} weights have one scale for channels of very different size, in {worst} the largest is "
            f"{broad[worst]:.0f} times the median; a scale for each would take {gain:.0%} of the noise away",
            broad[worst], _DOMINATES, "the median channel is left with three bits fewer", gain,
            e.again("--target onnxruntime"), values=tuple(broad),
        )  # fmt: skip


def _dominance(high: Tensor, low: Tensor) -> float:
    """The reach of the widest channel over the median of those that are alive."""
    reach = torch.maximum(high.abs(), low.abs())
    alive = reach[reach > 1e-6 * reach.max()] if len(reach) else reach
    return float(reach.max() / alive.median()) if len(alive) > 1 else 1.0


def _per_channel(m: QModel, value: str, s: Seen) -> Grid:
    """No engine has such a grid: it shows how much of the noise comes from channels sharing a scale."""
    form = m.plan[value]
    assert form is not None  # it has a grid
    parts = [from_range(float(lo), float(hi), form) for lo, hi in zip(s.low, s.high, strict=True)]
    scale, zero = torch.stack([p.scale for p in parts]), torch.stack([p.zero for p in parts])
    node = by_value(m.graph)[value]
    rank = len(node.meta["shape"])
    lo = torch.maximum(zero, s.grid.lo) if bool((s.grid.lo > form.lo).any()) else torch.full_like(zero, form.lo)
    axis = 1 if rank > 3 else rank - 1
    return Grid(scale, zero, lo, torch.full_like(zero, form.hi), axis=axis)


def _widened(s: Seen, m: QModel, value: str) -> Grid:
    """The range of the value itself in so many steps that hardly a rounding is left, more than any format has."""
    form = m.plan[value]
    assert form is not None  # it has a grid
    low, high, steps = min(0.0, s.histogram.minimum), max(0.0, s.histogram.maximum), 2**_KNEE - 2
    scale = max((high - low) / steps, 1e-30)
    zero = round(-low / scale)
    limited = bool((s.grid.lo > form.lo).any())
    codes = torch.tensor((zero, zero * limited, steps + 1), dtype=torch.int32, device=s.grid.scale.device)
    return Grid(torch.full_like(s.grid.scale, scale), codes[0], codes[1], codes[2])


def biased(e: Evidence) -> Iterable[Cause]:
    """Rounding errors that are the same for every sample: few weights for each channel, or codes that were cut off."""
    nodes = by_value(e.m.graph)
    shifts = {name: _along(nodes[name], error.mean) for name, error in e.errors.items() if error.biased > _BIASED}
    if not shifts or e.faultless:
        return
    gain = e.gain(shifts=shifts)
    if gain < GAIN:
        return
    worst = list(shifts)
    worst.sort(key=lambda n: -e.errors[n].noise * e.errors[n].biased)
    deep = sum(e.errors[n].depthwise for n in worst)
    yield Cause(
        "biased error of depthwise layers" if e.errors[worst[0]].depthwise else "biased error of layers",
        f"in {len(worst)} layers ({deep} depthwise), {worst[0]} most, {e.errors[worst[0]].biased:.0%} of the rounded weights' error is "
        f"the same for every sample; taken into the biases, {gain:.0%} of the noise goes away",
        e.errors[worst[0]].biased, _BIASED, "where biases were corrected hardly any of the error's power is its mean", gain,
        e.again("--recipe dfq"), values=tuple(worst),
    )  # fmt: skip


def _along(layer: fx.Node, channels: Tensor) -> Tensor:
    """One number for each channel, shaped to fit the layer's output."""
    shape = [1] * len(layer.meta["shape"])
    shape[input_axis(layer)] = -1
    return channels.reshape(shape)


def accumulators(e: Evidence) -> Iterable[Cause]:
    """Sums, or biases, that the engine's integers cannot hold."""
    over: dict[str, float] = {}
    pairs: list[str] = []
    narrow = engine.saturates() and e.m.target is not None and e.m.target.engine == "onnxruntime"
    for layer in layers(e.m.graph):
        weight, x = weight_of(layer), layer.args[0]
        grid = None if weight is None else e.m.grid(value_name(weight))
        x_grid = _fitting(e, value_name(x)) if isinstance(x, fx.Node) and "value" in x.meta else None
        if weight is None or grid is None or x_grid is None or grid.group is not None:
            continue
        reach = accumulated(e.m, layer, weight, grid, x_grid)
        if reach > _INT32:
            over[value_name(layer)] = reach
        if narrow and e.m.plan[value_name(weight)].bits == 8 and not is_depthwise(layer):  # type: ignore[union-attr]
            codes = quantize(e.m.parameters[str(weight.target)], grid).movedim(grid.axis or 0, 0).flatten(1)
            two = max(float(t.clamp(min=0).topk(min(2, t.shape[1]), 1).values.sum(1).max()) for t in (codes, -codes))
            if two > _PAIR and e.m.target is not None and not e.m.target.narrow_products:
                pairs.append(value_name(layer))
    if over:
        worst = max(over, key=lambda n: over[n])
        yield Cause(
            "saturated accumulators",
            f"{worst} can reach sums of {over[worst]:.2g}, products and bias together, and int32 ends at {_INT32:.3g}",
            over[worst], float(_INT32), "the end of int32", 2.0, e.again(f"--keep-float '{worst}'"), order=1,
            values=tuple(over),
        )  # fmt: skip
    elif pairs and e.parity is not None and not e.parity.proven:
        yield Cause(
            "saturated accumulators",
            f"this CPU adds pairs of 8-bit products in 16 bits, and {len(pairs)} layers have pairs of weights that overflow it",
            float(len(pairs)), 0.0, "255 times two neighbouring codes has to stay below 2^15", 2.0,
            e.again("--target onnxruntime-avx2"), order=1, values=tuple(pairs),
        )  # fmt: skip


def _fitting(e: Evidence, value: str) -> Grid | None:
    """The grid of a value, or that of least error where it is far from it: a sum that only a wrong range makes large is no cause."""
    root = e.m.ties.get(value, value)
    seen = (e.chosen_on if e.separate and e.chosen_on else e.seen).get(root)
    return seen.best_grid if seen is not None and _misfit(seen) > _MISFIT else e.m.grid(value)


def accumulated(m: QModel, layer: fx.Node, weight: fx.Node, grid: Grid, x_grid: Grid) -> float:
    """The largest sum that any input can cause in a layer: products, and the bias in their scale."""
    codes = quantize(m.parameters[str(weight.target)], grid)
    reach = max(float((x_grid.hi - x_grid.zero).max()), float((x_grid.zero - x_grid.lo).max()))
    worst = codes.abs().movedim(grid.axis or 0, 0).flatten(1).sum(1).double() * reach
    bias = bias_of(layer)
    if bias is not None:
        worst = worst + (m.parameters[str(bias.target)].double() / (grid.scale * x_grid.scale).double()).abs()
    return float(worst.max())
