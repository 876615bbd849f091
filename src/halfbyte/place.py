"""Target and graph -> plan: which values are quantized, which share a grid, which stay in float and why.

The plan follows demand. Convolutions, linear layers and matrix products run in integers wherever the target can; what only
follows them (additions, concatenations, pooling) does where all its readers want integers, or where its inputs are codes
anyway. A float operation stops the demand, and a value that integer kernels and float operations both read is rounded for
the kernels alone. Source of the rules: arXiv 2106.08295, section 2.3, and the engines' kernels (see ``targets``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from halfbyte.errors import PlacementError
from halfbyte.formats import Format
from halfbyte.graph import (
    RESIDUAL,
    activation_inputs,
    channel_axis,
    drop_dead,
    groups,
    has_computed_bias,
    is_output,
    is_real,
    layers,
    per_sample,
    replace_uses,
    table_of,
    tensor_inputs,
    tensors,
    weight_of,
)
from halfbyte.model import LogEntry, QModel, Target, editable, value_name
from halfbyte.ops import CONV_TRANSPOSE, REQUANTIZE, Kind, base_name, kind
from halfbyte.overrides import Overrides, apply_overrides, check_overrides, kept_in_float
from halfbyte.targets import activation_format, here, weight_format

COMPUTE = (Kind.CONV, Kind.CONV_TRANSPOSE, Kind.LINEAR, Kind.MATMUL)
FOLLOWING = (Kind.ADD, Kind.MUL, Kind.CONCAT, Kind.AVERAGE)
_SPARED_BITS = 8  # of the first and the last layer, and of sums
MOVING = (Kind.CODES, Kind.CLAMP, Kind.REQUANTIZE)


@dataclass
class _Marks:
    """Which operations run on codes, and why others do not."""

    target: Target
    integer: set[fx.Node] = field(default_factory=set)
    reasons: dict[fx.Node, str] = field(default_factory=dict)

    def writes_codes(self, node: fx.Node) -> bool:
        """The kernel can write nothing but codes."""
        return node in self.integer and kind(node) not in MOVING and kind(node).value not in self.target.float_output

    def fused(self, node: fx.Node) -> bool:
        """A clamp that alone reads what it clamps: its limits become limits of the codes written behind it."""
        if kind(node) is not Kind.CLAMP:
            return False
        source = node.args[0]
        alone = isinstance(source, fx.Node) and len(source.users) == 1 and source.op == "call_function"
        return alone and kind(source) not in MOVING  # type: ignore[arg-type]

    def absorbed(self, node: fx.Node) -> bool:
        """The value exists only inside a kernel, in front of a fused clamp that carries codes."""
        if len(node.users) != 1 or is_output(node):
            return False
        (reader,) = node.users
        return self.fused(reader) and self.carries(reader)

    def carries(self, node: fx.Node) -> bool:
        """The value is held as codes."""
        if not is_real(node):
            return False
        if kind(node) is Kind.CLAMP and self.fused(node) and self.writes_codes(node.args[0]):  # type: ignore[arg-type]
            return True
        return self.writes_codes(node) or any(self.reads_codes(u, node) for u in node.users)

    def reads_codes(self, reader: fx.Node, node: fx.Node) -> bool:
        """The reader takes this value as codes (weights and biases of layers are planned on their own)."""
        if reader not in self.integer or (node.op == "get_attr" and kind(reader) in (*COMPUTE, Kind.CLAMP)):
            return False
        return not self.fused(reader)


def place(
    m: QModel,
    target: str | Target,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    uniform: bool = True,
    narrow: bool = False,
    symmetric_weights: bool = False,
    overrides: Overrides | None = None,
) -> QModel:
    """Give every value that the target can use in integers a format.

    target: what runs the network, or its name. weight_bits, activation_bits: widths. uniform: every layer gets them; else the first
    and the last layer keep 8 bits where fewer were asked for, and so does what no other layer multiplies, such as the operands of
    an addition. narrow: layers get copies of their own of what sums read, whatever the widths, so that widths can be chosen later.
    symmetric_weights: none has a zero-point, though the target takes them at few bits. overrides: glob over values and modules, or
    ``type:conv`` -> None to keep operations in float, :class:`Bits` for the weights of the layers that it matches and for what
    they read (for the values, where it matches no layer), or a :class:`Format`, whose width counts for the values that it matches.
    Values that stay in float are in the plan as None,
    with the reason in the log. Raises :class:`PlacementError` where nothing is left to quantize, or where the target cannot run
    the width.
    """
    target, overrides = here(target), overrides or {}
    for what, bits in (("weights", weight_bits), ("activations", activation_bits)):
        if bits not in target.widths:
            raise PlacementError(
                f"target {target.name} runs {what} of {target.widths[0]} to {target.widths[-1]} bits, not {bits}: choose one of these"
            )
    m = replace(m, graph=editable(m.graph)) if not m.plan else unplaced(m)  # another plan needs other grids
    check_overrides(m, overrides, target)
    marks = _mark(m.graph, target, overrides)
    _insert_requantize(m.graph, marks)
    if narrow or (not uniform and activation_bits < _SPARED_BITS):
        _insert_narrow(m.graph, marks)
    plan: dict[str, Format | None] = {}
    axes: dict[str, int | None] = {}
    log: list[LogEntry] = []
    for node in m.graph.nodes:
        weight = weight_of(node) if kind(node) in COMPUTE[:3] else None
        if weight is not None and (node in marks.integer or _stored_only(node, marks)):
            axes[value_name(weight)] = _scale_axis(node)
            plan[value_name(weight)] = weight_format(target, weight_bits, _scale_axis(node))
            if node not in marks.integer:
                log.append(
                    LogEntry("place", value_name(weight), f"stored in {weight_bits} bits: {marks.reasons[node]}")
                )
    stored = Format(max(_SPARED_BITS, weight_bits), signed=True, symmetric=True, narrow=True, axis=0)
    tables = dict.fromkeys((n for n in _stored_tables(m.graph, target, overrides) if n not in plan), stored)
    plan |= tables
    log += [LogEntry("place", name, f"stored in {stored.bits} bits: rows of it are looked up") for name in tables]
    for node in tensors(m.graph):
        if marks.carries(node) and not marks.absorbed(node):
            plan[value_name(node)] = activation_format(target, activation_bits)
    ties = _ties(m.graph, plan)
    if not uniform:
        log += _spared(m.graph, plan, ties)
    log += apply_overrides(m.graph, plan, ties, overrides)
    log += _in_accumulators(m.graph, plan, marks)
    log += _left_in_float(m.graph, plan, marks)
    for name, axis in axes.items():  # what the width decides, by the width that the weight has got
        if (form := plan[name]) is not None:
            plan[name] = weight_format(target, form.bits, axis, symmetric=symmetric_weights)
    if not any(plan.values()):
        raise PlacementError(
            "; ".join(["nothing in this network can be quantized for this target", *map(str, log[:3])])
        )
    return replace(m, plan=plan, ties=ties, target=target).logged(*log)


def _in_accumulators(graph: fx.Graph, plan: dict[str, Format | None], marks: _Marks) -> list[LogEntry]:
    """A layer that alone goes into a sum is not rounded in front of it; of two such layers, the first operand."""
    log = []
    for node in graph.nodes if marks.target.fused_sums else ():
        if kind(node) is Kind.ADD and node in marks.integer:
            alone = [n for n in node.all_input_nodes if kind(n) in COMPUTE and n in marks.integer and len(n.users) == 1]
            for layer in alone[:1] if len(node.all_input_nodes) == 2 else []:
                plan[value_name(layer)] = None
                log.append(LogEntry("place", value_name(layer), "not rounded: the layer adds the other operand first"))
    return log


def unplaced(m: QModel) -> QModel:
    """The float network under a placed one: without the copies for integer kernels, and with every value in one part."""
    graph = editable(m.graph)
    for twin in [n for n in layers(graph) if value_name(n).endswith(RESIDUAL)]:  # zero where nothing is rounded
        (total,) = twin.users
        main = next(n for n in total.all_input_nodes if n is not twin)
        main.meta["value"] = value_name(total)
        replace_uses(total, main)
        graph.erase_node(total)
    drop_dead(graph)
    for node in [n for n in graph.nodes if n.target is REQUANTIZE]:
        replace_uses(node, tensor_inputs(node)[0])
        graph.erase_node(node)
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return replace(m.as_float(), graph=graph, params={k: t for k, t in m.params.items() if k in read})


def _ends(every: list[fx.Node]) -> list[fx.Node]:
    """The first and the last layer."""
    return every[:1] + every[-1:]


def _insert_narrow(graph: fx.Graph, marks: _Marks) -> None:
    """Where a sum and layers read the same value, the layers get a copy of fewer bits, and the sum keeps the wide one."""
    ends = _ends([n for n in layers(graph) if n in marks.integer])
    for node in list(tensors(graph)):
        if not marks.carries(node) or marks.absorbed(node) or node.op == "get_attr":
            continue
        narrow = [u for u in node.users if kind(u) in COMPUTE and u in marks.integer and u not in ends]
        wide = [u for u in node.users if u not in narrow and kind(u) in FOLLOWING and u in marks.integer]
        if narrow and wide:
            with graph.inserting_after(node):
                copy = graph.create_node("call_function", REQUANTIZE, (node,))
            copy.meta = {**node.meta, "value": value_name(node) + ":quantized"}
            marks.integer.add(copy)
            for user in narrow:
                user.replace_input_with(node, copy)


def _scale_axis(layer: fx.Node) -> int | None:
    """Along which dimension of its weight a layer's output channels lie; None if they are spread over groups of inputs."""
    inputs, outputs = weight_of(layer).meta["shape"][:2]  # type: ignore[union-attr]
    if layer.target is CONV_TRANSPOSE and groups(layer) > 1 and (outputs != 1 or inputs != groups(layer)):
        return None
    return channel_axis(layer)


