"""The operations that ATen lacks, registered with torch as ``halfbyte::*``, and what kind each operation is.

The registered operations are composites of ATen operations: they differentiate, run on every device, and stay whole in an
exported graph, so that the ONNX exporter can translate each into exactly one ONNX operation.
"""

import operator
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_LIBRARY = torch.library.Library("halfbyte", "DEF")  # type: ignore[no-untyped-call]


def _register(schema: str, function: Any) -> None:
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(schema.split("(", 1)[0], function, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def spatial_pad(pads: Sequence[int]) -> list[int]:
    """ONNX order (all begins, then all ends) -> the order of ``torch.nn.functional.pad`` (last dimension first)."""
    n = len(pads) // 2
    return [p for i in reversed(range(n)) for p in (pads[i], pads[n + i])]


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int], groups: int
) -> Tensor:
    n = len(stride)
    padding = list(pads[:n])
    if padding != list(pads[n:]):
        x, padding = F.pad(x, spatial_pad(pads)), [0] * n
    return _CONVOLUTIONS[n](x, weight, bias, stride, padding, dilation, groups)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    groups: int,
    dilation: list[int],
) -> Tensor:
    function = _TRANSPOSED[len(stride)]
    return function(x, weight, bias, stride, padding, output_padding, groups, dilation)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight
    return y if bias is None else y + bias


def _global_average_pool(x: Tensor) -> Tensor:
    return x.mean(dim=list(range(2, x.ndim)), keepdim=True)


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


def _quantize(x: Tensor, scale: Tensor, zero: Tensor, axis: int, name: str) -> Tensor:
    shape = [1] * x.ndim
    if scale.ndim:
        shape[axis] = -1
    codes = torch.round(x / scale.reshape(shape)) + zero.float().reshape(shape)
    return codes.clamp(*_limits(zero.dtype)).to(zero.dtype)


def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor, axis: int, group: int, bits: int, name: str) -> Tensor:
    if group:
        flat = codes.float().reshape(codes.shape[0], -1)
        per_value = [t.float().repeat_interleave(group, 1)[:, : flat.shape[1]] for t in (zero, scale)]
        return ((flat - per_value[0]) * per_value[1]).reshape(codes.shape)
    shape = [1] * codes.ndim
    if scale.ndim:
        shape[axis] = -1
    return (codes.float() - zero.float().reshape(shape)) * scale.reshape(shape)


