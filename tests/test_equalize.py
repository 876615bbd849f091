"""Laws of equalization: the function stays, legal pairs only, every refusal has its reason; and it helps where it should."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx
import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import chains
from halfbyte.evaluate import signal_to_noise
from halfbyte.graph import weight_of
from halfbyte.losses import noise_to_signal
from halfbyte.model import value_name
from halfbyte.run import run, simulate
from halfbyte.targets import GENERIC, ONNXRUNTIME, ONNXRUNTIME_PER_TENSOR
from halfbyte.transforms.equalize import pairs


def block(*layers: nn.Module) -> nn.Sequential:
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


def rough(net: nn.Module) -> nn.Module:
    """Channels of very different sizes, and biases high enough that there is something to absorb."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                axis = 1 if isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1 else 0
                shape = [1] * layer.weight.ndim
                shape[axis] = -1
                layer.weight *= torch.logspace(-1.5, 0.5, layer.weight.shape[axis]).reshape(shape)
                assert layer.bias is not None
                layer.bias += 2 * torch.rand(len(layer.bias))
    return net.eval()


class Shuffled(nn.Module):
    """A channel shuffle between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu6(self.first(x))
        n, c, h, w = y.shape
        y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        z: torch.Tensor = self.second(y)
        return z


def slopes() -> nn.Module:
    prelu = nn.PReLU(8)
    with torch.no_grad():
        prelu.weight.copy_(torch.linspace(-0.5, 1.5, 8))
    return prelu


PICTURE, VECTOR, TOKENS = (6, 3, 8, 8), (32, 6), (6, 5, 6)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv-conv": (lambda: block(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), PICTURE),
    "conv-conv with borders": (
        lambda: block(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)),
        PICTURE,
    ),
    "conv-depthwise-conv": (
        lambda: block(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 4, 1)),
        PICTURE,
    ),
    "groups": (lambda: block(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4)), PICTURE),
    "transposed first": (
        lambda: block(nn.ConvTranspose2d(3, 8, 3, stride=2), nn.ReLU6(), nn.Conv2d(8, 4, 3)),
        PICTURE,
    ),
    "transposed first, groups": (
        lambda: block(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 2, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        PICTURE,
    ),
    "transposed second": (
        lambda: block(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2)),
        PICTURE,
    ),
    "transposed second, groups": (
        lambda: block(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2)),
        PICTURE,
    ),
    "linear-linear": (lambda: block(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), VECTOR),
    "tokens": (lambda: block(nn.Linear(6, 8), nn.ReLU6(), nn.Linear(8, 4)), TOKENS),
    "leaky relu": (lambda: block(nn.Conv2d(3, 8, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 3)), PICTURE),
    "prelu": (lambda: block(nn.Conv2d(3, 8, 1), slopes(), nn.Conv2d(8, 4, 3)), PICTURE),
    "relu6": (lambda: block(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 3)), PICTURE),
    "hardtanh": (lambda: block(nn.Conv2d(3, 8, 1), nn.Hardtanh(-0.5, 0.7), nn.Conv2d(8, 4, 3)), PICTURE),
    "nothing between": (lambda: block(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)), PICTURE),
    "max pool": (lambda: block(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)), PICTURE),
    "max pool with borders": (
        lambda: block(nn.Conv2d(3, 8, 1), nn.MaxPool2d(3, 2, 1), nn.Hardtanh(-0.5, 0.7), nn.Conv2d(8, 4, 1)),
        PICTURE,
    ),
    "avg pool": (lambda: block(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.AvgPool2d(2), nn.Conv2d(8, 4, 1)), PICTURE),
    "global avg pool": (
        lambda: block(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        PICTURE,
    ),
    "zero padding": (lambda: block(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3)), PICTURE),
    "channel shuffle": (Shuffled, PICTURE),
    "flattened picture": (
        lambda: block(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(8 * 36, 4)),
        PICTURE,
    ),
}


def assert_same_function(a: hb.QModel, b: hb.QModel, *xs: torch.Tensor) -> None:
    for x in xs:
        expected, found = hb.run(a, (x,))[0], hb.run(b, (x,))[0]
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("method", ["weights", "noise"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_legal_pair_keeps_the_function(name: str, method: Literal["weights", "noise"]) -> None:
    torch.manual_seed(1)
    make, shape = NETWORKS[name]
    x = torch.randn(shape)
    m = hb.capture(rough(make()), x)
    others = torch.randn(shape), 50 * torch.randn(shape), -torch.rand(shape)
    e = hb.equalize(m, [(x,)], method=method)
    assert any("channels scaled" in entry.message for entry in e.log)
    assert_same_function(m, e, x, *others)
    a = hb.absorb_bias(e, [(x,)])
    assert any(entry.stage == "absorb_bias" for entry in a.log)
    assert_same_function(m, a, x, *others)


def test_high_biases_are_absorbed_exactly_and_again_after_it() -> None:
    torch.manual_seed(2)
    net = block(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        net[0].bias += 3  # type: ignore[index, operator]
    x = torch.randn(6, 3, 8, 8) / 3
    m = hb.capture(net, x)
    a = hb.absorb_bias(m, [(x,)])
    assert any("channels shifted" in entry.message for entry in a.log)
    e = hb.equalize(a, method="weights")  # now the clamp has limits for each channel already
    for v in (a, e, hb.absorb_bias(e, [(x,)])):
        assert_same_function(m, v, x, 50 * torch.randn(6, 3, 8, 8))


@pytest.mark.parametrize("method", ["weights", "noise"])
def test_batch_norms_stand_in_for_data(method: Literal["weights", "noise"]) -> None:
    torch.manual_seed(3)
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(8)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.05, 2)
        nn.init.uniform_(norm.bias, -1, 5)
    convs = [nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)]
    net = block(convs[0], norms[0], nn.ReLU6(), convs[1], norms[1], nn.ReLU(), convs[2])
    x = torch.randn(4, 3, 8, 8)
    m = hb.fold_batchnorm(hb.capture(net, x))
    e = hb.equalize(m, method=method)
    a = hb.absorb_bias(e)
    for v in (e, a):
        assert_same_function(m, v, x, 50 * x)
    assert any(entry.stage == "absorb_bias" for entry in a.log)
    for name, seen in m.moments.items():  # moments go with their channels
        ratio = e.moments[name].std / seen.std
        assert torch.allclose(e.moments[name].mean, seen.mean * ratio, rtol=1e-4, atol=1e-6)
        assert torch.equal(a.moments[name].std, e.moments[name].std)


def largest(m: hb.QModel, name: str, axis: int) -> torch.Tensor:
    return m.params[name].abs().movedim(axis, 0).flatten(1).amax(1)


def test_both_ranges_of_a_pair_become_equal() -> None:
    torch.manual_seed(4)
    m = hb.capture(rough(block(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))), torch.randn(2, 3, 8, 8))
    e = hb.equalize(m, method="weights")
    first, second = largest(e, "0.weight", 0), largest(e, "2.weight", 1)
    assert torch.allclose(first, second, rtol=1e-3)
    mean = (largest(m, "0.weight", 0) * largest(m, "2.weight", 1)).sqrt()
    assert torch.allclose(first, mean, rtol=1e-3)


def test_three_ranges_become_their_geometric_mean() -> None:
    torch.manual_seed(5)
    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    m = hb.capture(rough(block(*layers)), torch.randn(2, 3, 8, 8))
    e = hb.equalize(m, method="weights")
    weights = ("0.weight", 0), ("2.weight", 0), ("4.weight", 1)
    mean = torch.stack([largest(m, *w) for w in weights]).log().mean(0).exp()
    for w in weights:
        assert torch.allclose(largest(e, *w), mean, rtol=1e-3)


def test_asymmetric_ranges() -> None:
    torch.manual_seed(6)
    net = rough(block(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    with torch.no_grad():
        net[0].weight.clamp_(min=-0.01)  # type: ignore[operator]
    m = hb.capture(net, torch.randn(2, 3, 8, 8))
    e = hb.equalize(m, method="weights", ranges="asymmetric")
    lengths = []
    for name, axis in (("0.weight", 0), ("2.weight", 1)):
        w = e.params[name].movedim(axis, 0).flatten(1)
        lengths.append(w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0))
    assert torch.allclose(*lengths, rtol=1e-3)
    assert not torch.allclose(largest(e, "0.weight", 0), largest(e, "2.weight", 1), rtol=1e-2)


@pytest.mark.parametrize("method", ["weights", "noise"])
def test_dead_channels(method: Literal["weights", "noise"]) -> None:
    torch.manual_seed(7)
    net = rough(block(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    with torch.no_grad():
        net[0].weight[1] = 0  # type: ignore[index, operator]
        net[2].weight[:, 2] = 0  # type: ignore[index, operator]
        net[0].weight[3], net[0].bias[3], net[2].weight[:, 3] = 0, 0, 0  # type: ignore[index, operator]
    x = torch.randn(6, 3, 8, 8)
    m = hb.capture(net, x)
    e = hb.equalize(m, [(x,)], method=method)
    a = hb.absorb_bias(e, [(x,)])
    for v in (e, a):
        assert all(bool(torch.isfinite(p).all()) for p in v.params.values())
        assert_same_function(m, v, x, 50 * x)


def reasons(net: nn.Module, *x: torch.Tensor) -> dict[str | None, str]:
    """Why layers have no partner; nothing about the network may have changed."""
    m = hb.capture(net.eval(), x)
    e = hb.equalize(m, method="weights")
    assert all(torch.equal(p, e.params[n]) for n, p in m.params.items())
    return {entry.value: entry.message for entry in e.log if entry.stage == "equalize"}


@pytest.mark.parametrize("curve", [nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Sigmoid(), nn.ELU()])
def test_curved_functions_are_refused(curve: nn.Module) -> None:
    said = reasons(block(nn.Conv2d(3, 8, 1), curve, nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 4, 4))
    assert "curved" in said["0"]
    assert "is an output of the network" in said["2"]


class Wired(nn.Module):
    """Two layers with some other operation between them."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor], read: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 4, 1), nn.Conv2d(read, 4, 1), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.between(self.a(x)))
        return y


