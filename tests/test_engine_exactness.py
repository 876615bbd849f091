"""Networks of one operation in the engine: the integer evaluation is equal, and integer kernels do the work."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfbyte as hb
from halfbyte import engine
from halfbyte.affine import fake_quantize
from halfbyte.errors import PlacementError
from halfbyte.graph import output_values
from halfbyte.lower import lower
from halfbyte.ops import DEQUANTIZE
from halfbyte.parity import coded_values
from halfbyte.prove import exposed

Branch = Callable[[Tensor], Tensor]


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)


class Branches(nn.Module):
    """Several independent ways from one input to one output each, by name."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: branch(x) for name, branch in self.branches.items()}


def seq(*parts: Any) -> nn.Sequential:
    return nn.Sequential(*[p if isinstance(p, nn.Module) else Apply(p) for p in parts])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def exported(
    net: nn.Module, *inputs: Tensor, path: Path, container: str = "packed", **options: Any
) -> tuple[hb.QModel, hb.Parity]:
    """Quantize on the inputs, export, and compare engine and integers on other inputs that also leave the ranges."""
    model = hb.capture(net, tuple(t[:2] for t in inputs))
    quantized = hb.quantize(model, [inputs], **options)
    parity = hb.export_onnx(quantized, path / "net.onnx", container=container)
    assert parity.proven
    assert parity.integer_mismatches == 0
    low = lower(quantized)
    fresh = tuple(torch.randn_like(t) * t.std() * 2 if t.is_floating_point() else t.flip(0) for t in inputs)
    expected = hb.run_integer(low, fresh)
    got = engine.infer(engine.session(path / "net.onnx"), fresh)
    for node, name, e, g in zip(output_values(low.graph), low.outputs, expected, got, strict=True):
        if (
            node.target is DEQUANTIZE and not parity.float_nodes
        ):  # the network gives back codes, and nothing is rounded before
            assert np.array_equal(e.numpy(), g), name
    return quantized, parity


def conv(i: int, o: int, *args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, *args, **kwargs)


def test_convolutions_2d(tmp_path: Path) -> None:
    net = Branches(
        plain=conv(4, 8, 3),
        stride=conv(4, 8, 3, stride=(2, 1), padding=1),
        dilation=conv(4, 5, 3, dilation=2, padding=2),
        same=conv(4, 6, (2, 4), padding="same"),
        asymmetric=seq(nn.ZeroPad2d((0, 1, 2, 1)), conv(4, 8, 3, stride=2)),
        groups=conv(4, 8, 3, groups=2, padding=1, bias=False),
        depthwise=conv(4, 4, 3, groups=4, padding=1),
        multiplied=conv(4, 12, 3, groups=4),
        pointwise=conv(4, 7, 1),
        whole=conv(4, 3, (7, 9)),
    )
    _, parity = exported(net, torch.randn(8, 4, 7, 9), path=tmp_path)
    assert parity.kernels == {"QLinearConv": 10}
    assert not parity.float_nodes


def test_convolutions_1d(tmp_path: Path) -> None:
    net = Branches(
        plain=nn.Conv1d(4, 8, 3, padding=1),
        depthwise=nn.Conv1d(4, 4, 5, groups=4, stride=2),
        asymmetric=seq(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(4, 4, 3)),
    )
    _, parity = exported(net, torch.randn(8, 4, 11), path=tmp_path)
    assert parity.kernels == {"QLinearConv": 3}


def test_convolutions_3d(tmp_path: Path) -> None:
    net = Branches(
        plain=nn.Conv3d(3, 6, 3, padding=1),
        grouped=nn.Conv3d(3, 3, (1, 2, 3), groups=3, stride=(1, 2, 1)),
        asymmetric=seq(nn.ConstantPad3d((1, 0, 0, 1, 1, 1), 0.0), nn.Conv3d(3, 4, 2)),
    )
    _, parity = exported(net, torch.randn(4, 3, 4, 5, 6), path=tmp_path)
    assert parity.kernels == {"QLinearConv": 3}


def test_many_inputs_of_one_sign_do_not_saturate(tmp_path: Path) -> None:
    """All products of one sign at the ends of both ranges: where a CPU adds pairs in 16 bits, it saturates here."""
    layer, dense = conv(16, 8, 3), nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.abs() * 0.1 + 0.5)
        dense.weight.copy_(dense.weight.abs() * 0.1 + 0.5)
    net = Branches(conv=layer, linear=seq(lambda t: t[:, :, 0, 0], dense))
    _, parity = exported(net, torch.rand(8, 16, 5, 5) + 3, path=tmp_path)
    assert parity.kernels == {"QLinearConv": 1, "QGemm": 1}


