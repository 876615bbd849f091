"""What a diagnosis is: steps of the chart with verdicts, causes ranked by what they explain, repairs that were tried."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from halfbyte.shown import Shown, plain

Verdict = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Step:
    """One box of the debugging chart (arXiv 2106.08295, figure 8): what was measured, against which threshold, and the verdict.

    detail: the figures in words; for a step that could not run, why.
    """

    name: str
    verdict: Verdict
    detail: str
    measured: float | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        return f"{self.verdict:8} {self.name}: {self.detail}"


@dataclass(frozen=True)
class Cause:
    """A named cause: the evidence in words and numbers, the threshold that it passed and why it lies there.

    order: causes of a lower order are settled first, for they spoil the figures of the others: 0 the network or its data, 1 the
    arithmetic of the file, 2 the rounding, 3 what costs no accuracy. score: within an order, the share of the output's noise
    that goes with it (0 to 1). command: what to type next. values: the values concerned, the worst first.
    """

    name: str
    evidence: str
    measured: float
    threshold: float
    reason: str
    score: float
    command: str
    order: int = 2
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Repair:
    """A repair that was tried: noise-to-signal at the outputs before and after; ``failed`` says why it could not be tried."""

    name: str
    before: float
    after: float | None
    failed: str | None = None

    @property
    def gain(self) -> float:
        """The share of the noise that it removes; 0 where it removes none or could not be tried."""
        if self.after is None or self.before <= 0:
            return 0.0
        return max(0.0, 1 - self.after / self.before)

    def __str__(self) -> str:
        if self.after is None:
            return f"{self.name}: not tried: {self.failed}"
        return f"{self.name}: noise-to-signal {self.before:.3g} -> {self.after:.3g} ({-self.gain:+.0%})"


@dataclass(frozen=True)
class Channels:
    """The ranges of a value's channels, for drawing: [channels] lowest and highest, and the ends of its grid."""

    value: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    grid_low: float
    grid_high: float


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """The chart's answer: one cause and one command, and all that led there.

    steps: in the order of the chart. causes: every cause found, the named one first. quantizers: value -> noise-to-signal at the
    outputs with that value alone quantized, the worst first. rescued: value -> the same with all but that value quantized.
    """

    cause: Cause
    steps: tuple[Step, ...] = ()
    causes: tuple[Cause, ...] = ()
    quantizers: Mapping[str, float] = field(default_factory=dict)
    rescued: Mapping[str, float] = field(default_factory=dict)
    repairs: tuple[Repair, ...] = ()
    channels: tuple[Channels, ...] = ()
    samples: int = 0
    labelled: bool = False

    def __str__(self) -> str:
        lines = [str(s) for s in self.steps]
        if self.quantizers:
            lines.append("noise-to-signal at the outputs with one value quantized, and with all others:")
            lines += [
                f"  {name}: alone {x:.3g}" + (f", all but it {self.rescued[name]:.3g}" if name in self.rescued else "")
                for name, x in list(self.quantizers.items())[:5]
            ]
        lines += [f"repair   {r}" for r in self.repairs]
        lines += [f"also     {c.name}: {c.evidence}" for c in self.causes[1:]]
        c = self.cause
        return "\n".join([*lines, f"cause    {c.name}: {c.evidence}", f"next     {c.command}"])

    def facts(self) -> dict[str, Any]:
        """The cause, what to do, and the steps that led there."""
        return {
            "cause": self.cause.name,
            "evidence": self.cause.evidence,
            "next": self.cause.command,
            "steps": plain(self.steps),
            "repairs": plain(self.repairs),
        }
