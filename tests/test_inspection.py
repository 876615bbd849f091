"""What is shown of networks and files is what is in them."""

from pathlib import Path

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import UsageError
from halfbyte.inspection import inspect_model, inspect_onnx
from tiny import quantized


def test_float_network() -> None:
    found = inspect_model(hb.capture(nn.Conv2d(3, 4, 3).eval(), torch.zeros(2, 3, 6, 6)))
    assert found.layers == 1
    assert found.parameters == 4 * 3 * 9 + 4
    assert found.macs == 4 * 4 * 4 * 27
    assert found.batch == "free"
    assert found.inputs == [{"name": "input", "shape": ["batch", 3, 6, 6], "dtype": "float32"}]
    assert all(row["format"] is None for row in found.values)


def test_result_and_file(tmp_path: Path) -> None:
    out = quantized(tmp_path)
    rows = {row["name"]: row for row in inspect_model(hb.load(out)).values}
    assert rows["first.weight"]["format"] is not None
    found = inspect_onnx(out / "model.onnx")
    assert found.bytes == (out / "model.onnx").stat().st_size
    assert found.integer_kernels["QLinearConv"] == 1
    assert any(key.startswith("halfbyte.") for key in found.metadata)
    (tmp_path / "bad.onnx").write_bytes(b"\xff\x00nothing")
    with pytest.raises(UsageError, match="cannot be read"):
        inspect_onnx(tmp_path / "bad.onnx")
