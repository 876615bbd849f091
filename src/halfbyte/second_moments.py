"""What a layer's data have to say about its weights: second moments of the patches it reads and of what it should put out.

The local loss ``E || W_hat x_hat + b - y ||^2`` is quadratic in the weights, so that ``G = E[x_hat x_hat^T]`` and ``E[y x_hat^T]``
are all it needs (arXiv 2004.10568, equation 13; the cross term for inputs that differ from the float network's). Patches are read at
some positions of every sample: a few times as many as the layer has inputs tell what all of them would.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.graph import groups, input_axis
from halfbyte.ops import CONV_TRANSPOSE, LINEAR
from halfbyte.products import product


@dataclass(frozen=True)
class Patches:
    """Rows of a layer's problem: ``inputs`` [groups, rows, inputs of a group times taps], ``outputs`` [groups, rows, outputs].

    Of an image each column lies together in memory.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class SecondMoments:
    """Of patches x and outputs y, for each group, about their means.

    rows: how many. x_mean [groups, K], y_mean [groups, O]; gram [groups, K, K]; cross [groups, O, K]; y_var [groups, O].
    """

    rows: int
    x_mean: Tensor
    y_mean: Tensor
    gram: Tensor
    cross: Tensor
    y_var: Tensor


def rows_of(batch: Tensor, layer: fx.Node) -> int:
    """How many rows a layer's output holds: positions times samples, or tokens."""
    return batch.numel() // batch.shape[input_axis(layer)]


def sampled_patches(layer: fx.Node, x: Tensor, y: Tensor, rows: int, generator: torch.Generator) -> Patches:
    """About ``rows`` rows (all, if there are no more), at positions that all samples of the batch share; sample after sample."""
    g = groups(layer)
    tokens = layer.target is LINEAR
    n, everywhere = len(x), math.prod(y.shape[1:-1] if tokens else y.shape[2:])
    count = min(everywhere, math.ceil(rows / n))
    at = torch.arange(everywhere) if count == everywhere else torch.randperm(everywhere, generator=generator)[:count]
    if tokens:
        flat = [t.reshape(n, everywhere, -1).index_select(1, at.to(t.device)) for t in (x, y)]
        return Patches(flat[0].flatten(0, 1)[None], flat[1].flatten(0, 1)[None])
    index, inside = _taps(layer, at, y.shape[2:], x.shape[2:])
    read = _positions(x, index)  # [taps, samples, positions, channels], as images lie in memory
    if not bool(inside.all()):
        read.mul_(inside[:, None, :, None].to(read))
    wanted = _positions(y, at[None])
    return Patches(
        *(t.flatten(0, 2).t().contiguous().reshape(g, -1, n * count).transpose(1, 2) for t in (read, wanted))
    )


def _positions(x: Tensor, at: Tensor) -> Tensor:
    """Some positions [taps, positions] of images [samples, channels, ...], as [taps, samples, positions, channels]."""
    flat = x.movedim(1, -1).flatten(1, -2)
    first = torch.arange(0, flat.shape[0] * flat.shape[1], flat.shape[1])
    every = (at[:, None] + first[:, None]).to(x.device)
    return flat.flatten(0, 1).index_select(0, every.flatten()).reshape(*every.shape, -1)


