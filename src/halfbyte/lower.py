"""Bake a calibrated plan into a graph whose only new operations are quantize, dequantize and limits on codes.

The result is an ordinary model: the exporter translates it, ``integer`` evaluates it in integers, ``run`` in float.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid, quantize
from halfbyte.calibrate import bias_step, missing_grids
from halfbyte.errors import PlacementError
from halfbyte.formats import Format, container_bits
from halfbyte.graph import LAYERS, bias_of, drop_dead, layers, table_of, weight_of
from halfbyte.model import QModel, value_name
from halfbyte.ops import (
    CLIP_CODES,
    DEQUANTIZE,
    LINEAR,
    LOOKUP,
    LOWERED_LINEAR,
    QUANTIZE,
    REQUANTIZE,
    Kind,
    base_name,
    kind,
)

_DTYPES = {(8, False): torch.uint8, (8, True): torch.int8, (16, False): torch.uint16, (16, True): torch.int16}
_INT32 = 2**31 - 1


@dataclass
class _Lowering:
    """The graph under construction, and where each value of the source is found in it."""

    m: QModel
    graph: fx.Graph = field(default_factory=fx.Graph)
    params: dict[str, Tensor] = field(default_factory=dict)
    real: dict[fx.Node, fx.Node] = field(default_factory=dict)  # source node -> its real-valued node
    codes: dict[fx.Node, fx.Node] = field(default_factory=dict)  # source node -> its codes

    def constant(self, name: str, tensor: Tensor) -> fx.Node:
        """A node for a stored tensor."""
        node: fx.Node
        if name in self.params:
            node = next(n for n in self.graph.nodes if n.op == "get_attr" and n.target == name)
            return node
        self.params[name] = tensor
        node = self.graph.create_node("get_attr", name)
        node.meta = {"value": name, "shape": tuple(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        return node

    def call(self, target: Any, args: tuple[Any, ...], like: fx.Node, **meta: Any) -> fx.Node:
        """An operation that stands for a value of the source."""
        node = self.graph.create_node("call_function", target, args)
        node.meta = {**like.meta, **meta}
        return node

    def dequantized(self, source: fx.Node) -> fx.Node:
        """The real-valued view of a value that is held as codes."""
        if source not in self.real:
            name = value_name(source)
            grid = self.m.grid(name)
            assert grid is not None  # codes exist only where there is a grid
            scale, zero = self._grid_constants(source, grid)
            axis, bits = -1 if grid.axis is None else grid.axis, self.m.plan[name].bits  # type: ignore[union-attr]
            args = (self.codes[source], scale, zero, axis, grid.group or 0, bits, name)
            self.real[source] = self.call(DEQUANTIZE, args, source)
        return self.real[source]

    def _grid_constants(self, source: fx.Node, grid: Grid) -> tuple[fx.Node, fx.Node]:
        root = self.m.ties.get(value_name(source), value_name(source))
        dtype = code_dtype(self.m, value_name(source))
        return self.constant(f"{root}:scale", grid.scale), self.constant(f"{root}:zero", grid.zero.to(dtype))

    def quantized(self, source: fx.Node, x: fx.Node) -> None:
        """Codes for ``source`` from the real-valued node ``x``; limits only where the container does not set them."""
        name, grid = value_name(source), self.m.grid(value_name(source))
        assert grid is not None
        scale, zero = self._grid_constants(source, grid)
        axis = -1 if grid.axis is None else grid.axis
        dtype = code_dtype(self.m, name)
        written = name if self._container_limits(name, grid) else f"{name}:unclipped"
        node = self.call(QUANTIZE, (x, scale, zero, axis, written), source, dtype=str(dtype).removeprefix("torch."))
        node.meta["value"] = written
        self.codes[source] = self.clipped(source, node, grid)

    def _container_limits(self, name: str, grid: Grid) -> bool:
        """Whether the container's own saturation is all that limits the codes."""
        info = torch.iinfo(code_dtype(self.m, name))
        return bool((grid.lo <= info.min).all()) and bool((grid.hi >= info.max).all())

    def clipped(self, source: fx.Node, codes: fx.Node, grid: Grid) -> fx.Node:
        """The codes within the grid's limits."""
        dtype = code_dtype(self.m, value_name(source))
        if self._container_limits(value_name(source), grid):
            return codes
        limits = (
            self.constant(f"{value_name(source)}:{end}", t.to(dtype)) for end, t in (("lo", grid.lo), ("hi", grid.hi))
        )
        return self.call(CLIP_CODES, (codes, *limits), source, dtype=codes.meta["dtype"])