def test_one_output_for_each_group_is_not_depthwise(tmp_path: Path) -> None:
    """Groups of several inputs go through the kernels that add pairs, though each has one output as in depthwise."""
    layer = conv(8, 2, 3, groups=2)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.abs() * 0.1 + 0.5)
    _, parity = exported(layer, torch.rand(8, 8, 5, 5) + 3, path=tmp_path)
    assert parity.kernels == {"QLinearConv": 1}


def test_linear_layers_of_vectors_and_tokens(tmp_path: Path) -> None:
    vectors = Branches(
        bias=nn.Linear(10, 6),
        plain=nn.Linear(10, 7, bias=False),
        chain=seq(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)),
    )
    _, parity = exported(vectors, torch.randn(8, 10), path=tmp_path)
    assert parity.kernels == {"QGemm": 4}
    tokens = Branches(
        bias=nn.Linear(10, 6),
        plain=nn.Linear(10, 7, bias=False),
        chain=seq(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)),
    )
    _, parity = exported(tokens, torch.randn(8, 5, 10), path=tmp_path)
    assert sum(parity.kernels.values()) == 4
    assert set(parity.kernels) <= {"MatMulIntegerToFloat", "QLinearMatMul"}


class Embedding(nn.Module):
    """A product that a layer reads as codes, and that is returned or read by a float operation as well."""

    def __init__(self, bias: bool, returned: bool) -> None:
        super().__init__()
        self.first, self.second, self.returned = nn.Linear(64, 32, bias=bias), nn.Linear(32, 10), returned

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return y if self.returned else y.softmax(-1), self.second(y)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("shape", [(32, 64), (32, 5, 64)])
def test_a_product_for_integers_and_for_floats(
    bias: bool, returned: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    _, parity = exported(Embedding(bias, returned), torch.randn(shape), path=tmp_path)
    assert sum(parity.kernels.values()) == 2
    assert parity.integer_values == 1 + returned


class Words(nn.Module):
    """Two tables, one of them larger than what a sample looks up, and maybe shared with the last layer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places, self.layer = nn.Embedding(400, 16), nn.Embedding(5, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 400, bias=False)
        if tied:
            self.last.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.last(F.gelu(self.layer(self.words(ids) + self.places(ids % 5))))
        return y


def test_tables_of_embeddings_are_stored_in_integers(tmp_path: Path) -> None:
    model, ids = hb.capture(Words(), torch.zeros(2, 6, dtype=torch.long)), torch.randint(0, 400, (40, 6))
    path = tmp_path / "net.onnx"

    def stored(**options: Any) -> tuple[hb.QModel, dict[str, onnx.TensorProto]]:
        quantized = hb.quantize(model, [ids], **options)
        assert hb.export_onnx(quantized, path).proven
        return quantized, {t.name: t for t in onnx.load(path).graph.initializer}

    for bits in ("W8A8", "W4A8"):
        quantized, held = stored(bits=bits)
        form, grid = quantized.plan["words.weight"], quantized.grids["words.weight"]
        assert form is not None and form.bits == 8 and form.symmetric and form.axis == 0 and grid.scale.shape == (400,)
        assert any(e.value == "words.weight" and "stored in 8 bits" in str(e) for e in quantized.log)
        assert quantized.plan["places.weight"] is None  # five rows for six words
        assert held["words.weight:codes"].data_type == onnx.TensorProto.INT8
        w = quantized.params["words.weight"]
        assert float((fake_quantize(w, grid) - w).abs().max()) <= float(grid.scale.max())
    largest = max(held.values(), key=lambda t: len(t.raw_data))
    assert len(largest.raw_data) == 400 * 16
    quantized, held = stored(overrides={"words": None})
    assert quantized.plan["words.weight"] is None and len(held["words.weight"].raw_data) == 4 * 400 * 16
    quantized, _ = stored(overrides={"words": hb.bits(6, 8)})
    assert (form := quantized.plan["words.weight"]) is not None and form.bits == 6


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-per-tensor"])
def test_a_table_that_a_layer_shares(target: str, tmp_path: Path) -> None:
    _, parity = exported(Words(tied=True), torch.randint(0, 400, (40, 6)), path=tmp_path, target=target)
    assert parity.kernels["MatMulIntegerToFloat"] == 2
    held = {t.name: t for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert max(len(t.raw_data) for t in held.values()) == 400 * 16


class Products(nn.Module):
    """Products of two activations, of three and of four dimensions, whose results are read as codes and as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(5, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        q, k = self.query(x), self.key(y)
        scores = q @ k.transpose(1, 2)
        heads = q.reshape(-1, 5, 2, 3).transpose(1, 2) @ k.reshape(-1, 5, 2, 3).permute(0, 2, 3, 1)
        return self.out(scores), heads, torch.bmm(q, k.transpose(1, 2))


def test_products_of_activations(tmp_path: Path) -> None:
    _, parity = exported(Products(), torch.randn(8, 5, 6), torch.randn(8, 5, 6), path=tmp_path)
    assert sum(parity.kernels.get(k, 0) for k in ("MatMulIntegerToFloat", "QLinearMatMul")) == 6
    assert not [op for op, _ in parity.float_nodes if op == "MatMul"]


class TwoOperands(nn.Module):
    """An element-wise operation between layers: of equal shapes, and of shapes that broadcast."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.gate = conv(3, 5, 1), conv(3, 5, 1), conv(3, 5, 1)
        self.out, self.last = conv(5, 4, 1), conv(5, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.a(x), self.b(y)
        gate = self.gate(x[:, :, :1, :1])
        return self.out(self.function(a, b)), self.last(self.function(b, gate))


@pytest.mark.parametrize(("function", "kernel"), [(torch.add, "QLinearAdd"), (torch.mul, "QLinearMul")])
@pytest.mark.parametrize("size", [(7, 9), (1, 3)])
def test_two_operands(function: Any, kernel: str, size: tuple[int, int], tmp_path: Path) -> None:
    x = torch.randn(6, 3, *size)
    _, parity = exported(TwoOperands(function), x, 3 * torch.randn_like(x) + 1, path=tmp_path)
    assert parity.kernels == {kernel: 2, "QLinearConv": 5}


def test_concatenation(tmp_path: Path) -> None:
    a, b = conv(3, 4, 1), conv(3, 4, 3, padding=1)
    with torch.no_grad():
        b.weight.mul_(5)
    net = Branches(
        channels=seq(lambda t: torch.cat([a(t), b(t), a(t)], 1), conv(12, 4, 1)),
        rows=seq(lambda t: torch.cat([a(t), b(t)], 2), conv(4, 4, 1)),
    )
    net.a, net.b = a, b
    _, parity = exported(net, torch.randn(8, 3, 5, 7), path=tmp_path)
    assert parity.kernels["QLinearConcat"] == 2
    assert not parity.float_nodes


def test_averages(tmp_path: Path) -> None:
    def between(f: Any, channels: int = 4) -> nn.Module:
        return seq(conv(3, channels, 1), f, conv(channels, 4, 1))

    net = Branches(
        two=between(nn.AvgPool2d(2)),
        odd=between(nn.AvgPool2d((3, 2), stride=(1, 2))),
        padded=between(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        counting=between(nn.AvgPool2d(3, 2, 1, count_include_pad=True)),
        ceiling=between(nn.AvgPool2d(2, 2, ceil_mode=True)),
        everything=between(nn.AdaptiveAvgPool2d(1)),
        mean=between(lambda t: t.mean((2, 3), keepdim=True), 20),
    )
    _, parity = exported(net, torch.randn(8, 3, 9, 11), path=tmp_path)
    assert parity.kernels["QLinearConv"] == 14
    assert parity.kernels["QLinearAveragePool"] + parity.kernels["QLinearGlobalAveragePool"] >= 5


def test_moves_work_on_the_codes(tmp_path: Path) -> None:
    def between(f: Any, channels: int = 4) -> nn.Module:
        return seq(conv(4, 4, 1), f, conv(channels, 3, 1))

    net = Branches(
        max_pool=between(nn.MaxPool2d(3, 2, 1)),
        pad=between(lambda t: F.relu(F.pad(t, (1, 2, 0, 1)))),
        nearest=between(nn.Upsample(scale_factor=2, mode="nearest")),
        slice=between(lambda t: t[:, 1:4, ::2, :-1], 3),
        split=between(lambda t: torch.cat(t.split([1, 3], 1)[::-1], 1)),
        part=between(lambda t: t.chunk(2, 1)[1], 2),
        permute=between(lambda t: t.permute(0, 1, 3, 2)),
        reshape=between(lambda t: t.reshape(-1, 2, 2, 6, 6).transpose(1, 2).reshape(-1, 4, 6, 6)),
        expand=between(lambda t: t[:, :, :1].expand(-1, -1, 5, -1)),
        shuffle=between(nn.PixelShuffle(2), 1),
        flip=between(lambda t: t.flip(3)),
        select=between(lambda t: t[:, :, 0].unsqueeze(2)),
    )
    _, parity = exported(net, torch.randn(8, 4, 6, 6), path=tmp_path)
    assert parity.kernels["QLinearConv"] == 24
    assert set(parity.kernels) <= {"QLinearConv", "QLinearConcat"}
    assert not parity.float_nodes


def test_clamps(tmp_path: Path) -> None:
    shared = conv(3, 4, 1)
    net = Branches(
        fused=seq(conv(3, 4, 3), nn.ReLU(), conv(4, 2, 1)),
        six=seq(conv(3, 4, 3), nn.ReLU6(), conv(4, 2, 1)),
        window=seq(conv(3, 4, 3), nn.Hardtanh(-0.3, 0.4), conv(4, 2, 1)),
        above=seq(conv(3, 4, 3), lambda t: t.clamp(min=0.1), conv(4, 2, 1)),
        twice=seq(shared, lambda t: torch.cat([t, F.relu(t), t.clamp(-0.2, 0.3)], 1), conv(12, 2, 1)),
        moved=seq(conv(3, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.MaxPool2d(2), conv(4, 2, 1)),
        summed=seq(lambda t: F.relu6(4 * torch.ones(()) * 0 + shared(t) + shared(2 * t)), conv(4, 2, 1)),
    )
    _, parity = exported(net, 4 * torch.randn(8, 3, 8, 8), path=tmp_path)
    assert parity.kernels["QLinearConv"] >= 14
    assert not {op for op, _ in parity.float_nodes} & {"Relu", "Conv", "Clip"}


class Everything(nn.Module):
    """All kinds of integer kernels in one network, for the widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depth, self.point = conv(3, 8, 3, padding=1), conv(8, 8, 3, padding=1, groups=8), conv(8, 8, 1)
        self.out, self.tokens = nn.Linear(8, 6), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.first(x))
        x = x + self.point(F.relu6(self.depth(x)))
        t = self.tokens(x.flatten(2).transpose(1, 2))
        return self.out(F.adaptive_avg_pool2d(x, 1).flatten(1)), t @ t.transpose(1, 2)


@pytest.mark.parametrize(("weights", "activations"), [(4, 8), (4, 4), (3, 2)])
def test_widths_with_wide_ends_and_sums(weights: int, activations: int, tmp_path: Path) -> None:
    """Sums keep 8 bits where layers read copies of fewer: a requantization of codes, which the engine does as floats."""
    q, parity = exported(
        Everything(), torch.randn(8, 3, 5, 6), path=tmp_path, weight_bits=weights, activation_bits=activations
    )
    assert parity.integer_mismatches == 0
    assert {f.bits for f in q.plan.values() if f is not None} == {8, weights, activations}


@pytest.mark.parametrize(
    ("weights", "activations", "container"),
    [
        (2, 8, "packed"),
        (3, 7, "int8"),
        (4, 8, "packed"),
        (4, 4, "int8"),
        (5, 6, "packed"),
        (6, 2, "packed"),
        (7, 3, "packed"),
        (8, 5, "packed"),
    ],
)
def test_widths(weights: int, activations: int, container: str, tmp_path: Path) -> None:
    _, parity = exported(
        Everything(),
        torch.randn(8, 3, 5, 6),
        path=tmp_path,
        container=container,
        weight_bits=weights,
        activation_bits=activations,
        uniform=True,
    )
    assert parity.kernels["QLinearConv"] == 3
    assert parity.kernels["QLinearAdd"] == 1
    assert sum(parity.kernels.values()) >= 6
    model = onnx.load(tmp_path / "net.onnx")
    packed = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert len(packed) == (5 if weights <= 4 and container == "packed" else 0)
    codes = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("weight:codes")]
    assert codes
    flat = [c.astype(int).reshape(len(c), -1) for c in codes]
    if weights > 6:  # symmetric
        assert all(np.abs(c).max() <= 2 ** (weights - 1) - 1 for c in flat)
    else:
        assert all(np.ptp(c, axis=1).max() <= 2**weights - 1 for c in flat)
        assert any(np.ptp(c, axis=1).max() > 2**weights - 2 for c in flat), "all codes are in use"


