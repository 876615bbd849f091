"""The automatic recipe: the cheapest way to quantize that holds a limit on the drop, on samples that no step has seen.

Attempts go from cheap to dear: ranges alone, equalization, descent over the integers, blocks, and wider layers, the most sensitive
first. Each is judged on held-out samples, with a margin for how few they are; the first that holds the limit is the answer.
"""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.special import betaincinv
from torch import Tensor

from halfbyte.calibrate import Progress, silent
from halfbyte.data import Samples, Source
from halfbyte.errors import DataError, UsageError
from halfbyte.formats import Bits, Format
from halfbyte.graph import by_value, layers, output_values, weight_of
from halfbyte.model import Inputs, LogEntry, QModel, Target, value_name
from halfbyte.overrides import Overrides
from halfbyte.pipeline import by_recipe, load_samples
from halfbyte.preprocess import Preprocess
from halfbyte.probes import Bench, Portion, bench, each_alone
from halfbyte.provenance import Hashed, note_data
from halfbyte.recipe import Recipe, load_recipe
from halfbyte.run import run, simulate
from halfbyte.shown import Shown, plain

_DOUBT = (
    0.16  # the chance, over all attempts, of calling the limit held where it is not: one standard error of one attempt
)
_FEWEST, _MOST = 64, 512  # held-out samples without labels
_PER_EVENT = 4  # samples for each that the limit allows to change
_SENSITIVE = 16  # samples that tell which layers are
_IMPROVES = 0.95  # of the noise: an attempt that leaves more of it is no step worth repeating with more effort


@dataclass(frozen=True)
class Attempt:
    """One way that was tried: points lost on the held-out samples, and their upper bound; noise-to-signal; seconds."""

    name: str
    points: float
    bound: float
    noise: float
    seconds: float

    def __str__(self) -> str:
        found = f"{self.points:.2f} points, at most {self.bound:.2f}, noise-to-signal {self.noise:.3g}"
        return f"{self.name}: {found}, {self.seconds:.1f} s"


