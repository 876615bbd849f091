"""One ONNX file, in the QDQ form that every engine reads, reloaded and proven before the call returns."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript import opset21 as op
from torch import fx

from halfbyte import engines, export_openvino
from halfbyte.capture import quiet
from halfbyte.engine import saturates
from halfbyte.errors import HalfbyteError, ParityError, StoreError, check_choice
from halfbyte.graph import output_node
from halfbyte.lower import lower
from halfbyte.model import Example, Inputs, QModel, editable
from halfbyte.onnx_edits import inserted
from halfbyte.ops import (
    CLAMP_CHANNELS,
    CLIP_CODES,
    CONV,
    CONV_TRANSPOSE,
    DEQUANTIZE,
    GLOBAL_AVERAGE_POOL,
    LOOKUP,
    LOWERED_LINEAR,
    NAMED,
    QUANTIZE,
)
from halfbyte.parity import Parity, codes_name, compare
from halfbyte.parity_openvino import compare_openvino
from halfbyte.ports import InputType, Ports, check_names, input_codes, rename_inputs, with_batch, without_rounding
from halfbyte.run import given_in_order

OPSET = 21
_VALUE, _BITS = "halfbyte.value", "halfbyte.bits"
Container = Literal["packed", "int8"]


def export_onnx(
    m: QModel,
    path: str | Path,
    *,
    samples: Example | None = None,
    metadata: Mapping[str, str] | None = None,
    container: Container = "packed",
    static_batch: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    input_type: InputType = "float32",
) -> Parity:
    """Write a calibrated model as ONNX and prove that its target's engine computes from it what the simulation computes.

    path: the file. samples: inputs for the proof (default: those kept by ``calibrate``). metadata: further entries under
    ``halfbyte.*``. container: ``packed`` stores weights of 4 and fewer bits as INT4; ``int8`` for engines that lack it.
    static_batch, input_names, output_names, input_type: see :class:`Ports`. Raises :class:`ParityError` if a value differs; the
    file then stays beside as ``<name>.unproven.onnx``.
    """
    path = Path(path)
    check_choice("container", container, Container)
    engines.require(engines.engine_of(m))
    ports = Ports(static_batch, input_names, output_names, input_type)
    check_names(m, ports)
    low, proof = lowered(m, ports, None if samples is None else given_in_order(m, samples))
    fixed = low if ports.static_batch is None else with_batch(low, ports.static_batch)
    model = to_onnx(fixed, metadata=metadata, container=container)
    if ports.input_names is not None:
        rename_inputs(model, ports.input_names)
    if engines.engine_of(m) == engines.OPENVINO:
        export_openvino.arrange(model)
    unproven = path.with_name(path.stem + ".unproven.onnx")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, str(unproven))
    except OSError as error:
        unproven.unlink(missing_ok=True)
        raise StoreError(f"cannot write '{path}': {error.strerror or error}") from error
    prove = compare_openvino if engines.engine_of(m) == engines.OPENVINO else compare
    parity = prove(low, unproven, proof)
    if not parity.proven:
        raise ParityError(
            _explain(fixed, parity, unproven), value=parity.first_difference.value if parity.first_difference else None
        )
    os.replace(unproven, path)
    return parity


def lowered(m: QModel, ports: Ports, samples: Inputs | None = None) -> tuple[QModel, Inputs]:
    """What a file with such ports computes, for any batch, and inputs for its proof: ``samples``, else those that the model keeps."""
    proof = samples if samples is not None else m.samples
    proof = proof or example_inputs(m)
    low = lower(m.to("cpu"))  # where the engine runs that proves the file
    if ports.input_type == "uint8":
        low, proof = without_rounding(m, low), input_codes(m, proof)
    return replace(low, outputs=tuple(ports.output_names or low.outputs)), proof


def _explain(m: QModel, parity: Parity, unproven: Path) -> str:
    why = ""
    if saturates() and not (m.target is not None and m.target.narrow_products):
        why = "; this CPU saturates pairs of 8-bit products: use the target variant that ends in -avx2"
    elif m.dynamic and engines.engine_of(m) == engines.OPENVINO:
        why = "; OpenVINO computes some networks wrongly while their batch size is free: try static_batch (--static-batch 1)"
    return f"the exported file is not proven: {parity.first_difference}{why}; it was left as '{unproven}'"


def example_inputs(m: QModel, batch: int = 2) -> Inputs:
    """Inputs of the right shape and type, seeded noise: only for tracing, or where no data was ever given."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for node in m.inputs:
        shape = [d if isinstance(d, int) else batch for d in node.meta["shape"]]
        dtype = getattr(torch, node.meta["dtype"])
        made.append(
            torch.randn(shape, generator=generator).to(dtype)
            if dtype.is_floating_point
            else torch.ones(shape, dtype=dtype)
        )
    return tuple(made)


