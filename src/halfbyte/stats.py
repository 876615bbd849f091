"""Summaries of running values: mergeable, of bounded size, however many batches they have seen."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.moments import Spread

BINS = 2048
# Of a large tensor this many values go into the histogram (minimum and maximum are always exact): the histogram is a sample
# anyway, and more of one image is worth less than more images.
SAMPLED = 1 << 18


@dataclass(frozen=True)
class Histogram:
    """Counts of values near the multiples of a bin width that is a power of two.

    counts: float64 [bins]; bin ``i`` holds the values that round to ``(first + i) * width``, so zero is the centre of a bin.
    minimum, maximum: exact. Two histograms merge without loss: the finer one is first brought to the width of the coarser.
    """

    counts: Tensor
    first: int
    width: float
    minimum: float
    maximum: float

    @property
    def centres(self) -> Tensor:
        """Float64 [bins]: the value that each bin stands for."""
        steps = torch.arange(len(self.counts), dtype=torch.float64, device=self.counts.device)
        return (steps + self.first) * self.width

    def coarser(self) -> "Histogram":
        """The same data with bins twice as wide; a bin between two new centres is shared evenly."""
        first = math.floor(self.first / 2)
        last = math.ceil((self.first + len(self.counts) - 1) / 2)
        counts = torch.zeros(last - first + 1, dtype=self.counts.dtype, device=self.counts.device)
        index = torch.arange(len(self.counts), device=self.counts.device) + self.first
        low = torch.div(index, 2, rounding_mode="floor") - first
        odd = index % 2 != 0
        counts.index_add_(0, low, torch.where(odd, self.counts / 2, self.counts))
        counts.index_add_(0, (low + 1)[odd], self.counts[odd] / 2)
        return Histogram(counts, first, self.width * 2, self.minimum, self.maximum)

    def merged(self, other: "Histogram") -> "Histogram":
        """Both together, with at most ``BINS`` bins."""
        a, b = self, other
        while a.width < b.width:
            a = a.coarser()
        while b.width < a.width:
            b = b.coarser()
        first = min(a.first, b.first)
        last = max(a.first + len(a.counts), b.first + len(b.counts))
        counts = torch.zeros(last - first, dtype=torch.float64, device=a.counts.device)
        for h in (a, b):
            counts[h.first - first : h.first - first + len(h.counts)] += h.counts
        merged = Histogram(counts, first, a.width, min(a.minimum, b.minimum), max(a.maximum, b.maximum))
        while len(merged.counts) > BINS:
            merged = merged.coarser()
        return merged

    def quantile(self, q: float) -> float:
        """The value below which a share ``q`` of the data lies."""
        cumulative = torch.cumsum(self.counts, 0) / self.counts.sum()
        index = int(torch.searchsorted(cumulative, torch.tensor(q, dtype=torch.float64, device=self.counts.device)))
        return float(self.centres[min(index, len(self.counts) - 1)])


def histogram(x: Tensor, sampled: int = SAMPLED) -> Histogram:
    """Summarize one tensor of finite values, of which about ``sampled`` are counted."""
    flat = _as_it_lies(x.detach())
    lo, hi = (float(v) for v in torch.aminmax(flat))
    largest = max(abs(lo), abs(hi), 1e-30)
    span = max(hi - lo, largest * 1e-6)
    width = 2.0 ** math.ceil(math.log2(span / (BINS - 2)))
    first, last = round(lo / width), round(hi / width)
    if flat.numel() > sampled:
        stride = flat.numel() // sampled
        while any(math.gcd(stride, d) > 1 for d in x.shape[1:]):  # each channel and each column has its share
            stride += 1
        flat = flat[::stride]
    counts = torch.histc(flat.float(), last - first + 1, (first - 0.5) * width, (last + 0.5) * width)
    return Histogram(counts.double(), first, width, lo, hi)


def _as_it_lies(x: Tensor) -> Tensor:
    """All values in the order in which they lie in memory."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return (x.movedim(1, 3) if last else x).reshape(-1)


_EXPECTED_BINS, _EXPECTED_ELEMENTS = 512, 1024


def expected_histogram(s: Spread) -> Histogram:
    """What the histogram of a value would look like if the moments were right: a mixture of cut normal distributions."""
    least, greatest = float(s.least.min()), float(s.greatest.max())
    parts = torch.stack([t.flatten() for t in _same_elements(s)]).double()
    parts = parts[:, :: max(1, parts.shape[1] // _EXPECTED_ELEMENTS)]
    mu, sigma, low, high = (t[:, None] for t in parts)
    largest = max(abs(least), abs(greatest), 1e-30)
    span = max(greatest - least, largest * 1e-6)
    width = 2.0 ** math.ceil(math.log2(span / (_EXPECTED_BINS - 2)))
    first, last = round(least / width), round(greatest / width)
    edges = (torch.arange(first, last + 2, dtype=torch.float64, device=mu.device) - 0.5) * width
    below = torch.special.ndtr(((edges - mu) / sigma.clamp(min=1e-30)).clamp(-40, 40))
    below = torch.where(edges <= low, torch.zeros_like(below), torch.where(edges > high, torch.ones_like(below), below))
    below[:, 0], below[:, -1] = 0.0, 1.0
    return Histogram(below.diff(dim=1).mean(0), first, width, least, greatest)


def _same_elements(s: Spread) -> list[Tensor]:
    """The parameters of the distribution without elements that only repeat others."""
    repeats = [
        d for d in range(s.mu.ndim) if all(t.stride(d) == 0 or t.shape[d] == 1 for t in (s.mu, s.sigma, s.low, s.high))
    ]
    found = [s.mu, s.sigma, s.low, s.high]
    for d in repeats:
        found = [t.narrow(d, 0, 1) for t in found]
    return found
