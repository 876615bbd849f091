"""Grids from statistics: the search against exhaustive search, and the promises that the engine relies on."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.affine import Grid, fake_quantize, quantize
from halfbyte.formats import Format
from halfbyte.grids import MSE, MinMax, Percentile, from_range
from halfbyte.stats import BINS, Histogram, histogram

WEIGHT = {"signed": True, "symmetric": True, "narrow": True}


def data(kind: str, n: int = 20_000) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(n, generator=generator)
    if kind == "gaussian":
        return normal
    if kind == "laplace":
        return -torch.log(torch.rand(n, generator=generator)) * normal.sign()
    if kind == "uniform":
        return torch.rand(n, generator=generator) * 2 - 0.5
    return torch.relu(normal)


def mean_error(x: Tensor, grid: Grid) -> float:
    return float((fake_quantize(x, grid) - x).double().square().mean())


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform", "relu"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activation_search_is_near_the_best_of_ten_thousand(kind: str, bits: int) -> None:
    x = data(kind, 2000)
    h, form = histogram(x), Format(bits)
    found = mean_error(x, MSE().activation(h, form))
    assert found <= mean_error(x, MinMax().activation(h, form)) * 1.01  # what 2048 bins can tell apart
    lo, hi = min(h.minimum, 0.0), max(h.maximum, 0.0)
    ends = (
        (torch.linspace(0.01, 1, 100) * lo, torch.linspace(0.01, 1, 100) * hi)
        if lo < 0
        else (torch.zeros(1), torch.linspace(1e-3, 1, 10_000) * hi)
    )
    best = min(
        least_error(x, *(e.reshape(-1, 1) for e in torch.meshgrid(a, ends[1], indexing="ij")), form)
        for a in ends[0].split(20)
    )
    assert found <= best * 1.08


def least_error(x: Tensor, lo: Tensor, hi: Tensor, form: Format) -> float:
    """The least error among the ranges [lo, hi], each [candidates, 1]."""
    scale = (hi - lo) / (form.hi - form.lo)
    zero = (form.lo - (lo / scale).round()).clamp(form.lo, form.hi)
    errors = [
        (((x / s).round() + z).clamp(form.lo, form.hi).sub(z).mul(s) - x).square().mean(1)
        for s, z in zip(scale.split(500), zero.split(500), strict=True)
    ]
    return float(torch.cat(errors).min())


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform", "relu"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_search_is_near_the_best_of_ten_thousand(kind: str, bits: int) -> None:
    w = data(kind, 1024).reshape(2, 512)
    form = Format(bits, axis=0, **WEIGHT)
    grid = MSE().weight(w, form, False)
    assert bool((mean_rows(w, grid) <= mean_rows(w, MinMax().weight(w, form, False)) * (1 + 1e-6)).all())
    scales = w.abs().amax(1) * torch.linspace(0.02, 1, 10_000)[:, None] / form.hi  # [candidates, rows]
    codes = (w / scales[:, :, None]).round().clamp(form.lo, form.hi)
    best = ((codes * scales[:, :, None] - w).square().mean(2)).amin(0)
    assert bool((mean_rows(w, grid) <= best * 1.06).all())


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform", "relu"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_search_is_within_a_thousandth_of_the_best_of_ten_thousand(kind: str, bits: int) -> None:
    """Acceptance test 1 of arXiv 1902.06822, for the rows of a parameter."""
    w = data(kind).reshape(1, -1)
    form = Format(bits, axis=0, **WEIGHT)
    found = mean_error(w, MSE().weight(w, form, False))
    assert found <= least_symmetric_error(w, form.hi) * 1.001


def least_symmetric_error(w: Tensor, hi: int) -> float:
    """Mean squared error of the best of ten thousand scales; the sums between two code limits come from running sums."""
    sizes = w.abs().flatten().double().sort().values
    sums = [torch.cat([torch.zeros(1).double(), (sizes**k).cumsum(0)]) for k in range(3)]
    scales = (float(sizes[-1]) / hi * torch.linspace(1e-4, 1, 10_000).double())[:, None]
    limits = torch.searchsorted(sizes, (torch.arange(1, hi + 1) - 0.5) * scales)
    ends = torch.cat([torch.zeros_like(limits[:, :1]), limits, torch.full_like(limits[:, :1], len(sizes))], 1)
    n, first, second = (s[ends[:, 1:]] - s[ends[:, :-1]] for s in sums)
    level = torch.arange(hi + 1) * scales
    return float((second - 2 * level * first + level.square() * n).sum(1).min()) / len(sizes)


def test_four_bits_clip_a_normal_tensor_at_two_and_a_half_deviations() -> None:
    """Acceptance test 2: 2.55 in the limit of many codes (arXiv 1810.05723), a few per cent less on fifteen of them."""
    w = data("gaussian", 100_000).reshape(1, -1)
    grid = MSE().weight(w, Format(4, axis=0, **WEIGHT), False)
    assert float(grid.maximum) == pytest.approx(2.55, rel=0.05)


def mean_rows(w: Tensor, grid: Grid) -> Tensor:
    return (fake_quantize(w, grid) - w).square().mean(1)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000), bits=st.integers(2, 8), pairs=st.booleans(), rule=st.sampled_from([MSE(), MinMax()])
)
def test_search_never_loses_and_channels_help(seed: int, bits: int, pairs: bool, rule: MSE | MinMax) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 3, 3, generator=generator) * torch.exp(torch.randn(5, 1, 1, generator=generator))
    each, one = Format(bits, axis=0, **WEIGHT), Format(bits, **WEIGHT)
    for form in (each, one):
        assert mean_error(w, MSE().weight(w, form, pairs)) <= mean_error(w, MinMax().weight(w, form, pairs)) * (
            1 + 1e-6
        )
    if not pairs and isinstance(rule, MSE):
        assert mean_error(w, rule.weight(w, each, pairs)) <= mean_error(w, rule.weight(w, one, pairs)) * (1 + 0.02)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    per_channel=st.booleans(),
    shape=st.tuples(st.integers(1, 12), st.sampled_from([1.0, 2.0, 4.0])),
    rule=st.sampled_from([MSE(), MinMax(), Percentile(0.9)]),
)
@example(seed=0, bits=8, per_channel=True, shape=(6, 1.0), rule=Percentile(0.9))
def test_narrow_products_cannot_saturate(
    seed: int, bits: int, per_channel: bool, shape: tuple[int, float], rule: MSE | MinMax | Percentile
) -> None:
    """In 16 bits 255 (a + b) fits for every two codes a, b of a row exactly if they sum to at most 128."""
    generator, (columns, tail) = torch.Generator().manual_seed(seed), shape
    normal = torch.randn(4, columns, generator=generator)
    w = normal.sign() * normal.abs() ** tail
    grid = rule.weight(w, Format(bits, axis=0 if per_channel else None, **WEIGHT), True)
    codes = quantize(w, grid)
    for signed in (codes, -codes):
        largest = signed.clamp(min=0).sort(1, descending=True).values[:, :2].sum(1)
        assert float(largest.max()) <= 128


@pytest.mark.parametrize("value", [0.37, -2.5, 0.0, 1e-4, 1e6])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rule", [MSE(), MinMax(), Percentile()])
def test_constants_are_exact(value: float, bits: int, rule: MSE | MinMax | Percentile) -> None:
    x = torch.full((100,), value)
    grid = rule.activation(histogram(x), Format(bits))
    assert torch.equal(fake_quantize(x, grid), x)
    assert float(fake_quantize(torch.zeros(()), grid)) == 0.0


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("rule", [MSE(), MinMax(), Percentile()])
def test_dead_channels_are_neutral(rule: MSE | MinMax | Percentile, pairs: bool) -> None:
    w = torch.randn(3, 8)
    w[1] = 0
    grid = rule.weight(w, Format(4, axis=0, **WEIGHT), pairs)
    alone = rule.weight(w[[0, 2]], Format(4, axis=0, **WEIGHT), pairs)
    assert float(grid.scale[1]) == 1.0
    assert torch.equal(fake_quantize(w, grid)[1], torch.zeros(8))
    assert torch.equal(fake_quantize(w, grid)[[0, 2]], fake_quantize(w[[0, 2]], alone))


@settings(deadline=None, max_examples=60)
@given(
    lo=st.floats(-1e4, 1e4),
    width=st.floats(1e-3, 1e4),
    bits=st.integers(2, 16),
    signed=st.booleans(),
    power=st.booleans(),
)
def test_a_range_is_covered_and_contains_zero(lo: float, width: float, bits: int, signed: bool, power: bool) -> None:
    form = Format(bits, signed=signed, power_of_two=power)
    grid = from_range(lo, lo + width, form)
    assert float(fake_quantize(torch.zeros(()), grid)) == 0.0
    step = float(grid.scale)
    for end in (lo, lo + width):
        assert abs(float(fake_quantize(torch.tensor(end), grid)) - end) <= step * (1 + 1e-3) + 1e-6 * abs(end)


def same(a: Histogram, b: Histogram) -> bool:
    i, j = (torch.nonzero(h.counts).flatten() for h in (a, b))
    ends = (a.width, a.minimum, a.maximum) == (b.width, b.minimum, b.maximum)
    return ends and torch.equal(i + a.first, j + b.first) and torch.equal(a.counts[i], b.counts[j])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    spreads=st.lists(st.integers(-8, 8), min_size=3, max_size=3),
    shift=st.sampled_from([0.0, 3.0, -100.0]),
)
def test_merging_is_exact_bounded_and_without_order(seed: int, spreads: list[int], shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(500, generator=generator) * 2.0**s + shift for s in spreads]
    a, b, c = (histogram(p) for p in parts)
    whole = torch.cat(parts)
    assert same(a.merged(b), b.merged(a))
    for merged in (a.merged(b).merged(c), c.merged(a).merged(b), b.merged(c.merged(a))):
        assert float(merged.counts.sum()) == whole.numel()
        assert (merged.minimum, merged.maximum) == (float(whole.min()), float(whole.max()))
        assert len(merged.counts) <= BINS
        middle = float((merged.centres * merged.counts).sum() / whole.numel())
        assert abs(middle - float(whole.double().mean())) <= merged.width


def test_histogram_does_not_grow() -> None:
    h = histogram(torch.randn(1000))
    for i in range(40):
        h = h.merged(histogram(torch.randn(1000) * 1.5**i))
    assert len(h.counts) <= BINS
    assert float(h.counts.sum()) == 41_000


def test_quantiles() -> None:
    h = histogram(torch.linspace(0, 1, 10_001))
    for q in (0.01, 0.5, 0.99):
        assert abs(h.quantile(q) - q) <= 2 * h.width
