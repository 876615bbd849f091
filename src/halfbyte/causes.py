"""The causes that a diagnosis can name: small rules, each with evidence, a threshold with its reason, a score and a command."""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from halfbyte import engine
from halfbyte.affine import Grid, quantize
from halfbyte.correct import ChannelMoments, correct_expected
from halfbyte.diagnosis import Cause, Repair
from halfbyte.graph import bias_of, by_value, input_axis, is_depthwise, layers, macs, weight_of
from halfbyte.grids import MSE, from_range
from halfbyte.matching import SHIFT, Match
from halfbyte.model import QModel, value_name
from halfbyte.ops import base_name
from halfbyte.parity import Parity
from halfbyte.probes import Bench, LayerError, Score, Seen

_WORTH = 0.01  # of noise (20 dB), or of the work: below, there is nothing to look for
FINE = 0.05  # noise-to-signal at the outputs (13 dB): on trained classifiers about a point of decisions flips from there on
POINTS = 1.0  # of accuracy: the white paper's threshold for its second box
_GAIN = 0.3  # of the output's noise: what explains less is not what to begin with
_MISFIT = 4.0  # a grid with this many times the error of the best one costs a bit or more
_DOMINATES = 8.0  # the widest channel over the median one: the median channel is left with three bits fewer
_PEAK = 4.0  # the largest magnitude over the 99.9 % quantile: two bits for one value in a thousand
_BIASED = 0.2  # of the error's power is the same for every sample; where biases were corrected, hardly any is
_INT32 = 2**31 - 1
_PAIR = (2**15 - 1) / 255  # the largest sum of two neighbouring codes whose products with 255 fit 16 bits
_KNEE = 16  # bits of the trial that shows how much a value's rounding costs


@dataclass(frozen=True)
class Evidence:
    """All that was measured. data: the samples are others than those that the ranges were chosen on."""

    m: QModel
    bench: Bench
    whole: Score
    floats: Score
    weights: Score
    values: Score
    seen: Mapping[str, Seen] = field(default_factory=dict)
    chosen_on: Mapping[str, Seen] = field(default_factory=dict)
    errors: Mapping[str, LayerError] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)
    calibration: Match | None = None
    data: Match | None = None
    separate: bool = False
    parity: Parity | None = None
    unusable: str = ""  # why the engine does not run the file
    training: float | None = None  # noise between the module as it was given and the graph
    reference: float | None = None  # noise between the module in eval mode and the graph, quantizers bypassed
    repairs: tuple[Repair, ...] = ()
    command: str = ""

    @property
    def fine(self) -> bool:
        """Nothing is lost that anybody would notice."""
        return self.whole.noise <= FINE and (self.whole.sure is None or 100 * self.whole.sure <= POINTS)

    @property
    def faultless(self) -> bool:
        """Not even a fault that costs no decision yet would be worth naming."""
        return self.fine and self.whole.noise <= _WORTH

    @property
    def points(self) -> float | None:
        """Points of accuracy lost, expected ones where there are no labels; None without classes."""
        return None if self.whole.lost is None else 100 * self.whole.lost

    def gain(self, grids: Mapping[str, Grid] | None = None, shifts: Mapping[str, Tensor] | None = None) -> float:
        """The share of the output's noise that goes when these grids take the place of the model's, or these shifts are undone.

        A layer whose weight gets another grid gets the bias that goes with it. Where nothing is left of the signal, noise adds
        up no longer and taking one cause away changes nothing: then it counts what the cause does alone.
        """
        if self.whole.noise <= 0:
            return 0.0
        now = replace(self.m, grids={**self.m.grids, **(grids or {})})
        inputs: dict[tuple[str, int], ChannelMoments] = {}
        names = set(grids or {})
        for layer in layers(self.m.graph):
            weight, name = weight_of(layer), value_name(layer)
            if weight is not None and value_name(weight) in (grids or {}) and name in self.errors:
                inputs[value_name(layer.args[0]), input_axis(layer)] = self.errors[name].inputs  # type: ignore[arg-type]
            if weight is not None and name in (shifts or {}):
                names.add(value_name(weight))
        now = correct_expected(now, inputs) if inputs else now
        gain = 1 - self.bench.quantized(now, shifts=shifts).noise / self.whole.noise
        if gain < _GAIN:
            before, after = self.bench.alone(self.m, names).noise, self.bench.alone(now, names, shifts).noise
            gain = max(gain, (min(before, 1.0) - min(after, 1.0)) / min(self.whole.noise, 1.0))
        return max(0.0, gain)

    def again(self, *options: str) -> str:
        """The command that made the model, with other options."""
        words = shlex.split(self.command) or ["halfbyte", "quantize", "NETWORK", "--calibration", "DATA"]
        changed = {o.split()[0] for o in options} | {"-o", "--output"}
        if "--data-free" in words and "--calibration" in changed:
            words.remove("--data-free")
        kept: list[str] = []
        skip = False
        for word in words:
            if skip:
                skip = False
            elif word in changed and word != "--keep-float":
                skip = True
            elif word.split("=")[0] not in changed - {"--keep-float"} and word not in ("--resume", "--overwrite"):
                kept.append(word)
        return " ".join([shlex.join(kept), *options, "-o out-2"])


