"""What ``halfbyte inspect`` shows of a network, an output folder or an ONNX file. Looks, changes nothing."""

from pathlib import Path
from typing import Any

import onnx
import torch

from halfbyte import engine
from halfbyte.errors import UsageError
from halfbyte.graph import layers, macs, tensors, weight_of
from halfbyte.model import QModel, value_name
from halfbyte.ops import base_name, kind


def inspect_model(m: QModel) -> dict[str, Any]:
    """Inputs, outputs, and one row for each value: name, operation, kind, shape, type, MACs, range of parameters, format."""
    rows = []
    parameters = m.parameters
    for node in tensors(m.graph):
        name = value_name(node)
        form, grid = m.plan.get(name), m.grid(name)
        row: dict[str, Any] = {
            "name": name,
            "op": base_name(node) if node.op == "call_function" else {"placeholder": "input"}.get(node.op, "parameter"),
            "kind": kind(node).value,
            "shape": list(node.meta["shape"]),
            "dtype": node.meta["dtype"],
            "macs": macs(node) or None,
            "format": None if form is None else str(form),
            "minimum": None if grid is None else float(grid.minimum.min()),
            "maximum": None if grid is None else float(grid.maximum.max()),
        }
        if node.op == "get_attr" and grid is None and parameters[str(node.target)].numel():
            low, high = torch.aminmax(parameters[str(node.target)].float())
            row |= {"minimum": float(low), "maximum": float(high)}
        rows.append(row)
    weights = [parameters[str(w.target)].numel() for n in layers(m.graph) if (w := weight_of(n)) is not None]
    return {
        "inputs": [{"name": str(n.target), "shape": list(n.meta["shape"]), "dtype": n.meta["dtype"]} for n in m.inputs],
        "outputs": list(m.outputs),
        "batch": "free" if m.dynamic else "fixed",
        "target": m.target.name if m.target else None,
        "layers": len(weights),
        "parameters": sum(t.numel() for t in m.params.values()),
        "macs": sum(macs(n) for n in tensors(m.graph)),
        "values": rows,
        "log": [str(e) for e in m.log],
    }


def inspect_onnx(path: Path) -> dict[str, Any]:
    """Inputs, outputs, stored tensors, metadata, and the kernels that the engine runs."""
    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise UsageError(f"'{path}' cannot be read as an ONNX file: {type(error).__name__}") from error
    kernels, floats = engine.kernels(engine.optimized_graph(path))
    types = onnx.TensorProto.DataType

    def port(v: Any) -> dict[str, Any]:
        kind_ = v.type.tensor_type
        return {
            "name": v.name,
            "shape": [d.dim_param or d.dim_value for d in kind_.shape.dim],
            "dtype": types.Name(kind_.elem_type).lower(),
        }

    return {
        "inputs": [port(v) for v in model.graph.input],
        "outputs": [port(v) for v in model.graph.output],
        "opset": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "producer": model.producer_name,
        "bytes": path.stat().st_size,
        "nodes": len(model.graph.node),
        "tensors": [
            {"name": t.name, "shape": list(t.dims), "dtype": types.Name(t.data_type).lower()}
            for t in model.graph.initializer
        ],
        "integer_kernels": dict(kernels),
        "float_nodes": [{"op": o, "name": n} for o, n in floats],
        "metadata": {p.key: p.value for p in model.metadata_props},
    }
