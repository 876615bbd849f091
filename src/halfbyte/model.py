"""The central data: a :class:`QModel` and what it is made of. Everything here is frozen; every stage returns a new one."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.affine import Grid
from halfbyte.formats import Format
from halfbyte.shown import Shown, plain, text

Params = Mapping[str, Tensor]
Plan = Mapping[str, Format | None]
Inputs = tuple[Tensor, ...]
Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]  # of inputs, in order or by name
Outputs = tuple[Tensor, ...]
Tap = Callable[[str, Tensor], Tensor]


def _empty() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation, [channels], of the value that a folded batch norm put out (its beta and gamma)."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class LogEntry:
    """One decision: the stage that took it, the value it concerns (or None), and what was done and why; ``figures`` as data."""

    stage: str
    value: str | None
    message: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.stage}: {self.value + ': ' if self.value else ''}{self.message}"


@dataclass(frozen=True)
class Target:
    """What an inference engine can run in integers, as data.

    integer: kinds of operation (``Kind.value``) with an integer kernel. float_output: those whose kernel may write floats, so
    that no quantizer is needed behind them.
    per_channel: one weight scale for each output channel. narrow_products: on CPUs that add pairs of 8-bit products in 16
    bits, weights are held so small that no pair can saturate. fused_sums: a layer adds another value before it rounds, so that its
    own result has no codes. rounded_averages: an average over windows of codes is written as codes, whoever reads it.
    asymmetric_weights: of few bits, they may have zero-points; the engine multiplies codes less zero-point, which fit its 8 bits.
    bias_bits: how biases are stored. engine: who runs and proves the file.
    """

    name: str
    engine: str
    integer: frozenset[str]
    float_output: frozenset[str] = frozenset()
    per_channel: bool = True
    widths: tuple[int, ...] = tuple(range(2, 17))
    narrow_products: bool = False
    signed_activations: bool = False
    fused_sums: bool = False
    rounded_averages: bool = False
    asymmetric_weights: bool = False
    bias_bits: int = 32


@dataclass(frozen=True, repr=False)
class QModel(Shown):
    """A network on its way to integers.

    graph: ATen operations; each tensor node carries ``meta["value"]`` (its stable name), ``shape`` and ``dtype``. params:
    float parameters and buffers by name. tuned: parameters that an optimiser has replaced. plan: value -> format, or None for
    an explicit "stays in float". ties: value -> the value whose grid it shares. grids: value -> grid. moments: value ->
    batch-norm moments. log: what was done and why. outputs: names of the network's outputs. dynamic: the batch size is free.
    target: what the plan was made for. samples: a few calibration inputs, on which an exported file is proven.
    calibrated: how many samples the grids were chosen on.
    """

    graph: fx.Graph
    params: Params
    outputs: tuple[str, ...]
    dynamic: bool = True
    tuned: Params = field(default_factory=_empty)
    plan: Plan = field(default_factory=_empty)
    ties: Mapping[str, str] = field(default_factory=_empty)
    grids: Mapping[str, Grid] = field(default_factory=_empty)
    moments: Mapping[str, Moments] = field(default_factory=_empty)
    log: tuple[LogEntry, ...] = ()
    target: Target | None = None
    samples: Inputs = ()
    calibrated: int = 0

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Parameters as the network now has them: the tuned ones over the float ones."""
        return {**self.params, **self.tuned}

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The network's inputs in order."""
        return tuple(n for n in self.graph.nodes if n.op == "placeholder")

    def as_float(self) -> "QModel":
        """The float reference: no plan, no grids, nothing tuned."""
        return replace(self, tuned={}, plan={}, ties={}, grids={}, target=None)

    def grid(self, value: str) -> Grid | None:
        """The grid of a value, through its tie; None where it has none."""
        return self.grids.get(value) or self.grids.get(self.ties.get(value, ""))

    def logged(self, *entries: LogEntry) -> "QModel":
        """The same model with more log."""
        return replace(self, log=(*self.log, *entries))

    def __str__(self) -> str:
        return text({k: v for k, v in self.facts().items() if k != "values"})

    def facts(self) -> dict[str, Any]:
        """Ports, target, how many values have which format, and a row for each of them."""
        formats = Counter("float" if f is None else str(f) for f in self.plan.values())
        rows = [row for row in self._values() if row["format"] is not None]
        known = {
            "inputs": ", ".join(f"{n.target} {list(n.meta['shape'])}" for n in self.inputs),
            "outputs": ", ".join(self.outputs),
            "parameters": sum(t.numel() for t in self.params.values()),
            "target": self.target.name if self.target else None,
            "formats": ", ".join(f"{count} {name}" for name, count in formats.items()),
            "calibrated on": f"{self.calibrated} samples" if self.calibrated else None,
            "warnings": "; ".join(e.message for e in self.log if e.message.startswith("WARNING")),
            "verdict": next((e.message for e in reversed(self.log) if e.stage == "search"), None),
            "values": rows,
        }
        return {k: v for k, v in known.items() if v}

    def to_dict(self) -> dict[str, Any]:
        """JSON values: ports, values with their formats and ranges, the log; no parameters."""
        return {
            "inputs": [{"name": str(n.target), "shape": plain(n.meta["shape"])} for n in self.inputs],
            "outputs": list(self.outputs),
            "target": self.target.name if self.target else None,
            "calibrated": self.calibrated,
            "values": self._values(),
            "log": plain(self.log),
        }

    def _values(self) -> list[dict[str, Any]]:
        """A row for each value of the plan: name, shape, format, and the ends of its grid."""
        shapes = {value_name(n): plain(n.meta.get("shape")) for n in self.graph.nodes if "value" in n.meta}
        rows = []
        for name, form in self.plan.items():
            grid = None if form is None else self.grid(name)
            row = {"name": name, "shape": shapes.get(name), "format": None if form is None else str(form)}
            ends = (None, None) if grid is None else (float(grid.minimum.min()), float(grid.maximum.max()))
            rows.append({**row, "minimum": ends[0], "maximum": ends[1]})
        return rows

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return next((t.device for t in self.params.values()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> "QModel":
        """The same model on another device."""
        graph = self.graph
        if any(n.kwargs.get("device") is not None for n in graph.nodes):  # operations that make tensors
            graph = editable(graph)
            for n in graph.nodes:
                if n.kwargs.get("device") is not None:
                    n.kwargs = {**n.kwargs, "device": torch.device(device)}
        return replace(
            self,
            graph=graph,
            params={k: v.to(device) for k, v in self.params.items()},
            tuned={k: v.to(device) for k, v in self.tuned.items()},
            grids={k: g.to(device) for k, g in self.grids.items()},
            moments={k: Moments(v.mean.to(device), v.std.to(device)) for k, v in self.moments.items()},
            samples=tuple(t.to(device) for t in self.samples),
        )


def editable(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes carry copies of the metadata."""
    new = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = new.graph_copy(graph, copied)
    output = new.output(result)
    output.meta = dict(next(n for n in graph.nodes if n.op == "output").meta)
    return new


def value_name(node: fx.Node) -> str:
    """The stable name of a node's value."""
    return str(node.meta["value"])
