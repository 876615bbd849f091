"""What ``quantize`` would do, before it does it: formats, what stays in float and why, sizes, memory and time. No data is run."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import fx

from halfbyte.budgets import Budget
from halfbyte.data import Source
from halfbyte.export_onnx import Container, example_inputs
from halfbyte.formats import Bits
from halfbyte.graph import extent, layers, macs, tensors, weight_of
from halfbyte.job import chosen_recipe
from halfbyte.model import LogEntry, QModel, Target, value_name
from halfbyte.ops import base_name, is_tensor, kind
from halfbyte.overrides import Overrides, parse_overrides
from halfbyte.pipeline import choice_of, recipe_for
from halfbyte.place import place
from halfbyte.preprocess import Preprocess
from halfbyte.quantize import Network, captured, widths_of
from halfbyte.recipe import Recipe
from halfbyte.run import run
from halfbyte.settings import Settings, network_of
from halfbyte.shown import Shown, aligned, scaled
from halfbyte.sizes import sizes
from halfbyte.targets import here
from halfbyte.transforms.fold_batchnorm import fold_batchnorm

_PROOF_SAMPLES = 16
# Measured on ResNet20, MobileNetV2 and ResNet50: float passes for each sample, more of them where a recipe solves layers, and
# for each sample of the proof; seconds of export for an operation; bytes held for a parameter, and for a running value.
_PASSES, _SOLVING, _PROOF_PASSES = 2.0, 5.0, 5.0
_EXPORT_SECONDS = 0.03
_PARAMETER_COPIES, _COPIES = 5, 3.0


@dataclass(frozen=True)
class LayerPlan:
    """One layer: widths (32 is float), multiply-accumulates, bytes of its weight in the file, and why it is not in integers."""

    name: str
    op: str
    shape: tuple[int, ...]
    weight_bits: int
    activation_bits: int
    macs: int
    bytes: int
    reason: str | None


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What would be done.

    float_left: operations computed in float, with the reason. overrides: values that a pattern of the user's changed, with what
    they get. bytes: float_bytes of the network's parameters, logical_bytes at the widths asked for, file_bytes of the ONNX file
    (estimated within some percent). memory_bytes and seconds: estimates for this machine, to a factor of about two.
    """

    target: str
    recipe: str
    layers: tuple[LayerPlan, ...]
    float_left: tuple[tuple[str, str, str], ...]
    overrides: tuple[str, ...]
    float_bytes: int
    logical_bytes: int
    file_bytes: int
    memory_bytes: int
    seconds: float

    def __str__(self) -> str:
        rows = [
            (r.name, r.op, "x".join(map(str, r.shape)), _widths(r), f"{r.macs:,}", f"{r.bytes:,}", r.reason or "")
            for r in self.layers
        ]
        table = [("layer", "op", "weight", "bits", "MACs", "bytes", ""), *rows]
        lines = [aligned(table)]
        counts = Counter(_widths(r) for r in self.layers)
        lines += [f"override: {text}" for text in self.overrides]
        lines += [f"in float: {name} ({op}): {reason}" for name, op, reason in self.float_left]
        lines.append(
            f"{len(self.layers)} layers for {self.target}, recipe {self.recipe}: "
            + ", ".join(f"{n} in {w}" for w, n in counts.items())
            + f"; {len(self.float_left)} operations in float"
        )
        sizes = [scaled(n, "B") for n in (self.float_bytes, self.logical_bytes, self.file_bytes)]
        lines.append(f"weights {sizes[0]} in float, {sizes[1]} logical, file about {sizes[2]}")
        lines.append(
            f"about {self.memory_bytes / 2**30:.1f} GiB of memory and {_duration(self.seconds)}; nothing was run or written"
        )
        return "\n".join(lines)


def _widths(r: LayerPlan) -> str:
    if r.weight_bits == r.activation_bits == 32:
        return "float"
    return "W{}A{}".format(*("float" if b == 32 else b for b in (r.weight_bits, r.activation_bits)))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def plan(
    network: Network,
    calibration: Source | None = None,
    *,
    target: str | Target = "onnxruntime",
    recipe: str | Recipe | None = None,
    bits: str | Bits | None = None,
    weight_bits: int | Sequence[int] | None = None,
    activation_bits: int | Sequence[int] | None = None,
    budget: Budget | str | None = None,
    overrides: Overrides | None = None,
    keep_float: Sequence[str] = (),
    sets: Sequence[str] = (),
    preprocess: Preprocess | None = None,
    uniform: bool = False,
    samples: int = 256,
    batch: int = 32,
    container: Container = "packed",
    checkpoint: str | None = None,
    trust: bool = False,
) -> Plan:
    """What :func:`quantize` would do with these options, which mean what they mean there, before it is done: ``--dry-run``.

    One noise input is run through the float network to learn how long a pass takes; of the calibration data only the first
    samples are read, and only to capture a module. Raises what :func:`quantize` would for options and networks that make no sense.
    """
    choice, _ = choice_of(*widths_of(bits, weight_bits, activation_bits), budget)
    followed = recipe_for(recipe, data=calibration is not None, choice=choice)
    start = time.perf_counter()
    m = captured(network, calibration, checkpoint=checkpoint, trust=trust, preprocess=preprocess)
    return _planned(
        m,
        followed,
        here(target),
        Bits(min(choice.weights), min(choice.activations)),
        overrides={**parse_overrides(tuple(keep_float), tuple(sets)), **(overrides or {})},
        uniform=uniform,
        samples=samples if calibration is not None else None,
        batch=batch,
        container=container,
        captured_in=time.perf_counter() - start,
    )


