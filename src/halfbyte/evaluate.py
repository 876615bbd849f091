"""How good: task accuracy of the float network, the simulation and the exported file, and signal-to-noise by value."""

import inspect
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte import engine, engines
from halfbyte.calibrate import Progress, silent
from halfbyte.data import Source, check_inputs
from halfbyte.errors import DataError, HalfbyteError, UsageError
from halfbyte.integer import predict, run_integer
from halfbyte.loading import items, load_callable
from halfbyte.lower import lower
from halfbyte.model import Inputs, Outputs, QModel
from halfbyte.output import Result, keep, opened
from halfbyte.ports import input_codes
from halfbyte.preprocess import Preprocess
from halfbyte.run import expected_inputs, given_in_order, in_batches, run, simulate
from halfbyte.scoring import open_data
from halfbyte.shown import Shown, plain

Forward = Callable[..., Tensor | Outputs]
Metric = Callable[..., float | Mapping[str, float]]
_CONFIDENCE = 1.96  # 95 % of a normal distribution
WAYS = ("float", "simulation", "file")


@dataclass(frozen=True)
class Interval:
    """A difference in points (hundredths), paired on the same samples, with its 95 % interval."""

    points: float
    low: float
    high: float


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """Scores of the float network, the simulation and the file (those that were run), by metric.

    scores: metric -> way -> value in 0..1 (or the unit of a metric of one's own). difference: file (or simulation) minus
    float of the first metric. agreement: share of samples on which two ways decide alike. disagreements: samples on which
    simulation and file decide differently, with the margin between the two classes in the file's output.
    """

    samples: int
    scores: Mapping[str, Mapping[str, float]]
    difference: Interval | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)
    disagreements: tuple[tuple[int, float], ...] = ()

    @property
    def metric(self) -> str:
        """The first metric."""
        return next(iter(self.scores))

    def to_dict(self) -> dict[str, Any]:
        """As ``summary.json`` holds it."""
        first = self.scores[self.metric]
        others = {m: dict(s) for m, s in self.scores.items() if m != self.metric}
        return {
            "metric": self.metric,
            "samples": self.samples,
            **first,
            **{m.replace("-", ""): s for m, s in others.items()},
            "difference": plain(self.difference),
            "agreement": dict(self.agreement),
            "disagreements": [{"index": i, "margin": margin} for i, margin in self.disagreements],
        }

    def facts(self) -> dict[str, Any]:
        """Samples, the difference from float, and a row for each metric."""
        known = {
            "samples": self.samples or None,
            "difference from float": self._difference(),
            "agreement": self.agreement,
        }
        return {**{k: v for k, v in known.items() if v}, "scores": self.scores}

    def __str__(self) -> str:
        ways = [w for w in WAYS if any(w in s for s in self.scores.values())]
        lines = [f"{self.samples} samples" if self.samples else "", f"{'':14}" + "".join(f"{w:>12}" for w in ways)]
        for name, scores in self.scores.items():
            lines.append(f"{name:14}" + "".join(f"{scores[w]:12.4f}" for w in ways))
        if self.difference is not None:
            lines.append(f"difference from float: {self._difference()}")
        if "file_simulation" in self.agreement:
            lines.append(f"file and simulation decide alike on {self.agreement['file_simulation']:.2%} of the samples")
        lines += [f"  sample {i}: differ, margin {margin:.4g}" for i, margin in self.disagreements[:20]]
        return "\n".join(line for line in lines if line)

    def _difference(self) -> str:
        d = self.difference
        return "" if d is None else f"{d.points:+.2f} points (95 % interval {d.low:+.2f} to {d.high:+.2f}, paired)"