def code_dtype(m: QModel, value: str) -> torch.dtype:
    """The integer type that holds a value's codes."""
    form = m.plan[value]
    assert form is not None
    return _DTYPES[container_bits(form.bits), form.signed]


def weight_formats(m: QModel) -> dict[fx.Node, Format]:
    """The layers' weights that have a format."""
    weights = {w for n in layers(m.graph) if (w := weight_of(n)) is not None}
    return {w: form for w in weights if (form := m.plan.get(value_name(w))) is not None}


def _from_zero(grid: Grid) -> Grid:
    """The same numbers by codes less zero-point: an engine multiplies weights that need none fastest."""
    if grid.group is not None or not bool(grid.zero.any()):
        return grid
    return replace(grid, zero=torch.zeros_like(grid.zero), lo=grid.lo - grid.zero, hi=grid.hi - grid.zero)


def lower(m: QModel) -> QModel:
    """Make every quantization explicit. Raises :class:`PlacementError` if the model is not calibrated."""
    missing = missing_grids(m) if m.plan else ["(everything)"]
    if missing:
        raise PlacementError(f"value '{missing[0]}' has a format but no grid: calibrate the model before it is lowered")
    weights = {value_name(w) for w in weight_formats(m)}
    low = _Lowering(replace(m, grids={k: _from_zero(g) if k in weights else g for k, g in m.grids.items()}))
    for node in m.graph.nodes:
        _lower_node(low, node)
    drop_dead(low.graph)
    used = {str(n.target) for n in low.graph.nodes if n.op == "get_attr"}
    params = {k: v for k, v in low.params.items() if k in used}
    return replace(m.as_float(), graph=low.graph, params=params, target=m.target)


def _lower_node(low: _Lowering, node: fx.Node) -> None:
    planned = "value" in node.meta and low.m.plan.get(value_name(node)) is not None
    if node.op == "output":
        low.graph.output(tuple(_real(low, n) for n in node.args[0]))  # type: ignore[union-attr]
    elif node.op == "placeholder":
        low.real[node] = low.graph.create_node("placeholder", str(node.target))
        low.real[node].meta = dict(node.meta)
        if planned:
            low.quantized(node, low.real.pop(node))
    elif node.op == "get_attr":
        _lower_parameter(low, node, planned)
    elif kind(node) is Kind.SHAPE:
        low.real[node] = low.graph.node_copy(node, lambda n: _for_size(low, n))
    elif (planned or "list" in node.meta) and _moves_codes(low, node):
        _lower_move(low, node)
    elif planned and kind(node) is Kind.CLAMP:
        low.quantized(node, _real(low, node.args[0]))  # the grid's limits are the clamp
    else:
        result = _lower_operation(low, node)
        if planned:
            low.quantized(node, result)
        else:
            low.real[node] = result


def _real(low: _Lowering, node: Any) -> fx.Node:
    if (
        "list" in node.meta and node not in low.real
    ):  # a list of codes has no grid of its own: its items may be read either way
        low.real[node] = _lower_operation(low, node)
    return low.dequantized(node) if node in low.codes and "list" not in node.meta else low.real[node]


def _for_size(low: _Lowering, node: fx.Node) -> fx.Node:
    """Sizes are read from codes where there are codes: they have the same shape."""
    return low.codes[node] if node in low.codes else low.real[node]


def _lower_parameter(low: _Lowering, node: fx.Node, planned: bool) -> None:
    name, tensor = str(node.target), low.m.parameters[str(node.target)]
    if not planned:
        low.real[node] = low.constant(name, tensor)
        return
    grid = low.m.grid(value_name(node))
    assert grid is not None
    low.codes[node] = low.constant(f"{name}:codes", quantize(tensor, grid).to(code_dtype(low.m, value_name(node))))


def _moves_codes(low: _Lowering, node: fx.Node) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node) or source not in low.codes:
        return False
    return kind(node) is Kind.CODES or ("value" in node.meta and value_name(node) in low.m.ties)


