"""How long one layer alone takes in the engine at a pair of widths, measured once and remembered."""

import contextlib
import hashlib
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
from torch import fx

from halfbyte import engine
from halfbyte.benchmark import interleaved
from halfbyte.calibrate import calibrate
from halfbyte.export_onnx import example_inputs, to_onnx
from halfbyte.formats import Bits, container_bits
from halfbyte.graph import extent, output_node
from halfbyte.lower import lower
from halfbyte.model import QModel, editable
from halfbyte.ops import DEQUANTIZE
from halfbyte.place import place


def cache_folder() -> Path:
    """Where measurements of this user's machine are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte" / "latency"


@dataclass(frozen=True)
class EngineLatency:
    """Seconds of a layer in ONNX Runtime, for ``costs(candidates, latency=EngineLatency())``.

    The layer is exported alone, between codes where it is quantized, and the median of ``rounds`` timings counts. Widths of
    one container run the same kernel (the engine unpacks INT4 when it loads a file), so they are measured once. cache: a folder
    with a small file for each layer shape, engine version, CPU and number of threads; None measures anew.
    """

    threads: int = 1
    rounds: int = 9
    batch: int = 1
    cache: Path | None = field(default_factory=cache_folder)
    _known: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, m: QModel, layer: fx.Node, widths: Bits | None) -> float:
        """Median seconds for a batch; widths None: in float."""
        held = None if widths is None else Bits(container_bits(widths.weights), container_bits(widths.activations))
        key = self._key(m, layer, held)
        if key not in self._known:
            path = None if self.cache is None else self.cache / f"{key}.json"
            seconds = None if path is None else _read(path)
            self._known[key] = self._measure(alone(m, layer, self.batch), held) if seconds is None else seconds
            if path is not None and seconds is None:
                write_json(path, {"seconds": self._known[key]})
        return self._known[key]

    def _key(self, m: QModel, layer: fx.Node, widths: Bits | None) -> str:
        shapes = [n.meta["shape"] for n in layer.all_input_nodes]
        rest = [a for a in layer.args if not isinstance(a, fx.Node)]
        machine = (ort.__version__, engine.instruction_set(), processor(), self.threads, self.batch)
        target = None if m.target is None or widths is None else (m.target.per_channel, m.target.narrow_products)
        told = repr((machine, str(layer.target), shapes, rest, str(widths), target))
        return hashlib.sha256(told.encode()).hexdigest()[:24]

    def _measure(self, m: QModel, widths: Bits | None) -> float:
        if widths is None:
            low = m.as_float()
        else:
            assert m.target is not None
            placed = place(m, m.target, weight_bits=widths.weights, activation_bits=widths.activations)
            low = between_codes(lower(calibrate(placed, [example_inputs(m)])), widths)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.onnx"
            ir.save(to_onnx(low), str(path))
            session = engine.session(path, threads=self.threads)
            feed = {str(n.target): t.numpy() for n, t in zip(low.inputs, example_inputs(low), strict=True)}
            (times,) = interleaved([lambda: session.run(None, feed)], self.rounds)
        return statistics.median(times)


def _read(path: Path) -> float | None:
    """Seconds measured before; None where nothing was, or the file is damaged."""
    try:
        return float((read_json(path) or {})["seconds"])
    except (LookupError, TypeError, ValueError):
        return None


def read_json(path: Path) -> dict[str, Any] | None:
    """What was measured before; None where nothing was, or the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, measured: Mapping[str, Any]) -> None:
    """Keep a measurement; a cache that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(measured), encoding="utf-8")
        os.replace(part, path)


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def alone(m: QModel, layer: fx.Node, batch: int = 1) -> QModel:
    """A network of this layer only, of a fixed batch, with its float parameters."""

    def shape(node: fx.Node) -> tuple[int, ...]:
        return tuple(extent(d, batch) for d in node.meta["shape"])

    graph, copies = fx.Graph(), {}
    for node in layer.all_input_nodes:
        constant = node.op == "get_attr"
        copies[node] = graph.create_node("get_attr", node.target) if constant else graph.placeholder("input")
        copies[node].meta = {**node.meta, "shape": shape(node), **({} if constant else {"value": "input"})}
    only = graph.node_copy(layer, lambda n: copies[n])
    only.meta = {**layer.meta, "shape": shape(layer), "value": "layer"}
    graph.output((only,)).meta = {}
    params = {str(n.target): m.params[str(n.target)].cpu() for n in copies if n.op == "get_attr"}
    return QModel(graph, params, ("output",), dynamic=False, target=m.target)


def between_codes(low: QModel, widths: Bits) -> QModel:
    """A lowered one-layer network that takes and, where it can, gives codes: what rounds its input is not the layer's."""
    graph = editable(low.graph)
    (placeholder,) = (n for n in graph.nodes if n.op == "placeholder")
    if widths.activations <= 8:
        read = next((n for n in graph.nodes if n.target is DEQUANTIZE and n.args[-1] == "input"), None)
        if read is not None:
            placeholder.meta = {**placeholder.meta, "dtype": read.args[0].meta["dtype"]}
            read.args = (placeholder, *read.args[1:])
        output = output_node(graph)
        last: fx.Node = output.args[0][0]  # type: ignore[index,assignment]
        if last.target is DEQUANTIZE:
            output.args = ((last.args[0],),)
        graph.eliminate_dead_code()
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return replace(low, graph=graph, params={k: v for k, v in low.params.items() if k in used})
