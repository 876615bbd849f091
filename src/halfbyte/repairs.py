"""Repairs that a diagnosis tries, one by one: what each would do to the noise at the outputs."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import fx

from halfbyte.calibrate import calibrate, regridded
from halfbyte.correct import correct_bias
from halfbyte.descent import Descent
from halfbyte.diagnosis import Repair
from halfbyte.errors import HalfbyteError
from halfbyte.graph import by_value, layers, weight_of
from halfbyte.grids import MSE, from_range
from halfbyte.model import Inputs, QModel, editable, value_name
from halfbyte.ops import REQUANTIZE
from halfbyte.place import place
from halfbyte.probes import Bench, Seen
from halfbyte.reconstruct import reconstruct
from halfbyte.transforms.equalize import equalize

_WIDE = 16


def attempts(
    m: QModel, fit: list[Inputs], seen: Mapping[str, Seen], worst: list[str]
) -> dict[str, Callable[[], QModel]]:
    """Name -> what makes the repaired model. fit: samples to fit on; worst: values by what they cost alone."""
    nodes = by_value(m.graph)
    found: dict[str, Callable[[], QModel]] = {
        "ranges of least error": lambda: regridded(
            m, {v: s.best_grid for v, s in seen.items() if m.grids[v].lo.ndim == 0}
        ),
        "bias correction": lambda: correct_bias(m, fit),
    }
    if any(f is not None and f.axis is None for n, f in m.plan.items() if n in _weights(m)):
        found["weights per channel"] = lambda: _by_channel(m, fit)
    found["equalization"] = lambda: _equalized(m, fit)
    running = next((v for v in worst if v in seen), None)
    if running is not None:
        found[f"16 bits for {running}"] = lambda: _wide(m, running, seen[running])
    layer = next((n for v in worst for n in _layers_of(m, nodes, v)), None)
    if layer is not None:
        found[f"float for {layer}"] = lambda: _in_float(m, layer)
    found["weights by descent"] = lambda: reconstruct(m, fit, Descent())
    return found


def tried(name: str, attempt: Callable[[], QModel], b: Bench, before: float) -> Repair:
    """The repair with its figures, or with the reason why it could not be tried."""
    try:
        return Repair(name, before, b.quantized(attempt()).noise)
    except HalfbyteError as error:
        return Repair(name, before, None, str(error))
    except (RuntimeError, ValueError, KeyError, IndexError, AssertionError, TypeError) as error:
        return Repair(name, before, None, f"{type(error).__name__}: {error}")


def _weights(m: QModel) -> set[str]:
    return {value_name(w) for n in layers(m.graph) if (w := weight_of(n)) is not None}


def _layers_of(m: QModel, nodes: Mapping[str, fx.Node], value: str) -> list[str]:
    """The layers that read a value, as weight or as input."""
    if value not in nodes:
        return []
    return [value_name(u) for u in nodes[value].users if u in set(layers(m.graph))]


def _by_channel(m: QModel, fit: list[Inputs]) -> QModel:
    plan, grids = dict(m.plan), dict(m.grids)
    for layer in layers(m.graph):
        weight = weight_of(layer)
        form = None if weight is None else plan.get(value_name(weight))
        if weight is not None and form is not None and form.axis is None:
            plan[value_name(weight)] = replace(form, axis=0)
            grids[value_name(weight)] = MSE().weight(m.params[str(weight.target)], replace(form, axis=0), pairs=False)
    return correct_bias(replace(m, plan=plan, grids=grids), fit)


def _equalized(m: QModel, fit: list[Inputs]) -> QModel:
    """Quantized again from the float network, equalized first, to the same widths."""
    assert m.target is not None  # it has grids
    graph = editable(m.graph)
    for node in list(graph.nodes):
        if node.target is REQUANTIZE:
            node.replace_all_uses_with(node.args[0], propagate_meta=False)
            graph.erase_node(node)
    weights = _weights(m)
    narrow = [
        min(f.bits for v, f in m.plan.items() if f is not None and (v in weights) is inside) for inside in (True, False)
    ]
    fresh = replace(m.as_float(), graph=graph)
    equal = equalize(fresh, fit, per_channel=m.target.per_channel, weight_bits=narrow[0], activation_bits=narrow[1])
    kept = {
        e.value: None
        for e in m.log
        if e.stage == "place" and e.message.endswith("kept in float on request") and e.value
    }
    placed = place(equal, m.target, weight_bits=narrow[0], activation_bits=narrow[1], uniform=False, overrides=kept)
    return calibrate(placed, fit)


def _wide(m: QModel, value: str, s: Seen) -> QModel:
    form = m.plan[value]
    assert form is not None  # it has a grid
    grid = from_range(s.histogram.minimum, s.histogram.maximum, replace(form, bits=_WIDE))
    grids = {k: g for k, g in m.grids.items() if m.ties.get(k) != value}
    return replace(m, grids={**grids, value: grid}, plan={**m.plan, value: replace(form, bits=_WIDE)})


def _in_float(m: QModel, name: str) -> QModel:
    """One layer's weight and input without grids, and its parameters as they were."""
    layer = by_value(m.graph)[name]
    weight, x = weight_of(layer), layer.args[0]
    assert weight is not None and isinstance(x, fx.Node)  # it is a layer
    root = m.ties.get(value_name(x), value_name(x))
    gone = {value_name(weight), root, *(v for v, r in m.ties.items() if r == root)}
    own = {str(a.target) for a in layer.args if isinstance(a, fx.Node) and a.op == "get_attr"}
    return replace(
        m,
        grids={k: g for k, g in m.grids.items() if k not in gone},
        ties={k: r for k, r in m.ties.items() if k not in gone},
        tuned={k: t for k, t in m.tuned.items() if k not in own},
    )
