"""Blocks of layers refined together by gradients: what layer by layer cannot see, the activation functions and sums inside.

Block reconstruction (BRECQ, arXiv 2102.05426): the block should put out what it does in the float network, given what the
quantized network puts in. The start is the model as it is, weights already rounded by :class:`Descent`; codes, scales and biases
then move along straight-through gradients, and so do the scales of running values of fewer than eight bits (LSQ, arXiv
1902.08153). At random, running values can be left unrounded while a block is fitted (QDrop, arXiv 2203.05740).
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid, expand, fake_quantize, quantize, round_even
from halfbyte.calibrate import Progress, regridded, silent
from halfbyte.errors import UsageError
from halfbyte.graph import bias_of, is_real, layers, macs, weight_of
from halfbyte.model import Inputs, LogEntry, QModel, value_name
from halfbyte.ops import Kind, is_tensor, kind
from halfbyte.reconstruct import Kept, split, why_not
from halfbyte.run import last_uses
from halfbyte.store import load, save

_CHECKS = 4  # so often the held-out samples are asked on the way
_KEPT = "blocks"  # the folder of the model behind the last finished block
_LEARNED_BITS = 8  # running values of fewer bits learn their scale
Env = dict[fx.Node, Any]


@dataclass(frozen=True)
class Blocks:
    """How blocks are refined.

    epochs: passes over the samples, for each block; iterations: steps of each block instead. batch: samples at a time. layers:
    a block has at least so many, unless the network ends. rate: of the codes, in steps of the grid; scale_rate: of logarithms
    of scales, and of biases in standard deviations of the output they shift, as a share of the block's relative error: what is
    nearly right moves in small steps. drop: share of running values left unrounded at random. weighting: ``gradient`` counts
    each channel's error by the squared gradient of the network's outputs with respect to it.
    """

    epochs: float = 20.0
    iterations: int = 0
    batch: int = 16
    layers: int = 3
    rate: float = 0.02
    scale_rate: float = 0.02
    drop: float = 0.0
    weighting: Literal["plain", "gradient"] = "plain"
    name: Literal["blocks"] = "blocks"

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch < 1 or self.layers < 1 or not 0 <= self.drop < 1:
            raise UsageError(f"epochs, batch and layers must be positive and drop lie in 0..1: {self}")


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
    options = options or Blocks()
    store = Kept(kept, options, seed)
    m, done = _resumed(m, kept, store.identity)
    fit, held = split(data)
    samples = tuple(torch.cat(parts) for parts in zip(*fit, *held, strict=True))
    count = sum(len(b[0]) for b in fit)
    found = blocks_of(m, options.layers)
    clock = _Clock(time_limit, [sum(macs(n) for n in b) for b in found])
    weights = _importance(m, found, samples, options) if options.weighting == "gradient" else [None] * len(found)
    reference, quantized = _Stream(m, samples, options.batch), _Stream(m, samples, options.batch)
    with store.interruptible():
        for i, nodes in enumerate(found):
            store.go_on()
            target = reference.advanced(m, nodes, rounded=False)
            if i >= done:
                block = _Block(m, nodes, options, seed + i, weights[i])
                m = block.fit(quantized.env, target, count, clock, progress)
                if kept is not None:
                    save(m, kept / _KEPT)
                    (kept / _KEPT / "identity.json").write_text(store.identity, encoding="utf-8")
            clock.done()
            quantized.advanced(m, nodes, rounded=True)
            progress("blocks", i + 1, len(found))
    return m


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
        carried = [v for v in live if v in computed]
        if held >= least and carried == [n] and is_tensor(n) and any(v in every for v in nodes[i + 1 :]):
            found.append([])
            held = 0
    return found


class _Stream:
    """All samples of one of the two networks at the cut between two blocks."""

    def __init__(self, m: QModel, samples: Inputs, batch: int) -> None:
        device = next((t.device for t in m.params.values()), torch.device("cpu"))
        self.count, self.batch = len(samples[0]), batch
        self.env: Env = {n: x.to(device) for n, x in zip(m.inputs, samples, strict=True)}
        self.freed = last_uses(m.graph)

    @torch.no_grad()
    def advanced(self, m: QModel, nodes: Sequence[fx.Node], *, rounded: bool) -> Env:
        """Run a block on everything and return what is alive behind it."""
        known: dict[str, Tensor] = {}
        tap = _Rounding(m, known) if rounded else None
        parts = [
            execute(
                m,
                nodes,
                sliced(self.env, torch.arange(i, min(i + self.batch, self.count)), self.count),
                tap,
                self.freed,
            )
            for i in range(0, self.count, self.batch)
        ]
        self.env = {n: _joined(n, [p[n] for p in parts]) for n in parts[0]}
        return self.env


def _joined(node: fx.Node, parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor) and _is_batched(node):
        return torch.cat(parts)
    return sum(parts) if kind(node) is Kind.SHAPE and _follows_batch(node) else parts[0]


def _is_batched(node: fx.Node) -> bool:
    shape = node.meta.get("shape", ())
    return bool(len(shape) > 0 and not isinstance(shape[0], int))


def _follows_batch(node: fx.Node) -> bool:
    """A size that is the size of the batch."""
    return bool(str(node.target).startswith("aten.sym_size") and node.args[1] == 0)


def sliced(env: Env, at: Tensor, count: int) -> Env:
    """Some of the samples."""
    found: Env = {}
    for node, value in env.items():
        if isinstance(value, Tensor) and _is_batched(node) and len(value) == count:
            found[node] = value[at.to(value.device)]
        else:
            found[node] = len(at) if _follows_batch(node) else value
    return found


class _Rounding:
    """Values and parameters as the plan rounds them; parameters once for all batches."""

    def __init__(self, m: QModel, known: dict[str, Tensor]) -> None:
        self.m, self.known = m, known

    def parameter(self, node: fx.Node) -> Tensor:
        """A parameter."""
        name = str(node.target)
        if name not in self.known:
            value, grid = self.m.parameters[name], self.m.grid(value_name(node))
            self.known[name] = value if grid is None else fake_quantize(value, grid)
        return self.known[name]

    def value(self, node: fx.Node, x: Tensor) -> Tensor:
        """A running value."""
        grid = self.m.grid(value_name(node))
        return x if grid is None else fake_quantize(x, grid)


def execute(m: QModel, nodes: Sequence[fx.Node], env: Env, tap: Any, freed: Mapping[fx.Node, list[fx.Node]]) -> Env:
    """Run some nodes on what ``env`` holds; returns what later nodes need. tap: rounds parameters and values; None: float."""
    env = dict(env)

    def load(n: fx.Node) -> Any:
        if n.op == "get_attr":
            return m.params[str(n.target)] if tap is None else tap.parameter(n)
        return env[n]

    for node in nodes:
        if node.op == "get_attr":
            continue
        if node.op != "placeholder":
            env[node] = node.target(*fx.map_arg(node.args, load), **fx.map_arg(node.kwargs, load))  # type: ignore[operator]
        if tap is not None and "value" in node.meta and isinstance(env[node], Tensor):
            env[node] = tap.value(node, env[node])
        for dead in freed.get(node, ()):
            env.pop(dead, None)
    return env


class _LearnedRounding(torch.autograd.Function):
    """Fake quantization on one scale with straight-through gradients for values and the scale (arXiv 1902.08153)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: int, lo: int, hi: int) -> Tensor:
        ratio = x / scale
        codes = ratio.round().clamp_(lo - zero, hi - zero)
        inside = (ratio >= lo - zero - 0.5) & (ratio <= hi - zero + 0.5)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(inside, codes - ratio * inside)
        else:
            ctx.save_for_backward(inside)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inside, *rest = ctx.saved_tensors
        step = (grads[0] * rest[0]).sum() if rest else None
        return grads[0] * inside, step, None, None, None


