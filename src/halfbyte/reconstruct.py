"""Layer after layer, weights that make the quantized network's layers put out what the float network's do."""

import copy
import json
import os
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from halfbyte.affine import Grid, fake_quantize, quantize
from halfbyte.calibrate import Progress, least_scale, regridded, saturates, silent, whole_biases
from halfbyte.errors import DataError, HalfbyteWarning, StoreError, UsageError, VerifyError, check_choice
from halfbyte.graph import bias_of, effort, layers, twin_of, weight_of
from halfbyte.local import LayerSolver, Problem, Solution
from halfbyte.model import Inputs, LogEntry, QModel, value_name
from halfbyte.ops import Kind, kind
from halfbyte.run import fixed_batch, portions
from halfbyte.second_moments import Patches, gathered, joined
from halfbyte.walk import Frontier, read_alone, walk

HELD_OUT = 8  # one sample of so many decides, the others fit
_HELD_OUT_ROWS = 4096
_GRID = ("scale", "zero", "lo", "hi")
_LONG = 600.0  # seconds that a user should know of beforehand
Read = Literal["quantized", "float"]
_OFF_GRID = 1e-5  # of the largest weight
_PROBE = 10  # iterations that tell how long a learned method takes


@torch.inference_mode(False)  # gradients, whatever the caller has turned off
def reconstruct(
    m: QModel,
    data: Iterable[Inputs],
    solver: LayerSolver,
    *,
    inputs: Read = "quantized",
    activations: bool = True,
    seed: int = 0,
    budget: int | None = None,
    time_limit: float | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> QModel:
    """Let ``solver`` choose the weights of every layer, in graph order, with both networks side by side. After ``calibrate``.

    data: unlabelled batches; the last eighth of each is held out, and decides layer by layer whether the solution stays. solver:
    :class:`Descent`, :class:`AdaRound`, :class:`AdaQuant` or any :class:`LayerSolver`. inputs: what a layer reads while it is
    solved, values of the quantized network so far, or of the float network, so that layers do not depend on each other.
    activations: running values are rounded too while the layers are solved. budget: bytes of running values to hold in memory,
    the others go to files. time_limit: seconds; a learned method takes fewer iterations if it would need more. kept: a folder
    that keeps each solved layer; layers found there are not solved again, and Ctrl-C ends behind the layer at work. Raises
    :class:`UsageError` for a model without grids and :class:`DataError` where there are no data.
    """
    check_choice("inputs", inputs, Read)
    if not m.grids or m.target is None:
        raise UsageError("there is no grid to round to yet: call place and calibrate before reconstruct")
    fit, held = (list(portions(m, part)) for part in split(data, unit=fixed_batch(m)))
    order = {layer: i for i, layer in enumerate(layers(m.graph))}
    clock = _Clock(solver, time_limit, [n for n in order if not why_not(m, n)])
    store = Kept(kept, solver, inputs, activations, seed, 0 if kept is None else fingerprint(m, [*fit, *held]))

    def visit(now: QModel, layer: fx.Node, x: Frontier, y: Frontier) -> QModel:
        reason = why_not(now, layer)
        if reason:
            return now.logged(LogEntry("reconstruct", value_name(layer), f"left as it is: {reason}"))
        known = store.read(layer, order[layer])
        if known is None:
            raw = x if solver.unrounded and layer.args[0] in free and twin_of(layer) is None else None
            grid = now.grid(value_name(layer.args[0])) if raw is not None else None  # type: ignore[arg-type]

            def held_out(grid: Grid | None) -> Patches:
                seen = x[len(fit) :] if grid is None else [fake_quantize(t, grid) for t in x[len(fit) :]]
                return joined(gathered(layer, seen, y[len(fit) :], _HELD_OUT_ROWS, _generator(seed, order[layer])))

            read = x[: len(fit)] if grid is None else [fake_quantize(t, grid) for t in x[: len(fit)]]
            full = now if activations else replace(now, grids={**m.grids, **now.grids})
            p = problem(full, layer, read, y[: len(fit)], held_out(grid), seed + order[layer])
            p = replace(p, raw_inputs=None if raw is None else raw[: len(fit)])
            p = replace(p, progress=lambda i, n: progress(f"{solver.name} {value_name(layer)}", i, n))
            start = time.monotonic()
            known = _solved(now, p, clock.solver_for(p), held_out)
            clock.announce(layer, time.monotonic() - start)
            store.write(layer, order[layer], known)
        progress("reconstruct", order[layer] + 1, len(order))
        return whole_biases(known.applied(now, layer), [layer])

    free = read_alone(m) if solver.unrounded and activations else frozenset()
    running = m if activations else replace(m, grids={k: g for k, g in m.grids.items() if k in _parameters(m)})
    with store.interruptible():
        done = walk(
            running,
            [*fit, *held],
            visit,
            quantized_inputs=inputs == "quantized",
            residual=solver.residual,
            unrounded=solver.unrounded,
            budget=budget,
        )
    return replace(done, grids={**m.grids, **done.grids}).logged(*clock.log)


def fingerprint(m: QModel, data: Iterable[Inputs]) -> int:
    """A number that tells parameters and samples apart."""
    found = 0
    for t in (*m.parameters.values(), *(t for batch in data for t in batch)):
        found = zlib.crc32(t.detach().cpu().contiguous().numpy().tobytes(), found)
    return found


def _generator(seed: int, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + layer)


def _parameters(m: QModel) -> set[str]:
    return {value_name(n) for n in m.graph.nodes if n.op == "get_attr"}


def split(data: Iterable[Inputs], share: int = HELD_OUT, unit: int | None = None) -> tuple[list[Inputs], list[Inputs]]:
    """Samples to fit and samples to decide by: of every batch the last, one of ``share``; of small batches, the last of them.

    unit: how many samples must stay together, for a network of a fixed batch; what is less is left out.
    """
    fit, held, unit = [], [], unit or 1
    for batch in data:
        whole = len(batch[0]) // unit * unit
        cut = whole - whole // share // unit * unit
        if cut:
            fit.append(tuple(t[:cut] for t in batch))
        if cut < whole:
            held.append(tuple(t[cut:whole] for t in batch))
    if not fit:
        raise DataError("there are no data to work with")
    if not held:
        few = max(1, len(fit) // share)
        fit, held = (fit[:-few], fit[-few:]) if len(fit) > few else (fit, fit)
    return fit, [tuple(torch.cat(parts) for parts in zip(*held, strict=True))]


def unseen_first(data: Iterable[Inputs]) -> list[Inputs]:
    """The same samples, in front those that :func:`split` holds out: layers solved on the data were not fitted to them."""
    batches = list(data)
    fit, held = split(batches)
    every = sum(len(batch[0]) for batch in batches)
    return [*held, *fit] if sum(len(batch[0]) for batch in (*held, *fit)) == every else batches


def why_not(m: QModel, layer: fx.Node) -> str:
    """Why the weight of a layer cannot be chosen anew; empty if it can."""
    weight, bias = weight_of(layer), bias_of(layer)
    if weight is None or m.grid(value_name(weight)) is None:
        return "its weight is not quantized"
    if len(weight.users) > (1 if twin_of(layer) is None else 2) or (bias is not None and len(bias.users) > 1):
        return "its parameters are shared"
    return ""


def problem(m: QModel, layer: fx.Node, x: Frontier, y: Frontier, held_out: Patches, seed: int = 0) -> Problem:
    """What a solver needs to know of one layer; x, y: what it reads and should put out, batch by batch."""
    weight, bias, source = weight_of(layer), bias_of(layer), layer.args[0]
    assert weight is not None and isinstance(source, fx.Node) and m.target is not None
    form, grid, read = m.plan[value_name(weight)], m.grid(value_name(weight)), m.grid(value_name(source))
    assert form is not None and grid is not None
    b = None if bias is None else m.parameters[str(bias.target)]
    floor = None if b is None or read is None else least_scale(b, read, form.axis)
    return Problem(
        layer=layer,
        weight=m.params[str(weight.target)],
        bias=b,
        form=form,
        grid=grid,
        inputs=x,
        targets=y,
        held_out=held_out,
        following=_following(m, layer),
        input_grid=read,
        floor=floor,
        pairs=saturates(layer, m.target),
        seed=seed,
    )


def _following(m: QModel, layer: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """The activation function that alone reads the layer; its limits may be parameters, a number for each channel."""
    if len(layer.users) != 1:
        return None
    (reader,) = layer.users
    known = all(n is layer or n.op == "get_attr" for n in reader.all_input_nodes)
    if kind(reader) is not Kind.CLAMP or not known:
        return None
    limits, options = fx.map_arg((reader.args[1:], reader.kwargs), lambda n: m.parameters[str(n.target)])
    return lambda t: reader.target(t, *limits, **options)  # type: ignore[operator]


@dataclass(frozen=True)
class _Solved:
    """What became of a layer: None where it stays as it was, and the log's entry."""

    solution: Solution | None
    message: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def applied(self, m: QModel, layer: fx.Node) -> QModel:
        """The model with this solution."""
        m = m.logged(LogEntry("reconstruct", value_name(layer), self.message, self.figures))
        weight, bias = weight_of(layer), bias_of(layer)
        if self.solution is None or weight is None:
            return m
        device = m.params[str(weight.target)].device
        tuned = {**m.tuned, str(weight.target): self.solution.weight.to(device)}
        if bias is not None and self.solution.bias is not None:
            tuned[str(bias.target)] = self.solution.bias.to(device)
        m = replace(m, tuned=tuned, grids={**m.grids, value_name(weight): self.solution.grid.to(device)})
        read = self.solution.input_grid
        return m if read is None else regridded(m, {value_name(layer.args[0]): read.to(device)})  # type: ignore[arg-type]


@torch.no_grad()
def _solved(m: QModel, p: Problem, solver: LayerSolver, held_out: Callable[[Grid | None], Patches]) -> _Solved:
    """The solution, or what was, whichever does better on the held-out samples."""
    weight = weight_of(p.layer)
    assert weight is not None
    before = p.loss(fake_quantize(m.parameters[str(weight.target)], p.grid), p.bias)
    found = _asked(solver, p)
    if not all(bool(torch.isfinite(t).all()) for t in (found.weight, found.grid.scale)):
        return _Solved(None, f"left as it is, for {solver.name} ended in NaN or infinity")
    _check_solution(p, solver.name, found)
    judged = p if found.input_grid is None else replace(p, held_out=held_out(found.input_grid))
    after = judged.loss(found.weight, p.bias if found.bias is None else found.bias)
    signal = max(float(p.held_out.outputs.double().square().mean(1).sum()), 1e-30)
    moved = moves(found.weight, p.weight, found.grid)
    kept = after <= before
    figures = {"method": solver.name, "before": before / signal, "after": after / signal, "kept": kept, "moved": moved}
    shown = f"noise-to-signal on held-out samples {before / signal:.3g} before, {after / signal:.3g} after"
    if not kept:
        return _Solved(None, f"left as it is, for {solver.name} does worse: {shown}", figures)
    steps = ", ".join(f"{n} by {i}" for i, n in moved.items() if i != "0") or "none"
    note = f" ({found.note})" if found.note else ""
    return _Solved(found, f"{solver.name}{note}: {shown}; weights moved in steps: {steps}", figures)


def _asked(solver: LayerSolver, p: Problem) -> Solution:
    """What a solver finds, which may need gradients, and is not to change the network's own weights."""
    with torch.enable_grad():
        found = solver.solve(replace(p, weight=p.weight.clone()))
    return replace(found, weight=found.weight.detach(), bias=None if found.bias is None else found.bias.detach())


def _check_solution(p: Problem, method: str, s: Solution) -> None:
    """Raises :class:`VerifyError` for a weight that the plan's format cannot hold."""
    where = f"the solution of {method} for layer '{value_name(p.layer)}'"
    low, high = int(s.grid.lo.min()), int(s.grid.hi.max())
    if low < p.form.lo or high > p.form.hi:
        raise VerifyError(f"{where} has codes {low} to {high}, and {p.form} holds {p.form.lo} to {p.form.hi}")
    if s.weight.shape != p.weight.shape:
        raise VerifyError(f"{where} has shape {list(s.weight.shape)}, and the weight has {list(p.weight.shape)}")
    off = (fake_quantize(s.weight, s.grid) - s.weight).abs()
    if float(off.max()) > _OFF_GRID * float(s.weight.abs().max()):
        raise VerifyError(f"{where} does not lie on its grid: return hb.fake_quantize(weight, grid)")


def moves(weight: Tensor, before: Tensor, grid: Grid) -> dict[str, int]:
    """How many weights lie how many codes from where nearest rounding of ``before`` puts them: {"0": ..., "1": ...}."""
    steps = (quantize(weight, grid) - quantize(before, grid)).abs().int().flatten()
    return {str(i): n for i, n in enumerate(steps.bincount().tolist()) if n}


@dataclass
class _Clock:
    """Shortens the iterations of a learned method so that all layers end in time, by what the layers before have taken."""

    solver: LayerSolver
    limit: float | None
    waiting: list[fx.Node]
    log: list[LogEntry] = field(default_factory=list)
    end: float = 0.0
    announced: bool = False

    def announce(self, layer: fx.Node, seconds: float) -> None:
        """Say how long a learned method will take, by the first layer, if that is long."""
        if self.announced or not self.solver.iterations:
            return
        self.announced = True
        total = seconds * sum(map(effort, self.waiting)) / effort(layer)
        if total > _LONG:
            text = f"{self.solver.name}: about {total / 3600:.1f} hours for {len(self.waiting)} layers, by the first of them"
            warnings.warn(f"{text}; --time-limit (time_limit=) shortens the iterations", HalfbyteWarning, stacklevel=2)

    def solver_for(self, p: Problem) -> LayerSolver:
        """The solver with as many iterations as its share of the time allows."""
        if self.limit is None or self.solver.iterations <= _PROBE:
            return self.solver
        self.end = self.end or time.monotonic() + self.limit
        left = self.waiting[self.waiting.index(p.layer) :]
        start = time.perf_counter()
        _asked(_with_iterations(self.solver, _PROBE), p)
        each = (time.perf_counter() - start) / _PROBE
        work = sum(map(effort, left)) / effort(p.layer)
        needed = each * work * self.solver.iterations
        share = (self.end - time.monotonic()) / max(needed, 1e-9)
        if share >= 1:
            return self.solver
        count = max(_PROBE, int(self.solver.iterations * max(share, 0.0)))
        text = f"{count} instead of {self.solver.iterations} iterations, to end within {self.limit:.0f} s"
        self.log.append(LogEntry("reconstruct", value_name(p.layer), text))
        return _with_iterations(self.solver, count)


def _with_iterations(solver: LayerSolver, count: int) -> LayerSolver:
    found = copy.copy(solver)
    object.__setattr__(found, "iterations", count)  # of any kind, frozen too
    return found


class Kept:
    """Solved layers in a folder, a file each, written whole or not at all."""

    def __init__(self, folder: Path | None, *identity: object) -> None:
        self.folder, self.identity, self.stopped = folder, json.dumps([str(i) for i in identity]), False

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:04d}.safetensors"

    def read(self, layer: fx.Node, index: int) -> _Solved | None:
        """What was kept of a layer; None if nothing was, or by another method."""
        self.go_on()
        if self.folder is None or not self._file(index).exists():
            return None
        try:
            with safe_open(self._file(index), "pt") as file:
                about = json.loads(file.metadata()["about"])
                t = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - no mapping
            if about["identity"] != self.identity or about["layer"] != value_name(layer):
                return None
            return self._solved(about, t)
        except (SafetensorError, OSError, LookupError, ValueError, TypeError) as error:
            raise StoreError(f"'{self._file(index)}' is damaged: delete it, its layer is then solved again") from error

    @staticmethod
    def _solved(about: Mapping[str, Any], t: Mapping[str, Tensor]) -> _Solved:
        """What a file says."""
        if not about["kept"]:
            return _Solved(None, about["message"], about["figures"])
        grid = Grid(t["scale"], t["zero"], t["lo"], t["hi"], axis=about["axis"], group=about["group"])
        ends = [t[f"input {k}"] for k in _GRID] if "input scale" in t else None
        solution = Solution(
            t["weight"],
            grid,
            t.get("bias"),
            input_grid=None if ends is None else Grid(ends[0], ends[1], ends[2], ends[3]),
        )
        return _Solved(solution, about["message"], about["figures"])

    def write(self, layer: fx.Node, index: int, solved: _Solved) -> None:
        """Keep a layer."""
        if self.folder is None:
            return
        found, t = solved.solution, {"": torch.zeros(1)}
        about = {
            "identity": self.identity,
            "layer": value_name(layer),
            "message": solved.message,
            "kept": found is not None,
        }
        about |= {"figures": solved.figures, "axis": None, "group": None}
        if found is not None:
            g = found.grid
            about |= {"axis": g.axis, "group": g.group}
            t = {"weight": found.weight, "scale": g.scale, "zero": g.zero, "lo": g.lo, "hi": g.hi}
            t |= {} if found.bias is None else {"bias": found.bias}
            if found.input_grid is not None:
                t |= {f"input {k}": getattr(found.input_grid, k) for k in _GRID}
        part = self._file(index).with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            whole = {k: v.detach().cpu().contiguous().clone() for k, v in t.items()}
            save_file(whole, part, metadata={"about": json.dumps(about)})
            os.replace(part, self._file(index))
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                part.unlink()
            raise StoreError(f"cannot keep a solved layer in '{self.folder}': {error}") from error

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first Ctrl-C lets the layer at work end and be kept; the second stops at once."""
        if self.folder is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
            self.go_on()
        finally:
            signal.signal(signal.SIGINT, before)

    def go_on(self) -> None:
        """End here if Ctrl-C was pressed."""
        if self.stopped:
            raise KeyboardInterrupt
