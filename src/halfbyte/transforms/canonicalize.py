"""One way to write each operation: constants computed, identities dropped, every convolution with explicit pads, spatial means as
one operation.

Nothing is decomposed: attention stays three nodes, a layer norm one.
"""

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.graph import drop_dead, is_real, parameter, replace_uses
from halfbyte.model import LogEntry, QModel, editable, value_name
from halfbyte.ops import CONV, CONV_TRANSPOSE, GLOBAL_AVERAGE_POOL, LINEAR, argument, aten, base_name, is_tensor

_RANK = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_TRANSPOSED_RANK = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
_WHOLE = 2**62  # a slice to the end
_SMALL = 1 << 22  # numbers: larger constants are made when they are needed, unless they are made of as many
_PRODUCTS = ("matmul", "mm", "addmm")


def canonicalize(m: QModel) -> QModel:
    """Rewrite the graph into the forms that the later stages know. Float outputs are unchanged (a law of the tests)."""
    graph = editable(m.graph)
    params = dict(m.params)
    log: list[LogEntry] = []
    fold_constants(graph, params)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.users:
            for rule in _RULES:
                if rule(graph, node, params, log):
                    break
    drop_dead(graph)
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return replace(m, graph=graph, params={k: v for k, v in params.items() if k in used}).logged(*log)


@torch.no_grad()
def fold_constants(graph: fx.Graph, params: dict[str, Any]) -> None:
    """What no input reaches is computed once, and is a parameter from then on.

    So weights that are normalized, or made of others, are weights like all others; and no engine rounds in its own way what it
    computes before it starts.
    """
    known: dict[fx.Node, Any] = {}

    def value(n: fx.Node) -> Any:
        return known[n] if n in known else params[str(n.target)]

    for node in graph.nodes:
        if _constant(node, known):
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            known[node] = node.target(*args, **kwargs)
    for node, found in known.items():
        if not isinstance(found, Tensor) or all(u in known for u in node.users):
            continue
        name = value_name(node)
        params[name] = found.detach().clone(memory_format=torch.contiguous_format)
        with graph.inserting_before(node):
            new = graph.create_node("get_attr", name)
        new.meta = dict(node.meta)
        replace_uses(node, new)
    drop_dead(graph)


def _constant(node: fx.Node, known: Collection[fx.Node]) -> bool:
    """Whether an operation can be computed without the network's inputs, and is better so."""
    if node.op != "call_function" or "value" not in node.meta:
        return False
    inputs = node.all_input_nodes
    if any(n.op != "get_attr" and n not in known for n in inputs):
        return False
    random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    shape = node.meta.get("shape", ())
    if random or any(isinstance(d, str) for d in shape):
        return False
    turned = node.target in (aten.t.default, aten.transpose.int) and inputs[0].op == "get_attr"
    if turned and all(base_name(u) in _PRODUCTS for u in node.users):
        return False  # a linear layer can have its weight as it is stored
    given = sum(math.prod(n.meta.get("shape", ())) for n in inputs)
    return bool(math.prod(shape) <= max(given, _SMALL))


