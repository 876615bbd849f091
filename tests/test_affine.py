"""Quantize and dequantize: laws over all formats, and gradients against the surrogate they belong to."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.affine import Grid, dequantize, expand, fake_quantize, power_of_two, quantize
from halfbyte.errors import FormatError
from halfbyte.formats import Format


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Grid, Format]:
    """A tensor and a grid of any format whose scales differ from row to row."""
    bits = draw(st.integers(2, 16))
    signed = draw(st.booleans())
    symmetric = draw(st.booleans())
    kind = draw(st.sampled_from(["tensor", "channel", "group"]))
    axis = None if kind == "tensor" else 0 if kind == "group" else draw(st.integers(0, 2))
    group = draw(st.integers(1, 7)) if kind == "group" else None
    form = Format(bits, signed=signed, symmetric=symmetric, axis=axis, group=group, power_of_two=draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(3, 4, 5, generator=generator)
    shape: tuple[int, ...] = ()
    if group is not None:
        shape = (3, math.ceil(20 / group))
    elif axis is not None:
        shape = (x.shape[axis],)
    scale = torch.exp(torch.randn(shape, generator=generator)) * 4 / 2**bits * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    if form.power_of_two:
        scale = power_of_two(scale)
    zero = torch.zeros(shape, dtype=torch.int32)
    if not symmetric:
        zero = torch.randint(form.lo, form.hi + 1, shape, generator=generator, dtype=torch.int32)
    grid = Grid(scale, zero, torch.full_like(zero, form.lo), torch.full_like(zero, form.hi), axis=axis, group=group)
    return x * float(scale.mean()) * 2 ** (bits - 1), grid, form


@settings(deadline=None, max_examples=150)
@given(cases())
def test_laws_of_a_grid(case: tuple[Tensor, Grid, Format]) -> None:
    x, grid, form = case
    codes, y = quantize(x, grid), fake_quantize(x, grid)
    scale, low, high = (expand(t, grid, x).expand_as(x) for t in (grid.scale, grid.minimum, grid.maximum))
    assert codes.shape == x.shape
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) >= form.lo
    assert float(codes.max()) <= form.hi
    assert torch.equal(fake_quantize(y, grid), y), "idempotent"
    assert torch.equal(quantize(dequantize(codes, grid), grid), codes), "codes survive"
    inside = (x >= low) & (x <= high)
    error = (x.double() - y.double()).abs()
    slack = 1e-6 * torch.maximum(x.abs(), scale).double()
    assert bool((error <= scale.double() / 2 + slack)[inside].all())
    assert torch.equal(y[x < low], low[x < low])
    assert torch.equal(y[x > high], high[x > high])
    zero = fake_quantize(torch.zeros_like(x), grid)
    assert torch.equal(zero, torch.zeros_like(x)), "real zero is on every grid"


@given(bits=st.integers(2, 8), exponent=st.integers(-20, 20), code=st.integers(0, 254))
def test_ties_go_to_the_even_code(bits: int, exponent: int, code: int) -> None:
    code %= 2**bits - 1
    grid = Grid(torch.tensor(2.0**exponent), torch.tensor(0), torch.tensor(0), torch.tensor(2**bits - 1))
    tie = torch.tensor((code + 0.5) * 2.0**exponent)
    assert int(quantize(tie, grid)) == (code if code % 2 == 0 else code + 1)


def test_division_not_multiplication_by_the_reciprocal() -> None:
    """Values near ties at which the two differ; the engines divide."""
    scale = torch.tensor(0.0123)
    x = (torch.arange(100_000) + 0.5) * scale
    assert not torch.equal(torch.round(x / scale), torch.round(x * (1 / scale)))
    grid = Grid(scale, torch.tensor(0), torch.tensor(0), torch.tensor(2**20))
    assert torch.equal(quantize(x, grid), torch.round(x / scale))


@given(st.floats(1e-20, 1e20))
def test_power_of_two_covers(scale: float) -> None:
    (found,) = power_of_two(torch.tensor([scale])).tolist()
    mantissa, _ = math.frexp(found)
    assert mantissa == 0.5
    assert float(torch.tensor(scale)) * (1 - 1e-6) <= found < 2 * float(torch.tensor(scale)) * (1 + 1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_impossible_scales_are_refused(scale: float) -> None:
    with pytest.raises(FormatError, match="positive and finite"):
        Grid(torch.tensor(scale), torch.tensor(0), torch.tensor(0), torch.tensor(255))


def _surrogate(x: Tensor, scale: Tensor, grid: Grid, residual: Tensor) -> Tensor:
    """Its true gradient is the straight-through gradient: the rounding error is a constant (section 6.1)."""
    s, zero = expand(scale, grid, x), expand(grid.zero, grid, x)
    codes = torch.clamp(x / s + residual + zero, expand(grid.lo, grid, x), expand(grid.hi, grid, x))
    return (codes - zero) * s


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize(("bits", "signed"), [(4, True), (4, False), (8, True), (2, False)])
def test_gradients_are_those_of_the_surrogate(bits: int, signed: bool, axis: int | None) -> None:
    torch.manual_seed(3)
    form = Format(bits, signed=signed, axis=axis)
    x, weight = torch.randn(3, 40), torch.randn(3, 40)
    scale = torch.tensor([0.15, 0.2, 0.3] if axis == 0 else 0.2) * 16 / 2**bits
    zero = torch.full(scale.shape, 0 if signed else 2 ** (bits - 1) - 1, dtype=torch.int32)
    ends = torch.full_like(zero, form.lo), torch.full_like(zero, form.hi)
    free, learned = x.clone().requires_grad_(), scale.clone().requires_grad_()
    (fake_quantize(free, Grid(learned, zero, *ends, axis=axis)) * weight).sum().backward()

    x, weight, scale = x.double(), weight.double(), scale.double()
    grid = Grid(scale, zero, *ends, axis=axis)
    s = expand(scale, grid, x)
    residual = torch.round(x / s) - x / s
    code = x / s + residual + expand(zero, grid, x)
    steady = (
        torch.minimum((code - form.lo).abs(), (code - form.hi).abs()) > 1e-3
    )  # on an end of the range there are two slopes
    h = 1e-6
    slope = (_surrogate(x + h, scale, grid, residual) - _surrogate(x - h, scale, grid, residual)) / (2 * h)
    assert bool((slope == 0).any() & (slope > 0.5).any()), "some values are clipped, some are not"
    assert torch.allclose(free.grad.double()[steady], (slope * weight)[steady], atol=1e-4)  # type: ignore[union-attr]
    up, down = (_surrogate(x, scale * (1 + d), grid, residual) for d in (h, -h))
    by_scale = (up - down) / (2 * h) / s * weight
    expected = torch.where(steady, by_scale, residual * weight)  # torch's clamp passes the gradient there
    expected = expected.sum() if axis is None else expected.sum(1)
    assert torch.allclose(learned.grad.double(), expected, atol=1e-3)  # type: ignore[union-attr]
