"""OpenVINO as an engine: its results are those of the integer evaluation to a step, in integers, and what differs is named."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import halfbyte as hb
import tiny
from halfbyte import engines
from halfbyte.benchmark import between_files, float_file
from halfbyte.evaluate import forwards
from halfbyte.inspection import FileFacts
from halfbyte.parity import Difference, Parity
from halfbyte.parity_openvino import compare_openvino
from halfbyte.targets import find

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is optional")


class Residual(nn.Module):
    """A sum of two layers, one of a layer and what another has written, and a strided convolution of one tap."""

    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))
        self.short, self.down, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1, stride=2), nn.Linear(8, 5)
        self.third, self.swapped = nn.Conv2d(16, 16, 1), swapped

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y, s = self.second(torch.relu(self.first(x))), self.short(x)
        z = torch.relu(s + y if self.swapped else y + s)
        z = z + self.third(z)
        return self.last(torch.relu(self.down(z)).mean((2, 3)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def quantized(net: nn.Module, x: Tensor, **options: Any) -> hb.QModel:
    return hb.quantize(hb.capture(net.eval(), x[:2]), [x], target="openvino", **options)


@needs_openvino
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
def test_a_residual_network_runs_in_integers_and_is_proven(
    tmp_path: Path, swapped: bool, bits: tuple[int, int]
) -> None:
    x = torch.randn(8, 3, 16, 16)
    m = quantized(Residual(swapped), x, weight_bits=bits[0], activation_bits=bits[1], recipe="default")
    p = hb.export_onnx(m, tmp_path / "net.onnx", samples=(torch.randn(256, 3, 16, 16),))
    assert p.proven and p.engine_name == "OpenVINO"
    assert p.float_nodes == () and p.kernels["Convolution"] == 6
    assert p.integer_max_steps <= 1 and p.integer_mismatches <= 1e-6 * p.integer_elements
    assert p.simulation_agreement == 1 and p.simulation_max_difference < 1e-4
    assert {"stem", "first"} & {n.split(".")[0] for n in m.plan}  # names of the network


@needs_openvino
def test_a_layer_in_front_of_a_sum_is_not_rounded(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 16, 16)
    m = quantized(Residual(), x)
    assert m.plan["second"] is None and m.plan["third"] is None and m.plan["short"] is not None
    assert any(e.value == "third" and "adds the other operand" in e.message for e in m.log)
    other = hb.quantize(hb.capture(Residual().eval(), x[:2]), [x], target="onnxruntime")
    assert other.plan["second"] is not None


@needs_openvino
def test_a_damaged_file_is_not_proven(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 16, 16)
    m = quantized(Residual(), x)
    hb.export_onnx(m, tmp_path / "net.onnx")
    file = onnx.load(str(tmp_path / "net.onnx"))
    for t in file.graph.initializer:
        if t.name == "first:bias:codes":
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) + 3000, t.name))
    onnx.save(file, str(tmp_path / "damaged.onnx"))
    p = compare_openvino(hb.lower(m), tmp_path / "damaged.onnx", (x,))
    assert not p.proven and p.first_difference is not None
    assert p.first_difference.value.startswith("relu")
    assert p.differing[0][0] == p.first_difference.value and p.differing[0][1] > 100


@needs_openvino
def test_strided_convolutions_of_one_tap_compute_what_they_did(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 15, 17)
    m = quantized(Residual(), x)
    hb.export_onnx(m, tmp_path / "net.onnx")
    nodes = onnx.load(str(tmp_path / "net.onnx")).graph.node
    strides = [list(a.ints) for n in nodes if n.op_type == "Conv" for a in n.attribute if a.name == "strides"]
    assert strides == [[1, 1]] * 6 and sum(n.op_type == "MaxPool" for n in nodes) == 1
    way = forwards(m, tmp_path / "net.onnx")
    assert torch.allclose(way["file"](x), way["simulation"](x), atol=0.05 * float(way["float"](x).abs().max()))


class Pooled(nn.Module):
    """An average of codes that float operations read, of one value or of several, or with zeros around it; or tokens."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.second = way, nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        channels = 32 if way == "joined" else 16
        self.norm, self.last, self.head = nn.BatchNorm2d(channels), nn.Conv2d(channels, 10, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = self.second(x)
        if self.way == "tokens":
            return self.head(y.flatten(2).transpose(1, 2))
        if self.way == "padded":
            return self.last(F.avg_pool2d(y, 3, 2, 1)).mean((2, 3))
        y = F.avg_pool2d(torch.cat([x, y], 1) if self.way == "joined" else y, 2)
        return self.last(torch.relu(self.norm(y))).mean((2, 3))


@needs_openvino
@pytest.mark.parametrize("way", ["plain", "joined", "padded", "tokens"])
def test_averages_and_tokens_are_what_the_engine_makes_of_them(tmp_path: Path, way: str) -> None:
    x = F.interpolate(torch.randn(16, 3, 8, 8), scale_factor=2, mode="bilinear")
    net = Pooled(way)
    net(x)  # batch norms of the data
    m = quantized(net, x)
    p = hb.export_onnx(m, tmp_path / "net.onnx", samples=(x,))
    assert p.proven and p.integer_max_steps <= 1 and p.integer_values >= 2
    assert p.simulation_agreement == 1
    names = {n.name for n in onnx.load(str(tmp_path / "net.onnx")).graph.node if n.op_type == "DequantizeLinear"}
    assert way != "tokens" or ("second" in names and "transpose" not in names)
    assert way == "tokens" or m.plan["avg_pool2d"] is not None


class Tokens(nn.Module):
    """Linear layers on tokens joined along one dimension, with a learned token or with each other."""

    def __init__(self, dim: int, learned: bool) -> None:
        super().__init__()
        self.first, self.other, self.learned, self.dim = nn.Linear(6, 8), nn.Linear(6, 8), learned, dim
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.second, self.head = nn.Linear(8 if dim == 1 else 16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        other = self.token.expand(x.shape[0], -1, -1) if self.learned else self.other(x)
        y = torch.cat([other, self.first(x)], self.dim)
        return self.head(torch.relu(self.second(y))[:, 0])


@needs_openvino
@pytest.mark.parametrize(("dim", "learned"), [(1, True), (1, False), (-1, False)])
@pytest.mark.parametrize("batch", [None, 1])
def test_joined_tokens_are_read_by_linear_layers(tmp_path: Path, dim: int, learned: bool, batch: int | None) -> None:
    x = torch.randn(16, 7, 6)
    m = quantized(Tokens(dim, learned), x)
    p = hb.export_onnx(m, tmp_path / "net.onnx", samples=(x,), static_batch=batch)
    assert p.proven and p.integer_max_steps <= 1 and p.simulation_agreement == 1
    assert m.plan["cat"] is not None
    onnx.checker.check_model(onnx.load(str(tmp_path / "net.onnx")), full_check=True)


class Patches(nn.Module):
    """A vision transformer's ends: patches behind a class token, and an average over tokens; sums that stay floats between."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.patches, self.token = way, nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.norm, self.up, self.down, self.head = (
            nn.LayerNorm(16),
            nn.Linear(16, 16),
            nn.Conv2d(16, 16, 1),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x)
        if self.way == "sums":
            y = F.gelu(y) + self.down(y)  # floats
            y = y + self.down(torch.relu(y))
        y = y.flatten(2).transpose(1, 2)
        if self.way == "token":
            return self.head(self.up(self.norm(torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1)))[:, 0])
        return self.head(F.adaptive_avg_pool1d(self.norm(y).transpose(1, 2), 1).flatten(1))


@needs_openvino
@pytest.mark.parametrize("way", ["token", "average", "sums"])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_a_vision_transformer_with_several_samples(tmp_path: Path, way: str, batch: int | None) -> None:
    torch.manual_seed(0)
    x = F.interpolate(torch.randn(32, 3, 8, 8), scale_factor=2, mode="bilinear")
    m = quantized(Patches(way), x)
    p = hb.export_onnx(m, tmp_path / "net.onnx", samples=(x[:8],), static_batch=batch)
    assert p.proven and p.integer_max_steps <= 1 and p.integer_values >= 2
    onnx.checker.check_model(onnx.load(str(tmp_path / "net.onnx")), full_check=True)


class Samples(nn.Module):
    """Looks at its values at one place for each sample, of which the network makes a tensor of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.grid_sample(self.conv(x), torch.zeros(x.shape[0], 2, 2, 2), align_corners=False)


def test_zeros_for_each_sample(tmp_path: Path) -> None:
    torch.manual_seed(0)
    m = hb.quantize(Samples(), torch.randn(24, 3, 8, 8), target="openvino")
    assert "no difference" in str(hb.export_onnx(m, tmp_path / "net.onnx"))


@needs_openvino
def test_what_is_not_proven_with_a_free_batch_size_says_what_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unproven(low: hb.QModel, path: Path, samples: tuple[Tensor, ...]) -> Parity:
        found = compare_openvino(low, path, samples)
        return replace(found, proven=False, first_difference=Difference("stem", 1.0, 9.0, 4))

    m = quantized(Residual(), torch.randn(8, 3, 16, 16))
    hb.export_onnx(m, tmp_path / "net.onnx")
    monkeypatch.setattr(sys.modules["halfbyte.export_onnx"], "compare_openvino", unproven)
    with pytest.raises(hb.ParityError, match=r"value 'stem' .* try static_batch \(--static-batch 1\); it was left as"):
        hb.export_onnx(m, tmp_path / "net.onnx")
    with pytest.raises(hb.ParityError, match="computed 9; it was left as"):
        hb.export_onnx(m, tmp_path / "net.onnx", static_batch=1)


@needs_openvino
def test_benchmark_compares_with_float32_and_bfloat16(tmp_path: Path) -> None:
    m = quantized(Residual(), torch.randn(8, 3, 16, 16))
    hb.export_onnx(m, tmp_path / "net.onnx")
    float_file(m, tmp_path / "float.onnx")
    result = between_files(m, tmp_path / "net.onnx", tmp_path / "float.onnx", rounds=3, threads=1)
    assert result.engine.startswith("OpenVINO ") and result.bfloat16_ms is not None and result.bfloat16_ms > 0
    assert result.bfloat16_ratio is not None and "bfloat16" in str(result)


@needs_openvino
def test_the_command_line_proves_with_openvino(tmp_path: Path) -> None:
    out = tiny.quantized(tmp_path, "--target", "openvino")
    result = tiny.halfbyte("benchmark", out, "--rounds", 3, "--threads", 1)
    assert result.exit_code == 0 and "bfloat16" in result.output, result.output


@needs_openvino
def test_a_file_is_inspected_and_judged_by_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 3, 16, 16)
    hb.export(quantized(Residual(), x), tmp_path / "out")
    found = hb.inspect(tmp_path / "out" / "model.onnx")
    assert isinstance(found, FileFacts) and found.integer_kernels
    assert found.engine.startswith("OpenVINO")
    assert "QLinearConv" not in found.integer_kernels and found.integer_kernels["Convolution"] == 6
    opened: list[str] = []
    real = engines.opened
    monkeypatch.setattr(engines, "opened", lambda name, *a, **k: opened.append(name) or real(name, *a, **k))  # type: ignore[func-returns-value]
    assert hb.check(tmp_path / "out", max_drop=100, unlabelled=x).held
    assert opened == ["openvino"]
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = hb.inspect(tmp_path / "out" / "model.onnx")
    assert isinstance(found, FileFacts) and found.integer_kernels is None
    assert "not installed" in found.engine


def test_openvino_that_is_missing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    data = tiny.array(tmp_path / "x.npy")
    result = tiny.halfbyte(
        "quantize",
        tiny.network(tmp_path, "pair"),
        "--calibration",
        data,
        "-o",
        tmp_path / "out",
        "--target",
        "openvino",
    )
    assert result.exit_code == 2 and "pip install 'halfbyte[openvino]'" in result.output
    assert not (tmp_path / "out").exists()


def test_engines_that_do_not_exist_are_refused() -> None:
    with pytest.raises(hb.UsageError, match="no engine 'tensorrt'"):
        engines.require("tensorrt")


def test_both_variants_of_the_target_follow_the_cpu() -> None:
    assert find("openvino", saturates=True).narrow_products
    assert not find("openvino", saturates=False).narrow_products
