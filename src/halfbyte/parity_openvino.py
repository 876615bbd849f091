"""The exported file in OpenVINO against the integer simulation.

OpenVINO sums products in integers and requantizes in float32, as the integer evaluation does for it. Where a layer alone goes into
a sum, the engine adds before it rounds (``Target.fused_sums``); in the copy of the file in which values are seen it may add the
two operands the other way round, so that a number close to a tie ends one step away. The claim is therefore: every value, on the
engine's own inputs to it, is equal or one step away, and the values that differ are named and counted.

Values are seen as the real numbers that later operations read: reading the codes themselves would break the engine's fusions.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from halfbyte import engine, engine_openvino
from halfbyte.graph import output_values
from halfbyte.integer import run_integer
from halfbyte.model import Inputs, QModel
from halfbyte.ops import DEQUANTIZE, QUANTIZE
from halfbyte.parity import Difference, Parity, at_once, same_decisions
from halfbyte.prove import FLOAT_TOLERANCE

# A tie is rare: a larger share of elements one step away is another arithmetic, not rounding.
_LARGEST_SHARE = 0.01
# Where the values could only be seen in a copy that rounds differently, the file itself must still decide as the simulation does.
_LEAST_AGREEMENT = 0.9


@dataclass
class _Seen:
    """What was compared, by value: elements, elements that differ, largest distance in steps."""

    elements: dict[str, int] = field(default_factory=dict)
    differing: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    example: dict[str, tuple[float, float]] = field(default_factory=dict)
    output: float = 0.0
    wrong: Difference | None = None

    def add(self, name: str, expected: Tensor, got: Tensor) -> None:
        distance = (expected - got).abs().nan_to_num(nan=float("inf"))
        different = distance > 0
        self.elements[name] = self.elements.get(name, 0) + got.numel()
        self.differing[name] = self.differing.get(name, 0) + int(different.sum())
        farthest = float(distance.max()) if got.numel() else 0.0
        self.steps[name] = max(self.steps.get(name, 0), int(min(farthest, 1e9)))
        if bool(different.any()) and name not in self.example:
            at = int(distance.flatten().argmax())
            self.example[name] = float(expected.flatten()[at]), float(got.flatten()[at])

    def verdict(self) -> Difference | None:
        """The first value that is farther away, or more often, than rounding explains."""
        for name, count in self.differing.items():
            if self.steps[name] > 1 or count > max(2, _LARGEST_SHARE * self.elements[name]):
                return Difference(name, *self.example[name], count)
        return self.wrong


def readable(low: QModel) -> dict[str, fx.Node]:
    """Values that are read as codes: name -> the node of the lowered graph that dequantizes them."""
    return {
        str(n.args[6]): n
        for n in low.graph.nodes
        if n.target is DEQUANTIZE and isinstance(n.args[0], fx.Node) and n.args[0].op != "get_attr"
    }


def _written(low: QModel) -> dict[str, fx.Node]:
    """Values that are written as codes: name -> the node of the lowered graph that quantizes them."""
    return {str(n.args[4]): n for n in low.graph.nodes if n.target is QUANTIZE}


def compare_openvino(low: QModel, path: Path, samples: Inputs) -> Parity:
    """Run the file on the samples and compare every value that is read as codes with the integer evaluation of ``low``."""
    data = path.read_bytes()
    plain = engine_openvino.session(data)
    exposed, names = _expose(data, {*readable(low), *_written(low)})
    instrumented = engine_openvino.session(exposed)
    batches = at_once(low, plain, samples)
    seen, agreed, farthest, alike, total = _Seen(), 0, 0.0, True, sum(len(batch[0]) for batch in batches)
    for batch in batches:
        outputs = [torch.from_numpy(a) for a in engine.infer(plain, batch)]
        got = engine.infer(instrumented, batch, [*low.outputs, *names.values()])
        looked = [torch.from_numpy(a) for a in got[: len(outputs)]]
        alike &= all(torch.equal(a, b) for a, b in zip(outputs, looked, strict=True))
        real = dict(zip(names, got[len(outputs) :], strict=True))
        _compare_outputs(seen, low, _forced(low, batch, real, seen), looked)
        alone = run_integer(low, batch)
        agreed += same_decisions(alone[0], outputs[0])
        farthest = max(farthest, *(float((a - b).abs().max()) for a, b in zip(alone, outputs, strict=True)))
    kernels, floats = engine_openvino.kernels(plain)
    first = seen.verdict()
    if not alike and agreed < _LEAST_AGREEMENT * total:
        first = first or Difference(f"{low.outputs[0]} (decisions)", total, agreed, total - agreed)
    differing = tuple((n, c, seen.steps[n]) for n, c in seen.differing.items() if c)
    return Parity(
        proven=first is None and total > 0,
        engine_version=engine_openvino.version(),
        instruction_set=engine.instruction_set(),
        samples=len(samples[0]),
        integer_values=len(seen.elements),
        integer_elements=sum(seen.elements.values()),
        integer_mismatches=sum(seen.differing.values()),
        output_max_difference=seen.output,
        simulation_agreement=agreed / max(total, 1),
        simulation_max_difference=farthest,
        first_difference=first,
        kernels=dict(kernels),
        float_nodes=tuple(floats),
        engine_name="OpenVINO",
        provider=engine_openvino.DEVICE,
        integer_max_steps=max(seen.steps.values(), default=0),
        differing=differing,
        observed_alike=alike,
    )


def _expose(data: bytes, covered: set[str]) -> tuple[bytes, dict[str, str]]:
    """The same file with the real numbers of values as further outputs, and these outputs' names by value."""
    model = onnx.load_from_string(data)
    present = {o.name for o in model.graph.output}
    names = {n.name: n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.name in covered}
    for tensor in dict.fromkeys(names.values()):
        if tensor not in present:
            model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    return model.SerializeToString(), names


