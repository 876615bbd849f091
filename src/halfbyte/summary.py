"""``summary.json``: everything about a quantized network that a script or the report would want, schema 1."""

import datetime
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, fx

import halfbyte
from halfbyte import engine
from halfbyte.affine import quantize
from halfbyte.evaluate import signal_to_noise
from halfbyte.graph import bias_of, is_real, layers, macs, tensors, weight_of
from halfbyte.model import QModel, value_name
from halfbyte.ops import Kind, base_name, kind
from halfbyte.output import SCHEMA
from halfbyte.parity import Parity
from halfbyte.run import fixed_batch, run, simulate

_BINS = 64
_KERNELS = {Kind.CONV: "QLinearConv", Kind.LINEAR: "QGemm"}


def describe(
    m: QModel,
    *,
    network: str,
    command: str,
    configuration: Mapping[str, Any],
    seed: int,
    file: Path | None,
    parity: Parity | None,
    stages: Sequence[Mapping[str, Any]],
    preprocess: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All facts about a calibrated model; ``evaluation`` and ``benchmark`` are filled in by their commands."""
    few = tuple(t[: fixed_batch(m) or 4] for t in m.samples)
    noise = signal_to_noise(m, few) if few else {}
    rows = [_layer(m, n, noise) for n in layers(m.graph)]
    float_left = [
        {"name": e.value, "op": _operation(m, e.value), "reason": e.message.removeprefix("computed in float: ")}
        for e in m.log
        if e.stage == "place" and e.message.startswith("computed in float")
    ]
    weight_bytes = sum(r["bytes"] for r in rows)
    return {
        "schema": SCHEMA,
        "tool": {"name": "halfbyte", "version": halfbyte.__version__},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "network": network,
        "configuration": dict(configuration),
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            **({"openvino": parity.engine_version} if parity is not None and parity.engine_name == "OpenVINO" else {}),
        },
        "machine": {
            "instruction_set": engine.instruction_set(),
            "cores": torch.get_num_threads(),
            "system": platform.system(),
        },
        "target": m.target.name if m.target else None,
        "bits": configuration.get("bits"),
        "inputs": [_port(str(n.target), n) for n in m.inputs],
        "outputs": [_port(name, n) for name, n in zip(m.outputs, _output_nodes(m), strict=True)],
        "preprocess": preprocess,
        "layers": rows,
        "values": _values(m, noise, few),
        "float_left": float_left,
        "size": {
            "float_bytes": sum(t.numel() * t.element_size() for t in m.params.values()),
            "file_bytes": file.stat().st_size if file is not None and file.exists() else None,
            "weight_bytes": weight_bytes,
            "logical_bits": sum(r["logical_bits"] for r in rows),
        },
        "macs": sum(r["macs"] for r in rows),
        "bit_operations": sum(r["bit_operations"] for r in rows),
        "stages": list(stages),
        "parity": None if parity is None else parity_dict(parity),
        "benchmark": None,
        "evaluation": None,
        "log": [asdict(e) for e in m.log],
    }


def parity_dict(p: Parity) -> dict[str, Any]:
    """The proof as JSON."""
    first = p.first_difference
    return {
        "proven": p.proven,
        "engine": p.engine_name,
        "engine_version": p.engine_version,
        "provider": p.provider,
        "instruction_set": p.instruction_set,
        "samples": p.samples,
        "integer_values": p.integer_values,
        "integer_elements": p.integer_elements,
        "integer_mismatches": p.integer_mismatches,
        "float_values": p.float_values,
        "float_max_steps": p.float_max_steps,
        "output_max_difference": p.output_max_difference,
        "simulation": {"top1_agreement": p.simulation_agreement, "max_difference": p.simulation_max_difference},
        "integer_max_steps": p.integer_max_steps,
        "observed_alike": p.observed_alike,
        "differing": [{"name": n, "elements": count, "steps": steps} for n, count, steps in p.differing],
        "first_difference": None if first is None else asdict(first),
        "kernels": dict(p.kernels),
        "float_nodes": [{"op": o, "name": n} for o, n in p.float_nodes],
    }


def _output_nodes(m: QModel) -> list[fx.Node]:
    return list(next(n for n in m.graph.nodes if n.op == "output").args[0])


def _port(name: str, node: fx.Node) -> dict[str, Any]:
    return {"name": name, "shape": list(node.meta["shape"]), "dtype": node.meta["dtype"]}


def _operation(m: QModel, value: str | None) -> str:
    return next((base_name(n) for n in m.graph.nodes if n.meta.get("value") == value and n.op == "call_function"), "")


def _finite(x: float | None) -> float | None:
    """JSON has no infinity: a value without any error has no signal-to-noise ratio to show."""
    return None if x is None or not math.isfinite(x) else x


def _layer(m: QModel, node: fx.Node, noise: Mapping[str, float]) -> dict[str, Any]:
    weight, bias = weight_of(node), bias_of(node)
    assert weight is not None  # layers() lists those with a constant weight
    w = m.params[str(weight.target)]
    form = m.plan.get(value_name(weight))
    source = node.args[0]
    x_form = m.plan.get(value_name(source)) if isinstance(source, fx.Node) and "value" in source.meta else None
    integer = form is not None and x_form is not None
    bits, x_bits = form.bits if form else 32, x_form.bits if x_form else 32
    work = macs(node)
    stored = (w.numel() + 1) // 2 if bits <= 4 else w.numel() * (1 if bits <= 8 else 2 if bits <= 16 else 4)
    biases = 0 if bias is None else m.params[str(bias.target)].numel()
    reason = next(
        (e.message for e in m.log if e.stage == "place" and e.value in (value_name(node), value_name(weight))), None
    )
    written = next(iter(node.users)) if len(node.users) == 1 else node
    result = (
        value_name(written)
        if m.plan.get(value_name(node)) is None and m.plan.get(written.meta.get("value", ""))
        else value_name(node)
    )
    return {
        "name": value_name(node),
        "op": kind(node).value,
        "weight": value_name(weight),
        "shape": list(w.shape),
        "weight_bits": bits,
        "activation_bits": x_bits,
        "granularity": form.granularity if form else None,
        "macs": work,
        "bit_operations": work * bits * x_bits,
        "parameters": w.numel() + biases,
        "bytes": stored + 4 * biases,
        "logical_bits": w.numel() * bits + 32 * biases,
        "integer": integer,
        "kernel": _kernel(node) if integer else None,
        "sqnr_weight": _finite(noise.get(value_name(weight))),
        "sqnr_output": _finite(noise.get(result)),
        "accumulator_headroom_bits": _headroom(m, node, weight) if integer else None,
        "reason": None if integer else reason,
    }


def _kernel(node: fx.Node) -> str:
    if kind(node) is Kind.LINEAR and len(node.meta["shape"]) != 2:
        return "MatMulIntegerToFloat"
    return _KERNELS.get(kind(node), kind(node).value)


def _headroom(m: QModel, node: fx.Node, weight: fx.Node) -> float | None:
    """Bits between the largest sum that any input can cause and the end of int32."""
    grid, x_grid = m.grid(value_name(weight)), m.grid(value_name(node.args[0]))  # type: ignore[arg-type]
    if grid is None or x_grid is None:
        return None
    codes = quantize(m.parameters[str(weight.target)], grid)
    reach = max(float((x_grid.hi - x_grid.zero).max()), float((x_grid.zero - x_grid.lo).max()))
    worst = codes.abs().movedim(grid.axis or 0, 0).flatten(1).sum(1) * reach
    bias = bias_of(node)
    if bias is not None:
        scale = (grid.scale * x_grid.scale).double()
        worst = worst + (m.parameters[str(bias.target)].double() / scale).abs()
    return 31 - math.log2(max(float(worst.max()), 1.0))


def _values(m: QModel, noise: Mapping[str, float], few: tuple[Tensor, ...]) -> list[dict[str, Any]]:
    """One row for each real value that the plan speaks of, with histograms before and after where it is quantized."""
    nodes = {value_name(n): n for n in tensors(m.graph) if is_real(n)}
    shown = {name: n for name, n in nodes.items() if m.plan.get(name) is not None}
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    tap = simulate(m)

    def keep_float(name: str, x: Tensor) -> Tensor:
        if name in shown:
            before[name] = _sample(x)
        return x

    def keep_quantized(name: str, x: Tensor) -> Tensor:
        y = tap(name, x)
        if name in shown:
            after[name] = _sample(y)
        return y

    if few:
        with torch.inference_mode():
            run(m.as_float(), few, keep_float)
            run(m, few, keep_quantized)
    return [_value(m, name, node, noise, before.get(name), after.get(name)) for name, node in shown.items()]


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().flatten()
    return flat[:: max(1, flat.numel() // 65536)].float().clone()


def _value(
    m: QModel, name: str, node: fx.Node, noise: Mapping[str, float], before: Tensor | None, after: Tensor | None
) -> dict[str, Any]:
    form, grid = m.plan[name], m.grid(name)
    assert form is not None and grid is not None  # only planned values are shown, and all have grids
    single = grid.scale.ndim == 0
    return {
        "name": name,
        "op": "parameter" if node.op == "get_attr" else "input" if node.op == "placeholder" else base_name(node),
        "kind": "weight" if node.op == "get_attr" else "activation",
        "format": str(form),
        "scale": float(grid.scale) if single else None,
        "zero_point": int(grid.zero) if single else None,
        "lo": int(grid.lo.min()),
        "hi": int(grid.hi.max()),
        "minimum": float(grid.minimum.min()),
        "maximum": float(grid.maximum.max()),
        "sqnr": _finite(noise.get(name)),
        "dead_channels": _dead(m, node),
        "tied_to": m.ties.get(name),
        "reason": None,
        "histogram": None if before is None or after is None else _histogram(before, after),
    }


def _dead(m: QModel, node: fx.Node) -> int:
    if node.op != "get_attr":
        return 0
    w = m.params[str(node.target)]
    return int((w.flatten(1).abs().amax(1) == 0).sum()) if w.ndim > 1 else 0


def _histogram(before: Tensor, after: Tensor) -> dict[str, Any]:
    low, high = float(min(before.min(), after.min())), float(max(before.max(), after.max()))
    high = high if high > low else low + 1.0
    counts = [torch.histc(t, _BINS, low, high).int().tolist() for t in (before, after)]
    return {"low": low, "high": high, "float": counts[0], "quantized": counts[1]}