def _lower_move(low: _Lowering, node: fx.Node) -> None:
    """An operation that moves codes works on them as they are; padding adds the code of zero."""
    source = node.args[0]
    grid = low.m.grid(value_name(node)) if "list" not in node.meta else None
    dtype = low.codes[source].meta.get("dtype")  # type: ignore[index]
    if kind(node) is Kind.CLAMP:
        assert grid is not None
        low.codes[node] = low.clipped(node, low.codes[source], grid)  # type: ignore[index]
        return
    args = fx.map_arg(node.args, lambda n: _for_size(low, n))
    if base_name(node) == "pad":
        assert grid is not None
        args = (args[0], args[1], "constant", int(grid.zero))
    meta = {"dtype": dtype} if "list" not in node.meta else {}
    low.codes[node] = low.call(node.target, args, node, **meta)
    low.codes[node].kwargs = fx.map_arg(node.kwargs, lambda n: _for_size(low, n))


def _lower_operation(low: _Lowering, node: fx.Node) -> fx.Node:
    if node.target is REQUANTIZE:
        return _real(low, node.args[0])
    table = table_of(node)
    if table is not None and table in low.codes:
        return _lower_embedding(low, node, table)
    weight = weight_of(node) if node.target in LAYERS else None
    if weight is not None and weight in low.codes:
        return _lower_layer(low, node, weight)
    result = low.call(node.target, fx.map_arg(node.args, lambda n: _real(low, n)), node)
    result.kwargs = fx.map_arg(node.kwargs, lambda n: _real(low, n))
    return result


def _lower_layer(low: _Lowering, node: fx.Node, weight: fx.Node) -> fx.Node:
    """A layer with integer weights; its bias becomes int32 at exactly input scale times weight scale."""
    x, bias_node, grid = node.args[0], bias_of(node), low.m.grid(value_name(weight))
    bias: fx.Node | None = low.real[bias_node] if bias_node is not None else None
    step = bias_step(low.m, node, grid) if grid is not None and x in low.codes else None
    if bias_node is not None and step is not None:
        bias = _integer_bias(low, node, bias_node, step)
    if node.target is LINEAR:
        return low.call(LOWERED_LINEAR, (_real(low, x), _transposed_weight(low, weight), bias), node)
    rest = fx.map_arg(node.args[3:], lambda n: _real(low, n))
    return low.call(node.target, (_real(low, x), _real(low, weight), bias, *rest), node)


def _lower_embedding(low: _Lowering, node: fx.Node, table: fx.Node) -> fx.Node:
    """Rows of codes are looked up before they are multiplied: the table as numbers would be four times as large."""
    name, grid = value_name(table), low.m.grid(value_name(table))
    assert grid is not None
    if grid.group is not None:
        raise PlacementError(
            f"table '{name}' has a scale for each group: an embedding has one for each row, or one for all"
        )
    rows = table.meta["shape"][0]
    scale = low.constant(f"{name}:rows.scale", grid.scale.reshape(-1, 1).expand(rows, 1).contiguous())
    return low.call(LOOKUP, (low.codes[table], scale, _real(low, node.args[1])), node)


def _transposed_weight(low: _Lowering, weight: fx.Node) -> fx.Node:
    name = value_name(weight)
    grid = low.m.grid(name)
    assert grid is not None
    if grid.group is not None:
        raise PlacementError(f"weight '{name}' has a scale for each group: no engine here multiplies that in integers")
    codes = low.constant(f"{name}:codes.transposed", low.params[f"{name}:codes"].t().contiguous())
    scale, zero = low.constant(f"{name}:scale", grid.scale), low.constant(f"{name}:zero", grid.zero.to(torch.int8))
    bits = low.m.plan[name].bits  # type: ignore[union-attr]
    args = (codes, scale, zero, -1 if grid.axis is None else 1, 0, bits, name)
    return low.call(DEQUANTIZE, args, weight, shape=tuple(reversed(weight.meta["shape"])))


def _integer_bias(low: _Lowering, node: fx.Node, bias_node: fx.Node, scale: Tensor) -> fx.Node:
    bias = low.m.parameters[str(bias_node.target)]
    codes = torch.round(bias.double() / scale.double()).clamp(-_INT32, _INT32).to(torch.int32)
    name = f"{value_name(node)}:bias"
    codes_node = low.constant(f"{name}:codes", codes)
    constants = (
        low.constant(f"{name}:scale", scale),
        low.constant(f"{name}:zero", torch.zeros_like(scale, dtype=torch.int32)),
    )
    axis = -1 if scale.ndim == 0 else 0
    return low.call(DEQUANTIZE, (codes_node, *constants, axis, 0, 32, name), bias_node)
