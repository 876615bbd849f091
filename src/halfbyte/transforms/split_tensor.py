"""Several low-bit tensors for what one approximates badly (arXiv 1902.06822, section 3): a sum of layers in the graph.

Weights, kernel by kernel: ``W x = (alpha_1 q_1) x + (alpha_2 q_2) x``, where only the worst kernels have a second part. The
layer keeps all its kernels. A second, small layer of the same kind computes the second parts alone; its outputs go to their
channels by zero padding and a gather, which move codes, and one addition brings both together. Running values: the kernels
read ``Q_1(x)`` and, through a twin that shares their weights, ``Q_2(x - Q_1(x))``; again an addition.

Why this form. Storage and products grow by the share of kernels and nothing else: whole second weights of mostly zero kernels
would double both, a 1x1 convolution to spread the small layer's outputs would cost more than the layer, and one layer on
``concat(x, x)`` has one scale for each kernel, so that alpha_2 is lost. One accumulator for both parts needs alpha_1 /
alpha_2 to be whole and an 8-bit multiplier, and then an 8-bit kernel is better. Channels of a sum cannot be permuted instead of
gathered where a residual adds to them. And everything here is an operation that simulation, integer evaluation, exporter and
proof know. What the parts put out before they are added has 8 bits, 16 times finer than the 4 that usually follow; a linear
layer's kernel writes floats, and its parts are added without any rounding.

The float network stays what it was: the first weight is ``W - alpha_2 q_2``, which nearest rounding takes to ``alpha_1 q_1``
because the pair is the nearest one, the second ``alpha_2 q_2``; and ``x - Q_1(x)`` is zero where nothing is rounded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid, fake_quantize
from halfbyte.calibrate import BIAS_LIMIT, observe, regridded, running
from halfbyte.correct import InputMoments, correct_expected
from halfbyte.dual import dual, dual_ranges
from halfbyte.effects import rounding_noise
from halfbyte.errors import UsageError
from halfbyte.formats import Format
from halfbyte.graph import (
    RESIDUAL,
    bias_of,
    blocks,
    by_value,
    groups,
    input_axis,
    layers,
    macs,
    per_input,
    replace_uses,
    unblocks,
    weight_of,
)
from halfbyte.grids import MSE
from halfbyte.model import Inputs, LogEntry, QModel, value_name
from halfbyte.ops import CONV, CONV_TRANSPOSE, LINEAR, REQUANTIZE, aten
from halfbyte.parts import SECOND, WIDE, Edit, add_second, add_twin, inputs_each, is_gather, readers
from halfbyte.run import portions, run, simulate
from halfbyte.stats import Histogram, histogram


def split_tensor(
    m: QModel, data: Iterable[Inputs], *, share: float = 0.1, activations: float = 0.0, worth: float = 0.0
) -> QModel:
    """Give the worst kernels a second weight tensor, and the layers of the worst running values a second input.

    After ``calibrate``, before ``reconstruct``. data: a few unlabelled batches, for the ranges of what the parts put out. share:
    what second kernels may cost, as a fraction of the bytes and of the multiply-accumulates of all layers; kernels (output
    channels) of fewer than 8 bits get one in the order of their relative error ``||W - W^||^2 / ||W||^2``, each weight counted
    by the power of the input that it meets. activations: what second inputs may cost, as a fraction of multiply-accumulates;
    the values first whose rounding makes the most noise at the outputs for each operation that a second part costs. worth: the
    least noise-to-signal ratio over the share of the operations for which a value is split at all. What was split before counts,
    so that a second call changes nothing. Raises
    :class:`UsageError` for a model without grids, with weights that were chosen already, or fractions outside 0 to 1.
    """
    for what, value in (("share", share), ("activations", activations)):
        if not 0 <= value <= 1:
            raise UsageError(f"split_tensor: {what} = {value:g} is not a fraction from 0 to 1")
    if not m.grids or m.target is None:
        raise UsageError("there is no grid to add a second tensor to yet: call place and calibrate before split_tensor")
    if {str(w.target) for n in layers(m.graph) if (w := weight_of(n)) is not None} & m.tuned.keys():
        raise UsageError("weights have been chosen already: call split_tensor before reconstruct, not after it")
    if not share and not (activations and any(m.plan[n].bits < WIDE for n in running(m))):  # type: ignore[union-attr]
        return m
    batches = [tuple(b) for b in data]
    seen = observe(m, batches)
    split = _kernels_split(m, seen.inputs, share)
    if m.tuned and len(split.params) > len(
        m.params
    ):  # biases alone: what was taken into them was the error of one tensor
        split = correct_expected(split, seen.inputs)
    return _measured(_values_split(split, batches, seen.histograms, activations, worth), batches)


@dataclass(frozen=True)
class _Candidate:
    """A layer whose kernels may get second parts, and what is known of each kernel, [kernels]."""

    layer: fx.Node
    weight: Tensor  # [kernels, values]
    power: Tensor  # as ``weight``
    grid: Grid
    form: Format
    relative: Tensor

    def error(self, w: Tensor, grid: Grid) -> float:
        """What rounding this weight costs, weighted, over the square of the layer's weight."""
        noise = (fake_quantize(w, grid) - w).flatten(1).square() * self.power
        return float(noise.sum() / (self.weight.square() * self.power).sum().clamp(min=1e-30))

    @property
    def bytes_each(self) -> float:
        """Of one second kernel: codes, scale, bias, and the channels that a grouped one reads."""
        gathered = 4 * inputs_each(self.layer) if groups(self.layer) > 1 else 0
        bias = 4 if bias_of(self.layer) is not None else 0
        return self.weight.shape[1] * self.form.bits / 8 + 4 + bias + gathered

    def cost(self, count: int) -> tuple[float, float]:
        """Bytes and multiply-accumulates of so many second kernels."""
        if not count:
            return 0.0, 0.0
        index = 4 * len(self.weight) if count < len(self.weight) else 0
        return count * self.bytes_each + index, count * macs(self.layer) / len(self.weight)


