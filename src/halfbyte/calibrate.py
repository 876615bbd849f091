"""Run the data once, summarize every planned value, and choose its grid."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid
from halfbyte.correct import ChannelMoments, InputMoments, along_weight, channel_moments, correct_bias, input_axis
from halfbyte.errors import DataError, PlacementError
from halfbyte.graph import bias_of, by_value, channel_axis, layers, tensors, weight_of
from halfbyte.grids import MSE, GridRule, from_range
from halfbyte.model import Inputs, LogEntry, QModel, Target, value_name
from halfbyte.ops import CLAMP_CHANNELS, Kind, clamp_bounds, kind
from halfbyte.run import run
from halfbyte.stats import Histogram, histogram

_log = logging.getLogger("halfbyte")
# A bias this close to the end of int32 leaves no room for the products that are added to it.
_BIAS_LIMIT = 2**30
# So many samples stay with the model: the exported file is proven on them.
PROOF_SAMPLES = 16

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


def observe(m: QModel, data: Batches, *, progress: Progress = silent) -> Observed:
    """Summarize all planned running values, in float, by value name. Memory does not grow with the data.

    Raises :class:`DataError` for an empty data set and for values that are not finite.
    """
    wanted = {n for n in m.plan if m.plan[n] is not None and n not in m.ties}
    wanted -= {value_name(n) for n in tensors(m.graph) if n.op == "get_attr"}
    axes: dict[str, set[int]] = {}
    for layer in layers(m.graph):
        if isinstance(layer.args[0], fx.Node):
            axes.setdefault(value_name(layer.args[0]), set()).add(input_axis(layer))
    found: dict[str, Histogram] = {}
    inputs: dict[tuple[str, int], ChannelMoments] = {}

    def tap(name: str, x: Tensor) -> Tensor:
        if name in wanted:
            if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                raise DataError(
                    f"value '{name}' becomes NaN or infinite on the calibration data: check the network and its inputs"
                )
            new = histogram(x)
            found[name] = found[name].merged(new) if name in found else new
        for axis in axes.get(name, ()):
            moments, key = channel_moments(x, axis), (name, axis)
            inputs[key] = inputs[key].merged(moments) if key in inputs else moments
        return x

    reference = m.as_float()
    seen = 0
    with torch.inference_mode():
        for i, batch in enumerate(data):
            run(reference, batch, tap)
            seen += len(batch[0])
            progress("calibrate", i + 1, None)
    if not seen:
        raise DataError("the calibration data is empty")
    return Observed(found, inputs, seen)


def calibrate(
    m: QModel,
    data: Batches,
    *,
    activations: GridRule | None = None,
    weights: GridRule | None = None,
    overrides: Mapping[str, tuple[float, float]] | None = None,
    progress: Progress = silent,
) -> QModel:
    """Choose the grids of the plan: one pass over the data for running values, the parameters' own values for the rest.

    activations, weights: the rule for the range (default: least squared error; of weights, weighted by the measured power of
    the inputs they meet). overrides: value -> (lowest, highest). The mean error of the rounded weights goes into the biases.
    """
    _check_planned(m)
    kept: list[Inputs] = []
    observed = observe(m, _keeping(data, kept), progress=progress)
    histograms = observed.histograms
    m = replace(
        m,
        calibrated=observed.samples,
        samples=tuple(torch.cat(parts)[:PROOF_SAMPLES] for parts in zip(*kept, strict=True)),
    )
    rule = activations or MSE()
    chosen = {name: rule.activation(h, m.plan[name]) for name, h in histograms.items()}  # type: ignore[arg-type]
    log = [LogEntry("calibrate", None, f"running values: {rule.name} ranges of {len(chosen)} values")]
    log += [
        LogEntry("calibrate", n, f"is always {h.minimum:g} on the data")
        for n, h in histograms.items()
        if h.minimum == h.maximum
    ]
    m = set_grids(m, chosen, weights or MSE(), overrides or {}, log, inputs=observed.inputs)
    return correct_bias(m, observed.inputs)


def _keeping(data: Batches, kept: list[Inputs]) -> Iterator[Inputs]:
    """Pass the data through and remember its first samples."""
    for batch in data:
        if sum(len(b[0]) for b in kept) < PROOF_SAMPLES:
            kept.append(tuple(t[:PROOF_SAMPLES].detach().clone() for t in batch))
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
    grids, floors = _room_for_bias(m, grids)
    dead = _dead_channels(m)
    entries = [LogEntry("calibrate", n, "range set by hand") for n in from_user]
    return replace(m, grids=grids).logged(*log, *entries, *floors, *dead)


def _overridden(m: QModel, overrides: Mapping[str, tuple[float, float]]) -> dict[str, Grid]:
    found = {}
    for name, (lo, hi) in overrides.items():
        form = m.plan.get(name)
        if form is None:
            raise PlacementError(f"the range given for '{name}' cannot be used: the plan has no such quantized value")
        found[m.ties.get(name, name)] = from_range(lo, hi, form)
    return found


def _saturates(layer: fx.Node, target: Target) -> bool:
    """Depthwise kernels multiply in 16 and add in 32 bits; all others add pairs of products in 16 where VNNI is missing."""
    shape = layer.args[1].meta["shape"]  # type: ignore[union-attr]
    depthwise = kind(layer) is Kind.CONV and layer.args[6] == shape[0] > 1 and shape[1] == 1
    return target.narrow_products and not depthwise


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
        if layer is None:  # an operand of an addition, say: a constant running value
            found[value_name(node)] = rule.activation(histogram(values), form)
        else:
            seen = inputs.get((value_name(layer.args[0]), input_axis(layer)))  # type: ignore[arg-type]
            power = None
            if seen is not None and kind(layer) is not Kind.CONV_TRANSPOSE:
                power = along_weight(layer, seen.power, values).expand_as(values)
            found[value_name(node)] = rule.weight(values, form, _saturates(layer, m.target), power)
    return found


def _clamped(m: QModel, grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """A clamp on codes limits them to the codes of its bounds; it shares scale and zero-point with what it clamps."""
    found: dict[str, Grid] = {}
    for node in tensors(m.graph):
        bounds, name = _bounds(m, node), value_name(node)
        grid = grids.get(m.ties.get(name, name))
        if m.plan.get(name) is None or grid is None:
            continue
        source = (
            found.get(value_name(node.args[0]))
            if name in m.ties and isinstance(node.args[0], fx.Node) and "value" in node.args[0].meta
            else None
        )
        if bounds is not None:
            found[name] = limited(source or grid, *bounds)
        elif source is not None:  # moves codes that were clamped before
            found[name] = source
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


def _room_for_bias(m: QModel, grids: dict[str, Grid]) -> tuple[dict[str, Grid], list[LogEntry]]:
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
        b = parameters[str(bias.target)].abs().float()
        floor = b / (_BIAS_LIMIT * grids[at].scale)
        floor = floor.max() if grid.axis is None else floor
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
