"""Scale channels between two layers so that both use their grids better; the network's function is unchanged.

Cross-layer equalization (arXiv 1906.04721, section 4.1): ``W1 / s, b1 / s, W2 * s`` for each channel between two layers. Two
ways to choose s. *weights*, as published: both layers get the same range in each channel. That can widen the range of the value
between, and where weights have a scale for each output channel it gains nothing. *noise*: the factors that minimise the noise
expected from rounding both weights and the value between, for one scale per tensor or one per channel.
"""

import math
from collections.abc import Container, Iterable
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, fx

from halfbyte.chains import Link, Pair, Stream, outputs, pairs, streams
from halfbyte.channels import Seen, clipped, expected, measured
from halfbyte.errors import UsageError, check_choice
from halfbyte.graph import (
    bias_of,
    blocks,
    by_value,
    groups,
    input_axis,
    parameter,
    per_input,
    per_output,
    unblocks,
    weight_name,
)
from halfbyte.model import Inputs, LogEntry, Moments, QModel, editable, value_name
from halfbyte.ops import CLAMP_CHANNELS, clamp_bounds

Method = Literal["noise", "weights"]
Ranges = Literal["symmetric", "asymmetric"]
_LARGEST = 2.0**10  # beyond it the weights would vanish in float16 engines
_SETTLED = 1e-4  # a sweep that changes no factor by more has converged
_SWEEPS, _START = 200, 15  # the fewer are enough for a start
# What batch norms remember of all training data is worth more than a few samples, which fill in where nothing is known. Of fewer
# bits the grid cuts tails off, whatever they are, and samples tell how the values inside lie.
WIDE = 8
_SHARPNESS = 32.0  # the power whose norm stands for a maximum
_STEPS, _RATE, _SEARCH_EVERY = 600, 0.03, 4  # of the descent, in logarithms of factors; steps cost little


@torch.inference_mode(False)  # gradients, whatever the caller has turned off
def equalize(
    m: QModel,
    data: Iterable[Inputs] | None = None,
    *,
    method: Method = "noise",
    per_channel: bool = False,
    weight_bits: int = 8,
    activation_bits: int = 8,
    ranges: Ranges = "symmetric",
    fixed: Container[str] = (),
) -> QModel:
    """Equalize every legal pair of layers. Use before placement; batch norms must be folded.

    data: a few batches, which the method *noise* measures channels on; without them it takes the moments of the batch norms. For
    values of fewer than 8 bits the ends of a channel are those that disturb the outputs least, to first order.
    per_channel, weight_bits, activation_bits: what the method *noise* expects of the quantization that follows. ranges: what the
    method *weights* takes for a range, the largest magnitude or the distance from the least to the largest. Every pair, and why
    the other layers have none, is logged. Limits of clamps such as ReLU6 are scaled with their channels, so the float outputs
    stay. The method *noise* equalizes sums, too, and values of several readers: between all that write and all that read them.
    fixed: names of values that stay as they are, because somebody knows their range. Raises :class:`UsageError` for a model that
    is placed already.
    """
    check_choice("method", method, Method)
    check_choice("ranges", ranges, Ranges)
    if m.plan:
        raise UsageError("equalize changes float weights: call it before place")
    legal, log = pairs(m.graph)
    found = [p for p in legal if not _fixes(fixed, p)]
    sums: list[Stream] = []
    if method == "weights":
        factors = _for_weights(m, found, ranges)
    else:
        sums = [t for t in streams(m.graph, legal) if not _fixes(fixed, t)]
        factors, notes = _for_noise(m, found, sums, data, per_channel, (weight_bits, activation_bits))
        log += notes
    for pair in found:
        name = value_name(pair.first)
        if name not in factors:
            text = f"not equalized with {value_name(pair.second)}: its values are unknown"
        else:
            s = factors[name]
            text = f"{int((s != 1).sum())} of {len(s)} channels scaled by {float(s.min()):.3g} to {float(s.max()):.3g}"
            text += f" for {value_name(pair.second)} ({method})"
        log.append(LogEntry("equalize", name, text))
    for stream in sums:
        name = value_name(stream.writers[0])
        if name in factors:
            s, ends = factors[name], f"{len(stream.writers)} layers that write and {len(stream.readers)} that read"
            text = f"{int((s != 1).sum())} of {len(s)} channels scaled by {float(s.min()):.3g} to {float(s.max()):.3g} between "
            log.append(LogEntry("equalize", name, f"{text}{ends} ({method})"))
    return _applied(m, [*found, *sums], factors).logged(*log)


