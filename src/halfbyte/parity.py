"""The exported file against the integer simulation, value by value, in the engine and with all its optimizations."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, fx

from halfbyte import engine
from halfbyte.graph import output_values
from halfbyte.integer import FLOAT_WRITERS, run_integer, run_simulated, runs_in_integers
from halfbyte.model import Inputs, QModel
from halfbyte.ops import DEQUANTIZE, QUANTIZE
from halfbyte.prove import FLOAT_TOLERANCE, exposed, seen_name
from halfbyte.run import filled, fixed_batch
from halfbyte.sessions import PROVIDER
from halfbyte.shown import Shown

_BATCH = 4  # samples of which all values are held at once


@dataclass(frozen=True)
class Difference:
    """The first value that differs: its name, where, and what was expected."""

    value: str
    expected: float
    got: float
    count: int

    def __str__(self) -> str:
        return f"value '{self.value}' differs in {self.count} elements: expected {self.expected:g}, the engine computed {self.got:g}"


@dataclass(frozen=True, repr=False)
class Parity(Shown):
    """What was compared, and the verdict.

    integer_values, integer_elements, integer_mismatches: values written by integer kernels; none may differ. float_values,
    float_max_steps: quantized values behind float operations, and the largest distance in steps of their grid (at most 1).
    output_max_difference: of the network's outputs, absolute. simulation_agreement: share of samples on which the float
    simulation takes the same decision (largest output) as the file. kernels, float_nodes: what the engine really runs.

    An engine that rounds in another order (OpenVINO) may be one step away: integer_max_steps is the largest distance, differing
    the values concerned, each with its count of elements and largest distance; observed_alike says whether the copy of the file
    in which they were observed gives the same bits as the file (further outputs can make the engine order a sum differently).
    """

    proven: bool
    engine_version: str
    instruction_set: str
    samples: int
    integer_values: int = 0
    integer_elements: int = 0
    integer_mismatches: int = 0
    float_values: int = 0
    float_max_steps: int = 0
    output_max_difference: float = 0.0
    simulation_agreement: float = 1.0
    simulation_max_difference: float = 0.0
    first_difference: Difference | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    float_nodes: tuple[tuple[str, str], ...] = ()
    engine_name: str = "ONNX Runtime"
    provider: str = PROVIDER
    integer_max_steps: int = 0
    differing: tuple[tuple[str, int, int], ...] = ()
    observed_alike: bool = True

    def __str__(self) -> str:
        where = f"{self.engine_name} {self.engine_version} ({self.provider}, {self.instruction_set})"
        if not self.proven:
            return f"not proven on {where}: {self.first_difference or 'no samples'}"
        more = f" and {self.float_values} rounded from float" if self.float_values else ""
        compared = (
            f"{self.integer_values} integer values{more}, {self.integer_elements} elements on {self.samples} samples"
        )
        if not self.integer_mismatches:
            return f"proven equal on {where}: {compared}, no difference"
        names = ", ".join(name for name, _, _ in self.differing[:3]) + (", ..." if len(self.differing) > 3 else "")
        return (
            f"proven within {self.integer_max_steps} step on {where}: {compared}; {self.integer_mismatches} elements of "
            f"{len(self.differing)} values differ ({names}), {self.simulation_agreement:.2%} of the decisions are equal"
            + ("" if self.observed_alike else " (observed in a copy of the file that orders some sums differently)")
        )


@dataclass
class _Count:
    integer: set[str] = field(default_factory=set)
    floats: set[str] = field(default_factory=set)
    elements: int = 0
    mismatches: int = 0
    steps: int = 0
    output: float = 0.0
    first: Difference | None = None

    def note(self, name: str, expected: Tensor, got: Tensor, wrong: Tensor) -> None:
        """Remember the first difference."""
        if self.first is None:
            at = int(wrong.flatten().nonzero()[0])
            self.first = Difference(name, float(expected.flatten()[at]), float(got.flatten()[at]), int(wrong.sum()))


def codes_name(value: str) -> str:
    """The name in the file of the tensor that holds a value's codes."""
    return f"{value}:codes"


def integer_written(low: QModel) -> set[str]:
    """Values whose codes an integer kernel writes."""
    names = set()
    for node in low.graph.nodes:
        if node.target is QUANTIZE and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            if len(source.users) == 1 and runs_in_integers(source):
                names.add(str(node.args[4]).removesuffix(":unclipped"))
    return names


