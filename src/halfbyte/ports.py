"""What an exported file takes and gives: a fixed batch, names of one's own, raw pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import onnx_ir as ir
import torch
from torch import fx

from halfbyte.affine import Grid, quantize
from halfbyte.errors import UsageError
from halfbyte.graph import extent
from halfbyte.model import Inputs, LogEntry, QModel, editable, value_name
from halfbyte.ops import QUANTIZE
from halfbyte.preprocess import Preprocess

InputType = Literal["float32", "uint8"]
_LARGEST = 255


@dataclass(frozen=True)
class Ports:
    """static_batch: the fixed batch size, None for a free one. input_names, output_names: in order, None to keep the network's.

    input_type: ``uint8`` lets the file take codes of its one input, without the operation that rounds; they are raw pixels where the
    grid is :func:`pixel_grid`.
    """

    static_batch: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    input_type: InputType = "float32"

    def __post_init__(self) -> None:
        if self.static_batch is not None and self.static_batch < 1:
            raise UsageError(f"a batch of {self.static_batch} holds nothing: give at least 1")
        if self.input_type not in get_args(InputType):
            raise UsageError(f"input_type '{self.input_type}' must be one of {', '.join(get_args(InputType))}")


def check_names(m: QModel, ports: Ports) -> None:
    """Raise :class:`UsageError` unless there is one name for each input and output, all different."""
    names: list[str] = []
    for what, given, own in (
        ("input", ports.input_names, [str(n.target) for n in m.inputs]),
        ("output", ports.output_names, list(m.outputs)),
    ):
        if given is not None and len(given) != len(own):
            raise UsageError(f"the network has {len(own)} {what}s ({', '.join(own)}), {len(given)} names were given")
        names += given or own
    double = next((n for n in names if names.count(n) > 1 or not n), None)
    if double is not None:
        raise UsageError(
            f"the name '{double}' is given twice, or is empty: inputs and outputs need names of their own: give --output-names"
        )


def pixel_grid(preprocess: Preprocess) -> Grid:
    """The grid whose codes are the pixels: scale 1 / std, zero-point mean.

    ``(p - mean) / std`` is then the real number of code ``p``, without error. It exists where all channels share mean and std, and
    mean is a whole number of 0..255 (127, not 127.5): a grid has one scale, and an integer stands for zero. Raises
    :class:`UsageError` that says what is missing.
    """
    means, stds = zip(*preprocess.statistics, strict=True)
    if len(set(means)) > 1 or len(set(stds)) > 1:
        which = "mean" if len(set(means)) > 1 else "std"
        raise UsageError(
            f"raw pixels are no grid here: {which} differs between channels, and an input has one scale and zero-point; "
            "export float32 input, or train with the same mean and std for all channels"
        )
    mean, std = float(means[0]), float(stds[0])
    if mean != round(mean) or not 0 <= mean <= _LARGEST or std <= 0:
        raise UsageError(
            f"raw pixels are no grid here: a mean of {mean:g} is not a whole number from 0 to 255, and only an integer code "
            "can stand for zero; export float32 input"
        )
    zero, lo, hi = (torch.tensor(v, dtype=torch.int32) for v in (int(mean), 0, _LARGEST))
    return Grid(torch.tensor(1.0) / torch.tensor(std), zero, lo, hi)


def pixel_range(m: QModel, preprocess: Preprocess) -> dict[str, tuple[float, float]]:
    """The range of the network's input over pixels of 0..255, for a calibration that knows it."""
    grid = pixel_grid(preprocess)
    return {value_name(_single_input(m)): (float(grid.minimum), float(grid.maximum))}


def takes_pixels(m: QModel, preprocess: Preprocess) -> QModel:
    """Give the input the grid whose codes are the pixels. Raises :class:`UsageError` where it is not held in 8 unsigned bits."""
    grid, name = pixel_grid(preprocess), value_name(_single_input(m))
    _check_planned(m, name)
    mean, std = preprocess.statistics[0]
    pixels = torch.arange(_LARGEST + 1, dtype=torch.float32)
    if not torch.equal(quantize((pixels - mean) / std, grid), pixels):
        raise UsageError(f"raw pixels are no grid here: (pixel - {mean:g}) / {std:g} does not round back to the pixel")
    entry = LogEntry("ports", name, f"codes are raw pixels: scale 1 / {std:g}, zero-point {int(mean)}, no error")
    return replace(m, grids={**m.grids, name: grid}).logged(entry)


def _single_input(m: QModel) -> fx.Node:
    if len(m.inputs) != 1:
        raise UsageError(f"raw pixels are for networks of one input, this one has {len(m.inputs)}")
    return m.inputs[0]


def _check_planned(m: QModel, name: str) -> None:
    form = m.plan.get(name)
    if form is None or form.bits != 8 or form.signed:
        held = "in float" if form is None else f"as {form}"
        raise UsageError(f"the file cannot take uint8: input '{name}' is held {held}, not as 8 unsigned bits")


def input_codes(m: QModel, x: Inputs) -> Inputs:
    """The uint8 codes of a float input."""
    grid = m.grid(value_name(_single_input(m)))
    assert grid is not None
    return (quantize(x[0].cpu(), grid.to("cpu")).to(torch.uint8),)


def without_rounding(m: QModel, low: QModel) -> QModel:
    """The lowered model ``low`` of ``m`` with codes as its input."""
    name = value_name(_single_input(m))
    _check_planned(m, name)
    graph = editable(low.graph)
    placeholder = next(n for n in graph.nodes if n.op == "placeholder")
    for user in list(placeholder.users):
        if user.target is not QUANTIZE:
            raise UsageError(f"the file cannot take uint8: '{name}' is read in float, too")
        user.replace_all_uses_with(placeholder)
    placeholder.meta = {**placeholder.meta, "dtype": "uint8"}
    graph.eliminate_dead_code()
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return replace(low, graph=graph, params={k: v for k, v in low.params.items() if k in used})


def with_batch(low: QModel, batch: int) -> QModel:
    """The same lowered model with a fixed batch."""
    if not low.dynamic:
        own = low.inputs[0].meta["shape"][0]
        if own != batch:
            raise UsageError(f"the network itself fixes its batch to {own}: export it with that or leave the batch out")
        return low
    graph = editable(low.graph)
    for node in graph.nodes:
        if "shape" in node.meta:
            node.meta["shape"] = tuple(extent(d, batch) if "batch" in str(d) else d for d in node.meta["shape"])
    free = {d for n in graph.nodes if n.op == "placeholder" for d in n.meta["shape"] if isinstance(d, str)}
    if free:
        raise UsageError(f"a fixed batch needs all other dimensions fixed, these are free: {', '.join(sorted(free))}")
    return replace(low, graph=graph, dynamic=False)


def rename_inputs(model: ir.Model, names: Sequence[str]) -> None:
    """Give the inputs of a file names of one's own. Raises :class:`UsageError` where a tensor of the file has the name."""
    taken = {v.name for node in model.graph for v in node.outputs} | set(model.graph.initializers)
    for value, name in zip(model.graph.inputs, names, strict=True):
        if name in taken:
            raise UsageError(f"a tensor in the file is called '{name}' already: choose another name for the input")
        value.name = name
