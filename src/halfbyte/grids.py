"""Statistics and a format -> a grid: minimum and maximum, percentile, least squared error (arXiv 2106.08295, section 3.1)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from halfbyte.affine import Grid, fake_quantize, power_of_two
from halfbyte.formats import Format
from halfbyte.stats import Histogram

_SMALLEST = 1e-8  # a scale relative to float32: below it codes would be noise
_CANDIDATES = 40  # thresholds tried between none and all of the range, then refined around the best
_SAMPLED = 1 << 14  # values of a row that a search looks at
_NET_STEP, _HALVINGS, _FITS = 1.03, 4, 3  # of the search for the range of a row
_TURNS, _END_FACTORS = 2, (0.7, 0.85, 0.93, 1.07, 1.18, 1.4)  # then of each end of an asymmetric one
_SEARCHED_BITS = 10  # a histogram of 2048 bins can tell apart grids of this width, not finer ones


class GridRule(Protocol):
    """How to choose a grid: for a running value from its histogram, for a parameter from its values."""

    @property
    def name(self) -> str:
        """The rule's name in the log."""

    def activation(self, h: Histogram, form: Format) -> Grid:
        """Grid of a running value."""

    def weight(self, w: Tensor, form: Format, pairs: bool, power: Tensor | None = None) -> Grid:
        """Grid of a parameter. pairs: hold codes so small that two products of neighbours cannot saturate 16 bits. power: mean
        square of the input that each weight meets, shaped as ``w``: the weight's error counts by it.
        """


def from_range(lo: float, hi: float, form: Format, device: torch.device | str = "cpu") -> Grid:
    """The grid that covers [lo, hi], widened to contain zero, which it represents exactly."""

    def as_int(v: int) -> Tensor:
        return torch.tensor(v, dtype=torch.int32, device=device)

    if lo == hi != 0.0 and not form.power_of_two:  # a constant: one step away from zero, exactly
        zero = form.lo if lo > 0 else form.hi
        zero = 0 if form.symmetric else zero
        step = torch.tensor(abs(lo), dtype=torch.float32, device=device)
        return Grid(step, as_int(zero), as_int(form.lo), as_int(form.hi))
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if form.symmetric:
        bound = max(hi, -lo)
        scale = max(hi / form.hi, lo / form.lo) if form.signed and not form.narrow and form.lo else bound / form.hi
        zero = 0
    else:
        scale = (hi - lo) / (form.hi - form.lo)
    dead = scale < _SMALLEST and max(hi, -lo) == 0.0
    step = torch.tensor(
        1.0 if dead else max(scale, torch.finfo(torch.float32).tiny * 2**24), dtype=torch.float32, device=device
    )
    if form.power_of_two:
        step = power_of_two(step)
    if not form.symmetric:
        zero = min(max(form.lo - round(lo / float(step)), form.lo), form.hi)
    return Grid(step, as_int(zero), as_int(form.lo), as_int(form.hi))


def rows(w: Tensor, form: Format) -> Tensor:
    """A parameter as [scales, values for each scale] (a short last group is padded with zeros)."""
    if form.axis is None:
        return w.reshape(1, -1)
    flat = w.movedim(form.axis, 0).reshape(w.shape[form.axis], -1)
    if form.group is None:
        return flat
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % form.group))
    return flat.reshape(-1, form.group)


def shaped(per_row: Tensor, w: Tensor, form: Format) -> Tensor:
    """One value for each row of :func:`rows` -> the shape that a grid has."""
    if form.axis is None:
        return per_row.reshape(())
    return per_row if form.group is None else per_row.reshape(w.shape[0], -1)


def _symmetric_scale(threshold: Tensor, form: Format, pairs: Tensor | None) -> Tensor:
    """[rows]: the scale at which values up to ``threshold`` stay inside, by magnitude and, where asked, by pairs."""
    scale = threshold / form.hi
    if pairs is not None and form.bits == 8:
        heaviest = torch.minimum(pairs, threshold[:, None, None]).sum(2).amax(1)
        scale = torch.maximum(scale, (heaviest.amax().reshape(1) if form.axis is None else heaviest) / form.hi)
    return scale


