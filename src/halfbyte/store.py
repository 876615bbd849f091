"""Save and load a model: the graph and the plan as JSON, tensors as safetensors. Nothing is ever unpickled.

A saved model is a folder with ``graph.json`` and ``tensors.safetensors``. The graph is a list of operations by name; only
operations of ``aten``, ``halfbyte`` and Python's arithmetic are read back.
"""

import json
import math
import operator
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

import halfbyte.ops  # noqa: F401 - registers the operations that graphs name
from halfbyte.affine import Grid
from halfbyte.errors import FormatError, StoreError
from halfbyte.formats import Format
from halfbyte.model import LogEntry, Moments, QModel, Target

VERSION = 1
CHECKPOINT = "checkpoint"  # in the folder of a result
_GRAPH, _TENSORS = "graph.json", "tensors.safetensors"
_ARITHMETIC = "add sub mul floordiv truediv mod neg pow getitem eq ne lt le gt ge".split()
_TORCH_TYPES = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


def save(m: QModel, folder: str | Path) -> None:
    """Write a model into a folder (made if needed). Files are replaced one by one, each whole. Raises :class:`StoreError`."""
    folder, m = Path(folder), m.to("cpu")
    tensors = {**_prefixed("params", m.params), **_prefixed("tuned", m.tuned)}
    for name, grid in m.grids.items():
        parts = {"scale": grid.scale, "zero": grid.zero, "lo": grid.lo, "hi": grid.hi}
        tensors |= {f"grids/{part}/{name}": t for part, t in parts.items()}
    for name, moments in m.moments.items():
        tensors |= {f"moments/mean/{name}": moments.mean, f"moments/std/{name}": moments.std}
    tensors |= {f"samples/{i}": t for i, t in enumerate(m.samples)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory, as tied weights do
        save_file({k: t.detach().contiguous().clone() for k, t in tensors.items()}, folder / f".{_TENSORS}")
        (folder / f".{_GRAPH}").write_text(json.dumps(_describe(m)), encoding="utf-8")
        shutil.copymode(folder / f".{_GRAPH}", folder / f".{_TENSORS}")  # safetensors lets nobody else read
        for name in (_TENSORS, _GRAPH):
            os.replace(folder / f".{name}", folder / name)
    except (OSError, SafetensorError) as error:
        for name in (_TENSORS, _GRAPH):
            (folder / f".{name}").unlink(missing_ok=True)
        raise StoreError(
            f"cannot write the checkpoint '{folder}': {getattr(error, 'strerror', None) or error}"
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all. Raises :class:`StoreError`."""
    part = path.with_name(f".{path.name}")
    try:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StoreError(f"cannot write '{path}': {error.strerror or error}") from error


def load(folder: str | Path) -> QModel:
    """Read a model that :func:`save` has written, or that lies in the folder of a result. Raises :class:`StoreError`."""
    folder = Path(folder)
    if not (folder / _GRAPH).exists() and (folder / CHECKPOINT / _GRAPH).exists():
        folder = folder / CHECKPOINT
    try:
        described = json.loads((folder / _GRAPH).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(f"'{folder}' is not a checkpoint, or is damaged: {error}") from error
    if not isinstance(described, dict) or described.get("version") != VERSION:
        raise StoreError(f"'{folder}' was written by another version of halfbyte: quantize again")
    try:
        return _restore(described, tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, FormatError) as error:
        raise StoreError(f"the checkpoint '{folder}' is damaged: {type(error).__name__} {error}") from error


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": t for name, t in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix + "/"): t for k, t in tensors.items() if k.startswith(prefix + "/")}


def _describe(m: QModel) -> dict[str, Any]:
    index = {node: i for i, node in enumerate(m.graph.nodes)}
    return {
        "version": VERSION,
        "graph": [_describe_node(n, index) for n in m.graph.nodes],
        "outputs": list(m.outputs),
        "dynamic": m.dynamic,
        "calibrated": m.calibrated,
        "plan": {k: None if f is None else asdict(f) for k, f in m.plan.items()},
        "ties": dict(m.ties),
        "grids": {k: {"axis": g.axis, "group": g.group} for k, g in m.grids.items()},
        "log": [asdict(e) for e in m.log],
        "target": None if m.target is None else _describe_target(m.target),
    }


def _describe_target(target: Target) -> dict[str, Any]:
    sets = {
        "integer": sorted(target.integer),
        "float_output": sorted(target.float_output),
        "widths": list(target.widths),
    }
    return {**asdict(target), **sets}


def _describe_node(node: fx.Node, index: Mapping[fx.Node, int]) -> dict[str, Any]:
    meta = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in node.meta.items()
        if k in ("value", "shape", "dtype", "list")
    }
    return {
        "op": node.op,
        "name": node.name,
        "target": _target_name(node),
        "args": [_encode(a, index) for a in node.args],
        "kwargs": {k: _encode(a, index) for k, a in node.kwargs.items()},
        "meta": meta,
    }


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    name = getattr(node.target, "__name__", str(node.target))
    return f"operator.{name}" if name in _ARITHMETIC else f"torch.{name}"


def _encode(value: Any, index: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"node": index[value]}
    if isinstance(value, list | tuple):
        return [_encode(v, index) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, python_type in _TORCH_TYPES.items():
        if isinstance(value, python_type):
            return {kind: str(value).removeprefix("torch.")}
    raise StoreError(f"the graph holds an argument of type {type(value).__name__}, which cannot be saved")


def _decode(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "node":
            return nodes[content]
        if kind == "float":
            return float(content)
        if kind == "device":
            return torch.device(content)
        found = getattr(torch, content)
        if not isinstance(found, _TORCH_TYPES[kind]):
            raise ValueError(f"{content} is not a {kind}")
        return found
    return value


def _find_target(name: str) -> Any:
    """The operation of this name, if it is one that a graph may hold."""
    namespace, _, rest = name.partition(".")
    if namespace == "operator" and rest in _ARITHMETIC:
        return getattr(operator, rest)
    if namespace == "torch" and rest.startswith("sym_"):
        return getattr(torch, rest)
    if namespace in ("aten", "halfbyte"):
        packet, _, overload = rest.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    raise ValueError(f"operation '{name}' is not one that a checkpoint may hold")


def _restore(d: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QModel:
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for item in d["graph"]:
        args = _decode(item["args"], nodes)
        if item["op"] == "output":
            node = graph.output(tuple(args[0]))
        else:
            target = _find_target(item["target"]) if item["op"] == "call_function" else item["target"]
            kwargs = {k: _decode(v, nodes) for k, v in item["kwargs"].items()}
            node = graph.create_node(item["op"], target, tuple(args), kwargs, name=item["name"])
        node.meta = dict(item["meta"])
        if "shape" in node.meta:
            node.meta["shape"] = tuple(node.meta["shape"])
        nodes.append(node)
    grids = {}
    for name, described in d["grids"].items():
        scale, zero, lo, hi = (tensors[f"grids/{part}/{name}"] for part in ("scale", "zero", "lo", "hi"))
        grids[name] = Grid(scale, zero, lo, hi, axis=described["axis"], group=described["group"])
    means = _under("moments/mean", tensors)
    samples = _under("samples", tensors)
    return QModel(
        graph=graph,
        params=_under("params", tensors),
        outputs=tuple(d["outputs"]),
        dynamic=d["dynamic"],
        calibrated=d["calibrated"],
        tuned=_under("tuned", tensors),
        plan={k: None if f is None else Format(**f) for k, f in d["plan"].items()},
        ties=d["ties"],
        grids=grids,
        moments={k: Moments(mean, tensors[f"moments/std/{k}"]) for k, mean in means.items()},
        log=tuple(LogEntry(**e) for e in d["log"]),
        target=None if d["target"] is None else _restore_target(d["target"]),
        samples=tuple(samples[str(i)] for i in range(len(samples))),
    )


def _restore_target(d: Mapping[str, Any]) -> Target:
    sets = {
        "integer": frozenset(d["integer"]),
        "float_output": frozenset(d["float_output"]),
        "widths": tuple(d["widths"]),
    }
    return Target(**{**d, **sets})