def compare(low: QModel, path: Path, samples: Inputs) -> Parity:
    """Run the file on the samples and compare every quantized value with the integer evaluation of ``low``.

    Each region is evaluated on the engine's own inputs, so that the rounding of one float operation cannot spread.
    """
    data = path.read_bytes()
    names = coded_values(data)
    plain, instrumented = engine.session(data), engine.session(exposed(data, names))
    kernels, floats = engine.kernels(engine.optimized_graph(data))
    count, written = _Count(), integer_written(low)
    batches = at_once(low, plain, samples)
    agreed, farthest, total = 0, 0.0, sum(len(batch[0]) for batch in batches)
    for batch in batches:
        outputs = engine.infer(plain, batch)
        values = dict(zip([o.name for o in instrumented.get_outputs()], engine.infer(instrumented, batch), strict=True))
        for name, a in zip(low.outputs, outputs, strict=True):
            _same_bits(count, name, a, values[name])
        codes = {v: torch.from_numpy(values[seen_name(v)].astype(np.float32)) for v in names}
        forced = run_integer(low, batch, _comparing(count, codes, written))
        _compare_outputs(count, low, forced, outputs)
        simulated = run_simulated(low, batch)
        agreed += same_decisions(simulated[0], torch.from_numpy(outputs[0]))
        farthest = max(
            farthest,
            *(
                float((s.double() - torch.from_numpy(o).double()).abs().max())
                for s, o in zip(simulated, outputs, strict=True)
            ),
        )
    return Parity(
        proven=count.first is None and total > 0,
        engine_version=ort.__version__,
        instruction_set=engine.instruction_set(),
        samples=len(samples[0]),
        integer_values=len(count.integer),
        integer_elements=count.elements,
        integer_mismatches=count.mismatches,
        float_values=len(count.floats),
        float_max_steps=count.steps,
        output_max_difference=count.output,
        simulation_agreement=agreed / max(total, 1),
        simulation_max_difference=farthest,
        first_difference=count.first,
        kernels=dict(kernels),
        float_nodes=tuple(floats),
    )


def at_once(low: QModel, file: Any, samples: Inputs) -> list[Inputs]:
    """The samples in portions for a file's session: as many as it takes where it fixes the batch, some of them again in the last.

    No more even where it could be run several times: not every value has its samples along the first dimension.
    """
    fixed = engine.fixed_batch(file) if low.dynamic else fixed_batch(low)
    samples = filled(samples, fixed or 1)
    step = fixed or (_BATCH if low.dynamic else len(samples[0]))
    return [tuple(t[i : i + step] for t in samples) for i in range(0, len(samples[0]), step)]


def coded_values(data: bytes) -> list[str]:
    """Names of the values whose codes a file holds, in the order of its nodes."""
    nodes = onnx.load_from_string(data).graph.node
    written = [o for n in nodes if n.op_type in ("QuantizeLinear", "Clip", "Min") for o in n.output]
    suffix = codes_name("")
    return [o.removesuffix(suffix) for o in written if o.endswith(suffix)]


def _same_bits(count: _Count, name: str, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    """Looking at values must not change them: the file with further outputs computes what the file itself computes."""
    if not np.array_equal(a, b):
        x, y = torch.from_numpy(a), torch.from_numpy(b)
        count.note(f"{name} (with intermediate values exposed)", x, y, x != y)


def _comparing(count: _Count, codes: dict[str, Tensor], written: set[str]) -> Any:
    """The tap that compares codes with the engine's and goes on with the engine's."""

    def tap(name: str, x: Tensor) -> Tensor:
        got = codes.get(name)
        if got is None:
            return x
        distance = (x - got).abs()
        if name in written:
            count.integer.add(name)
            count.elements += x.numel()
            wrong = distance > 0
            count.mismatches += int(wrong.sum())
        else:
            count.floats.add(name)
            count.steps = max(count.steps, int(distance.max())) if x.numel() else count.steps
            wrong = distance > 1
        if bool(wrong.any()):
            count.note(name, x, got, wrong)
        return got

    return tap


def _compare_outputs(count: _Count, low: QModel, expected: tuple[Tensor, ...], got: list[np.ndarray[Any, Any]]) -> None:
    """Outputs that come straight from an integer kernel are equal; those of float operations to rounding."""
    nodes = output_values(low.graph)
    for node, name, x, array in zip(nodes, low.outputs, expected, got, strict=True):
        y = torch.from_numpy(array)
        if x.shape != y.shape:
            count.first = count.first or Difference(
                f"{name} (shape {list(y.shape)} for {list(x.shape)})", 0, 0, y.numel()
            )
            continue
        distance = (x.double() - y.double()).abs()
        count.output = max(count.output, float(distance.max())) if x.numel() else count.output
        exact = from_integers(node)
        tolerance = 0.0 if exact else FLOAT_TOLERANCE * float(y.double().abs().max().clamp(min=1e-6))
        wrong = distance > tolerance
        if exact and node.target is not DEQUANTIZE:  # whose codes are compared as a value
            count.integer.add(name)
            count.elements += x.numel()
            count.mismatches += int(wrong.sum())
        if bool(wrong.any()):
            count.note(name, x, y, wrong)


def from_integers(node: fx.Node) -> bool:
    """The value is dequantized codes, moved at most, or what an integer kernel wrote as floats."""
    if node.target is DEQUANTIZE:
        return True
    return node.target in FLOAT_WRITERS and runs_in_integers(node)


def same_decisions(a: Tensor, b: Tensor) -> int:
    """Samples whose largest output is at the same place in both; of indices and truth values, that are the same."""
    if a.ndim < 2:
        return int((a == b).sum()) if a.ndim == 1 else len(a) if a.ndim else 1
    if not a.is_floating_point():
        return int((a == b).flatten(1).all(1).sum())
    return int((a.flatten(1).argmax(1) == b.flatten(1).argmax(1)).sum())
