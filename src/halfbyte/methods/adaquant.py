"""AdaQuant: learn weights, bias and grids of a layer together (Hubara et al. 2020, arXiv 2006.10518, section 3.1).

    argmin over s_w, s_x, V, d of  || f(W x + b) - f(Q_{s_w}(W + V) Q_{s_x}(x_hat) + b + d) ||^2

with straight-through gradients (arXiv 1308.3432). A grid is learned as its range R and minimum m: ``s = R / (2^b - 1)`` and
``z = round(lo - m / s)``, so that gradients reach both through the scale and the zero-point. V is continuous: weights may move by
more than one code. All rates are relative, to the range, to the spread of the weights and to that of the outputs, so that
they mean the same in every layer.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from halfbyte.affine import Grid, expand, fake_quantize, round_even
from halfbyte.formats import LARGEST_BITS, SMALLEST_BITS, Format
from halfbyte.graph import groups
from halfbyte.grids import rows, shaped
from halfbyte.local import Problem, Solution
from halfbyte.ops import CONV_TRANSPOSE
from halfbyte.reparam import Leaves, Part, Reparam, check, fit

_FURTHEST = 4.0  # a range stays within e^-4 and e^4 of where it began
_HALF = 0.5  # the scale of an input may fall by this factor


@dataclass(frozen=True)
class Calibrated(Reparam):
    """A tensor on a grid that is learned, after an offset that is learned.

    Leaves: ``range``, the logarithm of R over its start; ``minimum``, how far m moved, in ranges, of an asymmetric format;
    ``offset``, V in standard deviations. moves: whether there is an offset; ranges: whether the grid is learned; floor: the
    least scale, shaped as the grid's.
    """

    moves: bool
    ranges: bool
    floor: Tensor | None = None

    def init(self, x: Tensor, f: Format, g: Grid) -> Leaves:
        """Nothing has moved. Powers of two have no gradient to follow, so such grids stay."""
        leaves: Leaves = {}
        if self.ranges and not f.power_of_two:
            leaves["range"] = torch.zeros_like(g.scale)
            if not f.symmetric:
                leaves["minimum"] = torch.zeros_like(g.scale)
        if self.moves:
            leaves["offset"] = torch.zeros_like(x)
        return leaves

    def soft(self, leaves: Leaves, x: Tensor, f: Format, g: Grid) -> Tensor:
        """The rounded values, with straight-through gradients."""
        return fake_quantize(self._moved(leaves, x, f, g), self._grid(leaves, g))

    def hard(self, leaves: Leaves, x: Tensor, f: Format, g: Grid) -> tuple[Tensor, Format, Grid]:
        """The same values on a grid with an integer zero-point."""
        found = self._grid(leaves, g)
        grid = replace(found, scale=found.scale.detach().clone(), zero=found.zero.detach().round().int())
        return fake_quantize(self._moved(leaves, x, f, g).detach(), grid), f, grid

    @staticmethod
    def _moved(leaves: Leaves, x: Tensor, f: Format, g: Grid) -> Tensor:
        """W + V. A dead channel stays dead: nothing tells what its scale should be."""
        if "offset" not in leaves:
            return x
        alive = shaped((rows(x, f) != 0).any(1).to(x), x, f)
        spread = x.std(correction=0)
        return x + leaves["offset"] * (expand(alive, g, x) * torch.where(spread > 0, spread, x.abs().amax()))

    def _grid(self, leaves: Leaves, g: Grid) -> Grid:
        """The learned grid; its zero-point is an integer that passes gradients."""
        scale, zero = g.scale, g.zero
        if "range" in leaves:
            scale = scale * leaves["range"].clamp(-_FURTHEST, _FURTHEST).exp()
            scale = scale if self.floor is None else torch.maximum(scale, self.floor)
        if "minimum" in leaves:
            minimum = g.minimum + g.scale * (g.hi - g.lo).float() * leaves["minimum"]
            zero = torch.clamp(round_even(g.lo - minimum / scale), g.lo.float(), g.hi.float())
        return replace(g, scale=scale, zero=zero)


def format_of(grid: Grid) -> Format:
    """The format of a running value, as far as its grid tells.

    The zero-point counts as fixed where it is 0 or at a limit: there the format may be symmetric, or the values have one sign.
    """
    lo, hi = int(grid.lo.min()), int(grid.hi.max())
    inside = grid.lo.ndim == grid.hi.ndim == 0 and lo < int(grid.zero) < hi and int(grid.zero) != 0
    bits = min(max((hi - lo).bit_length(), SMALLEST_BITS), LARGEST_BITS)
    powers = bool((torch.frexp(grid.scale).mantissa == 0.5).all())
    return Format(bits, signed=lo < 0, symmetric=not inside, power_of_two=powers)


def _floor(p: Problem) -> Tensor | None:
    """The least scale, shaped to broadcast against the grid's."""
    if p.floor is None or p.floor.ndim == 0:
        return p.floor
    if p.layer.target is CONV_TRANSPOSE and groups(p.layer) > 1:  # its scales belong to inputs, each of several outputs
        return p.floor.max()
    return p.floor if p.form.group is None else p.floor[:, None]