@dataclass(frozen=True, repr=False)
class Found(Shown):
    """The answer: the model of the first attempt that holds the limit, else of the best one.

    limit: points allowed. labelled: points of accuracy, else of decisions that differ from the float network's. samples: held out.
    """

    model: QModel
    reached: bool
    limit: float
    labelled: bool
    samples: int
    attempts: tuple[Attempt, ...]
    chosen: Attempt

    @property
    def verdict(self) -> str:
        """One sentence."""
        what = "points lost" if self.labelled else "points of decisions that differ from float"
        found = f"{self.chosen.points:.2f} {what} on {self.samples} held-out samples, at most {self.chosen.bound:.2f} with confidence"
        if self.reached:
            enough = f"{self.chosen.name} is enough" if len(self.attempts) == 1 else f"reached with {self.chosen.name}"
            return f"{enough}: {found}; the limit is {self.limit:g}"
        few = least_samples(self.limit)
        more = f"; {few} samples at least are needed to show {self.limit:g} points" if self.samples < few else ""
        return f"not reached: the limit is {self.limit:g}, best was {self.chosen.name}: {found}: train{more}"

    def __str__(self) -> str:
        return "\n".join([*(str(a) for a in self.attempts), self.verdict])

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the model."""
        return {
            **{k: getattr(self, k) for k in ("reached", "limit", "labelled", "samples", "verdict")},
            "chosen": self.chosen.name,
            "attempts": plain(self.attempts),
        }


def least_samples(limit: float) -> int:
    """So many held-out samples are needed to show a limit in points, if no decision changes on any."""
    return math.ceil(math.log(_DOUBT) / math.log1p(-limit / 100))


def upper_bound(changes: Tensor, attempt: int) -> float:
    """Points [N] of each sample -> an upper bound of their mean, one-sided.

    Exact for decisions that change or not (Clopper and Pearson, Biometrika 1934); normal for gains against losses, with a spread
    of one more change than was seen. The doubt is split over the attempts so far (Bonferroni): the more are tried, the more
    certain each has to be.
    """
    n, events = len(changes), int((changes != 0).sum())
    doubt = _DOUBT / attempt
    exact = 100.0 if events == n else 100 * float(betaincinv(events + 1, n - events, 1 - doubt))
    if bool((changes >= 0).all()):
        return exact
    spread = 100 * math.sqrt((events + 1) / (n + 2) / n)
    return float(changes.mean()) + statistics.NormalDist().inv_cdf(1 - doubt) * spread


def search(
    model: QModel,
    data: Source,
    *,
    max_drop: float,
    validation: Iterable[Any] | None = None,
    target: str | Target = "onnxruntime",
    weight_bits: int = 8,
    activation_bits: int = 8,
    overrides: Overrides | None = None,
    preprocess: Preprocess | None = None,
    samples: int = 256,
    batch: int = 32,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> Found:
    """The cheapest recipe that loses at most ``max_drop`` points.

    data: unlabelled samples as for ``quantize``. validation: labelled batches (inputs, class indices), which nothing is fitted to:
    points are of accuracy then. Without it some of the data are held out, and points are of decisions that differ from the float
    network's. options: as ``quantize`` takes them, but no recipe. Raises :class:`UsageError` where the outputs are no class scores,
    :class:`DataError` for too few data.
    """
    if not 0 < max_drop < 100:
        raise UsageError(f"max_drop is {max_drop:g}: give points between 0 and 100, such as 0.5")
    outputs = output_values(model.graph)
    if len(outputs) != 1 or len(outputs[0].meta["shape"]) != 2:
        raise UsageError("max_drop counts decisions: it needs a network with one output of class scores [N, classes]")
    held = 0 if validation is not None else min(_MOST, max(_FEWEST, math.ceil(_PER_EVENT * 100 / max_drop)))
    source = Hashed(load_samples(model, data, preprocess=preprocess, samples=samples + held, batch=batch, seed=seed))
    fit, out = _split(source.samples(), samples, held)
    portions: list[Portion] = [(x, None) for x in out] if validation is None else list(validation)
    if not portions:
        raise DataError("there are no samples to judge by")
    common = {"target": target, "weight_bits": weight_bits, "activation_bits": activation_bits, "samples": samples,
              "batch": batch, "seed": seed, "preprocess": preprocess, "progress": progress, **options}  # fmt: skip
    hunt = _Hunt(note_data(model, source), fit, bench(model, portions), max_drop, common, dict(overrides or {}))
    return hunt.found()


def _split(source: Samples, samples: int, held: int) -> tuple[Samples, list[Inputs]]:
    """Every few samples held out, so that both parts are of the same kind however the data are sorted."""
    batches = [tuple(b) for b in source]
    total = sum(len(b[0]) for b in batches)
    held = held if total >= samples + held else min(held, total // 2)
    fit: list[Inputs] = []
    out: list[Inputs] = []
    at = 0
    for b in batches:
        places = range(at, at + len(b[0]))
        at += len(b[0])
        kept = torch.tensor([(i + 1) * held // total > i * held // total for i in places])
        for part, mask in ((out, kept), (fit, ~kept)):
            if bool(mask.any()):
                part.append(tuple(t[mask] for t in b))
    count = sum(len(b[0]) for b in fit)
    return Samples(f"{count} samples of {source.description}", count, lambda: iter(fit)), out


@dataclass
class _Hunt:
    """Attempts so far, and the best of them."""

    model: QModel
    fit: Samples
    bench: Bench
    limit: float
    options: Mapping[str, Any]
    overrides: dict[str, Format | Bits | None]

    def __post_init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.best: tuple[Attempt, QModel] | None = None

    def found(self) -> Found:
        """Try, cheapest first, until the limit is held."""
        for attempt in self._ways():
            if attempt.bound <= self.limit:
                break
        assert self.best is not None  # there is always a first attempt
        chosen, m = self.best
        done = Found(m, chosen.bound <= self.limit, self.limit, self.bench.labelled, self.bench.samples,
                     tuple(self.attempts), chosen)  # fmt: skip
        entries = [LogEntry("search", None, f"tried {a}", dict(vars(a))) for a in self.attempts]
        log = LogEntry("search", None, done.verdict, {"reached": done.reached, "limit": self.limit})
        return replace(done, model=m.logged(*entries, log))

    def _ways(self) -> Iterator[Attempt]:
        """One attempt each time it is asked."""
        narrow = min(self.options["weight_bits"], self.options["activation_bits"])
        bits = f"{narrow} bits"
        default, low = load_recipe("default"), load_recipe("low-bit")
        plain = replace(default, name="plain", steps=tuple(s for s in default.steps if s["step"] != "equalize"))
        yield self.attempt(f"plain {bits}", plain, self.overrides)
        yield self.attempt(f"{bits}, equalized and corrected", default, self.overrides)
        before = min(a.noise for a in self.attempts)
        yield self.attempt(f"{bits}, weights by descent", low, self.overrides)
        recipe = low if self.attempts[-1].noise <= before else default
        if narrow < 8 and self.attempts[-1].noise <= _IMPROVES * before:
            blocks = low.changed("reconstruct", method="blocks")
            yield self.attempt(f"{bits}, weights by blocks", blocks, self.overrides)
        yield from self._wider(recipe, narrow)

    def _wider(self, recipe: Recipe, narrow: int) -> Iterator[Attempt]:
        """More bits for the layers that cost most: 8 where fewer were asked for, else float."""
        assert self.best is not None  # attempts were made
        m = self.best[1]
        few = [(tuple(t[:_SENSITIVE] for t in x), None) for x, _ in self.bench.portions[:1]]
        nodes, every = by_value(m.graph), layers(m.graph)
        worst: list[str] = []
        for value in each_alone(m, bench(m, few)):
            for user in nodes[value].users:
                if user in set(every) and value_name(user) not in worst:
                    worst.append(value_name(user))
        wide = Format(8) if narrow < 8 else None
        names = {value_name(n): value_name(w) for n in every if (w := weight_of(n)) is not None}
        known = set(by_value(self.model.graph))
        count = 1
        while count <= max(1, len(worst) // 2):
            added = {names[n] if wide else n: wide for n in worst[:count] if n in names and {n, names[n]} <= known}
            what = "with 8-bit weights" if wide else "in float"
            yield self.attempt(f"{narrow} bits, {count} layers {what}", recipe, {**self.overrides, **added})
            count *= 2

    def attempt(self, name: str, recipe: Recipe, overrides: Overrides) -> Attempt:
        """Quantize, judge, and keep what is best."""
        start = time.perf_counter()
        m = by_recipe(self.model, self.fit, recipe=recipe, overrides=overrides, **self.options)
        changes, noise = self.judged(m)
        bound = upper_bound(changes, len(self.attempts) + 1)
        done = Attempt(name, float(changes.mean()), bound, noise, time.perf_counter() - start)
        self.attempts.append(done)
        before = self.best
        if (
            before is None
            or done.bound <= self.limit
            or (done.points, done.noise) < (before[0].points, before[0].noise)
        ):
            self.best = done, m
        return done

    @torch.no_grad()
    def judged(self, m: QModel) -> tuple[Tensor, float]:
        """Points [N] that each held-out sample costs, and the noise at the outputs."""
        tally, tap = self.bench.tally(), simulate(m)
        changes: list[Tensor] = []
        for (x, y), wanted in zip(self.bench.portions, self.bench.wanted, strict=True):
            got = run(m, x, tap)
            tally.add(got)
            decided, before = got[0].argmax(1), wanted[0].argmax(1)
            if y is None:
                changes.append((decided != before).double())
            else:
                changes.append((before == y).double() - (decided == y).double())
        return 100 * torch.cat(changes), tally.score.noise
