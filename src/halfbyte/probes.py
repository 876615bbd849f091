"""What a diagnosis measures: the outputs with some values quantized, each quantizer alone, and the values themselves."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid, fake_quantize
from halfbyte.correct import ChannelMoments, channel_moments
from halfbyte.flips import are_probabilities
from halfbyte.graph import bias_of, by_value, input_axis, is_depthwise, layers, output_values, weight_of
from halfbyte.grids import MSE
from halfbyte.model import Inputs, Outputs, QModel, Tap, value_name
from halfbyte.run import evaluate_plainly, last_uses, run, steps
from halfbyte.stats import Histogram, histogram

Portion = tuple[Inputs, Tensor | None]
PORTION = 8  # samples run at a time
_ONE_SIDED = 1.645  # standard errors: 95 %


@dataclass(frozen=True)
class Score:
    """noise: squared error over variance, mean over outputs. flips: share of decisions that differ from float, and right: share
    of right ones; None where outputs are no class scores, or there are no labels.

    lost: the share of samples that float has right and this has not, less those the other way round. Without labels it is what
    the float network's own probabilities expect: a decision that flips between two classes it held equally likely costs
    nothing. sure: as much of it as chance in the choice of the samples does not explain (95 %, one-sided).
    """

    noise: float
    flips: float | None = None
    right: float | None = None
    lost: float | None = None
    sure: float | None = None


@dataclass(frozen=True)
class Bench:
    """Samples, and what the float network makes of them."""

    portions: Sequence[Portion]
    wanted: Sequence[Outputs]

    @property
    def samples(self) -> int:
        """How many samples."""
        return sum(len(x[0]) for x, _ in self.portions)

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return all(y is not None for _, y in self.portions)

    def alone(self, m: QModel, names: Iterable[str], shifts: Mapping[str, Tensor] | None = None) -> Score:
        """The score with some quantizers alone, all else in float."""
        groups, held, on = quantizers(m), dict(m.params), set[str]()
        for name in names:
            on.update(groups.get(name, ()))
            held = _mixed(m, name, m.parameters, held)
        return self._scored(_Case.only(m, on, held), shifts)

    def tally(self) -> "Tally":
        """An empty sum to add outputs to."""
        return Tally(self)

    def quantized(
        self, m: QModel, *, weights: bool = True, values: bool = True, shifts: Mapping[str, Tensor] | None = None
    ) -> Score:
        """The score of a model as simulated, its weights or its running values perhaps left in float.

        shifts: value -> what is taken from it before it is rounded, shaped to fit it.
        """
        return self._scored(_Case.of(m, weights, values), shifts)

    @torch.no_grad()
    def _scored(self, case: "_Case", shifts: Mapping[str, Tensor] | None) -> Score:
        tally, less = self.tally(), shifts or {}

        def tap(name: str, x: Tensor) -> Tensor:
            return case.tap(name, x - less[name] if name in less else x)

        for x, _ in self.portions:
            tally.add(run(case.model, x, tap))
        return tally.score


class Tally:
    """Sums over portions, in their order; nothing of the outputs is kept."""

    def __init__(self, b: Bench) -> None:
        self.bench, self.at = b, 0
        outputs = len(b.wanted[0]) if b.wanted else 0
        self.noise, self.signal = [0.0] * outputs, [0.0] * outputs
        self.flips = self.right = self.decided = 0
        self.lost: list[Tensor] = []

    def add(self, got: Outputs) -> None:
        """The outputs of the next portion."""
        (_, y), wanted = self.bench.portions[self.at], self.bench.wanted[self.at]
        self.at += 1
        for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
            self.noise[i] += float((a - b).double().square().sum())
            self.signal[i] += float((a - a.double().mean()).double().square().sum())
        if len(got) == 1 and got[0].ndim == 2 and got[0].shape[1] > 1:
            decided, before = got[0].argmax(1), wanted[0].argmax(1)
            self.decided += len(decided)
            self.flips += int((decided != before).sum())
            if y is not None:
                y = y.to(decided.device)
                self.right += int((decided == y).sum())
                self.lost.append((before == y).double() - (decided == y).double())
            else:
                likely = probabilities(wanted[0]).double()
                self.lost.append((likely.gather(1, before[:, None]) - likely.gather(1, decided[:, None])).flatten())

    @property
    def score(self) -> Score:
        """What has been added so far."""
        ratios = [n / max(s, 1e-30) for n, s in zip(self.noise, self.signal, strict=True)]
        noise = sum(ratios) / max(1, len(ratios))
        flips = self.flips / self.decided if self.decided else None
        right = self.right / self.decided if self.decided and self.bench.labelled else None
        lost, sure = _beyond_chance(self.lost) if self.lost else (None, None)
        return Score(noise if math.isfinite(noise) else 1e9, flips, right, lost, sure)


def probabilities(scores: Tensor) -> Tensor:
    """Class scores as probabilities, which they may be already."""
    return scores if are_probabilities(scores) else scores.softmax(1)


def _beyond_chance(lost: list[Tensor]) -> tuple[float, float]:
    """The mean, and what is left of it after its standard error, with one more sample on which nothing is lost."""
    every = torch.cat(lost)
    more = torch.cat([every, every.new_zeros(1)])
    return float(every.mean()), float(more.mean() - _ONE_SIDED * (more.var(correction=0) / len(more)).sqrt())


@torch.no_grad()
def bench(m: QModel, portions: Iterable[Portion]) -> Bench:
    """The float network's outputs on samples."""
    held = list(portions)
    return Bench(held, [run(m.as_float(), x) for x, _ in held])


