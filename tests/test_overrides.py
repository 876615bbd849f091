"""Exceptions by name, module and type; what a dry run says about them; a dry run runs nothing."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import PlacementError, UsageError
from halfbyte.overrides import parse_overrides
from halfbyte.plan import plan_job
from halfbyte.settings import Settings
from halfbyte.targets import GENERIC, ONNXRUNTIME, here
from tiny import files, halfbyte, network, quantized


class Net(nn.Module):
    """A stem of two layers, a sum, a depthwise layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.body = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.body(x) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> hb.QModel:
    torch.manual_seed(0)
    return hb.capture(Net().eval(), (torch.randn(2, 3, 6, 6),))


def widths(m: hb.QModel) -> dict[str, int]:
    return {name: form.bits for name, form in m.plan.items() if form is not None}


@pytest.mark.parametrize("pattern", ["stem.*", "stem", "st?m"])
def test_a_module_means_its_layers_and_what_they_read(model: hb.QModel, pattern: str) -> None:
    plain = widths(hb.place(model, GENERIC))
    changed = widths(hb.place(model, GENERIC, overrides={pattern: hb.bits("W4A16")}))
    expected = {"stem.0.weight": 4, "stem.2.weight": 4, "x": 16, "stem.1": 16}
    assert changed == {**plain, **expected}
    assert set(expected) <= set(plain)


def test_types_values_and_the_last_word(model: hb.QModel) -> None:
    def changed(overrides: object) -> dict[str, int]:
        plain = widths(hb.place(model, GENERIC))
        return {k: v for k, v in widths(hb.place(model, GENERIC, overrides=overrides)).items() if plain[k] != v}

    assert changed({"type:depthwise": hb.bits("W5A8")}) == {"body.weight": 5}
    assert changed({"type:linear": hb.bits("W6A8")}) == {"head.weight": 6}
    assert changed({"stem.1": hb.bits("W4A12")}) == {"stem.1": 12}  # a value, no layer: its own width
    assert changed({"*.weight": hb.bits("W4A12")}) == dict.fromkeys(
        ("stem.0.weight", "stem.2.weight", "body.weight", "head.weight"), 4
    )
    assert changed({"type:conv": hb.bits("W4A8"), "stem.0": hb.bits("W7A8")}) == {
        "stem.0.weight": 7,
        "stem.2.weight": 4,
        "body.weight": 4,
    }


def test_float_by_module_and_type(model: hb.QModel) -> None:
    for pattern, gone in (("stem", {"stem.0.weight", "stem.2.weight"}), ("type:linear", {"head.weight"})):
        before, after = (widths(hb.place(model, GENERIC, overrides=o)) for o in (None, {pattern: None}))
        assert {n for n in before.keys() - after.keys() if n.endswith("weight")} == gone
        # None goes before widths, in whatever order they are given
        both = hb.place(model, GENERIC, overrides={pattern: None, "*": hb.bits("W4A8")})
        assert not gone & widths(both).keys()


def test_values_on_one_grid_change_together() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)).eval()
    m = hb.place(hb.capture(net, (torch.randn(2, 3, 8, 8),)), GENERIC, overrides={"2": hb.bits("W8A12")})
    (tied, root), *_ = m.ties.items()
    assert m.plan[tied].bits == m.plan[root].bits == 12  # type: ignore[union-attr]


def test_what_was_resolved_is_in_the_log(model: hb.QModel) -> None:
    m = hb.place(model, GENERIC, overrides={"head": None, "stem.0": hb.bits("W4A8"), "head.weight": hb.bits("W4A8")})
    told = [(e.value, e.message) for e in m.log if e.stage == "override"]
    assert ("stem.0.weight", "4 bits, as 'stem.0' asks") in told
    assert ("head", "in float, as 'head' asks") in told
    assert (None, "'head.weight' changes nothing: what it matches is in float") in told


def test_refused(model: hb.QModel) -> None:
    with pytest.raises(PlacementError, match=r"'stm\.\*' matches no value.*did you mean .*stem"):
        hb.place(model, GENERIC, overrides={"stm.*": None})
    with pytest.raises(PlacementError, match=r"'type:con' matches no value.*type:conv"):
        hb.place(model, GENERIC, overrides={"type:con": None})
    with pytest.raises(PlacementError, match="'stem' asks for 16 bits; target onnxruntime-vnni runs 2 to 8"):
        hb.place(model, ONNXRUNTIME, overrides={"stem": hb.bits("W8A16")})
    for text in ("stem", "=W8A8", "stem=", "stem=W8", "stem=W1A8"):
        with pytest.raises(UsageError):
            parse_overrides((), (text,))
    assert parse_overrides(("a",), ("b=float", "c=d=W4A8")) == {"a": None, "b": None, "c=d": hb.bits("W4A8")}