def _two_largest(w: Tensor, form: Format) -> Tensor:
    """[channels, 2, 2]: the two largest positive values of each output channel, and the two largest negative magnitudes.

    CPUs without VNNI add the products of neighbouring codes in 16 bits, saturating: 255 (q1 + q2) must stay below 2^15. Which
    codes are neighbours is the kernel's business, so the two largest of one sign must be harmless together.
    """
    axis = form.axis if form.axis is not None else 0
    flat = w.movedim(axis, 0).reshape(w.shape[axis], -1)
    if flat.shape[1] == 1:
        flat = torch.nn.functional.pad(flat, (0, 1))
    return torch.stack([flat.topk(2, 1).values.clamp(min=0), (-flat).topk(2, 1).values.clamp(min=0)], 1)


def weight_grid(w: Tensor, form: Format, threshold: Tensor, pairs: Tensor | None) -> Grid:
    """The grid of a symmetric parameter whose rows are clipped at ``threshold`` [rows]."""
    scale = _symmetric_scale(threshold, form, pairs)
    scale = torch.where(threshold > 0, scale.clamp(min=torch.finfo(torch.float32).tiny * 2**24), torch.ones_like(scale))
    if form.power_of_two:
        scale = power_of_two(scale)
    limit = (
        torch.floor(threshold / scale + 0.5).clamp(max=form.hi).int()
        if pairs is not None
        else torch.full_like(scale, form.hi).int()
    )
    lowest = (
        torch.maximum(-limit, torch.full_like(limit, form.lo)) if pairs is not None else torch.full_like(limit, form.lo)
    )
    zero = torch.zeros_like(limit)
    step, zeros, low, high = (shaped(t, w, form) for t in (scale, zero, lowest, limit))
    return Grid(step, zeros, low, high, axis=form.axis, group=form.group)


def _asymmetric_weight(w: Tensor, form: Format, share: Tensor) -> Grid:
    """The grid of an asymmetric parameter whose rows keep ``share`` of their range: [rows], or [2, rows] of either end."""
    flat, (low, high) = rows(w, form), share.expand(2, -1)
    lo, hi = flat.amin(1).clamp(max=0) * low, flat.amax(1).clamp(min=0) * high
    scale = (hi - lo) / (form.hi - form.lo)
    scale = torch.where(hi > lo, scale, torch.ones_like(scale))
    if form.power_of_two:
        scale = power_of_two(scale)
    zero = (form.lo - torch.round(lo / scale)).clamp(form.lo, form.hi).int()
    ends = (torch.full_like(zero, form.lo), torch.full_like(zero, form.hi))
    step, zeros, low, high = (shaped(t, w, form) for t in (scale, zero, *ends))
    return Grid(step, zeros, low, high, axis=form.axis, group=form.group)


def _row_grid(w: Tensor, form: Format, share: Tensor, pairs: Tensor | None, largest: Tensor | None = None) -> Grid:
    """The grid that keeps ``share`` of each row's range: [rows], or [2, rows] of either end where asymmetric.

    largest: [rows], which saves looking for the largest magnitudes again.
    """
    if form.symmetric:
        return weight_grid(w, form, (rows(w, form).abs().amax(1) if largest is None else largest) * share, pairs)
    return _asymmetric_weight(w, form, share)


@dataclass(frozen=True)
class _Rows:
    """The rows of a parameter in the search for their ranges: what does not change from one candidate to the next."""

    w: Tensor
    form: Format
    pairs: Tensor | None
    flat: Tensor
    power: Tensor | None
    largest: Tensor

    def codes(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, values]: codes less zero-point on the grid that keeps so much of each row's range; and its scale [rows, 1]."""
        grid = _row_grid(self.w, self.form, share, self.pairs, self.largest)
        scale, zero, lo, hi = (t.reshape(-1, 1) for t in (grid.scale, grid.zero, grid.lo, grid.hi))
        return (self.flat / scale).round_().clamp_(lo - zero, hi - zero), scale

    def errors(self, share: Tensor) -> Tensor:
        """[rows]: squared error of each row on the grid that keeps so much of its range, weighted by the power of its inputs."""
        codes, scale = self.codes(share)
        error = codes.mul_(scale).sub_(self.flat).square_()
        return (error if self.power is None else error.mul_(self.power)).sum(1)

    def fitted(self, share: Tensor) -> Tensor:
        """[rows]: the share whose scale fits the codes of this one best, ``<T, q> / <q, q>`` (arXiv 1902.06822)."""
        codes, scale = self.codes(share)
        weighted = codes if self.power is None else codes * self.power
        scale_of_codes = (weighted * self.flat).sum(1) / (weighted * codes).sum(1)
        return torch.where(scale_of_codes > 0, share * scale_of_codes / scale[:, 0], share).clamp(max=1.0)


