"""What each layer costs at each pair of widths: bytes in the file, logical bits, bit operations, measured time.

Bytes are those of the tensors that the ONNX exporter stores; names and the graph itself come on top. Bit operations are
multiply-accumulates times both widths (arXiv 2006.10518, section 4).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from halfbyte.affine import expand, quantize
from halfbyte.formats import Bits, Format, container_bits
from halfbyte.graph import bias_of, by_value, layers, macs, tensor_inputs, tensors, weight_of
from halfbyte.model import QModel, value_name
from halfbyte.ops import CONV_TRANSPOSE, LINEAR, Kind, kind
from halfbyte.units import Candidates, Choice, Reader, Units, units

# Seconds of one layer alone in the target's engine, at a pair of widths; None: in float.
Latency = Callable[[QModel, fx.Node, Bits | None], float]
KINDS = ("size", "logical_size", "bops", "latency")
_FASTER = 0.97  # of the widest pair's time: less is noise


@dataclass(frozen=True)
class CostRow:
    """One layer at one pair of widths: bytes stored, logical bits, bit operations for a sample, and seconds if measured.

    group: what it reads, None where that is float (activations is 32 then). A weight that several layers share is stored once,
    with the first of them.
    """

    layer: str
    weight: str
    group: str | None
    weights: int
    activations: int
    size: int
    logical_size: int
    bops: int
    latency: float | None = None


@dataclass(frozen=True)
class CostTable:
    """Rows for every layer and pair of widths.

    grids: unit of running values -> width -> bytes of its grid. rest: what does not depend on the choice. reference: what
    the float network costs, by kind: size (bytes), logical_size (bits), bops (operations of 32 x 32 bits), latency (seconds).
    """

    rows: tuple[CostRow, ...]
    grids: Mapping[str, Mapping[int, int]]
    rest: Mapping[str, float]
    reference: Mapping[str, float]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the table tells: latency only where it was measured."""
        return tuple(k for k in KINDS if k in self.reference)

    def total(self, choice: Choice) -> dict[str, float]:
        """The whole network's cost at a complete choice, by kind."""
        found = dict(self.rest)
        for row in self.rows:
            if choice[row.weight] == row.weights and (row.group is None or choice[row.group] == row.activations):
                for kind_ in self.kinds:
                    found[kind_] += getattr(row, kind_)
        found["size"] += sum(sizes[choice[unit]] for unit, sizes in self.grids.items())
        return found

    def not_faster(self) -> list[tuple[str, Bits]]:
        """Layers and pairs of widths that the engine runs no faster than the widest pair; empty if latency was not measured."""
        by_layer: dict[str, list[CostRow]] = {}
        for row in self.rows:
            by_layer.setdefault(row.layer, []).append(row)
        found = []
        for name, rows in by_layer.items():
            most = _FASTER * (max(rows, key=lambda r: (r.weights, r.activations)).latency or 0.0)
            slow = [r for r in rows[:-1] if r.latency is not None and r.latency >= most]
            found += [(name, Bits(r.weights, min(r.activations, 16))) for r in slow]
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rows": [dict(vars(r)) for r in self.rows],
            "grids": {u: {str(w): n for w, n in sizes.items()} for u, sizes in self.grids.items()},
            "rest": dict(self.rest),
            "reference": dict(self.reference),
            "not_faster": [{"layer": n, "bits": str(b)} for n, b in self.not_faster()],
        }


def costs(candidates: Candidates, *, latency: Latency | None = None) -> CostTable:
    """The costs of every layer at every pair of widths that the candidates have.

    latency: measures one layer alone, as :class:`EngineLatency` does; without it there are no times. Fractions of a budget refer
    to ``reference``: float32 parameters, 32 x 32-bit operations, the layers' time in float.
    """
    u, m = units(candidates), candidates[max(candidates)]
    nodes, stored = by_value(m.graph), set()
    rows: list[CostRow] = []
    for reader in u.readers:
        layer = nodes[reader.name]
        for w in u.widths[reader.weight]:
            own = next(c for c in candidates.values() if (f := c.plan[reader.weight]) is not None and f.bits == w)
            for a in u.widths[reader.group] if reader.group is not None else (32,):
                seconds = None if latency is None or a > 16 else latency(m, layer, Bits(w, a))
                if latency is not None and seconds is None:
                    seconds = latency(m, layer, None)
                rows.append(_row(own, layer, reader, w, a, seconds, first=reader.weight not in stored))
        stored.add(reader.weight)
    grids = {unit: _grid_sizes(candidates, u, unit) for unit in u.groups}
    timed = {"latency": sum(latency(m, nodes[r.name], None) for r in u.readers)} if latency is not None else {}
    parameters = sum(t.numel() for n, t in m.params.items() if n in _named(m))
    work = sum(macs(n) for n in m.graph.nodes)
    reference = {"size": 4.0 * parameters, "logical_size": 32.0 * parameters, "bops": 1024.0 * work, **timed}
    return CostTable(tuple(rows), grids, {**_rest(m, u), **dict.fromkeys(timed, 0.0)}, reference)