def test_power_of_two_scales_meet_ties(tmp_path: Path) -> None:
    """Scales that are powers of two put many results exactly between two codes: half to even, at every stage."""
    layer = nn.Conv2d(2, 3, 1, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[64, -48], [64, 64], [-64, 16]]).reshape(3, 2, 1, 1) / 128)
        layer.bias.copy_(torch.tensor([0.5, -0.25, 1 / 16]))
    net = seq(layer, nn.ReLU(), nn.Conv2d(3, 3, 1, bias=False))
    x = torch.arange(-128, 128).reshape(8, 2, 4, 4) / 32
    model = hb.capture(net, x[:2])
    at = [n for n in (str(v.meta["value"]) for v in model.graph.nodes if "value" in v.meta) if n == "1"]
    assert at, "the value behind the ReLU is named after its module"
    ranges = {"input": (-128 / 16, 127 / 16), "1": (0.0, 255 / 16)}
    quantized = hb.quantize(model, [(x,)], ranges=ranges, weight_range=hb.MinMax())
    assert float(quantized.grids["1"].scale) == 1 / 16
    assert float(quantized.grids["input"].scale) == 1 / 16
    parity = hb.export_onnx(quantized, tmp_path / "net.onnx", samples=(x,))
    assert parity.proven
    assert parity.kernels == {"QLinearConv": 2}
    steps = x * 16
    assert bool(((steps - steps.floor()) == 0.5).any()), "the input meets ties"


