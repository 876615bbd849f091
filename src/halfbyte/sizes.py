"""How large the file of a planned model will be, before any range is known."""

from dataclasses import dataclass, replace

import torch

from halfbyte.affine import Grid
from halfbyte.costs import zero_point_bytes
from halfbyte.formats import Format
from halfbyte.graph import bias_of, layers, tensors
from halfbyte.lower import lower, weight_formats
from halfbyte.model import QModel, value_name
from halfbyte.ops import DEQUANTIZE

_NODE_BYTES = 300  # of the file for an operation with its names and those of what it reads, measured on real networks
_TAKEN_OFF_BYTES = 270  # of the three operations that put zero-points back, with their names


@dataclass(frozen=True)
class Sizes:
    """logical_bytes: parameters at the widths of the plan. file_bytes: the ONNX file, to some percent. operations: in it."""

    logical_bytes: int
    file_bytes: int
    operations: int


def sizes(placed: QModel, container: str = "packed") -> Sizes:
    """Sizes of a model that has a plan; grids are not needed."""
    low = lower(replace(placed, grids=_any_grids(placed)).to("cpu"))
    nodes = sum(1 for n in low.graph.nodes if n.op == "call_function")
    stored = _stored_bytes(low, packed=container == "packed")
    if container == "packed":
        taken_off = [zero_point_bytes(placed, value_name(w), str(w.target)) for w in weight_formats(placed)]
        stored += sum(count + _TAKEN_OFF_BYTES for count in taken_off if count)
    return Sizes(_logical_bits(placed) // 8, stored + _NODE_BYTES * nodes, nodes)


def _any_grids(m: QModel) -> dict[str, Grid]:
    """Grids of the right shapes that mean nothing: sizes do not depend on scales."""
    parameters = {value_name(n): m.params[str(n.target)] for n in tensors(m.graph) if n.op == "get_attr"}
    return {
        name: _any_grid(form, parameters.get(name))
        for name, form in m.plan.items()
        if form is not None and name not in m.ties
    }


def _any_grid(form: Format, parameter: torch.Tensor | None) -> Grid:
    shape = () if form.axis is None or parameter is None else (parameter.shape[form.axis],)
    lo, hi = (torch.tensor(x, dtype=torch.int32) for x in (form.lo, form.hi))
    return Grid(torch.ones(shape), torch.zeros(shape, dtype=torch.int32), lo, hi, axis=form.axis)


def _stored_bytes(low: QModel, *, packed: bool) -> int:
    """Bytes of the tensors of the exported file: weights of 4 and fewer bits in pairs where they are packed."""
    narrow = {
        str(n.args[0].target)
        for n in low.graph.nodes
        if n.target is DEQUANTIZE and n.args[5] <= 4 and n.args[0].op == "get_attr"
    }
    return sum(
        (t.numel() + 1) // 2 if packed and name in narrow and t.dtype == torch.int8 else t.numel() * t.element_size()
        for name, t in low.params.items()
    )


def _logical_bits(m: QModel) -> int:
    biases = {bias_of(n) for n in layers(m.graph)}
    bits = 0
    for node in m.graph.nodes:
        if node.op == "get_attr" and "value" in node.meta:
            form, t = m.plan.get(value_name(node)), m.params[str(node.target)]
            width = 32 if form is None or node in biases else form.bits
            bits += t.numel() * width
    return bits
