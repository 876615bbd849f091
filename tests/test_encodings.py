"""Encodings for Qualcomm's tools: they fit the published format, and with the float file they are the simulated network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import halfbyte as hb
import tiny
from halfbyte.encodings import export_encodings
from halfbyte.integer import run_simulated

# AIMET's encoding format, version 1.0.0, as its documentation and its writer have it.
_ENCODING = {
    "type": "object",
    "required": ["name", "dtype", "bw", "is_sym", "enc_type", "scale", "offset"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "dtype": {"const": "INT"},
        "bw": {"type": "integer", "minimum": 4, "maximum": 32},
        "is_sym": {"type": "boolean"},
        "enc_type": {"enum": ["PER_TENSOR", "PER_CHANNEL"]},
        "scale": {"type": "array", "minItems": 1, "items": {"type": "number", "exclusiveMinimum": 0}},
        "offset": {"type": "array", "minItems": 1, "items": {"type": "integer", "maximum": 0}},
    },
    "if": {"properties": {"enc_type": {"const": "PER_TENSOR"}}},
    "then": {"properties": {"scale": {"maxItems": 1}, "offset": {"maxItems": 1}}},
}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["version", "activation_encodings", "param_encodings"],
    "additionalProperties": False,
    "properties": {
        "version": {"const": "1.0.0"},
        "activation_encodings": {"type": "array", "items": _ENCODING},
        "param_encodings": {"type": "array", "items": _ENCODING},
        "excluded_layers": {"type": "array", "items": {"type": "string"}},
        "quantizer_args": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "activation_bitwidth": {"type": "integer"},
                "param_bitwidth": {"type": "integer"},
                "dtype": {"enum": ["int", "float"]},
                "is_symmetric": {"type": "boolean"},
                "per_channel_quantization": {"type": "boolean"},
                "quant_scheme": {"enum": ["post_training_tf", "post_training_tf_enhanced"]},
            },
        },
    },
}


class Net(nn.Module):
    """A clamp inside, codes that are only moved, a sum, and an input that is returned as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.first(x))
        z = nn.functional.max_pool2d(torch.relu(self.second(y) + y), 2)
        return self.last(z.flatten(1))


@pytest.fixture
def model() -> hb.QModel:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(8, 3, 8, 8)
    return hb.quantize(hb.capture(Net().eval(), x[:2]), [x], weight_bits=4, recipe="default")


def written(m: hb.QModel, folder: Path) -> tuple[onnx.ModelProto, dict[str, Any]]:
    file, encodings = export_encodings(m, folder)
    return onnx.load(str(file)), json.loads(encodings.read_text())


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


def test_the_format_is_kept(model: hb.QModel, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    _, found = written(model, tmp_path)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(found, SCHEMA)
    found["param_encodings"][0]["offset"] = [1]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, SCHEMA)


def test_every_quantized_value_is_a_tensor_of_the_file(model: hb.QModel, tmp_path: Path) -> None:
    file, found = written(model, tmp_path)
    graph = file.graph
    tensors = {o for n in graph.node for o in n.output} | {v.name for v in graph.input}
    weights = {t.name for t in graph.initializer}
    activations = [row["name"] for row in found["activation_encodings"]]
    assert len(set(activations)) == len(activations) and set(activations) <= tensors
    assert (
        {row["name"] for row in found["param_encodings"]} == {"first.weight", "second.weight", "last.weight"} <= weights
    )
    planned = {v for v, form in model.plan.items() if form is not None}
    assert len(activations) + 3 == len(planned)
    assert not any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in graph.node)


def test_a_code_stands_for_scale_times_code_plus_offset(model: hb.QModel, tmp_path: Path) -> None:
    _, found = written(model, tmp_path)
    for row in found["activation_encodings"][:1]:
        grid = model.grid(row["name"])
        assert grid is not None and row["offset"] == [-int(grid.zero)] and not row["is_sym"]
        assert row["scale"][0] * (255 + row["offset"][0]) == pytest.approx(float(grid.maximum))
    row = by_name(found["param_encodings"])["second.weight"]
    assert row["bw"] == 4 and not row["is_sym"] and row["enc_type"] == "PER_CHANNEL"
    grid = model.grid("second.weight")
    assert row["offset"] == [-8 - z for z in grid.zero.tolist()] and row["scale"] == pytest.approx(grid.scale.tolist())
    assert [s * o for s, o in zip(row["scale"], row["offset"], strict=True)] == pytest.approx(grid.minimum.tolist())
    row = by_name(found["param_encodings"])["first.weight"]
    assert row["bw"] == 8 and row["is_sym"] and set(row["offset"]) == {-128}


def test_weights_of_the_file_lie_on_their_grids(model: hb.QModel, tmp_path: Path) -> None:
    file, found = written(model, tmp_path)
    weights = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer}
    for row in found["param_encodings"]:
        w, scale = weights[row["name"]], np.float32(row["scale"]).reshape(-1, *[1] * (weights[row["name"]].ndim - 1))
        codes = w / scale - np.float32(row["offset"]).reshape(scale.shape)
        assert np.abs(codes - codes.round()).max() < 1e-3
        assert codes.min() > -0.5 and codes.max() < 2 ** row["bw"] - 0.5


def test_rounding_the_float_file_by_the_encodings_is_the_simulation(model: hb.QModel, tmp_path: Path) -> None:
    file, found = written(model, tmp_path)
    graph, nodes = file.graph, []
    rows = by_name(found["activation_encodings"])

    def rounded(name: str) -> list[onnx.NodeProto]:
        row = rows[name]
        assert row["bw"] == 8
        zero = -row["offset"][0]
        graph.initializer.extend(
            [
                numpy_helper.from_array(np.float32(row["scale"][0]), f"{name}/s"),
                numpy_helper.from_array(np.uint8(zero), f"{name}/z"),
            ]
        )
        q = helper.make_node("QuantizeLinear", [name, f"{name}/s", f"{name}/z"], [f"{name}/q"])
        return [q, helper.make_node("DequantizeLinear", [f"{name}/q", f"{name}/s", f"{name}/z"], [f"{name}/dq"])]

    for name in [v.name for v in graph.input if v.name in rows]:
        nodes += rounded(name)
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in rows:
                node.input[i] = f"{name}/dq"
        nodes.append(node)
        for name in node.output:
            nodes += rounded(name) if name in rows else []
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = torch.randn(16, 3, 8, 8)
    (got,) = ort.InferenceSession(file.SerializeToString(), options).run(None, {"x": x.numpy()})
    (expected,) = run_simulated(hb.lower(model), (x,))
    distance = np.abs(got - expected.numpy())
    assert np.quantile(distance, 0.1) < 1e-5 and distance.max() < 5e-3  # a float bias moves some number across a tie
    (plain,) = hb.predict(model.as_float(), (x,))
    assert np.abs(got - plain.numpy()).max() > 1e-2


def test_what_the_format_cannot_say_is_refused(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 8, 8)
    m = hb.quantize(hb.capture(Net().eval(), x[:2]), [x], weight_bits=3, recipe="default")
    with pytest.raises(hb.UsageError, match="encodings have 4 to 32 bits"):
        export_encodings(m, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_both(tmp_path: Path) -> None:
    out = tiny.quantized(tmp_path, "--encodings")
    assert {"model.encodings", "model_float.onnx", "model.onnx"} <= set(tiny.files(out))
    found = json.loads((out / "model.encodings").read_text())
    assert found["version"] == "1.0.0" and found["excluded_layers"] == []