Rule = Callable[[Evidence], Iterable[Cause]]


def train_mode(e: Evidence) -> Iterable[Cause]:
    """A batch norm that normalizes by the batch: what a sample gives depends on its neighbours."""
    norms = [
        value_name(n)
        for n in e.m.graph.nodes
        if base_name(n) == "batch_norm" and (n.args[5] is True or n.args[3] is None or n.args[4] is None)
    ]
    as_given = e.training is not None and e.training > 1e-3 and (e.reference is None or e.reference <= 1e-3)
    if norms or as_given:
        where = f"{len(norms)} batch norms, {norms[0]} first," if norms else "the module as given"
        yield Cause(
            "train-mode batch norm",
            f"{where} use the statistics of the batch: results depend on the other samples, and nothing can be folded",
            float(len(norms) or 1), 0.0, "a deployed network has none", 1.0,
            "call net.eval() before export (and keep running statistics: track_running_stats=True), then quantize again",
            order=0, values=tuple(norms),
        )  # fmt: skip


def float_sanity(e: Evidence) -> Iterable[Cause]:
    """With all quantizers bypassed the graph is not the network."""
    if e.reference is not None and e.reference > 1e-3:
        yield Cause(
            "a transform changed the network",
            f"with every quantizer bypassed the outputs differ from the module's by noise-to-signal {e.reference:.3g}",
            e.reference, 1e-3, "float transforms keep outputs up to rounding, high-bias absorption up to rare samples",
            0.5, e.again("--recipe omse"), order=0,
        )  # fmt: skip


def preprocessing(e: Evidence) -> Iterable[Cause]:
    """The first layers see what no training picture has shown them."""
    for found, which in ((e.calibration, "calibration"), (e.data, "evaluation")):
        if found is None or not found.off:
            continue
        other = e.data if which == "calibration" else e.calibration
        if other is not None and not other.off and not (found.corrected or (found.repairable and found.exact)):
            continue  # one of two data sets is off by no usual slip: they are unlike each other
        hint = f"; {found.repair} would explain it" if found.repairable else ""
        if found.repairable and found.right is not None and found.repaired_right is not None:
            hint += f" ({found.right:.0%} right in float, {found.repaired_right:.0%} then)"
        yield Cause(
            "wrong or missing pre-processing",
            f"on the {which} data the first layers put out values {found.shift:.1f} standard deviations from what their batch "
            f"norms remember, spread {found.spread:.2g} times as wide{hint}",
            found.shift, SHIFT, "data of the right kind reproduce the moments roughly, whatever they show", 1.0,
            e.again(*(found.options if found.repairable else "--mean MEAN --std STD").replace(" --", "\n--").split("\n")),
            order=0,
        )  # fmt: skip
        return


