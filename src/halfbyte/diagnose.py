"""The white paper's debugging chart as an algorithm (arXiv 2106.08295, section 5.3): from a bad result to one named cause.

Float with quantizers bypassed, weights and running values apart, each quantizer alone, the worst tensors channel by channel,
repairs tried one by one. A check that cannot run says why and stops nothing.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from halfbyte.calibrate import Progress, silent
from halfbyte.causes import RULES
from halfbyte.data import Source
from halfbyte.diagnosis import Cause, Channels, Diagnosis, Repair, Step, Verdict
from halfbyte.errors import DataError, HalfbyteError, UsageError
from halfbyte.evidence import FINE, POINTS, Evidence, lies_in
from halfbyte.losses import comparable
from halfbyte.lower import lower
from halfbyte.matching import SHIFT, match
from halfbyte.model import Inputs, Outputs, QModel
from halfbyte.output import UNPROVEN, Result, keep, opened
from halfbyte.parity import compare
from halfbyte.preprocess import Preprocess
from halfbyte.probes import PORTION, Bench, Portion, bench, each_alone, each_left_out, look
from halfbyte.repairs import attempts, tried
from halfbyte.run import fixed_batch, whole
from halfbyte.scoring import labelled_or_not

_WORST = 6  # quantizers looked at more closely
_DRAWN = 3
_PROVEN_ON = 4  # samples that the file is run on
_SAME = 1e-3  # noise-to-signal between float networks that should be one
T = TypeVar("T")


@torch.inference_mode(False)  # gradients, whatever the caller has turned off
def diagnose(
    output: Result,
    data: Source | None = None,
    *,
    network: nn.Module | None = None,
    file: Path | str | None = None,
    classes: str | PathLike[str] | None = None,
    samples: int = 32,
    repairs: bool = True,
    command: str = "",
    preprocess: Preprocess | None = None,
    progress: Progress = silent,
) -> Diagnosis:
    """Find out why a quantized network is worse than its float network, or that it is not.

    output: an output folder, whose summary and report remember the result; or a calibrated model. Both carry a few calibration
    samples of their own. data: samples to judge by, as for :func:`evaluate` or without labels, batches of inputs or of (inputs,
    class indices); without them its own samples serve. network: the module it was made from, to check the float graph against.
    file: the exported file. samples: how many are used, from the first. preprocess: of pictures, in place of the folder's own.
    repairs: try them (the slowest part). command: how the model was made, which the suggested command is built on. Raises
    :class:`UsageError` for a model without grids or without any samples, :class:`DataError` for data that do not fit.
    """
    m, exported, kept, described = opened(output)
    if file is None and not isinstance(output, QModel):
        unproven = Path(output) / UNPROVEN
        file = exported or (unproven if unproven.exists() else None)
    command = command or described.get("command") or ""
    if not isinstance(output, QModel):
        command = lies_in(command, Path(output))
    if not m.grids:
        raise UsageError("there is nothing to diagnose: the model has no grids; call hb.quantize first")
    as_exported, m = m, comparable(m)
    own: list[Portion] = []
    if m.samples:
        own += list(_portions(m, [(m.samples, None)], len(m.samples[0])))
    given: list[Portion] = []
    if data is not None:
        some = labelled_or_not(m, data, preprocess=preprocess or kept, samples=samples, classes=classes)
        given = list(_portions(m, some, samples))
    portions = given or own
    if not portions:
        raise UsageError("there are no samples to diagnose on: the checkpoint holds none, so give data")
    chart = _Chart(m, as_exported, progress)
    b = _bench(m, portions)
    e = Evidence(m, b, b.quantized(m), b.quantized(m, weights=False, values=False), b.quantized(m, values=False),
                 b.quantized(m, weights=False), separate=bool(given) and m.calibrated > 0, command=command)  # fmt: skip
    e = chart.sanity(e, network, own if m.calibrated else [], given)
    e = chart.file(e, None if file is None else Path(file))
    chart.split(e)
    e = chart.values(e, own)
    e = chart.each(e)
    if repairs and not e.fine:
        e = chart.repair(e, own)
    causes = chart.causes(e)
    found = Diagnosis(
        causes[0],
        tuple(chart.steps),
        causes,
        e.alone,
        chart.rescued,
        e.repairs,
        chart.channels(e),
        b.samples,
        b.labelled,
    )
    keep(output, described, diagnosis=found)
    return found


def _bench(m: QModel, portions: list[Portion]) -> Bench:
    try:
        return bench(m, portions)
    except (RuntimeError, IndexError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"the float network cannot run on the data: {first}") from error


def _portions(m: QModel, data: Iterable[Portion], samples: int) -> Iterator[Portion]:
    """Samples, some at a time, with their class indices if there are; whole batches of a network that fixes its batch."""
    left, fixed = whole(m, samples), fixed_batch(m)
    step = fixed or PORTION
    for x, y in data:
        for i in range(0, min(left, len(x[0])), step):
            end = min(i + step, left, len(x[0]))
            if fixed is not None and end - i < fixed:
                break
            yield tuple(t[i:end] for t in x), None if y is None else y[i:end]
        left -= len(x[0])
        if left <= 0:
            return


def _joined(portions: list[Portion]) -> Inputs:
    return tuple(torch.cat(parts) for parts in zip(*(x for x, _ in portions), strict=True))


def _labels(portions: list[Portion]) -> Tensor | None:
    given = [y for _, y in portions if y is not None]
    return torch.cat(given) if len(given) == len(portions) else None


@dataclass
class _Chart:
    """The steps so far. Every check runs guarded: what goes wrong in it becomes its verdict."""

    m: QModel
    as_exported: QModel  # with its own outputs, where those are no numbers to judge by
    progress: Progress
    steps: list[Step] = field(default_factory=list)
    rescued: dict[str, float] = field(default_factory=dict)

    def guarded(self, name: str, work: Callable[[], T]) -> T | None:
        """The result, or None with a step that says why there is none."""
        self.progress(f"diagnose: {name}", len(self.steps), None)
        try:
            return work()
        except HalfbyteError as error:
            self.skip(name, str(error))
        except Exception as error:
            self.skip(
                name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
            )
        return None

    def skip(self, name: str, why: str) -> None:
        """A check that did not run."""
        self.steps.append(Step(name, "not run", why))

    def note(self, name: str, measured: float, threshold: float, detail: str) -> None:
        """A check that ran."""
        verdict: Verdict = "passed" if measured <= threshold else "failed"
        self.steps.append(Step(name, verdict, detail, measured, threshold))

    def sanity(self, e: Evidence, network: nn.Module | None, own: list[Portion], given: list[Portion]) -> Evidence:
        """Step 1: the network itself, and what it is fed with."""
        right = "" if e.floats.right is None else f"; {e.floats.right:.1%} right in float"
        self.note(
            "quantizers bypassed",
            e.floats.noise,
            FINE,
            f"noise-to-signal {e.floats.noise:.3g} (tuned biases only){right}",
        )
        if network is not None:
            found = self.guarded(
                "the module itself", lambda: _against(network, _bench(self.as_exported, list(e.bench.portions)))
            )
            if found is not None:
                e = replace(e, reference=found[0], training=found[1])
                detail = f"noise-to-signal between module and graph {found[0]:.3g}, as it was given {found[1]:.3g}"
                self.note("the module itself", max(found), _SAME, detail)
        for portions, which in ((own, "calibration"), (given, "evaluation")):
            if not portions:
                continue
            name = f"inputs of the {which} data"
            told = self.guarded(name, lambda portions=portions: match(self.m, _joined(portions), _labels(portions)))  # type: ignore[misc]
            if told is None:
                if not self.steps or self.steps[-1].name != name:
                    self.skip(name, "no batch norm remembers what the first layers put out in training")
                continue
            e = replace(e, calibration=told) if which == "calibration" else replace(e, data=told)
            verdict: Verdict = "failed" if told.off else "passed"
            detail = f"first layers {told.shift:.2f} deviations off, spread {told.spread:.2g} times"
            self.steps.append(Step(name, verdict, detail, told.shift, SHIFT))
        return e

    def file(self, e: Evidence, path: Path | None) -> Evidence:
        """The file in its engine, against the simulation."""
        if path is None:
            self.skip("the file", "there is none to compare")
            return e
        own = self.m.samples or _joined(list(e.bench.portions))
        count = _PROVEN_ON if self.m.dynamic else len(own[0])
        try:
            parity = compare(lower(self.as_exported), path, tuple(t[:count] for t in own))
        except Exception as error:  # a file that nobody can run is a finding, not a failure of the diagnosis
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.steps.append(Step("the file", "failed", first))
            return replace(e, unusable=f"the file does not run: {first}")
        self.note("the file", float(not parity.proven), 0.0, str(parity))
        return replace(e, parity=parity)

    def split(self, e: Evidence) -> None:
        """Step 2: weights and running values apart."""
        for name, s in (("all quantized", e.whole), ("weights only", e.weights), ("running values only", e.values)):
            flips = "" if s.flips is None else f", {s.flips:.1%} of decisions differ"
            right = "" if s.right is None else f", {s.right:.1%} right"
            self.note(name, s.noise, FINE, f"noise-to-signal {s.noise:.3g}{flips}{right}")
        if e.points is not None and e.whole.sure is not None:
            how = "" if e.bench.labelled else " by the float network's own probabilities"
            detail = f"{e.points:.1f} points lost{how}, {max(0.0, 100 * e.whole.sure):.1f} of them for sure"
            self.note("points", 100 * e.whole.sure, POINTS, detail)

    def values(self, e: Evidence, own: list[Portion]) -> Evidence:
        """Step 6, first of all: every value and every layer, in one float pass."""
        found = self.guarded("values and layers", lambda: look(self.m, e.bench))
        if found is not None:
            e = replace(e, seen=found[0], errors=found[1])
        if e.separate and own:
            before = self.guarded("values on the calibration samples", lambda: look(self.m, _bench(self.m, own)))
            if before is not None:
                e = replace(e, chosen_on=before[0])
        return e

    def each(self, e: Evidence) -> Evidence:
        """Step 5: every quantizer alone, and all but the worst."""
        alone = self.guarded("each quantizer alone", lambda: each_alone(self.m, e.bench))
        if not alone:
            return e
        worst = list(alone)[:_WORST]
        self.rescued = self.guarded("all but one", lambda: each_left_out(self.m, e.bench, worst)) or {}
        total = sum(alone.values())
        detail = f"of {len(alone)}, {worst[0]} costs most: {alone[worst[0]]:.3g}, {alone[worst[0]] / max(total, 1e-30):.0%} of all"
        self.note("each quantizer alone", alone[worst[0]], FINE, detail)
        return replace(e, alone=alone)

    def repair(self, e: Evidence, own: list[Portion]) -> Evidence:
        """Step 7: repairs one by one, fitted on other samples than they are scored on where there are any."""
        half = max(1, len(e.bench.portions) // 2)
        fit = own if e.separate and own else list(e.bench.portions[:half])
        judged = e.bench if e.separate and own else _bench(self.m, list(e.bench.portions[half:]) or fit)
        before = judged.quantized(self.m).noise
        found: list[Repair] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, attempt in attempts(self.m, [x for x, _ in fit], e.seen, list(e.alone)).items():
                self.progress(f"diagnose: try {name}", len(found), None)
                found.append(tried(name, attempt, judged, before))
        return replace(e, repairs=tuple(sorted(found, key=lambda r: -r.gain)))

    def causes(self, e: Evidence) -> tuple[Cause, ...]:
        """All causes, the one to name first in front."""
        found: list[Cause] = []
        for rule in RULES:
            found += self.guarded(f"rule {rule.__name__}", lambda rule=rule: list(rule(e))) or []  # type: ignore[misc]
        if not found:
            found = [
                Cause(
                    "unknown",
                    "no rule fits what was measured",
                    e.whole.noise,
                    FINE,
                    "",
                    0.0,
                    e.again("--recipe low-bit"),
                )
            ]
        return tuple(sorted(found, key=lambda c: (c.order, -c.score)))

    def channels(self, e: Evidence) -> tuple[Channels, ...]:
        """Step 6: the ranges of the worst running values, channel by channel."""
        worst = [v for v in e.alone if v in e.seen][:_DRAWN]
        return tuple(
            Channels(v, tuple(e.seen[v].low.tolist()), tuple(e.seen[v].high.tolist()),
                     float(e.seen[v].grid.minimum.min()), float(e.seen[v].grid.maximum.max()))
            for v in worst
        )  # fmt: skip


@torch.no_grad()
def _against(network: nn.Module, b: Bench) -> tuple[float, float]:
    """Noise between the graph and the module: in eval mode, and as the module was given."""
    modes = {module: module.training for module in network.modules()}
    state = {k: t.clone() for k, t in network.state_dict().items()}
    found = []
    try:
        for given in (False, True):
            tally = b.tally()
            for module, training in modes.items():
                module.training = training and given
            for x, _ in b.portions:
                tally.add(_outputs(network(*x)))
            found.append(tally.score.noise)
    finally:
        for module, training in modes.items():
            module.training = training
        network.load_state_dict(state)  # a batch norm in train mode has counted along
    return found[0], found[1]


def _outputs(y: Any) -> Outputs:
    flat = torch.utils._pytree.tree_leaves(y)
    return tuple(t for t in flat if isinstance(t, Tensor))
