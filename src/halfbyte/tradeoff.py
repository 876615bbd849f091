"""The accuracy-size front of a network over several widths, as data, as a table and as a page."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from os import PathLike
from pathlib import Path

import jinja2
import torch

from halfbyte.budgets import SHOWN
from halfbyte.calibrate import Progress, silent
from halfbyte.data import Source
from halfbyte.errors import StoreError, UsageError
from halfbyte.mixed import Point, Tradeoff, widths
from halfbyte.model import Target
from halfbyte.pipeline import context, default_recipe, load_samples
from halfbyte.preprocess import Preprocess
from halfbyte.quantize import Network, captured
from halfbyte.recipe import Recipe, front_of, load_recipe
from halfbyte.store import write_whole

_WIDTH, _HEIGHT, _MARGIN = 760, 380, 56  # of the plot, in its own units
_LEAST = 1e-7


@torch.inference_mode(False)  # gradients, whatever the caller has turned off
def tradeoff(
    network: Network,
    calibration: Source,
    *,
    target: str | Target = "onnxruntime",
    recipe: str | Recipe | None = None,
    weight_bits: Sequence[int] = (2, 3, 4, 6, 8),
    activation_bits: Sequence[int] = (8,),
    by: str = "logical_size",
    points: int = 10,
    preprocess: Preprocess | None = None,
    uniform: bool = False,
    samples: int = 256,
    batch: int = 32,
    seed: int = 0,
    checkpoint: str | None = None,
    trust: bool = False,
    name: str = "",
    output: str | Path | None = None,
    progress: Progress = silent,
) -> Tradeoff:
    """Measure networks of chosen widths over a sweep of budgets, and uniform ones beside them.

    network, calibration, checkpoint, trust, target, recipe, preprocess, uniform, samples, batch, seed: as for :func:`quantize`.
    weight_bits, activation_bits: the widths to choose among. by: the cost that the budgets bound, ``size``, ``logical_size`` or
    ``bops``. points: budgets tried. name: of the network, for the page. output: a folder for ``tradeoff.json`` and
    ``tradeoff.html``. Raises :class:`UsageError` where there is nothing to choose among, :class:`StoreError` where the folder
    cannot be written.
    """
    if output is not None:
        _check(Path(output))
    choice = widths(tuple(weight_bits), tuple(activation_bits))
    if not choice.several:
        raise UsageError("a front needs several widths: name them as in --weight-bits 2,4,8")
    found = recipe or default_recipe(True, min(*choice.weights, *choice.activations))
    followed = load_recipe(found) if isinstance(found, str) else found
    model = captured(network, calibration, checkpoint=checkpoint, trust=trust, preprocess=preprocess)
    source = load_samples(model, calibration, preprocess=preprocess, samples=samples, batch=batch, seed=seed)
    c = replace(context(target, choice, source, progress), uniform=uniform, seed=seed)
    named = name or (str(network) if isinstance(network, str | PathLike) else "")
    front = front_of(followed, model, c, name=named, by=by.replace("-", "_"), points=points)
    if output is not None:
        write(front, Path(output))
    return front


def page(found: Tradeoff) -> str:
    """The front as one self-contained HTML page; a point shows its widths under the pointer."""
    sizes = [p.costs[found.by] for p in found.points]
    losses = [max(p.loss, _LEAST) for p in found.points]
    low, high = min(losses), max(losses)

    def at(p: Point) -> dict[str, object]:
        x = (p.costs[found.by] - min(sizes)) / max(max(sizes) - min(sizes), 1e-9)
        y = _log_share(max(p.loss, _LEAST), low, high)
        held = "\n".join(f"{unit}: {width}" for unit, width in (*p.weights.items(), *p.activations.items()))
        return {
            "x": round(_MARGIN + x * (_WIDTH - 2 * _MARGIN), 1),
            "y": round(_HEIGHT - _MARGIN - y * (_HEIGHT - 2 * _MARGIN), 1),
            "uniform": bool(p.label),
            "title": f"{p.label or 'chosen'}: {p.costs['size']:,.0f} bytes, loss {p.loss:.4g}\n{held}",
            "label": p.label,
            "point": p,
        }

    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(resources.files("halfbyte").joinpath("tradeoff.html.j2").read_text("utf-8"))
    return template.render(
        found=found, rows=[at(p) for p in found.points], width=_WIDTH, height=_HEIGHT, margin=_MARGIN, unit=SHOWN[found.by],
        ends={"sizes": (min(sizes), max(sizes)), "losses": (low, high)},
    )  # fmt: skip


def _log_share(value: float, low: float, high: float) -> float:
    """Where a value lies between two others, on a logarithmic scale."""
    return math.log(value / low) / max(math.log(high / low), 1e-9)


def _check(folder: Path) -> None:
    """Refuse before the work what could not be written after it. Raises :class:`StoreError`."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"the output '{folder}' is a file: name a folder")
    if not os.access(next(p for p in (folder, *folder.absolute().parents) if p.exists()), os.W_OK):
        raise StoreError(f"cannot write to '{folder}': permission denied")


def write(found: Tradeoff, folder: Path) -> None:
    """``tradeoff.json`` and ``tradeoff.html``, each whole or not at all. Raises :class:`StoreError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write to '{folder}': {error.strerror or error}") from error
    write_whole(folder / "tradeoff.json", json.dumps(found.to_dict(), indent=1))
    write_whole(folder / "tradeoff.html", page(found))
