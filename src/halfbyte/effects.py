"""What changes of running values do to a network's outputs, to first order.

A change d of a value moves the outputs by J d, J the Jacobian behind it. For random directions z of the outputs,
``E_z (z^T J d)^2 = ||J d||^2``, and ``J^T z`` is one backward pass: gradients of a few samples judge every change of every value
at once, without labels (the Gauss-Newton matrix in place of trials on the loss, as arXiv 1911.07190 has them). Summed over a
sample's positions before it is squared, an error that all positions share counts as it adds up.
"""

import math
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.affine import fake_quantize
from halfbyte.model import Inputs, QModel
from halfbyte.run import portions, run

_DIRECTIONS = 4
_JUDGES, _MOST = 64, 16  # samples that judge, and those whose activations and gradients are held at a time


def sloped(
    m: QModel, batch: Inputs, names: Container[str], generator: torch.Generator
) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Named values of the float network on a batch, each with the gradients of some random directions of the outputs.

    Values that hold nothing for each sample, or that no output depends on, are left out.
    """
    seen: dict[str, Tensor] = {}

    def tap(name: str, t: Tensor) -> Tensor:
        if name not in names or t.ndim == 0 or len(t) != len(batch[0]):
            return t
        seen[name] = t if t.requires_grad else t.detach().requires_grad_()
        return seen[name]

    with torch.enable_grad():
        outputs = [y for y in run(m.as_float(), batch, tap) if y.is_floating_point() and y.requires_grad]
        if not outputs:
            return {}
        slopes = [_slopes(outputs, list(seen.values()), generator) for _ in range(_DIRECTIONS)]
    found = {n: (t.detach(), [s[j] for s in slopes if s[j] is not None]) for j, (n, t) in enumerate(seen.items())}
    return {n: both for n, both in found.items() if both[1]}


def lacks_derivative(error: RuntimeError) -> bool:
    """Whether a backward pass failed because torch has no derivative of some operation; the error's first line names it."""
    return "is not implemented" in str(error)


def _slopes(outputs: Sequence[Tensor], values: Sequence[Tensor], generator: torch.Generator) -> tuple[Any, ...]:
    """Gradients of a random direction of the outputs, each over its spread and the root of its size, with respect to the values.

    Squared, what a change of a value makes of them is the noise-to-signal ratio that it causes, on average over the outputs.
    A shift that all scores of a sample [samples, classes] share changes no decision, and does not count.
    """
    total = torch.zeros((), device=outputs[0].device)
    for y in outputs:
        z = torch.randn(y.shape, generator=generator).to(y.device)
        z = z - z.mean(1, keepdim=True) if y.ndim == 2 and y.shape[1] > 1 else z
        each = math.sqrt(max(1, y.numel() // max(1, len(y) if y.ndim else 1)) * len(outputs))
        spread = y.detach().std() if y.numel() > 1 else y.detach().abs()  # of a single number nothing tells a spread
        total = total + (y * z).sum() / (each * spread.clamp(min=1e-12))
    try:
        return torch.autograd.grad(total, values, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if not lacks_derivative(error):
            raise
        return (None,) * len(values)  # nothing is known


def judged(
    m: QModel, data: Iterable[Inputs], names: Container[str]
) -> Iterator[tuple[int, dict[str, tuple[Tensor, list[Tensor]]]]]:
    """What :func:`sloped` finds on the first 64 samples or so, a few at a time, with their number."""
    generator, count = torch.Generator().manual_seed(0), 0
    for batch in portions(m, data, _MOST):
        if count >= _JUDGES:
            return
        count += len(batch[0])
        yield len(batch[0]), sloped(m, batch, names, generator)


def rounding_noise(m: QModel, data: Iterable[Inputs], names: Collection[str]) -> dict[str, float]:
    """The noise-to-signal ratio that rounding each of these values alone makes at the outputs, to first order.

    data: a few batches. Left out is a value that no output depends on.
    """
    sums: dict[str, float] = {}
    count = 0
    for samples, found in judged(m, data, names):
        count += samples
        for name, (x, slopes) in found.items():
            grid = m.grid(name)
            assert grid is not None
            change = fake_quantize(x, grid).sub_(x)
            each = torch.stack([(change * g).flatten(1).sum(1).double().square().sum() for g in slopes])
            sums[name] = sums.get(name, 0.0) + float(each.mean())
    return {name: total / max(count, 1) for name, total in sums.items()}
