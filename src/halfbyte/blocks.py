"""Blocks of layers refined together by gradients: what layer by layer cannot see, the activation functions and sums inside.

Block reconstruction (BRECQ, arXiv 2102.05426): the block should put out what it does in the float network, given what the
quantized network puts in. The start is the model as it is, weights already rounded by :class:`Descent`. At random, running values can
be left unrounded while a block is fitted (QDrop, arXiv 2203.05740).
"""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from halfbyte.calibrate import Progress, silent
from halfbyte.errors import UsageError, check_choice
from halfbyte.graph import effort, extent, input_axis, layers, output_values, per_sample
from halfbyte.losses import comparable, noise_of
from halfbyte.model import Inputs, LogEntry, QModel, value_name
from halfbyte.ops import Kind, is_tensor, kind
from halfbyte.reconstruct import Kept, split
from halfbyte.refinement import LEARNED, Clock, Env, Part, Rates, Refined, Rounding, descend, execute
from halfbyte.run import check_finite, check_given, fitting, fixed_batch, laid_out, last_uses
from halfbyte.store import load, save

_KEPT = "blocks"  # the folder of the model behind the last finished block
# A step sees about so many output positions, of so many samples at least and at most: few samples of large maps say as much of a
# layer's weights as many of small ones, and cost the same.
_POSITIONS, _FEWEST, _MOST = 4096, 2, 64


Weighting = Literal["plain", "gradient"]


@dataclass(frozen=True)
class Blocks:
    """How blocks are refined.

    iterations: steps of each block. batch: samples at a time; 0: as many as have some 4096 output positions, 2 to 64. layers:
    a block has at least so many, unless the network ends. rate: of the codes, in steps of the grid; scale_rate: of logarithms
    of scales, and of biases in standard deviations of the output they shift, as a share of the block's relative error: what is
    nearly right moves in small steps. drop: share of running values left unrounded at random. weighting: ``gradient`` counts
    each channel's error by the squared gradient of the network's outputs with respect to it.
    """

    iterations: int = 300
    batch: int = 0
    layers: int = 3
    rate: float = 0.02
    scale_rate: float = 0.02
    drop: float = 0.0
    weighting: Weighting = "plain"
    name: Literal["blocks"] = "blocks"

    def __post_init__(self) -> None:
        check_choice("weighting", self.weighting, Weighting)
        if self.iterations < 1 or self.batch < 0 or self.layers < 1 or not 0 <= self.drop < 1:
            raise UsageError(
                f"iterations and layers must be positive, batch not negative, and drop lie in 0..1: {self}"
            )