def _fixes(fixed: Container[str], link: Link) -> bool:
    return any(value_name(n) in fixed for n in link.values)


def _for_weights(m: QModel, found: list[Pair], ranges: Ranges, sweeps: int = _SWEEPS) -> dict[str, Tensor]:
    """Factors, [channels] by the first layer's name: sweeps over all pairs until nothing changes, so that chains are solved
    jointly (in a chain through a depthwise layer all three ranges become their geometric mean).
    """
    values = m.parameters
    spans: dict[fx.Node, Tensor] = {}
    for layer in {p.first for p in found} | {p.second for p in found}:
        spans[layer] = values[weight_name(layer)].float()
    total = {value_name(p.first): torch.ones(outputs(p.first), device=spans[p.first].device) for p in found}
    for _ in range(sweeps):
        largest = 0.0
        for pair in found:
            first, second = blocks(pair.first, spans[pair.first]), blocks(pair.second, spans[pair.second])
            r1 = _range(first, (2, 3), ranges).flatten()
            r2 = pair.gathered(_range(second, (1, 3), ranges).flatten())
            s = torch.where((r1 > 0) & (r2 > 0), (r2 / r1.clamp(min=1e-30)).sqrt(), torch.ones_like(r1))
            name = value_name(pair.first)
            s = (total[name] * s).clamp(1 / _LARGEST, _LARGEST) / total[name]
            largest = max(largest, float((s.log()).abs().max()))
            total[name] = total[name] * s
            spans[pair.first] = _scaled_outputs(pair.first, spans[pair.first], s)
            spans[pair.second] = _scaled_inputs(pair.second, pair.source, spans[pair.second], 1 / s)
        if largest < _SETTLED:
            break
    return total


def _range(parts: Tensor, dims: tuple[int, int], ranges: Ranges) -> Tensor:
    if ranges == "symmetric":
        return parts.abs().amax(dims)
    return parts.amax(dims).clamp(min=0) - parts.amin(dims).clamp(max=0)


def _scaled_outputs(layer: fx.Node, w: Tensor, s: Tensor) -> Tensor:
    return unblocks(layer, blocks(layer, w) * per_output(layer, s), w.shape)


