"""The automatic recipe: the cheapest way to quantize that holds a limit on the drop, on samples that no step has seen.

Attempts go from cheap to dear: ranges alone, equalization, descent over the integers, blocks, and wider layers, the most sensitive
first. Each is judged on held-out samples, with a margin for how few they are; the first that holds the limit is the answer. What
cannot help is not tried: no other rounding of the weights where the rounded values alone miss the limit, no wider layers where
leaving them in float misses it.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from halfbyte.calibrate import Progress, silent
from halfbyte.data import Samples, Source
from halfbyte.errors import DataError, UsageError
from halfbyte.flips import Decided, Points, least_samples, points
from halfbyte.formats import Bits, Format
from halfbyte.graph import by_value, layers, output_values
from halfbyte.model import Inputs, LogEntry, QModel, Tap, Target, value_name
from halfbyte.overrides import Overrides
from halfbyte.pipeline import by_recipe, load_samples
from halfbyte.place import place, unplaced
from halfbyte.preprocess import Preprocess
from halfbyte.probes import Bench, Portion, bench, each_alone, left_in_float, probabilities, quantizers
from halfbyte.provenance import Hashed, note_data
from halfbyte.recipe import Recipe, load_recipe
from halfbyte.run import fixed_batch, run, simulate
from halfbyte.shown import Shown, plain

_DOUBT = 0.16  # the chance, over all attempts, of calling a limit held that is not: one standard error of one attempt
_FEWEST, _MOST = 64, 512  # held-out samples without labels
_PER_EVENT = 4  # samples for each that the limit allows to change
_SENSITIVE = 16  # samples that tell which layers are
_IMPROVES = 0.95  # of the noise: an attempt that leaves more of it is no step worth repeating with more effort
_TOO_SURE = 0.99  # probability of the decisions: so sure are networks of what they were trained on


@dataclass(frozen=True)
class Attempt:
    """One way that was tried: the points that it costs, estimated from the held-out samples (:mod:`halfbyte.flips`), and their upper
    bound; noise-to-signal; seconds.
    """

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

    reached: the limit is shown to hold for samples to come. limit: points allowed. labelled: points of accuracy, else of decisions
    that differ from the float network's. samples: held out. left_out: why dearer ways were not tried. sure: how sure the float
    network is of the held-out samples, on average: those that it was trained on show nothing about others.
    """

    model: QModel
    reached: bool
    limit: float
    labelled: bool
    samples: int
    attempts: tuple[Attempt, ...]
    chosen: Attempt
    left_out: tuple[str, ...] = ()
    sure: float = 0.0

    @property
    def verdict(self) -> str:
        """One sentence."""
        what = "points lost" if self.labelled else "points of decisions that differ from float"
        found = f"{self.chosen.points:.2f} {what} on {self.samples} held-out samples, at most {self.chosen.bound:.2f} with confidence"
        if self.reached:
            enough = f"{self.chosen.name} is enough" if len(self.attempts) == 1 else f"reached with {self.chosen.name}"
            return f"{enough}: {found}; the limit is {self.limit:g}"
        if self.chosen.bound <= self.limit:
            return (
                f"not shown, and perhaps held, by {self.chosen.name}: {found}; but the network is {self.sure:.1%} sure of them: it "
                "was probably trained on them, and more decisions change on others: give others, or labelled ones with --validation"
            )
        few = least_samples(self.limit, _DOUBT)
        if self.samples < few and self.chosen.points <= self.limit:
            more = f"{few} samples at least have to be held out to show {self.limit:g} points: give more"
            return f"not shown, and perhaps held, by {self.chosen.name}: {found}; {more}"
        return f"not reached: the limit is {self.limit:g}, best was {self.chosen.name}: {found}: train"

    def __str__(self) -> str:
        return "\n".join([*(str(a) for a in self.attempts), *self.left_out, self.verdict])

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the model."""
        return {
            **{k: getattr(self, k) for k in ("reached", "limit", "labelled", "samples", "verdict")},
            "chosen": self.chosen.name,
            "attempts": plain(self.attempts),
            "left_out": list(self.left_out),
        }


@torch.inference_mode(False)  # gradients, whatever the caller has turned off
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
    fit, out = _split(source.samples(), samples, held, fixed_batch(model) or 1)
    portions: list[Portion] = [(x, None) for x in out]
    if validation is not None:
        portions = [((x,) if isinstance(x, torch.Tensor) else tuple(x), y) for x, y in validation]
    if not portions:
        raise DataError("there are no samples to judge by")
    common = {"target": target, "weight_bits": weight_bits, "activation_bits": activation_bits, "samples": samples,
              "batch": batch, "seed": seed, "preprocess": preprocess, "progress": progress, **options}  # fmt: skip
    hunt = _Hunt(note_data(model, source), fit, bench(model, portions), max_drop, common, dict(overrides or {}))
    return hunt.found()


def _chosen(i: int, held: int, total: int) -> bool:
    """Whether this one of ``total`` is among the ``held`` that lie evenly among them."""
    return (i + 1) * held // total > i * held // total


def _split(source: Samples, samples: int, held: int, unit: int = 1) -> tuple[Samples, list[Inputs]]:
    """Every few samples held out, so that both parts are of the same kind however the data are sorted; ``unit`` samples together."""
    batches = [tuple(b) for b in source]
    total = sum(len(b[0]) for b in batches)
    held = held if total >= samples + held else min(held, total // 2)
    fit: list[Inputs] = []
    out: list[Inputs] = []
    at = 0
    for b in batches:
        places = range(at, at + len(b[0]))
        at += len(b[0])
        kept = torch.tensor([_chosen(i // unit, -(-held // unit), total // unit) for i in places])
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
        self.left_out: list[str] = []
        self.best: tuple[Attempt, QModel] | None = None

    def found(self) -> Found:
        """Try, cheapest first, until the limit is held, or as good as held where the samples are too few to show it."""
        for attempt in self._ways():
            if self._within(attempt.points, attempt.bound):
                break
        assert self.best is not None  # there is always a first attempt
        chosen, m = self.best
        sure = self._sure()
        kind = self.bench.labelled or sure <= _TOO_SURE
        done = Found(m, kind and chosen.bound <= self.limit, self.limit, self.bench.labelled, self.bench.samples,
                     tuple(self.attempts), chosen, tuple(self.left_out), sure)  # fmt: skip
        entries = [LogEntry("search", None, f"tried {a}", dict(vars(a))) for a in self.attempts]
        entries += [LogEntry("search", None, text) for text in self.left_out]
        log = LogEntry("search", None, done.verdict, {"reached": done.reached, "limit": self.limit})
        return replace(done, model=m.logged(*entries, log))

    @property
    def enough(self) -> bool:
        """Whether so many samples can show the limit at all."""
        return self.bench.samples >= least_samples(self.limit, _DOUBT)

    def _sure(self) -> float:
        likeliest = [probabilities(scores).amax(1) for (scores,) in self.bench.wanted]
        return float(torch.cat(likeliest).mean())

    def _bound(self, cost: Points) -> float:
        """Of the next attempt. Bonferroni: the more are tried, the surer each has to be."""
        return cost.most(_DOUBT / (len(self.attempts) + 1))

    def _within(self, points: float, bound: float) -> bool:
        """Whether the limit is held, or looks held where so few samples cannot show it."""
        return (bound if self.enough else points) <= self.limit

    def _holds(self, cost: Points) -> bool:
        """Whether the next attempt would be within the limit at such a cost."""
        return self._within(cost.mean, self._bound(cost))

    def _ways(self) -> Iterator[Attempt]:
        """One attempt each time it is asked."""
        narrow = min(self.options["weight_bits"], self.options["activation_bits"])
        bits = f"{narrow} bits"
        default, low = load_recipe("default"), load_recipe("low-bit")
        plain = replace(default, name="plain", steps=tuple(s for s in default.steps if s["step"] != "equalize"))
        yield self.attempt(f"plain {bits}", plain, self.overrides)
        yield self.attempt(f"{bits}, equalized and corrected", default, self.overrides)
        assert self.best is not None  # there were attempts
        before, recipe, untuned = min(a.noise for a in self.attempts), default, self.best[1]
        if narrow >= 8 and not self._holds(alone := self._of_values(untuned)):
            costs = f"{alone.mean:.2f} points, at most {self._bound(alone):.2f}"
            self.left_out.append(f"not tried: descent: rounding the running values alone, no weight, costs {costs}")
        else:
            yield self.attempt(f"{bits}, weights by descent", low, self.overrides)
            recipe = low if self.attempts[-1].noise <= before else default
            if narrow < 8 and self.attempts[-1].noise <= _IMPROVES * before:
                blocks = low.changed("reconstruct", method="blocks")
                yield self.attempt(f"{bits}, weights by blocks", blocks, self.overrides)
        yield from self._wider(untuned, recipe, narrow)

    def _of_values(self, m: QModel) -> Points:
        """What rounding the running values alone costs, all weights in float: no other rounding of the weights does better."""
        constant = {value_name(n) for n in m.graph.nodes if n.op == "get_attr"}
        return self.judged(*left_in_float(m, constant))[0]

    def _wider(self, m: QModel, recipe: Recipe, narrow: int) -> Iterator[Attempt]:
        """More bits for the layers that cost most: 8 where fewer were asked for, else float.

        How many are enough is first estimated on ``m``, with their values in float where the target would leave or widen them. No
        layer of it may make up for the rounding of others, which then falls away.
        """
        wide, what, share = (Bits(8, 8), "at 8 bits", 1.0) if narrow < 8 else (None, "in float", 0.5)
        worst = [n for n in self._worst(m) if n in by_value(self.model.graph)]
        most = int(share * len(worst))
        counts = sorted({most, *(2**i for i in range(most.bit_length()))} - {0})

        def expected(count: int) -> Points:
            added = dict.fromkeys(worst[:count], wide)
            return self.judged(*left_in_float(m, self._spared(m, added)))[0]

        if not counts:
            return
        if not self._holds(last := expected(most)):
            would = f"would still cost about {last.mean:.2f} points, at most {self._bound(last):.2f}"
            self.left_out.append(f"not tried: {most} layers {what}: that {would}")
            return
        count = next(c for c in counts if c == most or self._holds(expected(c)))
        for n in [c for c in counts if c >= count]:
            widened = {**self.overrides, **dict.fromkeys(worst[:n], wide)}
            yield self.attempt(f"{narrow} bits, {n} layers {what}", recipe, widened)

    def _worst(self, m: QModel) -> list[str]:
        """Layers by what the rounding around them costs: that of their weight, or of a value that they write or read."""
        most = fixed_batch(m) or _SENSITIVE
        few = [(tuple(t[:most] for t in x), None) for x, _ in self.bench.portions[:1]]
        nodes, every = by_value(m.graph), set(layers(m.graph))
        found: dict[str, None] = {}
        for value in each_alone(m, bench(m, few)):
            node = nodes[value]
            around = [*(() if node.op == "get_attr" else _writers(node, every)), *node.users]
            found |= dict.fromkeys(value_name(n) for n in around if n in every)
        return list(found)

    def _spared(self, m: QModel, added: Overrides) -> set[str]:
        """The quantizers that fall away, or become wide, by overrides."""
        assert m.target is not None  # it was placed
        widths = {k: self.options[k] for k in ("weight_bits", "activation_bits")}
        uniform = self.options.get("uniform", False)
        whole = unplaced(m)
        before, plan = (
            place(whole, m.target, **widths, uniform=uniform, overrides=o).plan
            for o in (self.overrides, {**self.overrides, **added})
        )
        return {
            root for root in quantizers(m) if before.get(root) != plan.get(root) and f"{root}:quantized" not in plan
        }

    def attempt(self, name: str, recipe: Recipe, overrides: Overrides) -> Attempt:
        """Quantize, judge, and keep what is best."""
        start = time.perf_counter()
        m = by_recipe(self.model, self.fit, recipe=recipe, overrides=overrides, **self.options)
        cost, noise = self.judged(m, simulate(m))
        done = Attempt(name, cost.mean, self._bound(cost), noise, time.perf_counter() - start)
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
    def judged(self, m: QModel, tap: Tap) -> tuple[Points, float]:
        """Points that rounding costs, and the noise at the outputs."""
        tally, parts = self.bench.tally(), []
        for (x, y), wanted in zip(self.bench.portions, self.bench.wanted, strict=True):
            got = run(m, x, tap)
            tally.add(got)
            parts.append(Decided.of(wanted[0], got[0], y))
        return points(Decided.joined(parts)), tally.score.noise


def _writers(node: fx.Node, every: set[fx.Node]) -> list[fx.Node]:
    """The layers whose outputs a value is made of, through whatever is no layer."""
    if node in every:
        return [node]
    return [w for n in node.all_input_nodes if n.op == "call_function" for w in _writers(n, every)]
