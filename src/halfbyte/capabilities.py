"""What a target can do, found out by asking its engine: small layers exported at each width, looked at and timed, remembered."""

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from halfbyte import engine
from halfbyte.calibrate import Progress, calibrate, silent
from halfbyte.capture import capture
from halfbyte.export_onnx import example_inputs, to_onnx
from halfbyte.formats import Bits, container_bits
from halfbyte.graph import layers
from halfbyte.latency import alone, between_codes, cache_folder, processor, read_json, write_json
from halfbyte.lower import lower
from halfbyte.model import QModel, Target
from halfbyte.ops import Kind
from halfbyte.place import place
from halfbyte.shown import Shown, aligned
from halfbyte.targets import find, here, names

WIDTHS = tuple(Bits(w, a) for w, a in ((8, 8), (4, 8), (8, 4), (4, 4), (8, 16)))
_SAME = 0.1  # speeds that differ by less are told apart by noise alone
# Kernels that an operation may be fused into; whether it is, the engine's optimized graph says.
_KERNELS = {
    Kind.ADD: ("QLinearAdd",),
    Kind.MUL: ("QLinearMul",),
    Kind.MATMUL: ("MatMulIntegerToFloat", "QLinearMatMul"),
    Kind.CONCAT: ("QLinearConcat",),
    Kind.AVERAGE: ("QLinearAveragePool", "QLinearGlobalAveragePool"),
}
VERSION = 1


@dataclass(frozen=True)
class Capability:
    """One operation at one pair of widths.

    legal: the target takes these widths. kernel: what the engine ran, None for float. container: of the weights. size: of the
    weights in the file, as a part of float's. speed: times as fast as the float layer, None where it was not measured.
    """

    operation: str
    weights: int
    activations: int
    legal: bool
    kernel: str | None
    container: str | None = None
    size: float | None = None
    speed: float | None = None


@dataclass(frozen=True, repr=False)
class Capabilities(Shown):
    """All operations of one target, on the engine and instruction set that they were measured on."""

    target: str
    engine: str
    instruction_set: str
    threads: int
    rows: tuple[Capability, ...]

    def __str__(self) -> str:
        head = ("operation", "bits", "legal", "integer kernel", "weights in", "size", "speed")
        table = [head, *(_cells(r) for r in self.rows)]
        where = f"{self.target}: measured on {self.engine}, {self.instruction_set}, {self.threads} threads; speed: times float's"
        return f"{where}\n{aligned(table)}"

    def speed(self, widths: Bits) -> float | None:
        """Of the timed operations at these widths, the median."""
        found = [
            r.speed for r in self.rows if (r.weights, r.activations) == (widths.weights, widths.activations) and r.speed
        ]
        return median(found) if found else None


def _cells(r: Capability) -> tuple[str, ...]:
    return (
        r.operation,
        f"W{r.weights}A{r.activations}",
        "yes" if r.legal else "no",
        r.kernel or ("float" if r.legal else ""),
        r.container or "",
        "" if r.size is None else f"{r.size:.0%}",
        "" if r.speed is None else f"{r.speed:.2f}x",
    )