def _scaled_inputs(layer: fx.Node, source: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return unblocks(layer, blocks(layer, w) * per_input(layer, s[source.to(s.device)]), w.shape)


class _Side:
    """One layer of a chain: what its expected noise depends on, in blocks [groups, outputs, inputs] without taps."""

    def __init__(self, m: QModel, layer: fx.Node, into: Seen) -> None:
        w = blocks(layer, m.parameters[weight_name(layer)].float())
        self.largest, self.squares, taps = w.abs().amax(3), w.square().sum(3), w.shape[3]
        self.power = (into.power * taps).reshape(groups(layer), -1)
        self.low, self.high = (-into.low).clamp(min=0), into.high.clamp(min=0)
        self.active = into.active.reshape(groups(layer), -1)  # zero is on every grid
        self.importance = torch.ones(())  # [groups, outputs]: how noise there counts at the end of the chain
        # The channel of each input, and the link, a pair or a stream, that scales it; the same for the outputs.
        self.source = torch.arange(self.power.numel())
        self.before: Link | None = None
        self.after: Link | None = None

    def counted(self) -> Tensor:
        """How noise in each input counts, [inputs]."""
        return (self.squares * self.importance[:, :, None]).sum(1).flatten()


class _Noise:
    """The noise expected at the ends of all chains as one function of all factors.

    Everything is flat, so that a network of many layers costs a few operations: ``logs`` holds the factors of every pair one
    after another and a last zero, for inputs and outputs that nothing scales.
    """

    def __init__(self, chains: list[list[_Side]], usable: list[Link], per_channel: bool, bits: tuple[int, int]) -> None:
        self.per_channel = per_channel
        self.steps = (1 / (12 * (2.0 ** (bits[0] - 1) - 1) ** 2), 1 / (12 * (2.0 ** bits[1] - 1) ** 2))
        self.sides = [side for chain in chains for side in chain]
        device = self.sides[0].power.device
        self.length = [link.channels for link in usable]
        begins = accumulate(self.length[:-1], initial=0)
        start = {link.writers[0]: begin for link, begin in zip(usable, begins, strict=True)}
        nothing = sum(self.length)

        def flat(each: list[Tensor]) -> Tensor:
            return torch.cat([t.flatten() for t in each]).to(device)

        def numbered(sizes: list[int]) -> Tensor:
            return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))

        s = self.sides
        none = torch.tensor([nothing])
        self.into = flat(
            [
                none.expand(x.power.numel()) if x.before is None else x.source.cpu() + start[x.before.writers[0]]
                for x in s
            ]
        )
        self.own = flat(
            [
                none.expand(x.importance.numel())
                if x.after is None
                else torch.arange(x.importance.numel()) + start[x.after.writers[0]]
                for x in s
            ]
        )
        self.power, self.high, self.low = (
            flat([x.power for x in s]),
            flat([x.high for x in s]),
            flat([x.low for x in s]),
        )
        self.columns = flat([torch.einsum("go,goi->gi", x.importance, x.squares) * x.active for x in s])
        self.importance = flat([x.importance for x in s])
        inputs = [x.power.numel() for x in s]
        self.input_side, self.output_side = numbered(inputs), numbered([x.importance.numel() for x in s])
        self.input_group = numbered([x.power.shape[1] for x in s for _ in range(len(x.power))])
        self.output_group = numbered([x.importance.shape[1] for x in s for _ in range(len(x.importance))])
        self.groups = sum(len(x.power) for x in s)
        self.chain = numbered([len(c) for c in chains])
        self.first_input = torch.tensor([0, *inputs]).cumsum(0).tolist()
        self.chains = len(chains)
        self.largest, self.at = torch.ones_like(self.importance), torch.zeros_like(self.own)

    def search(self, logs: Tensor) -> None:
        """Find which input each output's largest weight meets; between two searches that stays."""
        factor = self._extended(logs.detach())[self.into].exp()
        largest, at = [], []
        for side, begin in zip(self.sides, self.first_input, strict=False):
            per_group = factor[begin : begin + side.power.numel()].reshape(side.power.shape)
            which = (side.largest / per_group[:, None]).argmax(2)
            largest.append(side.largest.gather(2, which[:, :, None]).flatten())
            group = torch.arange(len(which), device=which.device)[:, None] * side.power.shape[1]
            at.append((which + group + begin).flatten())
        self.largest, self.at = torch.cat(largest), torch.cat(at)

    @staticmethod
    def _extended(logs: Tensor) -> Tensor:
        return torch.cat([logs, torch.zeros(1, device=logs.device)])

    def __call__(self, logs: Tensor) -> Tensor:
        """Mean over the chains of the logarithm of the noise relative to the signal; logs: logarithms of all factors."""
        every = self._extended(logs)
        before, own, sides = every[self.into], every[self.own].exp(), len(self.sides)
        factor = before.exp()
        met = _summed(self.power * factor.square(), self.input_group, self.groups)
        reach = _soft_max(self.high * factor, self.input_side, sides) + _soft_max(
            self.low * factor, self.input_side, sides
        )
        rows = self.largest * (-before[self.at]).exp()
        span = rows if self.per_channel else _soft_max(rows * own, self.output_side, sides)[self.output_side] / own
        weights = _summed(self.importance * span.square() * met[self.output_group], self.output_side, sides)
        values = reach.square() * _summed(self.columns / factor.square(), self.input_side, sides)
        noise = _summed(self.steps[0] * weights + self.steps[1] * values, self.chain, self.chains)
        return noise.clamp(min=1e-30).log().mean()  # chains are independent; by logarithms one rate suits all


def _summed(x: Tensor, part: Tensor, parts: int) -> Tensor:
    return torch.zeros(parts, dtype=x.dtype, device=x.device).index_add(0, part, x)


def _variance(seen: Seen) -> Tensor:
    return (seen.power - seen.mean.square()).clamp(min=0)


def _known(seen: dict[str, Seen], *nodes: object) -> bool:
    values = [seen.get(value_name(n)) for n in nodes]  # type: ignore[arg-type]
    return all(v is not None and all(bool(torch.isfinite(t).all()) for t in v) for v in values)


