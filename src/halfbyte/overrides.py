"""Exceptions from a plan, by name, module or type: what a pattern means, and which values it changes."""

import difflib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import fx

from halfbyte.errors import PlacementError, UsageError
from halfbyte.formats import Bits, Format, bits
from halfbyte.graph import activation_inputs, is_depthwise, layers, table_of, tensor_inputs, tensors, weight_of
from halfbyte.model import LogEntry, QModel, Target, value_name
from halfbyte.ops import Kind, base_name, kind

Overrides = Mapping[str, Format | Bits | None]
_TYPE = "type:"
_FLOAT = "float"


def parse_overrides(keep_float: tuple[str, ...], sets: tuple[str, ...]) -> dict[str, Format | Bits | None]:
    """Patterns to keep in float, and ``GLOB=W8A16`` or ``GLOB=float``, as overrides. Raises :class:`UsageError`."""
    found: dict[str, Format | Bits | None] = dict.fromkeys(keep_float)
    for text in sets:
        pattern, _, widths = text.rpartition("=")
        if not pattern or not widths:
            raise UsageError(f"'{text}' sets nothing: write it as GLOB=W8A8 or GLOB=float, such as 'stem.*=W8A16'")
        found[pattern] = None if widths.lower() == _FLOAT else bits(widths)
    return found


def matches(pattern: str, node: fx.Node) -> bool:
    """Whether a pattern means this node: a glob over its value's name and the modules around it, or ``type:`` and a type."""
    if "value" not in node.meta:
        return False
    if pattern.startswith(_TYPE):
        return any(fnmatch.fnmatchcase(t, pattern.removeprefix(_TYPE)) for t in _types(node))
    return any(fnmatch.fnmatchcase(name, pattern) for name in _names(node))


def _names(node: fx.Node) -> Iterator[str]:
    """The value's name, and for an operation the paths of the modules that it lies in."""
    name = value_name(node)
    yield name
    if node.op == "call_function":
        path = name.partition(":")[0].partition("@")[0]
        yield path
        while "." in path:
            path = path.rpartition(".")[0]
            yield path


def _types(node: fx.Node) -> Iterator[str]:
    if node.op == "call_function":
        yield kind(node).value
        yield base_name(node)
        if kind(node) is Kind.CONV and is_depthwise(node):
            yield "depthwise"


def check_overrides(m: QModel, overrides: Overrides, target: Target) -> None:
    """Every pattern has to mean something, and every width has to exist. Raises :class:`PlacementError`."""
    nodes = list(tensors(m.graph))
    known = {n for node in nodes for n in _names(node)} | {f"{_TYPE}{t}" for node in nodes for t in _types(node)}
    for pattern, form in overrides.items():
        if not any(matches(pattern, node) for node in nodes):
            near = difflib.get_close_matches(pattern, sorted(known), 3)
            hint = "did you mean " + " or ".join(near) + "?" if near else "'halfbyte inspect' lists the names"
            raise PlacementError(f"the override '{pattern}' matches no value of the network: {hint}")
        for width in _widths(form):
            if width not in target.widths:
                raise PlacementError(
                    f"the override '{pattern}' asks for {width} bits; target {target.name} runs {target.widths[0]} to "
                    f"{target.widths[-1]}"
                )


def _widths(form: Format | Bits | None) -> tuple[int, ...]:
    if form is None:
        return ()
    return (form.bits,) if isinstance(form, Format) else (form.weights, form.activations)


def kept_in_float(node: fx.Node, overrides: Overrides) -> bool:
    """None for an operation or for its weight keeps the operation in float, whatever other patterns say."""
    involved = [node, *(n for n in tensor_inputs(node) if n.op == "get_attr")] if "value" in node.meta else []
    return any(form is None and any(matches(pattern, n) for n in involved) for pattern, form in overrides.items())


def apply_overrides(
    graph: fx.Graph, plan: dict[str, Format | None], ties: Mapping[str, str], overrides: Overrides
) -> list[LogEntry]:
    """Change the plan by each pattern in turn, and tell what became of each.

    A :class:`Format` counts for the values that the pattern matches. :class:`Bits` count for the layers that it matches: for
    their weights and for what they read; where it matches no layer, for the values themselves. Values on one grid change
    together.
    """
    log = []
    for pattern, form in overrides.items():
        changed: dict[str, int] = {}
        for name, width in _wanted(graph, pattern, form) if form is not None else ():
            root = ties.get(name, name)
            for value in (root, *(v for v, r in ties.items() if r == root)):
                if (before := plan.get(value)) is not None:
                    plan[value] = replace(before, bits=width)
                    changed[value] = width
        log += [LogEntry("override", v, f"{width} bits, as '{pattern}' asks") for v, width in changed.items()]
        if form is None:
            nodes = [n for n in tensors(graph) if n.op == "call_function" and kept_in_float(n, {pattern: None})]
            log += [LogEntry("override", value_name(n), f"in float, as '{pattern}' asks") for n in nodes]
        elif not changed:
            log.append(LogEntry("override", None, f"'{pattern}' changes nothing: what it matches is in float"))
    return log


def _wanted(graph: fx.Graph, pattern: str, form: Format | Bits) -> Iterator[tuple[str, int]]:
    """Value and width, for all that the pattern means."""
    if isinstance(form, Format):
        yield from ((value_name(n), form.bits) for n in tensors(graph) if fnmatch.fnmatchcase(value_name(n), pattern))
        return
    computing = {n for n in tensors(graph) if kind(n) is Kind.MATMUL} | set(layers(graph))
    meant = [n for n in tensors(graph) if matches(pattern, n)]
    tables = [table for n in meant if (table := table_of(n)) is not None]
    yield from ((value_name(table), form.weights) for table in tables)
    for layer in (n for n in meant if n in computing):
        weight = weight_of(layer)
        if weight is not None:
            yield value_name(weight), form.weights
        yield from ((value_name(n), form.activations) for n in activation_inputs(layer) if "value" in n.meta)
    if not computing & set(meant) and not tables:
        yield from ((value_name(n), form.weights if n.op == "get_attr" else form.activations) for n in meant)