def _spared(graph: fx.Graph, plan: dict[str, Format | None], ties: Mapping[str, str]) -> list[LogEntry]:
    """Widen to 8 bits the first and the last layer, and running values that no other layer multiplies."""
    every = [n for n in layers(graph) if plan.get(value_name(n.args[1])) is not None]  # type: ignore[arg-type]
    ends = _ends(every)
    narrow = set()
    for node in graph.nodes:
        if kind(node) in COMPUTE and node not in ends:
            read = (value_name(n) for n in activation_inputs(node))
            narrow |= {ties.get(name, name) for name in read}
    weights = {value_name(w) for n in every if (w := weight_of(n)) is not None}
    kept = {value_name(w) for n in ends if (w := weight_of(n)) is not None}
    widened = []
    for name, form in plan.items():
        spared = name in kept if name in weights else ties.get(name, name) not in narrow
        if form is not None and form.bits < _SPARED_BITS and spared:
            plan[name] = replace(form, bits=_SPARED_BITS)
            widened.append(name)
    found = [
        LogEntry("place", n, f"keeps {_SPARED_BITS} bits: the first or the last layer") for n in widened if n in kept
    ]
    values = len(widened) - len(found)
    if values:
        text = f"{values} running values keep {_SPARED_BITS} bits: no layer but the first and the last multiplies them"
        found.append(LogEntry("place", None, text))
    return found


