"""Faults to plant into a trained network: each makes (model, samples to judge by, file or None) that suffers from just one."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.affine import Grid
from halfbyte.grids import from_range
from halfbyte.model import QModel, value_name
from halfbyte.targets import ONNXRUNTIME_AVX2, ONNXRUNTIME_PER_TENSOR_AVX2

Labelled = list[tuple[tuple[Tensor, ...], Tensor]]


@dataclass(frozen=True)
class Subject:
    """A trained network with pixels of 0..255 to calibrate with and to judge by."""

    net: nn.Module
    untracked: nn.Module  # the same kind, whose batch norms keep no running statistics
    prepare: Callable[[Tensor], Tensor]
    calibration: Tensor
    labelled: tuple[Tensor, Tensor]
    folder: Path

    def capture(self, net: nn.Module | None = None) -> QModel:
        return hb.capture(net or self.net, self.prepare(self.calibration[:2]))

    @property
    def data(self) -> Labelled:
        return [((self.prepare(self.labelled[0]),), self.labelled[1])]

    @property
    def samples(self) -> Tensor:
        return self.prepare(self.calibration)

    def quantized(self, **options: object) -> QModel:
        options = {"target": ONNXRUNTIME_AVX2, **options}
        return hb.quantize(self.capture(), self.samples, **options)  # type: ignore[arg-type]


Planted = tuple[QModel, Labelled | None, Path | None]


def forgotten_preprocessing(s: Subject) -> Planted:
    """Raw pixels."""
    return hb.quantize(s.capture(), s.calibration, target=ONNXRUNTIME_AVX2), None, None


def scaled_preprocessing(s: Subject) -> Planted:
    """Pixels of 0..1."""
    return hb.quantize(s.capture(), s.calibration / 255, target=ONNXRUNTIME_AVX2), None, None


def swapped_colours(s: Subject) -> Planted:
    """BGR, for calibration and for judging."""
    m = hb.quantize(s.capture(), s.prepare(s.calibration.flip(1)), target=ONNXRUNTIME_AVX2)
    return m, [((s.prepare(s.labelled[0].flip(1)),), s.labelled[1])], None


def train_mode(s: Subject) -> Planted:
    """Batch norms that use the statistics of the batch."""
    return hb.quantize(s.capture(s.untracked), s.samples, target=ONNXRUNTIME_AVX2), s.data, None


def dominating_channel(s: Subject) -> Planted:
    """One output channel of a layer with per-tensor weights is far larger than the others, and is made small again behind."""
    m = hb.fold_batchnorm(s.capture())
    layer, after = _consecutive(m)
    params = dict(m.params)
    for name, channel, factor in ((f"{layer}.weight", 0, 150.0), (f"{layer}.bias", 0, 150.0)):
        params[name] = params[name].clone()
        params[name][channel] *= factor
    params[f"{after}.weight"] = params[f"{after}.weight"].clone()
    wide = params[f"{after}.weight"]
    (wide[:1] if wide.shape[1] == 1 else wide[:, :1]).div_(150.0)
    m = replace(m, params=params)
    placed = hb.place(m, ONNXRUNTIME_PER_TENSOR_AVX2)
    return hb.calibrate(placed, [(s.samples,)]), s.data, None


def outliers(s: Subject) -> Planted:
    """Rare values, in any channel, far beyond all others."""

    net = spiked(s)
    m = hb.capture(net, s.samples[:2])
    return hb.quantize(m, s.samples, target=ONNXRUNTIME_AVX2, activation_range=hb.MinMax()), None, None


class Spike(nn.Module):
    """What a module puts out, with rare values stretched far beyond all others; the layer behind cuts them off again."""

    def __init__(self, inner: nn.Module, knee: Tensor) -> None:
        super().__init__()
        self.inner, self.knee = inner, nn.Buffer(knee.view(1, -1, 1, 1))
        self.behind = nn.Conv2d(len(knee), len(knee), 1, bias=False)
        self.behind.weight.data = torch.eye(len(knee))[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return torch.minimum(self.behind(y + 2000 * torch.relu(y - self.knee)), self.knee)


def spiked(s: Subject) -> nn.Module:
    """The network with such values in the middle."""
    net = copy.deepcopy(s.net)
    name = "n2" if hasattr(net, "n2") else "stem"
    inner = net.get_submodule(name)
    seen: list[Tensor] = []
    handle = inner.register_forward_hook(lambda _, __, y: seen.append(y))
    with torch.no_grad():
        net(s.samples)
    handle.remove()
    flat = seen[0].movedim(1, 0).flatten(1)
    setattr(net, name, Spike(inner, flat.quantile(0.9995, dim=1)).eval())
    return net


def ranged(m: QModel, factor: float, values: Callable[[list[str]], list[str]] = lambda own: own[1:4]) -> QModel:
    """Some of the running values that have a grid of their own, with ranges of ``factor`` times the right ones."""
    weights = {value_name(n) for n in m.graph.nodes if n.op == "get_attr"}
    own = [v for v in m.grids if v not in weights and v not in m.ties and m.grids[v].scale.ndim == 0]
    grids = dict(m.grids)
    for v in values(own):
        g, form = m.grids[v], m.plan[v]
        assert form is not None
        lo, hi = float(g.scale * (form.lo - g.zero)), float(g.scale * (form.hi - g.zero))
        new = from_range(lo * factor, hi * factor, form)
        limited = bool((g.lo > form.lo).any())
        grids[v] = Grid(new.scale, new.zero, new.zero.clone() if limited else new.lo, new.hi)
    return replace(m, grids=grids)


def starved(m: QModel, name: str, bias: float) -> QModel:
    """Two channels of a weight nearly dead, with a scale to match and this bias, for which no room is made."""
    params, tuned, other = dict(m.params), dict(m.tuned), name.removesuffix("weight") + "bias"
    params[name], params[other] = params[name].clone(), params[other].clone()
    params[name][:2] *= 1e-9
    params[other][:2] = bias
    for changed in (name, other):
        tuned.pop(changed, None)
    scale = m.grids[name].scale.clone()
    scale[:2] = params[name][:2].abs().flatten(1).amax(1) / 127
    return replace(m, params=params, tuned=tuned, grids={**m.grids, name: replace(m.grids[name], scale=scale)})


def altered(m: QModel, path: Path, at: float = 0.0) -> None:
    """A file of the model with the codes of one kernel turned around, of the convolution so far through the network."""
    hb.export_onnx(m, path)
    model = onnx.load(path)
    tensors = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
    tensor = tensors[int(at * len(tensors))]
    codes = numpy_helper.to_array(tensor).copy()
    codes[0] = -codes[0]
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    onnx.save(model, path)


def wide(s: Subject) -> Planted:
    """Ranges forty times too wide."""
    return ranged(s.quantized(), 40.0), None, None


def narrow(s: Subject) -> Planted:
    """Ranges a tenth as wide as they should be."""
    return ranged(s.quantized(), 0.1), s.data, None


def truncated(s: Subject) -> Planted:
    """A converter that cuts depthwise weights down instead of rounding them."""
    m = s.quantized(weight_bits=4, uniform=True, recipe="default")
    tuned = dict(m.tuned)
    for name, grid in m.grids.items():
        if name in m.params and m.params[name].ndim == 4 and m.params[name].shape[1] == 1:
            shape = (-1, 1, 1, 1)
            scale = grid.scale.reshape(shape) if grid.axis is not None else grid.scale
            tuned[name] = m.params[name] - 0.499 * scale
            tuned.pop(name.removesuffix("weight") + "bias", None)
    return replace(m, tuned=tuned), s.data, None


def saturated(s: Subject) -> Planted:
    """Nearly dead channels: a tiny weight scale, an ordinary bias, and no room made for it."""
    m = s.quantized(recipe="default")
    name = next(
        n
        for n, g in m.grids.items()
        if n in m.params and g.axis == 0 and m.params[n].ndim == 4 and m.params[n].shape[1] > 1
    )
    return starved(m, name, 0.5), s.data, None


def other_data(s: Subject) -> Planted:
    """Calibrated on pictures of faint contrast, used on ordinary ones."""
    faint = (s.calibration - 120) * 0.08 + 120
    m = hb.quantize(s.capture(), s.prepare(faint), target=ONNXRUNTIME_AVX2)
    return m, s.data, None


def float_layer(s: Subject) -> Planted:
    """A layer in the middle that was asked to stay in float."""
    layer = "second" if hasattr(s.net, "second") else "one.1.0"
    return s.quantized(overrides={f"{layer}*": None}), s.data, None


def changed_file(s: Subject) -> Planted:
    """A file whose weights somebody has changed."""
    m, path = s.quantized(), s.folder / "net.onnx"
    altered(m, path)
    return m, None, path


def _consecutive(m: QModel) -> tuple[str, str]:
    """Two layers with nothing but an unbounded activation between them."""
    return ("first", "second") if "first.weight" in m.params else ("two.1.0", "two.2.0")


FAULTS: dict[str, tuple[Callable[[Subject], Planted], str]] = {
    "no pre-processing": (forgotten_preprocessing, "wrong or missing pre-processing"),
    "pixels of 0..1": (scaled_preprocessing, "wrong or missing pre-processing"),
    "BGR": (swapped_colours, "wrong or missing pre-processing"),
    "train mode": (train_mode, "train-mode batch norm"),
    "dominating channel": (dominating_channel, "dead or dominating channels"),
    "outliers": (outliers, "outlier activations"),
    "wide ranges": (wide, "too wide ranges"),
    "narrow ranges": (narrow, "too narrow ranges"),
    "truncated weights": (truncated, "biased error of depthwise layers"),
    "saturated": (saturated, "saturated accumulators"),
    "other data": (other_data, "calibration data unlike the evaluation data"),
    "float layer": (float_layer, "an operation left in float"),
    "changed file": (changed_file, "a file that differs from the simulation"),
}
