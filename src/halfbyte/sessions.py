"""ONNX Runtime's sessions on the CPU, for a file that is proven anew without torch as for all else."""

from pathlib import Path

import onnxruntime as ort

from halfbyte.errors import HalfbyteError

PROVIDER = "CPUExecutionProvider"
# Running values with sign stay as they are: on x86 the engine would make unsigned ones of them, and miss some.
_SIGNED = ("session.qdqisint8allowed", "1")


def session(
    model: str | Path | bytes, *, threads: int | None = None, optimized: Path | None = None
) -> ort.InferenceSession:
    """A CPU session with all of the engine's optimizations. optimized: where to write the graph that it runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry(*_SIGNED)
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=[PROVIDER])
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HalfbyteError(f"ONNX Runtime {ort.__version__} cannot load the file: {first}") from error
