"""Bias correction: the mean error that rounding the weights causes is taken into the bias (arXiv 1906.04721, section 4.2)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from halfbyte.affine import fake_quantize
from halfbyte.errors import UsageError
from halfbyte.graph import bias_of, blocks, input_axis, layers, per_input, weight_of
from halfbyte.model import Inputs, LogEntry, QModel, Target, value_name
from halfbyte.moments import Spread, propagate
from halfbyte.run import portions
from halfbyte.walk import Frontier, walk

_BIAS_BITS = 16  # below, corrections hurt more than they help (github.com/jakc4103/DFQ, issue 39)


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


def correct_bias(
    m: QModel, data: Iterable[Inputs] | None = None, *, ranges: Mapping[str, tuple[float, float]] | None = None
) -> QModel:
    """Take the mean error that quantization causes in each layer's outputs into its bias. Use after ``calibrate``.

    Without data, analytically: ``b - (W_hat - W) E[x]`` with E[x] from the moments of the batch norms (arXiv 1906.04721,
    section 4.2.1). With data, empirically, layer by layer in graph order, each with everything before it quantized and
    corrected: the mean of what the layer puts out less what it does in float (appendix D). A mean over few samples is
    uncertain, so it is shrunk by its own variance over the samples. ranges: ends of inputs, as for ``calibrate``. Raises
    :class:`UsageError` for a model without grids, or a target that stores biases in fewer than 16 bits: they could not hold
    the correction.
    """
    if not m.grids or m.target is None:
        raise UsageError("there is no rounding error to correct yet: call place and calibrate before correct_bias")
    check_bias_bits(m.target)
    return correct_expected(m, expected_inputs(m, propagate(m, ranges))) if data is None else _empirical(m, data)


def check_bias_bits(target: Target) -> None:
    """Raise :class:`UsageError` for a target whose biases could not hold a correction."""
    if target.bias_bits < _BIAS_BITS:
        raise UsageError(
            f"target {target.name} stores biases in {target.bias_bits} bits: a correction needs at least {_BIAS_BITS}"
        )


def expected_inputs(m: QModel, spreads: Mapping[str, Spread]) -> InputMoments:
    """What each layer is expected to read, from the moments of batch norms; only where they are known."""
    found: dict[tuple[str, int], ChannelMoments] = {}
    for layer in layers(m.graph):
        source, axis = layer.args[0], input_axis(layer)
        s = spreads.get(value_name(source)) if isinstance(source, fx.Node) else None
        if s is not None:
            mean = s.channels(axis, s.mean).double()
            power = s.channels(axis, s.var + s.mean.square()).double()
            if bool(torch.isfinite(power).all()):
                found[value_name(source), axis] = ChannelMoments(mean, power, 1)  # type: ignore[arg-type]
    return found


def _empirical(m: QModel, data: Iterable[Inputs]) -> QModel:
    """Sequential correction on data, with both streams side by side."""
    corrected = 0

    def visit(now: QModel, layer: fx.Node, quantized: Frontier, reference: Frontier) -> QModel:
        nonlocal corrected
        weight, bias = weight_of(layer), bias_of(layer)
        if weight is None or bias is None or now.grid(value_name(weight)) is None or len(bias.users) > 1:
            return now
        w = fake_quantize(now.parameters[str(weight.target)], now.grid(value_name(weight)))  # type: ignore[arg-type]
        b, axis = now.parameters[str(bias.target)], input_axis(layer)
        errors = []  # of each sample, so that the spread between samples says how far the mean can be trusted
        for x, y in zip(quantized, reference, strict=True):
            difference = layer.target(x, w, b, *layer.args[3:]) - y  # type: ignore[operator]
            errors.append(difference.movedim(axis, 1).flatten(2).mean(2) if y.ndim > 2 else difference)
        each = torch.cat(errors)
        mean, uncertain = each.mean(0), each.var(0) / len(each)
        trusted = (1 - uncertain / mean.square().clamp(min=1e-30)).clamp(min=0) if len(each) > 1 else 1.0
        corrected += 1
        return replace(now, tuned={**now.tuned, str(bias.target): b - trusted * mean})

    m = walk(m, portions(m, data), visit)
    text = f"the mean error of the outputs of {corrected} layers, measured on data, is taken into their biases"
    return m.logged(LogEntry("correct_bias", None, text))


def correct_expected(m: QModel, inputs: InputMoments) -> QModel:
    """Move each layer's expected output error ``(W_hat - W) E[x]`` into its bias.

    inputs: moments of what the layers read, by value name, in float. The float bias is what is corrected, so that a second
    correction replaces the first. Layers without a bias are left alone.
    """
    tuned, parameters, count = dict(m.tuned), m.parameters, 0
    for layer in layers(m.graph):
        weight, bias, source = weight_of(layer), bias_of(layer), layer.args[0]
        if weight is None or bias is None or not isinstance(source, fx.Node):
            continue
        grid = m.grid(value_name(weight))
        seen = inputs.get((value_name(source), input_axis(layer)))
        if grid is None or seen is None or len(weight.users) > 1 or len(bias.users) > 1:
            continue
        original = m.params[str(weight.target)]
        error = blocks(layer, fake_quantize(parameters[str(weight.target)], grid) - original)
        shift = (error.double() * per_input(layer, seen.mean.double())).sum((2, 3)).flatten()
        tuned[str(bias.target)] = m.params[str(bias.target)] - shift.to(original.dtype)
        count += 1
    text = f"the mean error of rounded weights is taken into the biases of {count} layers"
    return replace(m, tuned=tuned).logged(LogEntry("correct_bias", None, text))
