"""Channels mixed between linear operations: the function stays, the noise is the least there is, and what cannot be mixed is left."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.errors import DataError, UsageError
from halfbyte.losses import noise_to_signal
from halfbyte.model import value_name
from halfbyte.recipe import load_recipe
from halfbyte.transforms.rotate import _levelled


class Bottlenecks(nn.Module):
    """A bottleneck alone, a sum of three that two layers read, one that a padding layer reads, and two linear layers in a row.

    The channels of each bottleneck nearly agree, and what is read are their small differences.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 6, 1)
        self.expand, self.first = nn.Conv2d(6, 16, 1), nn.Conv2d(16, 6, 1)
        self.inner, self.second = nn.Conv2d(6, 16, 1), nn.Conv2d(16, 6, 1)
        self.third = nn.Conv2d(16, 6, 1)
        self.out, self.other = nn.Conv2d(6, 12, 1), nn.Conv2d(6, 12, 1)
        self.down, self.padded = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 8, 3, padding=1)
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 4)
        with torch.no_grad():
            for layer in (self.narrow, self.first, self.second, self.third, self.down, self.one):
                layer.weight.copy_(layer.weight[:1] * 3 + 0.5 * layer.weight)
            for layer in (self.expand, self.inner, self.out, self.other, self.padded, self.two):
                layer.weight.copy_(2 * layer.weight - 1.8 * layer.weight.mean(1, keepdim=True))
            for layer in (self.expand, self.inner, self.out, self.other, self.padded):
                layer.bias.add_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.expand(self.narrow(torch.relu(self.wide(x)))))
        y = self.first(x)
        y = y + self.second(torch.relu(self.inner(y)))
        y = y + self.third(x)
        z = self.down(torch.relu(self.out(y)) + torch.relu(self.other(y)))
        return self.two(self.one(torch.relu(self.padded(z)).mean((2, 3))))


@pytest.fixture(scope="module")
def model() -> hb.QModel:
    torch.manual_seed(3)
    return hb.capture(Bottlenecks().eval(), data()[:2])


def data(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.5


def entries(m: hb.QModel) -> dict[str | None, str]:
    return {e.value: e.message for e in m.log if e.stage == "rotate"}


def test_the_function_stays(model: hb.QModel) -> None:
    rotated = hb.rotate(model, [(data(),)])
    x = data(8) * 1.5
    before, after = (hb.run(m, (x,))[0] for m in (model, rotated))
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    told = entries(rotated)
    assert set(told) == {"narrow", "first", "down", "one"}
    assert "means absorbed" in told["narrow"] and "3 layers that write and 3 that read" in told["first"]
    assert "means absorbed" not in told["down"], "its reader pads with zeros"
    assert all("mixed" in text for text in told.values())
    assert not torch.equal(rotated.params["first.weight"], model.params["first.weight"])
    assert torch.equal(rotated.params["wide.weight"], model.params["wide.weight"])


def test_values_have_no_mean_and_one_spread(model: hb.QModel) -> None:
    rotated = hb.rotate(model, [(data(),)])
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> Tensor:
        seen[name] = x
        return x

    hb.run(rotated, (data(),), keep)
    flat = seen["narrow"].movedim(1, 0).flatten(1)
    assert float(flat.mean(1).abs().max()) < 1e-3 * float(flat.std())
    assert float(flat.var(1).max() / flat.var(1).min()) < 1.01


def test_values_and_weights_are_close_to_least_noise(model: hb.QModel) -> None:
    """Noise of the value ``narrow`` and of the weights that read it, by definition, for the mixture and for scaled channels."""
    rotated = hb.rotate(model, [(data(),)])
    x = hb.run(model, (data(),), stop="narrow")[0].movedim(1, 0).flatten(1).double()
    y = hb.run(model, (data(),), stop="expand")[0].movedim(1, 0).flatten(1)
    w, c = model.params["expand.weight"].flatten(1).double(), x.cov()
    h = w.T @ torch.diag(1 / y.var(1).double()) @ w

    def of_value(r: Tensor) -> float:
        inverse = torch.linalg.inv(r)
        return float((r @ c @ r.T).diagonal().max() * torch.trace(h @ inverse @ inverse.T))

    def of_weights(r: Tensor) -> float:
        inverse = torch.linalg.inv(r)
        return float(torch.trace(h @ inverse @ inverse.T) * torch.linalg.det(r).abs() ** (2 / len(r)))

    old, new = (m.params["narrow.weight"].flatten(1).double() for m in (model, rotated))
    r = new @ torch.linalg.pinv(old)
    levels = torch.linalg.eigvals(h @ c).real.clamp(min=0)
    found = torch.linalg.eigvals(torch.linalg.solve(h, r.T @ r)).real.sort().values
    # The geodesic from H to C^-1, a quarter of the way, but for the size of the value.
    expected = levels.pow(-0.25).sort().values
    assert torch.allclose(found / found.mean(), expected / expected.mean(), rtol=0.02)
    quarter = float(levels.pow(0.25).sum())
    assert of_value(r) == pytest.approx(float(levels.pow(0.75).sum()) * quarter / 6, rel=0.03)
    volume = float((torch.linalg.det(h) * levels.pow(-0.25).prod()) ** (1 / 6))
    assert of_weights(r) == pytest.approx(quarter * volume, rel=0.03)
    value, weights = float(levels.sqrt().sum() ** 2 / 6), 6 * float(torch.linalg.det(h) ** (1 / 6))
    assert value * 0.999 <= of_value(r) <= 1.5 * value and weights * 0.999 <= of_weights(r) <= 1.5 * weights
    bound = float((h.diagonal() * c.diagonal()).sqrt().sum() ** 2 / 6)
    assert of_value(r) < 0.5 * bound and of_weights(r) < 0.5 * 6 * float(h.diagonal().log().mean().exp())
    (gain,) = (e.figures["gain"] for e in rotated.log if e.stage == "rotate" and e.value == "narrow")
    # The log's gain is measured by rounding: real ranges are not a fixed number of deviations.
    assert gain == pytest.approx(10 * torch.log10(torch.tensor(bound / of_value(r))).item(), abs=2.5)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 24, 97])
