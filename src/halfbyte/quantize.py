"""The main job in one call: fold, place, calibrate."""

import itertools
import logging
import warnings
from collections.abc import Mapping

import torch

from halfbyte import engine
from halfbyte.calibrate import Progress, calibrate, silent
from halfbyte.data import Samples, Source, calibration, check_inputs
from halfbyte.grids import GridRule
from halfbyte.model import Inputs, LogEntry, QModel, Target, value_name
from halfbyte.place import Overrides, place
from halfbyte.preprocess import Preprocess
from halfbyte.run import run
from halfbyte.targets import find
from halfbyte.transforms.equalize import equalize
from halfbyte.transforms.fold_batchnorm import fold_batchnorm

_log = logging.getLogger("halfbyte")
# How far the first batch norm's input may lie from what it was trained on, in its own standard deviations and as a ratio.
_SHIFT, _SPREAD = 1.0, 3.0
# So many samples tell the range of each channel well enough to equalize it.
EQUALIZING = 64


def quantize(
    model: QModel,
    data: Source,
    *,
    target: str | Target = "onnxruntime",
    weight_bits: int = 8,
    activation_bits: int = 8,
    activations: GridRule | None = None,
    weights: GridRule | None = None,
    overrides: Overrides | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    preprocess: Preprocess | None = None,
    samples: int = 256,
    batch: int = 32,
    seed: int = 0,
    progress: Progress = silent,
) -> QModel:
    """Quantize a captured network after training, with unlabelled data.

    data: a folder of pictures, ``.npy``, ``.npz``, ``file.py:callable``, or any iterable of tensors or tuples (one tensor for
    each input). target: engine by name; ``onnxruntime`` means the variant that is exact on this machine's CPU. activations,
    weights: range rules (default: least squared error). overrides: value or glob -> format, None for float. ranges: value ->
    (lowest, highest) by hand. samples, batch, seed: how much data, in what portions, chosen how. Returns a model that
    ``predict`` simulates and ``export_onnx`` writes.
    """
    where = find(target, saturates=engine.saturates()) if isinstance(target, str) else target
    source = load_samples(model, data, preprocess=preprocess, samples=samples, batch=batch, seed=seed)
    m = fold_batchnorm(model)
    m = m.logged(*implausible_inputs(m, next(iter(source), ())))
    few = itertools.islice(iter(source), max(1, EQUALIZING // batch))
    m = equalize(m, few, per_channel=where.per_channel, weight_bits=weight_bits, activation_bits=activation_bits)
    m = place(m, where, weight_bits=weight_bits, activation_bits=activation_bits, overrides=overrides)
    if where.narrow_products:
        reason = "this CPU adds pairs of 8-bit products in 16 bits; weight scales are widened so that no pair saturates"
        m = m.logged(LogEntry("quantize", None, f"target {where.name}: {reason}"))
    return calibrate(m, source, activations=activations, weights=weights, overrides=ranges, progress=progress)


def load_samples(
    model: QModel,
    data: Source,
    *,
    preprocess: Preprocess | None = None,
    samples: int = 256,
    batch: int = 32,
    seed: int = 0,
) -> Samples:
    """Open unlabelled data for a network and check that its first batch fits the network's inputs."""
    names = [str(n.target) for n in model.inputs]
    source = (
        data
        if isinstance(data, Samples)
        else calibration(data, preprocess=preprocess, input_names=names, samples=samples, batch=batch, seed=seed)
    )
    expected = [(str(n.target), n.meta["shape"], getattr(torch, n.meta["dtype"])) for n in model.inputs]
    for first in source:
        check_inputs(first, expected, f"{source.description}, batch 0")
        break
    return source


@torch.inference_mode()
def implausible_inputs(m: QModel, batch: Inputs) -> list[LogEntry]:
    """Warn where the first batch norm sees something else than in training: the pre-processing is probably wrong.

    A batch norm remembers mean and spread of its input over the training data; folding kept them as moments of the layer's
    value. Data of the right kind reproduces them roughly, whatever the pictures show.
    """
    first = next((n for n in m.graph.nodes if "value" in n.meta and value_name(n) in m.moments), None)
    if first is None or not batch:
        return []
    moments = m.moments[value_name(first)]
    (y,) = run(m.as_float(), tuple(t.to(moments.mean.device) for t in batch), stop=value_name(first))
    flat = y.movedim(1, 0).flatten(1)
    alive = moments.std > 1e-3 * moments.std.max()
    shift = ((flat.mean(1) - moments.mean).abs() / moments.std.clamp(min=1e-12))[alive].median()
    ratio = (flat.std(1) / moments.std.clamp(min=1e-12))[alive].median()
    if float(shift) <= _SHIFT and 1 / _SPREAD <= float(ratio) <= _SPREAD:
        return []
    x = batch[0].float()
    low, high, spread = float(x.min()), float(x.max()), float(x.std())
    if low >= 0 and high > 2:
        cause = "the input looks like raw pixels (0 to 255): were mean and std forgotten?"
    elif low >= 0 and high <= 1:
        cause = "the input lies in 0..1: mean and std are expected on the 0..255 scale, were they left out or is the scale wrong?"
    elif spread < 0.1:
        cause = "the input hardly varies: were mean and std applied twice, or are they meant for pixels in 0..1?"
    else:
        cause = "mean, std or the order of colours is probably not what the network was trained with"
    message = f"its input is unlike the training data (off by {float(shift):.1f} deviations, spread {float(ratio):.2g} times): {cause}"
    warnings.warn(f"{value_name(first)}: {message}", stacklevel=2)
    return [LogEntry("quantize", value_name(first), f"WARNING {message}")]
