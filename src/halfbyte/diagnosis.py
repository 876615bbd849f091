"""What a diagnosis is: steps of the chart with verdicts, causes ranked by what they explain, repairs that were tried."""

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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


@dataclass(frozen=True)
class Diagnosis:
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

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(s.verdict)}</td><td>{html.escape(s.name)}</td><td>{html.escape(s.detail)}</td></tr>"
            for s in self.steps
        )
        named, evidence, command = (html.escape(t) for t in (self.cause.name, self.cause.evidence, self.cause.command))
        return f"<p><b>{named}</b>: {evidence}</p><p>Next: <code>{command}</code></p><table>{rows}</table>"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "cause": asdict(self.cause),
            "causes": [asdict(c) for c in self.causes],
            "steps": [asdict(s) for s in self.steps],
            "quantizers": dict(self.quantizers),
            "rescued": dict(self.rescued),
            "repairs": [asdict(r) for r in self.repairs],
            "channels": [asdict(c) for c in self.channels],
            "samples": self.samples,
            "labelled": self.labelled,
        }
