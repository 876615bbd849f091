"""OpenVINO on this machine's CPU: sessions with the face of ONNX Runtime's, and the operations that it really runs.

The package is optional (``pip install 'halfbyte[openvino]'``) and imported when a session is opened.
"""

import functools
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halfbyte.errors import HalfbyteError, UsageError

DEVICE = "CPU"
# Operations of the executed graph that compute; everything else moves data, converts it or holds constants.
_MOVES = set(
    "Const Input Output Reshape Transpose Reorder Convert FakeQuantize Concatenation Split Gather Pad StridedSlice Tile "
    "Broadcast ShapeOf SpaceToDepth DepthToSpace Interpolate ShuffleChannels MemoryInput MemoryOutput".split()
)


class Port(NamedTuple):
    """An input or output of a file."""

    name: str
    type: str
    shape: tuple[int | None, ...]


class Session:
    """A compiled file that is run as an ``onnxruntime.InferenceSession`` is."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._request = compiled.create_infer_request()

    def get_inputs(self) -> list[Port]:
        """Inputs in order."""
        return [_port(i) for i in self.compiled.inputs]

    def get_outputs(self) -> list[Port]:
        """Outputs in order."""
        return [_port(o) for o in self.compiled.outputs]

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
        """The outputs of these names, or all, for one array for each input."""
        self._request.infer({name: np.ascontiguousarray(a) for name, a in feed.items()})
        wanted = self.compiled.outputs if outputs is None else [self.compiled.output(name) for name in outputs]
        return [np.array(self._request.get_tensor(port).data) for port in wanted]


def _port(found: Any) -> Port:
    shape = tuple(d.get_length() if d.is_static else None for d in found.partial_shape)
    return Port(found.any_name, f"tensor({found.element_type.to_string()})", shape)


def package() -> Any:
    """The imported package. Raises :class:`UsageError` where it is not installed."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise UsageError(
            "target openvino needs the package openvino, which is not installed: pip install 'halfbyte[openvino]'"
        ) from error


def version() -> str:
    """The package's release, without the build."""
    return str(package().__version__).split("-", 1)[0]


@functools.cache
def _core() -> Any:
    return package().Core()


def session(
    model: str | Path | bytes,
    *,
    threads: int | None = None,
    precision: str = "f32",
    shapes: Sequence[Sequence[int]] | None = None,
) -> Session:
    """Compile an ONNX file for the CPU, tuned for latency.

    precision: of what is not quantized, ``f32`` or ``bf16``. shapes: fixed shapes of the inputs, in order. threads: default all.
    """
    core = _core()
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        network = core.read_model(model if isinstance(model, bytes) else str(model))
        if shapes is not None:
            network.reshape({port: list(s) for port, s in zip(network.inputs, shapes, strict=True)})
        return Session(core.compile_model(network, DEVICE, options))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise HalfbyteError(
            f"OpenVINO {version()} cannot load the file: {lines[-1] if lines else type(error).__name__}"
        ) from error


def kernels(s: Session) -> tuple[Mapping[str, int], list[tuple[str, str]]]:
    """Integer operations by count, and (operation, name) of what computes in float, from the graph that is executed."""
    integer: dict[str, int] = {}
    floats: list[tuple[str, str]] = []
    for node in s.compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, precision = (str(info[k].value) for k in ("layerType", "runtimePrecision"))
        if kind in _MOVES:
            continue
        if precision in ("u8", "i8"):
            integer[kind] = integer.get(kind, 0) + 1
        elif precision in ("f32", "f16", "bf16"):
            floats.append((kind, str(node.get_friendly_name())))
    return integer, floats