def _sampled(w: Tensor, form: Format, power: Tensor | None) -> tuple[Tensor, Format, Tensor | None]:
    """Of long rows some values, their extremes among them: enough to compare ranges by, at a fraction of the time."""
    flat = rows(w, form)
    if form.group is not None or flat.shape[1] <= 2 * _SAMPLED:
        return w, form, power
    lowest, highest = flat.min(1), flat.max(1)
    stride = flat.shape[1] // _SAMPLED
    stride += (stride + 1) % 2  # odd, so that every tap of a kernel has its turn

    def picked(t: Tensor) -> Tensor:
        ends = [t.gather(1, at[:, None]) for at in (lowest.indices, highest.indices)]
        return torch.cat([t[:, ::stride], *ends], 1)

    weighted = None if power is None else picked(rows(power, form))
    return picked(flat), replace(form, axis=None if form.axis is None else 0), weighted


@dataclass(frozen=True)
class MinMax:
    """The whole range: nothing is clipped, an outlier costs everyone resolution."""

    name: Literal["min-max"] = "min-max"

    def activation(self, h: Histogram, form: Format) -> Grid:
        """Grid from the exact extremes."""
        return from_range(h.minimum, h.maximum, form, h.counts.device)

    def weight(self, w: Tensor, form: Format, pairs: bool, power: Tensor | None = None) -> Grid:
        """Grid from the extremes of each row."""
        one = torch.ones(rows(w, form).shape[0], device=w.device)
        return _row_grid(w, form, one, _two_largest(w, form) if pairs else None)


@dataclass(frozen=True)
class Percentile:
    """The range between two quantiles: ``share`` of the values of a tensor (or of a row of a parameter) stay inside.

    Each end of a running value gives up half of the rest, also where it has only one, as behind ReLU.
    """

    share: float = 0.9999
    name: Literal["percentile"] = "percentile"

    def activation(self, h: Histogram, form: Format) -> Grid:
        """Grid between the quantiles of the histogram."""
        tail = (1 - self.share) / 2
        lo = h.quantile(tail) if h.minimum < 0 else 0.0
        hi = h.quantile(1 - tail) if h.maximum > 0 else 0.0
        return from_range(max(lo, h.minimum), min(hi, h.maximum), form, h.counts.device)

    def weight(self, w: Tensor, form: Format, pairs: bool, power: Tensor | None = None) -> Grid:
        """Grid from a quantile of the magnitudes of each row."""
        flat = rows(w, form).abs().float()
        position = max(1, round(self.share * flat.shape[1]))
        inside = flat.kthvalue(position, dim=1).values
        largest = flat.amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        return _row_grid(w, form, inside / largest, _two_largest(w, form) if pairs else None)


