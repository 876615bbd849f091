"""Scale channels between two layers so that each uses more of the activation grid; the network's function is unchanged.

Cross-layer equalization (arXiv 1906.04721, section 4.1) in the form that pays where weights have a scale for each output
channel: there, scaling an output channel of the first layer costs nothing, so the factor is chosen for the value between
the layers. A channel whose values are small beside the largest channel's is coarse on the shared grid, however much the next
layer amplifies it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from halfbyte.graph import bias_of, editable, is_output, layers, parameter, weight_of
from halfbyte.model import Inputs, LogEntry, Moments, QModel, value_name
from halfbyte.ops import CLAMP_CHANNELS, CONV, GLOBAL_AVERAGE_POOL, LINEAR, Kind, base_name, clamp_bounds, kind
from halfbyte.run import run

_LARGEST = 2.0**10  # beyond it the next layer's weights would vanish in float16 engines
_STEPS = 255  # of an 8-bit activation
_WEIGHT_STEPS = 127


@dataclass(frozen=True)
class Pair:
    """Two layers, and the operations between them that pass a positive factor through."""

    first: fx.Node
    between: tuple[fx.Node, ...]
    second: fx.Node

    @property
    def value(self) -> fx.Node:
        """What the second layer reads."""
        return self.between[-1] if self.between else self.first


def pairs(graph: fx.Graph) -> tuple[list[Pair], list[LogEntry]]:
    """All pairs that may be equalized, and why other layers have no partner."""
    found, log, all_layers = [], [], layers(graph)
    for layer in all_layers:
        pair, reason = _partner(layer, set(all_layers))
        if pair is not None:
            found.append(pair)
        else:
            log.append(LogEntry("equalize", value_name(layer), f"not equalized with what follows: {reason}"))
    return found, log


def _partner(layer: fx.Node, all_layers: set[fx.Node]) -> tuple[Pair | None, str]:
    if layer.target not in (CONV, LINEAR) or (layer.target is LINEAR and len(layer.meta["shape"]) != 2):
        return None, "only convolutions and linear layers on vectors are paired"
    if len(weight_of(layer).users) > 1:  # type: ignore[union-attr]
        return None, "its weight is shared"
    between: list[fx.Node] = []
    node = layer
    while True:
        if is_output(node):
            return None, f"{value_name(node)} is an output of the network"
        if len(node.users) != 1:
            return None, f"{value_name(node)} is read by {len(node.users)} operations"
        reader = next(iter(node.users))
        if reader in all_layers and reader.args[0] is node:
            return _checked(layer, between, reader)
        if not _passes(reader):
            return None, f"{base_name(reader)} comes next"
        between.append(reader)
        node = reader


def _passes(node: fx.Node) -> bool:
    """Whether f(a x) = a f(x) for a factor for each channel, after the limits of a clamp are scaled too."""
    if kind(node) is Kind.CLAMP:
        bounds = clamp_bounds(node)
        return bounds is not None and bounds[0] <= 0 <= bounds[1]
    if base_name(node).startswith("max_pool") or kind(node) is Kind.AVERAGE:
        return True
    pooled = isinstance(node.args[0], fx.Node) and node.args[0].target is GLOBAL_AVERAGE_POOL if node.args else False
    return base_name(node) in ("flatten", "reshape", "squeeze") and pooled and len(node.meta["shape"]) == 2


def _checked(first: fx.Node, between: list[fx.Node], second: fx.Node) -> tuple[Pair | None, str]:
    weight = weight_of(second)
    if weight is None or len(weight.users) > 1 or second.target not in (CONV, LINEAR):
        return None, f"{value_name(second)} has a shared weight or is transposed"
    channels = first.meta["shape"][1]
    takes = second.meta["shape"][1] if _depthwise(second) else weight.meta["shape"][1]
    if takes != channels:
        return None, f"{value_name(second)} is grouped"
    return Pair(first, tuple(between), second), ""


def _depthwise(node: fx.Node) -> bool:
    shape = node.args[1].meta["shape"]  # type: ignore[union-attr]
    return bool(node.target is CONV and node.args[6] == shape[0] > 1 and shape[1] == 1)


def equalize(m: QModel, data: Iterable[Inputs]) -> QModel:
    """Equalize every legal pair of layers for the values between them. Use before placement; batch norms must be folded.

    data: a few batches; they give each channel's largest magnitude and mean square. In front of a depthwise layer a channel
    is scaled to the largest channel's range. In front of a dense layer larger inputs amplify the rounding of its weights, so
    the factor balances both errors: minimise ``s_x^2 |w_i|^2 / a^2 + s_w^2 a^2 E[x_i^2]`` over a.
    """
    found, log = pairs(m.graph)
    largest, power = _channel_statistics(m, data, {value_name(p.value) for p in found})
    graph, params, moments = editable(m.graph), dict(m.parameters), dict(m.moments)
    nodes = {value_name(n): n for n in graph.nodes if "value" in n.meta}
    for pair in found:
        name = value_name(pair.value)
        if name not in largest:
            continue
        factor = _factor(pair, largest[name], power[name], params)
        _apply(pair, factor, params, moments)
        for node in pair.between:
            if kind(node) is Kind.CLAMP and not _homogeneous(node):
                _scale_limits(graph, nodes[value_name(node)], factor, params)
        scaled = int((factor > 1).sum())
        text = f"{scaled} of {len(factor)} channels scaled by up to {float(factor.max()):.3g} for {value_name(pair.second)}"
        log.append(LogEntry("equalize", value_name(pair.first), text))
    return replace(m, graph=graph, params=params, tuned={}, moments=moments).logged(*log)


@torch.inference_mode()
def _channel_statistics(
    m: QModel, data: Iterable[Inputs], wanted: set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Largest magnitude and mean square, [channels], of each wanted value."""
    largest: dict[str, Tensor] = {}
    power: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def tap(name: str, x: Tensor) -> Tensor:
        if name in wanted:
            others = [d for d in range(x.ndim) if d != 1]
            top = torch.maximum(x.amax(others), -x.amin(others))
            largest[name] = torch.maximum(largest[name], top) if name in largest else top
            power[name] = power.get(name, torch.zeros_like(top)) + x.square().sum(others)
            count[name] = count.get(name, 0) + x.numel() // x.shape[1]
        return x

    for batch in data:
        run(m.as_float(), batch, tap)
    return largest, {name: p / count[name] for name, p in power.items()}


