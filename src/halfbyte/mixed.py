"""Bit widths chosen under a budget: candidates of one width each, what every unit loses, the integer programme, the best solution.

The order of CalibTIP's pipelines (arXiv 2006.10518, section 4): layers are calibrated for each width on their own, on what the
float network gives them, so that any mixture of them fits; whoever comes afterwards calibrates the mixture once more.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from halfbyte.allocate import Allocation, allocate, best, front, select, several
from halfbyte.budgets import Budget
from halfbyte.calibrate import Progress, silent
from halfbyte.costs import CostTable, costs
from halfbyte.errors import UsageError
from halfbyte.formats import Bits
from halfbyte.latency import EngineLatency
from halfbyte.model import Inputs, QModel
from halfbyte.sensitivity import Metric, SensitivityTable, output_loss, sensitivity
from halfbyte.shown import Shown
from halfbyte.units import Candidates, Units, units

SOLUTIONS = 6  # under perturbed losses, measured as whole networks
_SAMPLES = 64


@dataclass(frozen=True)
class Widths:
    """The widths that weights and running values may have, ascending. Raises :class:`UsageError` where there are none."""

    weights: tuple[int, ...]
    activations: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.weights or not self.activations:
            raise UsageError("name at least one width of weights and one of activations")

    @property
    def several(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.weights) > 1 or len(self.activations) > 1

    @property
    def pairs(self) -> list[Bits]:
        """Every pair of widths, the narrowest first."""
        return [Bits(w, a) for w in self.weights for a in self.activations]


def widths(weights: int | Sequence[int], activations: int | Sequence[int]) -> Widths:
    """Widths from single numbers or lists, without repetitions."""

    def ordered(given: int | Sequence[int]) -> tuple[int, ...]:
        return (given,) if isinstance(given, int) else tuple(sorted(set(given)))

    return Widths(ordered(weights), ordered(activations))


@dataclass(frozen=True)
class Choosing:
    """Everything that a choice is made from."""

    candidates: Candidates
    units: Units
    table: SensitivityTable
    costs: CostTable


def prepared(
    make: Callable[[Bits], QModel],
    choice: Widths,
    data: Iterable[Inputs],
    *,
    metric: Metric = "outputs",
    timed: bool = False,
    progress: Progress = silent,
) -> Choosing:
    """A candidate for each pair of widths, their sensitivity on ``data`` and their costs.

    make: the finished candidate of a pair. timed: measure each layer's latency in the engine, too.
    """
    candidates = {}
    for done, pair in enumerate(choice.pairs):
        progress("candidates", done, len(choice.pairs))
        candidates[pair] = make(pair)
    table = sensitivity(candidates, data, metric=metric, samples=_SAMPLES, progress=progress)
    return Choosing(candidates, units(candidates), table, costs(candidates, latency=EngineLatency() if timed else None))


def chosen(found: Choosing, budget: Budget, data: Iterable[Inputs], *, seed: int = 0) -> QModel:
    """The model of least measured loss among the solutions of the programme under perturbed losses.

    Losses of single units add up only roughly, so that the solutions are measured on ``data`` as whole networks, and beside them
    the uniform widths that keep the budget.
    """
    solutions = several(found.candidates, found.table, budget, count=SOLUTIONS, seed=seed, costs=found.costs)
    if budget.drop is None:
        solutions += _uniform(found, budget)
        solutions = [best(found.candidates, solutions, data, found.table, samples=_SAMPLES)]
    return select(found.candidates, solutions[0])


def _choice(found: Choosing, pair: Bits) -> dict[str, int]:
    """The choice that a candidate itself is."""
    u = found.units
    return u.complete({unit: pair.activations if unit in u.groups else pair.weights for unit in u.open})


def _uniform(found: Choosing, budget: Budget) -> list[Allocation]:
    """The candidates as they are, where they keep the budget."""
    kept = []
    for pair in found.candidates:
        with suppress(UsageError):  # it costs more than the budget
            fixed = _choice(found, pair)
            kept.append(allocate(found.candidates, found.table, budget, costs=found.costs, fixed=fixed))
    return kept


@dataclass(frozen=True)
class Point:
    """A network on the accuracy-size front.

    label: ``W4A8`` of a uniform network, empty of a chosen one. costs, shares: by kind, and over the float network's. loss:
    measured on the samples, in the table's units. predicted: by the programme, over the widest network; None of uniform ones.
    weights, activations: widths of the units that have a choice.
    """

    label: str
    costs: dict[str, float]
    shares: dict[str, float]
    loss: float
    predicted: float | None
    weights: dict[str, int]
    activations: dict[str, int]

    @property
    def spread(self) -> str:
        """``W4A8``, or how many weights and groups of running values have which width."""
        if self.label:
            return self.label
        parts = []
        for what, widths_ in (("weights", self.weights), ("activations", self.activations)):
            counts = Counter(widths_.values())
            parts += [f"{what} " + ", ".join(f"{counts[w]} at {w}" for w in sorted(counts))] if counts else []
        return "; ".join(parts)


@dataclass(frozen=True, repr=False)
class Tradeoff(Shown):
    """The front: points by ascending size, uniform networks among them; what their loss means."""

    network: str
    metric: Metric
    points: tuple[Point, ...]
    by: str = "size"

    def __str__(self) -> str:
        lines = [f"{'bytes':>12}  {self.by.replace('_', '-'):>12}  {'loss':>9}  {'predicted':>9}  widths"]
        for p in self.points:
            predicted = "" if p.predicted is None else f"{p.predicted:.4g}"
            share = f"{p.shares[self.by]:.2%}"
            lines.append(f"{p.costs['size']:12,.0f}  {share:>12}  {p.loss:9.4g}  {predicted:>9}  {p.spread}")
        return "\n".join(lines)


def swept(
    found: Choosing, data: Iterable[Inputs], *, name: str = "", by: str = "logical_size", points: int = 10
) -> Tradeoff:
    """Measure the optima over a sweep of budgets, and every uniform candidate, as whole networks on ``data``.

    Losses of single units add up only roughly: an optimum that turns out worse than a network of no higher cost is left out.
    """
    kept, u = list(data), found.units
    metric: Metric = found.table.metric if found.table.metric in ("divergence", "outputs") else "outputs"

    def measured(m: QModel) -> float:
        return output_loss(m, kept, metric=metric, samples=_SAMPLES)

    rows = [_point(str(pair), found, _choice(found, pair), measured(m), None) for pair, m in found.candidates.items()]
    rows += [
        _point("", found, u.complete(a.choice), measured(select(found.candidates, a)), a.loss)
        for a in front(found.candidates, found.table, by=by, points=points, costs=found.costs)
    ]
    ordered = sorted(rows, key=lambda p: (p.costs[by], p.loss))
    least, kept_points = float("inf"), []
    for p in ordered:  # a chosen network that a cheaper one beats is on no front
        if p.label or p.loss < least:
            kept_points.append(p)
        least = min(least, p.loss)
    return Tradeoff(name, metric, tuple(kept_points), by)


def _point(label: str, found: Choosing, choice: dict[str, int], loss: float, predicted: float | None) -> Point:
    total = found.costs.total(choice)
    shares = {k: v / found.costs.reference[k] for k, v in total.items() if found.costs.reference.get(k)}
    u = found.units
    weights, read = ({n: choice[n] for n in u.open if (n in u.groups) is group} for group in (False, True))
    return Point(label, total, shares, loss, predicted, weights, read)
