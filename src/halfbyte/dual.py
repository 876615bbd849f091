"""A tensor as the sum of two low-bit tensors, ``T ~ alpha_1 q_1 + alpha_2 q_2`` (arXiv 1902.06822, section 3): numbers only."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.affine import Grid, fake_quantize
from halfbyte.errors import FormatError
from halfbyte.formats import Format
from halfbyte.grids import MSE, from_range
from halfbyte.stats import Histogram

_STEPS = 60  # of alternation, at most
_SETTLED = 1e-6  # a step that lowers no row's error by more than this share has converged
_WIDEST = 7  # bits: the sums of two tensors of more would be a table of tens of thousands


@dataclass(frozen=True)
class Dual:
    """Two tensors whose sum stands for one, row by row.

    first, second: scales, float32 [rows], positive. first_codes, second_codes: float32 integers [rows, values].
    errors: float64 [steps, rows], squared error of each row after the start and after each step; it never rises.
    """

    first: Tensor
    second: Tensor
    first_codes: Tensor
    second_codes: Tensor
    errors: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """``alpha_1 q_1`` and ``alpha_2 q_2``, [rows, values]."""
        return self.first_codes * self.first[:, None], self.second_codes * self.second[:, None]


@dataclass(frozen=True)
class _Task:
    """What does not change while two tensors are fitted."""

    rows: Tensor
    form: Format
    power: Tensor
    fixed: bool

    def error(self, scales: Tensor, codes: Tensor) -> Tensor:
        """[rows]: squared error of the sum of both tensors, weighted."""
        left = self.rows.double() - (codes * scales[:, :, None]).sum(0).double()
        return (left.square() * self.power).sum(1)

    def nearest(self, scales: Tensor) -> Tensor:
        """[2, rows, values]: the pair of codes whose sum is nearest to each value, found in the sorted table of all sums."""
        lo, n = self.form.lo, self.form.hi - self.form.lo + 1
        codes = torch.arange(lo, lo + n, device=self.rows.device, dtype=torch.float32)
        table = (scales[0][:, None, None] * codes[:, None] + scales[1][:, None, None] * codes).flatten(1)
        table, order = table.sort(1)
        at = torch.searchsorted(((table[:, 1:] + table[:, :-1]) / 2).contiguous(), self.rows.contiguous())
        pair = order.gather(1, at)
        return torch.stack([pair // n + lo, pair % n + lo]).float()

    def solved(self, scales: Tensor, codes: Tensor) -> Tensor:
        """[2, rows]: the scales of least squared error for these codes; where the equations do not tell, those that were."""
        q, p, t = codes.double(), self.power, self.rows.double()
        (a, c), (_, d) = [[(q[i] * q[j] * p).sum(1) for j in range(2)] for i in range(2)]
        b = [(t * q[i] * p).sum(1) for i in range(2)]
        if self.fixed:
            second = (b[1] - scales[0].double() * c) / d
            found = torch.stack([scales[0].double(), second])
        else:
            determinant = a * d - c * c
            determinant = torch.where(determinant > 1e-9 * a * d, determinant, torch.nan)
            found = torch.stack([(b[0] * d - b[1] * c) / determinant, (a * b[1] - c * b[0]) / determinant])
        found = found.abs().float()  # codes are symmetric: a negative scale is the same table of sums
        usable = (torch.isfinite(found) & (found > torch.finfo(torch.float32).tiny * 2**24)).all(0)
        return torch.where(usable, found, scales)


def dual(rows: Tensor, form: Format, scale: Tensor, *, power: Tensor | None = None, fixed: bool = False) -> Dual:
    """Two tensors of ``form`` whose sum is near ``rows`` [rows, values], with two scales for each row.

    scale: float32 [rows], where the first tensor starts (the one of least squared error). power: what the error of each value
    counts, shaped as ``rows``. fixed: the first scale stays as it is. Starts from the greedy pair (the second tensor quantizes
    what the first leaves) and, unless ``fixed``, from the pair whose sums are evenly spaced; then least squares for the scales
    and the nearest pair of codes for each value take turns until nothing changes (section 3: error never rises), and each row
    keeps its better end. Raises :class:`FormatError` for formats that are not symmetric, signed and of 2 to 7 bits.
    """
    if not form.symmetric or not form.signed or not form.narrow or form.bits > _WIDEST:
        raise FormatError(f"a sum of two tensors needs a symmetric narrow format of at most {_WIDEST} bits, not {form}")
    task = _Task(rows.float(), form, torch.ones_like(rows).double() if power is None else power.double(), fixed)
    best = _alternated(task, *_greedy(task, scale.float()))
    if fixed:
        return best
    largest = task.rows.abs().amax(1).clamp(min=1e-30)
    levels = form.hi - form.lo + 1
    second = largest / (form.hi * (levels + 1))
    even = torch.stack([second * levels, second])
    return _better(best, _alternated(task, even, task.nearest(even)))


def _greedy(task: _Task, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [2, rows] and codes [2, rows, values]: the second tensor quantizes what the first one leaves."""
    first = (task.rows / scale[:, None]).round().clamp(task.form.lo, task.form.hi)
    left = task.rows - first * scale[:, None]
    each = replace(task.form, axis=0, group=None)
    second = MSE().weight(left, each, False, task.power.float()).scale
    codes = (left / second[:, None]).round().clamp(task.form.lo, task.form.hi)
    return torch.stack([scale, second]), torch.stack([first, codes])