@torch.inference_mode(False)  # gradients, whatever the caller has turned off
def refine(
    m: QModel,
    data: Iterable[Inputs],
    options: Blocks | None = None,
    *,
    seed: int = 0,
    time_limit: float | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> QModel:
    """Refine block after block, in graph order. Use after ``reconstruct``.

    data: unlabelled batches, of which the last eighth of each is held out: a block stays as it was unless it does better there.
    time_limit: seconds for all blocks. kept: a folder that keeps the model behind every block; a run that finds one goes on
    there, and Ctrl-C ends behind the block at work. Raises :class:`UsageError` for a model without grids.
    """
    if not m.grids or m.target is None:
        raise UsageError("there is nothing to refine yet: call place, calibrate and reconstruct first")
    require_free_batch(m)
    given, m = m, comparable(m)
    for node in output_values(m.graph):
        if not _divisible(node):
            text = f"output '{value_name(node)}' of shape {list(node.meta['shape'])} is not one of separate samples, which blocks need"
            raise UsageError(f"{text}: choose --rounding descent (hb.Descent)")
    options = options or Blocks()
    store = Kept(kept, options, seed)
    m, done = _resumed(m, kept, store.identity)
    fit, held = split(data)
    for batch in (*fit, *held):
        check_given(m, batch)
        check_finite(m, batch)
    samples = tuple(torch.cat(parts) for parts in zip(*fit, *held, strict=True))
    count = sum(len(b[0]) for b in fit)
    found = blocks_of(m, options.layers)
    clock = Clock(time_limit, [sum(map(effort, b)) for b in found])
    weights = _importance(m, found, samples) if options.weighting == "gradient" else [None] * len(found)
    reference, quantized = _Stream(m, samples), _Stream(m, samples)
    with store.interruptible():
        for i, nodes in enumerate(found):
            store.go_on()
            target = reference.advanced(m, nodes, rounded=False)
            if i >= done:
                m = _refined(m, nodes, options, seed + i, weights[i], quantized.env, target, count, clock, progress)
                if kept is not None:
                    save(m, kept / _KEPT)
                    (kept / _KEPT / "identity.json").write_text(store.identity, encoding="utf-8")
            clock.done()
            quantized.advanced(m, nodes, rounded=True)
            progress("blocks", i + 1, len(found))
    return replace(m, graph=given.graph, outputs=given.outputs)


def require_free_batch(m: QModel) -> None:
    """Raise :class:`UsageError` for a network whose blocks cannot be refined."""
    fixed = fixed_batch(m)
    if fixed is not None:
        text = f"the network takes {fixed} samples at a time, and blocks are refined on any number of them"
        raise UsageError(f"{text}: free its batch size, or choose --rounding descent (hb.Descent)")


def _resumed(m: QModel, kept: Path | None, identity: str) -> tuple[QModel, int]:
    """The model behind the last block that was kept with the same options, and how many blocks that makes."""
    about = None if kept is None else kept / _KEPT / "identity.json"
    if about is None or not about.is_file() or about.read_text(encoding="utf-8") != identity:
        return m, 0
    found = load(about.parent)
    return found, sum(e.stage == "blocks" for e in found.log)


def blocks_of(m: QModel, least: int) -> list[list[fx.Node]]:
    """The graph cut where one value alone carries everything that layers have computed, with so many layers in each part."""
    nodes = [n for n in m.graph.nodes if n.op != "output"]
    every = set(layers(m.graph))
    position = {n: i for i, n in enumerate(m.graph.nodes)}
    end = {n: max((position[u] for u in n.users), default=-1) for n in nodes}
    computed: set[fx.Node] = set()  # depends on some layer
    for n in nodes:
        if n in every or any(a in computed for a in n.all_input_nodes):
            computed.add(n)
    found: list[list[fx.Node]] = [[]]
    held = 0
    live: set[fx.Node] = set()
    for i, n in enumerate(nodes):
        found[-1].append(n)
        held += n in every
        live = {v for v in (*live, n) if end[v] > i and v.op != "get_attr"}
        carried = [v for v in live if v in computed and kind(v) is not Kind.SHAPE]
        apart = held >= least and carried == [n] and is_tensor(n) and all(map(_divisible, live))
        if apart and any(v in every for v in nodes[i + 1 :]):
            found.append([])
            held = 0
    return found


def end_of(nodes: Sequence[fx.Node]) -> fx.Node:
    """The value that carries everything on from a block."""
    return next(n for n in reversed(nodes) if "value" in n.meta and is_tensor(n))


class _Stream:
    """All samples of one of the two networks at the cut between two blocks."""

    def __init__(self, m: QModel, samples: Inputs) -> None:
        self.count = len(samples[0])
        self.env: Env = {n: laid_out(x.to(m.device)) for n, x in zip(m.inputs, samples, strict=True)}
        self.freed = last_uses(m.graph)

    @torch.no_grad()
    def advanced(self, m: QModel, nodes: Sequence[fx.Node], *, rounded: bool) -> Env:
        """Run a block on everything and return what is alive behind it."""
        tap, portion = Rounding(m) if rounded else None, fitting(m, nodes)
        parts = [
            execute(
                m,
                nodes,
                sliced(self.env, torch.arange(i, min(i + portion, self.count)), self.count),
                tap,
                self.freed,
            )
            for i in range(0, self.count, portion)
        ]
        self.env = {n: _joined(n, [p[n] for p in parts]) for n in parts[0]}
        return self.env


def _joined(node: fx.Node, parts: list[Any]) -> Any:
    dim = _samples_dim(node)
    if isinstance(parts[0], Tensor):
        return parts[0] if dim is None else torch.cat(parts, dim)
    return sum(parts) if _times_batch(node) else parts[0]


def _samples_dim(node: fx.Node) -> int | None:
    """The dimension of a value that is that of the samples, if one is that and no other depends on their number."""
    free = [i for i, d in enumerate(node.meta.get("shape", ())) if not isinstance(d, int)]
    alone = len(free) == 1 and [extent(node.meta["shape"][free[0]], count) for count in (1, 2)] == [1, 2]
    return free[0] if alone else None


def _times_batch(node: fx.Node) -> int | None:
    """A size over the number of samples: 0 where it does not depend on them, None where it is something else than a multiple."""
    if str(node.target).startswith("aten.sym_size"):
        source, dim = node.args
        d = source.meta["shape"][dim]  # type: ignore[union-attr]
        return 0 if isinstance(d, int) else extent(d) if extent(d, 2) == 2 * extent(d) else None
    read = [_times_batch(n) if kind(n) is Kind.SHAPE else None for n in node.all_input_nodes]
    factor = [a for a in node.args if isinstance(a, int)]
    if node.target is operator.mul and len(read) == len(factor) == 1 and read[0] is not None:
        return read[0] * factor[0]
    return 0 if all(times == 0 for times in read) else None


def _divisible(node: fx.Node) -> bool:
    """Whether the value for some of the samples can be told from that for all."""
    if kind(node) is Kind.SHAPE:
        return _times_batch(node) is not None
    sizes = node.meta.get("shape")
    return sizes is not None and (_samples_dim(node) is not None or all(isinstance(d, int) for d in sizes))


def sliced(env: Env, at: Tensor, count: int) -> Env:
    """Some of the samples."""
    found: Env = {}
    for node, value in env.items():
        dim = _samples_dim(node)
        if isinstance(value, Tensor):
            whole = dim is None or value.shape[dim] != count
            found[node] = value if whole else value.index_select(dim, at.to(value.device))  # type: ignore[arg-type]
        else:
            found[node] = len(at) * times if (times := _times_batch(node)) else value
    return found


def _refined(
    m: QModel,
    nodes: Sequence[fx.Node],
    o: Blocks,
    seed: int,
    importance: Tensor | None,
    env: Env,
    target: Env,
    count: int,
    clock: Clock,
    progress: Progress,
) -> QModel:
    """The model with this block refined, or as it was where that does no better on the held-out samples.

    env: what the quantized network gives the block, target: what it should put out; the first ``count`` samples may be learned from.
    """
    name = value_name(end_of(nodes))
    part = Part(m, nodes, LEARNED, seed=seed, drop=o.drop)
    if not part.layers:
        return m.logged(LogEntry("blocks", name, "left as it is: nothing in it can be refined"))
    total = next(t.shape[d] for n, t in env.items() if isinstance(t, Tensor) and (d := _samples_dim(n)) is not None)
    batch = o.batch or portion(part.layers)

    def loss(at: Tensor) -> Tensor:
        return _error(part, sliced(env, at, total), sliced(target, at, total), importance)

    def rates(error: float) -> Rates:
        step = o.scale_rate * min(math.sqrt(max(error, 0.0)), 1.0)
        return Rates(o.rate, step, step)

    def tick(step: int, steps: int) -> bool:
        progress(f"blocks {name}", step, steps)
        return True

    part.free_biases(sliced(env, torch.arange(min(count, _MOST)), total))
    found = descend(part, loss, (count, total), rates, clock, steps=o.iterations, batch=batch, tick=tick)
    return part.written(found.state).logged(_entry(name, part, found, batch))


def portion(together: Sequence[fx.Node]) -> int:
    """How many samples a step of a block takes, by the output positions of its layers."""

    def positions(layer: fx.Node) -> int:
        axis = input_axis(layer) % len(layer.meta["shape"])
        return per_sample(layer.meta["shape"]) // extent(layer.meta["shape"][axis])

    return max(_FEWEST, min(_MOST, _POSITIONS // max(map(positions, together))))


def _entry(name: str, part: Part, found: Refined, batch: int) -> LogEntry:
    text = f"block of {len(part.layers)} layers, {found.steps} steps of {batch} samples"
    text += f": held-out error {found.before:.3g} before, {found.after:.3g} after"
    return LogEntry("blocks", name, text, {"method": "blocks", **found.figures})


def _error(part: Part, env: Env, target: Env, importance: Tensor | None) -> Tensor:
    """Squared error of what the block puts out over its power."""
    terms = [
        noise_of(y, target[node], importance)
        for node, y in part.run(env).items()
        if isinstance(y, Tensor) and y.is_floating_point() and node in part.nodes
    ]
    return torch.stack(terms).sum()


def _importance(m: QModel, found: Sequence[Sequence[fx.Node]], samples: Inputs) -> list[Tensor | None]:
    """For each block the mean squared gradient of the outputs' spread with respect to each channel it puts out."""
    ends = [end_of(nodes) for nodes in found]
    sums: list[Tensor | None] = [None] * len(found)
    freed = last_uses(m.graph)
    portion = fitting(m, m.graph.nodes)
    for begin in range(0, len(samples[0]), portion):
        env: Env = {n: laid_out(x[begin : begin + portion]) for n, x in zip(m.inputs, samples, strict=True)}
        held: list[Tensor] = []
        with torch.enable_grad():
            for nodes, end in zip(found, ends, strict=True):
                env = execute(m, nodes, env, None, freed)
                if not env[end].requires_grad:
                    env[end].requires_grad_()
                env[end].retain_grad()
                held.append(env[end])
            generator = torch.Generator().manual_seed(begin)
            y = held[-1]
            noise = torch.randn(y.shape, generator=generator).to(y.device)
            (y * noise).sum().backward()  # type: ignore[no-untyped-call]
        for i, t in enumerate(held):
            g = t.grad
            if g is not None and g.ndim > 1:
                new = g.square().movedim(1, 0).flatten(1).sum(1)
                old = sums[i]
                sums[i] = new if old is None else old + new
    return [None if s is None else s / s.mean().clamp(min=1e-30) for s in sums]
