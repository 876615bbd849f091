"""Queries and edits on the graph. Edits work on a copy: take it with :func:`editable`, change it, put it in a new model."""

import ast
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, fx

from halfbyte.model import value_name
from halfbyte.ops import CONV, CONV_TRANSPOSE, LINEAR, Kind, is_tensor, kind

LAYERS = (CONV, CONV_TRANSPOSE, LINEAR)
RESIDUAL = ":residual"  # what the first part of a value has left, and the layers that read it


def by_value(graph: fx.Graph) -> dict[str, fx.Node]:
    """Nodes by value name; tensors and lists of tensors, without sizes."""
    return {value_name(n): n for n in graph.nodes if "value" in n.meta}


def tensors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes whose value is one tensor, in graph order."""
    return (n for n in graph.nodes if n.op != "output" and is_tensor(n))


def is_real(node: fx.Node) -> bool:
    """A tensor of floating-point numbers."""
    return is_tensor(node) and str(node.meta["dtype"]).startswith(("float", "bfloat"))


def output_node(graph: fx.Graph) -> fx.Node:
    """The node that lists the network's outputs."""
    found: fx.Node = next(n for n in reversed(graph.nodes) if n.op == "output")
    return found


def output_values(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that are the network's outputs, in order."""
    return list(output_node(graph).args[0])  # type: ignore[arg-type]


def is_output(node: fx.Node) -> bool:
    """Whether the value is one of the network's outputs."""
    return any(u.op == "output" for u in node.users)


def layers(graph: fx.Graph) -> list[fx.Node]:
    """Convolutions and linear layers whose weight is a parameter, in graph order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in LAYERS and weight_of(n) is not None]


def weight_of(node: fx.Node) -> fx.Node | None:
    """The parameter node that a layer uses as weight; None if it is computed."""
    weight = node.args[1]
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def table_of(node: fx.Node) -> fx.Node | None:
    """The parameter node whose rows an embedding looks up; None for anything else."""
    return node.args[0] if kind(node) is Kind.EMBEDDING and node.args[0].op == "get_attr" else None  # type: ignore[return-value,union-attr]


def twin_of(layer: fx.Node) -> fx.Node | None:
    """The layer that has this one's weight and reads what the first part of the input has left; None if the input is whole."""
    weight = weight_of(layer)
    if weight is None or value_name(layer).endswith(RESIDUAL):
        return None
    others = [n for n in weight.users if n is not layer and n.op != "output" and value_name(n).endswith(RESIDUAL)]
    # Of a weight that several layers share, each has its own twin, whose output is added to the layer's.
    sums = list(layer.users)
    while others and sums:
        found = [n for n in others if any(n in s.all_input_nodes for s in sums)]
        if found:
            return found[0]
        sums = [u for s in sums if kind(s) is Kind.ADD for u in s.users]
    return None


def weight_name(layer: fx.Node) -> str:
    """The name of a layer's weight among the parameters."""
    return str(weight_of(layer).target)  # type: ignore[union-attr]


def bias_of(node: fx.Node) -> fx.Node | None:
    """The parameter node that a layer uses as bias."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def has_computed_bias(node: fx.Node) -> bool:
    """A bias that is an activation cannot become an integer constant."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return isinstance(bias, fx.Node) and bias.op != "get_attr"


def channel_axis(node: fx.Node) -> int:
    """Which dimension of a layer's weight is the output channel."""
    return 1 if node.target is CONV_TRANSPOSE and node.args[6] == 1 else 0


def groups(layer: fx.Node) -> int:
    """Into how many independent parts a layer's channels fall; 1 for a linear layer."""
    return 1 if layer.target is LINEAR else int(layer.args[6])  # type: ignore[arg-type]


def is_depthwise(layer: fx.Node) -> bool:
    """A convolution with one input channel for each output channel, each its own group."""
    shape = layer.args[1].meta["shape"]  # type: ignore[union-attr]
    return bool(layer.target is CONV and groups(layer) == shape[0] > 1 and shape[1] == 1)


def input_axis(layer: fx.Node) -> int:
    """Which dimension of a layer's input, and of its output, its weight runs over."""
    return -1 if layer.target is LINEAR else 1


def blocks(layer: fx.Node, w: Tensor) -> Tensor:
    """A layer's weight as [groups, outputs / groups, inputs / groups, taps], whatever kind of layer it is."""
    g = groups(layer)
    split = w.reshape(g, w.shape[0] // g, w.shape[1], -1)
    return split.transpose(1, 2) if layer.target is CONV_TRANSPOSE else split


def unblocks(layer: fx.Node, parts: Tensor, shape: Iterable[int]) -> Tensor:
    """The inverse of :func:`blocks`, for a weight of this shape."""
    return (parts.transpose(1, 2) if layer.target is CONV_TRANSPOSE else parts).reshape(tuple(shape))


def per_output(layer: fx.Node, t: Tensor) -> Tensor:
    """A number for each output channel, shaped to broadcast against :func:`blocks`."""
    return t.reshape(groups(layer), -1, 1, 1)


def per_input(layer: fx.Node, t: Tensor) -> Tensor:
    """A number for each input channel, shaped to broadcast against :func:`blocks`."""
    return t.reshape(groups(layer), 1, -1, 1)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """All tensor (and tensor-list) arguments in order, those inside lists too."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return [n for n in found if is_tensor(n) or "list" in n.meta]


def activation_inputs(node: fx.Node) -> list[fx.Node]:
    """Tensor inputs that are not the parameters of a layer or the limits of a clamp."""
    if node.target in LAYERS or kind(node) is Kind.CLAMP:
        return [n for n in tensor_inputs(node)[:1] if n.op != "get_attr"]
    return tensor_inputs(node)


def parameter(graph: fx.Graph, name: str, like: fx.Node, shape: Iterable[int]) -> fx.Node:
    """A node for a parameter of this name, made before ``like`` if there is none yet."""
    node: fx.Node
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == name:
            return node
    with graph.inserting_before(like):
        node = graph.create_node("get_attr", name)
    node.meta = {"value": name, "shape": tuple(shape), "dtype": "float32"}
    return node


def replace_uses(old: fx.Node, new: fx.Node) -> None:
    """Let every user of ``old`` use ``new`` instead."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new, propagate_meta=False)


def drop_dead(graph: fx.Graph) -> None:
    """Remove nodes that nothing uses (inputs stay: the network's signature is theirs)."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


_ARITHMETIC: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: int.__add__,
    ast.Sub: int.__sub__,
    ast.Mult: int.__mul__,
    ast.FloorDiv: int.__floordiv__,
}


def extent(dimension: int | str, batch: int = 1) -> int:
    """The size of a dimension, which may depend on that of a free batch, as ``16*batch`` does. Any other name counts as the batch."""

    def value(e: ast.expr) -> int:
        if isinstance(e, ast.BinOp) and type(e.op) in _ARITHMETIC:
            return _ARITHMETIC[type(e.op)](value(e.left), value(e.right))
        if isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.USub):
            return -value(e.operand)
        return e.value if isinstance(e, ast.Constant) and isinstance(e.value, int) else batch

    return dimension if isinstance(dimension, int) else value(ast.parse(dimension, mode="eval").body)


def per_sample(shape: Sequence[int | str]) -> int:
    """How many numbers of a value belong to one sample."""
    return math.prod(extent(d) for i, d in enumerate(shape) if i or not isinstance(d, int))


def macs(node: fx.Node) -> int:
    """Multiply-accumulates of one layer or matrix product for one sample."""
    what = kind(node)
    if what is Kind.CONV:
        return per_sample(node.meta["shape"]) * math.prod(node.args[1].meta["shape"][1:])  # type: ignore[union-attr]
    if what is Kind.CONV_TRANSPOSE:
        return per_sample(node.args[0].meta["shape"]) * math.prod(node.args[1].meta["shape"][1:])  # type: ignore[union-attr]
    if what in (Kind.LINEAR, Kind.MATMUL):
        return per_sample(node.meta["shape"]) * int(node.args[0].meta["shape"][-1])  # type: ignore[union-attr]
    return 0


# Multiply-accumulates in the time that a number read or written takes while a layer learns, measured on CPUs.
_MOVED = 100


def effort(node: fx.Node) -> int:
    """How long a layer takes to be learned, against others: products, and the numbers that it reads and writes."""
    values = [n for n in (node, *node.all_input_nodes) if n.op != "get_attr" and is_tensor(n)]
    return macs(node) + _MOVED * sum(per_sample(n.meta["shape"]) for n in values)
