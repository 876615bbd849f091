"""A network that lies on another device is quantized there, whatever lies on the CPU: data, examples, files, proofs."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from elsewhere import another_device
from halfbyte.integer import run_integer


@pytest.fixture
def device() -> Iterator[str]:
    with another_device() as name:
        yield name


class Net(nn.Module):
    """A residual network with a depthwise layer and batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.relu(x + self.narrow(self.wide(x))).mean((2, 3)))


class Tokens(nn.Module):
    """Attention that looks back only, on a batch that gets a token of zeros in front: tensors are made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 16), nn.Embedding(9, 16)
        self.query, self.key, self.last = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = torch.cat([torch.zeros(len(x), 1, 16, device=x.device), x], 1)
        x = x + self.places(torch.arange(9, device=x.device))
        q = self.query(x).reshape(-1, 9, 4, 4).transpose(1, 2)
        k = self.key(x).reshape(-1, 9, 2, 4).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        return self.last(y.transpose(1, 2).reshape(-1, 9, 16).mean(1))


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    made = Net().eval()
    for norm in (m for m in made.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.running_mean, std=0.3)
    return made.to(device)


def pictures(count: int = 48) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_device_does_not_mix(device: str) -> None:
    with pytest.raises(RuntimeError, match="beside others"):
        torch.ones(2, device=device) + torch.ones(2)
    with pytest.raises(RuntimeError, match="beside others"):
        torch.ones(3)[torch.tensor([0, 2], device=device)]
    assert torch.ones(2).to(device)[torch.tensor([1])].device.type == device


WAYS = {
    "8 bits": {},
    "openvino": {"target": "openvino"},
    "descent": {"bits": "W4A4"},
    "adaround": {"bits": "W4A8", "rounding": "adaround", "iterations": 12},
    "adaquant": {"bits": "W4A8", "rounding": "adaquant", "iterations": 12},
    "blocks": {"bits": "W4A4", "rounding": "blocks", "iterations": 12},
    "omse": {"bits": "W4A4", "recipe": "omse"},
    "calibtip-light": {"bits": "W4A4", "recipe": "calibtip-light"},
    "calibtip-advanced": {"bits": "W4A4", "recipe": "calibtip-advanced"},
    "budget": {"weight_bits": (2, 4, 8), "activation_bits": (4, 8), "budget": "bops=20%"},
    "max drop": {"max_drop": 50},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_works_there_and_is_proven_here(tmp_path: Path, way: str) -> None:
    with another_device() as device:
        m = hb.quantize(network(device), pictures(), **WAYS[way])
        assert {t.device.type for t in m.parameters.values()} == {device}
        assert {g.scale.device.type for g in m.grids.values()} == {device}
        assert hb.predict(m, pictures(2))[0].device.type == device
    assert "no difference" in str(hb.export_onnx(m, tmp_path / "net.onnx"))


def test_without_data(tmp_path: Path) -> None:
    with another_device() as device:
        m = hb.quantize(hb.capture(network(device), pictures(2)), data_free=True)
    assert "no difference" in str(hb.export_onnx(m, tmp_path / "net.onnx"))


def test_what_is_made_on_the_way_follows_the_parameters(device: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (32, 8))
    m = hb.quantize(Tokens().eval().to(device), ids, bits="W4A8")
    expected = hb.predict(m, ids)[0]
    assert expected.device.type == device
    hb.save(m, tmp_path / "kept")
    for here in (m.to("cpu"), hb.load(tmp_path / "kept")):
        torch.testing.assert_close(hb.predict(here, ids)[0], expected.cpu(), rtol=1e-4, atol=1e-5)
    assert "no difference" in str(hb.export_onnx(m, tmp_path / "net.onnx"))


def test_evaluation_runs_where_the_network_lies(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m, where, found = hb.quantize(network(device), pictures()), set(), set()

    def spied(low: hb.QModel, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        where.add(low.device.type)
        return run_integer(low, x)

    def decided(forward: Callable[[Tensor], Tensor]) -> float:
        y = forward(pictures(4).to(device))
        found.add(y.device.type)
        return float(y.argmax(1).float().mean())

    monkeypatch.setattr(import_module("halfbyte.evaluate"), "run_integer", spied)
    assert hb.evaluate(m, metric=decided).scores
    assert where == {device}
    assert found == {"cpu"}


def test_everything_about_a_result(device: str, tmp_path: Path) -> None:
    net, x = network(device), pictures()
    m = hb.quantize(net, x.to(device), bits="W4A8")
    assert hb.plan(net, x, bits="W4A8").to_dict()
    hb.export(m, tmp_path / "out")
    assert hb.diagnose(m, x).to_dict()
    labels = torch.arange(len(x)) % 5
    assert hb.evaluate(m, [(x, labels)]).to_dict()
    rows = str(hb.tradeoff(net, x, weight_bits=(2, 8)))
    assert "W8A8" in rows
    assert hb.inspect(tmp_path / "out")