def unlike(e: Evidence) -> Iterable[Cause]:
    """Ranges that fit what they were chosen on, and not what the network is used on."""
    if not e.separate:
        return
    off = e.calibration is not None and e.calibration.off and e.data is not None and not e.data.off
    values = [
        v
        for v, s in e.seen.items()
        if s.noise > _MISFIT * s.best and (off or _misfit(e.chosen_on.get(v, s)) <= _MISFIT)
    ]
    if not values or e.faultless:
        return
    gain = e.gain({v: _regrid(e.m, v, e.seen[v].best_grid) for v in values})
    if gain >= _GAIN:
        worst = max(values, key=lambda v: _misfit(e.seen[v]))
        yield Cause(
            "calibration data unlike the evaluation data",
            f"{len(values)} ranges fit the calibration samples and not the data, {worst} most: {_misfit(e.seen[worst]):.0f} "
            f"times the least error; ranges from the data take {gain:.0%} of the noise away",
            _misfit(e.seen[worst]), _MISFIT, "four times the least error is a bit lost", gain + (1.0 if off else 0.05),
            e.again("--calibration SAMPLES_LIKE_THE_DATA"), values=tuple(values),
        )  # fmt: skip


def _misfit(s: Seen) -> float:
    return s.noise / max(s.best, 1e-6 * s.power, 1e-30)


def _regrid(m: QModel, value: str, grid: Grid) -> Grid:
    """The grid with the limits of a clamp, as far as the clamp had any."""
    old, form = m.grids[value], m.plan[value]
    assert form is not None  # it has a grid
    if bool((old.lo > form.lo).any()):
        return replace(grid, lo=torch.maximum(grid.zero, grid.lo))
    return grid


def ranges(e: Evidence) -> Iterable[Cause]:
    """Running values and weights whose grid is far from the one of least error."""
    basis = e.chosen_on if e.separate and e.chosen_on else e.seen
    misfits = {v: (_misfit(s), bool(s.grid.scale > s.best_grid.scale)) for v, s in basis.items()}
    fits = {v: _regrid(e.m, v, s.best_grid) for v, s in basis.items()}
    for v, grid in _weight_fits(e.m).items():
        now, best = (_weight_error(e.m, v, g) for g in (e.m.grids[v], grid))
        misfits[v] = now / max(best, 1e-30), bool((e.m.grids[v].scale / grid.scale).median() > 1)
        fits[v] = grid
    for wide, name, what in (
        (True, "too wide ranges", "most codes are never used"),
        (False, "too narrow ranges", "what lies beyond is cut off"),
    ):
        values = [v for v, (ratio, is_wide) in misfits.items() if ratio > _MISFIT and is_wide is wide]
        if not values or e.faultless:
            continue
        gain = e.gain({v: fits[v] for v in values})
        worst = max(values, key=lambda v: misfits[v][0])
        if gain >= _GAIN:
            yield Cause(
                name,
                f"{len(values)} values have ranges far from that of least error, {worst} most ({misfits[worst][0]:.0f} times the "
                f"error): {what}; ranges of least error take {gain:.0%} of the noise away",
                misfits[worst][0], _MISFIT, "four times the least error is a bit lost", gain,
                e.again("--activation-range mse", "--weight-range mse"), values=tuple(values),
            )  # fmt: skip


def _weight_fits(m: QModel) -> dict[str, Grid]:
    found = {}
    for layer in layers(m.graph):
        weight = weight_of(layer)
        form = None if weight is None else m.plan.get(value_name(weight))
        if weight is not None and form is not None and value_name(weight) in m.grids and form.group is None:
            pairs = m.target is not None and m.target.narrow_products and not is_depthwise(layer)
            found[value_name(weight)] = MSE().weight(m.params[str(weight.target)], form, pairs)
    return found


def _weight_error(m: QModel, value: str, grid: Grid) -> float:
    w = m.params[str(by_value(m.graph)[value].target)]
    codes = quantize(w, grid)
    shape = [1] * w.ndim
    if grid.axis is not None:
        shape[grid.axis] = -1
    scale = grid.scale.reshape(shape) if grid.axis is not None else grid.scale
    return float((codes * scale - w).square().mean())


