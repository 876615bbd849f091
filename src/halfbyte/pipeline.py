"""One recipe followed once: the data opened and looked at, the steps run."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from halfbyte.budgets import Budget
from halfbyte.calibrate import Progress, silent
from halfbyte.data import Samples, Source, calibration, check_inputs
from halfbyte.errors import DataError, HalfbyteWarning, UsageError
from halfbyte.grids import GridRule
from halfbyte.mixed import Widths, widths
from halfbyte.model import Inputs, LogEntry, QModel, Target, value_name
from halfbyte.overrides import Overrides
from halfbyte.preprocess import Preprocess
from halfbyte.recipe import Recipe, check, follow, load_recipe
from halfbyte.run import expected_inputs, fixed_batch, run, whole
from halfbyte.steps import Context
from halfbyte.targets import here
from halfbyte.transforms.fold_batchnorm import fold_batchnorm

_log = logging.getLogger("halfbyte")
# How far the first batch norm's input may lie from what it was trained on, in its own standard deviations and as a ratio.
_SHIFT, _SPREAD = 1.0, 3.0
NO_DATA = "ranges from batch-norm statistics; 64 unlabelled images usually do better"


def by_recipe(
    model: QModel,
    data: Source | None = None,
    *,
    target: str | Target = "onnxruntime",
    recipe: str | Recipe | None = None,
    weight_bits: int | Sequence[int] = 8,
    activation_bits: int | Sequence[int] = 8,
    budget: Budget | str | None = None,
    activations: GridRule | None = None,
    weights: GridRule | None = None,
    overrides: Overrides | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    preprocess: Preprocess | None = None,
    uniform: bool = False,
    samples: int = 256,
    batch: int = 32,
    seed: int = 0,
    time_limit: float | None = None,
    memory: int | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> QModel:
    """Quantize a captured network by one recipe, with unlabelled data or with none.

    activations, weights: range rules in place of the recipe's. memory: bytes of running values to hold at once while weights are
    chosen (default: a third of what is free). kept: a folder for solved layers, to go on after an interruption. The rest is as for
    :func:`halfbyte.quantize.quantize`.
    """
    where = here(target)
    choice, limit = choice_of(weight_bits, activation_bits, budget)
    chosen = recipe or default_recipe(data is not None, min(*choice.weights, *choice.activations))
    followed = load_recipe(chosen) if isinstance(chosen, str) else chosen
    source = None
    if data is not None:
        source = load_samples(model, data, preprocess=preprocess, samples=samples, batch=batch, seed=seed)
        m = model.logged(*implausible_inputs(fold_batchnorm(model), next(iter(source), ())))
    else:
        m = model.logged(LogEntry("quantize", None, f"no calibration data: {NO_DATA}"))
    known = {**_input_range(model, preprocess), **(ranges or {})}
    told = f"recipe {followed.name}, version {followed.version}"
    m = m.logged(LogEntry("quantize", None, told, {"recipe": followed.to_dict()}))
    if where.narrow_products:
        reason = "this CPU adds pairs of 8-bit products in 16 bits; weight scales are widened so that no pair saturates"
        m = m.logged(LogEntry("quantize", None, f"target {where.name}: {reason}"))
    c = replace(
        context(where, choice, source, progress),
        overrides=overrides or {},
        ranges=known if data is None else ranges or {},
        activations=activations,
        weights=weights,
        uniform=uniform,
        seed=seed,
        kept=kept,
        time_limit=time_limit,
        budget=limit,
    )
    return follow(followed, m, c if memory is None else replace(c, memory=memory))


def choice_of(
    weight_bits: int | Sequence[int], activation_bits: int | Sequence[int], budget: Budget | str | None
) -> tuple[Widths, Budget | None]:
    """Widths and budget, which need each other. Raises :class:`UsageError`."""
    choice = widths(weight_bits, activation_bits)
    if choice.several and budget is None:
        raise UsageError("several widths are a choice, which needs a bound: give a budget, as in --budget size=14%")
    if budget is not None and not choice.several:
        raise UsageError("a budget chooses among widths: give several, as in --weight-bits 2,4,8")
    return choice, Budget.parse(budget) if isinstance(budget, str) else budget


def recipe_for(
    named: str | Recipe | None,
    *,
    data: bool,
    choice: Widths,
    activation_range: str | None = None,
    weight_range: str | None = None,
    logit_range: str | None = None,
    rounding: str | None = None,
    iterations: int | None = None,
    time_limit: float | None = None,
) -> Recipe:
    """A recipe, by default the one for these widths, with options of its steps as asked for. Raises :class:`UsageError`."""
    found = named or default_recipe(data, min(*choice.weights, *choice.activations))
    recipe = load_recipe(found) if isinstance(found, str) else found
    recipe = recipe.changed("calibrate", activations=activation_range, weights=weight_range, logits=logit_range)
    if activation_range is not None:  # the rule that was asked for has the last word
        recipe = recipe.without("refine_ranges")
    asked = {"--rounding": rounding, "--iterations": iterations, "--time-limit": time_limit}
    given = [option for option, value in asked.items() if value is not None]
    learns = "reconstruct" if recipe.has("reconstruct") or rounding is not None else "tune"
    if given and not recipe.has(learns):
        what = given[0]
        raise UsageError(
            f"recipe '{recipe.name}' has no step reconstruct, which {what} is for: choose --recipe low-bit"
        )
    recipe = recipe.changed(learns, method=rounding, iterations=iterations)
    check(recipe)
    return recipe


def context(target: str | Target, choice: Widths, source: Samples | None, progress: Progress) -> Context:
    """What steps need to know, as it is where a user says nothing else; a third of the free memory may hold running values."""
    return Context(
        source,
        here(target),
        choice.weights[0],
        choice.activations[0],
        {},
        {},
        progress,
        memory=psutil.virtual_memory().available // 3,
        widths=choice if choice.several else None,
    )


def default_recipe(data: bool, bits: int) -> str:
    """The recipe for this case where none is named."""
    if not data:
        return "dfq"
    return "default" if bits >= 8 else "low-bit"


def _input_range(model: QModel, preprocess: Preprocess | None) -> dict[str, tuple[float, float]]:
    """The range that pixels of 0..255 have behind the pre-processing, for a network of one input."""
    if preprocess is None or len(model.inputs) != 1:
        return {}
    ends = [(pixel - mean) / std for pixel in (0.0, 255.0) for mean, std in preprocess.statistics]
    return {value_name(model.inputs[0]): (min(ends), max(ends))}


def load_samples(
    model: QModel,
    data: Source,
    *,
    preprocess: Preprocess | None = None,
    samples: int = 256,
    batch: int = 32,
    seed: int = 0,
) -> Samples:
    """Open unlabelled data for a network and check that its batches fit the network's inputs: the first now, all as they are read.

    A network of a fixed batch gets batches of that size, whatever ``batch`` says; those that come ready made may be larger.
    """
    names, fixed = [str(n.target) for n in model.inputs], fixed_batch(model)
    if fixed is not None:
        batch, samples = fixed, whole(model, samples)
    source = (
        data
        if isinstance(data, Samples)
        else calibration(data, preprocess=preprocess, input_names=names, samples=samples, batch=batch, seed=seed)
    )
    expected = expected_inputs(model)

    def fitting() -> Iterator[Inputs]:
        for i, some in enumerate(source):
            check_inputs(some, expected, f"{source.description}, batch {i}")
            yield some

    first = next(fitting(), ())
    if fixed is not None and 0 < (count := len(first[0]) if first and first[0].ndim else 0) < fixed:
        raise DataError(
            f"{source.description}: batch 0 has {count} samples, and the network takes {fixed} at a time: give at least that many"
        )
    return Samples(source.description, source.count, fitting)


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
    warnings.warn(f"{value_name(first)}: {message}", HalfbyteWarning, stacklevel=3)  # 2 is torch's decorator
    return [LogEntry("quantize", value_name(first), f"WARNING {message}")]
