"""The inference engines by the names that targets give them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort

from halfbyte import engine, engine_openvino
from halfbyte.errors import UsageError
from halfbyte.model import QModel

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"


class Session(Protocol):
    """A loaded file: ONNX Runtime's own session, or one with the same face."""

    def get_inputs(self) -> Sequence[Any]:
        """Inputs in order, each with a ``name``."""

    def get_outputs(self) -> Sequence[Any]:
        """Outputs in order, each with a ``name``."""

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, Any], /) -> Sequence[Any]:
        """The outputs of these names, or all."""


def engine_of(m: QModel) -> str:
    """The engine that a model was made for; ONNX Runtime where nothing says otherwise."""
    return ONNXRUNTIME if m.target is None else m.target.engine


def require(name: str) -> None:
    """Raise :class:`UsageError` where an engine does not exist or its package is not installed."""
    if name == OPENVINO:
        engine_openvino.package()
    elif name != ONNXRUNTIME:
        raise UsageError(f"there is no engine '{name}': choose {ONNXRUNTIME} or {OPENVINO}")


def opened(
    name: str,
    model: str | Path | bytes,
    *,
    threads: int | None = None,
    precision: str = "f32",
    shapes: Sequence[Sequence[int]] | None = None,
) -> Session:
    """Load a file in an engine. precision, shapes: see :func:`engine_openvino.session`; ONNX Runtime has one precision."""
    require(name)
    if name == OPENVINO:
        return engine_openvino.session(model, threads=threads, precision=precision, shapes=shapes)
    found: Session = engine.session(model, threads=threads)
    return found


def described(name: str) -> str:
    """Name and version, for people."""
    return f"OpenVINO {engine_openvino.version()}" if name == OPENVINO else f"ONNX Runtime {ort.__version__}"


def takes_bytes(s: Session) -> bool:
    """Whether a file's first input is unsigned bytes."""
    return s.get_inputs()[0].type in ("tensor(uint8)", "tensor(u8)")
