"""Visit every layer once, in graph order, with the float and the quantized network side by side.

Both streams are alive for all samples, but only at the frontier between what has run and what has not, so the cost is linear
in depth. Values beyond a memory budget lie in files that the operating system maps.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.affine import fake_quantize
from halfbyte.errors import DataError
from halfbyte.graph import LAYERS, layers, twin_of
from halfbyte.model import Inputs, QModel, value_name
from halfbyte.ops import CLAMP_CHANNELS, Kind, kind
from halfbyte.run import check_finite, check_given, evaluate_plainly, laid_out, last_uses

_aten = torch.ops.aten
_IN_PLACE: dict[Any, Any] = {
    _aten.relu.default: _aten.relu_.default,
    _aten.relu6.default: _aten.relu6_.default,
    _aten.hardtanh.default: _aten.hardtanh_.default,
    _aten.clamp.default: _aten.clamp_.default,
    _aten.clamp_min.default: _aten.clamp_min_.default,
    _aten.clamp_max.default: _aten.clamp_max_.default,
    CLAMP_CHANNELS: _aten.clamp_.Tensor,
}
_NEW = (*LAYERS, *_IN_PLACE)  # operations whose results share no memory with what they read
Frontier = Sequence[Tensor]
# model so far, layer, the layer's input in the quantized network and what it should put out, batch by batch -> model
Visit = Callable[[QModel, fx.Node, Frontier, Frontier], QModel]
# Progress: layers visited, layers in all, name of the layer.
Visited = Callable[[int, int, str], None]


class _Store:
    """Keeps tensors in memory up to a budget, and beyond it in files that are mapped instead of loaded."""

    def __init__(self, budget: int | None, folder: str) -> None:
        self.budget, self.folder, self.files = budget, folder, 0
        self.held = 0

    def keep(self, t: Tensor) -> Tensor:
        """The same values, perhaps in a file."""
        size = t.numel() * t.element_size()
        if self.budget is None or t.device.type != "cpu" or self.held + size <= self.budget or size < 1 << 16:
            self.held += size
            return t
        self.files += 1
        path = Path(self.folder) / f"{self.files}"
        mapped = torch.from_file(str(path), shared=True, size=t.numel(), dtype=t.dtype)
        mapped = mapped.as_strided(t.shape, torch.empty_like(t, device="meta").stride())  # channels last stay last
        mapped.copy_(t)
        path.unlink()  # the mapping keeps the data; nothing stays behind if the process ends
        return mapped

    def drop(self, t: Tensor) -> None:
        """Forget a kept tensor's size."""
        self.held = max(0, self.held - t.numel() * t.element_size())


def _segments(m: QModel) -> list[list[fx.Node]]:
    """The graph cut in front of every layer."""
    found: list[list[fx.Node]] = [[]]
    starts = set(layers(m.graph))
    for node in m.graph.nodes:
        if node in starts:
            found.append([])
        found[-1].append(node)
    return found


