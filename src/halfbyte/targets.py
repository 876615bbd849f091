"""What each inference engine runs in integers, as data. A new device is a new constant, or a TOML file, not new code."""

import difflib
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from halfbyte import engine
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
        Kind.EMBEDDING,
        Kind.CODES,
    )
)

_ASYMMETRIC_BITS = 6

ONNXRUNTIME = Target(
    name="onnxruntime-vnni",
    engine="onnxruntime",
    integer=_ONNXRUNTIME_KERNELS,
    float_output=frozenset({Kind.LINEAR.value, Kind.MATMUL.value}),
    widths=tuple(range(2, 9)),
    asymmetric_weights=True,
)
ONNXRUNTIME_AVX2 = replace(ONNXRUNTIME, name="onnxruntime-avx2", narrow_products=True)
ONNXRUNTIME_PER_TENSOR = replace(ONNXRUNTIME, name="onnxruntime-per-tensor-vnni", per_channel=False)
ONNXRUNTIME_PER_TENSOR_AVX2 = replace(ONNXRUNTIME_PER_TENSOR, name="onnxruntime-per-tensor-avx2", narrow_products=True)
# OpenVINO 2026.4 on CPU keeps in integers what reads and writes codes, after its low-precision transformations; it takes a
# sum into the layer before it and leaves out a rounding in between; what it averages over windows of codes it rounds to codes.
OPENVINO = replace(ONNXRUNTIME, name="openvino-vnni", engine="openvino", fused_sums=True, rounded_averages=True)
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
    """A target by name or from a ``.toml`` file; an adaptive name picks its variant by ``saturates``.

    A file has the fields of :class:`Target` as keys, all optional, and ``base``, the target that the others come from (default:
    ``onnxruntime``). Raises :class:`UsageError`.
    """
    if name.endswith(".toml"):
        return _from_file(Path(name), saturates)
    if name in ADAPTIVE:
        return ADAPTIVE[name][int(saturates)]
    for target in ALL:
        if target.name == name:
            return target
    near = difflib.get_close_matches(name, names(), 1)
    hint = f"did you mean '{near[0]}'?" if near else "choose one of " + ", ".join(names())
    raise UsageError(f"there is no target '{name}': {hint} (or give a .toml file)")


def here(target: str | Target) -> Target:
    """A target, by name the variant for this machine's CPU. Raises :class:`UsageError`."""
    return find(target, saturates=engine.saturates()) if isinstance(target, str) else target


def _from_file(path: Path, saturates: bool) -> Target:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"the target '{path}' cannot be read: {why}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the target '{path}' is not valid TOML: {error}") from error
    valid = ["base", *(f.name for f in fields(Target))]
    for key in values:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, 1, 0.0)[0]
            raise UsageError(
                f"target '{path}': unknown key '{key}'; did you mean '{near}'? (valid: {', '.join(valid)})"
            )
    base = values.pop("base", "onnxruntime")
    if not isinstance(base, str) or base.endswith(".toml"):
        raise UsageError(
            f"target '{path}': base = {base!r} is not the name of a target: choose one of {', '.join(names())}"
        )
    inherited = find(base, saturates=saturates)
    read = {
        key: _value(key, value, f"target '{path}'", getattr(inherited, key))
        for key, value in values.items()
        if key != "name"
    }
    return replace(inherited, **{"name": str(values.get("name", path.stem)), **read})


def _value(key: str, value: Any, where: str, like: Any) -> Any:
    """A key's value as :class:`Target` has it, which is of the type of the inherited one."""
    if isinstance(like, frozenset):
        kinds = [k.value for k in Kind]
        for item in value if isinstance(value, list) else [value]:
            if item not in kinds:
                near = difflib.get_close_matches(str(item), kinds, 1, 0.0)[0]
                raise UsageError(f"{where}: {key} names '{item}'; did you mean '{near}'? (valid: {', '.join(kinds)})")
        if isinstance(value, list):
            return frozenset(value)
    elif isinstance(like, tuple):
        if isinstance(value, list) and value and all(type(v) is int for v in value):
            return tuple(sorted({Format(v).bits for v in value}))
    elif type(value) is type(like):
        return value
    wanted = {
        frozenset: "a list of operations",
        tuple: "a list of widths, such as [4, 8]",
        bool: "true or false",
        int: "a number",
    }
    raise UsageError(f"{where}: {key} = {value!r} is not {wanted.get(type(like), 'a text')}")


def activation_format(target: Target, bits: int) -> Format:
    """The format of a running value: asymmetric, unsigned unless the target wants signed codes."""
    return Format(bits, signed=target.signed_activations)


def weight_format(target: Target, bits: int, axis: int | None, *, symmetric: bool = False) -> Format:
    """The format of a weight: signed, per channel where the target can.

    Symmetric without the most negative code; with a zero-point where there are few bits and the target takes it, unless
    ``symmetric``: then a code less its zero-point fits 7 bits with sign, and two products with 8 bits fit 16.
    """
    free = target.asymmetric_weights and bits <= _ASYMMETRIC_BITS and not symmetric
    return Format(bits, signed=True, symmetric=not free, narrow=not free, axis=axis if target.per_channel else None)
