"""The steps that recipes are made of: what each does with a model, by what it is told and by what all of them know."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from halfbyte.blocks import Blocks, refine, require_free_batch
from halfbyte.budgets import Budget
from halfbyte.calibrate import Progress, calibrate
from halfbyte.correct import correct_bias
from halfbyte.data import Samples
from halfbyte.descent import Descent
from halfbyte.errors import UsageError
from halfbyte.formats import Bits
from halfbyte.grids import RULES, GridRule
from halfbyte.local import LayerSolver
from halfbyte.losses import Loss, noise_to_signal
from halfbyte.methods.adaquant import AdaQuant
from halfbyte.methods.adaround import AdaRound
from halfbyte.mixed import Choosing, Widths, chosen, prepared
from halfbyte.model import Inputs, LogEntry, QModel, Target
from halfbyte.overrides import Overrides
from halfbyte.place import place
from halfbyte.reconstruct import reconstruct, split
from halfbyte.refine_ranges import refine_ranges
from halfbyte.refinement import LEARNED, Learned
from halfbyte.run import fixed_batch
from halfbyte.transforms.absorb_bias import absorb_bias
from halfbyte.transforms.equalize import WIDE, equalize
from halfbyte.transforms.fold_batchnorm import fold_batchnorm
from halfbyte.transforms.rotate import rotate
from halfbyte.transforms.split_tensor import split_tensor
from halfbyte.tune import tune
from halfbyte.tune_statistics import tune_statistics

Range = Literal["mse", "min-max", "percentile"]
From = Literal["auto", "data", "moments"]
Method = Literal["nearest", "descent", "adaround", "adaquant", "blocks"]
METHODS: dict[str, Callable[[], LayerSolver]] = {"descent": Descent, "adaround": AdaRound, "adaquant": AdaQuant}
# So many samples tell the channels of a network apart, and so many others which of two models is better.
FEW, HELD_OUT = 64, 32
# Steps of each block and of the whole network where nothing, and where only the time, is said; the blocks' share of the time.
_STEPS, _MANY, _FIRST = 300, 20_000, 0.25
# Of the whole network, biases and scales move: with codes as well it fits its samples better, and others no better.
_TOGETHER: tuple[Learned, ...] = ("biases", "scales")
# Many small steps of few samples: where much is rounded, larger ones do harm first, and have no time to make up for it.
_BATCH, _GENTLE = 8, 0.007


@dataclass(frozen=True)
class Context:
    """What steps need to know besides the model."""

    source: Samples | None
    target: Target
    weight_bits: int
    activation_bits: int
    overrides: Overrides
    ranges: Mapping[str, tuple[float, float]]
    progress: Progress
    activations: GridRule | None = None  # rules given as objects go before the recipe's
    weights: GridRule | None = None
    uniform: bool = False
    seed: int = 0
    kept: Path | None = None  # where solved layers are kept, so that an interrupted run can go on
    time_limit: float | None = None  # seconds for learned methods
    memory: int | None = None  # bytes of running values to hold at once
    widths: Widths | None = None  # to choose among; weight_bits and activation_bits are then the narrowest
    budget: Budget | None = None  # what the choice may cost
    choosing: Widths | None = None  # one width of these is at work

    def at(self, pair: Bits) -> "Context":
        """The same for one of the widths alone."""
        kept = None if self.kept is None else self.kept / str(pair)
        w, a = pair.weights, pair.activations
        return replace(self, weight_bits=w, activation_bits=a, widths=None, choosing=self.widths, kept=kept)

    def few(self, m: QModel) -> list[Inputs]:
        """Some samples for steps that need only channel statistics, none of them held out."""
        return [] if self.source is None else _taken(m, self.source, FEW, skip=HELD_OUT)

    def lazily(self, m: QModel) -> Iterator[Inputs]:
        """The same, read only if somebody wants them."""
        yield from self.few(m)

    def held_out(self, m: QModel) -> list[Inputs]:
        """Samples that decide between two models."""
        return [] if self.source is None else _taken(m, self.source, HELD_OUT)


def _taken(m: QModel, batches: Iterable[Inputs], count: int, skip: int = 0) -> list[Inputs]:
    """The samples from ``skip`` on, ``count`` of them if there are; of a small set, all of them. Whole batches where they are fixed."""
    unit = fixed_batch(m) or 1
    count, skip = (-(-n // unit) * unit for n in (count, skip))
    found: list[Inputs] = []
    for batch in batches:
        found.append(batch)
        if sum(len(b[0]) for b in found) >= count + skip:
            break
    joined = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    if skip and len(joined[0]) > 2 * skip:
        joined = tuple(t[skip:] for t in joined)
    return [tuple(t[:count] for t in joined)]


def _equalize(
    m: QModel,
    c: Context,
    *,
    method: Literal["noise", "weights"] = "noise",
    ranges: Literal["symmetric", "asymmetric"] = "symmetric",
) -> QModel:
    wide = {"weight_bits": c.weight_bits, "activation_bits": c.activation_bits}
    few = None if c.source is None else c.lazily(m)
    return equalize(m, few, method=method, per_channel=c.target.per_channel, ranges=ranges, fixed=c.ranges, **wide)


def _rotate(m: QModel, c: Context) -> QModel:
    few = c.few(m)
    if not few:
        return m.logged(LogEntry("rotate", None, "left as it is: there are no data"))
    return rotate(m, few, weight_bits=c.weight_bits, activation_bits=c.activation_bits, fixed=c.ranges)


def _absorb(m: QModel, c: Context) -> QModel:
    remembered = m.moments and c.activation_bits >= WIDE  # as equalization
    return absorb_bias(m, None if remembered else c.few(m) or None)


def place_step(m: QModel, c: Context, *, symmetric_weights: bool = False) -> QModel:
    mixed = c.choosing is not None and len(c.choosing.activations) > 1
    return place(
        m,
        c.target,
        weight_bits=c.weight_bits,
        activation_bits=c.activation_bits,
        overrides=c.overrides,
        uniform=c.uniform,
        narrow=mixed and not c.uniform,
        symmetric_weights=symmetric_weights,
    )


def _calibrate(
    m: QModel,
    c: Context,
    *,
    weights: Range = "mse",
    activations: Range = "mse",
    logits: Literal["same", "cross-entropy"] = "same",
    source: From = "auto",
    correct: bool = True,
) -> QModel:
    data = None if source == "moments" else c.source
    if source == "data" and data is None:
        raise UsageError('this recipe calibrates from = "data": give --calibration')
    rule = RULES[activations] if data is not None or activations != "mse" else RULES["min-max"]
    return calibrate(
        m,
        data,
        activations=c.activations or rule,
        weights=c.weights or RULES[weights],
        overrides={
            n: r for n, r in c.ranges.items() if m.plan.get(n) is not None or n not in {str(i.target) for i in m.inputs}
        },
        logits=logits,
        correct=correct,
        progress=c.progress,
    )


def _allocate(
    m: QModel,
    c: Context,
    *,
    method: Literal["nearest", "descent", "adaquant"] = "nearest",
    metric: Literal["auto", "outputs", "divergence", "noise", "second-order"] = "auto",
    weights: Range = "mse",
    activations: Range = "mse",
    logits: Literal["same", "cross-entropy"] = "same",
    source: From = "auto",
    correct: bool = True,
) -> QModel:
    """Place and calibrate; where there are several widths, once for each, and the integer programme chooses."""
    ranges = {"weights": weights, "activations": activations, "logits": logits, "source": source, "correct": correct}
    if c.widths is None or c.budget is None or not c.widths.several:
        return _calibrate(place_step(m, c), c, **ranges)  # type: ignore[arg-type]
    found = candidates(m, c, method, metric, ranges)
    return chosen(found, c.budget, c.held_out(m), seed=c.seed)


def candidates(m: QModel, c: Context, method: str, metric: str, ranges: Mapping[str, Any]) -> Choosing:
    """A finished model for each pair of widths, and what every unit loses and costs at each."""
    if c.source is None or c.widths is None:
        raise UsageError("widths are chosen by what the layers lose on data: give --calibration")

    def make(pair: Bits) -> QModel:
        own = c.at(pair)
        candidate = _calibrate(place_step(m, own), own, **ranges)
        if method == "nearest":
            return candidate
        return _reconstruct(candidate, own, method=method, inputs="float")  # type: ignore[arg-type]

    if metric == "auto":  # a bound in points is about decisions; noise at the outputs tells more on few samples
        metric = "divergence" if c.budget is not None and c.budget.drop is not None else "outputs"
    timed = c.budget is not None and c.budget.latency is not None
    return prepared(make, c.widths, c.lazily(m), metric=metric, timed=timed, progress=c.progress)  # type: ignore[arg-type]


def _correct(m: QModel, c: Context, *, source: From = "auto") -> QModel:
    if source == "data" and c.source is None:
        raise UsageError('this recipe corrects biases from = "data": give --calibration')
    data = None if source == "moments" else c.few(m) or None
    return correct_bias(m, data, ranges=c.ranges)


def _split(m: QModel, c: Context, *, share: float = 0.1, activations: float = 0.0, worth: float = 0.0) -> QModel:
    if c.source is None:
        return m.logged(LogEntry("split_tensor", None, "left out: there are no data"))
    if not share and c.widths is not None and c.widths.several:
        return m.logged(LogEntry("split_tensor", None, "left out: widths were chosen instead, and weights for them"))
    if activations and c.uniform and c.activation_bits < WIDE:
        text = "every value is read in one part: the same width was asked for everywhere"
        m, activations = m.logged(LogEntry("split_tensor", None, text)), 0.0
    return split_tensor(m, c.few(m), share=share, activations=activations, worth=worth)


def _reconstruct(
    m: QModel,
    c: Context,
    *,
    method: Method = "descent",
    iterations: int = 0,
    inputs: Literal["quantized", "float"] = "quantized",
    activations: bool = True,
) -> QModel:
    if c.source is None:
        return m.logged(LogEntry("reconstruct", None, "left out: there are no data"))
    if method == "nearest":
        if iterations:
            raise UsageError(
                "method 'nearest' takes no iterations: leave them out, or choose adaround, adaquant or blocks"
            )
        return m.logged(LogEntry("reconstruct", None, "left out: weights are rounded to the nearest code"))
    if method == "blocks":
        if inputs == "float":
            raise UsageError('blocks are refined on what the quantized network gives them: leave inputs = "float" out')
        require_free_batch(m)
        start = reconstruct(m, c.source, Descent(), seed=c.seed, budget=c.memory, kept=c.kept, progress=c.progress)
        return _gradually(start, c, iterations)
    solver = METHODS[method]()
    if iterations:
        if not solver.iterations:
            raise UsageError(
                f"method '{method}' takes no iterations: leave them out, or choose adaround, adaquant or blocks"
            )
        solver = replace(solver, iterations=iterations)  # type: ignore[type-var]
    return reconstruct(
        m, c.source, solver, inputs=inputs, activations=activations, seed=c.seed, budget=c.memory,
        time_limit=c.time_limit, kept=c.kept, progress=c.progress,
    )  # fmt: skip


def better(stage: str, before: QModel, after: QModel, noise: Sequence[float], *, what: str = "") -> QModel:
    """Of the models before and after a step the one with less noise at the outputs on held-out samples, which its log tells."""
    kept = noise[1] <= noise[0]
    told = f"noise-to-signal at the outputs on held-out samples {noise[0]:.4g} before, {noise[1]:.4g} after"
    return (after if kept else before).logged(LogEntry(stage, None, f"{what}{'kept' if kept else 'undone'}: {told}"))


def _gradually(m: QModel, c: Context, iterations: int) -> QModel:
    """Blocks, one after another, then all of the network together; a time limit alone means as many steps as fit.

    Blocks that each do better on held-out samples may do worse together: what they do to the outputs there decides.
    """
    assert c.source is not None
    start, limit = time.monotonic(), c.time_limit
    steps = iterations or (_STEPS if limit is None else _MANY)
    refined = refine(
        m, c.source, Blocks(iterations=steps), seed=c.seed, time_limit=None if limit is None else _FIRST * limit,
        kept=c.kept, progress=c.progress,
    )  # fmt: skip
    _, held = split(c.source)
    noise = [noise_to_signal(v, held, m.as_float()) for v in (m, refined)]
    m = better("reconstruct", replace(m, log=refined.log), refined, noise, what="blocks ")
    left = None if limit is None else limit - (time.monotonic() - start)
    return tune(
        m, c.source, learn=_TOGETHER, features=True, mix=True, iterations=steps, batch=_BATCH,
        scale_rate=_GENTLE, seed=c.seed, time_limit=left, kept=c.kept, progress=c.progress,
    )  # fmt: skip


def _refine_ranges(m: QModel, c: Context, *, widest: int = 8) -> QModel:
    if c.source is None:
        return m.logged(LogEntry("refine_ranges", None, "left out: there are no data"))
    if c.activations is not None:
        return m.logged(LogEntry("refine_ranges", None, f"left out: the rule '{c.activations.name}' was asked for"))
    return refine_ranges(m, c.few(m), widest=widest, fixed=c.ranges, seed=c.seed, progress=c.progress)


def _tune_statistics(m: QModel, c: Context) -> QModel:
    if c.source is None:
        return m.logged(LogEntry("tune_statistics", None, "left out: there are no data"))
    return tune_statistics(m, c.few(m), budget=c.memory, progress=c.progress)


def _tune(m: QModel, c: Context, *, learn: Learned = "biases", loss: Loss = "error", iterations: int = 0) -> QModel:
    if c.source is None:
        return m.logged(LogEntry("tune", None, "left out: there are no data"))
    steps: dict[str, Any] = {"iterations": iterations} if iterations else {}  # else as many as tune takes by itself
    return tune(
        m, c.source, learn=LEARNED[: LEARNED.index(learn) + 1], loss=loss, seed=c.seed,
        time_limit=c.time_limit, kept=c.kept, progress=c.progress, **steps,
    )  # fmt: skip


Step = Callable[..., QModel]
STEPS: dict[str, Step] = {
    "fold_batchnorm": lambda m, c: fold_batchnorm(m),
    "rotate": _rotate,
    "equalize": _equalize,
    "absorb_bias": _absorb,
    "place": place_step,
    "calibrate": _calibrate,
    "allocate": _allocate,
    "refine_ranges": _refine_ranges,
    "split_tensor": _split,
    "correct_bias": _correct,
    "reconstruct": _reconstruct,
    "tune_statistics": _tune_statistics,
    "tune": _tune,
}
PYTHON_NAMES = {"from": "source"}  # a word that TOML has and Python keeps for itself