def to_onnx(low: QModel, *, metadata: Mapping[str, str] | None = None, container: Container = "packed") -> ir.Model:
    """Translate a lowered model; names are the values' own, and nothing of the machine it was made on is in the file."""
    module, original = _module(low)
    inputs = example_inputs(low)
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple(
        {
            i: batch if d == "batch" else torch.export.Dim.AUTO
            for i, d in enumerate(n.meta["shape"])
            if isinstance(d, str)
        }
        for n in low.inputs
    )
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=[str(n.target) for n in low.inputs],
                output_names=list(low.outputs),
                dynamic_shapes=shapes if low.dynamic else None,
                custom_translation_table=_TRANSLATIONS,
            )
    except Exception as error:
        raise HalfbyteError(f"ONNX export failed: {_reason(error)}") from error
    assert program is not None  # dynamo=True returns a program
    model = program.model
    _fold_sizes(model)
    _keep_in_float(model)
    _keep_in_integers(model)
    _drop_idle_limits(model)
    _restore_names(model, original)
    if low.target is not None and low.target.name.startswith(engines.ONNXRUNTIME):
        _limits_in_rows(model)  # what compiles files for a device may know limits by their shape
    if container == "packed":
        _pack(model)
    _strip(model, metadata or {})
    return model


def _reason(error: BaseException) -> str:
    """What the exporter means, out of the pages that it writes."""
    text = str(error)
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text)
    if missing:
        return f"the operation {missing[1]} has no ONNX form; replace it in the network by operations that have"
    named = re.findall(r"^<class '[\w.]+'>: (.+)$", text, re.MULTILINE)
    lines = named or [line for line in text.splitlines() if line.strip()]
    return str(lines[0])[:300] if lines else type(error).__name__


def _module(low: QModel) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph as a module with flat buffer names, and these names' originals."""
    graph = editable(low.graph)
    flat: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            flat.setdefault(str(node.target), f"p{len(flat)}")
            node.target = flat[str(node.target)]
    _separate_outputs(graph)
    root = torch.nn.Module()
    for name, short in flat.items():
        root.register_buffer(short, low.params[name].cpu())
    return fx.GraphModule(root, graph), {short: name for name, short in flat.items()}


def _separate_outputs(graph: fx.Graph) -> None:
    """A value that the network returns twice becomes two values: each output has a name of its own."""
    output, seen = output_node(graph), set()
    listed = []
    for returned in output.args[0]:  # type: ignore[union-attr]
        node = returned
        if node in seen:
            with graph.inserting_before(output):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta = dict(node.meta)  # type: ignore[union-attr]
            node = copy
        seen.add(node)
        listed.append(node)
    output.args = (tuple(listed),)


def _quantize(x: Any, scale: Any, zero: Any, axis: int, name: str) -> Any:
    y = op.QuantizeLinear(x, scale, zero, axis=axis) if axis >= 0 else op.QuantizeLinear(x, scale, zero)
    y.producer().metadata_props[_VALUE] = codes_name(name)
    return y


def _dequantize(codes: Any, scale: Any, zero: Any, axis: int, group: int, bits: int, name: str) -> Any:
    y = op.DequantizeLinear(codes, scale, zero, axis=axis) if axis >= 0 else op.DequantizeLinear(codes, scale, zero)
    y.producer().metadata_props.update({_VALUE: name, _BITS: str(bits)})
    return y