def plan_job(settings: Settings) -> Plan:
    """The same for the settings of a command."""
    recipe = chosen_recipe(settings)
    start = time.perf_counter()
    m = network_of(settings)
    return _planned(
        m,
        recipe,
        here(settings.target),
        settings.narrowest,
        overrides=settings.overrides,
        uniform=settings.uniform,
        samples=settings.samples if settings.calibration is not None else None,
        batch=settings.batch,
        container=settings.container,
        captured_in=time.perf_counter() - start,
    )


def _planned(
    m: QModel,
    recipe: Recipe,
    target: Target,
    bits: Bits,
    *,
    overrides: Overrides,
    uniform: bool,
    samples: int | None,
    batch: int,
    container: Container,
    captured_in: float,
) -> Plan:
    base = fold_batchnorm(m)
    wide = {"weight_bits": bits.weights, "activation_bits": bits.activations}
    placed = place(base, target, uniform=uniform, overrides=overrides, **wide)  # type: ignore[arg-type]
    size = sizes(placed, container)
    rows = tuple(_layer(placed, n) for n in layers(placed.graph))
    pass_seconds, live = _cost_of_a_pass(base)
    samples = 4 if samples is None else samples
    solving = recipe.has("reconstruct")
    passes = samples * (_PASSES + (_SOLVING if solving else 0)) + _PROOF_SAMPLES * _PROOF_PASSES
    weights = sum(t.numel() * t.element_size() for t in base.params.values())
    return Plan(
        target=placed.target.name if placed.target else "",
        recipe=recipe.name,
        layers=rows,
        float_left=tuple(_in_float(placed, e) for e in placed.log if e.message.startswith("computed in float")),
        overrides=tuple(
            f"{e.value}: {e.message}" if e.value else e.message for e in placed.log if e.stage == "override"
        ),
        float_bytes=sum(t.numel() * t.element_size() for t in m.params.values()),
        logical_bytes=size.logical_bytes,
        file_bytes=size.file_bytes,
        memory_bytes=int(
            psutil.Process().memory_info().rss + _PARAMETER_COPIES * weights + _COPIES * live * min(batch, samples)
        ),
        seconds=captured_in + pass_seconds * passes + _EXPORT_SECONDS * size.operations,
    )


def _layer(m: QModel, node: fx.Node) -> LayerPlan:
    weight, source = weight_of(node), node.args[0]
    assert weight is not None  # layers() lists those with a constant weight
    form = m.plan.get(value_name(weight))
    read = m.plan.get(value_name(source)) if isinstance(source, fx.Node) and "value" in source.meta else None
    w = m.params[str(weight.target)]
    bits = form.bits if form else 32
    names = (value_name(node), value_name(weight))
    why = next((e.message for e in m.log if e.stage == "place" and e.value in names), None)
    stored = (
        w.numel() * 4 if form is None else (w.numel() + 1) // 2 if bits <= 4 else w.numel() * (1 if bits <= 8 else 2)
    )
    return LayerPlan(
        names[0], kind(node).value, tuple(w.shape), bits, read.bits if read else 32, macs(node), stored, why
    )


def _in_float(m: QModel, entry: LogEntry) -> tuple[str, str, str]:
    node = next((n for n in tensors(m.graph) if value_name(n) == entry.value), None)
    op = base_name(node) if node is not None and node.op == "call_function" else ""
    return str(entry.value), op, entry.message.removeprefix("computed in float: ")


def _cost_of_a_pass(m: QModel) -> tuple[float, int]:
    """Seconds of a float pass for one sample, and the most bytes of running values that are alive at once."""
    inputs = example_inputs(m)
    rows = len(inputs[0])
    last = {source: node for node in m.graph.nodes for source in node.all_input_nodes}
    order, alive, most = {n: i for i, n in enumerate(m.graph.nodes)}, 0, 0
    gone: dict[int, int] = {}
    for i, node in enumerate(m.graph.nodes):
        if is_tensor(node) and node.op != "get_attr":
            size = _bytes(node)
            alive += size
            gone[order[last.get(node, node)]] = gone.get(order[last.get(node, node)], 0) + size
            most = max(most, alive)
        alive -= gone.get(i, 0)
    with torch.inference_mode():
        run(m, inputs)
        start = time.perf_counter()
        run(m, inputs)
    return (time.perf_counter() - start) / rows, most


def _bytes(node: fx.Node) -> int:
    """Of a value for one sample, in float32."""
    return 4 * math.prod(map(extent, node.meta["shape"]))
