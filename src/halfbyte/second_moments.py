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


@dataclass(frozen=True)
class Patches:
    """Rows of a layer's problem: ``inputs`` [groups, rows, inputs of a group times taps], ``outputs`` [groups, rows, outputs]."""

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
    read = _positions(x, index.flatten())  # [samples, taps and positions, channels], as images lie in memory
    if not bool(inside.all()):
        read = read * inside.flatten()[:, None].to(read)
    taps = len(index)
    read = read.reshape(n, taps, count, g, -1).permute(3, 0, 2, 4, 1).reshape(g, n * count, -1)
    wanted = _positions(y, at).reshape(n * count, g, -1)
    return Patches(read, wanted.movedim(1, 0).contiguous())


def _positions(x: Tensor, at: Tensor) -> Tensor:
    """Some positions of images [samples, channels, ...], as [samples, positions, channels]."""
    return x.movedim(1, -1).flatten(1, -2).index_select(1, at.to(x.device))


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
        if sum(p.inputs.shape[1] for p in self.waiting) >= _PORTION:
            self._summed()

    def _summed(self) -> None:
        if not self.waiting:
            return
        p, self.waiting = joined(self.waiting), []
        if self.guess is None:
            self.guess = p.inputs.mean(1, keepdim=True), p.outputs.mean(1, keepdim=True)
        x, y = p.inputs - self.guess[0], p.outputs - self.guess[1]
        new = (x.sum(1), y.sum(1), _symmetric_product(x), y.transpose(1, 2) @ x, y.square().sum(1))
        self.sums = tuple(a + b for a, b in zip(self.sums, new, strict=True)) if self.sums else new
        self.rows += x.shape[1]

    def moments(self, *, centred: bool) -> SecondMoments:
        """Means over all rows. centred: about the means, which is right where a bias takes them up; else about zero."""
        self._summed()
        assert self.guess is not None
        x, y, gram, cross, square = (t / self.rows for t in self.sums)
        x_mean, y_mean = x + self.guess[0][:, 0], y + self.guess[1][:, 0]
        gram = gram - x[:, :, None] * x[:, None]
        cross = cross - y[:, :, None] * x[:, None]
        square = square - y.square()
        if centred:
            return SecondMoments(self.rows, x_mean, y_mean, gram, cross, square.clamp(min=0))
        zero_x, zero_y = torch.zeros_like(x_mean), torch.zeros_like(y_mean)
        gram = gram + x_mean[:, :, None] * x_mean[:, None]
        cross = cross + y_mean[:, :, None] * x_mean[:, None]
        return SecondMoments(self.rows, zero_x, zero_y, gram, cross, square + y_mean.square())


def pooled(a: SecondMoments, b: SecondMoments) -> SecondMoments:
    """The moments of the rows of both, which are about the means of each, or both about zero."""
    rows = a.rows + b.rows
    share, other = a.rows / rows, b.rows / rows
    x, y = a.x_mean - b.x_mean, a.y_mean - b.y_mean
    apart = (x[:, :, None] * x[:, None], y[:, :, None] * x[:, None], y.square())
    gram, cross, y_var = (
        share * s + other * t + share * other * d
        for s, t, d in zip((a.gram, a.cross, a.y_var), (b.gram, b.cross, b.y_var), apart, strict=True)
    )
    x_mean, y_mean = (share * s + other * t for s, t in ((a.x_mean, b.x_mean), (a.y_mean, b.y_mean)))
    return SecondMoments(rows, x_mean, y_mean, gram, cross, y_var)


_PORTION = 4096  # rows
_STRIPS = 4  # the part above the diagonal, in so many strips


def _symmetric_product(x: Tensor) -> Tensor:
    """``x^T x`` [groups, K, K] of [groups, rows, K]; of a large one only what lies on and above the diagonal is multiplied."""
    k = x.shape[2]
    if k < 64 * _STRIPS:
        return x.transpose(1, 2) @ x
    found = torch.empty(len(x), k, k, dtype=x.dtype, device=x.device)
    width = math.ceil(k / _STRIPS)
    for start in range(0, k, width):
        stop = min(k, start + width)
        strip = x[:, :, start:stop].transpose(1, 2) @ x[:, :, start:]
        found[:, start:stop, start:] = strip
        found[:, start:, start:stop] = strip.transpose(1, 2)
    return found


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
    return Patches(torch.cat([p.inputs for p in parts], 1), torch.cat([p.outputs for p in parts], 1))
