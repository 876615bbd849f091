"""Pairs of layers between which a channel can be scaled or shifted: what lies between them, and which channel becomes which.

Legality is decided on the graph (arXiv 1906.04721, section 4.1.2): one reader each, no addition or concatenation between, not
an output of the network, no shared weight. Chains of any length are pairs that share a layer. Streams are what pairs leave out: sums
and values of several readers, whose writers and readers share the factors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.graph import bias_of, extent, input_axis, is_output, layers, weight_of
from halfbyte.model import LogEntry, value_name
from halfbyte.ops import GLOBAL_AVERAGE_POOL, LINEAR, Kind, argument, aten, base_name, clamp_bounds, kind

_RESHAPES = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze")
_MOVES = ("permute", "transpose", "t", "movedim")
_POOLS = "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d".split()
_RESIZES = ("upsample_nearest", "upsample_bilinear", "upsample_linear", "upsample_bicubic", "upsample_trilinear")
_CURVED = ("silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu", "softplus", "mish", "softmax", "exp")


@dataclass(frozen=True)
class Pair:
    """Two layers and the operations between them.

    source: int64 [input channels of ``second``], the output channel of ``first`` that each of them carries (a channel shuffle
    permutes, flattening a picture repeats). carried: for each operation between, the channel that each element carries, shaped
    to broadcast against the value of one sample.
    """

    first: fx.Node
    between: tuple[fx.Node, ...]
    second: fx.Node
    source: Tensor
    carried: tuple[Tensor, ...]

    @property
    def value(self) -> fx.Node:
        """What the second layer reads."""
        return self.values[-1]

    @property
    def values(self) -> tuple[fx.Node, ...]:
        """All that is scaled."""
        return self.first, *self.between

    @property
    def clamps(self) -> tuple[tuple[fx.Node, Tensor], ...]:
        """Operations with limits between, with the channel that each element carries."""
        found = zip(self.between, self.carried, strict=True)
        return tuple((node, carried) for node, carried in found if kind(node) is Kind.CLAMP)

    @property
    def writers(self) -> tuple[fx.Node, ...]:
        """The first layer; as a stream names it."""
        return (self.first,)

    @property
    def readers(self) -> tuple[tuple[fx.Node, Tensor], ...]:
        """The second layer with the channel that each of its inputs carries; as a stream names them."""
        return ((self.second, self.source),)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return outputs(self.first)

    @property
    def layers(self) -> tuple[fx.Node, ...]:
        """Both layers."""
        return self.first, self.second

    def gathered(self, per_input: Tensor) -> Tensor:
        """The largest of the numbers of those inputs of ``second`` that carry the same channel, [channels of ``first``]."""
        found = torch.zeros(outputs(self.first), dtype=per_input.dtype, device=per_input.device)
        return found.scatter_reduce(0, self.source.to(per_input.device), per_input, "amax", include_self=False)


@dataclass(frozen=True)
class Stream:
    """Layers that write to one sum, or to a value of several readers, and those that read it: one factor for each channel.

    readers: each with the channel that each of its inputs carries, int64. clamps: operations with limits between, with the channel
    that each element carries. values: all that is scaled.
    """

    writers: tuple[fx.Node, ...]
    readers: tuple[tuple[fx.Node, Tensor], ...]
    clamps: tuple[tuple[fx.Node, Tensor], ...]
    values: tuple[fx.Node, ...]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return outputs(self.writers[0])

    @property
    def layers(self) -> tuple[fx.Node, ...]:
        """All that write or read."""
        return *self.writers, *(r for r, _ in self.readers)


Link = Pair | Stream


def outputs(layer: fx.Node) -> int:
    """Number of output channels."""
    return int(layer.meta["shape"][input_axis(layer)])


def inputs(layer: fx.Node) -> int:
    """Number of input channels."""
    return int(layer.args[0].meta["shape"][input_axis(layer)])  # type: ignore[union-attr]


def pairs(graph: fx.Graph, stage: str = "equalize") -> tuple[list[Pair], list[LogEntry]]:
    """All legal pairs in graph order, and why other layers have no partner."""
    found, log, every = [], [], layers(graph)
    for layer in every:
        pair = _partner(layer, set(every))
        if isinstance(pair, Pair):
            found.append(pair)
        else:
            log.append(LogEntry(stage, value_name(layer), f"not paired with what follows: {pair}"))
    return found, log


def _partner(layer: fx.Node, every: set[fx.Node]) -> Pair | str:
    """The pair that starts with this layer, or the reason why there is none."""
    for what, parameter in (("weight", weight_of(layer)), ("bias", bias_of(layer))):
        if parameter is not None and len(parameter.users) > 1:
            return f"its {what} is shared"
    between: list[tuple[fx.Node, Tensor]] = []
    node, channels = layer, _channels(layer)
    while True:
        if is_output(node):
            return f"{value_name(node)} is an output of the network"
        readers = [u for u in node.users if kind(u) is not Kind.SHAPE]
        if len(readers) != 1:
            return f"{value_name(node)} is read by {len(readers)} operations"
        reader = readers[0]
        if reader in every and reader.args[0] is node:
            return _checked(layer, between, reader, channels)
        followed = _followed(channels, node, reader)
        if isinstance(followed, str):
            return followed
        channels = followed
        between.append((reader, _narrowed(channels)))
        node = reader


class _Found:
    """A stream on the way: what it is made of, and why it cannot be scaled, if so."""

    def __init__(self) -> None:
        self.writers: list[fx.Node] = []
        self.readers: list[tuple[fx.Node, Tensor]] = []
        self.clamps: list[tuple[fx.Node, Tensor]] = []
        self.values: list[fx.Node] = []
        self.sums = 0
        self.reason = ""

    def take(self, other: "_Found") -> None:
        """Become one with another."""
        self.writers += other.writers
        self.readers += other.readers
        self.clamps += other.clamps
        self.values += other.values
        self.sums += other.sums
        self.reason = self.reason or other.reason


def streams(graph: fx.Graph, paired: list[Pair]) -> list[Stream]:
    """Where sums, or values of several readers, lie between layers; in graph order. paired: what is scaled already."""
    every, firsts = set(layers(graph)), {p.first for p in paired}
    at: dict[fx.Node, tuple[_Found, Tensor]] = {}
    found: list[_Found] = []
    for node in graph.nodes:
        given = [n for n in node.all_input_nodes if n in at]
        if node.op == "output":
            for n in given:
                at[n][0].reason = "it is an output"
            continue
        if node in every:
            _read(node, at)
            if node not in firsts:
                found.append(_Found())
                found[-1].writers.append(node)
                found[-1].values.append(node)
                at[node] = found[-1], _channels(node)
                if weight_of(node) is None or any(p and len(p.users) > 1 for p in (weight_of(node), bias_of(node))):
                    found[-1].reason = "its weight is computed, or its parameters are shared"
        elif kind(node) is Kind.ADD and len(given) == len(node.all_input_nodes) == 2:
            _summed(node, given, at, found)
        elif given and kind(node) is not Kind.SHAPE:
            stream, channels = at[given[0]]
            followed = _followed(channels, given[0], node) if len(given) == 1 else "several values meet"
            if isinstance(followed, str):
                for n in given:
                    at[n][0].reason = followed
                continue
            at[node] = stream, followed
            stream.values.append(node)
            if kind(node) is Kind.CLAMP:
                stream.clamps.append((node, _narrowed(followed)))
    whole = [f for f in found if not f.reason and f.writers and (f.sums or len(f.readers) > 1) and f.readers]
    return [Stream(tuple(f.writers), tuple(f.readers), tuple(f.clamps), tuple(f.values)) for f in whole]


def _read(layer: fx.Node, at: dict[fx.Node, tuple[_Found, Tensor]]) -> None:
    """Note a layer as a reader of what it reads."""
    for n in layer.all_input_nodes:
        if n not in at:
            continue
        stream, channels = at[n]
        simple = layer.args[0] is n and weight_of(layer) is not None
        checked = _checked(layer, [], layer, channels) if simple else "a weight is computed"
        if isinstance(checked, str):
            stream.reason = checked
        else:
            stream.readers.append((layer, checked.source))


def _summed(node: fx.Node, given: list[fx.Node], at: dict[fx.Node, tuple[_Found, Tensor]], found: list[_Found]) -> None:
    """Two streams that are added are one."""
    (a, channels), (b, others) = at[given[0]], at[given[1]]
    if channels.shape != others.shape or not torch.equal(channels, others):
        a.reason = b.reason = "its channels meet others"
    if a is not b:
        a.take(b)
        found.remove(b)
        for n, (stream, carried) in at.items():
            if stream is b:
                at[n] = a, carried
    a.sums += 1
    a.values.append(node)
    at[node] = a, channels


def _narrowed(channels: Tensor) -> Tensor:
    """Channel numbers of one sample, with size 1 where a dimension only repeats them."""
    for d in range(channels.ndim):
        first = channels.narrow(d, 0, 1)
        if bool((channels == first).all()):
            channels = first
    return channels[0].contiguous()


def _checked(first: fx.Node, between: list[tuple[fx.Node, Tensor]], second: fx.Node, channels: Tensor) -> Pair | str:
    if len(weight_of(second).users) > 1:  # type: ignore[union-attr]
        return f"the weight of {value_name(second)} is shared"
    along = channels.movedim(input_axis(second), 0).flatten(1)
    if not bool((along == along[:, :1]).all()):
        return f"{value_name(second)} mixes the channels of {value_name(first)} in each of its inputs"
    return Pair(first, tuple(n for n, _ in between), second, along[:, 0].contiguous(), tuple(c for _, c in between))


def _sizes(node: fx.Node) -> list[int]:
    """The shape for one sample, where the batch is free."""
    return [extent(d) for d in node.meta["shape"]]


def _channels(layer: fx.Node) -> Tensor:
    """The layer's output, each element replaced by the number of its channel."""
    shape = [1] * len(layer.meta["shape"])
    shape[input_axis(layer)] = -1
    return torch.arange(outputs(layer)).reshape(shape).expand(_sizes(layer))