@dataclass(frozen=True)
class _Case:
    """A model with some of its values quantized: constants are rounded beforehand, running values by the tap."""

    model: QModel
    grids: Mapping[str, Grid]

    @staticmethod
    def of(m: QModel, weights: bool, values: bool) -> "_Case":
        constant = {value_name(n) for n in m.graph.nodes if n.op == "get_attr"}
        on = {v for v in (*m.grids, *m.ties) if (weights if v in constant else values) and m.grid(v) is not None}
        return _Case.only(m, on, m.parameters if weights else m.params)

    @staticmethod
    def only(m: QModel, on: Iterable[str], parameters: Mapping[str, Tensor]) -> "_Case":
        grids = {v: g for v in on if (g := m.grid(v)) is not None}
        held = dict(parameters)
        for node in m.graph.nodes:
            if node.op == "get_attr" and value_name(node) in grids:
                held[str(node.target)] = fake_quantize(held[str(node.target)], grids[value_name(node)])
        running = {
            v: g for v, g in grids.items() if v not in {value_name(n) for n in m.graph.nodes if n.op == "get_attr"}
        }
        return _Case(QModel(m.graph, held, m.outputs, m.dynamic), running)

    def tap(self, name: str, x: Tensor) -> Tensor:
        grid = self.grids.get(name)
        return x if grid is None else fake_quantize(x, grid)


def quantizers(m: QModel) -> dict[str, tuple[str, ...]]:
    """Values that own a grid -> all values on it."""
    names = by_value(m.graph)
    found: dict[str, list[str]] = {v: [v] for v in m.grids if v not in m.ties and v in names}
    for value, root in m.ties.items():
        if root in found and value in names:
            found[root].append(value)
    return {k: tuple(v) for k, v in found.items()}


def readers(m: QModel, weight: str) -> list[fx.Node]:
    """The layers that read a parameter as weight."""
    return [n for n in layers(m.graph) if (w := weight_of(n)) is not None and value_name(w) == weight]


