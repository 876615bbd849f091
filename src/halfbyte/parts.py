"""Graph edits that make a layer a sum of layers of the same kind, each value and parameter with its name, format and tie."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid
from halfbyte.calibrate import regridded
from halfbyte.formats import Format
from halfbyte.graph import RESIDUAL, bias_of, groups, input_axis, parameter, weight_of
from halfbyte.model import LogEntry, QModel, editable, value_name
from halfbyte.ops import CONV, LINEAR, Kind, aten
from halfbyte.targets import activation_format

WIDE = 8  # bits of what the parts put out, and of a value that is read in two parts
SECOND = ":second"


@dataclass
class Edit:
    """A model under change: its graph is a copy, its mappings are copies."""

    m: QModel
    graph: fx.Graph = field(init=False)

    def __post_init__(self) -> None:
        m = self.m
        self.graph = editable(m.graph)
        self.params, self.plan, self.ties, self.grids = dict(m.params), dict(m.plan), dict(m.ties), dict(m.grids)
        self.log: list[LogEntry] = []
        self.wide: dict[str, Grid] = {}

    def done(self) -> QModel:
        """The changed model."""
        self.graph.lint()
        m = replace(self.m, graph=self.graph, params=self.params, plan=self.plan, ties=self.ties, grids=self.grids)
        return regridded(m.logged(*self.log), self.wide)

    def constant(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """A node for a new parameter."""
        self.params[name] = tensor.to(self.m.device)
        node = parameter(self.graph, name, before, tensor.shape)
        node.meta["dtype"] = str(tensor.dtype).removeprefix("torch.")
        return node

    def after(self, node: fx.Node, target: Any, args: tuple[Any, ...], name: str, **meta: Any) -> fx.Node:
        """A new operation behind ``node``, like it but for its name and ``meta``."""
        with self.graph.inserting_after(node):
            new = self.graph.create_node("call_function", target, args)
        new.meta = {**node.meta, "value": name, **meta}
        return new

    def moved(self, source: fx.Node, node: fx.Node) -> None:
        """``node`` holds codes of ``source`` as they are."""
        name = value_name(source)
        self.plan[value_name(node)] = self.plan.get(name)
        if self.plan.get(name) is not None:
            self.ties[value_name(node)] = self.ties.get(name, name)

    def part_format(self, layer: fx.Node) -> Format | None:
        """The format of what a part puts out: None where the kernel writes floats."""
        assert self.m.target is not None
        writes_floats = layer.target is LINEAR and Kind.LINEAR.value in self.m.target.float_output
        return None if writes_floats else activation_format(self.m.target, WIDE)

    def summed(self, layer: fx.Node, other: fx.Node, suffix: str) -> fx.Node:
        """``layer + other`` takes the layer's place and name, so that formats, grids and outputs by this name hold for the sum."""
        name = value_name(layer)
        layer.meta["value"] = name + suffix
        self.plan[name + suffix] = self.part_format(layer)
        total = self.after(other, aten.add.Tensor, (layer, other), name, shape=layer.meta["shape"])
        layer.replace_all_uses_with(total, delete_user_cb=lambda u: u is not total, propagate_meta=False)
        return total

    def zero_bias(self, layer: fx.Node, name: str, count: int, before: fx.Node) -> fx.Node | None:
        """A bias of zeros where the layer has one: correction works on each part."""
        bias = bias_of(layer)
        if bias is None:
            return None
        like = self.params[str(bias.target)]
        return self.constant(f"{name}.bias", like.new_zeros(count), before)


def inputs_each(layer: fx.Node) -> int:
    """How many input channels a kernel reads."""
    return int(layer.args[1].meta["shape"][1])  # type: ignore[union-attr]


def add_second(edit: Edit, layer: fx.Node, kernels: Tensor, second: Tensor) -> None:
    """The small layer of second kernels, its outputs moved to their channels, and the sum."""
    name, axis, count = value_name(layer), input_axis(layer), len(kernels)
    stem, total = str(weight_of(layer).target), layer.meta["shape"][axis]  # type: ignore[union-attr]
    x, g = layer.args[0], groups(layer)
    assert isinstance(x, fx.Node)
    each = inputs_each(layer)
    last = layer
    if g > 1:  # a group for each kernel, with the channels that it reads
        start = kernels // (total // g) * each
        index = (start[:, None] + torch.arange(each)).flatten().int()
        at = edit.constant(f"{stem}{SECOND}.inputs", index, layer)
        picked = (x.meta["shape"][0], len(index), *x.meta["shape"][2:])
        x = _gathered(edit, x, at, axis, f"{name}{SECOND}:inputs", last, picked)
        last = x
    weight = edit.constant(stem + SECOND, second, layer)
    bias = edit.zero_bias(layer, f"{stem}{SECOND}", count, layer)
    rest = (*layer.args[3:6], count if g > 1 else 1) if layer.target is CONV else ()
    shape = list(layer.meta["shape"])
    shape[axis] = count
    small = edit.after(last, layer.target, (x, weight, bias, *rest), name + SECOND, shape=tuple(shape))
    edit.plan[name + SECOND] = edit.part_format(layer)
    if count < total:
        pads = [0] * (2 * (len(shape) - (axis % len(shape)) - 1)) + [0, 1]
        shape[axis] += 1
        padded = edit.after(small, aten.pad.default, (small, pads), f"{name}{SECOND}:padded", shape=tuple(shape))
        edit.moved(small, padded)
        places = torch.full((total,), count, dtype=torch.int32)
        places[kernels] = torch.arange(count, dtype=torch.int32)
        at = edit.constant(f"{stem}{SECOND}.places", places, layer)
        small = _gathered(edit, padded, at, axis, f"{name}{SECOND}:placed", padded, layer.meta["shape"])
    edit.summed(layer, small, ":first")


def _gathered(
    edit: Edit, source: fx.Node, index: fx.Node, axis: int, name: str, behind: fx.Node, shape: tuple[Any, ...]
) -> fx.Node:
    """Some channels of a value, in this order."""
    args = (source, axis % len(shape), index)
    node = edit.after(behind, aten.index_select.default, args, name, shape=tuple(shape), dtype=source.meta["dtype"])
    edit.moved(source, node)
    return node


def is_gather(node: fx.Node) -> bool:
    """The operation picks the input channels of second kernels."""
    return node.target is aten.index_select.default and value_name(node).endswith(f"{SECOND}:inputs")


def readers(node: fx.Node) -> list[fx.Node]:
    """The layers that read a value, through the gathers of second kernels."""
    return [n for user in node.users for n in (readers(user) if is_gather(user) else [user])]


def add_twin(edit: Edit, reader: fx.Node, left: fx.Node) -> None:
    """The same layer, with the same weight, on what the first part has left."""
    name = value_name(reader)
    if is_gather(reader):
        users = list(reader.users)
        copy = edit.after(reader, reader.target, (left, *reader.args[1:]), name + RESIDUAL)
        edit.moved(left, copy)
        for user in users:
            add_twin(edit, user, copy)
        return
    count = int(reader.args[1].meta["shape"][0])  # type: ignore[union-attr]
    bias = edit.zero_bias(reader, f"{name}{RESIDUAL}", count, reader)
    args = (left, reader.args[1], bias, *reader.args[3:])
    twin = edit.after(reader, reader.target, args, name + RESIDUAL)
    edit.plan[name + RESIDUAL] = edit.part_format(reader)
    edit.summed(reader, twin, ":main")
