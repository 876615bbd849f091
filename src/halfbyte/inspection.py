"""What ``halfbyte inspect`` shows of a network, an output folder or an ONNX file. Looks, changes nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import onnx
import torch

from halfbyte import engine, engine_openvino, engines
from halfbyte.errors import UsageError
from halfbyte.graph import layers, macs, tensors, weight_of
from halfbyte.model import QModel, value_name
from halfbyte.ops import base_name, kind
from halfbyte.output import opened
from halfbyte.preprocess import Preprocess
from halfbyte.quantize import Network, captured
from halfbyte.shown import Shown

Row = Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class NetworkFacts(Shown):
    """Ports, counts, and one row for each value: name, operation, kind, shape, type, MACs, format, range."""

    inputs: list[Row]
    outputs: list[str]
    batch: str
    target: str | None
    layers: int
    parameters: int
    macs: int
    values: list[Row]
    log: list[str]

    def facts(self) -> dict[str, Any]:
        """All but the log."""
        return {k: v for k, v in self.to_dict().items() if k != "log"}


@dataclass(frozen=True, repr=False)
class FileFacts(Shown):
    """Ports, stored tensors, metadata, and what the engine that proves the file runs: integer kernels, and nodes in float.

    engine: its name and version. What it runs is None where it is not installed.
    """

    inputs: list[Row]
    outputs: list[Row]
    opset: Mapping[str, int]
    producer: str
    bytes: int
    nodes: int
    tensors: list[Row]
    engine: str
    integer_kernels: Mapping[str, int] | None
    float_nodes: list[Row] | None
    metadata: Mapping[str, str]

    def facts(self) -> dict[str, Any]:
        """The metadata as single facts."""
        found = self.to_dict()
        return {**found, **found.pop("metadata")}


def inspect(
    thing: Network,
    *,
    checkpoint: str | None = None,
    trust: bool = False,
    preprocess: Preprocess | None = None,
) -> NetworkFacts | FileFacts:
    """Look at a network (as for :func:`quantize`), an output folder, a model or an ``.onnx`` file.

    A module needs the size of its pictures, or has to be captured before. Raises :class:`UsageError` for what cannot be opened.
    """
    if isinstance(thing, str | PathLike):
        path = Path(thing)
        if path.suffix == ".onnx":
            if not path.is_file():
                raise UsageError(f"there is no file '{path}'")
            return inspect_onnx(path)
        if path.is_dir():
            return inspect_model(opened(path)[0])
    return inspect_model(captured(thing, checkpoint=checkpoint, trust=trust, preprocess=preprocess))


def inspect_model(m: QModel) -> NetworkFacts:
    """A captured model at any stage."""
    weights = [m.parameters[str(w.target)].numel() for n in layers(m.graph) if (w := weight_of(n)) is not None]
    return NetworkFacts(
        inputs=[{"name": str(n.target), "shape": list(n.meta["shape"]), "dtype": n.meta["dtype"]} for n in m.inputs],
        outputs=list(m.outputs),
        batch="free" if m.dynamic else "fixed",
        target=m.target.name if m.target else None,
        layers=len(weights),
        parameters=sum(t.numel() for t in m.params.values()),
        macs=sum(macs(n) for n in tensors(m.graph)),
        values=_values(m),
        log=[str(e) for e in m.log],
    )


def _values(m: QModel) -> list[Row]:
    rows: list[Row] = []
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
    return rows


def inspect_onnx(path: Path) -> FileFacts:
    """An ONNX file, of Halfbyte's or not."""
    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise UsageError(f"'{path}' cannot be read as an ONNX file: {type(error).__name__}") from error
    metadata = {p.key: p.value for p in model.metadata_props}
    name, integer, floats = _run(path, metadata)
    types = onnx.TensorProto.DataType

    def port(v: Any) -> Row:
        kind_ = v.type.tensor_type
        return {
            "name": v.name,
            "shape": [d.dim_param or d.dim_value for d in kind_.shape.dim],
            "dtype": types.Name(kind_.elem_type).lower(),
        }

    return FileFacts(
        inputs=[port(v) for v in model.graph.input],
        outputs=[port(v) for v in model.graph.output],
        opset={o.domain or "ai.onnx": o.version for o in model.opset_import},
        producer=model.producer_name,
        bytes=path.stat().st_size,
        nodes=len(model.graph.node),
        tensors=[
            {"name": t.name, "shape": list(t.dims), "dtype": types.Name(t.data_type).lower()}
            for t in model.graph.initializer
        ],
        engine=name,
        integer_kernels=integer,
        float_nodes=floats,
        metadata=metadata,
    )


def _run(path: Path, metadata: Mapping[str, str]) -> tuple[str, Mapping[str, int] | None, list[Row] | None]:
    """The engine that the file was proven on, else ONNX Runtime; its integer kernels, and what it computes in float."""
    proven = _proven_on(metadata)
    if not proven.startswith("OpenVINO"):
        kernels, floats = engine.kernels(engine.optimized_graph(path))
        name = engines.described(engines.ONNXRUNTIME)
    else:
        try:
            engine_openvino.package()
        except UsageError:
            return f"{proven}, which is not installed here", None, None
        kernels, floats = engine_openvino.kernels(engine_openvino.session(path))
        name = engines.described(engines.OPENVINO)
    return name, kernels, [{"op": o, "name": n} for o, n in floats]


def _proven_on(metadata: Mapping[str, str]) -> str:
    """Engine and version that the file says; empty where it says nothing that is understood."""
    try:
        return str(json.loads(metadata["halfbyte.proof"])["engine"])
    except (KeyError, TypeError, ValueError):
        return ""
