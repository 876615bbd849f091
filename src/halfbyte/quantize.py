"""The main job in one call: a network, data, widths; by a recipe, or by the cheapest one that holds a limit."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from halfbyte.budgets import Budget
from halfbyte.calibrate import Progress, silent
from halfbyte.capture import capture
from halfbyte.data import Samples, Source, example, labelled
from halfbyte.errors import CaptureError, UsageError
from halfbyte.formats import Bits, parse_widths
from halfbyte.graph import output_values
from halfbyte.grids import GridRule
from halfbyte.model import QModel, Target
from halfbyte.opening import example_of
from halfbyte.overrides import Overrides, parse_overrides
from halfbyte.pipeline import by_recipe, choice_of, load_samples, recipe_for
from halfbyte.ports import InputType, Ports, pixel_range, takes_pixels
from halfbyte.preprocess import Preprocess
from halfbyte.provenance import Hashed, note_data, note_weights
from halfbyte.recipe import Recipe
from halfbyte.search import search
from halfbyte.settings import capture_network, earlier_settings, seconds

Network = QModel | nn.Module | ExportedProgram | str | PathLike[str]
_CHOSEN = ("budget", "recipe", "rounding", "iterations", "activation_range", "weight_range", "logit_range")


@torch.inference_mode(False)  # gradients, whatever the caller has turned off
def quantize(
    network: Network,
    calibration: Source | None = None,
    *,
    target: str | Target = "onnxruntime",
    recipe: str | Recipe | None = None,
    bits: str | Bits | None = None,
    weight_bits: int | Sequence[int] | None = None,
    activation_bits: int | Sequence[int] | None = None,
    budget: Budget | str | None = None,
    max_drop: float | None = None,
    validation: Source | None = None,
    activation_range: str | GridRule | None = None,
    weight_range: str | GridRule | None = None,
    logit_range: str | None = None,
    rounding: str | None = None,
    iterations: int | None = None,
    time_limit: float | str | None = None,
    overrides: Overrides | None = None,
    keep_float: Sequence[str] = (),
    sets: Sequence[str] = (),
    ranges: Mapping[str, tuple[float, float]] | None = None,
    preprocess: Preprocess | None = None,
    input_type: InputType = "float32",
    uniform: bool = False,
    samples: int = 256,
    batch: int = 32,
    seed: int = 0,
    data_free: bool = False,
    checkpoint: str | None = None,
    trust: bool = False,
    memory: int | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> QModel:
    """Quantize a network after training, with unlabelled data or with none.

    network: a captured model, a module (captured on the first samples), or what ``halfbyte quantize`` takes: ``file.py:callable``,
    ``package.module:callable``, a ``.pt2`` file, or the folder of an earlier result, whose float network is quantized again with
    its data and pre-processing unless others are given. checkpoint, trust: how such a network is opened. calibration: a folder of
    pictures, ``.npy``, ``.npz``, ``file.py:callable``, or any iterable of tensors or tuples (one tensor for each input); without
    (``data_free``) the batch norms stand for data. samples, batch, seed: how much of it, in what portions, chosen how. input_type:
    ``uint8`` makes the input's codes the raw pixels, where ``preprocess`` is a grid of them; give it to :func:`export`, too.

    target: engine by name; ``onnxruntime`` means the variant that is exact on this machine's CPU. bits, such as ``"W4A8"``, or
    weight_bits and activation_bits: widths (default: 8); of several, one is chosen for each layer under ``budget``
    (:class:`Budget`, or a text such as ``"size=14%"``). recipe: a name of ``halfbyte recipes``, a ``.toml`` file or a
    :class:`Recipe` (default: ``default`` with data, ``low-bit`` for fewer than 8 bits, ``dfq`` without data). activation_range,
    weight_range: range rules in place of the recipe's, by name or as objects; logit_range, rounding, iterations: other options of
    its steps. time_limit: for learned methods, seconds or a text such as ``"20m"``. uniform: the first and the last layer get
    fewer than 8 bits, too. overrides: see :func:`place`; keep_float, sets: the same as patterns and as ``"GLOB=W8A16"``. ranges:
    value -> (lowest, highest) by hand. memory: bytes of running values to hold at once while weights are chosen (default: a third
    of what is free). kept: a folder for solved layers, to go on after an interruption.

    max_drop: the cheapest way that loses at most so many points, see :func:`search`: of accuracy on ``validation`` (labelled data
    that nothing is fitted to), else of decisions that differ from the float network's; the log says whether it was reached.

    Returns a model that ``predict`` simulates and ``export`` writes. Raises :class:`UsageError` for what makes no sense.
    """
    if bits is not None and (weight_bits is not None or activation_bits is not None):
        raise UsageError("--bits and --weight-bits or --activation-bits were both given: use one form")
    weight_bits, activation_bits = widths_of(bits, weight_bits, activation_bits)
    if calibration is not None and data_free:
        raise UsageError("--calibration and --data-free contradict each other: choose one")
    if isinstance(network, str | PathLike) and Path(network).is_dir():
        before = earlier_settings(Path(network))
        calibration = before.calibration if calibration is None and not data_free else calibration
        preprocess = preprocess or (None if before.preprocess is None else Preprocess.from_dict(before.preprocess))
    given = {"budget": budget, "recipe": recipe, "rounding": rounding, "iterations": iterations,
             "activation_range": activation_range, "weight_range": weight_range, "logit_range": logit_range}  # fmt: skip
    check_search(calibration, max_drop, validation, given)
    Ports(input_type=input_type)
    limit = seconds(time_limit)
    options: dict[str, Any] = {
        "target": target,
        "overrides": {**parse_overrides(tuple(keep_float), tuple(sets)), **(overrides or {})},
        "preprocess": preprocess,
        "uniform": uniform,
        "samples": samples,
        "batch": batch,
        "seed": seed,
        "time_limit": limit,
        "memory": memory,
        "progress": progress,
    }
    if max_drop is not None and calibration is not None:
        choice, _ = choice_of(weight_bits, activation_bits, None)
        m = captured(network, calibration, checkpoint=checkpoint, trust=trust, preprocess=preprocess)
        options["ranges"] = _ranges(m, input_type, preprocess, ranges)
        judged = None if validation is None else _validation(m, validation, preprocess, batch)
        options |= {"weight_bits": choice.weights[0], "activation_bits": choice.activations[0]}
        return _taking(
            search(m, calibration, max_drop=max_drop, validation=judged, **options).model, input_type, preprocess
        )
    followed = recipe_for(
        recipe,
        data=calibration is not None,
        choice=choice_of(weight_bits, activation_bits, budget)[0],
        activation_range=activation_range if isinstance(activation_range, str) else None,
        weight_range=weight_range if isinstance(weight_range, str) else None,
        logit_range=logit_range,
        rounding=rounding,
        iterations=iterations,
        time_limit=limit,
    )
    m = captured(network, calibration, checkpoint=checkpoint, trust=trust, preprocess=preprocess)
    options["ranges"] = _ranges(m, input_type, preprocess, ranges)
    opened = None
    if calibration is not None:
        opened = Hashed(load_samples(m, calibration, preprocess=preprocess, samples=samples, batch=batch, seed=seed))
    m = by_recipe(
        m,
        None if opened is None else opened.samples(),
        recipe=followed,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        budget=budget,
        kept=kept,
        activations=None if isinstance(activation_range, str) else activation_range,
        weights=None if isinstance(weight_range, str) else weight_range,
        **options,
    )
    return _taking(note_data(m, opened), input_type, preprocess)


def _ranges(
    m: QModel,
    input_type: InputType,
    preprocess: Preprocess | None,
    ranges: Mapping[str, tuple[float, float]] | None,
) -> Mapping[str, tuple[float, float]] | None:
    """Ranges by hand, with that of the input where it is to take pixels. Raises :class:`UsageError`."""
    return ranges if input_type == "float32" else {**pixel_range(m, known_pixels(preprocess)), **(ranges or {})}


def _taking(m: QModel, input_type: InputType, preprocess: Preprocess | None) -> QModel:
    return m if input_type == "float32" else takes_pixels(m, known_pixels(preprocess))


def known_pixels(preprocess: Preprocess | None) -> Preprocess:
    """The pre-processing, where something cannot do without. Raises :class:`UsageError`."""
    if preprocess is None:
        raise UsageError("--input uint8 needs to know what becomes of a pixel: give --size, --mean and --std")
    return preprocess


def widths_of(
    bits: str | Bits | None, weights: int | Sequence[int] | None, activations: int | Sequence[int] | None
) -> tuple[int | Sequence[int], int | Sequence[int]]:
    """Widths from one of the two forms; 8 where nothing is said."""
    if bits is not None:
        return parse_widths(str(bits))
    return 8 if weights is None else weights, 8 if activations is None else activations


def check_search(data: Source | None, max_drop: float | None, validation: Any, given: Mapping[str, Any]) -> None:
    """Options that make no sense with, or without, the automatic recipe. Raises :class:`UsageError`."""
    if max_drop is None:
        if validation is not None:
            raise UsageError("--validation is for --max-drop, which was not given")
        return
    if data is None:
        raise UsageError("--max-drop needs --calibration: some samples are held out to judge by")
    for name in _CHOSEN:
        if given[name] is not None:
            raise UsageError(f"--max-drop chooses recipe and widths itself: leave --{name.replace('_', '-')} out")


def _validation(m: QModel, data: Source, preprocess: Preprocess | None, batch: int) -> Any:
    shape = output_values(m.graph)[0].meta["shape"]
    classes = shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None
    names = [str(n.target) for n in m.inputs]
    return labelled(data, preprocess=preprocess, input_names=names, outputs=classes, batch=batch)


def captured(
    network: Network,
    data: Source | None = None,
    *,
    checkpoint: str | None = None,
    trust: bool = False,
    preprocess: Preprocess | None = None,
) -> QModel:
    """Any form of a network as a captured model; a module is captured on zeros of the pre-processing's size, else on samples."""
    if isinstance(network, QModel):
        return network
    if isinstance(network, str | PathLike):
        return note_weights(capture_network(str(network), checkpoint, trust, preprocess, data))
    if isinstance(network, ExportedProgram):
        if (kept := example_of(network)) is None:
            raise UsageError(
                "the exported program has kept no example inputs: hb.capture(program, example inputs) first"
            )
        return note_weights(capture(network, kept))
    if not isinstance(network, nn.Module):
        raise CaptureError(
            f"a {type(network).__name__} is no network: give a torch.nn.Module, or 'file.py:function' that returns one"
        )
    if preprocess is not None:
        return note_weights(capture(network, (torch.zeros(2, preprocess.channels, *preprocess.shape),)))
    if data is None or isinstance(data, Iterator):
        why = "there are no samples" if data is None else "samples that come only once are needed to calibrate"
        raise UsageError(
            f"the module has to be captured, and {why}: capture it first with hb.capture(net, example inputs)"
        )
    if isinstance(data, Samples):
        for first in data:
            return note_weights(capture(network, first))
        raise UsageError("the module has to be captured on samples, and there are none")
    return note_weights(capture(network, example(network.forward, data)))
