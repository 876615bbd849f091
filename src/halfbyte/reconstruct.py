"""Layer after layer, weights that make the quantized network's layers put out what the float network's do."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from halfbyte.affine import fake_quantize
from halfbyte.calibrate import BIAS_LIMIT, saturates
from halfbyte.errors import DataError, UsageError
from halfbyte.graph import bias_of, layers, weight_of
from halfbyte.local import LayerSolver, Problem, Solution
from halfbyte.model import Inputs, LogEntry, QModel, value_name
from halfbyte.ops import Kind, kind
from halfbyte.second_moments import gathered, Patches
from halfbyte.walk import Frontier, Visited, walk

_log = logging.getLogger("halfbyte")
_HELD_OUT = 8  # one sample of so many decides, the others fit
_HELD_OUT_ROWS = 4096


def reconstruct(
    m: QModel,
    data: Iterable[Inputs],
    solver: LayerSolver,
    *,
    inputs: Literal["quantized", "float"] = "quantized",
    activations: bool = True,
    seed: int = 0,
    budget: int | None = None,
    progress: Visited | None = None,
) -> QModel:
    """Let ``solver`` choose the weights of every layer, in graph order. Use after ``calibrate``."""
    if not m.grids or m.target is None:
        raise UsageError("there is no grid to round to yet: call place and calibrate before reconstruct")
    fit, held = split(data)
    fits = len(fit)
    order = {layer: i for i, layer in enumerate(layers(m.graph))}

    def visit(now: QModel, layer: fx.Node, x: Frontier, y: Frontier) -> QModel:
        reason = _why_not(now, layer)
        if reason:
            return now.logged(LogEntry("reconstruct", value_name(layer), f"left as it is: {reason}"))
        generator = torch.Generator().manual_seed(seed + order[layer])
        parts = gathered(layer, x[fits:], y[fits:], _HELD_OUT_ROWS, generator)
        p = problem(now, layer, x[:fits], y[:fits], _joined(parts), seed + order[layer])
        return _better(now, p, solver)

    running = m if activations else replace(m, grids={k: g for k, g in m.grids.items() if k in parameters_of(m)})
    done = walk(
        running, [*fit, *held], visit, quantized_inputs=inputs == "quantized", residual=True, budget=budget, progress=progress
    )
    return replace(done, grids={**m.grids, **done.grids})


def parameters_of(m: QModel) -> set[str]:
    """Value names of parameters."""
    return {value_name(n) for n in m.graph.nodes if n.op == "get_attr"}


def split(data: Iterable[Inputs]) -> tuple[list[Inputs], list[Inputs]]:
    """Samples to fit and samples to decide by: of every batch its last eighth."""
    fit, held = [], []
    for batch in data:
        n = len(batch[0])
        cut = n - n // _HELD_OUT
        fit.append(tuple(t[:cut] for t in batch))
        if cut < n:
            held.append(tuple(t[cut:] for t in batch))
    if not fit:
        raise DataError("there are no data to work with")
    if not held:  # batches of a few samples
        held = fit[-max(1, len(fit) // _HELD_OUT) :]
        fit = fit[: -len(held)] or held
    return fit, [tuple(torch.cat(parts) for parts in zip(*held, strict=True))]


def _joined(parts: list[Patches]) -> Patches:
    return Patches(torch.cat([p.inputs for p in parts], 1), torch.cat([p.outputs for p in parts], 1))


def _why_not(m: QModel, layer: fx.Node) -> str:
    weight, bias = weight_of(layer), bias_of(layer)
    if weight is None or m.grid(value_name(weight)) is None:
        return "its weight is not quantized"
    if len(weight.users) > 1 or (bias is not None and len(bias.users) > 1):
        return "its parameters are shared"
    return ""


def problem(m: QModel, layer: fx.Node, x: Frontier, y: Frontier, held: Patches, seed: int) -> Problem:
    """What a solver needs to know of one layer."""
    weight, bias, source = weight_of(layer), bias_of(layer), layer.args[0]
    assert weight is not None and isinstance(source, fx.Node) and m.target is not None
    form, grid, read = m.plan[value_name(weight)], m.grid(value_name(weight)), m.grid(value_name(source))
    assert form is not None and grid is not None
    b = None if bias is None else m.parameters[str(bias.target)]
    floor = None
    if b is not None and read is not None:
        floor = b.abs().float() / (BIAS_LIMIT * read.scale)
        floor = floor.max() if form.axis is None else floor
    return Problem(
        layer, m.params[str(weight.target)], b, form, grid, x, y, held, _following(layer), read, floor,
        saturates(layer, m.target), seed,
    )  # fmt: skip


def _following(layer: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """The activation function that alone reads the layer."""
    if len(layer.users) != 1:
        return None
    (reader,) = layer.users
    if kind(reader) is not Kind.CLAMP or any(isinstance(a, fx.Node) for a in reader.args[1:]):
        return None
    return lambda t: reader.target(t, *reader.args[1:], **reader.kwargs)  # type: ignore[operator, no-any-return]


def _better(m: QModel, p: Problem, solver: LayerSolver) -> QModel:
    """The model with the solution, or as it was if that does better on the held-out samples."""
    weight, bias = weight_of(p.layer), bias_of(p.layer)
    assert weight is not None
    before = p.loss(fake_quantize(m.parameters[str(weight.target)], p.grid), p.bias)
    solution = solver.solve(p)
    after = p.loss(solution.weight, solution.bias if solution.bias is not None else p.bias)
    level = float(p.held_out.outputs.double().square().mean(1).sum())
    figures = f"noise-to-signal on held-out samples {before / max(level, 1e-30):.3g} before, {after / max(level, 1e-30):.3g} after"
    name = value_name(p.layer)
    if not after <= before:
        return m.logged(LogEntry("reconstruct", name, f"left as it is ({solver.name}): {figures}"))
    tuned = {**m.tuned, str(weight.target): solution.weight}
    if bias is not None and solution.bias is not None:
        tuned[str(bias.target)] = solution.bias
    grids = {**m.grids, value_name(weight): solution.grid}
    return replace(m, tuned=tuned, grids=grids).logged(
        LogEntry("reconstruct", name, f"{solver.name}, {solution.note}: {figures}")
    )
