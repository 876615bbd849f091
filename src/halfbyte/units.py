"""What widths are chosen for: weights, and groups of running values on one grid; and models merged out of candidates.

A candidate is the whole network at one pair of widths. All candidates share the graph and the float parameters, so that any
layer of one fits in between any layers of another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from halfbyte.affine import Grid
from halfbyte.calibrate import room_for_bias
from halfbyte.errors import UsageError
from halfbyte.formats import Bits
from halfbyte.graph import bias_of, by_value, layers, tensors, weight_of
from halfbyte.model import LogEntry, QModel, value_name
from halfbyte.ops import REQUANTIZE

Candidates = Mapping[Bits, QModel]
Choice = Mapping[str, int]  # unit -> width


@dataclass(frozen=True)
class Reader:
    """A layer with a quantized weight: its value, its weight's unit, and the unit that it reads (None: it reads floats)."""

    name: str
    weight: str
    group: str | None


@dataclass(frozen=True)
class Units:
    """widths: unit -> widths that the candidates have, ascending; one width means that there is nothing to choose.

    A unit is named after its value: a weight, or the value whose grid a group of running values shares. readers: layers in
    graph order. groups: unit -> its values. copies: a rounded copy that layers read -> the value that it copies.
    """

    widths: Mapping[str, tuple[int, ...]]
    readers: tuple[Reader, ...]
    groups: Mapping[str, tuple[str, ...]]
    copies: Mapping[str, str]

    @property
    def open(self) -> list[str]:
        """Units that have more than one width."""
        return [u for u, widths in self.widths.items() if len(widths) > 1]

    def complete(self, choice: Choice) -> dict[str, int]:
        """The choice with the widest width for every unit that it does not name. Raises :class:`UsageError`."""
        for unit, width in choice.items():
            if unit not in self.widths:
                raise UsageError(f"'{unit}' is no unit of choice: units are weights and running values with a grid")
            if width not in self.widths[unit]:
                raise UsageError(f"no candidate has '{unit}' in {width} bits: there are {self.widths[unit]}")
        return {unit: choice.get(unit, widths[-1]) for unit, widths in self.widths.items()}

    def width_read(self, reader: Reader, choice: Choice) -> int:
        """The width of what a layer reads: 32 for floats."""
        return 32 if reader.group is None else choice[reader.group]


def units(candidates: Candidates) -> Units:
    """The units that the candidates differ in. Raises :class:`UsageError` if they are not of one graph."""
    first = _checked(candidates)
    nodes = by_value(first.graph)
    weights = {value_name(w) for n in layers(first.graph) if (w := weight_of(n)) is not None}
    groups: dict[str, list[str]] = {}
    for name, form in first.plan.items():
        if form is not None and name in nodes and name not in weights:
            groups.setdefault(first.ties.get(name, name), []).append(name)
    readers = []
    for layer in layers(first.graph):
        weight, x = value_name(layer.args[1]), layer.args[0]  # type: ignore[arg-type]
        read = value_name(x) if isinstance(x, fx.Node) else ""
        if first.plan.get(weight) is not None:
            group = first.ties.get(read, read) if first.plan.get(read) is not None else None
            readers.append(Reader(value_name(layer), weight, group))
    copies = {
        value_name(n): value_name(n.args[0])  # type: ignore[arg-type]
        for n in tensors(first.graph)
        if n.target is REQUANTIZE and first.plan.get(value_name(n.args[0])) is not None  # type: ignore[arg-type]
    }
    named = dict.fromkeys([*(r.weight for r in readers), *groups])
    widths = {u: tuple(sorted({c.plan[u].bits for c in candidates.values()})) for u in named}  # type: ignore[union-attr]
    return Units(widths, tuple(readers), {k: tuple(v) for k, v in groups.items()}, copies)


def _checked(candidates: Candidates) -> QModel:
    """The widest candidate, if all are calibrated and of one graph and one float network."""
    if not candidates or not all(isinstance(b, Bits) for b in candidates):
        raise UsageError("candidates are a mapping such as {hb.bits(4, 8): model, hb.bits(8, 8): model}")
    widest = max(candidates)
    first = candidates[widest]
    for label, m in candidates.items():
        if not m.grids or m.target is None:
            raise UsageError(f"candidate {label} has no grids: call place and calibrate on every candidate")
        if _outline(m) != _outline(first) or m.ties != first.ties or _planned(m) != _planned(first):
            odd = sorted(by_value(m.graph).keys() ^ by_value(first.graph).keys()) or sorted(
                _planned(m) ^ _planned(first)
            )
            raise UsageError(
                f"candidates {label} and {widest} are not of one graph{' (' + odd[0] + ')' if odd else ''}: call place on the "
                "same model with the same options for each, and with narrow=True where uniform=False"
            )
        same = m.params.keys() == first.params.keys() and all(
            t is first.params[k] or torch.equal(t, first.params[k]) for k, t in m.params.items()
        )
        if not same:
            raise UsageError(
                f"candidates {label} and {widest} have different float parameters: fold and equalize once, before place"
            )
        if m.target != first.target:
            raise UsageError(f"candidates {label} and {widest} are for different targets: place all for one")
    return first