def _followed(channels: Tensor, node: fx.Node, reader: fx.Node) -> Tensor | str:
    """Channel numbers behind ``reader``, or why a factor for each channel does not pass it."""
    name = base_name(reader)
    if name in _RESHAPES:
        return channels.reshape(_sizes(reader))
    if name in _MOVES and isinstance(reader.target, torch._ops.OpOverload):
        return torch.as_tensor(reader.target(channels, *reader.args[1:], **reader.kwargs))
    if name in _CURVED:
        return f"{name} comes next, which is curved: f(s x) is not s f(x)"
    if not _homogeneous(reader) or reader.args[0] is not node:
        return f"{name} comes next"
    if kind(reader) is Kind.CLAMP or name in ("leaky_relu", "prelu"):
        return channels
    line = channels.movedim(1, 0).flatten(1)
    if _sizes(reader)[1] != len(line) or not bool((line == line[:, :1]).all()):
        return f"{name} comes next on another dimension than the channels"
    return line[:, 0].reshape(1, -1, *[1] * (len(_sizes(reader)) - 2)).expand(_sizes(reader))


def _homogeneous(node: fx.Node) -> bool:
    """Whether f(s x) = s f(x) for a positive factor for each channel, after the limits of a clamp are scaled too."""
    name = base_name(node)
    if kind(node) is Kind.CLAMP:
        bounds = clamp_bounds(node)
        return bounds is None or bounds[0] <= 0 <= bounds[1]
    if name in ("pad", "constant_pad_nd"):
        amounts: Any = node.args[1]
        if any(amounts[2 * (len(node.meta["shape"]) - 2) :]):
            return False  # it pads the channels themselves
        return kind(node) is Kind.CODES or argument(node, 2, "mode", "constant") in ("reflect", "replicate")
    if name in ("leaky_relu", "prelu", *_POOLS) or node.target is GLOBAL_AVERAGE_POOL:
        return node.target is not aten.prelu.default or _constant_slopes(node)
    return name.startswith(_RESIZES)


def _constant_slopes(node: fx.Node) -> bool:
    """A PReLU whose slopes are parameters."""
    return isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"


def padded(layer: fx.Node) -> bool:
    """Whether a layer meets zeros that are not values of its input: at borders, or between the positions it spreads."""
    if layer.target is LINEAR:
        return False
    if kind(layer) is Kind.CONV:
        return any(layer.args[4])  # type: ignore[arg-type]
    taps = layer.args[1].meta["shape"][2:]  # type: ignore[union-attr]
    return any(t != 1 for t in (*taps, *layer.args[3])) or any((*layer.args[4], *layer.args[5]))  # type: ignore[misc]