def _rewrite(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Put one operation in the place of another, under the same value name."""
    with graph.inserting_before(node):
        new = graph.create_node("call_function", target, args)
    new.meta = dict(node.meta)
    replace_uses(node, new)
    graph.erase_node(node)
    return new


def _integers(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * rank if len(values) == 1 else values


def drop_identity(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """Dropout in eval mode, copies, slices of everything, conversions to the type it has."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(node) or not is_tensor(source):
        return False
    name = base_name(node)
    same = (node.meta["shape"], node.meta["dtype"]) == (source.meta["shape"], source.meta["dtype"])
    whole = name == "slice" and same and argument(node, 2, "start", None) in (0, None)
    whole = whole and argument(node, 4, "step", 1) == 1 and (argument(node, 3, "end", None) or _WHOLE) >= _WHOLE
    copies = ("contiguous", "clone", "alias", "detach", "lift_fresh_copy", "to", "_to_copy", "identity", "positive")
    evaluated = name in ("dropout", "feature_dropout", "alpha_dropout") and not argument(node, 2, "train", False)
    if (same and name in copies) or whole or evaluated:
        replace_uses(node, source)
        return True
    return False


def any_reshape(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """A view demands a memory layout that dropped copies no longer guarantee; a reshape does not."""
    if node.target not in (aten.view.default, aten._unsafe_view.default):
        return False
    _rewrite(graph, node, aten.reshape.default, node.args)
    return True


def copied_over(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """What is written over a part of a tensor, as ``y[:, :4] = x`` does, is the written value in that part's shape."""
    if base_name(node) != "copy" or not is_tensor(node) or not is_tensor(node.args[1]):  # type: ignore[arg-type]
        return False
    source: Any = node.args[1]
    shape, given = node.meta["shape"], source.meta["shape"]
    if source.meta["dtype"] != node.meta["dtype"]:
        return False
    if given == shape:
        replace_uses(node, source)
        return True
    added = len(shape) - len(given)
    sizes = [-1 if i >= added and given[i - added] == d else d for i, d in enumerate(shape)]
    if not all(isinstance(d, int) for d in sizes):
        return False
    _rewrite(graph, node, aten.expand.default, (source, sizes))
    return True


def even_maximum(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """The values of an adaptive maximum whose windows are all of one size -> a maximum over such windows."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    pool: Any = node.args[0]
    pooling = {f"adaptive_max_pool{d}d": (d, f) for d, f in enumerate(_MAXIMA, 1)}
    if pool.op != "call_function" or base_name(pool) not in pooling:
        return False
    rank, target = pooling[base_name(pool)]
    given = pool.args[0].meta["shape"][-rank:]
    wanted = _integers(pool.args[1], rank)
    if not all(isinstance(d, int) and d % n == 0 for d, n in zip(given, wanted, strict=True)):
        return False
    windows = [d // n for d, n in zip(given, wanted, strict=True)]
    _rewrite(graph, node, target, (pool.args[0], windows, windows))
    return True


def explicit_convolution(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """conv1d, conv2d, conv3d and their ``padding='same'`` forms -> ``halfbyte::conv`` with begin and end pads."""
    rank = _RANK.get(base_name(node))
    if rank is None:
        return False
    x, weight = node.args[:2]
    bias, stride = argument(node, 2, "bias", None), _integers(argument(node, 3, "stride", 1), rank)
    padding, dilation = argument(node, 4, "padding", 0), _integers(argument(node, 5, "dilation", 1), rank)
    if padding == "same":
        kernel = weight.meta["shape"][2:]  # type: ignore[union-attr]
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = _integers(0 if padding == "valid" else padding, rank) * 2
    x, pads = _absorb_pad(x, pads)  # type: ignore[arg-type]
    _rewrite(graph, node, CONV, (x, weight, bias, stride, pads, dilation, argument(node, 6, "groups", 1)))
    return True


def _absorb_pad(x: fx.Node, pads: list[int]) -> tuple[fx.Node, list[int]]:
    """A zero padding in front of a convolution is its own padding: the kernel then never meets a padded tensor."""
    rank = len(pads) // 2
    if base_name(x) not in ("pad", "constant_pad_nd") or argument(x, 2, "mode", "constant") not in ("constant", 0, 0.0):
        return x, pads
    amounts = list(x.args[1])  # type: ignore[arg-type]
    value = argument(x, 3, "value", None) if base_name(x) == "pad" else argument(x, 2, "value", 0)
    if value or any(amounts[2 * rank :]) or any(not isinstance(a, int) or a < 0 for a in amounts):
        return x, pads
    amounts += [0] * (2 * rank - len(amounts))
    begins, ends = amounts[0 : 2 * rank : 2][::-1], amounts[1 : 2 * rank : 2][::-1]
    return x.args[0], [p + a for p, a in zip(pads, begins + ends, strict=True)]  # type: ignore[return-value]


def explicit_transposed(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """conv_transpose1d, 2d, 3d -> ``halfbyte::conv_transpose`` with all its arguments."""
    rank = _TRANSPOSED_RANK.get(base_name(node))
    if rank is None:
        return False
    spread = [
        _integers(argument(node, i, n, d), rank)
        for i, n, d in ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0))
    ]
    groups, dilation = argument(node, 6, "groups", 1), _integers(argument(node, 7, "dilation", 1), rank)
    _rewrite(graph, node, CONV_TRANSPOSE, (*node.args[:2], argument(node, 2, "bias", None), *spread, groups, dilation))
    return True


def count_inside(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """An average without padding counts what is inside; engines would count the places beyond the edge in ``ceil_mode``."""
    if base_name(node) not in ("avg_pool1d", "avg_pool2d", "avg_pool3d") or not argument(node, 4, "ceil_mode", False):
        return False
    padding = argument(node, 3, "padding", 0)
    if any(_integers(padding, 1)) or not argument(node, 5, "count_include_pad", True):
        return False
    head = (*node.args[:2], argument(node, 2, "stride", []), padding, True, False)
    divisor = argument(node, 6, "divisor_override", None)
    _rewrite(graph, node, node.target, head if divisor is None else (*head, divisor))
    return True


def spatial_mean(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """The mean over all spatial dimensions, however it is written -> ``halfbyte::global_average_pool``."""
    name, source = base_name(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source) or not is_real(source):
        return False
    shape = source.meta["shape"]
    if name.startswith("adaptive_avg_pool") and len(shape) == int(name[-2]) + 2:
        if all(s == 1 for s in _integers(node.args[1], int(name[-2]))):
            _rewrite(graph, node, GLOBAL_AVERAGE_POOL, (source,))
            return True
        return False
    if name != "mean" or node.kwargs.get("dtype") is not None or not _over_positions(node, shape):
        return False
    _pooled(graph, node, node, GLOBAL_AVERAGE_POOL, (source,))
    return True


def _over_positions(node: fx.Node, shape: tuple[Any, ...]) -> bool:
    """Whether a reduction of a value of this shape is over all its spatial dimensions, and over no other."""
    dims = argument(node, 1, "dim", None)
    if len(shape) < 3 or not isinstance(dims, int | list | tuple):
        return False
    return sorted(d % len(shape) for d in _integers(dims, 1)) == list(range(2, len(shape)))


def _pooled(graph: fx.Graph, node: fx.Node, reduction: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Put a pooling over all positions in the place of a value that a reduction gives, in the same shape."""
    if argument(reduction, 2, "keepdim", False):
        _rewrite(graph, node, target, args)
        return
    shape = args[0].meta["shape"]
    with graph.inserting_before(node):
        pooled = graph.create_node("call_function", target, args)
    pooled.meta = {**node.meta, "value": node.meta["value"] + ".pool", "shape": (*shape[:2], *[1] * (len(shape) - 2))}
    _rewrite(graph, node, aten.flatten.using_ints, (pooled, 1))


def spatial_maximum(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """The maximum over all spatial dimensions -> a maximum over one window, which moves codes as they are."""
    reduction: Any = node
    if node.target is operator.getitem and node.args[1] == 0 and base_name(node.args[0]) == "max":  # type: ignore[arg-type]
        reduction = node.args[0]
    elif base_name(node) != "amax":
        return False
    source = reduction.args[0] if reduction.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source) or not is_real(source):
        return False
    shape = source.meta["shape"]
    window = list(shape[2:])
    if (
        not _over_positions(reduction, shape)
        or len(window) > len(_MAXIMA)
        or not all(isinstance(d, int) for d in window)
    ):
        return False
    _pooled(graph, node, reduction, _MAXIMA[len(window) - 1], (source, window, window))
    return True


def product_with_parameter(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """``x @ W`` and ``addmm`` with a parameter are linear layers; their weight is stored transposed."""
    name = base_name(node)
    bias, operands = (node.args[0], node.args[1:3]) if name == "addmm" else (None, node.args[:2])
    if name not in _PRODUCTS or (name == "addmm" and node.kwargs):
        return False
    x, weight = operands
    if not isinstance(weight, fx.Node) or not isinstance(x, fx.Node) or x.op == "get_attr":
        return False
    transposed = (
        base_name(weight) in ("t", "transpose")
        and isinstance(weight.args[0], fx.Node)
        and weight.args[0].op == "get_attr"
    )
    stored = weight.args[0] if transposed else weight
    if stored.op != "get_attr" or len(stored.meta["shape"]) != 2 or (bias is not None and len(bias.meta["shape"]) != 1):  # type: ignore[union-attr]
        return False
    if not transposed:
        original = str(stored.target)  # type: ignore[union-attr]
        params[original + ".transposed"] = params[original].t().contiguous()
        stored = parameter(graph, original + ".transposed", node, params[original + ".transposed"].shape)
    _rewrite(graph, node, LINEAR, (x, stored, bias))
    return True


_MAXIMA = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
_NEVER = -1e30  # of its exponential nothing is left, in float32


def split_attention(graph: fx.Graph, node: fx.Node, params: dict[str, Any], log: list[LogEntry]) -> bool:
    """Fused attention -> product, softmax, product: the two products can then run in integers."""
    if base_name(node) != "scaled_dot_product_attention":
        return False
    query, key, value = node.args[:3]
    mask, dropout, causal, scale, grouped = (
        argument(node, i, name, default)
        for i, name, default in (
            (3, "attn_mask", None),
            (4, "dropout_p", 0.0),
            (5, "is_causal", False),
            (6, "scale", None),
            (7, "enable_gqa", False),
        )
    )
    q_shape, k_shape = query.meta["shape"], key.meta["shape"]  # type: ignore[union-attr]
    sized = all(isinstance(d, int) for d in (*q_shape[1:], *k_shape[1:])) and (len(q_shape) == 4 or not grouped)
    if dropout or ((causal or grouped) and not sized) or not isinstance(mask, fx.Node | None):
        log.append(LogEntry("canonicalize", node.meta["value"], "attention of this kind stays one float operation"))
        return False
    base: dict[str, Any] = node.meta

    def insert(suffix: str, target: Any, args: tuple[Any, ...], shape: tuple[Any, ...]) -> fx.Node:
        with graph.inserting_before(node):
            new = graph.create_node("call_function", target, args)
        new.meta = {**base, "value": f"{base['value']}.{suffix}", "shape": shape}
        return new

    def for_each_head(x: Any, name: str) -> fx.Node:
        batch, heads, length, size = x.meta["shape"]
        copies = q_shape[1] // heads
        x = insert(f"{name}.apart", aten.unsqueeze.default, (x, 2), (batch, heads, 1, length, size))
        x = insert(
            f"{name}.copies", aten.expand.default, (x, [-1, -1, copies, -1, -1]), (batch, heads, copies, length, size)
        )
        return insert(
            f"{name}.heads", aten.reshape.default, (x, [-1, q_shape[1], length, size]), (*q_shape[:2], length, size)
        )

    if grouped:
        key, value = for_each_head(key, "keys"), for_each_head(value, "values")
        k_shape = key.meta["shape"]
    if causal:
        name = f"causal:{q_shape[-2]}x{k_shape[-2]}"  # the same for all layers
        device = next((t.device for t in params.values()), None)
        params[name] = torch.ones(q_shape[-2], k_shape[-2], dtype=torch.bool, device=device).tril()
        mask = parameter(graph, name, node, params[name].shape)
        mask.meta["dtype"] = "bool"
    scores_shape = (*q_shape[:-1], k_shape[-2])
    key_t = insert("key", aten.transpose.int, (key, -2, -1), (*k_shape[:-2], k_shape[-1], k_shape[-2]))
    scores = insert("scores", aten.matmul.default, (query, key_t), scores_shape)
    scores = insert("scaled", aten.mul.Tensor, (scores, float(scale or q_shape[-1] ** -0.5)), scores_shape)
    chosen = mask is not None and not is_real(mask)
    if chosen:
        scores = insert("masked", aten.where.ScalarOther, (mask, scores, _NEVER), scores_shape)
    elif mask is not None:
        scores = insert("masked", aten.add.Tensor, (scores, mask), scores_shape)
    weights = insert("softmax", aten.softmax.int, (scores, -1), scores_shape)
    if chosen and not causal:  # of a row that is masked all over nothing is taken, as torch has it
        weights = insert("taken", aten.where.ScalarOther, (mask, weights, 0.0), scores_shape)
    _rewrite(graph, node, aten.matmul.default, (weights, value))
    return True


Rule = Callable[[fx.Graph, fx.Node, dict[str, Any], list[LogEntry]], bool]
_RULES: tuple[Rule, ...] = (
    drop_identity,
    copied_over,
    any_reshape,
    even_maximum,
    explicit_convolution,
    explicit_transposed,
    count_inside,
    spatial_mean,
    spatial_maximum,
    product_with_parameter,
    split_attention,
)