class _Block(_Rounding):
    """One block while it is fitted: codes, scales and biases as variables."""

    def __init__(
        self, m: QModel, nodes: Sequence[fx.Node], options: Blocks, seed: int, importance: Tensor | None
    ) -> None:
        super().__init__(m, {})
        self.nodes, self.options, self.importance = nodes, options, importance
        self.freed = last_uses(m.graph)
        self.generator = torch.Generator().manual_seed(seed)
        self.dropping = False
        self.layers = [n for n in nodes if n in set(layers(m.graph)) and not why_not(m, n)]
        self.weights: dict[str, tuple[Tensor, Tensor, Grid]] = {}  # by parameter: codes, log of the factor, grid
        self.biases: dict[str, tuple[Tensor, Tensor]] = {}  # by parameter: shift in units, unit
        self.scales: dict[str, Tensor] = {}  # by value: log of the factor
        for layer in self.layers:
            weight = weight_of(layer)
            assert weight is not None
            grid = m.grid(value_name(weight))
            assert grid is not None
            codes = quantize(m.parameters[str(weight.target)], grid)
            self.weights[str(weight.target)] = (codes, torch.zeros_like(grid.scale), grid)
        for node in nodes:
            if node.op == "call_function" and "value" in node.meta and m.grid(value_name(node)) is not None:
                root = m.ties.get(value_name(node), value_name(node))
                form = m.plan[value_name(node)]
                inside = any("value" in n.meta and value_name(n) == root for n in nodes)
                if form is not None and form.bits < _LEARNED_BITS and inside:
                    self.scales[root] = torch.zeros_like(m.grids[root].scale)

    def parameter(self, node: fx.Node) -> Tensor:
        """A parameter on its way."""
        name = str(node.target)
        if name in self.weights:
            codes, factor, grid = self.weights[name]
            return _real(codes, grid, factor.exp() * grid.scale)
        if name in self.biases:
            shift, unit = self.biases[name]
            return self.m.parameters[name] + shift * unit
        return super().parameter(node)

    def value(self, node: fx.Node, x: Tensor) -> Tensor:
        """A running value, rounded; some of it at random not."""
        name = value_name(node)
        grid = self.m.grid(name)
        if grid is None or not is_real(node):
            return x
        root = self.m.ties.get(name, name)
        if grid.axis is not None:
            return fake_quantize(x, grid)
        form = self.m.plan[name]
        assert form is not None
        scale = grid.scale * self.scales[root].exp() if root in self.scales else grid.scale
        y: Tensor = _LearnedRounding.apply(x, scale, int(grid.zero), form.lo, form.hi)  # type: ignore[no-untyped-call]
        if self.dropping and self.options.drop:
            keep = torch.rand(x.shape, generator=self.generator).to(x.device) < self.options.drop
            y = torch.where(keep, x, y)
        return y

    def _unit_of_biases(self, env: Env) -> None:
        """The standard deviation of what each layer puts out, [channels], is the unit in which its bias moves."""
        seen: dict[str, Tensor] = {}

        class Watch(_Rounding):
            def value(self, node: fx.Node, x: Tensor) -> Tensor:
                bias = bias_of(node) if node in wanted else None
                if bias is not None:
                    axis = -1 if x.ndim != 4 and node.target is torch.ops.aten.linear.default else 1
                    seen[str(bias.target)] = x.movedim(axis, 0).flatten(1).std(1)
                return super().value(node, x)

        wanted = set(self.layers)
        with torch.no_grad():
            execute(self.m, self.nodes, env, Watch(self.m, {}), self.freed)
        self.biases = {name: (torch.zeros_like(std), std) for name, std in seen.items()}

    def fit(self, env: Env, target: Env, count: int, clock: "_Clock", progress: Progress) -> QModel:
        """The model with this block refined, or as it was where that does no better on the held-out samples."""
        name = value_name([n for n in self.nodes if "value" in n.meta][-1])
        if not self.layers:
            return self.m.logged(LogEntry("blocks", name, "left as it is: nothing in it can be refined"))
        total = len(next(t for n, t in env.items() if isinstance(t, Tensor) and _is_batched(n)))
        held = torch.arange(count, total)
        first = torch.arange(min(count, 4 * self.options.batch))
        self._unit_of_biases(sliced(env, first, total))
        before = self._loss_on(env, target, held, total)
        best, least = self._state(), before
        variables = self._variables(math.sqrt(max(before, 0.0)))
        planned = self.options.iterations or max(1, math.ceil(self.options.epochs * count / self.options.batch))
        steps = planned
        optimizer = torch.optim.Adam(variables, betas=(0.9, 0.99))
        rates = [g["lr"] for g in optimizer.param_groups]
        start = time.monotonic()
        step = 0
        while step < steps:
            if step == 3:
                steps = clock.allowed(planned, (time.monotonic() - start) / 3)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            at = torch.randint(0, count, (min(self.options.batch, count),), generator=self.generator)
            optimizer.zero_grad()
            with torch.enable_grad():
                self.dropping = True
                loss = self._loss(sliced(env, at, total), sliced(target, at, total))
                self.dropping = False
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            progress(f"blocks {name}", step, steps)
            if step % max(1, steps // _CHECKS) == 0 or step == steps:
                now = self._loss_on(env, target, held, total)
                if now < least:
                    best, least = self._state(), now
        figures = {"method": "blocks", "before": before, "after": least, "kept": least < before, "steps": steps}
        text = (
            f"block of {len(self.layers)} layers, {steps} steps: held-out error {before:.3g} before, {least:.3g} after"
        )
        return self._written(best).logged(LogEntry("blocks", name, text, figures))

    def _variables(self, error: float) -> list[dict[str, Any]]:
        o, step = self.options, self.options.scale_rate * min(error, 1.0)
        learned = [c for name, (c, _, _) in self.weights.items() if self._bits(name) < 8]
        factors = [f for _, f, _ in self.weights.values()] + list(self.scales.values())
        shifts = [s for s, _ in self.biases.values()]
        for t in (*learned, *factors, *shifts):
            t.requires_grad_()
        groups = [(learned, o.rate), (factors, step), (shifts, step)]
        return [{"params": g, "lr": rate} for g, rate in groups if g]

    def _bits(self, name: str) -> int:
        form = self.m.plan[next(value_name(n) for n in self.m.graph.nodes if n.op == "get_attr" and n.target == name)]
        return 8 if form is None else form.bits

    def _state(self) -> dict[str, Tensor]:
        state = {f"codes {k}": c.detach().clone() for k, (c, _, _) in self.weights.items()}
        state |= {f"factor {k}": f.detach().clone() for k, (_, f, _) in self.weights.items()}
        state |= {f"bias {k}": s.detach().clone() for k, (s, _) in self.biases.items()}
        return state | {f"scale {k}": f.detach().clone() for k, f in self.scales.items()}

    def _loss(self, env: Env, target: Env) -> Tensor:
        found = execute(self.m, self.nodes, env, self, self.freed)
        terms = []
        for node, y in found.items():
            if isinstance(y, Tensor) and y.is_floating_point() and node in self.nodes:
                error = (y - target[node]).square()
                if self.importance is not None and y.ndim > 1:
                    error = error * self.importance.reshape(1, -1, *[1] * (y.ndim - 2))
                terms.append(error.mean() / target[node].square().mean().clamp(min=1e-12))
        return torch.stack(terms).sum()

    @torch.no_grad()
    def _loss_on(self, env: Env, target: Env, at: Tensor, total: int) -> float:
        losses = [
            float(self._loss(sliced(env, part, total), sliced(target, part, total))) * len(part)
            for part in torch.split(at, self.options.batch)
        ]
        return sum(losses) / max(1, len(at))

    def _written(self, state: Mapping[str, Tensor]) -> QModel:
        """The model with the best state found."""
        tuned, grids = dict(self.m.tuned), dict(self.m.grids)
        for name, (_, _, grid) in self.weights.items():
            node = next(n for n in self.m.graph.nodes if n.op == "get_attr" and n.target == name)
            codes = state[f"codes {name}"]
            new = replace(grid, scale=(grid.scale * state[f"factor {name}"].exp()).detach())
            tuned[name], grids[value_name(node)] = fake_quantize(_real(codes, new, new.scale), new), new
        for name, (_, unit) in self.biases.items():
            tuned[name] = self.m.parameters[name] + state[f"bias {name}"] * unit
        m = replace(self.m, tuned=tuned, grids=grids)
        scales = {k: m.grids[k].scale * state[f"scale {k}"].exp() for k in self.scales}
        return regridded(m, {k: replace(m.grids[k], scale=s) for k, s in scales.items()})


def _real(codes: Tensor, grid: Grid, scale: Tensor) -> Tensor:
    """What codes on their way stand for, with gradients to them and to the scale."""
    lo, hi, zero, step = (expand(t, grid, codes) for t in (grid.lo, grid.hi, grid.zero, scale))
    return (torch.clamp(round_even(codes), lo, hi) - zero) * step


def _importance(m: QModel, found: Sequence[Sequence[fx.Node]], samples: Inputs, options: Blocks) -> list[Tensor | None]:
    """For each block the mean squared gradient of the outputs' spread with respect to each channel it puts out."""
    ends = [next(n for n in reversed(nodes) if "value" in n.meta and is_tensor(n)) for nodes in found]
    sums: list[Tensor | None] = [None] * len(found)
    freed = last_uses(m.graph)
    for begin in range(0, len(samples[0]), options.batch):
        env: Env = {n: x[begin : begin + options.batch] for n, x in zip(m.inputs, samples, strict=True)}
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


class _Clock:
    """How many steps each block may take so that all end in time."""

    def __init__(self, limit: float | None, work: Sequence[int]) -> None:
        self.limit, self.work, self.at = limit, list(work), 0
        self.start = time.monotonic()

    def allowed(self, planned: int, seconds: float) -> int:
        """Steps of this block, by the time that one takes and the work that is left."""
        if self.limit is None:
            return planned
        left = self.limit - (time.monotonic() - self.start)
        share = self.work[self.at] / max(1, sum(self.work[self.at :]))
        return max(4, min(planned, int(left * share / max(seconds, 1e-9))))

    def done(self) -> None:
        """The next block is at work."""
        self.at += 1
