"""Widths by an integer programme: least predicted loss under budgets, or least size under a bound on the loss.

Source: arXiv 2006.10518, section 4; solved by HiGHS. One binary variable for each unit and width, and one for each layer and
pair of widths, tied to both of the units that the layer multiplies.
"""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halfbyte.budgets import SHOWN, Budget
from halfbyte.costs import CostTable, costs
from halfbyte.errors import UsageError
from halfbyte.model import LogEntry, QModel, editable
from halfbyte.programme import Programme, Solved
from halfbyte.sensitivity import SensitivityTable, output_loss
from halfbyte.units import Candidates, Units, merged, passed_on, units, without_copies

Fixed = Mapping[str, int]


@dataclass(frozen=True)
class Allocation:
    """A width for every unit, and what it is predicted to do.

    choice: unit -> width. loss: the predicted increase, in the table's units. losses: the units' parts of it. costs: bytes, bits,
    operations and, if measured, seconds of the network; shares: the same over the float network's. status: ``optimal``, ``time
    limit``, or ``greedy``. gap: how far the optimum may be, relatively; None where nobody knows. reason: one sentence on how
    the choice came about. measured: the loss increase of the whole network, once :func:`best` has measured it.
    """

    choice: Mapping[str, int]
    loss: float
    losses: Mapping[str, float]
    costs: Mapping[str, float]
    shares: Mapping[str, float]
    status: str
    gap: float | None
    reason: str
    measured: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in vars(self).items()}

    def __str__(self) -> str:
        shares = ", ".join(f"{k.replace('_', '-')} {100 * v:.3g} %" for k, v in self.shares.items())
        return f"predicted loss {self.loss:.3g} at {shares} of float ({self.status})"


@dataclass(frozen=True)
class _Task:
    """What an allocation is about."""

    units: Units
    costs: CostTable
    table: SensitivityTable
    widths: Mapping[str, tuple[int, ...]]

    def allocation(self, choice: Mapping[str, int], status: str, gap: float | None, reason: str) -> Allocation:
        losses = {k: t[choice[k]] for k, t in self.table.losses.items()}
        total = self.costs.total(choice)
        shares = {k: v / self.costs.reference[k] for k, v in total.items()}
        return Allocation(dict(choice), sum(losses.values()), losses, total, shares, status, gap, reason)

    def programme(self, table: SensitivityTable | None = None) -> Programme:
        return Programme(self.units, self.costs, (table or self.table).losses, self.widths)


def _task(candidates: Candidates, table: SensitivityTable, known: CostTable | None, fixed: Fixed | None) -> _Task:
    u = units(candidates)
    if set(table.losses) != set(u.open) or any(tuple(sorted(t)) != u.widths[k] for k, t in table.losses.items()):
        raise UsageError("the sensitivity table was measured on other candidates: measure it on these")
    widths = dict(u.widths)
    for pattern, width in (fixed or {}).items():
        names = fnmatch.filter(widths, pattern)
        if not names:
            near = difflib.get_close_matches(pattern, list(widths), 1)
            hint = f"did you mean '{near[0]}'?" if near else "units are weights and running values with a grid"
            raise UsageError(f"'{pattern}' fixes no unit: {hint}")
        for name in names:
            if width not in u.widths[name]:
                raise UsageError(f"'{name}' cannot be fixed at {width} bits: the candidates have {u.widths[name]}")
            widths[name] = (width,)
    return _Task(u, known or costs(candidates), table, widths)


def allocate(
    candidates: Candidates,
    table: SensitivityTable,
    budget: Budget,
    *,
    costs: CostTable | None = None,
    fixed: Fixed | None = None,
    time_limit: float = 60.0,
) -> Allocation:
    """Choose the width of every unit.

    table: of :func:`sensitivity`. costs: of :func:`costs` (default: without latency). fixed: unit or glob -> width that it has to
    have. time_limit: seconds for the solver; the best choice by then is returned with its gap. Raises :class:`UsageError` where
    no choice keeps the budget, and names the least that could be kept.
    """
    task = _task(candidates, table, costs, fixed)
    return _solved(task, budget, task.programme(), time_limit)


def _solved(task: _Task, budget: Budget, programme: Programme, time_limit: float) -> Allocation:
    limits, loss = budget.limits(task.costs), budget.loss(task.table)
    goal = "loss" if loss is None else "size"
    bounds = limits if loss is None else {**limits, "loss": loss}
    found = programme.solve(goal, bounds, time_limit)
    if found is None:
        raise UsageError(_infeasible(task, programme, budget, bounds, time_limit))
    what = "least predicted loss" if loss is None else "least size"
    return task.allocation(found.choice, found.status, found.gap, f"{what} under {budget}")


