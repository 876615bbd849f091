"""ONNX Runtime on this machine: sessions, the graph it really runs, and whether its 8-bit products are exact."""

import contextlib
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from halfbyte.sessions import session as session  # noqa: PLC0414 - callers know it as engine.session

# Operations that do arithmetic on codes, as ONNX Runtime names them after fusion.
INTEGER_KERNELS = (
    "QLinearConv QGemm QLinearMatMul MatMulIntegerToFloat MatMulInteger ConvInteger QLinearAdd QLinearMul QLinearConcat "
    "QLinearAveragePool QLinearGlobalAveragePool QLinearSigmoid QLinearLeakyRelu QLinearSoftmax QLinearWhere DynamicQuantizeMatMul"
).split()
# Operations beside these compute; these move data, convert it, work on sizes, or keep the engine from a fusion (a sum of one).
_MOVES = set(
    "Cast Clip Concat Constant ConstantOfShape DequantizeLinear Expand Flatten Gather Identity MaxPool Max Min Pad QuantizeLinear "
    "NhwcMaxPool Range ReorderInput ReorderOutput Reshape Shape Size Slice Split Squeeze Tile Transpose "
    "Unsqueeze DepthToSpace SpaceToDepth Sum".split()
)


def infer(s: Any, inputs: Sequence[Any], outputs: Sequence[str] | None = None) -> list[np.ndarray[Any, Any]]:
    """Run a session (ONNX Runtime's, or one with its face) on one array or tensor for each input.

    A file of a fixed batch runs as often as it takes; the last portion is filled up, and what was added is cut off.
    """
    arrays = [t.detach().cpu().numpy() if isinstance(t, torch.Tensor) else np.asarray(t) for t in inputs]
    wanted, names = list(outputs) if outputs is not None else None, [i.name for i in s.get_inputs()]
    fixed, count = fixed_batch(s), len(arrays[0])
    if fixed is None or fixed == count or not count:
        return list(s.run(wanted, dict(zip(names, arrays, strict=True))))
    parts = []
    for start in range(0, count, fixed):
        portion = [np.take(a, range(start, start + fixed), 0, mode="clip") for a in arrays]
        parts.append(s.run(wanted, dict(zip(names, portion, strict=True))))
    # Of windows, several rows belong to a sample.
    return [np.concatenate(p)[: count * len(p[0]) // fixed] for p in zip(*parts, strict=True)]


def fixed_batch(s: Any) -> int | None:
    """The batch that a file is made for; None where it is free."""
    shape = s.get_inputs()[0].shape
    return shape[0] if len(shape) and isinstance(shape[0], int) else None


def optimized_graph(model: str | Path | bytes) -> onnx.ModelProto:
    """The graph after all of the engine's optimizations: what really runs."""
    with _scratch() as folder:
        session(model, optimized=folder / "optimized.onnx")
        return onnx.load(str(folder / "optimized.onnx"), load_external_data=False)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="halfbyte-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def kernels(graph: onnx.ModelProto) -> tuple[Mapping[str, int], list[tuple[str, str]]]:
    """Integer kernels by count, and (operation, node name) of what computes in float."""
    integer: dict[str, int] = {}
    floats: list[tuple[str, str]] = []
    types = {
        v.name: v.type.tensor_type.elem_type for v in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output)
    }
    for node in graph.graph.node:
        if node.op_type in INTEGER_KERNELS:
            integer[node.op_type] = integer.get(node.op_type, 0) + 1
        elif (
            node.op_type not in _MOVES
            and not _repeats(node)
            and types.get(node.output[0]) in (None, TensorProto.FLOAT, TensorProto.FLOAT16)
        ):
            floats.append((node.op_type, node.name))
    return integer, floats


def _repeats(node: onnx.NodeProto) -> bool:
    """A resize that only repeats values."""
    return node.op_type == "Resize" and any(a.name == "mode" and a.s == b"nearest" for a in node.attribute)


@functools.cache
def saturates() -> bool:
    """Whether this CPU's kernels add pairs of uint8 x int8 products in 16 bits, saturating (AVX2 and AVX-512 without VNNI)."""
    k = 64
    weight = numpy_helper.from_array(np.full((k, 16), 127, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [16, k])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [16, 16])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    product = infer(session(model.SerializeToString()), [np.full((16, k), 255, np.uint8)])[0]
    return bool((product != 255 * 127 * k).any())


@functools.cache
def fuses_additions() -> bool:
    """Whether the kernel of QLinearAdd rounds once for each multiply-add (FMA instructions) instead of twice.

    Found by asking: all pairs of codes at scales where the two ways of rounding meet ties of the output.
    """
    scales = {"a": 0.3, "b": 0.7, "y": 1.0}
    names = [("a", "as", "az"), ("b", "bs", "bz")]
    constants = [numpy_helper.from_array(np.array(v, np.float32), f"{k}s") for k, v in scales.items()]
    zeros = {"a": 0, "b": 117, "y": 0}
    constants += [numpy_helper.from_array(np.array(v, np.uint8), f"{k}z") for k, v in zeros.items()]
    a, b = (v.reshape(-1).astype(np.uint8) for v in np.meshgrid(np.arange(256), np.arange(256)))
    nodes = [helper.make_node("DequantizeLinear", list(n), [n[0] + "r"]) for n in names]
    nodes += [
        helper.make_node("Add", ["ar", "br"], ["yr"]),
        helper.make_node("QuantizeLinear", ["yr", "ys", "yz"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.UINT8, [a.size]) for n in ("a", "b")]
    graph = helper.make_graph(
        nodes, "probe", inputs, [helper.make_tensor_value_info("y", TensorProto.UINT8, [a.size])], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    got = infer(session(model.SerializeToString()), [a, b])[0].astype(np.int64)
    wrong = []
    for fused in (True, False):
        codes = [torch.from_numpy(v.astype(np.float32)) for v in (a, b)]
        ratio = [
            torch.tensor(scales[k], dtype=torch.float32) / torch.tensor(scales["y"], dtype=torch.float32) for k in "ab"
        ]
        shift = -multiply_add(ratio[0], torch.tensor(float(zeros["a"])), ratio[1] * zeros["b"], fused)
        sums = multiply_add(codes[0], ratio[0], multiply_add(codes[1], ratio[1], shift, fused), fused)
        wrong.append(int((torch.round(sums).clamp(0, 255).numpy().astype(np.int64) != got).sum()))
    return wrong[0] <= wrong[1]  # hundreds of pairs differ between the two


def multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, fused: bool) -> torch.Tensor:
    """``a * b + c`` in float32, rounded once (fused) or twice. A product of two float32 numbers is exact in float64."""
    return (a.double() * b.double() + c.double()).float() if fused else a * b + c


def instruction_set() -> str:
    """The vector instructions in use, and whether 8-bit products are exact with them."""
    exact = "int8 products saturate in pairs" if saturates() else "exact int8 products"
    return f"{torch.backends.cpu.get_cpu_capability()}, {exact}"