def _mark(graph: fx.Graph, target: Target, overrides: Overrides) -> _Marks:
    """Decide operation by operation: backwards by demand, then forwards where the inputs are codes anyway."""
    marks = _Marks(target)
    wanted: set[fx.Node] = set()  # some reader, perhaps behind moves, runs on codes
    able = {
        n
        for n in graph.nodes
        if kind(n) in (*FOLLOWING, *MOVING) and _able(n, target) and not kept_in_float(n, overrides)
    }
    for node in reversed(graph.nodes):
        readers = [u for u in node.users if kind(u) is not Kind.SHAPE]
        if kind(node) in COMPUTE:
            marks.reasons[node] = (
                "kept in float on request" if kept_in_float(node, overrides) else _why_float(node, target)
            )
            if not marks.reasons[node]:
                marks.integer.add(node)
        elif node in able:
            rounded = target.rounded_averages and base_name(node).startswith("avg_pool")
            if rounded or any(u in marks.integer or u in wanted for u in readers):
                wanted.add(node)
            if readers and all(u in marks.integer for u in readers):
                marks.integer.add(node)
    for node in graph.nodes:
        if node in wanted and all(_holds_codes(i, marks) for i in activation_inputs(node)):
            marks.integer.add(node)
        if kind(node) in FOLLOWING and node not in marks.integer:
            marks.reasons[node] = (
                "a float operation reads the result, so that integers would only add error"
                if node in able
                else f"{target.name} has no integer kernel for this {kind(node).value}"
            )
    return marks