def _lookup(codes: Any, scale: Any, ids: Any) -> Any:
    return op.Mul(op.Cast(op.Gather(codes, ids), to=ir.DataType.FLOAT), op.Gather(scale, ids))


def _named(x: Any, name: str) -> Any:
    y = op.Sum(x)  # of one number: an operation that does nothing, and that folding leaves alone
    y.producer().metadata_props[_VALUE] = name
    return y


def _clamp(x: Any, lower: Any, upper: Any) -> Any:
    single = all(len(t.shape) == 0 for t in (lower, upper))
    return op.Clip(x, lower, upper) if single else op.Min(op.Max(x, lower), upper)


def _conv(x: Any, weight: Any, bias: Any, stride: Any, pads: Any, dilation: Any, groups: int) -> Any:
    tail = () if bias is None else (bias,)
    return op.Conv(x, weight, *tail, strides=list(stride), pads=list(pads), dilations=list(dilation), group=groups)


def _conv_transpose(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> Any:
    tail = () if bias is None else (bias,)
    return op.ConvTranspose(
        x,
        weight,
        *tail,
        strides=list(stride),
        pads=[*padding, *padding],
        output_padding=list(output_padding),
        dilations=list(dilation),
        group=groups,
    )


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    if x.shape is not None and len(x.shape) == 2:
        return op.Gemm(x, weight, *(() if bias is None else (bias,)))
    y = op.MatMul(x, weight)
    if bias is not None and x.shape is not None and all(isinstance(d, int) for d in x.shape):
        # Where all sizes are known, ONNX Runtime makes one float product of both, unless the bias has as many dimensions.
        bias = op.Unsqueeze(bias, op.Constant(value_ints=list(range(len(x.shape) - 1))))
    return y if bias is None else op.Add(y, bias)


_TRANSLATIONS: dict[Any, Any] = {
    NAMED: _named,
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    LOOKUP: _lookup,
    CLIP_CODES: _clamp,
    CLAMP_CHANNELS: _clamp,
    CONV: _conv,
    CONV_TRANSPOSE: _conv_transpose,
    LOWERED_LINEAR: _linear,
    GLOBAL_AVERAGE_POOL: lambda x: op.GlobalAveragePool(x),
}


def _fold_sizes(model: ir.Model) -> None:
    """Fold arithmetic on constant sizes; integer weights and their scales stay as they are."""
    from onnxscript import optimizer

    kept = ("DequantizeLinear", "QuantizeLinear", "Cast", "Clip", "Transpose")
    with quiet():
        optimizer.fold_constants(model, should_fold=lambda node: False if node.op_type in kept else None)
        _infer_free_size(model)
        optimizer.remove_unused_nodes(model)


def _infer_free_size(model: ir.Model) -> None:
    """Where one size alone is free, a reshape infers it, and nothing has to compute it from that of the batch.

    Engines compute less, and OpenVINO forgets the biases of convolutions in some networks whose values depend on shapes.
    """
    for node in [n for n in model.graph if n.op_type == "Reshape"]:
        computed, shape = node.inputs[1], node.outputs[0].shape or ()
        sizes = [d if isinstance(d, int) else -1 for d in shape]
        if computed is None or computed.const_value is not None or sizes.count(-1) != 1 or 0 in sizes:
            continue
        known = {"value": ir.Tensor(np.array(sizes, dtype=np.int64))}
        node.replace_input_with(1, inserted(model, node, "Constant", [], f"{node.outputs[0].name}:sizes", known))


def _limits(model: ir.Model, *kinds: str) -> list[ir.Node]:
    """Operations on a value and a limit; they may have more operands, or one."""
    return [n for n in model.graph if n.op_type in kinds and len(n.inputs) == 2]


def _drop_idle_limits(model: ir.Model) -> None:
    """A lower limit of codes that their type sets anyway costs a pass over them, and no engine sees that it does nothing."""
    for node in _limits(model, "Max"):
        limit = node.inputs[1]
        codes = None if limit is None or limit.const_value is None else limit.const_value.numpy()
        if codes is None or not np.issubdtype(codes.dtype, np.integer) or (codes > np.iinfo(codes.dtype).min).any():
            continue
        for user, index in list(node.outputs[0].uses()):
            user.replace_input_with(index, node.inputs[0])
        model.graph.remove(node, safe=True)
        if limit is not None and not limit.uses():
            del model.graph.initializers[str(limit.name)]


def _limits_in_rows(model: ir.Model) -> None:
    """Limits of few channels are repeated along the last dimension of an image; the engine folds that when it loads the file.

    ONNX Runtime lays images out with their channels last, and starts anew at every pixel where limits are as short as a pixel:
    of 32 channels that takes four times as long as rows do.
    """
    for node in _limits(model, "Max", "Min"):
        x, limit = node.inputs
        shape = [] if limit is None or limit.const_value is None else list(limit.const_value.shape)
        made = None if x is None else x.producer()
        image = made.inputs[0] if made is not None and made.op_type == "Max" else x  # whose shape is known
        width = image.shape[-1] if image is not None and image.shape is not None and len(image.shape) == 4 else None
        if len(shape) != 3 or shape[0] >= _LONG_PIXEL or not isinstance(width, int) or width == 1:
            continue
        size = np.array([shape[0], 1, width], dtype=np.int64)
        to = ir.val(f"{node.outputs[0].name}:rows", const_value=ir.tensor(size))
        model.graph.initializers.add(to)
        rows = ir.node("Expand", [limit, to], name=str(to.name))
        rows.outputs[0].name = f"{to.name}:limits"
        model.graph.insert_before(node, rows)
        node.replace_input_with(1, rows.outputs[0])


_LONG_PIXEL = 512  # channels
_LAYERS = {"Conv", "ConvTranspose", "Gemm"}
_PRODUCTS = {"Gemm", "MatMul"}
_PASSED = {"Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


def _keep_in_float(model: ir.Model) -> None:
    """A sum of one operand between layers with float weights and the dequantization in front of them.

    ONNX Runtime would round such weights to 8 bits, with one scale for all, where the layer reads dequantized codes, also behind
    what only moves them.
    """
    for node in list(model.graph):
        if node.op_type not in _LAYERS or _dequantized(node.inputs[1]):
            continue
        x, source = node.inputs[0], node.inputs[0]
        while (made := source.producer() if source is not None else None) is not None and made.op_type in _PASSED:
            source = made.inputs[0]
        if x is not None and _dequantized(source):
            _set_apart(model, node)


def _keep_in_integers(model: ir.Model) -> None:
    """A sum of one operand in front of the quantization of a product that is returned, or read by other operations, too.

    ONNX Runtime multiplies in integers where nothing or a single quantization reads the product, and in float where both do.
    """
    for node in list(model.graph):
        product = node.inputs[0].producer() if node.op_type == "QuantizeLinear" and node.inputs[0] is not None else None
        if product is None or product.op_type not in _PRODUCTS or not _dequantized(product.inputs[0]):
            continue
        if product.outputs[0].is_graph_output() or len(product.outputs[0].uses()) > 1:
            _set_apart(model, node)


def _set_apart(model: ir.Model, node: ir.Node) -> None:
    """A sum of one operand in front of an operation's first input, which ONNX Runtime does not look through."""
    x = node.inputs[0]
    assert x is not None
    node.replace_input_with(0, inserted(model, node, "Sum", [x], f"{x.name}:apart"))


def _dequantized(value: ir.Value | None) -> bool:
    made = None if value is None else value.producer()
    return made is not None and made.op_type == "DequantizeLinear"


def _restore_names(model: ir.Model, original: Mapping[str, str]) -> None:
    """Initializers get their parameters' names back, codes the names of their values."""
    graph = model.graph
    for short, name in original.items():
        if short in graph.initializers:
            value = graph.initializers.pop(short)
            value.name = name
            graph.initializers[name] = value
    taken = {v.name for v in (*graph.inputs, *graph.outputs)}
    for node in graph:
        name = node.metadata_props.get(_VALUE)
        if name is not None:
            node.name = name
            if node.op_type == "QuantizeLinear" and name not in taken:
                _name_codes(node, name)
    _make_unique(graph)


def _make_unique(graph: ir.Graph) -> None:
    """The exporter's own names ("conv", "add_1") give way where an input, output or parameter of the network has that name."""
    taken = {str(v.name) for v in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    kept = {id(v) for v in graph.outputs}
    for node in graph:
        for value in node.outputs:
            if id(value) in kept or not value.name:
                continue
            name, count = str(value.name), 0
            while name in taken:
                count += 1
                name = f"{value.name}.{count}"
            value.name = name
            taken.add(name)


def _name_codes(node: ir.Node, name: str) -> None:
    output = node.outputs[0]
    unclipped = ":unclipped:codes"
    output.name = name
    if name.endswith(unclipped):
        for user, _ in output.uses():
            last = user
            if user.op_type == "Max":  # limits for each channel are a Max and a Min
                last = next((u for u, _ in user.outputs[0].uses() if u.op_type == "Min"), user)
            if last.op_type in ("Clip", "Min"):
                last.outputs[0].name = name.removesuffix(unclipped) + ":codes"
                last.name = last.outputs[0].name


def _pack(model: ir.Model) -> None:
    """Weights of 4 and fewer bits become INT4 tensors, cast to INT8; the engine folds the cast when it loads the file.

    With zero-points, codes reach beyond INT4; these are stored beside it, a number for each channel, and folded in as well.
    """
    for at, node in enumerate(list(model.graph)):
        codes = node.inputs[0] if int(node.metadata_props.get(_BITS, 8)) <= 4 else None
        if codes is None or codes.const_value is None or codes.dtype is not ir.DataType.INT8:
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else None
        whole = codes.const_value.numpy()
        shift = _beyond_int4(whole, axis)
        stored = (whole - shift).astype(ir.DataType.INT4.numpy())
        codes.const_value = ir.Tensor(stored, dtype=ir.DataType.INT4, name=codes.name)
        codes.dtype = ir.DataType.INT4
        users = list(codes.uses())
        name = f"{codes.name}:unpacked"
        if shift.any():  # engines add no 8-bit integers
            offset = ir.Value(name=f"{codes.name}:offset", const_value=ir.Tensor(shift), shape=ir.Shape(shift.shape))
            offset.dtype = ir.DataType.INT8
            model.graph.initializers.add(offset)
            made = [ir.node("Cast", [t], {"to": ir.DataType.FLOAT}) for t in (codes, offset)]
            made.append(ir.node("Add", [t.outputs[0] for t in made]))
            made.append(ir.node("Cast", made[-1].outputs, {"to": ir.DataType.INT8}, name=name))
        else:
            made = [ir.node("Cast", [codes], {"to": ir.DataType.INT8}, name=name)]
        for i, new in enumerate(made):  # short names, for they are most of what these operations cost
            new.outputs[0].name = name if new is made[-1] else f"unpack:{at}.{i}"
            model.graph.insert_before(node, new)
        for user, index in users:
            user.replace_input_with(index, made[-1].outputs[0])


def _beyond_int4(codes: NDArray[np.int8], axis: int | None) -> NDArray[np.int8]:
    """What to take off the codes, of each channel along ``axis``, so that they lie in -8..7; shaped to broadcast."""
    others = None if axis is None else tuple(d for d in range(codes.ndim) if d != axis)
    highest, lowest = (f(codes, axis=others, keepdims=True) for f in (np.max, np.min))
    found: NDArray[np.int8] = np.where(highest > 7, highest - 7, np.where(lowest < -8, lowest + 8, 0)).astype(np.int8)
    return found


def _strip(model: ir.Model, metadata: Mapping[str, str]) -> None:
    """Take out what the exporter wrote about source lines and modules, and name the producer."""
    model.producer_name, model.producer_version, model.doc_string = "halfbyte", "", None
    model.graph.name, model.graph.doc_string = "network", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    names: dict[str, int] = {}
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        base = node.name or node.op_type
        names[base] = names.get(base, 0) + 1
        node.name = base if names[base] == 1 else f"{base}.{names[base] - 1}"
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for key, text in metadata.items():
        model.metadata_props[f"halfbyte.{key}"] = text
