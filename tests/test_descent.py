"""Descent over the integers against exhaustive search, on every kind of grid, and with data that say little."""

import functools
import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.affine import Grid, expand, fake_quantize, quantize
from halfbyte.corrections import Choosing, Correction, Judge, choose, corrected, damped, gained, mean_bias, observed
from halfbyte.descent import Descent
from halfbyte.formats import Format
from halfbyte.graph import bias_of, layers, weight_of
from halfbyte.grids import MSE
from halfbyte.local import Problem, Solution
from halfbyte.second_moments import Accumulator, Patches, SecondMoments, gathered, sampled_patches

NARROW = Format(3, signed=True, symmetric=True, narrow=True, axis=0)
DAMPING = 0.01
# One start, no other scale: what is left is the choice of the codes.
FIXED = Descent(damping=(DAMPING,), scales=(1.0,), rounds=0, sweeps=20)
SURE = Descent()


def correlated(rows: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Samples whose channels and neighbours go together."""
    g = torch.Generator().manual_seed(seed)
    channels = shape[0] if len(shape) > 1 else shape[-1]
    mix = torch.eye(channels) + 0.7 * torch.randn(channels, channels, generator=g)
    x = torch.randn(rows, *shape, generator=g)
    if len(shape) == 1:
        return x @ mix + 0.5
    x = (x + x.roll(1, -1)).movedim(1, -1) @ mix
    return x.movedim(-1, 1).contiguous() + 0.5


def problem(
    net: nn.Module, x: Tensor, form: Format, x_hat: Tensor | None = None, held: Tensor | None = None
) -> Problem:
    """The problem of a single layer; x_hat: what it reads in the place of x."""
    m = hb.capture(net.eval(), x[:2])
    (layer,) = layers(m.graph)
    node, bias = weight_of(layer), bias_of(layer)
    assert node is not None
    weight, b = m.params[str(node.target)], None if bias is None else m.params[str(bias.target)]
    rest = x if held is None else held
    y = hb.run(m, (rest,))[0]
    read = x if x_hat is None else x_hat
    decide = sampled_patches(layer, read if held is None else held, y, 4096, torch.Generator().manual_seed(1))
    return Problem(layer, weight, b, form, MSE().weight(weight, form, False), [read], [hb.run(m, (x,))[0]], decide)


@functools.cache
def dense(inputs: int, seed: int, bias: bool = True, form: Format = NARROW) -> Problem:
    torch.manual_seed(seed)
    return problem(nn.Linear(inputs, 4, bias=bias), correlated(400, (inputs,), seed), form)


def gram_of(p: Problem) -> Tensor:
    """The matrix of the local loss as a solver with one damping sees it, [inputs, inputs] in float64."""
    return damped(moments_of(p).gram, DAMPING)[0].double()


def moments_of(p: Problem) -> SecondMoments:
    sums = Accumulator()
    for patches in gathered(p.layer, p.inputs, p.targets, 1 << 30, p.generator()):
        sums.add(patches)
    return sums.moments(centred=p.bias is not None)


def loss(gram: Tensor, off: Tensor) -> Tensor:
    """[outputs]: the quadratic form of each row."""
    return ((off @ gram) * off).sum(-1)


def least(gram: Tensor, target: Tensor, scale: Tensor, choices: list[list[int]]) -> float:
    """Of one output, the least loss over all codes."""
    codes = torch.tensor(list(itertools.product(*choices)), dtype=torch.float64)
    return float(loss(gram, codes * scale - target).min())


@pytest.mark.parametrize("bias", [True, False])
def test_free_codes_are_near_the_best_of_all(bias: bool) -> None:
    found_sum, best_sum = 0.0, 0.0
    for seed in range(12):
        p = dense(5, seed, bias)
        gram, target = gram_of(p), p.weight.double()
        found = FIXED.solve(p)
        scale = found.grid.scale.double()
        nearest = loss(gram, fake_quantize(p.weight, found.grid).double() - target)
        reached = loss(gram, found.weight.double() - target)
        assert bool((reached <= nearest * 1.0001 + 1e-12).all())
        for row in range(4):
            best = least(gram, target[row], scale[row], [list(range(-3, 4))] * 5)
            assert float(reached[row]) >= best * 0.999
            found_sum, best_sum = found_sum + float(reached[row]), best_sum + best
    assert found_sum < 1.07 * best_sum


def test_neighbouring_codes_are_near_the_best_of_all() -> None:
    form, found_sum, best_sum = replace(NARROW, bits=4), 0.0, 0.0
    for seed in range(12):
        p = dense(9, seed, form=form)
        gram, target = gram_of(p), p.weight.double()
        found = replace(FIXED, rounding="adjacent").solve(p)
        scale = found.grid.scale.double()
        reached = loss(gram, found.weight.double() - target)
        assert bool((reached <= loss(gram, fake_quantize(p.weight, found.grid).double() - target) * 1.0001).all())
        for row in range(4):
            down = torch.floor(target[row] / scale[row])
            choices = [sorted({int(max(-7, min(7, c))) for c in (d, d + 1)}) for d in down]
            best = least(gram, target[row], scale[row], choices)
            assert float(reached[row]) >= best * 0.999
            found_sum, best_sum = found_sum + float(reached[row]), best_sum + best
    assert found_sum < 1.2 * best_sum  # strongly correlated inputs; 1.155 was measured


def hadamard(size: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def test_without_correlation_it_is_nearest_rounding() -> None:
    x = hadamard(32)[:, 1:11] * 2.0 ** torch.arange(-3, 7)  # columns of zero mean that are orthogonal exactly
    torch.manual_seed(0)
    for bias in (True, False):
        p = problem(nn.Linear(10, 6, bias=bias), x, NARROW)
        for rounding in ("free", "adjacent"):
            found = replace(FIXED, rounding=rounding).solve(p)  # type: ignore[arg-type]
            assert torch.equal(found.weight, fake_quantize(p.weight, found.grid))


@pytest.mark.parametrize("rows", [(0.9, 1.0), (1.0,)])
def test_adjacent_codes_are_floor_or_ceil(rows: tuple[float, ...]) -> None:
    p = dense(10, 7, form=replace(NARROW, bits=4))
    found = Descent(damping=(DAMPING,), scales=rows, rounds=0, rounding="adjacent").solve(p)
    real = corrected(moments_of(p), p.weight[None], DAMPING)[0] / found.grid.scale[:, None]
    codes = quantize(found.weight, found.grid)
    low, high = (f(real).clamp(-7, 7) for f in (torch.floor, torch.ceil))
    assert bool(((codes == low) | (codes == high)).all())
    assert not torch.equal(codes, quantize(p.weight, found.grid))


def test_scales_and_more_starts_lower_the_loss() -> None:
    """Also where the input is exact, so that W* = W whatever the damping: the correlations still count."""
    better = []
    for seed in range(6):
        p = dense(24, seed, form=Format(3, signed=True, symmetric=True, narrow=True, axis=None))
        fixed, free = FIXED.solve(p), Descent().solve(p)
        better.append(p.loss(free.weight, free.bias) / p.loss(fixed.weight, fixed.bias))
        nearest = p.loss(fake_quantize(p.weight, p.grid), p.bias)
        assert p.loss(free.weight, free.bias) < 0.7 * nearest
    assert sum(better) / len(better) < 1.0


FORMS = {
    "per channel": Format(4, signed=True, symmetric=True, narrow=True, axis=0),
    "all codes": Format(3, signed=True, symmetric=True, axis=0),
    "per tensor": Format(4, signed=True, symmetric=True, narrow=True),
    "per group": Format(3, signed=True, symmetric=True, narrow=True, axis=0, group=8),
    "group of its own": Format(3, signed=True, symmetric=True, axis=0, group=1),
    "asymmetric": Format(3, signed=False, symmetric=False, axis=0),
    "asymmetric per tensor": Format(4, signed=False, symmetric=False),
    "asymmetric per group": Format(2, signed=False, symmetric=False, axis=0, group=5),
    "two bits": Format(2, signed=True, symmetric=True, narrow=True, axis=0),
    "powers of two": Format(4, signed=True, symmetric=True, axis=0, power_of_two=True),
    "powers of two per tensor": Format(3, signed=True, symmetric=True, power_of_two=True),
    "asymmetric powers of two": Format(3, signed=False, axis=0, power_of_two=True),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(20, 6), (20,)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5)),
    "transposed depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, groups=4), (4, 5, 5)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
    "transposed grouped, as wide": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=2), (4, 5, 5)),
}


@functools.cache
def of_layer(kind: str) -> Problem:
    make, shape = LAYERS[kind]
    torch.manual_seed(2)
    return problem(make(), correlated(64, shape, 5), NARROW)


def in_form(p: Problem, form: Format) -> Problem:
    return replace(p, form=form, grid=MSE().weight(p.weight, form, False))


def assert_on_grid(found: Solution, form: Format) -> None:
    """Exactly on the grid, within its limits and those of the format; no number is NaN."""
    grid, w = found.grid, found.weight
    assert torch.isfinite(w).all()
    assert found.bias is None or torch.isfinite(found.bias).all()
    assert torch.equal(fake_quantize(w, grid), w)
    codes = torch.round(w / expand(grid.scale, grid, w)) + expand(grid.zero, grid, w)
    assert bool((codes >= expand(grid.lo, grid, w)).all() and (codes <= expand(grid.hi, grid, w)).all())
    assert int(grid.lo.min()) >= form.lo
    assert int(grid.hi.max()) <= form.hi
    assert (grid.axis, grid.group) == (form.axis, form.group)
    if form.power_of_two:
        assert bool((torch.frexp(grid.scale).mantissa == 0.5).all())
    if form.symmetric:
        assert not grid.zero.any()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_weights_lie_on_their_grids(name: str, kind: str) -> None:
    p = in_form(of_layer(kind), FORMS[name])
    found = SURE.solve(p)
    assert_on_grid(found, p.form)
    assert found.grid.scale.shape == p.grid.scale.shape
    before, after = p.loss(fake_quantize(p.weight, p.grid), p.bias), p.loss(found.weight, found.bias)
    assert after < 0.8 * before or before < 1e-9  # with a scale for each weight there is no error


@pytest.mark.parametrize("rounding", ["free", "adjacent"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str, rounding: str) -> None:
    p = of_layer(kind)
    axis = 1 if kind == "transposed" else 0
    losses = []
    spread = kind.startswith("transposed grouped")  # outputs lie in every group of inputs: no axis is theirs
    for form in (replace(NARROW, axis=None if spread else axis), replace(NARROW, axis=None)):
        q = in_form(p, form)
        found = replace(SURE, rounding=rounding).solve(q)  # type: ignore[arg-type]
        assert_on_grid(found, form)
        assert found.weight.shape == p.weight.shape
        assert found.grid.scale.shape == q.grid.scale.shape
        losses.append(q.loss(found.weight, found.bias))
        assert losses[-1] < q.loss(fake_quantize(q.weight, q.grid), q.bias)
    assert losses[0] < 1.25 * losses[1]  # a scale for each channel: hardly worse than one for all, in a local optimum


def test_scales_stay_above_what_the_bias_needs() -> None:
    p = dense(10, 3)
    floor = torch.tensor([0.0, 0.5, 0.01, 2.0])
    found = Descent().solve(replace(p, floor=floor))
    assert bool((found.grid.scale >= floor).all())
    assert_on_grid(found, p.form)
    whole = replace(NARROW, axis=None)
    found = Descent().solve(replace(in_form(p, whole), floor=torch.tensor(0.5)))
    assert float(found.grid.scale) >= 0.5


def test_pairs_of_eight_bit_codes_stay_harmless() -> None:
    form = Format(8, signed=True, symmetric=True, narrow=True, axis=0)
    p = replace(dense(10, 3, form=form), pairs=True)
    found = Descent().solve(p)
    assert_on_grid(found, form)
    codes = quantize(found.weight, found.grid)
    for signed in (codes, -codes):
        assert float(signed.topk(2, 1).values.clamp(min=0).sum(1).max()) <= 128


def moments(x: Tensor, y: Tensor) -> SecondMoments:
    sums = Accumulator()
    sums.add(Patches(x[None], y[None]))
    return sums.moments(centred=True)


def test_without_error_the_target_is_the_weight() -> None:
    torch.manual_seed(0)
    x, w = correlated(500, (12,), 1), torch.randn(1, 5, 12)
    for damping in (1e-4, 0.1, 30.0):
        assert torch.allclose(corrected(moments(x, x @ w[0].T + 3), w, damping), w, atol=1e-4)
    few = x[:4]  # what the samples do not tell stays as it is
    assert torch.allclose(corrected(moments(few, few @ w[0].T), w, 0.01), w, atol=1e-4)


def test_a_linear_distortion_is_undone() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2000, 8), torch.randn(1, 5, 8)
    a = torch.eye(8) + 0.3 * torch.randn(8, 8)
    found = corrected(moments(x @ a.T, x @ w[0].T), w, 1e-6)
    assert torch.allclose(found[0], w[0] @ torch.linalg.inv(a), atol=1e-3)
    assert not torch.allclose(found, w, atol=0.1)
    assert torch.allclose(corrected(moments(x @ a.T, x @ w[0].T), w, 1e6), w, atol=1e-3)


def test_the_solution_makes_up_for_errors_of_the_input() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(16, 8), correlated(1000, (16,), 3)
    distorted = x @ (torch.eye(16) + 0.1 * torch.randn(16, 16)) + 0.2
    form = replace(NARROW, bits=6)
    p = problem(net, x, form, distorted)
    ignoring, found = Descent(damping=(1e6,)).solve(p), Descent().solve(p)
    assert p.loss(found.weight, found.bias) < 0.3 * p.loss(ignoring.weight, ignoring.bias)


def test_gains_are_known_from_few_samples() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(60, 200), torch.randn(1, 40, 200)
    gains = 0.8 + 0.1 * torch.rand(200)
    unseen = torch.randn(500, 200)

    def error(weight: Tensor) -> float:
        return float(((unseen * gains) @ weight[0].T - unseen @ w[0].T).square().mean())

    few = moments(x * gains, x @ w[0].T)
    found = gained(few, w, 1)
    assert error(found) < 0.1 * error(w)
    assert error(found) < 0.2 * min(error(corrected(few, w, d)) for d in Descent().damping)
    assert torch.allclose(gained(moments(x, x @ w[0].T), w, 1), w, atol=1e-4)


def test_taps_of_an_input_have_one_gain() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(300, 12), torch.randn(1, 5, 12)
    found = gained(moments(x * torch.tensor([0.5, 1.0, 1.0, 0.8]).repeat_interleave(3), x @ w[0].T), w, 3)
    ratio = (found / w).reshape(5, 4, 3)
    assert torch.allclose(ratio, ratio[:1, :, :1].expand_as(ratio), atol=1e-4)
    assert torch.allclose(ratio[0, :, 0], torch.tensor([2.0, 1.0, 1.0, 1.25]), atol=0.3)
    dead = gained(moments(x * torch.tensor([0.0] * 3 + [1.0] * 9), x @ w[0].T), w, 3)
    assert torch.isfinite(dead).all()


def weakened(samples: int, strength: float) -> Problem:
    """A convolution of many inputs and few samples, which reads less than it should."""
    torch.manual_seed(0)
    x = correlated(samples, (64, 3, 3), 2)
    held = correlated(40, (64, 3, 3), 2)
    net = nn.Conv2d(64, 32, 3, padding=1)
    noise = 0.02 * torch.randn(x.shape)
    p = problem(net, x, replace(NARROW, bits=8), x * strength + noise, held)
    seen = sampled_patches(
        p.layer, held * strength, hb.run(hb.capture(net.eval(), x[:1]), (held,))[0], 4096, p.generator()
    )
    return replace(p, held_out=seen)


def test_few_samples_show_that_a_layer_reads_too_little() -> None:
    p = weakened(12, 0.8)
    found = Descent().solve(p)
    assert "W D" in found.note
    assert p.loss(found.weight, found.bias) < 0.2 * p.loss(p.weight, p.bias)
    assert "W D" not in Descent().solve(weakened(12, 1.0)).note


def test_errors_that_all_positions_share_count_more() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 8, 4, generator=g)
    offset = torch.ones(1, 6, 1, 1) * torch.randn(1, 6, 1, 1, generator=g)
    inputs = torch.cat([offset.expand(1, 6, 8, 1), x[..., 1:] - x[..., 1:].mean(2, keepdim=True)], 3)
    w = torch.ones(1, 2, 4)
    choosing = Choosing()
    choosing.add(6, Patches(inputs.flatten(1, 2), (inputs @ w.transpose(1, 2)[:, None]).flatten(1, 2)))
    judge = Judge(choosing, dense(10, 3))
    assert judge(w, None) == pytest.approx(0, abs=1e-6)
    power = inputs.square().mean((0, 1, 2))
    shared, apart = w.clone(), w.clone()
    shared[..., 0] += 0.1 / float(power[0].sqrt())  # errors of one size at every position
    apart[..., 1] += 0.1 / float(power[1].sqrt())
    assert judge(shared, None) > 4 * judge(apart, None)
    assert judge(w, torch.full((1, 2), 0.1)) == pytest.approx(judge(shared, None), rel=1e-3)


@pytest.mark.parametrize("batch", [1, 3, 8, 40])
def test_the_samples_that_choose_are_fitted_as_well(batch: int) -> None:
    whole = dense(10, 3)
    p = replace(whole, inputs=whole.inputs[0][:40].split(batch), targets=whole.targets[0][:40].split(batch))
    fitted, choosing = observed(p, 1 << 20)
    assert fitted.moments(centred=True).rows == 30
    assert choosing.sums.moments(centred=True).rows == sum(x.shape[1] for x, _ in choosing.means) == 10
    every = moments_of(replace(p, inputs=[torch.cat(list(p.inputs))], targets=[torch.cat(list(p.targets))]))
    _, moments = choose(p, 1 << 20, (0.1,))
    assert moments.rows == every.rows == 40
    assert torch.allclose(moments.gram, every.gram, atol=1e-5)


@pytest.mark.parametrize("off", [0.0, 0.03, 0.3, 3.0])
@pytest.mark.parametrize("rows", [30, 400])
def test_the_damping_is_found_without_trying_all(off: float, rows: int) -> None:
    """Inputs that are off by little or much, and few or many samples, ask for different dampings."""
    torch.manual_seed(5)
    x, dampings = correlated(rows, (24,), 5), (0.003, 0.03, 0.3, 3.0, 30.0)
    p = problem(nn.Linear(24, 4), x, NARROW, x_hat=x + off * torch.randn(x.shape))
    fitted, judges = observed(p, 1 << 20)
    moments, judge = fitted.moments(centred=True), Judge(judges, p)

    def worth(damping: float | None) -> float:
        """Of the better of both weights that W* is drawn to."""
        each = [Correction(1, damping, gains).of(moments, p.weight[None]) for gains in (False, True)]
        return min(judge(w, mean_bias(p, moments, w)) for w in each)

    best = min(worth(d) for d in (None, *dampings))
    assert worth(choose(p, 1 << 20, dampings)[0].damping) <= 1.01 * best + 1e-6  # there may be a second, shallow valley
    assert choose(p, 1 << 20, dampings[::-1])[0] == choose(p, 1 << 20, dampings)[0]


def test_a_solved_problem_can_be_forgotten_at_once() -> None:
    """What a layer reads is large: it must not lie there until cycles of references are collected."""
    whole = dense(10, 3)
    p = replace(whole, inputs=[whole.inputs[0].clone()])
    known = weakref.ref(p)
    gc.collect()
    gc.disable()
    try:
        Descent().solve(p)
        del p
        assert known() is None
    finally:
        gc.enable()


def test_of_three_samples_none_is_spared_to_choose() -> None:
    whole = dense(10, 3)
    p = replace(whole, inputs=[whole.inputs[0][:3]], targets=[whole.targets[0][:3]])
    fitted, choosing = observed(p, 1 << 20)
    assert not choosing.means
    judge = Judge(choosing, p)
    w, bias = 0.9 * p.weight[None], torch.zeros(1, 4)
    assert judge(w, bias) * 5 == pytest.approx(p.loss(w[0], bias[0]) / float(judge.moments.y_var.sum()), rel=1e-4)
    assert choose(p, 1 << 20, (0.1,))[1].rows == fitted.moments(centred=True).rows == 3
    assert torch.isfinite(Descent().solve(p).weight).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_judge_computes_from_moments_what_the_patches_say(bias: bool) -> None:
    p, g = dense(10, 3, bias), torch.Generator().manual_seed(0)
    w, b = p.weight[None] + 0.1 * torch.randn(1, 4, 10, generator=g), torch.randn(1, 4, generator=g)
    choosing = Choosing()
    for _ in range(3):
        x = torch.randn(1, 5 * 6, 10, generator=g) + 2
        choosing.add(5, Patches(x, x @ p.weight.T + 1))
    x, y = (torch.cat(t, 1) for t in zip(*((q.inputs, q.outputs) for q in choosing.sums.waiting), strict=True))
    judge, total = Judge(choosing, p), 0.0
    for weight, error, level in (
        (0.2, x @ w.transpose(1, 2) + (b[:, None] if bias else 0) - y, y),
        (0.8, *(t.reshape(1, 15, 6, 4).mean(2) for t in (x @ w.transpose(1, 2) + (b[:, None] if bias else 0) - y, y))),
    ):
        total += weight * float(error.square().sum() / (level - level.mean(1, keepdim=True)).square().sum())
    assert judge(w, b if bias else None) == pytest.approx(total, rel=1e-4)


def unlike(how: str) -> Problem:
    """A layer of 12 inputs whose data or weights say little."""
    torch.manual_seed(0)
    net, x = nn.Linear(12, 5, bias="no bias" not in how), correlated(200, (12,), 4)
    with torch.no_grad():
        if "dead output" in how:
            net.weight[1] = 0
        if "dead weights" in how:
            net.weight.zero_()
    if "dead inputs" in how:
        x[:, ::3] = 0
    if "silent" in how:
        x.zero_()
    if "constant" in how:
        x[:, 1::2] = 7.0
    if "all constant" in how:
        x[:] = 3.0
    if "alike" in how:
        x[:, 6:] = x[:, :6]
    if "few" in how:
        x = x[:4]
    if "tiny" in how:
        x = x * 1e-12
    if "huge" in how:
        x = x * 1e9
    return problem(net, x, NARROW)


@pytest.mark.parametrize(
    "how",
    [
        "dead output",
        "dead weights",
        "dead inputs",
        "dead inputs, no bias",
        "silent",
        "silent, no bias",
        "constant",
        "constant, no bias",
        "all constant",
        "all constant, no bias",
        "alike",
        "few",
        "few, no bias",
        "tiny",
        "huge",
    ],
)
def test_data_that_say_little(how: str) -> None:
    p = unlike(how)
    for form in (NARROW, replace(NARROW, axis=None), FORMS["per group"], FORMS["asymmetric"]):
        q = in_form(p, form)
        for rounding in ("free", "adjacent"):
            found = Descent(rounding=rounding).solve(q)  # type: ignore[arg-type]
            assert_on_grid(found, form)
        if "dead output" in how:
            assert not found.weight[1].any()
        if "dead weights" in how:
            assert not found.weight.any()


def test_the_mean_error_goes_into_the_bias() -> None:
    p = dense(10, 5)
    found = Descent().solve(p)
    assert found.bias is not None
    error = p.inputs[0] @ found.weight.T + found.bias - p.targets[0]
    assert float(error.mean(0).abs().max()) < 1e-5
    without = dense(10, 5, bias=False)
    assert Descent().solve(without).bias is None


def test_the_same_seed_gives_the_same_bits() -> None:
    make, shape = LAYERS["convolution"]
    torch.manual_seed(2)
    p = problem(make(), correlated(256, (4, 16, 16), 5), NARROW)
    del shape
    state, w, x = torch.get_rng_state(), p.weight.clone(), p.inputs[0].clone()
    first, second, other = (Descent().solve(replace(p, seed=s)) for s in (3, 3, 4))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.grid.scale, second.grid.scale)
    assert not torch.equal(first.grid.scale, other.grid.scale)  # other positions of the pictures
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(p.weight, w)
    assert torch.equal(p.inputs[0], x)


def test_grids_know_no_gradient() -> None:
    p = dense(6, 1)
    with torch.enable_grad():
        found = Descent().solve(p)
    tensors = (found.weight, found.grid.scale, found.bias)
    assert isinstance(found.grid, Grid)
    assert all(t is not None and not t.requires_grad for t in tensors)
