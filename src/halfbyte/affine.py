"""Quantize, dequantize and straight-through rounding: the only place where rounding is written.

``x_hat = scale * (clamp(round(x / scale) + zero, lo, hi) - zero)`` (arXiv 2106.08295, equations 4 to 7), with ties rounded
to the even integer as IEEE 754 and ONNX ``QuantizeLinear`` do. The division is a float32 division, never a product with
the reciprocal, because the engines divide and the two differ at ties; so no ``torch.fake_quantize_*`` here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import FormatError


@dataclass(frozen=True)
class Grid:
    """The real numbers a format can represent: ``scale * (code - zero)`` for ``lo <= code <= hi``.

    scale: float32, positive; zero, lo, hi: int32. Each is a scalar tensor (limits also of any shape that broadcasts), or
    [channels] with ``axis`` naming the dimension, or [channels, groups] with ``group`` values for each scale. ``lo`` and ``hi``
    may be narrower than the format: so they carry four bits in an eight-bit container, ReLU, ReLU6 and per-channel limits.
    """

    scale: Tensor
    zero: Tensor
    lo: Tensor
    hi: Tensor
    axis: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if not bool((self.scale > 0).all()) or not bool(torch.isfinite(self.scale).all()):
            raise FormatError("a scale must be positive and finite")

    def to(self, device: torch.device | str) -> "Grid":
        """The same grid on another device."""
        scale, zero, lo, hi = (t.to(device) for t in (self.scale, self.zero, self.lo, self.hi))
        return Grid(scale, zero, lo, hi, axis=self.axis, group=self.group)

    @property
    def minimum(self) -> Tensor:
        """Smallest real number on the grid."""
        return self.scale * (self.lo - self.zero).float()

    @property
    def maximum(self) -> Tensor:
        """Largest real number on the grid."""
        return self.scale * (self.hi - self.zero).float()


class _Round(torch.autograd.Function):
    """Round half to even with the straight-through gradient (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def round_even(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    return _Round.apply(x) if x.requires_grad else torch.round(x)  # type: ignore[no-untyped-call]


def expand(t: Tensor, grid: Grid, x: Tensor) -> Tensor:
    """Shape a grid's scalar, [channels] or [channels, groups] tensor so that it broadcasts against ``x``."""
    if grid.axis is None or t.ndim == 0:
        return t
    if grid.group is not None:
        per_value = t.repeat_interleave(grid.group, dim=1)[:, : x[0].numel()]
        return per_value.reshape(x.shape)
    shape = [1] * x.ndim
    shape[grid.axis] = -1
    return t.reshape(shape)


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Real values -> integer codes, as float32 integers of the same shape (exact up to 2^24; cast for storage)."""
    scale, zero = expand(grid.scale, grid, x), expand(grid.zero, grid, x)
    codes = round_even(x / scale) + zero
    return torch.clamp(codes, expand(grid.lo, grid, x), expand(grid.hi, grid, x))


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Integer codes -> real values in float32: subtract the zero-point, then multiply, as the engines do."""
    return (codes.float() - expand(grid.zero, grid, codes)) * expand(grid.scale, grid, codes)


def fake_quantize(x: Tensor, grid: Grid, *, spent: bool = False) -> Tensor:
    """The nearest representable real values; gradients to ``x`` and to ``grid.scale`` as in arXiv 2106.08295, section 4.1.

    spent: nobody needs ``x`` any more, so that the result may lie in its memory: new memory costs more time than the arithmetic.
    """
    shared = grid.scale.ndim == grid.zero.ndim == 0 and max(grid.lo.ndim, grid.hi.ndim) < max(1, x.ndim)
    if shared and not (torch.is_grad_enabled() and (x.requires_grad or grid.scale.requires_grad)):
        lo, hi = grid.lo - grid.zero, grid.hi - grid.zero  # the same numbers from one buffer, for speed
        limits: Any = (int(lo), int(hi)) if lo.ndim == hi.ndim == 0 else (lo, hi)
        scale = grid.scale.to(x.dtype)
        return (x.div_(scale) if spent else x / scale).round_().clamp_(*limits).mul_(grid.scale)
    return dequantize(quantize(x, grid), grid)


def power_of_two(scale: Tensor) -> Tensor:
    """The smallest powers of two that are not below ``scale``: no value that was inside the range leaves it."""
    return torch.exp2(torch.ceil(torch.log2(scale)))