def test_dry_run_tells_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    net, data = network(tmp_path, "pair"), tmp_path / "never read.npy"
    common = ("quantize", net, "--calibration", data, "-o", tmp_path / "out", "--dry-run", "--threads", 1)
    before = files(tmp_path)
    result = halfbyte(*common, "--set", "first=W4A8", "--keep-float", "last")
    assert result.exit_code == 0, result.output
    assert "\noverride: first.weight: 4 bits, as 'first' asks" in result.output
    assert "kept in float on request" in result.output
    told = json.loads(halfbyte(*common, "--set", "first=W4A8", "--json", "-q").stdout)
    assert {r["name"]: (r["weight_bits"], r["activation_bits"]) for r in told["layers"]} == {
        "first": (4, 8),
        "last": (8, 8),
    }
    assert {*files(tmp_path)} - {"__pycache__"} == {*before} - {"__pycache__"}
    assert halfbyte(*common, "--set", "frist=W4A8").exit_code == 2


@pytest.mark.parametrize("bits", ["W8A8", "W4A8", "W3A8"])
def test_planned_sizes_are_those_of_the_file(tmp_path: Path, bits: str) -> None:
    out = (
        quantized(tmp_path, "--bits", bits, "--uniform", "--rounding", "nearest")
        if bits != "W8A8"
        else quantized(tmp_path)
    )
    described = json.loads((out / "summary.json").read_text())
    found = plan_job(
        Settings(network=network(tmp_path, "pair"), calibration="x", output="x", bits=bits, uniform=bits != "W8A8")
    )
    assert found.logical_bytes == described["size"]["logical_bits"] // 8
    assert [(r.weight_bits, r.bytes) for r in found.layers] == [
        (r["weight_bits"], r["bytes"] - 4 * r["shape"][0]) for r in described["layers"]
    ]
    assert found.file_bytes == pytest.approx(
        (out / "model.onnx").stat().st_size, rel=0.3
    )  # of a tiny network, most is names


def test_a_plan_in_python_is_what_quantize_does(model: hb.QModel) -> None:
    x = torch.randn(16, 3, 6, 6)
    options = {"bits": "W4A8", "keep_float": ["head"], "overrides": {"body": hb.bits(8, 8)}}
    found, done = hb.plan(model, x, **options), hb.quantize(model, x, **options)
    assert found.recipe == "low-bit" and hb.plan(model, x).recipe == "default" and hb.plan(model).recipe == "dfq"
    for row in found.layers:
        form = done.plan.get(f"{row.name}.weight")
        assert row.weight_bits == (32 if form is None else form.bits)
    assert {"stem.2": 4, "body": 8, "head": 32}.items() <= {r.name: r.weight_bits for r in found.layers}.items()
    assert hb.plan(model, x, bits="W4A8").logical_bytes < hb.plan(model, x).logical_bytes
    net = Net().eval()
    assert [r.name for r in hb.plan(net, x).layers] == [r.name for r in found.layers]
    with pytest.raises(UsageError, match="captured"):
        hb.plan(net)
    with pytest.raises(UsageError, match="no target"):
        hb.plan(model, x, target="onnxrunime")


class Uneven(nn.Module):
    """Layers that read channels a thousand times as small as the others, with weights as much larger."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.up, self.last = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(8, 4, 3, stride=4)
        self.linear, self.head = nn.Linear(4 * 3 * 3, 8), nn.Linear(8, 3)
        with torch.no_grad():
            for layer in (self.first, self.conv, self.last):
                layer.weight[0] /= 1000
            for large in (self.conv.weight[:, 0], self.up.weight[0], self.linear.weight[:, :9]):
                large.mul_(1000)  # one scale of 8 bits for all would round the others to nothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up(torch.relu(self.conv(torch.relu(self.first(x))))))
        return self.head(torch.relu(self.linear(torch.relu(self.last(x)).flatten(1))))


@pytest.mark.parametrize(("layer", "kind"), [("conv", "Conv"), ("up", "ConvTranspose"), ("linear", "Gemm")])
def test_the_engine_leaves_layers_in_float_alone(tmp_path: Path, layer: str, kind: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(32, 3, 8, 8)
    m = hb.calibrate(hb.place(hb.capture(Uneven().eval(), x[:2]), here("onnxruntime"), overrides={layer: None}), [(x,)])
    parity = hb.export_onnx(m, tmp_path / "net.onnx")
    assert parity.proven
    file = onnx.load(tmp_path / "net.onnx")
    (node,) = [n for n in file.graph.node if n.op_type == kind and f"{layer}.weight" in n.input[1]]
    (before,) = [n for n in file.graph.node if node.input[0] in n.output]
    assert before.op_type == "Sum"