def test_transposed_convolution_runs_in_float_on_stored_codes(tmp_path: Path) -> None:
    net = seq(conv(3, 4, 1), nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1, padding=1), conv(4, 3, 1))
    quantized, parity = exported(net, torch.randn(8, 3, 5, 5), path=tmp_path)
    assert ("ConvTranspose" in {op for op, _ in parity.float_nodes}) != any(
        "ConvTranspose" in k for k in parity.kernels
    )
    assert any("stored in 8 bits" in str(entry) for entry in quantized.log)


class Returning(nn.Module):
    """Outputs that are an input, one value twice, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.add = nn.Linear(4, 4), nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x) + self.add
        return {"linear": y, "twice": y, "x_again": x, "p": self.add}


def test_unusual_outputs(tmp_path: Path) -> None:
    _, parity = exported(Returning(), torch.randn(8, 4), path=tmp_path)
    assert [o.name for o in engine.session(tmp_path / "net.onnx").get_outputs()] == ["linear", "twice", "x_again", "p"]
    assert parity.kernels == {"QGemm": 1}


def test_width_that_the_engine_lacks_is_refused() -> None:
    model = hb.capture(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(PlacementError, match="2 to 8 bits, not 16"):
        hb.quantize(model, [torch.randn(4, 4)], activation_bits=16)


class ChannelsNormalized(nn.Module):
    """Floats over channels between layers, pooled and repeated: the engine computes all of it with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 16, 3, padding=1), conv(16, 4, 3, padding=1)
        self.a, self.b, self.join = (
            conv(8, 8, 3, groups=8, padding=1),
            conv(8, 8, 3, groups=8, padding=1),
            conv(16, 16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x - x.mean(1, keepdim=True)
        y = y / torch.sqrt(y.square().mean(1, keepdim=True) + 1e-6)
        whole, half = y.chunk(2, 1)
        half = F.interpolate(self.b(F.max_pool2d(half, 2)), scale_factor=2.0, mode="nearest")
        y = F.gelu(self.join(torch.cat([self.a(whole), half], 1))) * y
        z: Tensor = self.last(y + x)
        return z


def test_looking_at_values_leaves_the_engine_its_layout(tmp_path: Path) -> None:
    """With the codes themselves as outputs it would pool channels first, and add up in another order what floats are made of."""
    exported(ChannelsNormalized(), torch.randn(32, 3, 16, 16), path=tmp_path)
    data = (tmp_path / "net.onnx").read_bytes()
    plain, looking = (
        Counter(n.op_type for n in engine.optimized_graph(d).graph.node)
        for d in (data, exposed(data, coded_values(data)))
    )
    assert plain["NhwcMaxPool"] == 1
    for kinds in (plain, looking):
        del kinds["Transpose"], kinds["Identity"]
    assert plain == looking