def uneven(e: Evidence) -> Iterable[Cause]:
    """One scale for channels, or for values, that differ by orders of magnitude."""
    if e.fine:
        return
    yield from _uneven_weights(e)
    broad = {v: _dominance(s.high, s.low) for v, s in e.seen.items()}
    misfits = {v: _misfit(s) for v, s in e.seen.items()}
    fitting = [v for v, ratio in misfits.items() if ratio <= _MISFIT]
    spread = [
        v for v, s in e.seen.items() if s.peak >= _PEAK or (v not in fitting and s.grid.scale > s.best_grid.scale)
    ]
    cut = {v: _regrid(e.m, v, e.seen[v].best_grid) for v in spread if v not in fitting}
    # where what lies beyond the range of least error is not needed, the range is to blame
    peaks = [v for v in spread if v in fitting] if cut and e.gain(cut) >= _GAIN else spread
    # a channel dominates by what it usually is; one that is wide by rare values alone is a matter of those
    bulk = {v: _dominance(e.seen[v].usual, -e.seen[v].usual) for v in fitting}
    values = [v for v in fitting if broad[v] >= _DOMINATES and bulk[v] ** 2 >= broad[v]]
    by_channel = e.gain({v: _per_channel(e.m, v, e.seen[v]) for v in values}) if values else 0.0
    by_width = e.gain({v: _widened(e.seen[v], e.m, v) for v in peaks}) if peaks else 0.0
    if by_channel >= _GAIN:
        worst = max(values, key=lambda v: (e.alone.get(v, 0.0), broad[v]))
        s = e.seen[worst]
        dead = int(((s.high - s.low) <= 0).sum())
        yield Cause(
            "dead or dominating channels",
            f"in {worst} the widest channel is {broad[worst]:.0f} times the median one"
            + (f", and {dead} of {len(s.high)} are dead" if dead else "")
            + f"; a scale for each channel would take {by_channel:.0%} of the noise away",
            broad[worst], _DOMINATES, "the median channel is left with three bits fewer", by_channel,
            e.again("--recipe low-bit"), values=tuple(values),
        )  # fmt: skip
    if by_width >= _GAIN and by_channel < 0.5 * by_width:
        worst = max(peaks, key=lambda v: (e.alone.get(v, 0.0), e.seen[v].peak))
        peak, ratio = e.seen[worst].peak, misfits[worst]
        measured, least, text = peak, _PEAK, f"the largest value of {worst} is {peak:.0f} times the 99.9 % quantile"
        if peak < _PEAK:
            measured, least = ratio, _MISFIT
            text = f"the few largest values of {worst}, which are needed, cost all others {ratio:.0f} times the least error"
        yield Cause(
            "outlier activations",
            f"{text}; {_KNEE} bits for such values would take {by_width:.0%} of the noise away",
            measured, least, "a few values cost all others two bits and more", by_width,
            e.again(*(f"--keep-float '{n}'" for n in _readers(e.m, worst)[:1])), values=tuple(peaks),
        )  # fmt: skip


def _readers(m: QModel, value: str) -> list[str]:
    """Layers that read a value, perhaps through moves; the value itself if there are none."""
    nodes, group = by_value(m.graph), [value, *(v for v, root in m.ties.items() if root == value)]
    found = [value_name(u) for v in group if v in nodes for u in nodes[v].users if u in set(layers(m.graph))]
    return found or [value]


