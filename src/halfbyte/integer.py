"""The lowered graph evaluated in integers, to the last bit as the kernels of ONNX Runtime and OpenVINO do it.

Accumulators are exact, biases int32, the requantization multiplier float32, ties go to even. The formulas below were found by
comparison with ONNX Runtime 1.31 and OpenVINO 2026.4 and are checked on every export (``parity``); operations without an integer
kernel are evaluated in float32 on the dequantized values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from halfbyte.engine import fuses_additions, multiply_add
from halfbyte.errors import UsageError
from halfbyte.lower import lower
from halfbyte.model import Example, Inputs, Outputs, QModel, Tap, value_name
from halfbyte.ops import (
    CLIP_CODES,
    CONV,
    DEQUANTIZE,
    GLOBAL_AVERAGE_POOL,
    LOWERED_LINEAR,
    QUANTIZE,
    Kind,
    aten,
    kind,
)
from halfbyte.run import evaluate_plainly, given_in_order, in_batches, keep, run
from halfbyte.sums import conv_sums, matmul_sums


@dataclass(frozen=True)
class Codes:
    """Integer codes (held in float32, or float64 for 32-bit biases) with the grid that gives them meaning."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    axis: int

    @property
    def centred(self) -> Tensor:
        """Codes minus zero-point."""
        return self.codes - _along(self.zero.to(self.codes.dtype), self.codes, self.axis)

    @property
    def real(self) -> Tensor:
        """Real values, as DequantizeLinear computes them."""
        return self.centred.float() * _along(self.scale, self.codes, self.axis)


Requantize = Callable[
    [Tensor, Tensor], Tensor
]  # output scale, output zero-point -> codes before the container's limits


@dataclass(frozen=True)
class Pending:
    """What a kernel has accumulated, before it is written as codes of the next grid (or as floats)."""

    write: Requantize
    real: Tensor | None = None


def _along(t: Tensor, x: Tensor, axis: int) -> Tensor:
    if t.ndim == 0:
        return t
    shape = [1] * x.ndim
    shape[axis] = -1
    return t.reshape(shape)


def run_integer(low: QModel, x: Inputs, tap: Tap = keep, *, read: Tap = keep) -> Outputs:
    """Evaluate a lowered model in integers.

    tap: sees, and may replace, the codes of every quantized value (float32 integers) as they are written, by value name; read:
    as they are read, those of parameters and of moved values too. Outputs that are codes are dequantized. The result does not
    depend on the number of threads or the order of sums.
    """
    with torch.inference_mode(), _ieee_float32():
        arithmetic = _OPENVINO if low.target is not None and low.target.engine == "openvino" else _ONNXRUNTIME
        return tuple(_real(v) for v in run(low, x, evaluate=_evaluator(tap, arithmetic, read)))


def predict(m: QModel, x: Example) -> Outputs:
    """What a calibrated model's exported file computes, to the last bit for integer kernels; a float model as it is.

    x: a tensor for each input, in order or by name, or that of a single input. Every call lowers the model: to run many batches,
    call :func:`lower` once and :func:`run_integer` for each.
    """
    x = given_in_order(m, x)
    if x and x[0].shape[:1] == (0,):
        raise UsageError("the batch holds no sample")
    if not m.grids:
        with torch.inference_mode():
            return in_batches(m, x, lambda some: run(m, some))
    low = lower(m)
    return in_batches(low, x, lambda some: run_integer(low, some))


def run_simulated(low: QModel, x: Inputs) -> Outputs:
    """Evaluate a lowered model in float arithmetic: every operation on dequantized values, as training and search see it."""
    with torch.inference_mode():
        return tuple(_real(v) for v in run(low, x, evaluate=_evaluator(keep, _SIMULATED)))


class _ieee_float32:  # noqa: N801 - a context manager
    """No TF32 inside: integers would be rounded to 10 bits."""

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


def _real(value: Any) -> Any:
    return value.real if isinstance(value, Codes | Pending) else value


