"""What a file must look like for OpenVINO to compute what it says: the same numbers, in another order of operations."""

import math

import numpy as np
import onnx_ir as ir

from halfbyte.onnx_edits import inserted, numbers

_MOST_REPEATED = 1 << 22  # numbers for a sample
# They hand on the numbers that they read, whether these are codes or what the codes stand for.
_MOVES = {"Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def arrange(model: ir.Model) -> None:
    """Change the file of a lowered model so that OpenVINO keeps to its arithmetic, and finds the integers in it."""
    _strides_to_pools(model)
    _repeat_by_index(model)
    _pool_tokens(model)
    _pad_codes(model)
    _join_codes(model)
    _dequantize_first(model)


def _strides_to_pools(model: ir.Model) -> None:
    """A strided convolution of one tap becomes a pool of one tap and a convolution.

    OpenVINO would move the stride in front of the dequantization, and then no longer see codes to compute with.
    """
    for node in list(model.graph):
        strides = [int(s) for s in node.attributes["strides"].as_ints()] if node.op_type == "Conv" else []
        weight = node.inputs[1].shape if strides else None
        if weight is None or max(strides) == 1 or any(node.attributes["pads"].as_ints()):
            continue
        if all(d == 1 for d in list(weight)[2:]):
            taps = {"kernel_shape": [1] * len(strides), "strides": strides}
            node.replace_input_with(0, inserted(model, node, "MaxPool", [node.inputs[0]], f"{node.name}:strides", taps))
            node.attributes["strides"] = ir.AttrInt64s("strides", [1] * len(strides))


def _repeat_by_index(model: ir.Model) -> None:
    """A constant that is repeated for each sample, such as a class token, is looked up for each, at an index of 0.

    The index is the product of a number of each sample and 0: where the number of samples comes from a shape instead, OpenVINO
    forgets the biases of convolutions that are joined with it.
    """
    for node in [n for n in model.graph if n.op_type == "Expand"]:
        constant, repeated = node.inputs[0], node.outputs[0]
        held = None if constant is None else ir.convenience.get_const_tensor(constant)
        if constant is None or held is None or not _for_each_sample(held.shape, repeated.shape):
            continue
        first, name = model.graph.inputs[0], str(repeated.name)
        rank = 1 if first.shape is None else len(first.shape)
        number: ir.Value = first
        if rank > 1:
            ends = [numbers(model, f"{name}:{what}", [v] * (rank - 1)) for v, what in ((0, "starts"), (1, "ends"))]
            axes = numbers(model, f"{name}:axes", range(1, rank))
            number = inserted(model, node, "Slice", [number, *ends, axes], f"{name}:slice")
            number = inserted(model, node, "Reshape", [number, numbers(model, f"{name}:flat", [-1])], f"{name}:number")
        number = inserted(model, node, "Cast", [number], f"{name}:integer", {"to": ir.DataType.INT64})
        index = inserted(model, node, "Mul", [number, numbers(model, f"{name}:zero", [0])], f"{name}:index")
        table = _row(model, constant, held, repeated)
        rows = inserted(model, node, "Gather", [table, index], f"{name}:rows", {"axis": 0})
        rows.shape, rows.dtype = repeated.shape, repeated.dtype
        for user, at in list(repeated.uses()):
            user.replace_input_with(at, rows)
        model.graph.remove(node, safe=True)


def _row(model: ir.Model, constant: ir.Value, held: ir.TensorProtocol, repeated: ir.Value) -> ir.Value:
    """One row of what is repeated; a mask of a single number, say, is one for all positions."""
    sizes = [1, *(d for d in list(repeated.shape or ())[1:] if isinstance(d, int))]
    if list(held.shape) == sizes:
        return constant
    row = ir.Tensor(np.ascontiguousarray(np.broadcast_to(held.numpy(), sizes)))
    value = ir.Value(
        name=f"{repeated.name}:row", const_value=row, type=ir.TensorType(held.dtype), shape=ir.Shape(sizes)
    )
    model.graph.initializers.add(value)
    return value


def _for_each_sample(before: ir.Shape, after: ir.Shape | None) -> bool:
    """One row, or what has no dimension of samples, becomes as many as there are samples; what each is of is known."""
    if after is None or not len(after) or len(before) > len(after) or (len(before) == len(after) and before[0] != 1):
        return False
    sizes = [d for d in list(after)[1:] if isinstance(d, int)]
    known = len(sizes) == len(after) - 1 and math.prod(sizes) <= _MOST_REPEATED
    return not isinstance(after[0], int) and known


def _pool_tokens(model: ir.Model) -> None:
    """The mean over all positions of sequences becomes a pool of windows as long as they are.

    Behind a transposition OpenVINO computes something else where there are several samples.
    """
    for node in [n for n in model.graph if n.op_type == "GlobalAveragePool"]:
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None or len(shape) != 3 or not isinstance(shape[2], int):
            continue
        node.op_type = "AveragePool"
        node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [shape[2]])
        node.attributes["pads"] = ir.AttrInt64s("pads", [0, 0])