@torch.no_grad()
def walk(
    m: QModel,
    data: Iterable[Inputs],
    visit: Visit,
    *,
    quantized_inputs: bool = True,
    residual: bool = False,
    unrounded: bool = False,
    budget: int | None = None,
    progress: Visited | None = None,
) -> QModel:
    """Let ``visit`` see, and change, one layer after another.

    quantized_inputs: each layer sees what the network so far, quantized and changed, gives it; else what the float network
    does. residual: where an addition alone reads a layer, the layer should also make up for what the addition's other operand
    is off; else it should put out what it does in float. unrounded: what a layer alone reads (:func:`read_alone`) is handed
    over before its own grid rounds it, so that ``visit`` may choose the grid. budget: bytes of running values to hold in
    memory. A layer whose input is read in two parts is handed their sum. Parameters that ``visit`` puts in ``tuned`` count from
    its layer on. Returns what the last visit returned. Raises
    :class:`DataError` if there are no data.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = _Store(budget, folder)
        reference, stream = _Stream(m, store), _Stream(m, store, read_alone(m) if unrounded else frozenset())
        batches = [tuple(batch) for batch in data]
        if not batches:
            raise DataError("there are no data to work with")
        for batch in batches:
            check_given(m, batch)
            check_finite(m, batch)
        reference.start(len(batches))
        stream.start(len(batches))
        segments = _segments(m)
        for done, nodes in enumerate(segments):
            layer = nodes[0] if done else None
            outputs = None
            if layer is not None:
                outputs = [reference.evaluate(m.params, layer, i, None) for i in range(len(batches))]
                seen = stream if quantized_inputs else reference
                other = _other_operand(layer, stream) if residual and quantized_inputs else None
                wanted = outputs
                if other is not None:
                    wanted = [
                        (y + r[other]).sub_(q[other])
                        for y, r, q in zip(outputs, reference.values, stream.values, strict=True)
                    ]
                m = visit(m, layer, _read(layer, seen), wanted)
                del wanted
            remembered: dict[str, Tensor] = {}
            for i, batch in enumerate(batches):
                reference.advance(m.params, nodes, i, batch, None, remembered, outputs[i] if outputs else None)
                if quantized_inputs:
                    stream.advance(m.parameters, nodes, i, batch, m, remembered, None)
            if layer is not None and progress is not None:
                progress(done, len(segments) - 1, value_name(layer))
    return m


def _read(layer: fx.Node, seen: "_Stream") -> Frontier:
    """What a layer is given: its input, or the sum of the parts of it."""
    twin = twin_of(layer)
    if twin is None:
        return [env[layer.args[0]] for env in seen.values]  # type: ignore[index]
    return [env[layer.args[0]] + env[twin.args[0]] for env in seen.values]  # type: ignore[index]


def read_alone(m: QModel) -> frozenset[fx.Node]:
    """Values with a grid of their own that one layer alone reads."""
    every = set(layers(m.graph))
    roots = set(m.ties.values())

    def alone(node: fx.Node) -> bool:
        if node.op == "get_attr" or "value" not in node.meta or len(node.users) != 1:
            return False
        name, (reader,) = value_name(node), node.users
        own = name in m.grids and name not in m.ties and name not in roots
        return own and m.plan.get(name) is not None and reader in every and reader.args[0] is node

    return frozenset(n for n in m.graph.nodes if alone(n))


def _other_operand(layer: fx.Node, stream: "_Stream") -> fx.Node | None:
    """What an addition that alone reads the layer adds to it, if that is of the same shape and has been computed already."""
    twin = twin_of(layer)
    if twin is not None:  # the sum of both is what the layer puts out
        (layer,) = twin.users
    if len(layer.users) != 1:
        return None
    (reader,) = layer.users
    others = [n for n in reader.all_input_nodes if n is not layer]
    if kind(reader) is not Kind.ADD or len(others) != 1 or others[0] not in stream.values[0]:
        return None
    same = others[0].meta["shape"][1:] == layer.meta["shape"][1:]
    return others[0] if same and others[0].op != "get_attr" else None


class _Stream:
    """One of the two networks: the values at the frontier, for each batch."""

    def __init__(self, m: QModel, store: _Store, later: frozenset[fx.Node] = frozenset()) -> None:
        self.store, self.freed, self.device = store, last_uses(m.graph), m.device
        self.later = later  # rounded when they are read, not when they are made
        self.values: list[dict[fx.Node, Any]] = []

    def start(self, batches: int) -> None:
        """Empty frontiers."""
        self.values = [{} for _ in range(batches)]

    def evaluate(self, params: Any, node: fx.Node, i: int, quantize: QModel | None, known: Any = None) -> Any:
        """One operation on one batch, on its inputs at the frontier."""
        env = self.values[i]

        def load(n: fx.Node) -> Any:
            if n.op != "get_attr":
                return fake_quantize(env[n], quantize.grid(value_name(n))) if quantize and n in self.later else env[n]  # type: ignore[arg-type]
            value = params[str(n.target)]
            grid = quantize.grid(value_name(n)) if quantize is not None else None
            if grid is None:
                return value
            if str(n.target) not in known:
                known[str(n.target)] = fake_quantize(value, grid)
            return known[str(n.target)]

        args, kwargs = fx.map_arg(node.args, load), fx.map_arg(node.kwargs, load)
        # New memory costs more time than the comparison, and nobody else reads what the layer put out.
        source = node.args[0]
        if (
            node.target in _IN_PLACE
            and isinstance(source, fx.Node)
            and source.target in LAYERS
            and len(source.users) == 1
        ):
            return _IN_PLACE[node.target](*args, **kwargs)
        return evaluate_plainly(node, args, kwargs)

    def advance(
        self,
        params: Any,
        nodes: Sequence[fx.Node],
        i: int,
        batch: Inputs,
        quantize: QModel | None,
        known: dict[str, Tensor],
        first: Any,
    ) -> None:
        """Run the nodes on one batch and keep what later nodes need."""
        env, inputs = self.values[i], iter(batch)
        made: set[fx.Node] = set()
        for at, node in enumerate(nodes):
            if node.op == "output":
                return
            if node.op == "get_attr":
                continue
            if node.op == "placeholder":
                result = laid_out(next(inputs).to(self.device))
            elif at == 0 and first is not None:
                result = first
            else:
                result = self.evaluate(params, node, i, quantize, known)
            grid = quantize.grid(value_name(node)) if quantize is not None and "value" in node.meta else None
            if grid is not None and isinstance(result, Tensor) and node not in self.later:
                result = fake_quantize(result, grid, spent=node.target in _NEW)
            env[node] = result
            made.add(node)
            for dead in self.freed.get(node, ()):
                gone = env.pop(dead, None)
                if isinstance(gone, Tensor) and dead not in made:
                    self.store.drop(gone)
        for node in made & env.keys():
            if isinstance(env[node], Tensor):
                env[node] = self.store.keep(env[node])