def _clamp(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.clamp(x, lower, upper)


_register(
    "conv(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] pads, int[] dilation, int groups) -> Tensor", _conv
)
_register(
    "conv_transpose(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] output_padding, int groups, "
    "int[] dilation) -> Tensor",
    _conv_transpose,
)
_register("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear)
_register("global_average_pool(Tensor x) -> Tensor", _global_average_pool)
_register("requantize(Tensor x) -> Tensor", lambda x: x.view_as(x))
_register("quantize(Tensor x, Tensor scale, Tensor zero, int axis, str name) -> Tensor", _quantize)
_register(
    "dequantize(Tensor codes, Tensor scale, Tensor zero, int axis, int group, int bits, str name) -> Tensor",
    _dequantize,
)
_register(
    "lookup(Tensor codes, Tensor scale, Tensor ids) -> Tensor",  # scale: [rows, 1]
    lambda codes, scale, ids: F.embedding(ids, codes).float() * F.embedding(ids, scale),
)
_register("named(Tensor x, str name) -> Tensor", lambda x, name: x.view_as(x))
_register("clamp_channels(Tensor x, Tensor lower, Tensor upper) -> Tensor", _clamp)
_register("clip_codes(Tensor codes, Tensor lo, Tensor hi) -> Tensor", _clamp)

aten = torch.ops.aten
CONV = torch.ops.halfbyte.conv.default
CONV_TRANSPOSE = torch.ops.halfbyte.conv_transpose.default
GLOBAL_AVERAGE_POOL = torch.ops.halfbyte.global_average_pool.default
REQUANTIZE = torch.ops.halfbyte.requantize.default
QUANTIZE = torch.ops.halfbyte.quantize.default
DEQUANTIZE = torch.ops.halfbyte.dequantize.default
CLAMP_CHANNELS = torch.ops.halfbyte.clamp_channels.default  # limits [channels, 1, ...], behind equalization
NAMED = torch.ops.halfbyte.named.default  # the same tensor; an exported file calls it by this name
CLIP_CODES = torch.ops.halfbyte.clip_codes.default
LOOKUP = torch.ops.halfbyte.lookup.default  # an embedding whose table is stored as codes
LINEAR = aten.linear.default
LOWERED_LINEAR = torch.ops.halfbyte.linear.default  # its weight is stored [inputs, outputs], as the engines multiply it


class Kind(Enum):
    """What an operation means to a quantizer."""

    INPUT = "input"
    PARAMETER = "parameter"
    CONV = "conv"
    CONV_TRANSPOSE = "conv transpose"
    LINEAR = "linear"
    MATMUL = "matmul"  # of two activations
    ADD = "add"
    MUL = "mul"
    CONCAT = "concat"
    AVERAGE = "average"
    CLAMP = "clamp"  # ReLU, ReLU6 and the like: a limit on the codes
    EMBEDDING = "embedding"  # looks rows of a table up
    CODES = "codes"  # moves values without computing: identity on the codes
    REQUANTIZE = "requantize"
    SHAPE = "shape"  # arithmetic on sizes, no tensor
    FLOAT = "float"
    OUTPUT = "output"


_KINDS: dict[Any, Kind] = {
    CONV: Kind.CONV,
    CONV_TRANSPOSE: Kind.CONV_TRANSPOSE,
    LINEAR: Kind.LINEAR,
    aten.matmul.default: Kind.MATMUL,
    aten.bmm.default: Kind.MATMUL,
    aten.add.Tensor: Kind.ADD,
    aten.mul.Tensor: Kind.MUL,
    aten.cat.default: Kind.CONCAT,
    aten.avg_pool1d.default: Kind.AVERAGE,
    aten.avg_pool2d.default: Kind.AVERAGE,
    aten.avg_pool3d.default: Kind.AVERAGE,
    GLOBAL_AVERAGE_POOL: Kind.AVERAGE,
    aten.relu.default: Kind.CLAMP,
    aten.relu6.default: Kind.CLAMP,
    aten.hardtanh.default: Kind.CLAMP,
    aten.clamp.default: Kind.CLAMP,
    aten.clamp_min.default: Kind.CLAMP,
    aten.clamp_max.default: Kind.CLAMP,
    CLAMP_CHANNELS: Kind.CLAMP,
    REQUANTIZE: Kind.REQUANTIZE,
    aten.embedding.default: Kind.EMBEDDING,
}
_CODES = (
    "max_pool1d max_pool2d max_pool3d reshape view flatten unflatten permute transpose t slice select split "
    "split_with_sizes chunk unbind squeeze unsqueeze expand repeat index_select upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d pixel_shuffle flip pad narrow movedim"
).split()
_LISTS = ("split", "split_with_sizes", "chunk", "unbind")  # the value is a list; the tensors are its items


def base_name(node: fx.Node) -> str:
    """``aten.add.Tensor`` -> ``add``: the operation without namespace and overload; of a parameter, nothing."""
    if node.op == "get_attr":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor (not a size, not a list of tensors)."""
    return "dtype" in node.meta


def kind(node: fx.Node) -> Kind:
    """What this node means to a quantizer."""
    if node.op == "placeholder":
        return Kind.INPUT
    if node.op == "get_attr":
        return Kind.PARAMETER
    if node.op == "output":
        return Kind.OUTPUT
    if node.target is operator.getitem:
        return Kind.CODES if is_tensor(node) and base_name(node.args[0]) in _LISTS else _untyped(node)  # type: ignore[arg-type]
    found = _KINDS.get(node.target)
    if found is not None:
        return _checked(node, found)
    if base_name(node) in _CODES and isinstance(node.target, torch._ops.OpOverload):
        return _codes_or_float(node)
    return _untyped(node)


def _untyped(node: fx.Node) -> Kind:
    return Kind.FLOAT if is_tensor(node) or "list" in node.meta else Kind.SHAPE


def _checked(node: fx.Node, found: Kind) -> Kind:
    """Some overloads look alike and are not: adding a scalar, multiplying integers, an average that counts otherwise."""
    tensors = [a for a in node.args if isinstance(a, fx.Node) and is_tensor(a)]
    if found in (Kind.ADD, Kind.MUL) and (len(tensors) != 2 or node.kwargs.get("alpha", 1) != 1):
        return Kind.FLOAT
    if found is Kind.CLAMP and node.target is not CLAMP_CHANNELS and clamp_bounds(node) is None:
        return Kind.FLOAT
    if found is Kind.AVERAGE and node.target is not GLOBAL_AVERAGE_POOL and not _plain_average(node):
        return Kind.FLOAT
    return found


def _plain_average(node: fx.Node) -> bool:
    """ONNX Runtime's integer average pool: no divisor override; padding excluded from the count, or none at all."""
    padding = argument(node, 3, "padding", [0])
    include = argument(node, 5, "count_include_pad", True)
    ceil = argument(node, 4, "ceil_mode", False)
    divisor = argument(node, 6, "divisor_override", None)
    return (
        divisor is None
        and not ceil
        and (not include or not any(padding if isinstance(padding, list | tuple) else [padding]))
    )


def _codes_or_float(node: fx.Node) -> Kind:
    name = base_name(node)
    if name in _LISTS:
        return Kind.CODES
    if not is_tensor(node) or not isinstance(node.args[0], fx.Node):
        return _untyped(node)
    if name == "pad":  # only a padding with real zero is a code that every grid has
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value", None)
        return Kind.CODES if mode == "constant" and not value else Kind.FLOAT
    return Kind.CODES


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument that may be given by position, by name or not at all."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def clamp_bounds(node: fx.Node) -> tuple[float, float] | None:
    """Lower and upper limit of a clamp with constant limits (infinite where there is none); None for any other node."""
    name = base_name(node)
    low: Any = -float("inf")
    high: Any = float("inf")
    if name == "relu":
        low = 0.0
    elif name == "relu6":
        low, high = 0.0, 6.0
    elif name == "hardtanh":
        low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    elif name == "clamp_min":
        low = argument(node, 1, "min", low)
    elif name == "clamp_max":
        high = argument(node, 1, "max", high)
    elif name == "clamp":
        low, high = argument(node, 1, "min", None), argument(node, 2, "max", None)
        low, high = -float("inf") if low is None else low, float("inf") if high is None else high
    else:
        return None
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return float(low), float(high)