def _infeasible(task: _Task, programme: Programme, budget: Budget, bounds: Mapping[str, float], limit: float) -> str:
    """Which bound cannot be kept, and the least that could: alone if that is too much already, else under the others."""
    alone = {k: programme.solve(k, {}, limit) for k in bounds}
    impossible = [k for k, s in alone.items() if s is not None and s.value > bounds[k]]
    kind = impossible[0] if impossible else next(iter(bounds))
    others = {} if impossible else {k: v for k, v in bounds.items() if k != kind}
    least: Solved | None = programme.solve(kind, others, limit)
    if least is None:
        return f"no choice of these widths keeps {budget} together: loosen one of them, or add candidates of fewer bits"
    beside = " beside the others" if others else ""
    if kind == "loss":
        table = task.table
        total = max(0.0, least.value + table.base)
        points = 100 * total if table.points is None else table.points * total**0.5
        return f"no choice of these widths keeps drop={budget.drop}{beside}: the least reachable is drop={points:.3g}"
    share = 100 * least.value / task.costs.reference[kind]
    name = kind.replace("_", "-")
    return (
        f"no choice of these widths keeps {name}={budget.given[kind]}{beside}: the least reachable is {least.value:.6g} "
        f"{SHOWN[kind]}, {name}={np.ceil(share * 100) / 100:.4g}%; allow that, or add candidates of fewer bits"
    )


def several(
    candidates: Candidates,
    table: SensitivityTable,
    budget: Budget,
    *,
    count: int = 10,
    spread: float = 0.3,
    seed: int = 0,
    costs: CostTable | None = None,
    fixed: Fixed | None = None,
    time_limit: float = 60.0,
) -> list[Allocation]:
    """Up to ``count`` different choices: the optimum, and those of losses each multiplied by exp(spread x normal noise).

    Losses of single units do not quite add up; :func:`best` measures the choices as whole networks and keeps one. All keep the
    budget; predicted losses are by the table as it is.
    """
    task = _task(candidates, table, costs, fixed)
    found = [_solved(task, budget, task.programme(), time_limit)]
    noise = np.random.default_rng(seed)
    for _ in range(4 * count):
        if len(found) >= count:
            break
        moved = {
            k: {w: x * float(np.exp(spread * noise.standard_normal())) for w, x in t.items()}
            for k, t in table.losses.items()
        }
        programme = task.programme(replace(table, losses=moved))
        bounds = budget.limits(task.costs)
        if budget.drop is not None:  # the bound holds by the true table, the noise moves the way there
            bounds["loss"] = budget.loss(table) or 0.0
        other = _perturbed(task, programme, bounds, time_limit, by_size=budget.drop is not None)
        if other is not None and all(other.choice != a.choice for a in found):
            found.append(replace(other, reason=f"{found[0].reason}, by perturbed losses"))
    return found


def _perturbed(
    task: _Task, programme: Programme, bounds: Mapping[str, float], limit: float, *, by_size: bool
) -> Allocation | None:
    solved = programme.solve("size" if by_size else "loss", bounds, limit)
    if solved is None:
        return None
    found = task.allocation(solved.choice, solved.status, solved.gap, "")
    return None if by_size and found.loss > bounds["loss"] else found


def best(
    candidates: Candidates,
    allocations: Sequence[Allocation],
    data: Iterable[Any],
    table: SensitivityTable,
    *,
    samples: int = 64,
) -> Allocation:
    """The allocation whose whole network loses least on the data, with ``measured`` set. Proxies are judged by divergence."""
    metric = table.metric if table.metric in ("divergence", "outputs", "loss") else "divergence"
    u, kept = units(candidates), list(data)
    base = output_loss(merged(candidates, u, {}), kept, metric=metric, samples=samples)
    models = (merged(candidates, u, a.choice) for a in allocations)
    losses = [output_loss(m, kept, metric=metric, samples=samples) - base for m in models]
    chosen = min(range(len(losses)), key=losses.__getitem__)
    return replace(allocations[chosen], measured=losses[chosen])


