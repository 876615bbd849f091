"""Expected moments against sampling: one value at a time, through whole networks, and what is said where nothing is known."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.calibrate import expect, synthetic_inputs
from halfbyte.graph import output_values
from halfbyte.model import value_name
from halfbyte.moments import clipped, estimated_input, normal, propagate, through
from halfbyte.targets import GENERIC

SAMPLES = 1_000_000
INFINITE = float("inf")


def one(mu: float, sigma: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([mu]), torch.tensor([sigma])


def assert_sampled(mean: Tensor, var: Tensor, samples: Tensor, slack: float = 0.0) -> None:
    """Within four standard errors of the samples' mean and variance, plus a share of the spread for numeric error."""
    y = samples.double()
    m, v = float(y.mean()), float(y.var())
    centred = (y - m).square()
    assert abs(float(mean) - m) <= 4 * math.sqrt(v / len(y)) + slack * math.sqrt(v) + 1e-6
    assert abs(float(var) - v) <= 4 * float(centred.std()) / math.sqrt(len(y)) + slack * v + 1e-6


LIMITS = [(0.0, INFINITE), (0.0, 6.0), (-0.5, 0.7), (-INFINITE, 1.0), (-INFINITE, INFINITE)]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(("mu", "sigma"), [(0.0, 1.0), (-1.5, 0.8), (2.0, 0.5), (5.0, 3.0)])
def test_cut_normal_variables(mu: float, sigma: float, limits: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    y = (mu + sigma * torch.randn(SAMPLES, generator=generator)).clamp(*limits)
    s = clipped(normal(*one(mu, sigma)), *limits)
    assert_sampled(s.mean, s.var, y)
    assert float(s.least) >= max(limits[0], mu - 6 * sigma) - 1e-5
    assert float(s.greatest) <= min(limits[1], mu + 6 * sigma) + 1e-5


@pytest.mark.parametrize(("mu", "sigma"), [(0.0, 0.0), (3.0, 0.0), (3.0, 1e-8), (6.0, 1e-8)])
def test_hardly_spread_variables_stay_finite(mu: float, sigma: float) -> None:
    s = clipped(normal(*one(mu, sigma)), 0.0, 6.0)
    expected = min(max(mu, 0.0), 6.0)
    assert float(s.mean) == pytest.approx(expected, abs=1e-6)
    assert float(s.var) == pytest.approx(0.0, abs=1e-6)
    assert bool(torch.isfinite(s.least)) and bool(torch.isfinite(s.greatest))


def test_two_clamps_are_one() -> None:
    twice = clipped(clipped(normal(*one(0.3, 2.0)), -1.0, 4.0), 0.0, 6.0)
    once = clipped(normal(*one(0.3, 2.0)), 0.0, 4.0)
    for name in ("mean", "var", "low", "high"):
        assert torch.equal(getattr(twice, name), getattr(once, name))


CURVES: list[Callable[[Tensor], Tensor]] = [nn.functional.silu, nn.functional.gelu, nn.functional.hardswish]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("mu", "sigma"), [(0.0, 1.0), (-1.5, 0.8), (2.0, 0.5), (1.0, 3.0)])
def test_curves(curve: Callable[[Tensor], Tensor], mu: float, sigma: float) -> None:
    generator = torch.Generator().manual_seed(1)
    y = curve(mu + sigma * torch.randn(SAMPLES, generator=generator))
    s = through(curve, normal(*one(mu, sigma)))
    assert_sampled(s.mean, s.var, y, slack=1e-2)
    assert float(s.low) <= float(y.min()) + 2e-3 * float(y.max() - y.min())  # its valley is inside
    assert float(s.high) >= float(y.max())