def _chains(
    m: QModel, found: list[Pair], sums: list[Stream], seen: dict[str, Seen]
) -> tuple[list[Pair], list[Stream], list[list[_Side]]]:
    """The pairs and the streams whose values are all known, and the layers of each chain that pairs form."""
    usable: list[Pair] = []
    sides: dict[fx.Node, _Side] = {}
    chains: list[list[_Side]] = []
    for pair in found:  # in graph order, so that a chain grows at its end
        if not _known(seen, pair.first.args[0], pair.first, pair.value, pair.second):
            continue
        usable.append(pair)
        for layer in (pair.first, pair.second):
            sides.setdefault(layer, _Side(m, layer, seen[value_name(layer.args[0])]))  # type: ignore[arg-type]
        first, second = sides[pair.first], sides[pair.second]
        first.after, second.before, second.source = pair, pair, pair.source
        chain = next((c for c in chains if first in c), None)
        if chain is None:
            chains.append([first, second])
        else:
            chain.append(second)
    joined = [t for t in sums if _known(seen, *(n for w in t.layers for n in (w, w.args[0])))]
    for stream in joined:
        for layer in stream.layers:
            if layer not in sides:
                sides[layer] = _Side(m, layer, seen[value_name(layer.args[0])])  # type: ignore[arg-type]
                chains.append([sides[layer]])
        for layer in stream.writers:
            sides[layer].after = stream
        for layer, source in stream.readers:
            sides[layer].before, sides[layer].source = stream, source
    _weigh(sides, {n: i for i, n in enumerate(m.graph.nodes)}, seen)
    return usable, joined, chains


def _weigh(sides: dict[fx.Node, _Side], order: dict[fx.Node, int], seen: dict[str, Seen]) -> None:
    """How noise in what each layer puts out counts, from the ends of the network back to its start."""
    for layer in sorted(sides, key=order.__getitem__, reverse=True):
        side, importance = sides[layer], None
        if isinstance(side.after, Pair):
            importance = _through_pair(side.after, sides[side.after.second], seen)
        elif isinstance(side.after, Stream):  # of the readers of its sum, those that come after it
            importance = torch.zeros(side.after.channels, device=side.power.device)
            for reader, source in side.after.readers:
                if order[reader] > order[layer]:
                    importance.index_add_(0, source.to(importance.device), sides[reader].counted())
        if importance is None or not bool((importance > 0).any()):
            variance = _variance(seen[value_name(layer)])
            importance = 1 / (variance.clamp(min=1e-6 * float(variance.max()) + 1e-30) * variance.numel())
        side.importance = importance.reshape(side.power.shape[0], -1)


def _through_pair(pair: Pair, second: _Side, seen: dict[str, Seen]) -> Tensor:
    """How noise in each output of the first layer counts, [channels]."""
    signal, passed = _variance(seen[value_name(pair.first)]), _variance(seen[value_name(pair.value)])
    gain = _gathered_sum(pair, passed) / pair.source.bincount(minlength=len(signal)).clamp(min=1).to(passed)
    return _gathered_sum(pair, second.counted()) * gain / signal.clamp(min=1e-6 * float(signal.max()) + 1e-30)


def _gathered_sum(pair: Pair, per_input: Tensor) -> Tensor:
    total = torch.zeros(outputs(pair.first), dtype=per_input.dtype, device=per_input.device)
    return total.index_add(0, pair.source.to(per_input.device), per_input)


def _soft_max(x: Tensor, part: Tensor, parts: int) -> Tensor:
    """A smooth maximum of the positive numbers of each part, so that every channel near the largest feels it."""
    top = torch.zeros(parts, device=x.device).scatter_reduce(0, part, x.detach(), "amax").clamp(min=1e-30)
    return top * (_summed((x / top[part]).pow(_SHARPNESS), part, parts) + 1e-12).pow(1 / _SHARPNESS)