def _outline(m: QModel) -> list[tuple[object, ...]]:
    order = {n: i for i, n in enumerate(m.graph.nodes)}
    return [(n.op, str(n.target), n.meta.get("value"), *(order[i] for i in n.all_input_nodes)) for n in m.graph.nodes]


def _planned(m: QModel) -> set[str]:
    return {name for name, form in m.plan.items() if form is not None}


def sources(candidates: Candidates, u: Units, choice: Choice) -> dict[str, Bits]:
    """For each unit the candidate that has it in the chosen width, and its neighbours in theirs as far as there is one."""
    beside: dict[str, set[str]] = {unit: set() for unit in choice}
    for reader in u.readers:
        if reader.group is not None:
            beside[reader.weight].add(reader.group)
            beside[reader.group].add(reader.weight)
    width = {label: {unit: m.plan[unit].bits for unit in choice} for label, m in candidates.items()}  # type: ignore[union-attr]

    def fit(unit: str, label: Bits) -> tuple[int, Bits]:
        return -sum(abs(width[label][n] - choice[n]) for n in beside[unit]), label

    return {
        unit: max((b for b in candidates if width[b][unit] == bits), key=lambda b, unit=unit: fit(unit, b))  # type: ignore[misc]
        for unit, bits in choice.items()
    }


def merged(candidates: Candidates, u: Units, choice: Choice) -> QModel:
    """The model of a choice, on the candidates' graph; units that it does not name have their widest width.

    A copy that is no narrower than what it copies passes it on as it is.
    """
    choice = u.complete(choice)
    origin = sources(candidates, u, choice)
    base = candidates[max(candidates)]
    tuned, plan, grids = dict(base.tuned), dict(base.plan), dict(base.grids)
    owners: dict[str, Bits] = dict(origin)
    for layer in layers(base.graph):
        label = origin.get(value_name(layer.args[1]))  # type: ignore[arg-type]
        for node in (weight_of(layer), bias_of(layer)) if label is not None else ():
            if node is not None:
                tuned.pop(str(node.target), None)
                if str(node.target) in candidates[label].tuned:  # type: ignore[index]
                    tuned[str(node.target)] = candidates[label].tuned[str(node.target)]  # type: ignore[index]
        if label is not None:
            owners[value_name(layer)] = label
    for unit, label in origin.items():
        for value in u.groups.get(unit, (unit,)):
            plan[value] = candidates[label].plan[value]
            _move(value, candidates[label].grids, grids)
    m = replace(base, tuned=tuned, plan=plan, grids=grids)
    for copy in passed_on(u, choice):
        source = u.copies[copy]
        plan[copy], grids[copy] = plan[source], m.grid(source)  # type: ignore[assignment]
    log = [e for e in base.log if e.value not in owners]
    log += [e for v, label in owners.items() for e in candidates[label].log if e.value == v]
    grids, raised = room_for_bias(m, grids)
    return replace(m, grids=grids, log=(*log, *raised))


def _move(value: str, found: Mapping[str, Grid], grids: dict[str, Grid]) -> None:
    grids.pop(value, None)
    if value in found:
        grids[value] = found[value]


def passed_on(u: Units, choice: Choice) -> list[str]:
    """Copies that are no narrower than what they copy."""
    roots = {value: root for root, values in u.groups.items() for value in values}
    return [copy for copy, source in u.copies.items() if choice[roots[copy]] >= choice[roots[source]]]


def without_copies(m: QModel, u: Units, copies: list[str], graph: fx.Graph) -> QModel:
    """The model, on ``graph`` (an editable copy of its own), with readers of these copies reading what was copied."""
    for node in list(graph.nodes):
        if node.meta.get("value") in copies and node.target is REQUANTIZE:
            node.replace_all_uses_with(node.args[0], propagate_meta=False)
            graph.erase_node(node)
    plan = {k: v for k, v in m.plan.items() if k not in copies}
    grids = {k: v for k, v in m.grids.items() if k not in copies}
    text = "reads what its copy would have rounded to no fewer bits: the copy is gone"
    return replace(m, graph=graph, plan=plan, grids=grids).logged(*(LogEntry("allocate", c, text) for c in copies))
