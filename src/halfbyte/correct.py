"""Bias correction: the mean error that rounding the weights causes is taken into the bias (arXiv 1906.04721, section 4.2)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx

from halfbyte.affine import fake_quantize
from halfbyte.graph import bias_of, layers, weight_of
from halfbyte.model import LogEntry, QModel, value_name
from halfbyte.ops import CONV, CONV_TRANSPOSE


@dataclass(frozen=True)
class ChannelMoments:
    """Sums over everything seen of a layer's input, [channels] in float64: values and squares; and how many values."""

    total: Tensor
    squares: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """E[x], float32 [channels]."""
        return (self.total / self.count).float()

    @property
    def power(self) -> Tensor:
        """E[x^2], float32 [channels]."""
        return (self.squares / self.count).float()

    def merged(self, other: "ChannelMoments") -> "ChannelMoments":
        """Both together."""
        return ChannelMoments(self.total + other.total, self.squares + other.squares, self.count + other.count)


# Of a batch with more values than this, not every sample is summed: neighbours in a picture say the same of a channel.
SAMPLED = 1 << 21
# By value name and the dimension that the reading layer's weight runs over: a convolution and a linear layer may read one value.
InputMoments = Mapping[tuple[str, int], ChannelMoments]


def channel_moments(x: Tensor, axis: int) -> ChannelMoments:
    """Moments of each index of one dimension; of a large tensor, from every few samples of its batch."""
    x = x[:: max(1, min(x.shape[0], x.numel() // SAMPLED))] if axis % x.ndim else x
    others = [d for d in range(x.ndim) if d != axis % x.ndim]
    squares = x.square().sum(others)
    return ChannelMoments(x.sum(others).double(), squares.double(), x.numel() // x.shape[axis])


def input_axis(layer: fx.Node) -> int:
    """Which dimension of a layer's input its weight runs over."""
    return 1 if layer.target in (CONV, CONV_TRANSPOSE) else -1


def along_weight(layer: fx.Node, per_channel: Tensor, w: Tensor) -> Tensor:
    """A number for each input channel -> a tensor that broadcasts against the layer's weight [outputs, inputs/groups, ...]."""
    groups = layer.args[6] if layer.target is CONV else 1
    if groups == 1:
        return per_channel.reshape(1, -1, *[1] * (w.ndim - 2))
    spread = per_channel.reshape(groups, -1).repeat_interleave(w.shape[0] // groups, 0)  # type: ignore[arg-type,operator]
    return spread.reshape(*spread.shape, *[1] * (w.ndim - 2))


def correct_bias(m: QModel, inputs: InputMoments) -> QModel:
    """Move each layer's expected output error ``(W_hat - W) E[x]`` into its bias.

    inputs: moments of what the layers read, by value name, measured in float. The bias is stored in 32 bits, so nothing is
    lost by it. Layers without a bias are left alone.
    """
    tuned, parameters, count = dict(m.tuned), m.parameters, 0
    for layer in layers(m.graph):
        weight, bias, source = weight_of(layer), bias_of(layer), layer.args[0]
        if weight is None or bias is None or layer.target is CONV_TRANSPOSE or not isinstance(source, fx.Node):
            continue
        grid = m.grid(value_name(weight))
        seen = inputs.get((value_name(source), input_axis(layer)))
        if grid is None or seen is None or len(weight.users) > 1 or len(bias.users) > 1:
            continue
        w = parameters[str(weight.target)]
        mean = along_weight(layer, seen.mean, w)
        error = ((fake_quantize(w, grid) - w) * mean).flatten(1).sum(1)
        tuned[str(bias.target)] = parameters[str(bias.target)] - error
        count += 1
    entry = LogEntry(
        "correct_bias", None, f"the mean error of rounded weights is taken into the biases of {count} layers"
    )
    return replace(m, tuned=tuned).logged(entry)