def _mixed(m: QModel, name: str, inside: Mapping[str, Tensor], outside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters: those of the layers of one weight from ``inside``, all others from ``outside``."""
    held = dict(outside)
    for layer in readers(m, name):
        for node in (weight_of(layer), bias_of(layer)):
            if node is not None:
                held[str(node.target)] = inside[str(node.target)]
    return held


def left_in_float(m: QModel, names: Iterable[str]) -> tuple[QModel, Tap]:
    """A model, and the tap that simulates it, with some quantizers left out and all others as they are."""
    groups, held, spared = quantizers(m), dict(m.parameters), set[str]()
    for name in names:
        spared.update(groups.get(name, ()))
        held = _mixed(m, name, m.params, held)
    case = _Case.only(m, {v for group in groups.values() for v in group} - spared, held)
    return case.model, case.tap


def each_alone(m: QModel, b: Bench) -> dict[str, float]:
    """Value -> noise at the outputs with that value alone quantized, all else in float; the worst first."""
    cases = {
        root: _Case.only(m, group, _mixed(m, root, m.parameters, m.params)) for root, group in quantizers(m).items()
    }
    return _forked(_Case.only(m, (), m.params), cases, b)


def each_left_out(m: QModel, b: Bench, names: Iterable[str]) -> dict[str, float]:
    """Value -> noise at the outputs with all but that value quantized; the most rescued first."""
    groups = quantizers(m)
    every = {v for group in groups.values() for v in group}
    cases = {r: _Case.only(m, every - set(groups[r]), _mixed(m, r, m.params, m.parameters)) for r in names}
    found = _forked(_Case.only(m, every, m.parameters), cases, b)
    return dict(reversed(found.items()))


@torch.no_grad()
def _forked(base: _Case, cases: Mapping[str, _Case], b: Bench) -> dict[str, float]:
    """Noise of each case, which differs from the base from some node on: only the rest of the network runs again.

    Alive at any time are one frontier of the base and one of a case, for one portion of the samples.
    """
    nodes = list(base.model.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    freed, outs = last_uses(base.model.graph), output_values(base.model.graph)
    due: dict[int, list[str]] = {}
    for name, case in cases.items():
        due.setdefault(_start(base, case, order), []).append(name)
    found = {name: b.tally() for name in cases}
    for x, _ in b.portions:
        inputs = dict(zip(base.model.inputs, x, strict=False))
        env: dict[fx.Node, Any] = {}
        ahead = steps(nodes, env, _given(base, inputs), base.tap, freed=freed)
        for i in range(len(nodes)):
            for name in due.get(i, ()):
                case = cases[name]
                given = _given(case, inputs)
                held = {n: given(n) if n.op == "get_attr" else t for n, t in env.items()}
                for _ in steps(nodes[i:], held, given, case.tap, freed=freed):
                    pass
                found[name].add(tuple(held[n] for n in outs))
            next(ahead)
    noise = {name: tally.score.noise for name, tally in found.items()}
    return dict(sorted(noise.items(), key=lambda item: -item[1]))


def _given(case: _Case, inputs: Mapping[fx.Node, Tensor]) -> Callable[[fx.Node], Tensor]:
    def given(node: fx.Node) -> Tensor:
        return case.model.params[str(node.target)] if node.op == "get_attr" else inputs[node].to(case.model.device)

    return given


def _start(base: _Case, case: _Case, order: Mapping[fx.Node, int]) -> int:
    """The first node whose value may differ, other than parameters."""
    found = len(order) - 1
    for node, i in order.items():
        if node.op == "get_attr":
            if base.model.params[str(node.target)] is not case.model.params[str(node.target)]:
                found = min([found, *(order[u] for u in node.users)])
        elif "value" in node.meta and (value_name(node) in base.grids) != (value_name(node) in case.grids):
            found = min(found, i)
    return found


@dataclass(frozen=True)
class Seen:
    """A running value in float, as the samples show it.

    low, high: [channels] extremes; usual: [channels] mean magnitudes. noise, best: mean squared error on its grid, and on the
    grid of least error. clipped: the part of ``noise`` from beyond the ends of the grid. peak: largest magnitude over the 99.9 %
    quantile of magnitudes.
    """

    histogram: Histogram
    low: Tensor
    high: Tensor
    usual: Tensor
    grid: Grid
    best_grid: Grid
    noise: float
    best: float
    clipped: float
    peak: float

    @property
    def power(self) -> float:
        """Mean square of the value."""
        h = self.histogram
        return float((h.counts * h.centres.square()).sum() / h.counts.sum())


@dataclass(frozen=True)
class LayerError:
    """The error that a layer's rounded weight alone causes at its output, over the output's variance; and the share of it that
    is the same for all samples of a channel. mean: that error, shaped to fit the output. inputs: moments of what the layer
    reads.
    """

    noise: float
    biased: float
    depthwise: bool
    mean: Tensor
    inputs: ChannelMoments


def _channels(x: Tensor) -> Tensor:
    """[channels, everything else]: of pictures dimension 1, of others the last."""
    return x.movedim(1 if x.ndim > 3 else -1, 0).flatten(1)


def histogram_noise(h: Histogram, grid: Grid) -> tuple[float, float]:
    """Mean squared error of what a histogram holds on a grid of one scale, and the part of it from beyond the grid's ends."""
    scale, zero = float(grid.scale), float(grid.zero)
    lo, hi = float(grid.lo.min()), float(grid.hi.max())
    codes = torch.round(h.centres / scale) + zero
    error = ((codes.clamp(lo, hi) - zero) * scale - h.centres).square() * h.counts
    outside = (codes < lo) | (codes > hi)
    total = float(h.counts.sum())
    return float(error.sum()) / total, float(error[outside].sum()) / total


@torch.no_grad()
def look(m: QModel, b: Bench) -> tuple[dict[str, Seen], dict[str, LayerError]]:
    """Every running value that owns a grid of one scale, and every layer with a quantized weight, in one float pass."""
    constant = {value_name(n) for n in m.graph.nodes if n.op == "get_attr"}
    wanted = {v for v in quantizers(m) if v not in constant and m.grids[v].scale.ndim == 0}
    held: dict[str, tuple[Histogram, Tensor, Tensor, Tensor]] = {}
    sums: dict[str, list[Tensor]] = {}
    read: dict[str, ChannelMoments] = {}
    rounded = _Case.of(m, weights=True, values=False).model.params
    every = {n for n in layers(m.graph) if m.grid(value_name(weight_of(n))) is not None}  # type: ignore[arg-type]

    def tap(name: str, x: Tensor) -> Tensor:
        if name in wanted and x.is_floating_point() and bool(torch.isfinite(x).all()):
            low, high = (t.flatten() for t in torch.aminmax(_channels(x), dim=1))
            h, usual = histogram(x), _channels(x).abs().mean(1) * len(x)
            if name in held:
                before = held[name]
                h, low, high = before[0].merged(h), torch.minimum(before[1], low), torch.maximum(before[2], high)
                usual = before[3] + usual
            held[name] = h, low, high, usual
        return x

    def evaluate(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = evaluate_plainly(node, args, kwargs)
        if node in every:
            own = [rounded[str(a.target)] if isinstance(a, fx.Node) and a.op == "get_attr" else v
                   for a, v in zip(node.args, args, strict=True)]  # fmt: skip
            error = (evaluate_plainly(node, tuple(own), kwargs) - y).movedim(input_axis(node), 0).flatten(1).double()
            flat = y.movedim(input_axis(node), 0).flatten(1).double()
            new = [error.sum(1), error.square().sum(1), flat.sum(1), flat.square().sum(1)]
            new.append(torch.full_like(new[0], float(error.shape[1])))
            name, moments = value_name(node), channel_moments(args[0], input_axis(node))
            read[name] = read[name].merged(moments) if name in read else moments
            before = sums.get(name)
            sums[name] = new if before is None else [p + q for p, q in zip(before, new, strict=True)]
        return y

    for x, _ in b.portions:
        run(m.as_float(), x, tap, evaluate=evaluate)
    nodes = by_value(m.graph)
    errors = {name: _layer_error(s, is_depthwise(nodes[name]), read[name]) for name, s in sums.items()}
    return {name: _seen(m, name, *found) for name, found in held.items()}, errors


def _seen(m: QModel, name: str, h: Histogram, low: Tensor, high: Tensor, usual: Tensor) -> Seen:
    grid, form = m.grids[name], m.plan[name]
    assert form is not None  # it has a grid
    best = MSE().activation(h, form)
    noise, clipped = histogram_noise(h, grid)
    ends = [abs(h.quantile(0.0005)), abs(h.quantile(0.9995))]
    peak = max(abs(h.minimum), abs(h.maximum)) / max(*ends, h.width, 1e-30)
    return Seen(h, low, high, usual, grid, best, noise, histogram_noise(h, best)[0], clipped, peak)


def _layer_error(s: list[Tensor], depthwise: bool, inputs: ChannelMoments) -> LayerError:
    error, squares, total, total_squares, count = s
    mean = error / count
    power = float((squares / count).mean())
    variance = float((total_squares / count - (total / count).square()).mean())
    share = float(mean.square().mean()) / max(power, 1e-30)
    return LayerError(power / max(variance, 1e-30), share, depthwise, mean.float(), inputs)
