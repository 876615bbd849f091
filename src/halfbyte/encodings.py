"""AIMET encodings beside a float ONNX file, which is what Qualcomm's converters take.

The format is version 1.0.0 of AIMET's encodings: for each tensor of the ONNX file ``name``, ``dtype``, ``bw``, ``is_sym``,
``enc_type``, ``scale`` and ``offset``, so that a code ``q`` of ``0 .. 2^bw - 1`` stands for ``scale * (q + offset)``. An unsigned
zero-point z is therefore the offset -z, and signed codes have the offset ``-z - 2^(bw - 1)``. Weights in the float file lie on
their grids already, so that rounding them again changes nothing; biases are float.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor

from halfbyte.affine import Grid, fake_quantize
from halfbyte.errors import StoreError, UsageError
from halfbyte.export_onnx import to_onnx
from halfbyte.formats import Format
from halfbyte.graph import layers, tensors, weight_of
from halfbyte.model import QModel, editable, value_name
from halfbyte.ops import NAMED

VERSION = "1.0.0"
ENCODINGS, FLOAT_FILE = "model.encodings", "model_float.onnx"
_SMALLEST_BITS = 4  # of the format


def export_encodings(m: QModel, folder: str | Path) -> tuple[Path, Path]:
    """Write ``model_float.onnx`` and ``model.encodings`` into a folder; returns their paths.

    The names in both are the names of the values. Raises :class:`UsageError` where a grid has no encoding, :class:`StoreError`
    where the files cannot be written.
    """
    folder = Path(folder)
    m = m.to("cpu")
    model, names = float_file(m)
    text = json.dumps(encodings(m, names), indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = {name: folder / f".{name}" for name in (FLOAT_FILE, ENCODINGS)}
        ir.save(model, str(parts[FLOAT_FILE]))
        parts[ENCODINGS].write_text(text, encoding="utf-8")
        for name, part in parts.items():
            os.replace(part, folder / name)
    except OSError as error:
        raise StoreError(f"cannot write to '{folder}': {error.strerror or error}") from error
    return folder / FLOAT_FILE, folder / ENCODINGS


def encodings(m: QModel, names: dict[str, str]) -> dict[str, Any]:
    """The encodings of a calibrated model. names: value -> tensor in the float file."""
    parameters = {value_name(n) for n in tensors(m.graph) if n.op == "get_attr"}
    planned = [(value, form) for value, form in m.plan.items() if form is not None]
    rows = {value: _encoding(names.get(value, value), form, m.grid(value)) for value, form in planned}
    kept = [
        value_name(n) for n in layers(m.graph) if (w := weight_of(n)) is not None and m.plan.get(value_name(w)) is None
    ]
    return {
        "version": VERSION,
        "activation_encodings": [row for value, row in rows.items() if value not in parameters],
        "param_encodings": [row for value, row in rows.items() if value in parameters],
        "quantizer_args": _arguments(
            [f for v, f in planned if v not in parameters], [f for v, f in planned if v in parameters]
        ),
        "excluded_layers": kept,
    }


def _encoding(name: str, form: Format, grid: Grid | None) -> dict[str, Any]:
    if grid is None or form.group is not None or form.bits < _SMALLEST_BITS:
        what = "has a scale for each group" if form.group is not None else f"is {form}"
        raise UsageError(f"'{name}' {what}: encodings have 4 to 32 bits and one scale, or one for each channel")
    offset: Tensor = -grid.zero - (1 << (form.bits - 1) if form.signed else 0)
    return {
        "name": name,
        "dtype": "INT",
        "bw": form.bits,
        "is_sym": form.symmetric,
        "enc_type": "PER_TENSOR" if grid.axis is None else "PER_CHANNEL",
        "scale": grid.scale.flatten().double().tolist(),
        "offset": offset.expand(grid.scale.shape).flatten().tolist(),
    }


def _arguments(activations: list[Format], weights: list[Format]) -> dict[str, Any]:
    """For people: the widths most in use."""

    def usual(forms: list[Format]) -> int:
        found = [f.bits for f in forms]
        return max(set(found), key=found.count) if found else 32

    return {
        "activation_bitwidth": usual(activations),
        "param_bitwidth": usual(weights),
        "dtype": "int",
        "is_symmetric": all(f.symmetric for f in weights),
        "per_channel_quantization": any(f.axis is not None for f in weights),
        "quant_scheme": "post_training_tf_enhanced",
    }


def float_file(m: QModel) -> tuple[ir.Model, dict[str, str]]:
    """The network in float with weights on their grids, and where each planned running value is found in it."""
    graph = editable(m.graph)
    params = dict(m.parameters)
    for node in list(tensors(graph)):
        grid = m.grid(value_name(node)) if m.plan.get(value_name(node)) is not None else None
        if grid is None:
            continue
        if node.op == "get_attr":
            params[str(node.target)] = fake_quantize(params[str(node.target)], grid)
            continue
        with graph.inserting_after(node):
            copy = graph.call_function(NAMED, (node, value_name(node)))
        copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)  # type: ignore[misc]
    model = to_onnx(replace(m.as_float(), graph=graph, params=params))
    return model, _name_tensors(model, {value for value, form in m.plan.items() if form is not None})


def _name_tensors(model: ir.Model, values: set[str]) -> dict[str, str]:
    """Take out the marking nodes, whose names are the values', and name their tensors; a tensor of several values keeps nodes."""
    graph, names = model.graph, {}
    fixed = {id(v) for v in (*graph.inputs, *graph.outputs)}
    for node in list(graph):
        if node.op_type != "Sum" or node.name not in values or node.inputs[0] is None:
            continue
        source, result, value = node.inputs[0], node.outputs[0], str(node.name)
        if id(source) in fixed or id(result) in fixed:  # inputs and outputs have names of their own
            kept = source if id(source) in fixed and id(result) not in fixed else result
        else:
            kept = source
            source.name = value
            fixed.add(id(source))
        if kept is source:
            for user, index in list(result.uses()):
                user.replace_input_with(index, source)
            graph.remove(node, safe=True)
        names[value] = str(kept.name)
    return names