class Two(nn.Module):
    """Two convolutions with batch norms, and how what they put out is combined."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], tail: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.combine, self.tail = combine, tail
        for norm in (self.na, self.nb):
            nn.init.uniform_(norm.weight, 0.3, 2)
            nn.init.uniform_(norm.bias, -1.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.na(self.a(x)), self.nb(self.b(x)))

    def rest(self, a: Tensor, b: Tensor) -> Tensor:
        """What follows the batch norms."""
        y: Tensor = self.tail(self.combine(a, b))
        return y

    def sampled(self, samples: int) -> Tensor:
        """The output, where both batch norms put out independent values of their own distributions."""
        values = []
        for norm in (self.na, self.nb):
            shape = (1, 4, 1, 1)
            values.append(norm.bias.reshape(shape) + norm.weight.abs().reshape(shape) * torch.randn(samples, 4, 6, 6))
        return self.rest(*values)


def ends(m: hb.QModel) -> list[str]:
    """Names of the values that the network puts out."""
    return [value_name(n) for n in output_values(m.graph)]


def expected_output(net: nn.Module) -> tuple[hb.QModel, Tensor, Tensor]:
    m = hb.fold_batchnorm(hb.capture(net.eval(), torch.randn(2, 3, 6, 6)))
    s = propagate(m)[ends(m)[0]]
    return m, s.mean, s.var


def per_channel(t: Tensor) -> Tensor:
    return t.movedim(1, 0).flatten(1).mean(1)


@torch.no_grad()
@pytest.mark.parametrize("clamp", [nn.ReLU(), nn.ReLU6(), nn.Identity()])
def test_additions(clamp: nn.Module) -> None:
    torch.manual_seed(2)
    net = Two(lambda a, b: clamp(a) + clamp(b), nn.Identity())
    _, mean, var = expected_output(net)
    y = net.sampled(5000).movedim(1, 0).flatten(1)
    for c in range(4):
        assert_sampled(per_channel(mean)[c], per_channel(var)[c], y[c])


@torch.no_grad()
def test_concatenations() -> None:
    torch.manual_seed(3)
    net = Two(lambda a, b: torch.cat([torch.relu(a), b], 1), nn.Identity())
    _, mean, var = expected_output(net)
    y = net.sampled(5000).movedim(1, 0).flatten(1)
    assert mean.shape[1] == 8
    for c in range(8):
        assert_sampled(per_channel(mean)[c], per_channel(var)[c], y[c])


TAILS = {
    "average pool": lambda: nn.AvgPool2d(2),
    "convolution": lambda: nn.Conv2d(4, 5, 3),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 2, stride=2),
    "average and linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    "curve and convolution": lambda: nn.Sequential(nn.SiLU(), nn.Conv2d(4, 5, 3)),
}


@torch.no_grad()
@pytest.mark.parametrize("tail", TAILS)
def test_means_reach_the_end_of_a_network(tail: str) -> None:
    torch.manual_seed(4)
    # A curve is exact behind normal values only: what a clamp puts out is taken for normal again, within its limits.
    net = Two(torch.add if "curve" in tail else lambda a, b: torch.relu(a) + nn.functional.relu6(b), TAILS[tail]())
    _, mean, _ = expected_output(net)
    y = net.sampled(10000)
    each = y.flatten(2).mean(2) if y.ndim > 2 else y  # [samples, channels]; positions of one sample overlap
    error = each.std(0) / math.sqrt(len(each))
    assert bool(((per_channel(mean) - each.mean(0)).abs() < 5 * error + 1e-4 * each.std(0)).all())


def test_every_running_value_is_described() -> None:
    torch.manual_seed(5)
    net = Two(lambda a, b: torch.cat([torch.relu(a), b], 1), nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 2, 1)))
    m, _, _ = expected_output(net)
    found = propagate(m)
    for name, s in found.items():
        for t in (s.mean, s.var, s.least, s.greatest):
            assert bool(torch.isfinite(t).all()), name
        assert bool((s.least <= s.greatest).all())
        assert bool((s.var >= 0).all())
    assert set(ends(m)) <= found.keys()


def test_given_ranges_are_limits() -> None:
    torch.manual_seed(6)
    m, _, _ = expected_output(Two(lambda a, b: a + b, nn.Conv2d(4, 2, 1)))
    name = m.inputs[0].meta["value"]
    found = propagate(m, {name: (-2.0, 3.0), ends(m)[0]: (-0.25, 0.5)})
    assert float(found[name].least.min()) == pytest.approx(-2.0, abs=0.1)
    assert float(found[name].greatest.max()) == pytest.approx(3.0, abs=0.1)
    assert float(found[ends(m)[0]].least.min()) >= -0.25
    assert float(found[ends(m)[0]].greatest.max()) <= 0.5


def smooth_pictures(mean: float, std: float) -> Tensor:
    """Random pictures whose neighbouring pixels and colours are much alike, as in photographs."""
    shared, own = torch.randn(64, 1, 9, 9), torch.randn(64, 3, 9, 9)
    coarse = math.sqrt(0.9) * shared + math.sqrt(0.1) * own
    fine = nn.functional.interpolate(coarse, size=(40, 40), mode="bicubic") + 0.15 * torch.randn(64, 3, 40, 40)
    return mean + std * (fine - fine.mean()) / fine.std()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.46, 0.26), (118.0, 66.0)])
def test_the_input_is_estimated_from_the_first_batch_norm(mean: float, std: float) -> None:
    torch.manual_seed(7)
    x = smooth_pictures(mean, std)
    norm = nn.BatchNorm2d(16, momentum=None)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), norm, nn.ReLU())
    with torch.no_grad():
        net.train()(x)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    m = hb.fold_batchnorm(hb.capture(net.eval(), x[:2]))
    found = estimated_input(m, m.inputs[0])
    assert found is not None
    low, high = found
    spread = (high - low) / 4.7  # from black to white in deviations
    centre = low + 2.2 * spread
    assert std / 2 < spread < 2 * std
    assert abs(centre - mean) < std / 2


def test_no_estimate_without_a_batch_norm() -> None:
    m = hb.capture(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), torch.randn(2, 3, 8, 8))
    assert estimated_input(m, m.inputs[0]) is None


def plain() -> hb.QModel:
    """A network without batch norms, planned."""
    torch.manual_seed(8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    return hb.place(hb.capture(net, torch.randn(2, 3, 8, 8)), GENERIC)


def test_without_batch_norms_values_are_unknown() -> None:
    m = plain()
    found = propagate(m)
    assert not bool(torch.isfinite(found[ends(m)[0]].least).all())
    with pytest.raises(hb.UsageError, match="--range") as error:
        hb.calibrate(m)
    named = re.findall(r"describes them: (.*?); give", str(error.value))
    assert named and named[0].split(", ")[0] in found


def test_ranges_for_the_named_values_are_enough() -> None:
    m = plain()
    with pytest.raises(hb.UsageError) as error:
        hb.calibrate(m)
    names = re.findall(r"describes them: (.*?); give", str(error.value))[0].split(", ")
    assert " and " not in names[-1]
    q = hb.calibrate(m, overrides=dict.fromkeys(names, (-1.0, 2.0)))
    assert all(q.grid(n) is not None for n in names)
    assert bool(torch.isfinite(hb.run(q, (torch.rand(2, 3, 8, 8),), hb.simulate(q))[0]).all())


def test_the_range_of_the_input_is_enough() -> None:
    m = plain()
    name = m.inputs[0].meta["value"]
    q = hb.calibrate(m, overrides={name: (-1.0, 2.0)})
    assert {n for n, form in q.plan.items() if form is not None and q.grid(n) is None} == set()
    observed = expect(m, {name: (-1.0, 2.0)})
    assert observed.samples == 0
    assert all(float(h.counts.sum()) > 0 and h.minimum <= h.maximum for h in observed.histograms.values())


def test_synthetic_inputs_fill_the_range_and_repeat() -> None:
    m = plain()
    ranges = {m.inputs[0].meta["value"]: (-1.0, 2.0)}
    first, again = (synthetic_inputs(m, ranges)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape[1:] == (3, 8, 8)
    assert float(first.min()) >= -1.0 - 1e-5 and float(first.max()) <= 2.0 + 1e-5
    assert float(first.max() - first.min()) > 1.5


def test_limits_far_away_from_the_mean_are_where_all_values_lie() -> None:
    """Dead channels: hardly any spread, and a mean on the wrong side of the limit."""
    for mean, std, expected in ((-3.0, 1e-8, 0.0), (-100.0, 1.0, 0.0), (50.0, 1.0, 6.0), (-3.0, 0.0, 0.0)):
        s = clipped(normal(torch.full((1, 1), mean), torch.full((1, 1), std)), 0.0, 6.0)
        assert float(s.mean) == pytest.approx(expected, abs=1e-5)


def test_limits_that_cut_nothing_leave_the_moments() -> None:
    one = clipped(normal(torch.zeros(1, 1), torch.ones(1, 1)), 0.0, float("inf"))
    again = clipped(one, 0.0, float("inf"))
    assert float(again.mean) == float(one.mean)
    assert float(again.var) == float(one.var)


def test_inputs_of_unknown_range_are_finite() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    m = hb.quantize(hb.capture(net, torch.randn(2, 7)))
    (x,) = m.samples
    assert bool(torch.isfinite(x).all()) and float(x.std()) > 0.5
