"""High biases into the next layer (arXiv 1906.04721, section 4.1.3): the value between two layers is shifted by c per channel.

``b1 - c`` and ``b2 + W2 c``. The paper lets a ReLU follow and accepts that values below c are lost. Here the ReLU becomes a
clamp whose limits are shifted too, so the float outputs stay the same for every c; what the activation grid then cuts off is
the range rule's decision.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, fx

from halfbyte.chains import Pair, outputs, padded, pairs
from halfbyte.errors import UsageError
from halfbyte.graph import bias_of, blocks, by_value, input_axis, parameter, per_input, weight_of
from halfbyte.model import Inputs, LogEntry, Moments, QModel, editable, value_name
from halfbyte.moments import propagate
from halfbyte.ops import CLAMP_CHANNELS, GLOBAL_AVERAGE_POOL, Kind, base_name, clamp_bounds, kind
from halfbyte.run import portions, run

_BELOW = 3.0  # deviations below the mean that hardly any value reaches (equation 9)
_WORTH = 0.05  # of the range between the layers: less is not worth a clamp with limits for each channel
_SHAPES = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "movedim")


def absorb_bias(m: QModel, data: Iterable[Inputs] | None = None) -> QModel:
    """Absorb high biases wherever the next layer can take them exactly. Use after :func:`equalize`, before placement.

    data: a few batches; c is then the least value seen between the layers, else ``max(0, beta - 3 gamma)`` from the batch
    norm. With no activation function between, c is the mean. A layer that pads its input with zeros cannot take a shift and is
    skipped, as is a pair whose range would hardly shrink; each with its reason in the log.
    """
    if m.plan:
        raise UsageError("absorb_bias changes float biases: call it before place")
    found, log = pairs(m.graph, "absorb_bias")
    log = []  # why there is no pair is equalize's message
    usable = []
    for pair in found:
        reason = _why_not(pair)
        if reason:
            log.append(
                LogEntry("absorb_bias", value_name(pair.first), f"not absorbed by {value_name(pair.second)}: {reason}")
            )
        else:
            usable.append(pair)
    ends = _expected(m, usable) if data is None else _measured(m, data, usable)
    graph, params, moments = editable(m.graph), dict(m.parameters), dict(m.moments)
    nodes = by_value(graph)
    for pair in usable:
        name, text = value_name(pair.first), value_name(pair.second)
        if name not in ends:
            log.append(LogEntry("absorb_bias", name, f"not absorbed by {text}: its values are unknown"))
            continue
        low, high, mean = ends[name]
        clamps = any(kind(n) is Kind.CLAMP for n in pair.between)
        c = low.clamp(min=0) if clamps else mean
        before, after = _length(low, high), _length(low - c, high - c)
        if float(before - after) <= _WORTH * float(before):
            log.append(
                LogEntry("absorb_bias", name, f"nothing to absorb for {text}: the range would shrink by less than 5 %")
            )
            continue
        _shift(graph, nodes, pair, c, params, moments)
        count = int((c != 0).sum())
        log.append(
            LogEntry(
                "absorb_bias",
                name,
                f"{count} channels shifted into {text}; range {float(before):.3g} -> {float(after):.3g}",
            )
        )
    return replace(m, graph=graph, params=params, tuned={}, moments=moments).logged(*log)


def _length(low: Tensor, high: Tensor) -> Tensor:
    """Length of the range that holds all channels and zero."""
    return high.amax().clamp(min=0) - low.amin().clamp(max=0)


def _why_not(pair: Pair) -> str:
    if bias_of(pair.first) is None or bias_of(pair.second) is None:
        return "one of them has no bias"
    if any(len(b.users) > 1 for b in (bias_of(pair.first), bias_of(pair.second)) if b is not None):
        return "a bias is shared"
    if padded(pair.second):
        return "it pads its input with zeros, which a shift would change"
    for node in pair.between:
        pool = base_name(node).startswith("max_pool") or node.target is GLOBAL_AVERAGE_POOL
        if not (pool or kind(node) is Kind.CLAMP or base_name(node) in _SHAPES):
            return f"{base_name(node)} between them does not pass a shift through"
    return ""


def _expected(m: QModel, usable: list[Pair]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Low and high end and mean of each channel between, [channels of first] by its name, from batch norms."""
    found = {}
    spreads = propagate(m)
    for pair in usable:
        name, moments = value_name(pair.first), m.moments.get(value_name(pair.first))
        if moments is None:
            continue
        s = spreads[value_name(pair.value)]
        axis = input_axis(pair.second)
        greatest, least = (t.movedim(axis, 0).flatten(1) for t in (s.greatest, s.least))
        high, low = pair.gathered(greatest.amax(1)), -pair.gathered(-least.amin(1))
        # What hardly any value undercuts: for the shift three deviations, for the range nothing more is lost either.
        low = torch.maximum(low, torch.minimum(moments.mean - _BELOW * moments.std, high))
        found[name] = (low, high, moments.mean)
    return found


@torch.no_grad()
def _measured(m: QModel, data: Iterable[Inputs], usable: list[Pair]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    wanted = {value_name(p.value): input_axis(p.second) for p in usable}
    ends: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {}

    def tap(name: str, x: Tensor) -> Tensor:
        if name in wanted:
            flat = x.movedim(wanted[name], 0).flatten(1)
            new = (flat.amin(1), flat.amax(1), flat.sum(1), flat.shape[1])
            old = ends.get(name)
            if old is not None:
                new = (torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1]), old[2] + new[2], old[3] + new[3])
            ends[name] = new
        return x

    for batch in portions(m, data):
        run(m.as_float(), batch, tap)
    found = {}
    for pair in usable:
        low, high, total, count = ends[value_name(pair.value)]
        mean = torch.zeros(outputs(pair.first), device=total.device)
        mean = mean.scatter_reduce(0, pair.source.to(total.device), total / count, "mean", include_self=False)
        found[value_name(pair.first)] = (-pair.gathered(-low), pair.gathered(high), mean)
    return found


def _shift(
    graph: fx.Graph,
    nodes: dict[str, fx.Node],
    pair: Pair,
    c: Tensor,
    params: dict[str, Tensor],
    moments: dict[str, Moments],
) -> None:
    b1, b2, w2 = (
        str(n.target) for n in (bias_of(pair.first), bias_of(pair.second), weight_of(pair.second)) if n is not None
    )
    params[b1] = params[b1] - c
    each = per_input(pair.second, c[pair.source.to(c.device)].double())
    params[b2] = params[b2] + (blocks(pair.second, params[w2]).double() * each).sum((2, 3)).flatten().to(c.dtype)
    name = value_name(pair.first)
    if name in moments:
        moments[name] = Moments(moments[name].mean - c, moments[name].std)
    for node, carried in zip(pair.between, pair.carried, strict=True):
        if kind(node) is Kind.CLAMP:
            _shift_limits(graph, nodes[value_name(node)], c[carried.to(c.device)], params)


def _shift_limits(graph: fx.Graph, node: fx.Node, c: Tensor, params: dict[str, Tensor]) -> None:
    bounds = clamp_bounds(node)
    if bounds is None:
        for argument in node.args[1:3]:
            name = str(argument.target)  # type: ignore[union-attr]
            params[name] = params[name] - c
        return
    limits = []
    for end, bound in zip(("lower", "upper"), bounds, strict=True):
        name = f"{value_name(node)}:{end}"
        params[name] = bound - c
        limits.append(parameter(graph, name, node, params[name].shape))
    node.target, node.args, node.kwargs = CLAMP_CHANNELS, (node.args[0], *limits), {}
