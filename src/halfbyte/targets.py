"""What each inference engine runs in integers, as data. A new engine is a new constant, not new code."""

import difflib
from dataclasses import replace

from halfbyte.errors import UsageError
from halfbyte.formats import Format
from halfbyte.model import Target
from halfbyte.ops import Kind

# Read off the optimized graphs of ONNX Runtime 1.31 on CPU: QLinearConv, QGemm, QLinearMatMul and MatMulIntegerToFloat,
# QLinearAdd, QLinearMul, QLinearConcat, QLinear(Global)AveragePool; shape operations work on the codes themselves.
_ONNXRUNTIME_KERNELS = frozenset(
    k.value
    for k in (
        Kind.CONV,
        Kind.LINEAR,
        Kind.MATMUL,
        Kind.ADD,
        Kind.MUL,
        Kind.CONCAT,
        Kind.AVERAGE,
        Kind.CLAMP,
        Kind.CODES,
    )
)

ONNXRUNTIME = Target(
    name="onnxruntime-vnni",
    engine="onnxruntime",
    integer=_ONNXRUNTIME_KERNELS,
    float_output=frozenset({Kind.LINEAR.value, Kind.MATMUL.value}),
    widths=tuple(range(2, 9)),
)
ONNXRUNTIME_AVX2 = replace(ONNXRUNTIME, name="onnxruntime-avx2", narrow_products=True)
ONNXRUNTIME_PER_TENSOR = replace(ONNXRUNTIME, name="onnxruntime-per-tensor-vnni", per_channel=False)
ONNXRUNTIME_PER_TENSOR_AVX2 = replace(ONNXRUNTIME_PER_TENSOR, name="onnxruntime-per-tensor-avx2", narrow_products=True)
# OpenVINO 2026.4 on CPU keeps in integers what reads and writes codes, after its low-precision transformations; it takes a
# sum into the layer before it and leaves out a rounding in between.
OPENVINO = replace(ONNXRUNTIME, name="openvino-vnni", engine="openvino", fused_sums=True)
OPENVINO_AVX2 = replace(OPENVINO, name="openvino-avx2", narrow_products=True)
GENERIC = Target(
    name="generic",
    engine="onnxruntime",
    integer=_ONNXRUNTIME_KERNELS | {Kind.CONV_TRANSPOSE.value},
)

ALL = (
    ONNXRUNTIME,
    ONNXRUNTIME_AVX2,
    ONNXRUNTIME_PER_TENSOR,
    ONNXRUNTIME_PER_TENSOR_AVX2,
    OPENVINO,
    OPENVINO_AVX2,
    GENERIC,
)
# These names mean "for this machine": the variant follows from whether its CPU saturates pairs of products.
ADAPTIVE = {
    "onnxruntime": (ONNXRUNTIME, ONNXRUNTIME_AVX2),
    "onnxruntime-per-tensor": (ONNXRUNTIME_PER_TENSOR, ONNXRUNTIME_PER_TENSOR_AVX2),
    "openvino": (OPENVINO, OPENVINO_AVX2),
}


def names() -> list[str]:
    """Every name that :func:`find` takes."""
    return [*ADAPTIVE, *(t.name for t in ALL)]


def find(name: str, *, saturates: bool) -> Target:
    """A target by name; an adaptive name picks its variant by ``saturates``. Raises :class:`UsageError`."""
    if name in ADAPTIVE:
        return ADAPTIVE[name][int(saturates)]
    for target in ALL:
        if target.name == name:
            return target
    near = difflib.get_close_matches(name, names(), 1)
    hint = f"did you mean '{near[0]}'?" if near else "choose one of " + ", ".join(names())
    raise UsageError(f"there is no target '{name}': {hint}")


def activation_format(target: Target, bits: int) -> Format:
    """The format of a running value: asymmetric, unsigned unless the target wants signed codes."""
    return Format(bits, signed=target.signed_activations)


def weight_format(target: Target, bits: int, axis: int | None) -> Format:
    """The format of a weight: signed, symmetric, without the most negative code, per channel where the target can."""
    return Format(bits, signed=True, symmetric=True, narrow=True, axis=axis if target.per_channel else None)
