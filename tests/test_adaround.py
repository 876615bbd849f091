"""AdaRound: where it starts, where it ends, and that it finds the roundings that an exhaustive search finds."""

import functools
import itertools
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.affine import Grid, expand, fake_quantize, quantize
from halfbyte.formats import Format
from halfbyte.grids import MSE
from halfbyte.local import Problem, Solution
from halfbyte.methods.adaround import AdaRound, UpOrDown, annealed, rectified
from halfbyte.reconstruct import reconstruct
from halfbyte.targets import GENERIC

QUICK = AdaRound(iterations=60, rate=0.1)
LAYERS = {
    "dense": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
    "no bias": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "tokens": lambda: nn.Linear(8, 5),
}


@dataclass(frozen=True)
class Recorder:
    """Rounds to nearest and remembers what it was asked."""

    problems: list[Problem] = field(default_factory=list)
    residual: bool = False
    unrounded: bool = False
    iterations: int = 0
    name: Literal["recorder"] = "recorder"

    def solve(self, p: Problem) -> Solution:
        self.problems.append(p)
        return Solution(fake_quantize(p.weight, p.grid), p.grid, None)


def calibrated(net: nn.Module, shape: tuple[int, ...], samples: int = 64) -> tuple[hb.QModel, list[tuple[Tensor, ...]]]:
    """A network with grids, and correlated data in batches of sixteen."""
    g = torch.Generator().manual_seed(5)
    channels = shape[0] if len(shape) == 3 else shape[-1]
    mix, data = torch.randn(channels, channels, generator=g), []
    for _ in range(samples // 16):
        x = torch.randn(16, *shape, generator=g)
        x = (x + x.roll(1, -1) + x.roll(1, -2)).movedim(1, -1) @ mix if len(shape) == 3 else x @ mix
        data.append((x.movedim(-1, 1).contiguous() if len(shape) == 3 else x,))
    m = hb.place(hb.fold_batchnorm(hb.capture(net.eval(), data[0][0][:2])), GENERIC, weight_bits=4)
    return hb.calibrate(m, data, correct=False), data


def problem_of(layer: nn.Module, shape: tuple[int, ...] = (4, 8, 8), samples: int = 64, relu: bool = False) -> Problem:
    """The problem of a network's only layer."""
    m, data = calibrated(nn.Sequential(layer, nn.ReLU()) if relu else nn.Sequential(layer), shape, samples)
    recorder = Recorder()
    reconstruct(m, data, recorder)
    return recorder.problems[0]


@functools.cache
def problem_of_kind(kind: str) -> Problem:
    torch.manual_seed(1)
    return problem_of(LAYERS[kind](), (3, 8) if kind == "tokens" else (4, 8, 8), relu=kind == "dense")


@functools.cache
def linear(inputs: int = 8, outputs: int = 6, seed: int = 0, samples: int = 128) -> Problem:
    torch.manual_seed(seed)
    return problem_of(nn.Linear(inputs, outputs), (inputs,), samples)


def asymmetric(p: Problem) -> Problem:
    """The same problem on an asymmetric grid."""
    form = Format(4, axis=p.form.axis)
    return replace(p, form=form, grid=MSE().weight(p.weight, form, False))


def fitting_error(p: Problem, weight: Tensor) -> Tensor:
    """Squared error on the samples to fit, [outputs], of a linear layer."""
    x, y = torch.cat(list(p.inputs)), torch.cat(list(p.targets))
    return (p.apply(x, weight, p.bias) - y).square().mean(0)


def neighbours(w: Tensor, g: Grid) -> tuple[Tensor, Tensor]:
    """The codes below and above each weight, within the limits."""
    real = w / expand(g.scale, g, w)
    lo, hi, zero = (expand(t, g, w).float() for t in (g.lo, g.hi, g.zero))
    return torch.clamp(real.floor() + zero, lo, hi), torch.clamp(real.ceil() + zero, lo, hi)


@pytest.mark.parametrize("change", [lambda p: p, asymmetric])
def test_the_start_is_the_float_weight(change) -> None:
    p = change(linear())
    method = UpOrDown()
    soft = method.soft(method.init(p.weight, p.form, p.grid), p.weight, p.form, p.grid)
    inside = (p.weight >= expand(p.grid.minimum, p.grid, p.weight)) & (
        p.weight <= expand(p.grid.maximum, p.grid, p.weight)
    )
    assert inside.sum() > 0.7 * inside.numel()
    torch.testing.assert_close(soft[inside], p.weight[inside], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("change", [lambda p: p, asymmetric])
def test_every_code_is_below_or_above_its_weight(kind: str, change) -> None:
    p = change(problem_of_kind(kind))
    found = QUICK.solve(p)
    below, above = neighbours(p.weight, p.grid)
    codes = quantize(found.weight, found.grid)
    assert bool(((codes == below) | (codes == above)).all())
    assert torch.equal(fake_quantize(found.weight, found.grid), found.weight)
    assert found.bias is None and torch.equal(found.grid.scale, p.grid.scale)
    assert bool((codes != quantize(p.weight, p.grid)).any())  # it did something


def test_brute_force_does_hardly_better() -> None:
    p, g = linear(8, 48), torch.Generator().manual_seed(0)
    x = (torch.randn(128, 8, generator=g) + 0.5 * torch.randn(128, 1, generator=g)).relu()  # activations have a mean
    p = replace(p, inputs=[x], targets=[p.apply(x, p.weight, p.bias)])
    found = fitting_error(p, AdaRound(iterations=1500).solve(p).weight)
    below, above = neighbours(p.weight, p.grid)
    best, nearest = torch.full_like(found, float("inf")), fitting_error(p, fake_quantize(p.weight, p.grid))
    scale = expand(p.grid.scale, p.grid, p.weight)
    for choice in itertools.product((False, True), repeat=8):
        best = torch.minimum(best, fitting_error(p, torch.where(torch.tensor(choice), above, below) * scale))
    assert (nearest / best).mean() > 1.2
    assert (found / best).mean() < 1.05


def test_uncorrelated_inputs_give_nearest_rounding() -> None:
    p = linear(8, 32)
    x = torch.diag(torch.linspace(5, 10, 8))
    p = replace(p, inputs=[x], targets=[p.apply(x, p.weight, p.bias)])
    found = AdaRound(iterations=600, batch=8, rate=2e-2).solve(p)
    assert torch.equal(found.weight, fake_quantize(p.weight, p.grid))


def test_the_same_seed_gives_the_same_codes() -> None:
    p = linear()
    first, second, other = QUICK.solve(p), QUICK.solve(p), QUICK.solve(replace(p, seed=1))
    assert torch.equal(first.weight, second.weight) and first.note == second.note
    assert first.note != other.note or not torch.equal(first.weight, other.weight)


def test_the_note_says_how_many_are_decided() -> None:
    p = linear()
    assert "too few" in AdaRound(iterations=10).solve(p).note
    assert AdaRound(iterations=400, rate=0.1, regularization=0.1).solve(p).note == "100.00% of the roundings decided"


def test_a_dead_channel_stays_dead() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.data[2] = 0
    p = problem_of(layer)
    p = replace(p, targets=[y + 1 for y in p.targets])  # an error that only a weight could make up for
    found = QUICK.solve(p)
    assert not found.weight[2].any() and found.weight[1].any()


def test_weights_on_codes_and_beyond_the_limits_have_no_choice() -> None:
    grid = Grid(torch.tensor(0.5), *(torch.tensor(i, dtype=torch.int32) for i in (0, -7, 7)))
    x, form = torch.tensor([1.0, 0.0, 9.0, -9.0, 0.25]), Format(4, signed=True, symmetric=True)
    method = UpOrDown()
    leaves = method.init(x, form, grid)
    up = {"v": leaves["v"] + 10}
    expected = torch.tensor([1.0, 0.0, 3.5, -3.5, 0.5])
    assert torch.equal(method.hard(up, x, form, grid)[0], expected)
    assert torch.equal(method.soft(up, x, form, grid), expected)


def test_pairs_of_eight_bit_codes_stay_harmless() -> None:
    torch.manual_seed(0)
    p = linear(16, 64)
    form = replace(p.form, bits=8)
    p = replace(p, form=form, grid=MSE().weight(p.weight, form, True), pairs=True)
    codes = quantize(QUICK.solve(p).weight, p.grid)
    for sign in (codes, -codes):
        assert sign.clamp(min=0).topk(2, 1).values.sum(1).max() * 255 < 1 << 15


def test_a_network_gets_better_on_held_out_samples() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    m, data = calibrated(net, (4, 8, 8))
    done = reconstruct(m, data, AdaRound(iterations=200, rate=5e-2))
    x = data[0][0]
    want = net(x).detach()

    def error(q: hb.QModel) -> float:
        return float((hb.run(q, (x,), hb.simulate(q))[0] - want).square().mean())

    assert error(done) < 0.8 * error(m)
    assert sum("adaround" in entry.message for entry in done.log) == 3


def test_the_schedule() -> None:
    assert annealed((20, 2), 0.2, 0.2) == 20 and annealed((20, 2), 0.2, 0.6) == pytest.approx(11)
    assert annealed((20, 2), 0.2, 1.0) == pytest.approx(2)
    method, v = UpOrDown(), torch.tensor([0.0, 9.0])
    assert method.penalty({"v": v}, Format(4), 0.1) == 0
    assert method.penalty({"v": v}, Format(4), 0.5) == pytest.approx(0.01)
    assert torch.equal(rectified(torch.tensor([-9.0, 0.0, 9.0])), torch.tensor([0.0, 0.5, 1.0]))
    assert AdaRound().steps == 1e-2 and AdaRound(iterations=20_000).steps == 1e-3 and AdaRound(rate=0.5).steps == 0.5


def test_progress_comes_to_its_end() -> None:
    ticks: list[tuple[int, int]] = []
    QUICK.solve(replace(linear(), progress=lambda done, total: ticks.append((done, total))))
    assert ticks[-1] == (60, 60) and len(ticks) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations of adaround is 0"),
        ({"batch": -3}, "batch of adaround is -3"),
        ({"rate": 0.0}, "rate of adaround is 0"),
        ({"regularization": -0.5}, "regularization of adaround is -0.5"),
        ({"beta": (2.0, 20.0)}, "first beta of adaround is 2.0"),
        ({"warm_start": 1.0}, "warm start of adaround is 1.0"),
    ],
)
def test_an_option_out_of_range_is_named(options, message: str) -> None:
    with pytest.raises(hb.UsageError, match=message):
        AdaRound(**options)
