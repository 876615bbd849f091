"""Edits of a file's graph that several passes over it make."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def inserted(
    model: ir.Model,
    before: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """What a new operation in front of another gives; both it and its output have this name."""
    made = ir.node(op, inputs, attributes, name=name)
    made.outputs[0].name = name
    model.graph.insert_before(before, made)
    return made.outputs[0]


def numbers(model: ir.Model, name: str, values: Sequence[int]) -> ir.Value:
    """A constant of integers, such as sizes, in the file: int64, [values]."""
    held = ir.Value(name=name, const_value=ir.Tensor(np.array(values, dtype=np.int64)), shape=ir.Shape((len(values),)))
    held.dtype = ir.DataType.INT64
    model.graph.initializers.add(held)
    return held