def _candidates(m: QModel, inputs: InputMoments) -> tuple[list[_Candidate], list[LogEntry]]:
    found, log = [], []
    for layer in layers(m.graph):
        weight, x = weight_of(layer), layer.args[0]
        assert weight is not None and isinstance(x, fx.Node)  # layers() lists those with a constant weight
        form, grid = m.plan.get(value_name(weight)), m.grid(value_name(weight))
        if form is None or grid is None or form.bits >= WIDE or m.plan.get(value_name(x)) is None:
            continue
        reason = _why_not(m, layer)
        if reason:
            log.append(LogEntry("split_tensor", value_name(layer), f"left as it is: {reason}"))
            continue
        w = m.params[str(weight.target)]
        moments = inputs.get((value_name(x), input_axis(layer)))
        power = torch.ones_like(w)
        if moments is not None:
            parts = blocks(layer, w)
            power = unblocks(layer, per_input(layer, moments.power.to(w)).expand_as(parts), w.shape)
        flat, p = w.flatten(1), power.flatten(1)
        noise = ((fake_quantize(w, grid) - w).flatten(1).square() * p).sum(1)
        relative = noise / (flat.square() * p).sum(1).clamp(min=1e-30)
        found.append(_Candidate(layer, flat, p, grid, form, relative))
    return found, log


def _why_not(m: QModel, layer: fx.Node) -> str:
    weight, bias = weight_of(layer), bias_of(layer)
    if layer.target is CONV_TRANSPOSE:
        return "kernels of a transposed convolution are not split"
    if m.plan[value_name(weight)].power_of_two:  # type: ignore[arg-type,union-attr]
        return "its scales are powers of two, which two tensors do not share"
    if len(weight.users) > 1 or (bias is not None and len(bias.users) > 1):  # type: ignore[union-attr]
        return "its parameters are shared"
    if value_name(weight).endswith(SECOND) or f"{value_name(weight)}{SECOND}" in m.params:  # type: ignore[arg-type]
        return "it has second tensors already"
    form = m.plan[value_name(weight)]  # type: ignore[arg-type]
    return "" if form is not None and form.group is None else "its weight has a scale for each group of values"


