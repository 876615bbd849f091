"""Laws of equalization: the function stays, legal pairs only, every refusal has its reason; and it helps where it should."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.evaluate import signal_to_noise
from halfbyte.transforms.equalize import pairs


def block(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


def depthwise(clamp: nn.Module) -> nn.Module:
    """A depthwise pair with channels of very different sizes, as trained networks have them."""
    torch.manual_seed(0)
    first, middle, last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        size = torch.logspace(-2, 0.3, 8)
        first.weight *= size.reshape(-1, 1, 1, 1)
        first.bias *= size
        middle.weight /= size.reshape(-1, 1, 1, 1)
    return block(first, clamp, middle, nn.ReLU(), last)


def equalized(net: nn.Module, data: Sequence[torch.Tensor]) -> tuple[hb.QModel, hb.QModel]:
    m = hb.fold_batchnorm(hb.capture(net, data[0]))
    return m, hb.equalize(m, [(x,) for x in data])


@pytest.mark.parametrize("clamp", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), nn.Identity()])
def test_float_outputs_are_unchanged(clamp: nn.Module) -> None:
    data = [torch.randn(4, 3, 8, 8)]
    m, e = equalized(depthwise(clamp), data)
    for x in (data[0], 50 * torch.randn(4, 3, 8, 8)):  # far beyond the data it was made with, where limits cut
        a, b = hb.run(m, (x,))[0], hb.run(e, (x,))[0]
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def test_small_channels_use_the_grid() -> None:
    data = [torch.randn(8, 3, 8, 8) for _ in range(4)]
    m, e = equalized(depthwise(nn.ReLU6()), data)
    target = hb.place(m, hb.quantize(m, data).target).target
    assert target is not None
    before, after = (hb.calibrate(hb.place(v, target), [(x,) for x in data]) for v in (m, e))
    noise = [signal_to_noise(q, (data[0],)) for q in (before, after)]
    last = hb.capture(depthwise(nn.ReLU6()), data[0]).graph
    name = [n.meta["value"] for n in last.nodes if n.op == "call_function"][-1]
    assert noise[1][name] > noise[0][name] + 3


def test_relu6_on_equalized_channels_is_proven(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = [3 * torch.randn(8, 3, 8, 8) for _ in range(2)]
    m = hb.capture(depthwise(nn.ReLU6()), data[0])
    parity = hb.export_onnx(hb.quantize(m, data), tmp_path / "net.onnx")
    assert parity.proven
    assert parity.kernels == {"QLinearConv": 3}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z: torch.Tensor = self.c(torch.relu(self.b(y)) + y)
        return self.c(nn.functional.silu(z))  # the same weight twice


def test_every_layer_without_a_partner_has_a_reason() -> None:
    graph = hb.capture(Branches().eval(), torch.randn(2, 3, 4, 4)).graph
    found, log = pairs(graph)
    assert not found
    reasons = {e.value: e.message for e in log}
    assert "read by 2 operations" in reasons["a"]
    assert "add comes next" in reasons["b"]
    assert "weight is shared" in reasons["c"]


def test_bias_correction_removes_the_mean_error() -> None:
    torch.manual_seed(0)
    data = [torch.rand(64, 8) + 1 for _ in range(4)]
    net = block(nn.Linear(8, 4))
    m = hb.place(hb.capture(net, data[0]), hb.quantize(hb.capture(net, data[0]), data).target, weight_bits=3)  # type: ignore[arg-type]
    q = hb.calibrate(m, [(x,) for x in data])
    x = torch.cat(data)
    weights = {n for n in q.grids if n.endswith("weight")}
    error = lambda v: (hb.run(v, (x,), hb.simulate(v, only=weights.__contains__))[0] - net(x)).mean(0).abs().max()  # noqa: E731
    from dataclasses import replace

    assert error(replace(q, tuned={})) > 1e-2
    assert error(q) < 1e-4


def test_limits_for_each_channel_are_proven_and_described(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from halfbyte.summary import describe

    data = [3 * torch.randn(8, 3, 8, 8) for _ in range(2)]
    q = hb.quantize(hb.capture(depthwise(nn.Hardtanh(-0.5, 0.7)), data[0]), data)
    assert any(g.lo.ndim or g.hi.ndim for n, g in q.grids.items() if not n.endswith("weight"))
    parity = hb.export_onnx(q, tmp_path / "net.onnx")
    assert parity.proven
    assert parity.kernels == {"QLinearConv": 3}
    described = describe(
        q, network="", command="", configuration={}, seed=0, file=None, parity=parity, stages=[], preprocess=None
    )
    assert all(row["accumulator_headroom_bits"] > 0 for row in described["layers"])