def _evaluator(
    tap: Tap, arithmetic: "_Arithmetic", read: Tap = keep
) -> Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]:
    def evaluate(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.target is DEQUANTIZE:
            codes, scale, zero, axis, group = args[:5]
            if group:
                return evaluate_plainly(node, args, kwargs)
            wide = codes.double() if codes.dtype == torch.int32 else codes.float()
            return Codes(read(args[6], wide), scale, zero, axis)
        if node.target is QUANTIZE:
            return tap(args[4], arithmetic.quantize(args))
        if node.target is CLIP_CODES:
            codes, lo, hi = args
            clipped = torch.minimum(torch.maximum(codes, lo.float()), hi.float())
            return tap(value_name(node), clipped)
        kernel = arithmetic.kernels.get(node.target)
        if kernel is not None and arithmetic.suits(node):
            return kernel(*args, **kwargs)
        return evaluate_plainly(node, _map_real(args), _map_real(kwargs))

    return evaluate


def runs_in_integers(node: fx.Node) -> bool:
    """Whether an integer kernel computes this operation of a lowered graph.

    Its operands are codes (a linear layer's bias may be real), and the result goes straight into a quantizer, or the kernel
    may write floats.
    """
    known = node.target in KERNELS and (node.target is LOWERED_LINEAR or kind(node) is not Kind.FLOAT)
    if not known or not (node.target in FLOAT_WRITERS or _written(node)):
        return False
    return _reads_codes(node)


def _reads_codes(node: fx.Node) -> bool:
    """All operands are codes (a linear layer's bias may be real)."""
    operands = [a for a in _flat(node.args[: 3 if node.target is CONV else 2]) if isinstance(a, fx.Node)]
    return bool(operands) and all(a.target is DEQUANTIZE and not a.args[4] for a in operands)


def _written(node: fx.Node) -> bool:
    """The result goes straight into a quantizer."""
    return len(node.users) == 1 and next(iter(node.users)).target is QUANTIZE


def _flat(args: Any) -> list[Any]:
    return [x for a in args for x in (_flat(a) if isinstance(a, list | tuple) else [a])]


def _map_real(args: Any) -> Any:
    if isinstance(args, dict):
        return {k: _map_real(v) for k, v in args.items()}
    if isinstance(args, list | tuple):
        return type(args)(_map_real(a) for a in args)
    return _real(args)


def _coded(args: tuple[Any, ...], codes: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """What a kernel has pending, written; of real numbers the codes that ``codes(x, scale, zero-point)`` makes."""
    x, scale, zero, axis, _ = args
    info = torch.iinfo(zero.dtype)
    if isinstance(x, Pending):
        return x.write(scale, zero.float()).clamp(info.min, info.max)
    x = _real(x)
    return codes(x, _along(scale, x, axis), _along(zero.float(), x, axis)).clamp(info.min, info.max)


def _quantize(args: tuple[Any, ...]) -> Tensor:
    return _coded(args, lambda x, scale, zero: torch.round(x / scale) + zero)


def _requantized(acc: Tensor, scale: Tensor, axis: int) -> Pending:
    """int32 accumulator -> ``rint(float32(acc) * (scale / s_y)) + z_y``."""
    value = acc.float()

    def write(s_y: Tensor, z_y: Tensor) -> Tensor:
        return torch.round(value * _along(scale / s_y, value, axis)) + z_y

    return Pending(write, value * _along(scale, value, axis))


def _conv(
    x: Codes, w: Codes, b: Codes | None, stride: list[int], pads: list[int], dilation: list[int], groups: int
) -> Pending:
    acc = conv_sums(x.centred, w.centred, stride, pads, dilation, groups)
    if b is not None:
        acc = acc.double() + _along(b.codes, acc, 1)
    return _requantized(acc, x.scale * w.scale, 1)


def _linear(x: Codes, w: Codes, b: Any) -> Any:
    acc = matmul_sums(x.centred, w.centred)
    scale = x.scale * w.scale
    if isinstance(b, Codes):
        acc = acc.double() + b.codes
    pending = _requantized(acc, scale, acc.ndim - 1)
    if (
        isinstance(b, Tensor) and pending.real is not None
    ):  # tokens: the engine multiplies in integers and adds the bias in float
        return pending.real + b
    return pending


def _matmul(a: Codes, b: Codes) -> Pending:
    return _requantized(matmul_sums(a.centred, b.centred), a.scale * b.scale, 0)


def _add(a: Codes, b: Codes) -> Pending:
    """QLinearAdd: ``rint(a r_a + (b r_b + (z_y - (r_a z_a + r_b z_b))))`` with ``r = s / s_y`` in float32.

    The zero-point comes before the rounding. CPUs with fused multiply-add round each of the two sums once.
    """
    fused = fuses_additions()

    def write(s_y: Tensor, z_y: Tensor) -> Tensor:
        ra, rb = a.scale / s_y, b.scale / s_y
        shift = z_y - multiply_add(ra, a.zero.float(), rb * b.zero.float(), fused)
        return torch.round(multiply_add(a.codes, ra, multiply_add(b.codes, rb, shift, fused), fused))

    return Pending(write, a.real + b.real)


def _mul(a: Codes, b: Codes) -> Pending:
    """QLinearMul: ``rint((a - z_a)(b - z_b) (s_a s_b / s_y) + z_y)``; here too the zero-point comes before the rounding."""

    def write(s_y: Tensor, z_y: Tensor) -> Tensor:
        return torch.round((a.centred * b.centred) * (a.scale * b.scale / s_y) + z_y)

    return Pending(write, a.real * b.real)


def _concat(tensors: list[Codes], dim: int = 0) -> Pending:
    """QLinearConcat: dequantize, then quantize."""
    real = torch.cat([t.real for t in tensors], dim)
    return Pending(lambda s_y, z_y: torch.round(real / s_y) + z_y, real)


def _global_average(x: Codes) -> Pending:
    """QLinearGlobalAveragePool: ``rint(acc (s_x / (s_y n))) + z_y`` with an exact accumulator."""
    count = x.codes[0, 0].numel()
    acc = x.centred.double().flatten(2).sum(2).reshape(*x.codes.shape[:2], *[1] * (x.codes.ndim - 2))

    def write(s_y: Tensor, z_y: Tensor) -> Tensor:
        return torch.round(acc.float() * (x.scale / (s_y * count))) + z_y

    return Pending(write, acc.float() * (x.scale / count))


def _average(rank: int) -> Callable[..., Pending]:
    """QLinearAveragePool: float32 sum of the dequantized values in order, over their count, padding left out."""

    def pool(x: Codes, kernel: list[int], stride: list[int] | None = None, padding: Any = 0, *_: Any) -> Pending:
        k = list(kernel) * (rank if len(kernel) == 1 else 1)
        st = list(stride or k) * (rank if len(stride or k) == 1 else 1)
        pad = [padding] * rank if isinstance(padding, int) else list(padding) * (rank if len(padding) == 1 else 1)
        total, count = _windows(x.real, k, st, pad), _windows(torch.ones_like(x.real[:1, :1]), k, st, pad)
        mean = total / count
        return Pending(lambda s_y, z_y: torch.round(mean / s_y + z_y), mean)

    return pool


def _windows(x: Tensor, kernel: list[int], stride: list[int], pad: list[int]) -> Tensor:
    """Window sums, added in the order of the window's elements, as a loop over them does."""
    x = F.pad(x, [p for q in reversed(pad) for p in (q, q)])
    for d, (k, s) in enumerate(zip(kernel, stride, strict=True)):
        x = x.unfold(2 + d, k, s)
    flat = x.flatten(-len(kernel))
    total = flat[..., 0].clone()
    for i in range(1, flat.shape[-1]):
        total += flat[..., i]
    return total


KERNELS: dict[Any, Callable[..., Any]] = {
    CONV: _conv,
    LOWERED_LINEAR: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.cat.default: _concat,
    GLOBAL_AVERAGE_POOL: _global_average,
    aten.avg_pool1d.default: _average(1),
    aten.avg_pool2d.default: _average(2),
    aten.avg_pool3d.default: _average(3),
}
FLOAT_WRITERS = (LOWERED_LINEAR, aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class _Arithmetic:
    """How an engine computes: operations on codes, which of them suit a node, how real numbers become codes."""

    kernels: Mapping[Any, Callable[..., Any]]
    suits: Callable[[fx.Node], bool]
    quantize: Callable[[tuple[Any, ...]], Tensor]


def _codes_openvino(x: Tensor, scale: Tensor, zero: Tensor, limits: torch.iinfo, unit: Tensor | None = None) -> Tensor:
    """Real numbers, in steps of ``unit``, as codes: one fused multiply-add, rounded.

    The engine knows the range of a quantizer and not its scale: the factor is 255 over the range's width, the shift follows
    from the lower end; where there is no shift, the factor takes a way over its reciprocal. All in float32.
    """
    unit = torch.ones_like(scale) if unit is None else unit
    low, high = ((end - zero) * scale / unit for end in (limits.min, limits.max))
    steps = torch.full_like(scale, limits.max - limits.min)
    factor, shift = steps / (high - low), limits.min - low * steps / (high - low)
    factor = torch.where(zero == limits.min, 1 / (1 / factor), factor)
    return torch.round(multiply_add(x, factor, shift, fuses_additions()))


def _quantize_openvino(args: tuple[Any, ...]) -> Tensor:
    """A real number times the factor of its range."""
    limits = torch.iinfo(args[2].dtype)
    return _coded(args, lambda x, scale, zero: _codes_openvino(x, scale, zero, limits))


def _conv_openvino(
    x: Codes, w: Codes, b: Codes | None, stride: list[int], pads: list[int], dilation: list[int], groups: int
) -> Tensor:
    """An exact sum, then float32: times the scales, plus the bias. What is fused behind it continues with real numbers."""
    acc = conv_sums(x.centred, w.centred, stride, pads, dilation, groups)
    y = acc.float() * _along(x.scale * w.scale, acc, 1)
    return y if b is None else y + _along((b.codes * b.scale.double()).float(), y, 1)


def _linear_openvino(x: Codes, w: Codes, b: Any) -> Tensor:
    acc = matmul_sums(x.centred, w.centred)
    y = acc.float() * _along(x.scale * w.scale, acc, acc.ndim - 1)
    if b is None:
        return y
    return y + ((b.codes * b.scale.double()).float() if isinstance(b, Codes) else b)


def _add_openvino(a: Any, b: Any) -> Any:
    """A layer's real numbers plus codes: in units of the codes' scale, whose ratio to the output's then multiplies the sum."""
    a, b = (v.real if isinstance(v, Pending) else v for v in (a, b))  # a sum that was not written as codes
    if not isinstance(a, Codes) and not isinstance(b, Codes):
        return a + b
    y, x = (a, b) if isinstance(b, Codes) else (b, a)
    if isinstance(y, Codes):
        return a.real + b.real
    sums = (y - x.zero.float() * x.scale) * (1 / x.scale) + x.codes
    return Pending(lambda s_y, z_y: _codes_openvino(sums, s_y, z_y, torch.iinfo(torch.uint8), x.scale), y + x.real)


_ONNXRUNTIME = _Arithmetic(KERNELS, runs_in_integers, _quantize)
# All else is float arithmetic.
_OPENVINO = _Arithmetic(
    {CONV: _conv_openvino, LOWERED_LINEAR: _linear_openvino, aten.add.Tensor: _add_openvino},
    lambda node: kind(node) is Kind.ADD or (node.target is not aten.add.Tensor and _reads_codes(node)),
    _quantize_openvino,
)
_SIMULATED = _Arithmetic({}, _reads_codes, _quantize)
