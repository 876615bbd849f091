"""A part of a network refined by gradients: codes, scales and biases as variables, and descent on any loss of them.

The start is the model as it is, weights already rounded. Codes, scales and biases then move along straight-through gradients, and so
do the scales of running values of fewer than eight bits (LSQ, arXiv 1902.08153).
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid, expand, fake_quantize, quantize, round_even
from halfbyte.calibrate import bias_floor, bias_step, regridded, whole_biases
from halfbyte.effects import lacks_derivative
from halfbyte.errors import UsageError
from halfbyte.formats import Format
from halfbyte.graph import bias_of, input_axis, is_real, layers, twin_of, weight_of
from halfbyte.model import QModel, value_name
from halfbyte.reconstruct import why_not
from halfbyte.run import evaluate_plainly, fitting, fixed_batch, last_uses

Learned = Literal["biases", "scales", "codes"]
LEARNED: tuple[Learned, ...] = ("biases", "scales", "codes")
Env = dict[fx.Node, Any]
Loss = Callable[[Tensor], Tensor]  # indices of samples -> their mean loss
_CHECKS = 4  # so often the held-out samples are asked on the way
_TIMED = 3  # steps that tell how long one takes
_WIDE = 8  # running values of fewer bits learn their scale, weights of fewer bits their codes


class Rounding:
    """Values and parameters as the plan rounds them; parameters once for all batches."""

    def __init__(self, m: QModel) -> None:
        self.m = m
        self.known: dict[str, Tensor] = {}

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


def execute(
    m: QModel, nodes: Sequence[fx.Node], env: Env, tap: Rounding | None, freed: Mapping[fx.Node, list[fx.Node]]
) -> Env:
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
            env[node] = evaluate_plainly(node, fx.map_arg(node.args, load), fx.map_arg(node.kwargs, load))
        if tap is not None and "value" in node.meta and isinstance(env[node], Tensor):
            env[node] = tap.value(node, env[node])
        for dead in freed.get(node, ()):
            env.pop(dead, None)
    return env


class _LearnedRounding(torch.autograd.Function):
    """Fake quantization on one scale with straight-through gradients for values and the scale (arXiv 1902.08153)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: int, lo: int, hi: int) -> Tensor:
        y = (x / scale).round_().clamp_(lo - zero, hi - zero).mul_(scale)
        ctx.scale = float(scale)
        ctx.ends = ((lo - zero - 0.5) * ctx.scale, (hi - zero + 0.5) * ctx.scale)
        ctx.save_for_backward(x.clone() if x.is_inference() else x, y)  # those of inference mode may not be saved
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.ends)
        step = None
        if ctx.needs_input_grad[1]:  # the codes, less x / scale where it lies inside
            step = (_dot(grads[0], y) - _dot(inside, x)) / ctx.scale
        return inside, step, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products, without a tensor of them; images lie with their channels last."""
    flat = [(t.movedim(1, -1) if t.ndim > 2 else t).reshape(-1) for t in (a, b)]
    return torch.dot(*flat)


@dataclass(frozen=True)
class _Weight:
    """A weight as variables: its codes, and the logarithm of a factor on its scale."""

    layer: fx.Node
    form: Format
    grid: Grid
    codes: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Rates:
    """Steps of Adam: of codes in steps of the grid, of scales in logarithms, of biases in their units."""

    codes: float
    scales: float
    biases: float


def _gradients(loss: Tensor) -> None:
    """Into the variables. Raises :class:`UsageError` where torch has no derivative of some operation."""
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if not lacks_derivative(error):
            raise
        raise UsageError(
            f"torch has no gradients here ({str(error).splitlines()[0]}): choose what needs none, as --rounding descent or the "
            "recipes low-bit and calibtip-light do"
        ) from error


class Part(Rounding):
    """Some nodes of a network while they are fitted.

    learn: what moves; codes of eight bits and more, powers of two and shared parameters never do. drop: share of running values
    left unrounded at random while ``training``.
    """

    def __init__(
        self, m: QModel, nodes: Sequence[fx.Node], learn: Sequence[Learned], *, seed: int, drop: float = 0.0
    ) -> None:
        super().__init__(m)
        self.nodes, self.drop, self.training = nodes, drop, False
        self.freed = last_uses(m.graph)
        self.portion = fitting(m, nodes)  # samples whose gradients are computed at a time
        self.generator = torch.Generator().manual_seed(seed)
        every, self.learn = set(layers(m.graph)), frozenset(learn)
        self.layers = [n for n in nodes if n in every and not why_not(m, n)]
        self.weights = self._weights() if self.learn & {"scales", "codes"} else {}
        self.scales = self._scales() if "scales" in self.learn else {}  # by value: log of the factor
        self.biases: dict[str, tuple[Tensor, Tensor]] = {}  # by parameter: shift in units, unit
        self.with_bias = {str(b.target): n for n in self.layers if (b := bias_of(n)) is not None}
        self.leaves: dict[str, tuple[Tensor, Tensor]] = {}  # in training: a weight, and what takes its gradients

    def _weights(self) -> dict[str, _Weight]:
        found = {}
        for layer in self.layers:
            weight = weight_of(layer)
            assert weight is not None
            grid, form = self.m.grid(value_name(weight)), self.m.plan[value_name(weight)]
            assert grid is not None and form is not None
            codes = quantize(self.m.parameters[str(weight.target)], grid)
            found[str(weight.target)] = _Weight(layer, form, grid, codes, torch.zeros_like(grid.scale))
        return found

    def _scales(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        names = {value_name(n) for n in self.nodes if "value" in n.meta}
        for node in self.nodes:
            if node.op != "call_function" or "value" not in node.meta or self.m.grid(value_name(node)) is None:
                continue
            root = self.m.ties.get(value_name(node), value_name(node))
            form = self.m.plan[value_name(node)]
            if form is not None and form.bits < _WIDE and not form.power_of_two and root in names:
                found[root] = torch.zeros_like(self.m.grids[root].scale)
        return found

    def parameter(self, node: fx.Node) -> Tensor:
        """A parameter on its way."""
        name = str(node.target)
        if name in self.weights:
            if name not in self.leaves:
                w = self.weights[name]
                real = _real(w.codes, w.grid, w.factor.exp() * w.grid.scale)
                if not self.training:
                    return real
                self.leaves[name] = real, real.detach().requires_grad_(real.requires_grad)
            return self.leaves[name][1]
        if name in self.biases:
            shift, unit = self.biases[name]
            real = self.m.parameters[name] + shift * unit
            step = self._bias_step(name)
            return real if step is None else round_even(real / step) * step
        return super().parameter(node)

    @torch.no_grad()
    def _bias_step(self, name: str) -> Tensor | None:
        """What a bias is held in multiples of, as the scales are by now."""
        layer = self.with_bias[name]
        weight, read = weight_of(layer), value_name(layer.args[0])  # type: ignore[arg-type]
        grid = None if weight is None else self.m.grid(value_name(weight))
        step = None if grid is None else bias_step(self.m, layer, grid)
        if step is None or weight is None or twin_of(layer) is not None:  # what the twin takes up is hardly rounded
            return None
        own, root = self.weights.get(str(weight.target)), self.m.ties.get(read, read)
        step = step if own is None else step * own.factor.exp()
        return step if root not in self.scales else step * self.scales[root].exp()

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
        if self.training and self.drop:
            keep = torch.rand(x.shape, generator=self.generator).to(x.device) < self.drop
            y = torch.where(keep, x, y)
        return y

    def backward(self, loss: Loss, at: Tensor) -> None:
        """Gradients of the mean loss over some samples, a portion at a time; weights are computed once for all portions."""
        self.training, self.leaves = True, {}
        with torch.enable_grad():
            for some in torch.split(at, self.portion):
                _gradients(loss(some) * (len(some) / len(at)))
            read = [(real, leaf.grad) for real, leaf in self.leaves.values() if leaf.grad is not None]
            torch.autograd.backward([real for real, _ in read], [grad for _, grad in read])
        self.training, self.leaves = False, {}

    def keep(self, nodes: Iterable[fx.Node]) -> None:
        """Let :meth:`run` return these values, too."""
        kept = set(nodes)
        self.freed = {at: [n for n in dead if n not in kept] for at, dead in self.freed.items()}

    def run(self, env: Env) -> Env:
        """What later nodes, or nobody, read of what the nodes make of ``env``."""
        return execute(self.m, self.nodes, env, self, self.freed)

    def free_biases(self, *envs: Env) -> None:
        """Let biases move, in units of the standard deviation of what each layer puts out, [channels]; of as many samples each."""
        seen: dict[str, list[Tensor]] = {}
        wanted = set(self.layers)

        class Watch(Rounding):
            def value(self, node: fx.Node, x: Tensor) -> Tensor:
                bias = bias_of(node) if node in wanted else None
                if bias is not None:
                    others = [d for d in range(x.ndim) if d != input_axis(node) % x.ndim]
                    seen.setdefault(str(bias.target), []).append(torch.stack([x.mean(others), x.square().mean(others)]))
                return super().value(node, x)

        with torch.no_grad():
            for env in envs:
                execute(self.m, self.nodes, env, Watch(self.m), self.freed)
        for name, moments in seen.items():
            mean, square = torch.stack(moments).mean(0)
            std = (square - mean.square()).clamp(min=0).sqrt()
            self.biases[name] = torch.zeros_like(std), std

    def variables(self, rates: Rates) -> list[dict[str, Any]]:
        """Groups for the optimizer."""
        codes = [w.codes for w in self.weights.values() if "codes" in self.learn and w.form.bits < _WIDE]
        factors = [w.factor for w in self.weights.values() if "scales" in self.learn and not w.form.power_of_two]
        groups = [
            (codes, rates.codes),
            ([*factors, *self.scales.values()], rates.scales),
            ([shift for shift, _ in self.biases.values()], rates.biases),
        ]
        for tensors, _ in groups:
            for t in tensors:
                t.requires_grad_()
        return [{"params": tensors, "lr": rate} for tensors, rate in groups if tensors]

    def state(self) -> dict[str, Tensor]:
        """All variables as they are."""
        found = {f"codes {k}": w.codes for k, w in self.weights.items()}
        found |= {f"factor {k}": w.factor for k, w in self.weights.items()}
        found |= {f"bias {k}": shift for k, (shift, _) in self.biases.items()}
        found |= {f"scale {k}": factor for k, factor in self.scales.items()}
        return {k: t.detach().clone() for k, t in found.items()}

    def written(self, state: Mapping[str, Tensor]) -> QModel:
        """The model with variables of this state."""
        tuned, grids = dict(self.m.tuned), dict(self.m.grids)
        for name, (_, unit) in self.biases.items():
            tuned[name] = self.m.parameters[name] + state[f"bias {name}"] * unit
        m = replace(self.m, tuned=tuned)
        scales = {k: m.grids[k].scale * state[f"scale {k}"].exp() for k in self.scales}
        m = regridded(m, {k: replace(m.grids[k], scale=s) for k, s in scales.items()})
        tuned, grids = dict(m.tuned), dict(m.grids)
        for name, w in self.weights.items():
            new = replace(w.grid, scale=(w.grid.scale * state[f"factor {name}"].exp()))
            floor = bias_floor(m, w.layer, new)
            new = new if floor is None else replace(new, scale=torch.maximum(new.scale, floor))
            tuned[name] = fake_quantize(_real(state[f"codes {name}"], new, new.scale), new)
            grids[value_name(w.layer.args[1])] = new  # type: ignore[arg-type]
        return whole_biases(replace(m, tuned=tuned, grids=grids), self.layers)


def _real(codes: Tensor, grid: Grid, scale: Tensor) -> Tensor:
    """What codes on their way stand for, with gradients to them and to the scale."""
    lo, hi, zero, step = (expand(t, grid, codes) for t in (grid.lo, grid.hi, grid.zero, scale))
    return (torch.clamp(round_even(codes), lo, hi) - zero) * step


class Clock:
    """How many steps each part may take so that all end in time. work: of each part."""

    def __init__(self, limit: float | None, work: Sequence[int]) -> None:
        self.limit, self.work, self.at = limit, list(work), 0
        self.start = time.monotonic()

    def allowed(self, planned: int, seconds: float) -> int:
        """Steps of this part, by the time that one takes and the work that is left."""
        if self.limit is None:
            return planned
        left = self.limit - (time.monotonic() - self.start)
        share = self.work[self.at] / max(1, sum(self.work[self.at :]))
        return max(_TIMED + 1, min(planned, int(left * share / max(seconds, 1e-9))))

    def done(self) -> None:
        """The next part is at work."""
        self.at += 1


@dataclass(frozen=True)
class Refined:
    """The best state on the held-out samples, the loss there before and after, and the steps it took."""

    state: Mapping[str, Tensor]
    before: float
    after: float
    steps: int

    @property
    def figures(self) -> dict[str, Any]:
        """For the log."""
        return {"before": self.before, "after": self.after, "kept": self.after < self.before, "steps": self.steps}


@torch.no_grad()
def held_out_loss(loss: Loss, at: Tensor, batch: int) -> float:
    """The mean loss over the held-out samples."""
    return sum(float(loss(part)) * len(part) for part in torch.split(at, batch)) / max(1, len(at))


def descend(
    part: Part,
    loss: Loss,
    samples: tuple[int, int],
    rates: Callable[[float], Rates],
    clock: Clock,
    *,
    steps: int,
    batch: int,
    warmup: float = 0.0,
    checks: int = _CHECKS,
    tick: Callable[[int, int], bool],
) -> Refined:
    """Adam with rates that rise over the first ``warmup`` of the steps and fall as a cosine; keeps what does best held out.

    samples: how many there are to fit, and in all; those behind are held out. rates: by the loss before. tick: told the steps
    done and in all; False ends the descent.
    """
    count, held = samples[0], torch.arange(*samples)
    fixed = fixed_batch(part.m)
    before = held_out_loss(loss, held, fixed or batch)
    best, least = part.state(), before
    variables = part.variables(rates(before))
    if not variables:
        return Refined(best, before, before, 0)
    optimizer = torch.optim.Adam(variables, betas=(0.9, 0.99))
    highest = [g["lr"] for g in optimizer.param_groups]
    planned, start, step, going = steps, time.monotonic(), 0, True
    while step < steps and going:
        if step == _TIMED:
            steps = clock.allowed(planned, (time.monotonic() - start) / _TIMED)
        share = min(1.0, (step + 1) / (warmup * steps)) if warmup else 1.0
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * share * 0.5 * (1 + math.cos(math.pi * step / steps))
        at = torch.randint(0, count, (min(batch, count),), generator=part.generator)
        optimizer.zero_grad()
        part.backward(loss, at)
        optimizer.step()
        step += 1
        going = tick(step, steps)
        if step % max(1, steps // checks) == 0 or step == steps or not going:
            now = held_out_loss(loss, held, fixed or batch)
            if now < least:
                best, least = part.state(), now
    return Refined(best, before, least, step)