def _uneven_weights(e: Evidence) -> Iterable[Cause]:
    grids, broad = {}, {}
    for layer in layers(e.m.graph):
        weight = weight_of(layer)
        form = None if weight is None else e.m.plan.get(value_name(weight))
        if weight is None or form is None or form.axis is not None or value_name(weight) not in e.m.grids:
            continue
        w = e.m.parameters[str(weight.target)]
        reach = w.flatten(1).abs().amax(1)
        ratio = _dominance(reach, -reach)
        if ratio >= _DOMINATES:
            broad[value_name(weight)] = ratio
            grids[value_name(weight)] = MSE().weight(w, replace(form, axis=0), pairs=False)
    gain = e.gain(grids) if grids else 0.0
    if gain >= _GAIN:
        worst = max(broad, key=lambda v: (e.alone.get(v, 0.0), broad[v]))
        yield Cause(
            "dead or dominating channels",
            f"{len(broad)} weights have one scale for channels of very different size, in {worst} the largest is "
            f"{broad[worst]:.0f} times the median; a scale for each would take {gain:.0%} of the noise away",
            broad[worst], _DOMINATES, "the median channel is left with three bits fewer", gain,
            e.again("--target onnxruntime"), values=tuple(broad),
        )  # fmt: skip


def _dominance(high: Tensor, low: Tensor) -> float:
    """The reach of the widest channel over the median of those that are alive."""
    reach = torch.maximum(high.abs(), low.abs())
    alive = reach[reach > 1e-6 * reach.max()] if len(reach) else reach
    return float(reach.max() / alive.median()) if len(alive) > 1 else 1.0


def _per_channel(m: QModel, value: str, s: Seen) -> Grid:
    """No engine has such a grid: it shows how much of the noise comes from channels sharing a scale."""
    form = m.plan[value]
    assert form is not None  # it has a grid
    parts = [from_range(float(lo), float(hi), form) for lo, hi in zip(s.low, s.high, strict=True)]
    scale, zero = torch.stack([p.scale for p in parts]), torch.stack([p.zero for p in parts])
    node = by_value(m.graph)[value]
    rank = len(node.meta["shape"])
    lo = torch.maximum(zero, s.grid.lo) if bool((s.grid.lo > form.lo).any()) else torch.full_like(zero, form.lo)
    axis = 1 if rank > 3 else rank - 1
    return Grid(scale, zero, lo, torch.full_like(zero, form.hi), axis=axis)


def _widened(s: Seen, m: QModel, value: str) -> Grid:
    form = m.plan[value]
    assert form is not None  # it has a grid
    wide = from_range(s.histogram.minimum, s.histogram.maximum, replace(form, bits=_KNEE))
    return replace(wide, lo=torch.maximum(wide.zero, wide.lo)) if bool((s.grid.lo > form.lo).any()) else wide


def biased(e: Evidence) -> Iterable[Cause]:
    """Rounding errors that are the same for every sample: few weights for each channel, or codes that were cut off."""
    nodes = by_value(e.m.graph)
    shifts = {name: _along(nodes[name], error.mean) for name, error in e.errors.items() if error.biased > _BIASED}
    if not shifts or e.faultless:
        return
    gain = e.gain(shifts=shifts)
    if gain < _GAIN:
        return
    worst = list(shifts)
    worst.sort(key=lambda n: -e.errors[n].noise * e.errors[n].biased)
    deep = sum(e.errors[n].depthwise for n in worst)
    yield Cause(
        "biased error of depthwise layers" if e.errors[worst[0]].depthwise else "biased error of layers",
        f"in {len(worst)} layers ({deep} depthwise), {worst[0]} most, {e.errors[worst[0]].biased:.0%} of the rounded weights' error is "
        f"the same for every sample; taken into the biases, {gain:.0%} of the noise goes away",
        e.errors[worst[0]].biased, _BIASED, "where biases were corrected hardly any of the error's power is its mean", gain,
        e.again("--recipe dfq"), values=tuple(worst),
    )  # fmt: skip


def _along(layer: fx.Node, channels: Tensor) -> Tensor:
    """One number for each channel, shaped to fit the layer's output."""
    shape = [1] * len(layer.meta["shape"])
    shape[input_axis(layer)] = -1
    return channels.reshape(shape)


