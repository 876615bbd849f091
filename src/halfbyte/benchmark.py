"""How fast: the quantized file against the float network in the same engine and process, runs interleaved."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from halfbyte import engine, engines
from halfbyte.calibrate import Progress, silent
from halfbyte.errors import UsageError
from halfbyte.export_onnx import example_inputs, to_onnx
from halfbyte.model import QModel
from halfbyte.output import Result, folder_of, keep, open_output
from halfbyte.ports import input_codes
from halfbyte.shown import Shown

_SHARE = 0.05  # the interval leaves out this share of the rounds' ratios on each side


@dataclass(frozen=True, repr=False)
class Benchmark(Shown):
    """Median milliseconds of both, and the ratio float / quantized: median and 90 % spread over the rounds.

    bfloat16_ms, bfloat16_ratio: the same for the float file in bfloat16, where the engine has it; it may be slower than float32 on a
    CPU without such instructions.
    """

    float_ms: float
    quantized_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    batch: int
    threads: int
    engine: str = f"ONNX Runtime {ort.__version__}"
    bfloat16_ms: float | None = None
    bfloat16_ratio: float | None = None

    def __str__(self) -> str:
        text = (
            f"{self.ratio:.2f} times as fast as float (90 % of rounds {self.ratio_low:.2f} to {self.ratio_high:.2f}): "
            f"{self.quantized_ms:.2f} ms instead of {self.float_ms:.2f} ms, batch {self.batch}, {self.threads} threads"
        )
        if self.bfloat16_ms is None:
            return text
        return f"{text}, {self.engine}; {self.bfloat16_ratio:.2f} times as fast as bfloat16 ({self.bfloat16_ms:.2f} ms)"


def float_file(m: QModel, path: Path) -> None:
    """Write the float network as ONNX, in the same way as the quantized one."""
    ir.save(to_onnx(m.as_float()), str(path))


def benchmark(
    output: Result, *, rounds: int = 50, batch: int = 1, threads: int | None = None, progress: Progress = silent
) -> Benchmark:
    """Time the exported file of an output folder against the float network, in the same engine and process.

    rounds: each runs both, in turn. batch: samples at a time. threads: default all. The folder's summary and report remember the
    result. Raises :class:`UsageError` where there is no proven file.
    """
    folder = folder_of(output, "a benchmark times an exported file")
    m, file, _, described = open_output(folder)
    if file is None:
        raise UsageError(f"'{folder}' has no proven model.onnx to time")
    used = torch.get_num_threads() if threads is None else threads
    found = against_float(m, file, batch=batch, rounds=rounds, threads=used, progress=progress)
    keep(folder, described, benchmark=found)
    return found


def against_float(
    m: QModel, quantized: Path, *, batch: int = 1, rounds: int = 50, threads: int, progress: Progress = silent
) -> Benchmark:
    """Time an exported file against the float network of the model that it was made from."""
    with tempfile.TemporaryDirectory(prefix="halfbyte-", ignore_cleanup_errors=True) as scratch:
        reference = Path(scratch) / "float.onnx"
        progress("export float", 0, None)
        float_file(m, reference)
        return between_files(m, quantized, reference, batch=batch, rounds=rounds, threads=threads, progress=progress)


def between_files(
    m: QModel,
    quantized: Path,
    reference: Path,
    *,
    batch: int = 1,
    rounds: int = 50,
    threads: int,
    progress: Progress = silent,
) -> Benchmark:
    """Time two files of the same network in the engine of its target.

    Each round runs both, in alternating order, so that both see the same machine; in OpenVINO the float file in bfloat16, too.
    """
    if rounds < 3 or batch < 1 or threads < 1:
        raise UsageError("a benchmark needs at least 3 rounds, a batch of 1 and 1 thread")
    if not m.dynamic:
        batch = int(m.inputs[0].meta["shape"][0])
    name = engines.engine_of(m)
    batch = engine.fixed_batch(engines.opened(name, quantized, threads=threads)) or batch
    arrays = [t.numpy() for t in (tuple(s[:batch] for s in m.samples) if m.samples else example_inputs(m, batch))]
    arrays = [np.resize(a, (batch, *a.shape[1:])) for a in arrays]
    files = [(reference, "f32"), (quantized, "f32"), *([(reference, "bf16")] if name == engines.OPENVINO else [])]
    shapes = [a.shape for a in arrays]
    sessions = [engines.opened(name, p, threads=threads, precision=how, shapes=shapes) for p, how in files]
    codes = (
        [t.numpy() for t in input_codes(m, (torch.from_numpy(arrays[0]),))]
        if engines.takes_bytes(sessions[1])
        else arrays
    )
    feeds = [codes if i == 1 else arrays for i in range(len(sessions))]
    times = interleaved([_runner(s, a) for s, a in zip(sessions, feeds, strict=True)], rounds, progress)
    ratios = sorted(f / q for f, q in zip(*times[:2], strict=True))
    cut = int(len(ratios) * _SHARE)
    before, after = (statistics.median(t) * 1e3 for t in times[:2])
    result = Benchmark(
        before, after, statistics.median(ratios), ratios[cut], ratios[-1 - cut], rounds, batch, threads, engines.described(name)
    )  # fmt: skip
    if len(times) == 2:
        return result
    half = statistics.median(h / q for h, q in zip(times[2], times[1], strict=True))
    return replace(result, bfloat16_ms=statistics.median(times[2]) * 1e3, bfloat16_ratio=half)


def _runner(s: Any, arrays: list[Any]) -> Callable[[], Any]:
    feed = {i.name: a for i, a in zip(s.get_inputs(), arrays, strict=True)}
    return lambda: s.run(None, feed)


def interleaved(calls: list[Callable[[], Any]], rounds: int, progress: Progress = silent) -> list[list[float]]:
    """Seconds of each call in each round; the order alternates, and short calls are repeated to about 20 ms."""
    repeats = []
    for call in calls:
        call()  # the first run allocates
        start = time.perf_counter()
        call()
        repeats.append(max(1, round(0.02 / max(time.perf_counter() - start, 1e-6))))
    times: list[list[float]] = [[] for _ in calls]
    for i in range(rounds):
        order = range(len(calls)) if i % 2 == 0 else reversed(range(len(calls)))
        for j in order:
            start = time.perf_counter()
            for _ in range(repeats[j]):
                calls[j]()
            times[j].append((time.perf_counter() - start) / repeats[j])
        progress("benchmark", i + 1, rounds)
    return times
