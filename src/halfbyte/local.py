"""One layer's problem as its solvers see it, and what they return."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid
from halfbyte.formats import Format
from halfbyte.graph import blocks
from halfbyte.second_moments import Patches
from halfbyte.walk import Frontier

Tick = Callable[[int, int], None]  # iterations done, in all


@dataclass(frozen=True)
class Problem:
    """Choose a weight on a grid so that the layer puts out what the float network expects of it.

    layer: the operation. weight, bias: as they are in float. form, grid: the weight's format, and the grid chosen from its values
    alone. inputs: what the network so far gives the layer, batch by batch; targets: what the float network expects. held_out:
    patches of other samples, [groups, rows, ...], which decide between solutions. following: the activation function that
    alone reads the output, or None. input_grid: of what the layer reads, None where that is float. raw_inputs: ``inputs`` before they
    were rounded to it, where the layer alone reads them, so that another grid may be chosen. floor: the least scale, [outputs]
    or scalar, for which the bias fits its type. pairs: 8-bit codes must keep pairs of products in 16 bits. seed: of everything
    random.
    """

    layer: fx.Node
    weight: Tensor
    bias: Tensor | None
    form: Format
    grid: Grid
    inputs: Frontier
    targets: Frontier
    held_out: Patches
    following: Callable[[Tensor], Tensor] | None = None
    input_grid: Grid | None = None
    raw_inputs: Frontier | None = None
    floor: Tensor | None = None
    pairs: bool = False
    seed: int = 0
    progress: Tick = lambda _done, _total: None

    def generator(self) -> torch.Generator:
        """Random numbers of this layer, the same in every run."""
        return torch.Generator().manual_seed(self.seed)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another weight and bias."""
        return self.layer.target(x, weight, bias, *self.layer.args[3:])  # type: ignore[operator, no-any-return]

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Mean squared error over the held-out rows, summed over outputs, of a weight and bias in the layer's own shapes."""
        parts = blocks(self.layer, weight).flatten(2)
        found = parts @ self.held_out.inputs.transpose(1, 2)
        if bias is not None:
            found += bias.reshape(parts.shape[:2])[:, :, None]
        return float(found.sub_(self.held_out.outputs.transpose(1, 2)).square_().mean(2).double().sum())


@dataclass(frozen=True)
class Solution:
    """A weight that lies on ``grid``, the bias that goes with it, and a remark for the log.

    input_grid: a better grid for what the layer reads, where the method learns one.
    """

    weight: Tensor
    grid: Grid
    bias: Tensor | None
    note: str = ""
    input_grid: Grid | None = None


class LayerSolver(Protocol):
    """A method that solves one layer's problem."""

    @property
    def name(self) -> str:
        """As it stands in the log."""

    @property
    def residual(self) -> bool:
        """Whether the targets ask a layer in front of an addition to make up for the error of the other operand."""

    @property
    def unrounded(self) -> bool:
        """Whether it chooses the grid of what the layer reads, where the layer alone reads it."""

    @property
    def iterations(self) -> int:
        """Steps of a learned method, which a time limit may shorten; 0 of a method in closed form."""

    def solve(self, p: Problem) -> Solution:
        """A solution, whatever it is worth: the caller keeps the better of before and after."""