def _named(m: QModel) -> set[str]:
    return {str(n.target) for n in m.graph.nodes if n.op == "get_attr"}


def code_bytes(count: int, bits: int, *, signed: bool = True) -> int:
    """Bytes of so many codes as they are stored: signed ones of 4 and fewer bits in pairs."""
    return (count + 1) // 2 if bits <= 4 and signed else count * container_bits(bits) // 8


def zero_point_bytes(m: QModel, value: str, name: str) -> int:
    """Bytes of what zero-points take off the codes of a weight that is stored in pairs: a number for each scale, where any is needed.

    Without a grid yet, as many as there may be.
    """
    form, grid, w = m.plan[value], m.grid(value), m.parameters[name]
    if form is None or form.symmetric or form.bits > 4:
        return 0
    if grid is not None:
        codes = quantize(w, grid) - expand(grid.zero.float(), grid, w)
        if float((codes + 0.5).abs().max()) < 8:  # all in -8..7
            return 0
    return 1 if form.axis is None else w.shape[form.axis]


def _row(m: QModel, layer: fx.Node, reader: Reader, w: int, a: int, seconds: float | None, *, first: bool) -> CostRow:
    weight, bias, form = weight_of(layer), bias_of(layer), m.plan[reader.weight]
    assert weight is not None and form is not None
    values = m.params[str(weight.target)]
    scales = 1 if form.axis is None else values.shape[form.axis]
    biases = 0 if bias is None else m.params[str(bias.target)].numel()
    flat = layer.target is not LINEAR or len(layer.meta["shape"]) == 2
    integer = reader.group is not None and flat and layer.target is not CONV_TRANSPOSE
    # an int32 bias comes with a scale for each scale of the weight, and as many zero points
    size = (4 * biases + 8 * scales if integer else 4 * biases) if biases else 0
    logical = 32 * biases
    if first:
        size += code_bytes(values.numel(), w) + scales * (4 + container_bits(w) // 8)
        size += zero_point_bytes(m, reader.weight, str(weight.target))
        logical += values.numel() * w
    return CostRow(reader.name, reader.weight, reader.group, w, a, size, logical, macs(layer) * w * a, seconds)


def _grid_sizes(candidates: Candidates, u: Units, unit: str) -> dict[int, int]:
    """Bytes of scale, zero point, and limits where the container does not set them."""
    found: dict[int, int] = {}
    for m in candidates.values():
        form = m.plan[unit]
        assert form is not None
        code = container_bits(form.bits) // 8
        whole = Format(8 * code, signed=form.signed)
        size = 4 + code
        for value in u.groups[unit]:
            grid = m.grids.get(value)
            if grid is not None and (bool((grid.lo > whole.lo).any()) or bool((grid.hi < whole.hi).any())):
                size += (grid.lo.numel() + grid.hi.numel()) * code
        found[form.bits] = max(size, found.get(form.bits, 0))
    return found


def _rest(m: QModel, u: Units) -> dict[str, float]:
    """Parameters of no quantized layer, and products of running values, at the widest."""
    done = set()
    size = logical = work = 0
    nodes = by_value(m.graph)
    for reader in u.readers:
        done |= {n for n in (weight_of(nodes[reader.name]), bias_of(nodes[reader.name])) if n is not None}
    for node in tensors(m.graph):
        if node.op == "get_attr" and node not in done and str(node.target) in m.params:
            t, form = m.params[str(node.target)], m.plan.get(value_name(node))
            size += (
                t.numel() * t.element_size() if form is None else code_bytes(t.numel(), form.bits, signed=form.signed)
            )
            size += 0 if form is None or form.axis is None else 4 * t.shape[form.axis]
            logical += t.numel() * (8 * t.element_size() if form is None else form.bits)
    readers = {r.name for r in u.readers}
    for node in (*layers(m.graph), *(n for n in m.graph.nodes if kind(n) is Kind.MATMUL)):
        if node.meta.get("value") not in readers:
            forms = [m.plan.get(value_name(i)) for i in tensor_inputs(node)[:2]]
            work += macs(node) * math.prod(32 if form is None else form.bits for form in forms)
    return {"size": float(size), "logical_size": float(logical), "bops": float(work)}