@dataclass(frozen=True)
class MSE:
    """The range with the least squared rounding and clipping error, searched on the integer grid itself."""

    name: Literal["mse"] = "mse"

    def activation(self, h: Histogram, form: Format) -> Grid:
        """Grid by a search over the histogram: a net of shares of each end of the range, then a finer one."""
        if form.bits > _SEARCHED_BITS:  # finer than the histogram, and nothing to gain by clipping
            return MinMax().activation(h, form)
        lo, hi = min(h.minimum, 0.0), max(h.maximum, 0.0)
        device = h.counts.device
        if h.minimum == h.maximum or form.symmetric or lo == 0.0 or hi == 0.0:
            best = _search(h, form, lambda s: (lo * s, hi * s))
            return from_range(h.minimum * best, h.maximum * best, form, device)
        share_lo = share_hi = 1.0
        for _ in range(3):  # each end in turn, until neither moves
            before = (share_lo, share_hi)
            share_hi = _search(h, form, lambda s, at=share_lo: (torch.full_like(s, lo * at), hi * s))  # type: ignore[misc]
            share_lo = _search(h, form, lambda s, at=share_hi: (lo * s, torch.full_like(s, hi * at)))  # type: ignore[misc]
            if before == (share_lo, share_hi):
                break
        return from_range(lo * share_lo, hi * share_hi, form, device)

    def weight(self, w: Tensor, form: Format, pairs: bool, power: Tensor | None = None) -> Grid:
        """Grid by a search for each row: a net of shares of the range, steps halved around the best, then scale and codes fitted
        to each other in turn. The error is not convex, so the net is what finds the right valley. Asymmetric, each end in turn
        then goes its own way.
        """
        two = _two_largest(w, form) if pairs else None
        part, flat_form, weighted = _sampled(w, form, power)
        flat = rows(part, flat_form)
        searched = _Rows(
            part, flat_form, two, flat, None if weighted is None else rows(weighted, flat_form), flat.abs().amax(1)
        )
        best = torch.ones(len(flat), device=w.device)
        least = searched.errors(best)
        # Inputs of little power may meet the largest weights, so the optimum can lie far below the whole range.
        for share in (*torch.logspace(-1.0, -0.3, 12).tolist(), *torch.linspace(0.52, 0.985, 32).tolist()):
            best, least = self._better(searched, torch.full_like(best, share), best, least)
        step = _NET_STEP
        for _ in range(_HALVINGS):
            step = step**0.5
            for factor in (1 / step, step):
                best, least = self._better(searched, (best * factor).clamp(max=1.0), best, least)
        for _ in range(_FITS):
            best, least = self._better(searched, searched.fitted(best), best, least)
        if not form.symmetric:
            best = self._each_end(searched, best, least)
        return _row_grid(w, form, best, two)

    def _each_end(self, searched: _Rows, share: Tensor, least: Tensor) -> Tensor:
        """[2, rows]: shares of the least and the greatest value, from one share [rows] of both."""
        best = share.expand(2, -1)
        for end in (0, 1) * _TURNS:
            for factor in _END_FACTORS:
                tried = best.clone()
                tried[end] = (tried[end] * factor).clamp(max=1.0)
                best, least = self._better(searched, tried, best, least)
        return best

    @staticmethod
    def _better(searched: _Rows, share: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """For each row the better of two shares, with its error."""
        error = searched.errors(share)
        better = error < least
        return torch.where(better, share, best), torch.where(better, error, least)


def _histogram_errors(h: Histogram, form: Format, lo: Tensor, hi: Tensor) -> Tensor:
    """[candidates]: squared error, summed over the histogram, of the grids that cover [lo, hi] (each [candidates])."""
    if form.symmetric:
        scale = torch.maximum(hi, -lo) / form.hi
        zero = torch.zeros_like(scale)
    else:
        scale = (hi - lo) / (form.hi - form.lo)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if form.power_of_two:
        scale = power_of_two(scale)
    zero = zero[:, None] if form.symmetric else (form.lo - torch.round(lo[:, None] / scale)).clamp(form.lo, form.hi)
    held = h.counts > 0
    centres, counts = h.centres[held], h.counts[held]
    codes = (torch.round(centres / scale) + zero).clamp(form.lo, form.hi)
    return (((codes - zero) * scale - centres).square() * counts).sum(1)


def _search(h: Histogram, form: Format, ends: Callable[[Tensor], tuple[Tensor, Tensor]]) -> float:
    """The share in (0, 1] whose range has the least error: a net, then a finer net around its best point, twice."""
    device = h.counts.device
    low, high = 1.0 / _CANDIDATES, 1.0
    best, least = 1.0, float("inf")
    for _ in range(3):
        net = torch.linspace(low, high, _CANDIDATES, dtype=torch.float64, device=device)
        errors = _histogram_errors(h, form, *ends(net))
        at = int(errors.argmin())
        if float(errors[at]) < least:
            best, least = float(net[at]), float(errors[at])
        step = (high - low) / (_CANDIDATES - 1)
        low, high = max(best - step, 1e-3), min(best + step, 1.0)
    return best


RULES: dict[str, GridRule] = {"mse": MSE(), "min-max": MinMax(), "percentile": Percentile()}


def cross_entropy(logits: Tensor, form: Format, start: Grid) -> Grid:
    """The grid of a classifier's logits, [samples, classes], that changes its probabilities least (arXiv 2106.08295, eq. 27).

    Minimises the cross entropy between the softmax of the logits and that of the quantized logits: small logits hardly count, the
    largest do. start: the grid to beat, such as the one of least squared error.
    """
    target = torch.softmax(logits.double(), 1)

    def loss(grid: Grid) -> float:
        return -float((target * torch.log_softmax(fake_quantize(logits, grid).double(), 1)).sum(1).mean())

    lo, hi = float(logits.min()), float(logits.max())
    best, least = start, loss(start)
    for low in torch.linspace(0.2, 1.0, 9).tolist():  # the small logits may be cut off long before the large ones
        for high in torch.linspace(0.9, 1.2, 7).tolist():  # these must not be, on other data neither
            grid = from_range(lo * low, hi * high, form, logits.device)
            found = loss(grid)
            if found < least:
                best, least = grid, found
    return best
