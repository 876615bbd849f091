"""Run the data once, summarize every planned value, and choose its grid."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid
from halfbyte.correct import ChannelMoments, InputMoments, channel_moments, correct_expected, expected_inputs
from halfbyte.errors import DataError, PlacementError, UsageError, check_choice
from halfbyte.graph import (
    RESIDUAL,
    bias_of,
    blocks,
    by_value,
    channel_axis,
    input_axis,
    is_depthwise,
    layers,
    output_values,
    per_input,
    table_of,
    tensors,
    twin_of,
    unblocks,
    weight_of,
)
from halfbyte.grids import MSE, GridRule, MinMax, cross_entropy, from_range
from halfbyte.model import Inputs, LogEntry, QModel, Target, value_name
from halfbyte.moments import Spread, propagate
from halfbyte.ops import CLAMP_CHANNELS, CONV_TRANSPOSE, LINEAR, clamp_bounds, is_tensor
from halfbyte.run import portions, run, whole
from halfbyte.stats import SAMPLED, Histogram, expected_histogram, histogram

_log = logging.getLogger("halfbyte")
# A bias this close to the end of int32 leaves no room for the products that are added to it.
Logits = Literal["same", "cross-entropy"]
BIAS_LIMIT = 2**30
# So many samples stay with the model: the exported file is proven on them.
PROOF_SAMPLES = 16
# Rows of logits kept for the cross-entropy range.
_LOGITS = 512

Batches = Iterable[Inputs]
Progress = Callable[[str, int, int | None], None]


def silent(_stage: str, _done: int, _total: int | None) -> None:
    """The progress report that reports nothing."""


@dataclass(frozen=True)
class Observed:
    """What one pass over the data has seen: histograms of planned values, and moments of what the layers read."""

    histograms: Mapping[str, Histogram]
    inputs: InputMoments
    samples: int
    logits: Mapping[str, Tensor] = field(default_factory=dict)  # of classifiers, [samples, classes]


def running(m: QModel) -> set[str]:
    """Planned values that have a grid of their own and are no parameters."""
    wanted = {n for n in m.plan if m.plan[n] is not None and n not in m.ties}
    return wanted - {value_name(n) for n in tensors(m.graph) if n.op == "get_attr"}


def expect(m: QModel, ranges: Mapping[str, tuple[float, float]] | None = None) -> Observed:
    """What :func:`observe` would see, as far as the batch norms tell. Raises :class:`UsageError` where they do not.

    ranges: value -> (lowest, highest), of inputs and of any value whose range the user knows.
    """
    spreads = propagate(m, ranges)
    wanted = running(m) - {m.ties.get(n, n) for n in ranges or {}}
    unknown = [n for n in spreads if n in wanted and not _is_known(spreads[n])]
    if unknown or wanted - spreads.keys():
        unknown += sorted(wanted - spreads.keys())
        few = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        raise UsageError(
            f"without data the range of {len(unknown)} values is unknown, for no batch norm describes them: {few}; give "
            f"--calibration with some unlabelled samples, or each range by hand, as in --range '{unknown[0]}=0..1'"
        )
    histograms = {n: expected_histogram(spreads[n]) for n in wanted}
    return Observed(histograms, expected_inputs(m, spreads), 0)


def _is_known(s: Spread) -> bool:
    return bool(torch.isfinite(s.least).all()) and bool(torch.isfinite(s.greatest).all())


def observe(m: QModel, data: Batches, *, progress: Progress = silent) -> Observed:
    """Summarize all planned running values, in float, by value name. Memory does not grow with the data.

    Raises :class:`DataError` for an empty data set and for values that are not finite.
    """
    wanted = running(m)
    axes: dict[str, set[int]] = {}
    for layer in layers(m.graph):
        if isinstance(layer.args[0], fx.Node):
            axes.setdefault(value_name(layer.args[0]), set()).add(input_axis(layer))
    found: dict[str, Histogram] = {}
    inputs: dict[tuple[str, int], ChannelMoments] = {}
    classifiers = {value_name(n) for n in output_values(m.graph) if is_tensor(n) and len(n.meta["shape"]) == 2} & wanted
    logits: dict[str, list[Tensor]] = {}

    def tap(name: str, x: Tensor) -> Tensor:
        if name in wanted:
            if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                raise DataError(
                    f"value '{name}' becomes NaN or infinite on the calibration data: check the network and its inputs"
                )
            new = histogram(x, share)
            found[name] = found[name].merged(new) if name in found else new
        if name in classifiers and sum(map(len, logits.setdefault(name, []))) < _LOGITS:
            logits[name].append(x.clone())
        for axis in axes.get(name, ()):
            moments, key = channel_moments(x, axis), (name, axis)
            inputs[key] = inputs[key].merged(moments) if key in inputs else moments
        return x

    reference = m.as_float()
    seen, share = 0, SAMPLED
    with torch.inference_mode():
        for i, batch in enumerate(data):
            for part in portions(m, [batch]):
                share = max(1, SAMPLED * len(part[0]) // len(batch[0]))  # values that each histogram counts
                run(reference, part, tap)
            seen += len(batch[0])
            progress("calibrate", i + 1, None)
    if not seen:
        raise DataError("the calibration data is empty")
    return Observed(found, inputs, seen, {name: torch.cat(parts) for name, parts in logits.items()})


def calibrate(
    m: QModel,
    data: Batches | None = None,
    *,
    activations: GridRule | None = None,
    weights: GridRule | None = None,
    overrides: Mapping[str, tuple[float, float]] | None = None,
    logits: Logits = "same",
    correct: bool = True,
    progress: Progress = silent,
) -> QModel:
    """Choose the grids of the plan: one pass over the data for running values, the parameters' own values for the rest.

    data: without them the ranges follow from the batch norms (white paper 2106.08295, section 3.1), of which
    :class:`UsageError` says where there are none. activations, weights: the rule for the range (default: least squared error,
    of weights weighted by the power of the inputs they meet; without data the whole range of six deviations). overrides:
    value -> (lowest, highest). logits: the rule for quantized outputs of classifiers, [samples, classes]; cross entropy needs
    data. correct: the mean error of the rounded weights goes into the biases.
    """
    _check_planned(m)
    check_choice("logits", logits, Logits)
    overrides = {name: _ends(name, given) for name, given in (overrides or {}).items()}
    kept: list[Inputs] = []
    proof = whole(m, PROOF_SAMPLES)
    if data is None:
        observed = expect(m, overrides)
        kept = [synthetic_inputs(m, overrides)]
    else:
        observed = observe(m, _keeping(data, kept, proof), progress=progress)
    histograms = observed.histograms
    m = replace(
        m,
        calibrated=observed.samples,
        samples=tuple(torch.cat(parts)[:proof] for parts in zip(*kept, strict=True)),
    )
    rule = activations or (MSE() if data is not None else MinMax())
    chosen = {name: rule.activation(h, m.plan[name]) for name, h in histograms.items()}  # type: ignore[arg-type]
    if logits == "cross-entropy":
        for name, rows in observed.logits.items():
            chosen[name] = cross_entropy(rows, m.plan[name], chosen[name])  # type: ignore[arg-type]
    log = [LogEntry("calibrate", None, f"running values: {rule.name} ranges of {len(chosen)} values")]
    if logits == "cross-entropy":
        log += [LogEntry("calibrate", n, "range of least cross entropy") for n in observed.logits]
    log += [
        LogEntry("calibrate", n, f"is always {h.minimum:g} on the data")
        for n, h in histograms.items()
        if h.minimum == h.maximum
    ]
    m = set_grids(m, chosen, weights or MSE(), overrides, log, inputs=observed.inputs)
    return correct_expected(m, observed.inputs) if correct else m


def synthetic_inputs(m: QModel, ranges: Mapping[str, tuple[float, float]], samples: int = 4) -> Inputs:
    """Inputs to prove a file on where there are no data: smooth noise over the expected range of each input."""
    generator = torch.Generator().manual_seed(0)
    spreads = propagate(m, ranges)
    found = []
    for node in m.inputs:
        shape = [d if isinstance(d, int) else samples for d in node.meta["shape"]]
        s = spreads.get(value_name(node))
        if s is None:
            found.append(torch.zeros(shape, dtype=getattr(torch, str(node.meta["dtype"]))))
            continue
        x = torch.randn(shape, generator=generator)
        if x.ndim == 4:
            coarse = torch.randn(*shape[:2], 7, 7, generator=generator)
            x = 0.3 * x + torch.nn.functional.interpolate(coarse, size=shape[2:], mode="bilinear")
        least, greatest = float(s.least.min()), float(s.greatest.max())
        if not math.isfinite(greatest - least):  # nothing that is quantized depends on its range
            least, greatest = -2.0, 2.0
        found.append(((least + greatest) / 2 + x * (greatest - least) / 4).clamp(least, greatest))
    return tuple(found)


def _keeping(data: Batches, kept: list[Inputs], count: int) -> Iterator[Inputs]:
    """Pass the data through and remember its first samples."""
    for batch in data:
        if sum(len(b[0]) for b in kept) < count:
            kept.append(tuple(t[:count].detach().clone() for t in batch))
        yield batch


def _check_planned(m: QModel) -> None:
    if not m.plan or m.target is None:
        raise PlacementError("the model has no plan yet: call place(model, target) before calibrate")


def set_grids(
    m: QModel,
    chosen: Mapping[str, Grid],
    weights: GridRule,
    overrides: Mapping[str, tuple[float, float]],
    log: Sequence[LogEntry] = (),
    *,
    inputs: InputMoments | None = None,
) -> QModel:
    """Complete the grids: overrides, parameters, limits of clamps, and room for the biases."""
    from_user = _overridden(m, overrides)
    grids = {**chosen, **from_user}
    grids |= _parameter_grids(m, weights, inputs or {})
    grids |= _clamped(m, grids)
    grids, floors = room_for_bias(m, grids)
    dead = _dead_channels(m)
    entries = [LogEntry("calibrate", n, "range set by hand") for n in from_user]
    return replace(m, grids=grids).logged(*log, *entries, *floors, *dead)


def regridded(m: QModel, chosen: Mapping[str, Grid]) -> QModel:
    """The model with other scales and zero-points of running values, by name; the limits of clamps, and of what moves codes, follow."""
    grids = dict(m.grids)
    for name, grid in chosen.items():
        form = m.plan[name]
        assert form is not None  # it has a grid
        lo, hi = (torch.full_like(grid.zero, end) for end in (form.lo, form.hi))
        grids[name] = replace(grid, lo=lo, hi=hi)
    return replace(m, grids=grids | _clamped(m, grids))


def _ends(name: str, given: Any) -> tuple[float, float]:
    """A range given by hand. Raises :class:`UsageError`."""
    try:
        low, high = map(float, given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the range of '{name}' is {given!r}: give its ends, (lowest, highest)") from error
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"the range of '{name}' is {low:g} to {high:g}: give two finite ends, the lowest first")
    return low, high


def _overridden(m: QModel, overrides: Mapping[str, tuple[float, float]]) -> dict[str, Grid]:
    found = {}
    weights = {value_name(w) for layer in layers(m.graph) if (w := weight_of(layer)) is not None}
    for name, (lo, hi) in overrides.items():
        if name in weights:
            raise PlacementError(
                f"'{name}' is a weight, whose range a rule chooses for each scale: give ranges of running values"
            )
        form = m.plan.get(name)
        if form is None:
            raise PlacementError(f"the range given for '{name}' cannot be used: the plan has no such quantized value")
        found[m.ties.get(name, name)] = from_range(lo, hi, form)
    return found


def saturates(layer: fx.Node, target: Target) -> bool:
    """Depthwise kernels multiply in 16 and add in 32 bits; all others add pairs of products in 16 where VNNI is missing."""
    return target.narrow_products and not is_depthwise(layer)


def _parameter_grids(m: QModel, rule: GridRule, inputs: InputMoments) -> dict[str, Grid]:
    assert m.target is not None  # checked at the entry
    parameters = m.parameters
    found: dict[str, Grid] = {}
    users = {value_name(w): layer for layer in layers(m.graph) if (w := weight_of(layer)) is not None}
    for node in tensors(m.graph):
        form = m.plan.get(value_name(node))
        if node.op != "get_attr" or form is None:
            continue
        values = parameters[str(node.target)]
        layer = users.get(value_name(node))
        if layer is None and any(table_of(u) is node for u in node.users):
            found[value_name(node)] = rule.weight(values, form, False, None)
        elif layer is None:  # an operand of an addition, say: a constant running value
            found[value_name(node)] = rule.activation(histogram(values), form)
        else:
            seen = inputs.get((value_name(layer.args[0]), input_axis(layer)))  # type: ignore[arg-type]
            power = None
            if seen is not None:
                parts = blocks(layer, values)
                power = unblocks(layer, per_input(layer, seen.power).expand_as(parts), values.shape)
            found[value_name(node)] = rule.weight(values, form, saturates(layer, m.target), power)
    return found


def _clamped(m: QModel, grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """A clamp on codes limits them to the codes of its bounds; it shares scale and zero-point with what it clamps."""
    found: dict[str, Grid] = {}
    for node in tensors(m.graph):
        bounds, name = _bounds(m, node), value_name(node)
        grid = grids.get(m.ties.get(name, name))
        if m.plan.get(name) is None or grid is None:
            continue
        read = node.args[0] if name in m.ties else None
        source = found.get(value_name(read)) if isinstance(read, fx.Node) and "value" in read.meta else None
        if bounds is not None:
            found[name] = limited(source or grid, *bounds)
        elif source is not None:
            # It moves codes that were clamped before, maybe to where no dimension is that of channels.
            found[name] = replace(source, lo=source.lo.min(), hi=source.hi.max())
    return found


def _bounds(m: QModel, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """The limits of a clamp, scalar or for each channel; None for any other node."""
    if node.op != "call_function":
        return None
    if node.target is CLAMP_CHANNELS:
        lower, upper = (m.parameters[str(a.target)] for a in node.args[1:3])  # type: ignore[union-attr]
        return lower, upper
    bounds = clamp_bounds(node)
    return None if bounds is None else (torch.tensor(bounds[0]), torch.tensor(bounds[1]))


def limited(grid: Grid, low: Tensor, high: Tensor) -> Grid:
    """The grid restricted to the codes of the real numbers in [low, high]: clamping codes equals clamping before rounding."""

    def code(bound: Tensor) -> Tensor:
        codes = torch.round(bound.to(grid.scale.device) / grid.scale) + grid.zero
        codes = codes.clamp(-(2**20), 2**20).int().clamp(grid.lo, grid.hi)
        return codes.flatten()[0] if bool((codes == codes.flatten()[0]).all()) else codes

    return replace(grid, lo=code(low), hi=code(high))


def room_for_bias(m: QModel, grids: dict[str, Grid]) -> tuple[dict[str, Grid], list[LogEntry]]:
    """Raise weight scales so that no bias leaves int32 (its scale is the input's times the weight's).

    A nearly dead channel has a tiny weight scale and an ordinary bias; without a floor its bias cannot be represented.
    """
    parameters, log, changed = m.parameters, [], dict(grids)
    for layer in layers(m.graph):
        weight, bias = weight_of(layer), bias_of(layer)
        x = layer.args[0]
        if weight is None or bias is None or not isinstance(x, fx.Node) or m.plan.get(value_name(weight)) is None:
            continue
        grid, at = changed.get(value_name(weight)), m.ties.get(value_name(x), value_name(x))
        if grid is None or at not in grids or grid.group is not None:
            continue
        floor = least_scale(parameters[str(bias.target)], grids[at], grid.axis)
        raised = torch.maximum(grid.scale, floor)
        count = int((raised > grid.scale).sum())
        if count:
            changed[value_name(weight)] = replace(grid, scale=raised)
            log.append(
                LogEntry(
                    "calibrate", value_name(weight), f"scale raised in {count} channels so that the bias fits int32"
                )
            )
    return changed, log


def least_scale(bias: Tensor, read: Grid, axis: int | None) -> Tensor:
    """The least weight scales, [channels] or one for all, with which a layer that reads this grid can hold its bias in int32."""
    floor = bias.abs().float() / (BIAS_LIMIT * read.scale)
    return floor.max() if axis is None else floor


def bias_floor(m: QModel, layer: fx.Node, grid: Grid) -> Tensor | None:
    """The least scales for a layer's weight on ``grid`` as the model has its bias; None where nothing limits them."""
    bias, x = bias_of(layer), layer.args[0]
    read = m.grid(value_name(x)) if isinstance(x, fx.Node) else None
    if bias is None or read is None or grid.group is not None:
        return None
    return least_scale(m.parameters[str(bias.target)], read, grid.axis)


