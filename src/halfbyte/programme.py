"""The integer programme over units and layers, as HiGHS takes it."""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from halfbyte.costs import CostTable
from halfbyte.errors import UsageError
from halfbyte.units import Units

_TOLERANCE = 2e-6  # HiGHS holds constraints up to 1e-6; a solution beyond a bound is sought again below it
_OUT_OF_TIME = 1  # milp's status
Losses = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Solved:
    """A complete choice, what it makes of the goal, how the solver ended, and the relative gap to the optimum."""

    choice: Mapping[str, int]
    value: float
    status: str
    gap: float


class Programme:
    """Minimise one quantity while others stay under their bounds: ``loss`` or a kind of cost.

    Variables: x[unit, width], and y[layer, w, a] for layers that read a unit, with sum_w x[unit, w] = 1,
    sum_a y[layer, w, a] = x[weight, w] and sum_w y[layer, w, a] = x[group, a].
    """

    def __init__(self, u: Units, costs: CostTable, losses: Losses, widths: Mapping[str, tuple[int, ...]]) -> None:
        self.costs, self.losses, self.widths = costs, losses, widths
        self.index: dict[tuple[str, int] | tuple[str, int, int], int] = {}
        for unit, options in u.widths.items():
            for w in options:
                self.index[unit, w] = len(self.index)
        self.pairs = [(r, r.group) for r in costs.rows if r.group is not None]
        for row, _ in self.pairs:
            self.index[row.layer, row.weights, row.activations] = len(self.index)
        self.terms = {k: self._coefficients(k) for k in ("loss", *costs.kinds)}
        self.rest = {"loss": 0.0, **costs.rest}
        self.structure = self._structure(u)
        self.upper = np.ones(len(self.index))
        for unit, options in u.widths.items():
            for w in set(options) - set(widths[unit]):
                self.upper[self.index[unit, w]] = 0

    def _coefficients(self, kind: str) -> np.ndarray:
        c = np.zeros(len(self.index))
        if kind == "loss":
            for unit, table in self.losses.items():
                for w, x in table.items():
                    c[self.index[unit, w]] += x
            return c
        for row in self.costs.rows:
            if row.group is None:
                c[self.index[row.weight, row.weights]] += getattr(row, kind)
            else:
                c[self.index[row.layer, row.weights, row.activations]] += getattr(row, kind)
        for unit, sizes in self.costs.grids.items() if kind == "size" else ():
            for w, size in sizes.items():
                c[self.index[unit, w]] += size
        return c

    def _structure(self, u: Units) -> LinearConstraint:
        rows: dict[object, list[tuple[int, float]]] = {}
        right: dict[object, float] = {}
        for unit, options in u.widths.items():
            rows[unit] = [(self.index[unit, w], 1.0) for w in options]
            right[unit] = 1.0
        for row, group in self.pairs:
            at = self.index[row.layer, row.weights, row.activations]
            for name, w in ((row.weight, row.weights), (group, row.activations)):
                key = (row.layer, name, w)
                rows.setdefault(key, [(self.index[name, w], -1.0)]).append((at, 1.0))
                right.setdefault(key, 0.0)
        entries = [(i, j, v) for i, terms in enumerate(rows.values()) for j, v in terms]
        data, where = [e[2] for e in entries], ([e[0] for e in entries], [e[1] for e in entries])
        matrix = csr_array((data, where), shape=(len(rows), len(self.index)))
        values = np.array([right[k] for k in rows])
        return LinearConstraint(matrix, values, values)

    def solve(self, goal: str, bounds: Mapping[str, float], time_limit: float) -> Solved | None:
        """The best choice; None where no choice keeps the bounds."""
        for margin in (0.0, _TOLERANCE, 10 * _TOLERANCE):
            found = self._solve(goal, bounds, time_limit, margin)
            if found is None or all(self.value(k, found.choice) <= v for k, v in bounds.items()):
                return found
        return None

    def value(self, kind: str, choice: Mapping[str, int]) -> float:
        """What a complete choice makes of a quantity."""
        if kind == "loss":
            return sum(t[choice[u]] for u, t in self.losses.items())
        return self.costs.total(choice)[kind]

    def _solve(self, goal: str, bounds: Mapping[str, float], time_limit: float, margin: float) -> Solved | None:
        constraints = [self.structure]
        for kind, bound in bounds.items():
            terms, room = self.terms[kind], bound - self.rest[kind]
            scale = max(float(np.abs(terms).max()), abs(room), 1e-30)  # HiGHS's tolerances are absolute
            limit = room / scale - margin * abs(room) / scale
            constraints.append(LinearConstraint(terms[None] / scale, -np.inf, limit))
        aim = self.terms[goal]
        with _muted():
            result = milp(
                aim / max(float(np.abs(aim).max()), 1e-30),
                integrality=np.ones(len(aim)),
                bounds=Bounds(0, self.upper),
                constraints=constraints,
                options={"time_limit": time_limit, "mip_rel_gap": 0.0},
            )
        if result.x is None and result.status == _OUT_OF_TIME:
            raise UsageError(f"the solver found no choice within {time_limit:g} s: raise time_limit")
        if result.x is None:
            return None
        choice = {
            unit: max(options, key=lambda w, unit=unit: result.x[self.index[unit, w]])  # type: ignore[misc]
            for unit, options in self.widths.items()
        }
        status = "optimal" if result.status == 0 else "time limit"
        return Solved(choice, self.value(goal, choice), status, float(result.mip_gap or 0.0))


@contextmanager
def _muted() -> Iterator[None]:
    """Standard output goes nowhere: HiGHS prints a line of its own now and then, whatever it is told (jump-dev/HiGHS.jl, issue 312)."""
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda _: None  # what C still holds back
    try:
        sys.stdout.flush()
        flush(None)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
            flush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