def _holds_codes(node: fx.Node, marks: _Marks) -> bool:
    if kind(node) is Kind.CLAMP and marks.fused(node):
        return marks.writes_codes(node.args[0])  # type: ignore[arg-type]
    return marks.writes_codes(node) or (
        node in marks.integer and kind(node) in MOVING and _holds_codes(tensor_inputs(node)[0], marks)
    )


def _able(node: fx.Node, target: Target) -> bool:
    """The target can do this on codes, and all that it reads and writes are real numbers."""
    if kind(node).value not in target.integer or (kind(node) is Kind.CONCAT and len(tensor_inputs(node)) < 2):
        return False
    involved = [n for n in (node, *tensor_inputs(node)) if "list" not in n.meta]
    return all(is_real(n) for n in involved)


def _why_float(node: fx.Node, target: Target) -> str:
    what = kind(node)
    if what.value not in target.integer:
        return f"{target.name} has no integer kernel for {what.value}"
    if not all(is_real(i) for i in tensor_inputs(node)):
        return "its inputs are not real numbers"
    if what is Kind.MATMUL:
        constant = any(i.op == "get_attr" for i in tensor_inputs(node))
        return "one factor is a parameter of more than two dimensions" if constant else ""
    if weight_of(node) is None or not activation_inputs(node):
        return "its weight is computed at run time, or its input is constant"
    return "its bias is computed at run time" if has_computed_bias(node) else ""


def _stored_only(node: fx.Node, marks: _Marks) -> bool:
    """No integer kernel, but the weight can still be stored in integers, for the size of the file."""
    return bool(
        kind(node) is Kind.CONV_TRANSPOSE and node.args[6] == 1 and "no integer kernel" in marks.reasons.get(node, "")
    )


def _stored_tables(graph: fx.Graph, target: Target, overrides: Overrides) -> list[str]:
    """Tables of which only rows are looked up, fewer for a sample than there are: each row can be stored in integers."""
    found = []
    for table in graph.nodes:
        readers = [u for u in table.users if table_of(u) is table and not kept_in_float(u, overrides)]
        if readers and len(readers) == len(table.users) and Kind.EMBEDDING.value in target.integer:
            looked_up = sum(per_sample(u.args[1].meta["shape"]) for u in readers)
            if looked_up < table.meta["shape"][0]:
                found.append(value_name(table))
    return found


def _insert_requantize(graph: fx.Graph, marks: _Marks) -> None:
    """Where float operations read a float value that kernels want as codes, the kernels get a rounded copy."""
    for node in list(tensors(graph)):
        if not is_real(node) or node.op == "get_attr" or _holds_codes(node, marks):
            continue
        readers = [u for u in node.users if marks.reads_codes(u, node)]
        others = [u for u in node.users if u not in readers and kind(u) is not Kind.SHAPE]
        if readers and others:
            with graph.inserting_after(node):
                copy = graph.create_node("call_function", REQUANTIZE, (node,))
            copy.meta = {**node.meta, "value": value_name(node) + ":quantized"}
            for user in readers:
                user.replace_input_with(node, copy)


def _ties(graph: fx.Graph, plan: Mapping[str, Format | None]) -> dict[str, str]:
    """Values that are moved or clamped codes share the grid of the value that the codes come from."""
    roots: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if kind(node) not in (Kind.CODES, Kind.CLAMP) or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        root = roots.get(source) or (
            value_name(source) if "value" in source.meta and plan.get(value_name(source)) else None
        )
        if root is not None and ("list" in node.meta or plan.get(value_name(node)) is not None):
            roots[node] = root
    return {value_name(n): root for n, root in roots.items() if "list" not in n.meta}


def _left_in_float(graph: fx.Graph, plan: dict[str, Format | None], marks: _Marks) -> list[LogEntry]:
    """Mark every other real value as float; say why where a user would have expected integers."""
    log = []
    for node in tensors(graph):
        name = value_name(node)
        if not is_real(node):
            continue
        reason = marks.reasons.get(node, "")
        if kind(node) is Kind.FLOAT:
            reason = "no integer kernel for this operation"
        if name not in plan:
            plan[name] = None
        if reason and node not in marks.integer:
            log.append(LogEntry("place", name, f"computed in float: {reason}"))
    return log