def accumulators(e: Evidence) -> Iterable[Cause]:
    """Sums, or biases, that the engine's integers cannot hold."""
    over: dict[str, float] = {}
    pairs: list[str] = []
    narrow = engine.saturates() and e.m.target is not None and e.m.target.engine == "onnxruntime"
    for layer in layers(e.m.graph):
        weight, x = weight_of(layer), layer.args[0]
        grid = None if weight is None else e.m.grid(value_name(weight))
        x_grid = _fitting(e, value_name(x)) if isinstance(x, fx.Node) and "value" in x.meta else None
        if weight is None or grid is None or x_grid is None or grid.group is not None:
            continue
        reach = accumulated(e.m, layer, weight, grid, x_grid)
        if reach > _INT32:
            over[value_name(layer)] = reach
        if narrow and e.m.plan[value_name(weight)].bits == 8 and not is_depthwise(layer):  # type: ignore[union-attr]
            codes = quantize(e.m.parameters[str(weight.target)], grid).movedim(grid.axis or 0, 0).flatten(1)
            two = max(float(t.clamp(min=0).topk(min(2, t.shape[1]), 1).values.sum(1).max()) for t in (codes, -codes))
            if two > _PAIR and e.m.target is not None and not e.m.target.narrow_products:
                pairs.append(value_name(layer))
    if over:
        worst = max(over, key=lambda n: over[n])
        yield Cause(
            "saturated accumulators",
            f"{worst} can reach sums of {over[worst]:.2g}, products and bias together, and int32 ends at {_INT32:.3g}",
            over[worst], float(_INT32), "the end of int32", 2.0, e.again(f"--keep-float '{worst}'"), order=1,
            values=tuple(over),
        )  # fmt: skip
    elif pairs and e.parity is not None and not e.parity.proven:
        yield Cause(
            "saturated accumulators",
            f"this CPU adds pairs of 8-bit products in 16 bits, and {len(pairs)} layers have pairs of weights that overflow it",
            float(len(pairs)), 0.0, "255 times two neighbouring codes has to stay below 2^15", 2.0,
            e.again("--target onnxruntime-avx2"), order=1, values=tuple(pairs),
        )  # fmt: skip


def _fitting(e: Evidence, value: str) -> Grid | None:
    """The grid of a value, or that of least error where it is far from it: a sum that only a wrong range makes large is no cause."""
    root = e.m.ties.get(value, value)
    seen = (e.chosen_on if e.separate and e.chosen_on else e.seen).get(root)
    return seen.best_grid if seen is not None and _misfit(seen) > _MISFIT else e.m.grid(value)


def accumulated(m: QModel, layer: fx.Node, weight: fx.Node, grid: Grid, x_grid: Grid) -> float:
    """The largest sum that any input can cause in a layer: products, and the bias in their scale."""
    codes = quantize(m.parameters[str(weight.target)], grid)
    reach = max(float((x_grid.hi - x_grid.zero).max()), float((x_grid.zero - x_grid.lo).max()))
    worst = codes.abs().movedim(grid.axis or 0, 0).flatten(1).sum(1).double() * reach
    bias = bias_of(layer)
    if bias is not None:
        worst = worst + (m.parameters[str(bias.target)].double() / (grid.scale * x_grid.scale).double()).abs()
    return float(worst.max())


def file_differs(e: Evidence) -> Iterable[Cause]:
    """The exported file computes something else than the simulation."""
    if e.unusable or (e.parity is not None and not e.parity.proven):
        first = e.unusable or str(e.parity.first_difference if e.parity is not None else "")
        count = e.parity.integer_mismatches if e.parity is not None else 0
        value = "" if e.parity is None or e.parity.first_difference is None else e.parity.first_difference.value
        yield Cause(
            "a file that differs from the simulation", first, float(count), 0.0,
            "integers are equal or they are not", 1.0, f"{e.again()}   # writes and proves the file again", order=1,
            values=(value,) if value else (),
        )  # fmt: skip


