"""AdaQuant: never worse than its start on held-out samples, always on its grid, and within what the engine asks of a scale."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.affine import Grid, fake_quantize, power_of_two, quantize
from halfbyte.formats import Format
from halfbyte.grids import MSE, from_range
from halfbyte.local import Problem
from halfbyte.methods.adaquant import AdaQuant, Calibrated, format_of
from halfbyte.reconstruct import reconstruct
from test_adaround import LAYERS, asymmetric, calibrated, linear, problem_of, problem_of_kind

QUICK = AdaQuant(iterations=40)


def start_loss(p: Problem) -> float:
    return p.loss(fake_quantize(p.weight, p.grid), p.bias)


def with_raw_inputs(p: Problem, bits: int = 4, bound: float = 12.0) -> Problem:
    """The problem on inputs of few bits, whose range is far too wide."""
    grid = from_range(-bound, bound, Format(bits))
    return replace(p, raw_inputs=p.inputs, inputs=[fake_quantize(x, grid) for x in p.inputs], input_grid=grid)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("change", [lambda p: p, asymmetric])
def test_the_best_iterate_is_on_the_grid_and_no_worse_than_the_start(kind: str, change) -> None:
    p = change(problem_of_kind(kind))
    found = QUICK.solve(p)
    bias = p.bias if found.bias is None else found.bias
    assert p.loss(found.weight, bias) <= start_loss(p)
    assert torch.equal(fake_quantize(found.weight, found.grid), found.weight)
    assert found.grid.zero.dtype == torch.int32 and not found.grid.scale.requires_grad
    assert (found.bias is None) == (p.bias is None) and found.input_grid is None
    if p.form.symmetric:
        assert not found.grid.zero.any()


def test_it_learns() -> None:
    p = linear()
    p = replace(
        p, grid=replace(p.grid, scale=1.5 * p.grid.scale)
    )  # the least squared error would leave little to learn
    found = AdaQuant(iterations=300).solve(p)
    assert found.bias is not None
    assert p.loss(found.weight, found.bias) < 0.9 * start_loss(p)
    assert not torch.equal(found.grid.scale, p.grid.scale) and not torch.equal(found.bias, p.bias)
    assert "weights, bias and ranges" in found.note


def test_weights_may_move_by_more_than_one_code() -> None:
    p = linear()
    p = replace(p, targets=[y * 0.6 for y in p.targets], held_out=replace(p.held_out, outputs=p.held_out.outputs * 0.6))
    found = AdaQuant(iterations=200, weight_rate=1e-2, range_rate=0.0).solve(p)
    assert torch.equal(found.grid.scale, p.grid.scale)
    assert (quantize(found.weight, p.grid) - quantize(p.weight, p.grid)).abs().max() > 1


def test_steps_that_are_too_long_fall_back_to_the_start() -> None:
    p = linear()
    exact = fake_quantize(p.weight, p.grid)
    x = p.held_out.inputs
    held = replace(p.held_out, outputs=x @ exact.t() + (0 if p.bias is None else p.bias))
    found = AdaQuant(iterations=20, weight_rate=1.0, range_rate=1.0).solve(replace(p, held_out=held))
    assert torch.equal(found.weight, exact) and torch.equal(found.grid.scale, p.grid.scale)


def test_the_grid_of_the_input_is_learned() -> None:
    p = with_raw_inputs(problem_of(nn.Conv2d(4, 6, 3, padding=1)))
    p = replace(p, raw_inputs=[x / 4 + 0.2 for x in p.inputs])
    assert p.raw_inputs is not None
    p = replace(p, targets=[p.apply(x, p.weight, p.bias) for x in p.raw_inputs])
    found = AdaQuant(iterations=200).solve(p)
    assert found.input_grid is not None and p.input_grid is not None

    def error(weight, bias, grid: Grid) -> float:
        pairs = zip(p.raw_inputs or (), p.targets, strict=True)
        return sum(float((p.apply(fake_quantize(x, grid), weight, bias) - y).square().sum()) for x, y in pairs)

    before = error(fake_quantize(p.weight, p.grid), p.bias, p.input_grid)
    assert error(found.weight, found.bias, found.input_grid) < 0.6 * before
    assert 0.5 * p.input_grid.scale <= found.input_grid.scale < p.input_grid.scale
    assert found.input_grid.zero.dtype == torch.int32


def test_the_format_of_an_input_as_its_grid_tells_it() -> None:
    assert not format_of(from_range(-1.0, 2.0, Format(8))).symmetric
    assert format_of(from_range(0.0, 2.0, Format(8))).symmetric  # values of one sign: the zero-point stays
    assert format_of(from_range(-2.0, 2.0, Format(8, signed=True, symmetric=True))).symmetric
    assert format_of(from_range(-1.0, 2.0, Format(8, power_of_two=True))).power_of_two
    assert format_of(from_range(-1.0, 2.1, Format(4))).bits == 4


def test_scales_stay_powers_of_two() -> None:
    p = linear()
    form = replace(p.form, power_of_two=True)
    found = QUICK.solve(replace(p, form=form, grid=MSE().weight(p.weight, form, False)))
    assert torch.equal(power_of_two(found.grid.scale), found.grid.scale)


def test_the_floor_of_a_grouped_transposed_layer_holds_for_all_its_outputs() -> None:
    p = problem_of_kind("grouped transposed")
    found = QUICK.solve(replace(p, floor=torch.linspace(0.01, 0.2, 6)))
    assert found.grid.scale.shape == p.grid.scale.shape and bool((found.grid.scale >= 0.2).all())


def test_groups_of_weights_have_their_own_scales() -> None:
    p = linear(8, 6)
    form = replace(p.form, group=4)
    p = replace(p, form=form, grid=MSE().weight(p.weight, form, False), floor=torch.full((6,), 1e-9))
    found = QUICK.solve(p)
    assert found.grid.scale.shape == (6, 2) and torch.equal(fake_quantize(found.weight, found.grid), found.weight)


@pytest.mark.parametrize("raw", [False, True])
def test_no_scale_falls_below_the_floor(raw: bool) -> None:
    p = linear()
    floor = p.grid.scale * 1.5
    found = QUICK.solve(replace(with_raw_inputs(p) if raw else p, floor=floor))
    assert bool((found.grid.scale >= floor).all())
    if raw and found.input_grid is not None and p.input_grid is not None:  # the product is what the bias is stored in
        assert bool((found.grid.scale * found.input_grid.scale >= floor * from_range(-12, 12, Format(4)).scale).all())


def test_pairs_of_eight_bit_codes_stay_as_they_are() -> None:
    p = linear()
    form = replace(p.form, bits=8)
    p = replace(p, form=form, grid=MSE().weight(p.weight, form, True), pairs=True)
    p = replace(p, targets=[y + 0.5 for y in p.targets], held_out=replace(p.held_out, outputs=p.held_out.outputs + 0.5))
    found = AdaQuant(iterations=100, bias_rate=1e-2).solve(p)
    assert torch.equal(found.weight, fake_quantize(p.weight, p.grid)) and torch.equal(found.grid.scale, p.grid.scale)
    assert found.bias is not None and p.bias is not None and bool((found.bias - p.bias > 0.1).all())
    assert "bias only" in found.note
    alone = QUICK.solve(replace(p, bias=None))  # nothing left to learn
    assert alone.bias is None and torch.equal(alone.weight, found.weight)


def test_the_same_seed_gives_the_same_bits() -> None:
    p = with_raw_inputs(linear())
    first, second = QUICK.solve(p), QUICK.solve(p)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.grid.scale, second.grid.scale)
    assert first.bias is not None and second.bias is not None and torch.equal(first.bias, second.bias)


def test_a_dead_channel_stays_dead() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.data[2] = 0
    p = problem_of(layer)
    found = AdaQuant(iterations=40, weight_rate=1.0).solve(replace(p, targets=[y + 1 for y in p.targets]))
    assert not found.weight[2].any() and found.weight[1].any()
    grid = Grid(torch.ones(2), *(torch.full((2,), i, dtype=torch.int32) for i in (0, -7, 7)), axis=0)
    method, form = Calibrated(moves=True, ranges=False), Format(4, signed=True, symmetric=True, axis=0)
    moved = method.hard({"offset": torch.full((2, 3), 9.0)}, torch.tensor([[0.0] * 3, [1.0, 2.0, 3.0]]), form, grid)[0]
    assert not moved[0].any() and bool((moved[1] == 7).all())


def test_broken_inputs_end_the_fit() -> None:
    p = linear()
    found = QUICK.solve(replace(p, inputs=[x * float("nan") for x in p.inputs]))
    assert torch.equal(found.weight, fake_quantize(p.weight, p.grid))


def test_a_network_gets_better() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    m, data = calibrated(net, (4, 8, 8))
    done = reconstruct(m, data, AdaQuant(iterations=100))
    x = data[0][0]
    want = net(x).detach()

    def error(q: hb.QModel) -> float:
        return float((hb.run(q, (x,), hb.simulate(q))[0] - want).square().mean())

    assert error(done) < 0.8 * error(m)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations of adaquant is 0"),
        ({"batch": 0}, "batch of adaquant is 0"),
        ({"weight_rate": -1e-3}, "weight rate of adaquant is -0.001"),
        ({"bias_rate": 2.0}, "bias rate of adaquant is 2.0"),
        ({"input_range_rate": float("nan")}, "input range rate of adaquant is nan"),
    ],
)
def test_an_option_out_of_range_is_named(options, message: str) -> None:
    with pytest.raises(hb.UsageError, match=message):
        AdaQuant(**options)