def bias_step(m: QModel, layer: fx.Node, grid: Grid) -> Tensor | None:
    """What integer kernels hold a layer's bias in multiples of: input scale times that of the weight on ``grid``; None if real."""
    bias, x = bias_of(layer), layer.args[0]
    read = m.grid(value_name(x)) if isinstance(x, fx.Node) else None
    tokens = layer.target is LINEAR and len(layer.meta["shape"]) != 2
    if bias is None or read is None or grid.group is not None or layer.target is CONV_TRANSPOSE or tokens:
        return None
    return read.scale * grid.scale


def whole_biases(m: QModel, some: Iterable[fx.Node]) -> QModel:
    """The model with the biases of these layers as integer kernels hold them; shared ones stay.

    Of few bits the steps are coarse, and what a bias loses all positions share, so the layers behind should see it. The second
    part of an input has finer steps: its layer takes up what the first one's bias has lost.
    """
    tuned, parameters = dict(m.tuned), m.parameters

    def whole(t: Tensor, step: Tensor) -> Tensor:
        return (torch.round(t.double() / step.double()) * step.double()).to(t)

    for layer in some:
        if value_name(layer).endswith(RESIDUAL):
            continue
        weight, bias, twin = weight_of(layer), bias_of(layer), twin_of(layer)
        grid = None if weight is None else m.grid(value_name(weight))
        if bias is None or len(bias.users) > 1 or grid is None or (step := bias_step(m, layer, grid)) is None:
            continue
        exact = parameters[str(bias.target)]
        held = tuned[str(bias.target)] = whole(exact, step)
        finer = None if twin is None else bias_step(m, twin, grid)
        if twin is not None and finer is not None:
            tuned[str(bias_of(twin).target)] = whole(exact - held, finer)  # type: ignore[union-attr]
    return replace(m, tuned=tuned)


def _dead_channels(m: QModel) -> list[LogEntry]:
    parameters, log = m.parameters, []
    for layer in layers(m.graph):
        weight = weight_of(layer)
        if weight is None:
            continue
        w = parameters[str(weight.target)].movedim(channel_axis(layer), 0).flatten(1)
        dead = int((w.abs().amax(1) == 0).sum())
        if dead:
            log.append(
                LogEntry("calibrate", value_name(weight), f"{dead} of {len(w)} output channels are dead; neutral scale")
            )
    return log


def missing_grids(m: QModel) -> list[str]:
    """Planned values without a grid: none, if the calibration is complete."""
    planned = {value_name(n) for n in by_value(m.graph).values() if "dtype" in n.meta}
    return [name for name, form in m.plan.items() if form is not None and name in planned and m.grid(name) is None]