def _kernels_split(m: QModel, inputs: InputMoments, share: float) -> QModel:
    """Choose kernels until the budget is spent, worst first, and split them layer by layer."""
    if not share:
        return m
    edit = Edit(m)
    found, log = _candidates(replace(m, graph=edit.graph), inputs)
    chosen = _chosen(found, [limit * share - spent for limit, spent in zip(*_accounts(m), strict=True)])
    edit.log += log
    total = [0.0, 0.0]
    for candidate, kernels in zip(found, chosen, strict=True):
        if kernels:
            cost = candidate.cost(len(kernels))
            total = [a + b for a, b in zip(total, cost, strict=True)]
            _split_layer(edit, candidate, torch.tensor(sorted(kernels)))
    everything = _accounts(m)[0]
    shares = [100 * t / max(e, 1.0) for t, e in zip(total, everything, strict=True)]
    count = sum(map(len, chosen))
    text = f"{count} kernels have a second tensor: {shares[0]:.1f} % more bytes of weights, {shares[1]:.1f} % more operations"
    figures = {"kernels": count, "bytes": total[0], "macs": total[1]}
    edit.log.append(LogEntry("split_tensor", None, text, figures))
    return edit.done()


def _accounts(m: QModel) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bytes of weights and multiply-accumulates of the network as it came, and of the second parts it has already."""
    came, spent = [0.0, 0.0], [0.0, 0.0]
    for layer in layers(m.graph):
        weight = weight_of(layer)
        assert weight is not None  # layers() lists those with a constant weight
        if value_name(layer).endswith(RESIDUAL):
            continue
        form, w, second = m.plan.get(value_name(weight)), m.params[str(weight.target)], value_name(weight) + "."
        account = spent if value_name(weight).endswith(SECOND) else came
        account[0] += w.numel() * (32 if form is None else form.bits) / 8
        account[1] += macs(layer)
        if account is spent:  # scales, biases, and which channels they read and write
            account[0] += 4 * len(w) + sum(4 * t.numel() for name, t in m.params.items() if name.startswith(second))
    return (came[0], came[1]), (spent[0], spent[1])


def _chosen(found: list[_Candidate], left: list[float]) -> list[list[int]]:
    """Kernels by candidate: the largest relative errors first, those left out whose cost no longer fits."""
    order = sorted(((-float(e), i, k) for i, c in enumerate(found) for k, e in enumerate(c.relative) if e > 0))
    chosen: list[list[int]] = [[] for _ in found]
    for _, i, k in order:
        count = len(chosen[i])
        before, after = found[i].cost(count), found[i].cost(count + 1)
        added = [b - a for a, b in zip(before, after, strict=True)]
        if all(a <= rest for a, rest in zip(added, left, strict=True)):
            left = [rest - a for a, rest in zip(added, left, strict=True)]
            chosen[i].append(k)
    return chosen


def _split_layer(edit: Edit, c: _Candidate, kernels: Tensor) -> None:
    """Second kernels for some of a layer's: solve, store both weights, and change the graph."""
    weight = weight_of(c.layer)
    assert weight is not None
    name, w = str(weight.target), edit.params[str(weight.target)]
    part, power, form = c.weight[kernels], c.power[kernels], replace(c.form, axis=0, symmetric=True, narrow=True)
    single, whole = c.form.axis is None, c.grid
    if single:  # one scale for the layer: the first one stays, for the other kernels have it too
        part, power = part.reshape(1, -1), power.reshape(1, -1)
        if not c.form.symmetric:
            whole = MSE().weight(w, replace(form, axis=None), False, c.power.reshape(w.shape))
            edit.plan[value_name(weight)] = replace(form, axis=None)
    scale = whole.scale.reshape(1) if single else MSE().weight(part, form, False, power).scale
    found = dual(part, form, scale, power=power, fixed=single)
    second = found.parts[1].reshape(len(kernels), *w.shape[1:])
    first = w.clone()
    first[kernels] = w[kernels] - second
    edit.params[name] = first
    scales, zeros = whole.scale.clone(), whole.zero.clone()
    if not single:
        scales[kernels], zeros[kernels] = torch.maximum(found.first, _floor(edit.m, c.layer)[kernels]), 0
    edit.grids[value_name(weight)] = replace(whole, scale=scales, zero=zeros)
    alpha = found.second.reshape(()) if single else found.second
    zero, low, high = (torch.full_like(alpha, v, dtype=torch.int32) for v in (0, form.lo, form.hi))
    edit.grids[name + SECOND] = Grid(alpha, zero, low, high, axis=None if single else 0)
    edit.plan[name + SECOND] = replace(form, axis=c.form.axis)
    add_second(edit, c.layer, kernels, second.contiguous())
    before, after = c.error(w, c.grid), c.error(first, edit.grids[value_name(weight)])
    bytes_, work = c.cost(len(kernels))
    text = f"{len(kernels)} of {len(c.weight)} kernels have a second tensor: relative error of the weights "
    text += f"{before:.3g} before, {after:.3g} after; {bytes_:.0f} bytes and {work:.0f} operations more"
    figures = {"kernels": len(kernels), "of": len(c.weight), "before": before, "after": after}
    name = value_name(c.layer).removesuffix(":first")
    edit.log.append(LogEntry("split_tensor", name, text, {**figures, "bytes": bytes_, "macs": work}))