def _factor(pair: Pair, largest: Tensor, power: Tensor, params: dict[str, Tensor]) -> Tensor:
    """[channels], at least 1: what the value's channels are multiplied with."""
    room = torch.where(largest > 0, largest.max() / largest.clamp(min=1e-30), torch.ones_like(largest)).clamp(
        1, _LARGEST
    )
    if _depthwise(pair.second):
        return room
    weight = weight_of(pair.second)
    assert weight is not None
    w = params[str(weight.target)]
    w = w.flatten(2) if pair.second.target is CONV else w[:, :, None]
    columns = w.square().sum((0, 2)).sqrt()
    rounding = (w.flatten(1).abs().amax(1) / _WEIGHT_STEPS).square().sum().mul(w.shape[2]).sqrt()
    step = largest.max() / _STEPS
    best = (step * columns / (rounding * power.sqrt()).clamp(min=1e-30)).sqrt()
    return torch.minimum(best.clamp(min=1.0), room)


def _apply(pair: Pair, factor: Tensor, params: dict[str, Tensor], moments: dict[str, Moments]) -> None:
    first, bias, second = weight_of(pair.first), bias_of(pair.first), weight_of(pair.second)
    assert first is not None and second is not None  # pairs are layers with constant weights
    w1, w2 = params[str(first.target)], params[str(second.target)]
    params[str(first.target)] = w1 * factor.reshape(-1, *[1] * (w1.ndim - 1))
    if bias is not None:
        params[str(bias.target)] = params[str(bias.target)] * factor
    along = (-1, *[1] * (w2.ndim - 1)) if _depthwise(pair.second) else (1, -1, *[1] * (w2.ndim - 2))
    params[str(second.target)] = w2 / factor.reshape(along)
    name = value_name(pair.first)
    if name in moments:
        moments[name] = Moments(moments[name].mean * factor, moments[name].std * factor)


def _homogeneous(node: fx.Node) -> bool:
    """A clamp at zero or infinity needs no new limits."""
    return all(b == 0 or abs(b) == float("inf") for b in clamp_bounds(node) or (1.0,))


def _scale_limits(graph: fx.Graph, node: fx.Node, factor: Tensor, params: dict[str, Tensor]) -> None:
    """The clamp gets limits for each channel, so that it still cuts where it did."""
    bounds = clamp_bounds(node)
    assert bounds is not None
    shape = (-1, *[1] * (len(node.meta["shape"]) - 2))
    limits = []
    for end, bound in zip(("lower", "upper"), bounds, strict=True):
        name = f"{value_name(node)}:{end}"
        params[name] = (factor * bound if bound != 0 else torch.zeros_like(factor)).reshape(shape)
        limits.append(parameter(graph, name, node, params[name].shape))
    node.target, node.args, node.kwargs = CLAMP_CHANNELS, (node.args[0], *limits), {}