@torch.enable_grad()
def _for_noise(
    m: QModel,
    found: list[Pair],
    sums: list[Stream],
    data: Iterable[Inputs] | None,
    per_channel: bool,
    bits: tuple[int, int],
) -> tuple[dict[str, Tensor], list[LogEntry]]:
    """Factors, [channels] by the first layer's name, that minimise the expected noise; as published where values are unknown."""
    axes: dict[str, int] = {}
    links: list[Link] = [*found, *sums]
    every = [n for link in links for n in link.layers]
    for layer in every:
        axes |= {value_name(n): input_axis(layer) for n in (layer, layer.args[0])}  # type: ignore[arg-type]
    known = {n: seen for n, seen in expected(m, axes).items() if all(bool(torch.isfinite(t).all()) for t in seen)}
    if data is not None and bits[1] < WIDE:
        samples = list(data)
        read = {value_name(layer.args[0]) for layer in every}  # type: ignore[arg-type]
        known = clipped(m, samples, known | measured(m, samples, axes), {n: axes[n] for n in read}, bits[1])
    elif data is not None and not axes.keys() <= known.keys():
        known = {**measured(m, data, axes), **known}
    usable, joined, chains = _chains(m, found, sums, known)
    published = {} if per_channel else _for_weights(m, found, "symmetric", _START)
    if not chains:
        return published, []
    links = [*usable, *joined]
    names, noise = [value_name(link.writers[0]) for link in links], _Noise(chains, links, per_channel, bits)
    starts = [torch.zeros(sum(noise.length), device=chains[0][0].power.device)]
    if not per_channel:
        ones = [torch.ones(t.channels, device=starts[0].device) for t in joined]
        starts.append(torch.cat([*(published[value_name(p.first)] for p in usable), *ones]).log())
    losses = []
    for start in starts:
        noise.search(start)
        losses.append(noise(start).item())
    least = min(losses)
    best = starts[losses.index(least)]
    logs = best.clone().requires_grad_()
    optimizer = torch.optim.Adam([logs], lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, _STEPS)
    for step in range(_STEPS):
        fresh = step % _SEARCH_EVERY == 0
        if fresh:
            noise.search(logs)
        optimizer.zero_grad()
        loss = noise(logs)
        loss.backward()  # type: ignore[no-untyped-call]
        if fresh and loss.item() < least:  # between two searches the figure flatters
            least, best = loss.item(), logs.detach().clone()
        optimizer.step()
        schedule.step()
    gained = 10 / math.log(10) * (losses[0] - least)
    text = f"expected noise at the ends of {len(chains)} chains lowered by {gained:.1f} dB on average"
    limit = math.log(_LARGEST)
    found_logs = torch.split(best.clamp(-limit, limit).exp(), noise.length)
    return {**published, **dict(zip(names, found_logs, strict=True))}, [LogEntry("equalize", None, text)]


def _applied(m: QModel, links: list[Link], factors: dict[str, Tensor]) -> QModel:
    """The model with scaled weights, biases, moments and limits."""
    graph, params, moments = editable(m.graph), dict(m.parameters), dict(m.moments)
    nodes = by_value(graph)
    for link in links:
        s = factors.get(value_name(link.writers[0]))
        if s is None:
            continue
        for layer in link.writers:
            name, weight, bias = value_name(layer), weight_name(layer), bias_of(layer)
            params[weight] = _scaled_outputs(layer, params[weight], s)
            if bias is not None:
                params[str(bias.target)] = params[str(bias.target)] * s
            if name in moments:
                moments[name] = Moments(moments[name].mean * s, moments[name].std * s)
        for layer, source in link.readers:
            weight = weight_name(layer)
            params[weight] = _scaled_inputs(layer, source, params[weight], 1 / s)
        for node, carried in link.clamps:
            _scale_limits(graph, nodes[value_name(node)], s[carried.to(s.device)], params)
    return replace(m, graph=graph, params=params, tuned={}, moments=moments)


def _scale_limits(graph: fx.Graph, node: fx.Node, s: Tensor, params: dict[str, Tensor]) -> None:
    """The clamp gets limits for each channel, so that it still cuts where it did; at zero or infinity it needs none."""
    bounds = clamp_bounds(node)
    if bounds is None:  # limits for each channel already
        for argument in node.args[1:3]:
            name = str(argument.target)  # type: ignore[union-attr]
            params[name] = params[name] * s
        return
    if all(b == 0 or abs(b) == float("inf") for b in bounds):
        return
    limits = []
    for end, bound in zip(("lower", "upper"), bounds, strict=True):
        name = f"{value_name(node)}:{end}"
        params[name] = s * bound if bound != 0 else torch.zeros_like(s)
        limits.append(parameter(graph, name, node, params[name].shape))
    node.target, node.args, node.kwargs = CLAMP_CHANNELS, (node.args[0], *limits), {}
