"""Batch norm into the layer before it (arXiv 2106.08295, section 3; arXiv 1906.04721, section 4)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.graph import (
    bias_of,
    channel_axis,
    drop_dead,
    is_output,
    layers,
    parameter,
    replace_uses,
    weight_of,
)
from halfbyte.model import LogEntry, Moments, QModel, editable, value_name
from halfbyte.ops import CONV_TRANSPOSE, LINEAR, base_name


def fold_batchnorm(m: QModel) -> QModel:
    """Fold each batch norm into the convolution, transposed convolution or linear layer before it.

    A weight used at several call sites gets a folded copy for each. The batch norm's mean (beta) and spread (gamma) are kept
    as the moments of the folded layer's value. A batch norm that cannot be folded stays, with the reason in the log.
    """
    graph = editable(m.graph)
    params = dict(m.parameters)
    moments = dict(m.moments)
    log: list[LogEntry] = []
    foldable = set(layers(graph))
    for norm in [n for n in graph.nodes if base_name(n) == "batch_norm"]:
        layer = norm.args[0]
        reason = _why_not(norm, layer, foldable)
        if reason:
            log.append(LogEntry("fold_batchnorm", value_name(norm), f"not folded: {reason}"))
            continue
        moments[value_name(layer)] = _fold(graph, layer, norm, params)
        log.append(LogEntry("fold_batchnorm", value_name(norm), f"folded into {value_name(layer)}"))
        replace_uses(norm, layer)
        graph.erase_node(norm)  # so that it no longer counts as a reader of the layer: a second norm may follow
    drop_dead(graph)
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    kept = {k: v for k, v in params.items() if k in used}
    return replace(m, graph=graph, params=kept, tuned={}, moments=moments).logged(*log)


def _why_not(norm: fx.Node, layer: Any, foldable: set[fx.Node]) -> str:
    if norm.args[5]:
        return "it normalizes by the statistics of the batch (train mode)"
    if norm.args[3] is None or norm.args[4] is None:
        return "it keeps no running statistics"
    if layer not in foldable:
        return f"what comes before it is {base_name(layer)}, not a layer with a constant weight"
    if len(layer.users) > 1 or is_output(layer):
        return f"{value_name(layer)} is also used elsewhere"
    if layer.target is CONV_TRANSPOSE and layer.args[6] != 1:
        return "grouped transposed convolutions are not folded"
    if layer.target is LINEAR and len(layer.meta["shape"]) != 2:
        return "it normalizes another dimension than the linear layer's outputs"
    return ""


def _fold(graph: fx.Graph, layer: fx.Node, norm: fx.Node, params: dict[str, Tensor]) -> Moments:
    weight_node, bias_node = weight_of(layer), bias_of(layer)
    assert weight_node is not None  # foldable layers have a constant weight
    weight = params[str(weight_node.target)]
    gamma, beta, mean, var = (
        params[str(a.target)].double() if isinstance(a, fx.Node) else None for a in norm.args[1:5]
    )
    assert mean is not None and var is not None  # _why_not has seen to it
    eps = float(norm.args[7])  # type: ignore[arg-type]
    gamma = torch.ones_like(mean) if gamma is None else gamma
    beta = torch.zeros_like(mean) if beta is None else beta
    factor = gamma / torch.sqrt(var + eps)
    shape = [1] * weight.ndim
    shape[channel_axis(layer)] = -1
    bias = params[str(bias_node.target)].double() if bias_node is not None else torch.zeros_like(mean)
    folded = {"weight": weight.double() * factor.reshape(shape), "bias": beta + factor * (bias - mean)}
    shared = len(weight_node.users) > 1
    stem = (
        str(weight_node.target).removesuffix(".weight")
        if str(weight_node.target).endswith(".weight")
        else value_name(layer)
    )
    names = {
        "weight": str(weight_node.target),
        "bias": str(bias_node.target) if bias_node is not None else f"{stem}.bias",
    }
    if shared:  # the other call sites have batch norms of their own, or none
        names = {k: f"{v}@{value_name(layer).replace(':', '_')}" for k, v in names.items()}
    elif bias_node is not None and len(bias_node.users) > 1:
        names["bias"] += "@" + value_name(layer)
    nodes = {}
    for role, tensor in folded.items():
        params[names[role]] = tensor.to(weight.dtype)
        nodes[role] = parameter(graph, names[role], layer, tensor.shape)
    layer.args = (layer.args[0], nodes["weight"], nodes["bias"], *layer.args[3:])
    return Moments(beta.to(weight.dtype), gamma.abs().to(weight.dtype))