def _floor(m: QModel, layer: fx.Node) -> Tensor:
    """[kernels]: the least scale at which the bias fits int32."""
    w, bias = m.params[str(weight_of(layer).target)], bias_of(layer)  # type: ignore[union-attr]
    read = m.grid(value_name(layer.args[0]))  # type: ignore[arg-type]
    if bias is None or read is None:
        return w.new_zeros(len(w))
    return m.parameters[str(bias.target)].abs().float() / (BIAS_LIMIT * read.scale)


def _values_split(
    m: QModel, data: list[Inputs], histograms: Mapping[str, Histogram], share: float, worth: float
) -> QModel:
    """Second inputs for the layers that read the values whose rounding disturbs the outputs most, until the budget is spent."""
    if not share:
        return m
    edit = Edit(m)
    known = by_value(edit.graph)
    work: dict[str, float] = {}
    for name in histograms:
        form, node = edit.plan[name], _read_by_layers(edit, known[name])
        if form is not None and form.bits < WIDE and name in edit.grids and node is not None:
            work[name] = float(sum(macs(n) for n in readers(node)))
    total, spent = _accounts(m)[0][1], _residual_work(m)
    noise = {n: e for n, e in rounding_noise(m, data, work).items() if e * total >= worth * work[n]}
    count = 0
    for name in sorted(noise, key=lambda n: -noise[n] / max(work[n], 1.0)):
        if spent + work[name] <= share * total:
            spent, count = spent + work[name], count + 1
            node = _read_by_layers(edit, by_value(edit.graph)[name])  # a sum by now, where its layer got a twin
            assert node is not None
            _split_value(edit, node, histograms[name], noise[name], work[name])
    what = "value is" if count == 1 else "values are"
    text = f"{count} {what} read in two parts: {100 * spent / max(total, 1):.1f} % more operations"
    edit.log.append(LogEntry("split_tensor", None, text, {"values": count, "macs": spent}))
    return edit.done()


def _relative(h: Histogram, *grids: Grid) -> float:
    """Squared error of a value on these grids, each of which rounds what those before leave, over the value's square."""
    held = h.counts > 0
    centres, counts = h.centres[held].float(), h.counts[held]
    left = centres
    for grid in grids:
        left = left - fake_quantize(left, grid)
    power = (centres.double().square() * counts).sum().clamp(min=1e-30)
    return float((left.double().square() * counts).sum() / power)