@dataclass(frozen=True)
class AdaQuant:
    """Layer-wise calibration of weights, bias and grids; the iterate that does best on held-out samples is kept.

    iterations, batch: steps of Adam and samples in each. weight_rate: of V, in standard deviations of the weight. bias_rate: in
    standard deviations of the outputs. range_rate, input_range_rate: of the grids of the weight and of the input, relative to
    their ranges. The published 1e-5 for weights is about 3e-4 of a usual spread; much larger rates jump between codes instead of
    settling. Where pairs of 8-bit products may saturate, codes stay at nearest rounding. Raises :class:`UsageError` for an option
    out of range.
    """

    iterations: int = 1_000
    batch: int = 50
    weight_rate: float = 3e-4
    bias_rate: float = 1e-3
    range_rate: float = 3e-4
    input_range_rate: float = 1e-2
    residual: bool = False
    unrounded: bool = True
    name: Literal["adaquant"] = "adaquant"

    def __post_init__(self) -> None:
        inf = float("inf")
        check(
            self.name,
            iterations=(self.iterations, 1, inf),
            batch=(self.batch, 1, inf),
            weight_rate=(self.weight_rate, 0, 1),
            bias_rate=(self.bias_rate, 0, 1),
            range_rate=(self.range_rate, 0, 1),
            input_range_rate=(self.input_range_rate, 0, 1),
        )

    def solve(self, p: Problem) -> Solution:
        """The layer's weight on a grid, its bias, and the grid of its input where ``p.raw_inputs`` lets it be learned."""
        reading = self._reading(p)
        free = not (
            p.pairs and p.form.bits == 8
        )  # the limits that keep pairs from saturating hold for nearest rounding
        floor = _floor(p)
        if floor is not None and reading is not None:
            floor = floor / _HALF  # the bias must fit with the smallest scale of the input, too
        rates = {"range": self.range_rate, "minimum": self.range_rate, "offset": self.weight_rate}
        part = Part(Calibrated(free, free, floor), p.form, p.grid, rates)
        found = fit(
            p,
            part,
            iterations=self.iterations,
            batch=self.batch,
            bias_rate=self.bias_rate,
            reading=reading,
            keep_best=True,
        )
        read = found.input_grid
        if read is not None and reading is not None:
            same = torch.equal(read.scale, reading.grid.scale) and torch.equal(read.zero, reading.grid.zero)
            read = None if same else read
        note = "weights, bias and ranges" if free else "bias only: its codes keep pairs of products from saturating"
        return Solution(found.weight, found.grid, found.bias, note, read)

    def _reading(self, p: Problem) -> Part | None:
        """How to learn the grid of the input."""
        if p.raw_inputs is None or p.input_grid is None:
            return None
        grid = p.input_grid
        rates = {"range": self.input_range_rate, "minimum": self.input_range_rate}
        return Part(Calibrated(moves=False, ranges=True, floor=grid.scale * _HALF), format_of(grid), grid, rates)