def forwards(m: QModel, file: Path | None, *, threads: int | None = None) -> dict[str, Forward]:
    """The three ways to run a network: float, the integer simulation and, where there is a file, the file in its engine.

    The first two run where the model lies; all outputs come to the CPU.
    """

    def single(outputs: Outputs) -> Tensor | Outputs:
        outputs = tuple(t.cpu() for t in outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    reference, low = m.as_float(), lower(m)

    ways: dict[str, Forward] = {
        "float": lambda *x: single(predict(reference, x)),
        "simulation": lambda *x: single(in_batches(low, x, lambda some: run_integer(low, some))),
    }
    if file is not None:
        s = engines.opened(engines.engine_of(m), file, threads=threads)
        pixels = engines.takes_bytes(s)
        ways["file"] = lambda *x: single(
            tuple(torch.from_numpy(a) for a in engine.infer(s, input_codes(m, x) if pixels else x))
        )
    return ways


def evaluate(
    output: Result,
    data: Source | None = None,
    *,
    file: Path | None = None,
    metric: Metric | str | None = None,
    classes: str | PathLike[str] | None = None,
    limit: int | None = None,
    batch: int = 50,
    preprocess: Preprocess | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Score the float network, the simulation and the exported file on the same labelled data.

    output: an output folder, whose file is scored and whose summary and report remember the result; or a model, with ``file`` if
    there is one. data: a folder with one for each class (``classes``: their order), ``.npz`` with ``target``, ``file.py:callable``
    or batches of (inputs, class indices), at most ``limit`` samples, ``batch`` at a time. metric: for any other task, a function
    ``(forward, data)`` or ``(forward)`` that returns a number or a mapping of numbers, or its ``file.py:callable``; it is called
    once for each way. Without it: top-1, and top-5 from 10 classes on. preprocess: of pictures, in place of the folder's own.
    Raises :class:`UsageError`, :class:`DataError`.
    """
    if data is None and metric is None:
        raise UsageError("nothing to evaluate on: give --data with labelled samples, or a --metric of your own")
    m, exported, kept, described = opened(output)
    own = load_callable(metric) if isinstance(metric, str) else metric
    source: Any = data
    if own is not None and isinstance(data, str) and not Path(data).exists():
        source = _any_targets(m, data, limit)
    # A metric of one's own may take data of any kind.
    if source is data and (own is None or isinstance(data, str | PathLike)):
        source = open_data(m, data, None, preprocess=preprocess or kept, limit=limit, batch=batch, classes=classes)
    ways = forwards(m, file or exported, threads=threads)
    checked = expected_inputs(m)
    found = _classification(ways, source, checked, progress) if own is None else _by_metric(ways, source, own, progress)
    keep(output, described, evaluation=found)
    return found


def _any_targets(m: QModel, data: str, limit: int | None) -> Any:
    """Batches of (inputs, target) from a function, where the targets are no class indices; else the name, to be opened as such."""
    found: list[tuple[Inputs, Any]] = []
    samples = 0
    for item in items(load_callable(data), data):
        if not isinstance(item, tuple | list) or len(item) != 2 or (not found and _are_classes(item[1])):
            return data
        found.append((given_in_order(m, item[0]), item[1]))
        samples += len(found[-1][0][0])
        if samples >= (limit or math.inf):
            break
    return found


def _are_classes(target: Any) -> bool:
    y = torch.as_tensor(target) if isinstance(target, Tensor | np.ndarray | list) else None
    return y is not None and y.ndim == 1 and not y.is_floating_point()


def _by_metric(ways: Mapping[str, Forward], data: Any, metric: Metric, progress: Progress) -> Evaluation:
    scores: dict[str, dict[str, float]] = {}
    both = len(inspect.signature(metric).parameters) > 1
    if both and data is None:
        raise UsageError(
            "the metric takes (forward, data), and there is no data: give --data, or let it take forward alone"
        )
    for i, (way, forward) in enumerate(ways.items()):
        for name, value in _scored(metric, (forward, data) if both else (forward,)).items():
            scores.setdefault(name, {})[way] = value
        progress(f"evaluate {way}", i + 1, len(ways))
    samples = getattr(data, "count", None)
    return Evaluation(samples if isinstance(samples, int) else 0, scores)


def _scored(metric: Metric, arguments: tuple[Any, ...]) -> dict[str, float]:
    """What a metric of the user's says, by name; whatever it does wrong is told in one line."""
    own = getattr(metric, "__name__", "metric")
    try:
        result = metric(*arguments)
        found = {str(k): float(v) for k, v in (result if isinstance(result, Mapping) else {own: result}).items()}
    except HalfbyteError:
        raise
    except Exception as error:
        raise UsageError(f"the metric '{own}' fails with {type(error).__name__}: {error}") from error
    bad = [k for k, v in found.items() if not math.isfinite(v)]
    if bad or not found:
        raise UsageError(f"the metric '{own}' gives {f'{found[bad[0]]} for {bad[0]}' if bad else 'no number'}")
    return found


def _classification(
    ways: Mapping[str, Forward],
    data: Iterable[tuple[Inputs, Tensor]],
    inputs: Sequence[tuple[str, Sequence[int | str], torch.dtype]],
    progress: Progress,
) -> Evaluation:
    logits: dict[str, list[Tensor]] = {way: [] for way in ways}
    targets: list[Tensor] = []
    for i, (x, y) in enumerate(data):
        check_inputs(x, inputs, f"batch {i} of the labelled data")
        for way, forward in ways.items():
            out = forward(*x)
            first = out if isinstance(out, Tensor) else out[0]
            if first.ndim != 2:
                raise UsageError(
                    f"the network's first output has shape {list(first.shape)}, not [batch, classes]: give a --metric"
                )
            logits[way].append(first)
        targets.append(y)
        progress("evaluate", i + 1, None)
    if not targets:
        raise DataError("the labelled data is empty")
    target = torch.cat(targets)
    outputs = {way: torch.cat(parts) for way, parts in logits.items()}
    decided = {way: o.argmax(1) for way, o in outputs.items()}
    right = {way: (d == target).double() for way, d in decided.items()}
    scores = {"top-1": {way: float(r.mean()) for way, r in right.items()}}
    if outputs["float"].shape[1] >= 10:
        scores["top-5"] = {
            w: float((o.topk(5, 1).indices == target[:, None]).any(1).double().mean()) for w, o in outputs.items()
        }
    last = "file" if "file" in ways else "simulation"
    agreement = {f"{last}_float": float((decided[last] == decided["float"]).double().mean())}
    disagreements: tuple[tuple[int, float], ...] = ()
    if "file" in ways:
        differing = (decided["file"] != decided["simulation"]).nonzero().flatten().tolist()
        agreement["file_simulation"] = 1 - len(differing) / len(target)
        o = outputs["file"]
        disagreements = tuple((i, float(o[i, decided["file"][i]] - o[i, decided["simulation"][i]])) for i in differing)
    return Evaluation(len(target), scores, paired(right["float"], right[last]), agreement, disagreements)


def paired(before: Tensor, after: Tensor) -> Interval:
    """Mean difference ``after - before`` of two scores for each sample [N], in points, with its 95 % interval."""
    d = ((after - before) * 100).tolist()
    spread = _CONFIDENCE * statistics.stdev(d) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    mean = statistics.fmean(d)
    return Interval(mean, mean - spread, mean + spread)


def signal_to_noise(m: QModel, samples: Inputs) -> dict[str, float]:
    """Value -> 10 log10 of signal power over the power of the difference between float and simulation, in dB.

    All values of ``samples`` are held at once: a handful of samples is enough.
    """
    floats: dict[str, Tensor] = {}

    def remember(name: str, x: Tensor) -> Tensor:
        if x.is_floating_point():
            floats[name] = x
        return x

    found: dict[str, float] = {}
    quantize = simulate(m)

    def compare(name: str, x: Tensor) -> Tensor:
        y = quantize(name, x)
        if name in floats:
            reference = floats.pop(name).double()
            noise = float((y.double() - reference).square().sum())
            signal = float(reference.square().sum())
            found[name] = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
        return y

    with torch.inference_mode():
        run(m.as_float(), samples, remember)
        run(m, samples, compare)
    return found
