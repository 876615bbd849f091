"""Two low-bit tensors for one: against exhaustive search, monotone, never worse than the greedy pair."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.affine import fake_quantize
from halfbyte.dual import Dual, dual, dual_ranges
from halfbyte.errors import FormatError
from halfbyte.formats import Format
from halfbyte.grids import MSE
from halfbyte.stats import histogram

WEIGHT = {"signed": True, "symmetric": True, "narrow": True}


def normal(seed: int, *shape: int, tail: float = 1.0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.sign() * x.abs() ** tail


def fitted(w: Tensor, bits: int, power: Tensor | None = None, fixed: bool = False) -> tuple[Dual, Tensor, Tensor]:
    """The pair, the squared error of each row with one tensor, and with the greedy pair."""
    form = Format(bits, axis=0, **WEIGHT)
    p = torch.ones_like(w) if power is None else power
    grid = MSE().weight(w, form, False, power)
    left = w - fake_quantize(w, grid)
    rest = left - fake_quantize(left, MSE().weight(left, form, False, power))
    found = dual(w, form, grid.scale, power=power, fixed=fixed)
    return found, (left.square() * p).sum(1), (rest.square() * p).sum(1)


def error(w: Tensor, d: Dual, power: Tensor | None = None) -> Tensor:
    square = (w.double() - d.parts[0].double() - d.parts[1].double()).square()
    return (square if power is None else square * power).sum(1)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 5),
    columns=st.sampled_from([1, 2, 9, 64]),
    tail=st.sampled_from([1.0, 2.0]),
    weighted=st.booleans(),
    fixed=st.booleans(),
)
def test_alternation_is_monotone_and_beats_the_greedy_pair(
    seed: int, bits: int, columns: int, tail: float, weighted: bool, fixed: bool
) -> None:
    w = normal(seed, 6, columns, tail=tail)
    power = normal(seed + 1, 6, columns).square() if weighted else None
    found, single, greedy = fitted(w, bits, power, fixed)
    assert bool((found.errors[1:] <= found.errors[:-1]).all())
    assert torch.allclose(found.errors[-1], error(w, found, power), rtol=1e-3, atol=1e-9)
    assert bool((found.errors[-1] <= greedy * (1 + 1e-4) + 1e-9).all())
    assert bool((found.errors[-1] <= single + 1e-9).all())
    for codes in (found.first_codes, found.second_codes):
        assert torch.equal(codes, codes.round())
        assert float(codes.abs().max()) <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_a_second_tensor_lowers_the_error_strictly(bits: int) -> None:
    found, single, _ = fitted(normal(3, 8, 256), bits)
    # twice the bits are worth six decibels each; half of that is the least to be expected
    assert bool((found.errors[-1] < single * 2.0**-bits).all())


def test_near_the_best_of_all_pairs_of_scales() -> None:
    """Of three levels each: all scales on a fine net, each with the nearest of the nine sums."""
    w = normal(7, 1, 40)
    found, _, _ = fitted(w, 2)
    net = torch.linspace(0.02, 3.0, 300)
    a, b = torch.meshgrid(net, net, indexing="ij")
    sums = torch.stack([a * i + b * j for i, j in itertools.product((-1, 0, 1), repeat=2)], -1)
    own = torch.stack([found.first * i + found.second * j for i, j in itertools.product((-1, 0, 1), repeat=2)], 1)
    assert float(found.errors[-1]) == pytest.approx(brute(w[0], own), rel=1e-4)  # each value has its nearest sum
    assert float(found.errors[-1]) <= brute(w[0], sums.flatten(0, 1)) * 1.1


def brute(w: Tensor, sums: Tensor) -> float:
    """Least squared error of ``w`` on any of the sets of sums, [candidates, sums]."""
    return min(float((w[:, None, None] - s).abs().amin(2).square().sum(0).min()) for s in sums.split(500))


def test_what_two_tensors_can_say_exactly_is_found() -> None:
    codes = torch.randint(-7, 8, (2, 3, 400), generator=torch.Generator().manual_seed(0)).float()
    scales = torch.tensor([[1.0, 0.5, 2.0], [1 / 15, 0.03, 0.13]])
    w = (codes * scales[:, :, None]).sum(0)
    found, single, _ = fitted(w, 4)
    assert bool((found.errors[-1] < 5e-3 * single).all())


def test_nearest_rounding_of_what_the_second_leaves_is_the_first() -> None:
    """The graph stores ``w - alpha_2 q_2``; quantizing it has to give ``alpha_1 q_1`` back."""
    w = normal(11, 16, 144)
    found, _, _ = fitted(w, 4)
    again = ((w - found.parts[1]) / found.first[:, None]).round().clamp(-7, 7) * found.first[:, None]
    total = (w - again - found.parts[1]).double().square().sum(1)
    assert torch.allclose(total, found.errors[-1], rtol=1e-4)


def test_zero_and_constant_rows_stay_finite() -> None:
    w = torch.stack([torch.zeros(9), torch.full((9,), 0.3), torch.eye(3).flatten()])
    found, _, _ = fitted(w, 4)
    assert bool(torch.isfinite(found.first).all() and torch.isfinite(found.second).all())
    assert bool((found.first > 0).all() and (found.second > 0).all())
    assert float(error(w, found).max()) < 1e-6


@pytest.mark.parametrize(
    "form", [Format(8, **WEIGHT), Format(4), Format(4, signed=True, symmetric=True), Format(4, signed=True)]
)
def test_formats_without_symmetric_codes_are_refused(form: Format) -> None:
    with pytest.raises(FormatError, match="symmetric narrow format of at most 7 bits"):
        dual(torch.randn(2, 8), form, torch.ones(2))


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_value_in_two_parts(kind: str, bits: int) -> None:
    x = normal(5, 20_000, tail=2.0 if kind == "heavy" else 1.0)
    x = x.relu() if kind == "relu" else x
    h, form = histogram(x), Format(bits)
    first, second = dual_ranges(h, form)
    once = fake_quantize(x, first)
    twice = once + fake_quantize(x - once, second)
    one = (fake_quantize(x, MSE().activation(h, form)) - x).square().mean()
    assert float((twice - x).square().mean()) < float(one) * 2.0**-bits
    assert float(fake_quantize(torch.zeros(()), second)) == 0.0
