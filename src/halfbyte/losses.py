"""How far a quantized network's outputs are from the float network's, without labels."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, fx

from halfbyte.graph import by_value, drop_dead, is_real, output_node, output_values
from halfbyte.model import Inputs, Outputs, QModel, editable, value_name
from halfbyte.ops import is_tensor
from halfbyte.run import portions, run, simulate

Loss = Literal["error", "divergence"]
_SMALLEST = 1e-30


def comparable(m: QModel) -> QModel:
    """The model to compare with others: numbers that all samples share, as a loss, are no outputs of it; and of outputs that are
    all such, indices or truth values it puts out what these are made of.

    Anything but its graph and its outputs is the model's, and holds for both.
    """
    outputs = output_values(m.graph)
    if any(map(_of_samples, outputs)) and all(_of_samples(n) or not is_real(n) for n in outputs):
        return m
    found = dict.fromkeys(filter(_of_samples, outputs))
    behind = [] if found else list(outputs)
    while behind:
        node = behind.pop(0)
        if _of_samples(node):
            found[node] = None
        else:
            behind += node.all_input_nodes
    if not found:
        return m
    graph = editable(m.graph)
    named = by_value(graph)
    names = tuple(map(value_name, found))
    output_node(graph).args = (tuple(named[name] for name in names),)
    drop_dead(graph)
    return replace(m, graph=graph, outputs=names)


def _of_samples(node: fx.Node) -> bool:
    return node.op != "get_attr" and is_real(node) and len(node.meta["shape"]) > 0


@torch.no_grad()
def noise_to_signal(m: QModel, data: Iterable[Inputs], reference: QModel) -> float:
    """Squared difference between simulation and float outputs over the variance of the float outputs, averaged over outputs.

    Outputs that are no real numbers, such as indices of classes, do not count.
    """
    m, reference = comparable(m), comparable(reference)
    noise: dict[int, float] = {}
    signal: dict[int, float] = {}
    tap = simulate(m)
    for batch in portions(m, data):
        for i, (a, b) in enumerate(zip(run(reference, batch), run(m, batch, tap), strict=True)):
            if not a.is_floating_point():
                continue
            noise[i] = noise.get(i, 0.0) + float((a - b).double().square().sum())
            signal[i] = signal.get(i, 0.0) + float((a - a.mean()).double().square().sum())
    return sum(noise[i] / max(signal[i], _SMALLEST) for i in noise) / max(1, len(noise))


def classifies(m: QModel) -> bool:
    """Whether the network's only output is a score for each of several classes, [samples, classes]."""
    outputs = output_values(m.graph)
    shape: tuple[object, ...] = outputs[0].meta["shape"] if len(outputs) == 1 and is_tensor(outputs[0]) else ()
    return len(shape) == 2 and isinstance(shape[1], int) and shape[1] > 1


def divergence(found: Outputs, wanted: Outputs) -> Tensor:
    """KL(softmax(wanted) || softmax(found)), nats, mean over the samples of the only output [samples, classes]."""
    expected = torch.log_softmax(wanted[0], 1)
    return (expected.exp() * (expected - torch.log_softmax(found[0], 1))).sum(1).mean()


def noise_of(found: Tensor, wanted: Tensor, importance: Tensor | None = None) -> Tensor:
    """Mean squared difference over the mean square of ``wanted``. importance: of each channel, dimension 1."""
    error = (found - wanted).square()
    if importance is not None and error.ndim > 1:
        error = error * importance.reshape(1, -1, *[1] * (error.ndim - 2))
    return error.mean() / wanted.square().mean().clamp(min=_SMALLEST)


def relative_error(found: Outputs, wanted: Outputs, signals: Outputs, *, centred: bool = False) -> Tensor:
    """Mean squared difference of each output over ``signals``, its variance in float; mean over the outputs.

    centred: less the mean over the classes, to which softmax is blind.
    """
    terms = []
    for y, t, signal in zip(found, wanted, signals, strict=True):
        difference = y - t
        difference = difference - difference.mean(1, keepdim=True) if centred else difference
        terms.append(difference.square().mean() / signal.clamp(min=_SMALLEST))
    return torch.stack(terms).mean()