@pytest.mark.parametrize(
    ("between", "read", "reason"),
    [
        (lambda y: y + 1, 4, "add comes next"),
        (lambda y: torch.cat([y, y], 1), 8, "cat comes next"),
        (lambda y: y * torch.sigmoid(y), 4, "read by 2 operations"),
        (lambda y: nn.functional.pad(y, (1, 1, 1, 1), value=1.0), 4, "pad comes next"),
        (lambda y: nn.functional.hardtanh(y, 0.2, 1.0), 4, "comes next"),
        (lambda y: y.roll(1, 1), 4, "roll comes next"),
    ],
)
def test_what_lies_between_may_forbid_it(
    between: Callable[[torch.Tensor], torch.Tensor], read: int, reason: str
) -> None:
    said = reasons(Wired(between, read), torch.randn(2, 3, 4, 4))
    assert reason in said["a"]


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x)
        return y, self.b(y)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.b(self.a(x)))
        return y


class AcrossRows(nn.Module):
    """The second layer runs over the columns of a picture, not over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.a(x))
        return y


def test_outputs_shared_weights_and_mixed_channels_are_refused() -> None:
    x = torch.randn(2, 3, 5, 5)
    assert "is an output of the network" in reasons(TwoOutputs(), x)["a"]
    said = reasons(Twice(), x)
    assert "is shared" in said["a"]
    assert "its weight is shared" in said["b"]
    assert "mixes the channels" in reasons(AcrossRows(), x)["a"]


def test_unequalized_without_data_says_so() -> None:
    x = torch.randn(2, 3, 8, 8)
    m = hb.capture(depthwise(nn.ReLU()), x)
    said = [entry.message for entry in hb.absorb_bias(m).log if entry.stage == "absorb_bias"]
    assert any("its values are unknown" in s for s in said)
    assert any("pads its input with zeros" in s for s in said)


def test_both_come_before_placement() -> None:
    x = torch.randn(2, 3, 8, 8)
    placed = hb.place(hb.capture(depthwise(nn.ReLU()), x), GENERIC)
    with pytest.raises(hb.UsageError, match="before place"):
        hb.equalize(placed)
    with pytest.raises(hb.UsageError, match="before place"):
        hb.absorb_bias(placed)


class Residual(nn.Module):
    """A stage: three layers write to one sum, which two layers, a pooled linear layer and the next sum read."""

    def __init__(self, open_end: bool = False) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.c, self.skip, self.head = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6 * 9, 5)
        self.open_end = open_end

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.a(torch.relu(x)) + self.skip(torch.relu(x)))
        z = nn.functional.relu6(y + self.c(torch.relu(self.b(y))))
        return z if self.open_end else self.head(nn.functional.max_pool2d(z, 2).flatten(1))


def spread(net: nn.Module) -> hb.QModel:
    """A network whose channels differ widely."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3 * torch.logspace(-1, 1, len(p)).reshape(-1, *[1] * (p.ndim - 1)))
    return hb.capture(net.eval(), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("per_channel", [True, False])
def test_sums_are_equalized_with_all_that_writes_and_reads_them(per_channel: bool) -> None:
    m, x = spread(Residual()), torch.randn(32, 3, 8, 8)
    found = chains.streams(m.graph, chains.pairs(m.graph)[0])
    names = [({value_name(w) for w in s.writers}, {value_name(r) for r, _ in s.readers}) for s in found]
    assert ({"a", "skip", "c"}, {"b", "head"}) in names
    assert ({"stem"}, {"a", "skip"}) in names
    e = hb.equalize(m, [(x,)], per_channel=per_channel)
    assert sum("layers that write" in entry.message for entry in e.log) == 2
    (before,), (after,) = run(m, (x,)), run(e, (x,))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    name = str(weight_of(found[0].writers[0]).target)  # type: ignore[union-attr]
    assert not torch.equal(e.params[name], m.params[name])

    def noise(v: hb.QModel) -> float:
        target = ONNXRUNTIME if per_channel else ONNXRUNTIME_PER_TENSOR
        q = hb.calibrate(hb.place(v, target), [(x,)])
        return noise_to_signal(q, [(x,)], m.as_float())

    assert noise(e) < noise(m)


def test_sums_that_leave_the_network_or_meet_its_input_stay() -> None:
    m = spread(Residual(open_end=True))
    found = chains.streams(m.graph, chains.pairs(m.graph)[0])
    assert [{value_name(w) for w in s.writers} for s in found] == [{"stem"}]

    class Meets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + x
            return self.b(y) + self.c(y).flip(1)

    m = hb.capture(Meets().eval(), torch.zeros(2, 3, 4, 4))
    assert chains.streams(m.graph, chains.pairs(m.graph)[0]) == []


def test_limits_of_channels_end_where_pictures_are_flattened() -> None:
    """A flattened value lies within the limits of the channels it carries, but has no channels of its own."""
    torch.manual_seed(0)
    net = block(nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 5))
    with torch.no_grad():
        for p in net[0].parameters():
            p.mul_(torch.logspace(-1, 1, 6).reshape(-1, *[1] * (p.ndim - 1)))
    x = torch.randn(64, 3, 8, 8)
    q = hb.quantize(net, x, target=ONNXRUNTIME_PER_TENSOR)
    (simulated,) = run(q, (x,), simulate(q))
    (exact,) = hb.predict(q, (x,))
    assert simulated.shape == exact.shape == (64, 5)
    assert float((simulated - exact).abs().max()) < 0.02 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("clamp", "limits"), [(nn.ReLU6(), {"Min"}), (nn.Hardtanh(-0.5, 0.7), {"Max", "Min"}), (nn.ReLU(), set())]
)
def test_limits_of_channels_cost_an_engine_little(clamp: nn.Module, limits: set[str], tmp_path: Path) -> None:
    """No operation for a limit that the codes' type sets anyway, and rows of limits where pixels are short."""
    torch.manual_seed(0)
    net = block(nn.Conv2d(3, 6, 3), clamp, nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        for p in net[0].parameters():
            p.mul_(torch.logspace(-1, 1, 6).reshape(-1, *[1] * (p.ndim - 1)))
    x = torch.randn(64, 3, 8, 8)
    parity = hb.export_onnx(hb.quantize(net, x), tmp_path / "net.onnx")
    assert parity.proven and "Expand" not in parity.kernels  # folded when the file is loaded
    nodes = onnx.load(tmp_path / "net.onnx").graph.node
    found = [n for n in nodes if n.op_type in ("Max", "Min")]
    assert {n.op_type for n in found} == limits and not any(n.op_type == "Clip" for n in nodes)
    assert len([n for n in nodes if n.op_type == "Expand"]) == len(found)
    hb.export_onnx(hb.quantize(net, x, target="generic"), tmp_path / "device.onnx")
    assert not any(n.op_type == "Expand" for n in onnx.load(tmp_path / "device.onnx").graph.node)


@pytest.mark.parametrize("fixed", ["stem", "relu.1", "b", "relu.3", "c", "add", "relu6", "flatten"])
def test_values_of_known_range_stay(fixed: str) -> None:
    """A range that was given by hand is meant for the value as it is."""
    m, x = spread(Residual()), torch.randn(8, 3, 8, 8)
    names = [value_name(n) for n in m.graph.nodes if n.op == "call_function" and "value" in n.meta]
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    run(m, (x,), lambda n, t: before.setdefault(n, t))
    run(hb.equalize(m, [(x,)], fixed={fixed}), (x,), lambda n, t: after.setdefault(n, t))
    torch.testing.assert_close(after[fixed], before[fixed], rtol=1e-4, atol=1e-4 * float(before[fixed].abs().max()))
    changed = [n for n in names if not torch.allclose(after[n], before[n], rtol=1e-3, atol=1e-3)]
    assert changed  # others are equalized still


def test_few_factors_that_are_off_are_found() -> None:
    """The descent settles: what is slightly off loses noise, what was equalized before has none to lose."""

    def lowered(m: hb.QModel) -> float:
        text = next(e.message for e in m.log[::-1] if e.message.startswith("expected noise"))
        return float(text.split("lowered by ")[1].split(" dB")[0])

    torch.manual_seed(0)
    middle = nn.Conv2d(128, 128, 3, groups=128)
    net = block(
        nn.Conv2d(3, 128, 3), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(128, 128, 1), nn.ReLU(), nn.Conv2d(128, 8, 1)
    )
    data = [(torch.randn(16, 3, 12, 12),)]
    options = {"per_channel": True, "weight_bits": 3}
    once = hb.equalize(hb.capture(net, data[0]), data, **options)  # type: ignore[arg-type]
    factors = (0.2 * torch.randn(128)).exp()
    params = dict(once.params)
    params["2.weight"] = params["2.weight"] * factors.reshape(-1, 1, 1, 1)
    params["2.bias"] = params["2.bias"] * factors
    params["4.weight"] = params["4.weight"] / factors.reshape(1, -1, 1, 1)
    off = hb.equalize(replace(once, params=params), data, **options)  # type: ignore[arg-type]
    assert lowered(off) >= 0.5
    assert lowered(hb.equalize(off, data, **options)) <= 0.1  # type: ignore[arg-type]