def _residual_work(m: QModel) -> float:
    return float(sum(macs(n) for n in layers(m.graph) if value_name(n).endswith(RESIDUAL)))


def _read_by_layers(edit: Edit, root: fx.Node) -> fx.Node | None:
    """Where layers on codes, and nothing else, read what this value holds, behind what only moves its codes; none of them twice."""
    every, name, node = set(layers(edit.graph)), value_name(root), root
    if name in edit.ties or name.endswith(RESIDUAL):
        return None
    while len(node.users) == 1:
        (user,) = node.users
        if user in every or is_gather(user) or "value" not in user.meta or edit.ties.get(value_name(user)) != name:
            break
        node = user

    def reads(n: fx.Node) -> bool:
        planned = n in every and n.target in (CONV, LINEAR)
        return planned and edit.plan.get(value_name(weight_of(n))) is not None  # type: ignore[arg-type]

    whole = any("value" in u.meta and value_name(u).endswith(RESIDUAL) for u in node.users)
    return node if node.users and not whole and all(reads(n) for n in readers(node)) else None


def _split_value(edit: Edit, node: fx.Node, h: Histogram, noise: float, work: float) -> None:
    """``Q_1(x)`` and ``Q_2(x - Q_1(x))`` for the layers that read x; x itself becomes wide."""
    name = edit.ties.get(value_name(node), value_name(node))
    form, grid = edit.plan[name], edit.grids[name]
    assert form is not None
    if node.target is REQUANTIZE:
        wide, first = node.args[0], node
    else:
        behind = {value_name(n) for n in node.users}
        wide, first = node, edit.after(node, REQUANTIZE, (node,), f"{value_name(node)}:quantized")
        replace_uses(node, first)
        edit.plan[name] = replace(form, bits=WIDE)
        edit.wide[name] = MSE().activation(h, edit.plan[name])  # type: ignore[arg-type]
        for tied in [t for t, root in edit.ties.items() if root == name]:
            if tied in behind:
                edit.ties[tied] = value_name(first)
            else:
                edit.plan[tied] = edit.plan[name]
    users = list(first.users)
    left = edit.after(first, aten.sub.Tensor, (wide, first), f"{value_name(first)}{RESIDUAL}")
    grids = dual_ranges(h, form)
    for value, part in zip((first, left), grids, strict=True):
        edit.plan[value_name(value)], edit.grids[value_name(value)] = form, part
    for user in users:
        add_twin(edit, user, left)
    before, after = _relative(h, grid), _relative(h, *grids)
    text = f"is read in two parts: in one it made a noise of {noise:.3g} of the signal at the outputs; its relative error is "
    text += f"{before:.3g} before, {after:.3g} after; {work:.0f} operations more"
    figures = {"noise": noise, "before": before, "after": after, "macs": work}
    edit.log.append(LogEntry("split_tensor", name, text, figures))


def _measured(m: QModel, data: list[Inputs]) -> QModel:
    """Grids of what the parts put out in the quantized network: in float the residuals would be zero."""
    planned = {n for n, f in m.plan.items() if f is not None and n not in m.ties and n not in m.grids}
    wanted = planned & by_value(m.graph).keys()
    found: dict[str, Histogram] = {}
    quantize = simulate(m)

    def tap(name: str, x: Tensor) -> Tensor:
        if name in wanted:
            new = histogram(x)
            found[name] = found[name].merged(new) if name in found else new
        return quantize(name, x)

    with torch.no_grad():  # not in inference mode: grids are read where scales and offsets are learned
        for batch in portions(m, data) if wanted else ():
            run(m, batch, tap)
    return regridded(m, {n: MSE().activation(h, m.plan[n]) for n, h in found.items()})  # type: ignore[arg-type]