def greedy(
    candidates: Candidates,
    table: SensitivityTable,
    budget: Budget,
    *,
    costs: CostTable | None = None,
    fixed: Fixed | None = None,
) -> Allocation:
    """The usual heuristic, to compare with: from the widest on, always the step that loses least for what it saves.

    Raises :class:`UsageError` where that ends above the budget, which says nothing about other choices.
    """
    task = _task(candidates, table, costs, fixed)
    limits, bound = budget.limits(task.costs), budget.loss(task.table)
    choice = {unit: widths[-1] for unit, widths in task.widths.items()}

    def excess(total: Mapping[str, float]) -> float:
        return sum(max(0.0, total[k] / v - 1) for k, v in limits.items())

    def saved(total: Mapping[str, float]) -> float:
        return excess(task.costs.total(choice)) - excess(total) or task.costs.total(choice)["size"] - total["size"]

    while excess(task.costs.total(choice)) > 0 or bound is not None:
        steps = _steps(task, choice, saved)
        if bound is not None:
            done = excess(task.costs.total(choice)) <= 0
            steps = [s for s in steps if table.predicted({**choice, s[1]: s[2]}) <= bound] if done else steps
        if not steps:
            break
        _, unit, width = min(steps)
        choice[unit] = width
    if excess(task.costs.total(choice)) > 0 or (bound is not None and table.predicted(choice) > bound):
        raise UsageError(f"step by step no choice was found that keeps {budget}: take allocate, or a larger budget")
    return task.allocation(choice, "greedy", None, f"step by step until {budget}")


def _steps(
    task: _Task, choice: Mapping[str, int], saved: Callable[[Mapping[str, float]], float]
) -> list[tuple[float, str, int]]:
    """Loss for what is saved, unit and next narrower width, of every step that saves anything."""
    found = []
    for unit, widths in task.widths.items():
        narrower = [w for w in widths if w < choice[unit]]
        if narrower:
            gain = saved(task.costs.total({**choice, unit: narrower[-1]}))
            more = task.table.losses[unit][narrower[-1]] - task.table.losses[unit][choice[unit]]
            if gain > 0:
                found.append((more / gain, unit, narrower[-1]))
    return found


def front(
    candidates: Candidates,
    table: SensitivityTable,
    *,
    by: str = "size",
    points: int = 10,
    costs: CostTable | None = None,
    fixed: Fixed | None = None,
    time_limit: float = 60.0,
) -> list[Allocation]:
    """Optima over a sweep of budgets for one cost, from the least that the widths can reach to what the widest cost.

    by: size, logical_size, bops or latency. Allocations are ordered by cost, without repetitions.
    """
    task = _task(candidates, table, costs, fixed)
    if by not in task.costs.reference:
        raise UsageError(f"there is no cost '{by}': choose one of {', '.join(task.costs.kinds)}")
    programme = task.programme()
    least = programme.solve(by, {}, time_limit)
    assert least is not None  # some choice always exists
    most = task.costs.total({unit: widths[-1] for unit, widths in task.widths.items()})[by]
    found: list[Allocation] = []
    for bound in np.linspace(least.value, max(most, least.value), points):
        solved = programme.solve("loss", {by: float(bound)}, time_limit)
        if solved is not None and all(solved.choice != a.choice for a in found):
            text = f"least predicted loss under {by}={bound:.6g} {SHOWN[by]}"
            found.append(task.allocation(solved.choice, solved.status, solved.gap, text))
    return sorted(found, key=lambda a: a.costs[by])


def select(candidates: Candidates, allocation: Allocation) -> QModel:
    """The model of an allocation: weights, biases, grids and formats of each unit from the candidate that has its width.

    A narrow copy that turns out no narrower than what it copies is taken out. Whatever follows (export, proof, report) sees an
    ordinary calibrated model.
    """
    u = units(candidates)
    choice = u.complete(allocation.choice)
    m = merged(candidates, u, choice)
    graph = editable(m.graph)
    m = without_copies(replace(m, graph=graph), u, passed_on(u, choice), graph)
    return m.logged(*_entries(u, choice, allocation))


def _entries(u: Units, choice: Mapping[str, int], allocation: Allocation) -> list[LogEntry]:
    found = []
    for reader in u.readers:
        w, a = choice[reader.weight], u.width_read(reader, choice)
        fixed = reader.weight not in u.open and reader.group not in u.open
        parts = {n: allocation.losses[n] for n in (reader.weight, reader.group or "") if n in allocation.losses}
        read = "floats" if reader.group is None else f"{a} bits"
        why = "nothing to choose" if fixed else f"predicted loss {sum(parts.values()):.3g}"
        figures = {"weights": w, "activations": a, "loss": sum(parts.values())}
        found.append(LogEntry("allocate", reader.name, f"weights of {w} bits, reads {read}: {why}", figures))
    whole = {**allocation.to_dict(), "choice": dict(choice)}
    return [*found, LogEntry("allocate", None, f"{allocation.reason}: {allocation}", whole)]