def _alternated(task: _Task, scales: Tensor, codes: Tensor) -> Dual:
    """Least squares and nearest pairs in turn; a row takes a step only where that lowers its error."""
    errors = [task.error(scales, codes)]
    for _ in range(_STEPS):
        new = task.solved(scales, codes)
        pairs = task.nearest(new)
        error = task.error(new, pairs)
        better = error < errors[-1]
        gain = torch.where(better, errors[-1] - error, 0.0)
        scales = torch.where(better, new, scales)
        codes = torch.where(better[:, None], pairs, codes)
        settled = bool((gain <= _SETTLED * errors[-1]).all())
        errors.append(torch.where(better, error, errors[-1]))
        if settled:
            break
    return Dual(scales[0], scales[1], codes[0], codes[1], torch.stack(errors))


def _better(a: Dual, b: Dual) -> Dual:
    """For each row the one of less error."""
    wins = b.errors[-1] < a.errors[-1]
    steps = max(len(a.errors), len(b.errors))
    errors = [torch.cat([d.errors, d.errors[-1:].expand(steps - len(d.errors), -1)]) for d in (a, b)]
    # The start is the greedy one for every row, so that the errors tell what the refinement has gained.
    course = torch.cat([errors[0][:1], torch.minimum(torch.where(wins, errors[1], errors[0]), errors[0][:1])[1:]])

    def chosen(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(wins if x.ndim == 1 else wins[:, None], y, x)

    return Dual(
        chosen(a.first, b.first),
        chosen(a.second, b.second),
        chosen(a.first_codes, b.first_codes),
        chosen(a.second_codes, b.second_codes),
        course,
    )


def dual_ranges(h: Histogram, form: Format) -> tuple[Grid, Grid]:
    """Grids of a running value and of what its rounding leaves, ``x ~ Q_1(x) + Q_2(x - Q_1(x))``, of least squared error.

    The pair of codes is the greedy one, because no kernel looks pairs up while the network runs. h: the value's histogram.
    """
    held = h.counts > 0
    centres, counts = h.centres[held].float(), h.counts[held]
    lo, hi = min(h.minimum, 0.0), max(h.maximum, 0.0)
    best: tuple[Grid, Grid] | None = None
    least = float("inf")
    for share in torch.linspace(0.3, 1.0, 29).tolist():
        first = from_range(lo * share, hi * share, form, h.counts.device)
        left = centres - fake_quantize(centres, first)
        step = float(first.scale) / 2
        # Inside the range half a step is left to either side; clipped tails leave more.
        tails = (min(-step, float(left.min())), max(step, float(left.max())))
        for inner in (0.0, 0.1, 0.3, 1.0):
            ends = (-step + inner * (tails[0] + step), step + inner * (tails[1] - step))
            second = from_range(*ends, form, h.counts.device)
            error = float(((fake_quantize(left, second) - left).double().square() * counts).sum())
            if error < least:
                best, least = (first, second), error
    assert best is not None  # the whole range is always tried, and its error is finite
    return best