def float_operations(e: Evidence) -> Iterable[Cause]:
    """Operations that stay in float between integers, with the share of the work in them."""
    nodes = by_value(e.m.graph)
    left = {
        x.value: x.message.removeprefix("computed in float: ")
        for x in e.m.log
        if x.stage == "place" and x.value in nodes and x.message.startswith("computed in float")
    }
    inside = [n for n in left if n is not None and _feeds_integers(e.m, nodes[n])]
    inside += [n for n in left if n is not None and n not in inside and macs(nodes[n])]
    if not inside:
        return
    asked = [n for n in inside if left[n].endswith("on request")]
    inside.sort(key=lambda n: (n not in asked, -macs(nodes[n]), -_elements(nodes[n])))
    share, moved = (sum(of(nodes[n]) for n in inside) / _total(e.m, of) for of in (macs, _elements))
    # what has no integer kernel and multiplies nothing is no fault: it is told, behind the finding that nothing is wrong
    score = max(share, moved) if asked or share >= _WORTH else -2.0
    yield Cause(
        "an operation left in float",
        f"{len(inside)} operations with {share:.0%} of the multiply-accumulates and {moved:.0%} of all computed numbers stay in float, "
        f"{inside[0]} first: {left[inside[0]]}",
        share, _WORTH, "integers end and begin again around each, which costs time and a rounding", score,
        f"halfbyte benchmark {shlex.quote(_output(e.command))}   # what they cost in time", order=3, values=tuple(inside),
    )  # fmt: skip


def _elements(node: fx.Node) -> int:
    """How many numbers an operation computes for one sample."""
    computed = node.op == "call_function" and "shape" in node.meta
    return math.prod(d for d in node.meta["shape"] if isinstance(d, int)) if computed else 0


def _total(m: QModel, of: Callable[[fx.Node], int]) -> int:
    return sum(of(n) for n in m.graph.nodes) or 1


def _output(command: str) -> str:
    words = shlex.split(command)
    at = next((i for i, w in enumerate(words) if w in ("-o", "--output")), None)
    return words[at + 1] if at is not None and at + 1 < len(words) else "out"


def _feeds_integers(m: QModel, node: fx.Node) -> bool:
    """Some value behind the operation is quantized."""
    seen, ahead = set(), list(node.users)
    while ahead:
        n = ahead.pop()
        if n in seen or n.op == "output":
            continue
        seen.add(n)
        if "value" in n.meta and m.grid(value_name(n)) is not None:
            return True
        ahead += list(n.users)
    return "value" in node.meta and m.grid(value_name(node)) is not None


def width(e: Evidence) -> Iterable[Cause]:
    """Nothing is wrong but the number of bits."""
    if e.fine:
        return
    mine = "weights" if e.weights.noise >= e.values.noise else "running values"
    worst = next(iter(e.alone), "")
    best = max(e.repairs, key=lambda r: r.gain, default=None)
    text = f"; of the repairs tried, {best.name} takes away most ({best.gain:.0%})" if best and best.gain else ""
    command = e.again("--recipe low-bit") if mine == "weights" else e.again("--bits W8A8")
    if best is not None and best.gain >= _GAIN and best.name.startswith("float"):
        command = e.again(f"--keep-float '{best.name.split()[-1]}'")
    yield Cause(
        "too few bits",
        f"rounding the {mine} causes most of the noise, spread over the network, {worst} most{text}",
        e.whole.noise, FINE, "from there on about a point of decisions flips", 0.25, command, values=(worst,),
    )  # fmt: skip


def nothing(e: Evidence) -> Iterable[Cause]:
    """The network holds."""
    if e.fine:
        lost = (
            "" if e.points is None else f", {e.points:.1f} points lost{'' if e.bench.labelled else ' by its own odds'}"
        )
        yield Cause(
            "nothing found", f"noise-to-signal at the outputs is {e.whole.noise:.3g}{lost} on {e.bench.samples} samples",
            e.whole.noise, FINE, "below it hardly a decision flips", -1.0,
            f"halfbyte evaluate {shlex.quote(_output(e.command))} --data LABELLED", order=3,
        )  # fmt: skip


RULES: tuple[Rule, ...] = (
    train_mode, float_sanity, preprocessing, accumulators, file_differs, unlike, ranges, uneven, biased, width,
    float_operations, nothing,
)  # fmt: skip