def test_rotations_level_the_diagonal(n: int) -> None:
    a = torch.randn(n, n + 3, dtype=torch.float64)
    a = a @ torch.diag(torch.logspace(0, 3, n + 3, dtype=torch.float64)) @ a.T
    q = _levelled(a)
    assert torch.allclose(q @ q.T, torch.eye(n, dtype=q.dtype), atol=1e-10)
    diagonal = (q @ a @ q.T).diagonal()
    assert float(diagonal.max() / diagonal.min()) < 1 + 1e-4


def test_four_bit_values_lose_less(tmp_path: Path) -> None:
    """By the recipe for few bits."""
    torch.manual_seed(2)
    narrow, expand = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 24, 1)
    with torch.no_grad():
        narrow.weight.copy_(narrow.weight[:1] * 6 + narrow.weight)
        expand.weight.copy_(3 * expand.weight - 3 * expand.weight.mean(1, keepdim=True))
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), narrow, expand, nn.ReLU(), nn.Conv2d(24, 4, 3), nn.Flatten())
    model = hb.capture(net.eval(), data()[:2])
    made = {bits: hb.quantize(model, data(), bits=bits, uniform=True, samples=64) for bits in ("W8A4", "W8A8", "W4A8")}
    assert "mixed" in entries(made["W8A4"])["2"]
    assert not entries(made["W8A8"])
    assert "mixed" in entries(made["W4A8"])["2"]
    plain = load_recipe("low-bit").without("rotate")
    fresh = [(data(128)[64:],)]
    without = hb.quantize(model, data(), bits="W8A4", uniform=True, recipe=plain, samples=64)
    assert noise_to_signal(made["W8A4"], fresh, model) < 0.5 * noise_to_signal(without, fresh, model)
    assert hb.export_onnx(made["W8A4"], tmp_path / "net.onnx").proven


def test_what_is_left_alone(model: hb.QModel) -> None:
    torch.manual_seed(0)
    curved = hb.capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), data()[:2])
    same = hb.rotate(curved, [(data(),)])
    assert all(torch.equal(same.params[k], v) for k, v in curved.params.items())
    assert "activation function" in entries(same)[None]
    orthogonal = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)).eval()
    with torch.no_grad():
        for layer in orthogonal:
            layer.weight.copy_(torch.eye(3)[..., None, None])
    plain = hb.capture(orthogonal, data()[:2])
    same = hb.rotate(plain, [(data(),)])
    assert "left as it is" in entries(same)["0"]
    assert torch.equal(same.params["0.weight"], plain.params["0.weight"])
    known = hb.rotate(model, [(data(),)], fixed={"first"})
    assert "first" not in entries(known) and torch.equal(known.params["third.weight"], model.params["third.weight"])
    depthwise = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=2)).eval()
    assert "activation function" in entries(hb.rotate(hb.capture(depthwise, data()[:2]), [(data(),)]))[None]
    with pytest.raises(DataError, match="no data"):
        hb.rotate(model, [])
    with pytest.raises(UsageError, match="before place"):
        hb.rotate(hb.quantize(model, data()), [(data(),)])


def test_a_layer_may_read_one_mixture_and_write_another() -> None:
    torch.manual_seed(5)
    net = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 6, 6, 1) for i in range(4))).eval()
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(layer.weight[:1] * 3 + 0.2 * layer.weight)
    m = hb.capture(net, data()[:2])
    rotated = hb.rotate(m, [(data(),)])
    assert len([t for t in entries(rotated).values() if "mixed" in t]) >= 2
    before, after = (hb.run(x, (data(8),))[0] for x in (m, rotated))
    assert torch.allclose(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    assert {value_name(n) for n in m.graph.nodes if "value" in n.meta} >= {"0", "1", "2", "3"}


@pytest.mark.parametrize("kind", ["transposed", "one dimension", "tokens"])
def test_other_layers(kind: str) -> None:
    torch.manual_seed(6)
    parts: tuple[nn.Module, nn.Module, Tensor]
    if kind == "transposed":
        parts = nn.ConvTranspose2d(3, 5, 3, stride=2), nn.ConvTranspose2d(5, 4, 2), data(8)
    elif kind == "one dimension":
        parts = nn.Conv1d(3, 5, 3), nn.Conv1d(5, 4, 3, padding=1), torch.randn(8, 3, 20)
    else:
        parts = nn.Linear(8, 6), nn.Linear(6, 16, bias=False), torch.randn(8, 7, 8)
    first, second, x = parts
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.add_(3 * torch.randn_like(layer.weight[:1]) + 2 * layer.weight.mean())
    m = hb.capture(nn.Sequential(first, second).eval(), x[:2])
    rotated = hb.rotate(m, [(x,)])
    assert "mixed" in entries(rotated)["0"]
    before, after = (hb.run(q, (x,))[0] for q in (m, rotated))
    assert torch.allclose(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