def _taps(layer: fx.Node, at: Tensor, out: Sequence[int], into: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[taps, positions]: where each tap of each output position reads the flattened input, and whether that lies inside."""
    spatial = len(out)
    size = layer.args[1].meta["shape"][2:]  # type: ignore[union-attr]
    stride: Any = layer.args[3]
    pads: Any = layer.args[4]
    dilation: Any = layer.args[7] if layer.target is CONV_TRANSPOSE else layer.args[5]
    index = torch.zeros(1, len(at), dtype=torch.int64)
    inside = torch.ones(1, len(at), dtype=torch.bool)
    rest, coordinates = at, []
    for extent in reversed(out):
        coordinates.append(rest % extent)
        rest = rest // extent
    for d in range(spatial):
        o, tap = coordinates[spatial - 1 - d][None], torch.arange(size[d])[:, None]
        if layer.target is CONV_TRANSPOSE:
            spread = o + pads[d] - tap * dilation[d]
            i, valid = torch.div(spread, stride[d], rounding_mode="floor"), spread % stride[d] == 0
        else:
            i, valid = o * stride[d] + tap * dilation[d] - pads[d], torch.ones(1, dtype=torch.bool)
        valid = valid & (i >= 0) & (i < into[d])
        i = i.clamp(0, into[d] - 1)
        index = (index[:, None] * into[d] + i[None]).flatten(0, 1)
        inside = (inside[:, None] & valid[None]).flatten(0, 1)
    return index, inside


class Accumulator:
    """Sums over patches, about a first guess of their means, so that float32 keeps its digits."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: tuple[Tensor, ...] = ()
        self.guess: tuple[Tensor, Tensor] | None = None
        self.waiting: list[Patches] = []

    def add(self, p: Patches) -> None:
        """More rows. They wait until there are many: a product with few costs little more than the matrix that it is added to."""
        self.waiting.append(p)
        rows, size = sum(p.inputs.shape[1] for p in self.waiting), sum(p.inputs.numel() for p in self.waiting)
        if rows >= _PORTION or (rows >= p.inputs.shape[2] and size >= _PORTION_SIZE):
            self._summed()

    def _summed(self) -> None:
        if not self.waiting:
            return
        p, self.waiting = joined(self.waiting), []
        x, y = p.inputs.transpose(1, 2), p.outputs.transpose(1, 2)  # [groups, K, rows], copies
        groups, k, o = *x.shape[:2], y.shape[1]
        if self.guess is None:
            self.guess = x.mean(2), y.mean(2)
            shapes = ((groups, k), (groups, o), (groups, k, k), (groups, o, k), (groups, o))
            self.sums = tuple(x.new_zeros(shape) for shape in shapes)
        x.sub_(self.guess[0][:, :, None])
        y.sub_(self.guess[1][:, :, None])
        of_x, of_y, gram, cross, square = self.sums
        of_x += x.sum(2)
        of_y += y.sum(2)
        for start in range(0, k, _STRIP):  # what lies on and above the diagonal
            gram[:, start : start + _STRIP, start:] += product(x[:, start : start + _STRIP], x[:, start:])
        cross += product(y, x)
        square += y.square_().sum(2)
        self.rows += x.shape[2]

    def moments(self, *, centred: bool) -> SecondMoments:
        """Means over all rows. centred: about the means, which is right where a bias takes them up; else about zero."""
        self._summed()
        assert self.guess is not None
        x, y, gram, cross, square = (t / self.rows for t in self.sums)
        for start in range(_STRIP, gram.shape[1], _STRIP):
            gram[:, start:, start - _STRIP : start] = gram[:, start - _STRIP : start, start:].transpose(1, 2)
        x_mean, y_mean = x + self.guess[0], y + self.guess[1]
        _add_outer(gram, x, x, -1.0)
        _add_outer(cross, y, x, -1.0)
        square = square - y.square()
        if centred:
            return SecondMoments(self.rows, x_mean, y_mean, gram, cross, square.clamp(min=0))
        _add_outer(gram, x_mean, x_mean)
        _add_outer(cross, y_mean, x_mean)
        zero_x, zero_y = torch.zeros_like(x_mean), torch.zeros_like(y_mean)
        return SecondMoments(self.rows, zero_x, zero_y, gram, cross, square + y_mean.square())


def _add_outer(to: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """Add ``factor a b^T``, group after group, in place."""
    to.baddbmm_(a[:, :, None], b[:, None], alpha=factor)


def pooled(a: SecondMoments, b: SecondMoments) -> SecondMoments:
    """The moments of the rows of both, which are about the means of each, or both about zero."""
    rows = a.rows + b.rows
    share, other = a.rows / rows, b.rows / rows
    x, y = a.x_mean - b.x_mean, a.y_mean - b.y_mean
    gram, cross, y_var = (
        (share * s).add_(t, alpha=other) for s, t in ((a.gram, b.gram), (a.cross, b.cross), (a.y_var, b.y_var))
    )
    _add_outer(gram, x, x, share * other)
    _add_outer(cross, y, x, share * other)
    y_var.add_(y.square(), alpha=share * other)
    x_mean, y_mean = (share * s + other * t for s, t in ((a.x_mean, b.x_mean), (a.y_mean, b.y_mean)))
    return SecondMoments(rows, x_mean, y_mean, gram, cross, y_var)


_PORTION, _PORTION_SIZE = 4096, 1 << 22  # rows, and numbers: beyond, every new page costs a fault
_STRIP = 256  # rows of a symmetric matrix that are summed at a time


def gathered(
    layer: fx.Node, inputs: Iterable[Tensor], outputs: Sequence[Tensor], rows: int, generator: torch.Generator
) -> Iterator[Patches]:
    """Patches of one batch after another, about ``rows`` in all, shared out by how many each batch holds."""
    held = [rows_of(y, layer) for y in outputs]
    share = min(1.0, rows / max(1, sum(held)))
    for x, y, n in zip(inputs, outputs, held, strict=True):
        yield sampled_patches(layer, x, y, math.ceil(share * n), generator)


def joined(several: Iterable[Patches]) -> Patches:
    """The rows of several."""
    parts = list(several)
    inputs, outputs = ([getattr(p, of).transpose(1, 2) for p in parts] for of in ("inputs", "outputs"))
    return Patches(torch.cat(inputs, 2).transpose(1, 2), torch.cat(outputs, 2).transpose(1, 2))