class _Operations(nn.Module):
    """Every operation that follows layers, between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        y = torch.nn.functional.avg_pool2d(torch.cat([a + b, a * b], 1), 2)
        rows = self.c(y[:, :8] + y[:, 8:]).flatten(2)
        product: Tensor = rows @ rows.transpose(1, 2)
        return product


def _timed_networks() -> dict[str, tuple[nn.Module, Tensor]]:
    return {
        "conv": (nn.Conv2d(64, 64, 3, padding=1), torch.zeros(1, 64, 28, 28)),
        "depthwise": (nn.Conv2d(128, 128, 3, padding=1, groups=128), torch.zeros(1, 128, 28, 28)),
        "linear": (nn.Linear(1024, 1024), torch.zeros(16, 1024)),
    }


@dataclass(frozen=True)
class Known:
    """A target by the name that it is asked for with, what that means on this machine, and who proves its files."""

    name: str
    target: str
    engine: str
    bits: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class Targets(Shown):
    """All targets."""

    targets: tuple[Known, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{t.name:30} {t.target}, {t.bits[0]} to {t.bits[-1]} bits, proven on {t.engine}" for t in self.targets
        )


def targets(
    target: str | Target | None = None, *, threads: int | None = None, progress: Progress = silent
) -> Targets | Capabilities:
    """List the targets; for one, what each operation and width is worth, see :func:`capabilities`."""
    if target is not None:
        return capabilities(target, threads=threads, progress=progress)
    found = {name: find(name, saturates=engine.saturates()) for name in names()}
    return Targets(tuple(Known(n, t.name, t.engine, t.widths) for n, t in found.items()))


def capabilities(
    target: str | Target = "onnxruntime", *, threads: int | None = None, rounds: int = 100, progress: Progress = silent
) -> Capabilities:
    """Measure what a target can do on this machine, or recall it: a cache holds it for each engine version, CPU and threads.

    rounds: how often each layer runs, all widths and float in turn; the fastest counts.
    """
    where = here(target)
    used = threads or torch.get_num_threads()
    found = cached(where, used)
    if found is None:
        rows = [r for name in _timed_networks() for r in _layer_rows(name, where, used, rounds, progress)]
        progress("kernels", 0, None)
        rows += _following(where)
        found = Capabilities(where.name, f"ONNX Runtime {ort.__version__}", engine.instruction_set(), used, tuple(rows))
        write_json(_path(where, used), found.to_dict())
    return found


def cached(target: Target, threads: int) -> Capabilities | None:
    """What was measured before on this engine, CPU and number of threads; None where nothing was."""
    stored = read_json(_path(target, threads))
    try:
        return (
            None
            if stored is None
            else Capabilities(**{**stored, "rows": tuple(Capability(**r) for r in stored["rows"])})
        )
    except (TypeError, LookupError):
        return None


def _path(target: Target, threads: int) -> Path:
    told = repr((VERSION, target.name, ort.__version__, engine.instruction_set(), processor(), threads))
    return cache_folder() / f"target-{hashlib.sha256(told.encode()).hexdigest()[:24]}.json"


def _layer_rows(name: str, target: Target, threads: int, rounds: int, progress: Progress) -> list[Capability]:
    """One layer at all widths, timed in turn with the float layer."""
    net, x = _timed_networks()[name]
    captured = capture(net.eval(), (x.expand(2, *x.shape[1:]) if len(x) == 1 else x,))
    m = replace(alone(captured, layers(captured.graph)[0], len(x)), target=target)
    legal = [w for w in WIDTHS if w.weights in target.widths and w.activations in target.widths]
    files = {w: _file(m, target, w) for w in (None, *legal)}
    sessions = {w: engine.session(data, threads=threads) for w, (data, _) in files.items()}
    calls: list[Callable[[], Any]] = [partial(s.run, None, files[w][1]) for w, s in sessions.items()]
    times = dict(zip(sessions, _fastest(calls, rounds, partial(progress, f"time {name}")), strict=True))
    rows = []
    for w in WIDTHS:
        if w not in times:
            rows.append(Capability(name, w.weights, w.activations, False, None))
            continue
        kernels, _ = engine.kernels(engine.optimized_graph(files[w][0]))
        bits = 4 if w.weights <= 4 else container_bits(w.weights)
        kernel = next(iter(kernels), None)
        rows.append(
            Capability(name, w.weights, w.activations, True, kernel, f"int{bits}", bits / 32, times[None] / times[w])
        )
    return rows


def _fastest(calls: list[Callable[[], Any]], rounds: int, progress: Callable[[int, int], None]) -> list[float]:
    """Seconds of each call at its fastest, all called in turn: one that other work has interrupted does not count."""
    best = [math.inf] * len(calls)
    for i in range(rounds):
        for j, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[j] = min(best[j], time.perf_counter() - start)
        progress(i + 1, rounds)
    return best


def _file(m: QModel, target: Target, widths: Bits | None) -> tuple[bytes, Mapping[str, Any]]:
    """The layer as a file, between codes where it is quantized, and inputs for it."""
    low = m.as_float()
    if widths is not None:
        placed = place(m, target, weight_bits=widths.weights, activation_bits=widths.activations)
        low = between_codes(lower(calibrate(placed, [example_inputs(m)])), widths)
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as folder:
        path = Path(folder) / "layer.onnx"
        ir.save(to_onnx(low), str(path))
        feed = {str(n.target): t.numpy() for n, t in zip(low.inputs, example_inputs(low), strict=True)}
        return path.read_bytes(), feed


def _following(target: Target) -> list[Capability]:
    """What runs between layers: whether the target wants it in integers, and what the engine makes of it."""
    torch.manual_seed(0)
    captured = capture(_Operations().eval(), (torch.randn(2, 8, 8, 8),))
    data, _ = _file(replace(captured, target=target), target, Bits(8, 8))
    kernels, _ = engine.kernels(engine.optimized_graph(data))
    return [
        Capability(kind.value, 8, 8, kind.value in target.integer, next((k for k in names_ if k in kernels), None))
        for kind, names_ in _KERNELS.items()
    ]


def consequence(target: Target, widths: Bits, threads: int) -> str:
    """What fewer than 8 bits mean on this target, in a sentence, from what was measured before."""
    known = cached(target, threads)
    what = f"{widths} on {target.name}"
    narrow, wide = (None, None) if known is None else (known.speed(_measured(widths)), known.speed(Bits(8, 8)))
    if narrow is None or wide is None:
        return f"{what}: speed not measured yet: halfbyte targets {target.name}"
    ratio = narrow / wide
    if ratio < 1 - _SAME:
        speed = f"runs at {ratio:.2f} times the speed of W8A8"
    elif ratio > 1 + _SAME:
        speed = f"runs {ratio:.2f} times as fast as W8A8"
    else:
        speed = "runs at the speed of W8A8"
    if widths.activations < 8 and ratio <= 1 + _SAME:
        speed += f"; {widths.activations}-bit activations save nothing on this engine"
    return f"{what}: {speed} (small layers, {known.engine}, {known.instruction_set})"  # type: ignore[union-attr]


def _measured(widths: Bits) -> Bits:
    """The pair that stands for these widths: the engine holds 2 to 4 bits alike, and 5 to 8."""
    return Bits(*(4 if b <= 4 else 8 if b <= 8 else 16 for b in (widths.weights, widths.activations)))