def _pad_codes(model: ir.Model) -> None:
    """The zeros around an average pool of codes are written around the codes, as the code of zero.

    OpenVINO pools the codes, and would pad them with code 0, whatever their zero-point.
    """
    for node in list(model.graph):
        pads = [int(p) for p in node.attributes["pads"].as_ints()] if node.op_type == "AveragePool" else []
        read = None if not any(pads) or node.inputs[0] is None else node.inputs[0].producer()
        counted = "count_include_pad" in node.attributes and node.attributes["count_include_pad"].as_int()
        if read is None or read.op_type != "DequantizeLinear" or not counted:
            continue
        half = len(pads) // 2
        size = numbers(model, f"{node.name}:pads", [0, 0, *pads[:half], 0, 0, *pads[half:]])
        padded = inserted(model, node, "Pad", [read.inputs[0], size, read.inputs[2]], f"{node.name}:padded")
        name = f"{node.name}:padded.real"
        real = inserted(model, node, "DequantizeLinear", [padded, *read.inputs[1:]], name, dict(read.attributes))
        node.replace_input_with(0, real)  # the other dequantization stays: by it the proof sees the value
        node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))


def _join_codes(model: ir.Model) -> None:
    """Tokens that are joined and then quantized are quantized first, and their codes joined.

    The numbers are the same. OpenVINO takes the scales of what it joins behind the junction, a scale for each token, and then cannot
    load a matrix product that reads them.
    """
    for node in [n for n in model.graph if n.op_type == "Concat"]:
        joined, uses = node.outputs[0], list(node.outputs[0].uses())
        axis, rank = node.attributes["axis"].as_int(), 0 if joined.shape is None else len(joined.shape)
        written = uses[0][0] if len(uses) == 1 else None
        if rank < 3 or axis in (-1, rank - 1) or written is None or written.op_type != "QuantizeLinear":
            continue
        _, leaves = _moved(written.outputs[0])
        if not any(user.op_type == "MatMul" for leaf in leaves for user, _ in leaf.outputs[0].uses()):
            continue
        for i, part in enumerate(node.inputs):
            at, attributes = f"{written.outputs[0].name}:{i}", dict(written.attributes)
            codes = inserted(model, node, "QuantizeLinear", [part, *written.inputs[1:]], at, attributes)
            node.replace_input_with(i, codes)
        name, codes_type = written.outputs[0].name, written.outputs[0].dtype
        for user, index in list(written.outputs[0].uses()):
            user.replace_input_with(index, joined)
        model.graph.remove(written, safe=True)
        joined.name, joined.dtype = name, codes_type


def _dequantize_first(model: ir.Model) -> None:
    """Codes that are moved before they are read are dequantized first, and the real numbers moved.

    OpenVINO knows a quantizer by the dequantization right behind it. Further away it subtracts the zero-point on its own, in 8
    bits with sign, where unsigned codes less their zero-point do not fit.
    """
    for node in [n for n in model.graph if n.op_type == "QuantizeLinear"]:
        codes = node.outputs[0]
        moves, leaves = _moved(codes)
        if not moves or not leaves or any(list(n.inputs[1:]) != list(leaves[0].inputs[1:]) for n in leaves):
            continue
        if any(n.outputs[0] in model.graph.outputs for n in leaves):
            continue
        like = leaves[0]
        real = ir.node("DequantizeLinear", [codes, *like.inputs[1:]], dict(like.attributes))
        real.name = str(codes.name).removesuffix(":codes")
        real.outputs[0].name = f"{real.name}:real"
        model.graph.insert_after(node, real)
        for move in moves:
            if move.inputs[0] is codes:
                move.replace_input_with(0, real.outputs[0])
            for out in move.outputs:
                out.dtype = like.outputs[0].dtype
        for leaf in leaves:
            read = real.outputs[0] if leaf.inputs[0] is codes else leaf.inputs[0]
            for user, index in list(leaf.outputs[0].uses()):
                user.replace_input_with(index, read)
            model.graph.remove(leaf, safe=True)


def _moved(codes: ir.Value) -> tuple[list[ir.Node], list[ir.Node]]:
    """What moves these codes, and what dequantizes them, here or behind a move; nothing where anything else reads them."""
    moves: list[ir.Node] = []
    leaves: list[ir.Node] = []
    waiting = list(codes.uses())
    while waiting:
        user, index = waiting.pop()
        if user.op_type in _MOVES and index == 0:
            moves.append(user)
            waiting += [use for out in user.outputs for use in out.uses()]
        elif user.op_type == "DequantizeLinear" and index == 0:
            leaves.append(user)
        elif user.op_type != "Shape":
            return [], []
    return moves, leaves