def _forced(
    low: QModel, batch: Inputs, real: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]], seen: _Seen
) -> tuple[Tensor, ...]:
    """The integer evaluation that compares each value as it is written (what is only seen behind a move, or behind limits of its
    codes, as it is read), and goes on with the engine's.
    """
    params, at_reading, at_writing = low.params, readable(low), _written(low)

    def compared(nodes: dict[str, fx.Node], name: str, codes: Tensor) -> Tensor:
        if name not in real or name not in nodes:
            return codes
        scale, zero = (params[str(nodes[name].args[i].target)] for i in (1, 2))  # type: ignore[union-attr]
        got = torch.round(torch.from_numpy(real[name]) / scale) + zero.float()
        seen.add(name, codes, got)
        return got

    def written(name: str, codes: Tensor) -> Tensor:
        return compared(at_writing, name, codes)

    def read(name: str, codes: Tensor) -> Tensor:
        return codes if name in at_writing else compared(at_reading, name, codes)

    return run_integer(low, batch, written, read=read)


def _compare_outputs(seen: _Seen, low: QModel, expected: tuple[Tensor, ...], got: list[Tensor]) -> None:
    """Outputs that are codes were compared as such; those that kernels wrote as floats agree to rounding."""
    for node, name, x, y in zip(output_values(low.graph), low.outputs, expected, got, strict=True):
        if x.shape != y.shape:
            seen.wrong = seen.wrong or Difference(
                f"{name} (shape {list(y.shape)} for {list(x.shape)})", 0, 0, y.numel()
            )
            continue
        distance = (x.double() - y.double()).abs().nan_to_num(nan=float("inf"))
        seen.output = max(seen.output, float(distance.max())) if x.numel() else seen.output
        tolerance = FLOAT_TOLERANCE * float(x.double().abs().max().clamp(min=1e-6))
        if node.target is not DEQUANTIZE and bool((distance > tolerance).any()) and seen.wrong is None:
            at = int(distance.flatten().argmax())
            count = int((distance > tolerance).sum())
            seen.wrong = Difference(name, float(x.flatten()[at]), float(y.flatten()[at]), count)
