"""What a target can do is asked of its engine once, remembered, and told before work below eight bits begins."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from halfbyte import capabilities as module
from halfbyte import engine
from halfbyte.capabilities import Capabilities, Capability, capabilities, consequence
from halfbyte.formats import bits
from halfbyte.latency import write_json
from halfbyte.targets import ONNXRUNTIME, Target
from tiny import array, halfbyte, network


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_engine_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_timed_networks", lambda: {"linear": (nn.Linear(16, 16), torch.zeros(4, 16))})
    found = capabilities("onnxruntime", threads=1, rounds=3)
    rows = {(r.operation, r.weights, r.activations): r for r in found.rows}
    assert rows["linear", 8, 8].kernel == "QGemm"
    assert [rows["linear", w, 8].container for w in (8, 4)] == ["int8", "int4"]
    assert not rows["linear", 8, 16].legal  # the target has 2 to 8 bits
    assert all(r.speed and r.speed > 0 for r in found.rows if r.operation == "linear" and r.legal)
    assert {o: rows[o, 8, 8].kernel for o in ("add", "mul", "concat")} == {
        "add": "QLinearAdd",
        "mul": "QLinearMul",
        "concat": "QLinearConcat",
    }
    monkeypatch.setattr(engine, "session", None)  # measuring again would fail
    assert capabilities("onnxruntime", threads=1) == found
    result = halfbyte("targets", "onnxruntime", "--threads", 1)
    assert "QGemm" in result.output
    assert halfbyte("targets", "onnxruntim").exit_code == 2
    assert "onnxruntime-avx2" in halfbyte("targets").output


def known(speed: dict[tuple[int, int], float], target: Target) -> None:
    rows = tuple(Capability("conv", w, a, True, "QLinearConv", "int8", 0.25, s) for (w, a), s in speed.items())
    found = Capabilities(target.name, "ONNX Runtime", "AVX", 1, rows)
    write_json(module._path(target, 1), found.to_dict())


def test_the_consequence_is_what_was_measured() -> None:
    here = ONNXRUNTIME
    assert "not measured yet: halfbyte targets onnxruntime-vnni" in consequence(here, bits("W4A8"), 1)
    known({(8, 8): 2.0, (4, 8): 2.05, (8, 4): 1.2, (4, 4): 2.0}, here)
    assert "runs at the speed of W8A8" in consequence(here, bits("W3A8"), 1)
    assert "activations" not in consequence(here, bits("W3A8"), 1)
    assert "4-bit activations save nothing" in consequence(here, bits("W4A4"), 1)
    assert "runs at 0.60 times the speed of W8A8; 3-bit activations save nothing" in consequence(here, bits("W8A3"), 1)
    known({(8, 8): 2.0, (4, 8): 3.0}, here)
    assert "runs 1.50 times as fast as W8A8" in consequence(here, bits("W4A8"), 1)
    assert "not measured yet" in consequence(replace(here, name="other"), bits("W4A8"), 1)


def test_the_first_line_below_eight_bits(tmp_path: Path) -> None:
    net, data = network(tmp_path, "pair"), array(tmp_path / "x.npy")
    common = ("quantize", net, "--calibration", data, "-o", tmp_path / "out", "--threads", 1, "--rounding", "nearest")
    lines = halfbyte(*common, "--bits", "W4A8").output.splitlines()
    assert lines[0].startswith("W4A8 on onnxruntime")
    assert "halfbyte targets onnxruntime" in lines[0]
    told = onnx.load(tmp_path / "out" / "model.onnx").metadata_props  # where it comes from is not what it weighs
    size = (tmp_path / "out" / "model.onnx").stat().st_size - sum(len(p.key) + len(p.value) for p in told)
    (line,) = (line for line in lines if "logical, about" in line)
    assert float(line.split("about ")[1].split(" kB")[0]) == pytest.approx(size / 1e3, abs=6)


def test_damaged_cache_is_measured_anew() -> None:
    here = ONNXRUNTIME
    for content in ({"rows": [{"wrong": 1}]}, {}):
        write_json(module._path(here, 1), content)
        assert module.cached(here, 1) is None
