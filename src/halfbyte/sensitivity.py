"""How much each unit costs in accuracy at each width: measured one unit at a time, all weights but its own at their widest.

Source: arXiv 2006.10518, section 4 (losses of single layers with their calibrated parameters swapped in, assumed to add up); the
divergence to the float network's decisions stands in for a loss with labels. No running values are rounded but the unit's own:
the slightest change in front moves them all to other codes, and that noise would drown what the last bits of a weight do.
The proxies are in ``proxies``.
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from halfbyte.affine import fake_quantize
from halfbyte.calibrate import Progress, silent
from halfbyte.errors import DataError, UsageError, check_choice
from halfbyte.graph import output_values
from halfbyte.losses import comparable
from halfbyte.model import Inputs, Outputs, QModel, Tap, value_name
from halfbyte.proxies import proxies
from halfbyte.reconstruct import HELD_OUT, unseen_first
from halfbyte.run import (
    check_finite,
    check_given,
    fitting,
    fixed_batch,
    keep,
    laid_out,
    last_uses,
    run,
    simulate,
    steps,
    whole,
)
from halfbyte.units import Candidates, Choice, Units, merged, units

Metric = Literal["divergence", "outputs", "loss", "noise", "second-order"]
LEAST = 1e-6  # a narrower width is never taken to be better than the widest
_MOST = 16  # samples run at a time
_FEW_FLIPS = 20


@dataclass(frozen=True)
class SensitivityTable:
    """losses: unit -> width -> loss increase over the widest width, which has 0; at least 1e-6 for all others.

    metric: ``divergence`` (nats for each sample, or noise-to-signal where the outputs are no class scores), ``outputs``
    (noise-to-signal), ``loss`` (cross entropy, nats) or a proxy of no unit. base: the loss of the network with every unit at its
    widest. points: so many points of disagreement (samples of a hundred that the float network decides otherwise) come with the
    square root of the divergence, by all that was measured (by Pinsker's inequality, where too few decisions flipped to
    tell); None where outputs are no class scores.
    """

    losses: Mapping[str, Mapping[int, float]]
    metric: Metric
    samples: int
    base: float = 0.0
    points: float | None = None

    def predicted(self, choice: Choice) -> float:
        """The loss increase of a choice, if losses of single units add up; units not named have their widest width."""
        return sum(widths[choice[u]] for u, widths in self.losses.items() if u in choice)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "losses": {u: {str(w): x for w, x in t.items()} for u, t in self.losses.items()}}


def sensitivity(
    candidates: Candidates,
    data: Iterable[Any],
    *,
    metric: Metric = "divergence",
    samples: int = 64,
    progress: Progress = silent,
) -> SensitivityTable:
    """The loss increase of every unit at every width of the candidates, each alone.

    data: batches of inputs, as for ``calibrate``; for ``loss`` pairs (inputs, class indices). metric: ``divergence``: Kullback and
    Leibler's, of the float network's softmax from the quantized one's, for a single output [N, classes]; as ``outputs`` for
    others. ``outputs``: squared error over variance, of use where the network is so sure of the samples that few of them tell
    anything, as on those it was trained on. ``noise`` and ``second-order`` are cheaper proxies (see :func:`proxies`), in units
    of their own.
    samples: how many are taken, in front those that ``reconstruct`` holds out of the same batches, for a layer with more inputs
    than there are samples looks better than it is on those that it was fitted to. Behind each unit, only the rest of the network
    runs again, so a unit costs half a pass on average. Raises :class:`UsageError` for candidates of different graphs,
    :class:`DataError` without data.
    """
    check_choice("metric", metric, Metric)
    candidates = {widths: comparable(m) for widths, m in candidates.items()}
    u = units(candidates)
    portions = _portions(candidates[max(candidates)], data, samples, labelled=metric == "loss")
    if metric in ("noise", "second-order"):
        losses = proxies(candidates, u, [x for x, _ in portions], weighted=metric == "second-order")
        return SensitivityTable({k: _clamped(v) for k, v in losses.items()}, metric, _count(portions))
    judge = _judge(candidates[max(candidates)], metric)
    found = _measured(candidates, u, portions, judge, progress)
    mean = {key: _mean(sums) for key, sums in found.items()}
    losses = {unit: {w: mean[unit, w] - mean[unit, u.widths[unit][-1]] for w in u.widths[unit]} for unit in u.open}
    whole = _whole(merged(candidates, u, {}), portions, judge)
    points = _points([whole, *found.values()]) if judge is _divergence else None
    return SensitivityTable({k: _clamped(v) for k, v in losses.items()}, metric, _count(portions), _mean(whole), points)


@torch.no_grad()
def output_loss(m: QModel, data: Iterable[Any], *, metric: Metric = "divergence", samples: int = 64) -> float:
    """The loss of a whole model as simulated, in the units of :func:`sensitivity`: what its predictions are to be held against."""
    check_choice("metric", metric, Metric)
    m = comparable(m)
    return _mean(_whole(m, _portions(m, data, samples, labelled=metric == "loss"), _judge(m, metric)))


def _whole(m: QModel, portions: list[tuple[Inputs, Tensor | None]], judge: "Judge") -> Tensor:
    """Sums of the judge for a model with everything rounded."""
    tap, reference = simulate(m), m.as_float()
    return torch.stack([judge(run(reference, x), run(m, x, tap), y) for x, y in portions]).sum(0)


def _clamped(losses: Mapping[int, float]) -> dict[int, float]:
    widest = max(losses)
    return {w: 0.0 if w == widest else max(LEAST, x) for w, x in sorted(losses.items())}


def _count(portions: list[tuple[Inputs, Tensor | None]]) -> int:
    return sum(len(x[0]) for x, _ in portions)


def _portions(m: QModel, data: Iterable[Any], samples: int, *, labelled: bool) -> list[tuple[Inputs, Tensor | None]]:
    """Some samples at a time, those first that no layer was fitted to, with their labels if there are."""
    batches: list[Any] = []
    read = 0
    for batch in data:  # no more than have so many held out
        batches.append(batch)
        read += len(batch[0][0] if labelled and isinstance(batch[0], tuple | list) else batch[0])
        if read >= HELD_OUT * samples:
            break
    if labelled and not all(len(batch) == 2 and isinstance(batch[0], tuple | list) for batch in batches):
        raise DataError("metric 'loss' needs labelled data: batches of (inputs, class indices)")
    if not batches:
        raise DataError("there are no data to measure on")
    every = unseen_first([(*batch[0], batch[1]) for batch in batches] if labelled else batches)
    count = fixed_batch(m) or min(_MOST, fitting(m, m.graph.nodes))
    joined = tuple(torch.cat(parts) for parts in zip(*every, strict=True))
    taken = tuple(t[: whole(m, min(samples, len(joined[0])))] for t in joined)
    inputs = taken[:-1] if labelled else taken
    check_given(m, inputs)
    check_finite(m, inputs)
    parts = zip(*(torch.split(t, count) for t in taken), strict=True)
    return [(part[:-1], part[-1]) if labelled else (part, None) for part in parts]


# Reference outputs, outputs, labels -> [loss summed over samples, number of samples, decisions that differ], on the CPU.
Judge = Callable[[Outputs, Outputs, Tensor | None], Tensor]
Freed = Mapping[fx.Node, Sequence[fx.Node]]


def _judge(m: QModel, metric: Metric) -> Judge:
    outputs = output_values(m.graph)
    classes = len(outputs) == 1 and len(outputs[0].meta["shape"]) == 2 and outputs[0].meta["shape"][1] > 1
    if metric == "loss":
        if not classes:
            raise UsageError("metric 'loss' needs a single output of class scores [N, classes]: take 'divergence'")
        return _cross_entropy
    return _divergence if classes and metric == "divergence" else _noise


def _divergence(reference: Outputs, outputs: Outputs, _: Tensor | None) -> Tensor:
    p, q = (F.log_softmax(t[0].double(), 1) for t in (reference, outputs))
    flips = (reference[0].argmax(1) != outputs[0].argmax(1)).sum()
    return torch.tensor([float((p.exp() * (p - q)).sum()), len(p), int(flips)], dtype=torch.float64)


def _cross_entropy(_: Outputs, outputs: Outputs, labels: Tensor | None) -> Tensor:
    assert labels is not None
    loss = F.cross_entropy(outputs[0].double(), labels.to(outputs[0].device), reduction="sum")
    return torch.tensor([float(loss), len(labels), 0], dtype=torch.float64)


def _noise(reference: Outputs, outputs: Outputs, _: Tensor | None) -> Tensor:
    """Each output of real numbers weighs as much as the others: of noise and signal, mean over outputs."""
    ratio = torch.stack(
        [
            (a - b).double().square().sum() / (a - a.mean()).double().square().sum().clamp(min=1e-30)
            for a, b in zip(reference, outputs, strict=True)
            if a.is_floating_point()
        ]
    ).mean()
    count = len(reference[0])
    return torch.tensor([float(ratio) * count, count, 0], dtype=torch.float64)


def _mean(sums: Tensor) -> float:
    return float(sums[0] / sums[1])


def _points(found: list[Tensor]) -> float:
    """Least squares through the origin of disagreement, in points, over the root of the divergence.

    Where hardly any decision flipped, Pinsker's inequality: so much of the softmax can move at most.
    """
    if sum(float(t[2]) for t in found) < _FEW_FLIPS:
        return 100 / math.sqrt(2)
    roots = [math.sqrt(max(0.0, _mean(t))) for t in found]
    shares = [100 * float(t[2] / t[1]) for t in found]
    return sum(r * s for r, s in zip(roots, shares, strict=True)) / sum(r * r for r in roots)


@dataclass(frozen=True)
class _Variant:
    """The model with one unit changed: where in the graph it begins to differ, the parameters that do, and what it rounds."""

    model: QModel
    start: int
    constants: Mapping[fx.Node, Tensor]
    tap: Tap


def _constants(m: QModel, nodes: Iterable[fx.Node]) -> dict[fx.Node, Tensor]:
    """Parameters as the simulation reads them."""
    values, found = m.parameters, {}
    for node in nodes:
        x, grid = values[str(node.target)], m.grid(value_name(node)) if "value" in node.meta else None
        found[node] = x if grid is None else fake_quantize(x, grid)
    return found


def _variant(base: QModel, m: QModel, rounded: Container[str]) -> _Variant:
    """rounded: running values, by name; ``base`` rounds none."""
    order = {n: i for i, n in enumerate(m.graph.nodes)}
    before, after = base.parameters, m.parameters
    start, changed = len(order), []
    for node, i in order.items():
        name = value_name(node) if "value" in node.meta else ""
        if node.op == "get_attr":
            other = name and base.grid(name) is not m.grid(name)
            if other or before[str(node.target)] is not after[str(node.target)]:
                changed.append(node)
                start = min([start, *(order[user] for user in node.users)])
        elif name in rounded:
            start = min(start, i)
    return _Variant(m, start, _constants(m, changed), simulate(m, only=lambda name: name in rounded))


@torch.no_grad()
def _measured(
    candidates: Candidates,
    u: Units,
    portions: list[tuple[Inputs, Tensor | None]],
    judge: Judge,
    progress: Progress,
) -> dict[tuple[str, int], Tensor]:
    """Sums of the judge for each unit and width, with no running values rounded but the unit's own."""
    base = merged(candidates, u, {})
    variants = {
        (k, w): _variant(base, merged(candidates, u, {k: w}), u.groups.get(k, ())) for k in u.open for w in u.widths[k]
    }
    due: dict[int, list[tuple[str, int]]] = {}
    for key, v in variants.items():
        due.setdefault(v.start, []).append(key)
    nodes = list(base.graph.nodes)
    constants = _constants(base, [n for n in nodes if n.op == "get_attr"])
    freed, reference = last_uses(base.graph), base.as_float()
    found = {key: torch.zeros(3, dtype=torch.float64) for key in variants}
    done, total = 0, sum(v.start < len(nodes) for v in variants.values())
    for x, labels in portions:
        wanted = run(reference, x)
        env: dict[fx.Node, Any] = {}
        given = {**constants, **{n: laid_out(t.to(wanted[0].device)) for n, t in zip(base.inputs, x, strict=False)}}
        ahead = steps(nodes, env, given.__getitem__, keep, freed=freed)
        for i in range(len(nodes)):
            for key in due.get(i, ()):
                v = variants[key]
                held = {n: v.constants.get(n, value) for n, value in env.items()}
                found[key] += judge(wanted, _rest(v, nodes[i:], held, {**given, **v.constants}, freed), labels)
                done += 1
                progress("sensitivity", done, len(portions) * total)
            next(ahead)
        unchanged = judge(wanted, tuple(env[n] for n in output_values(base.graph)), labels)
        for key in due.get(len(nodes), ()):
            found[key] += unchanged
    return found


def _rest(
    v: _Variant, nodes: list[fx.Node], env: dict[fx.Node, Any], given: Mapping[fx.Node, Tensor], freed: Freed
) -> Outputs:
    """The outputs, from the values at a frontier on."""
    for _ in steps(nodes, env, given.__getitem__, v.tap, freed=freed):
        pass
    return tuple(env[n] for n in output_values(v.model.graph))
