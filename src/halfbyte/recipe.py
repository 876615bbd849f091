"""Recipes: which steps run, in which order, with which options, as data in TOML; and the guard that keeps the better model."""

import difflib
import inspect
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from halfbyte.calibrate import calibrate
from halfbyte.errors import UsageError
from halfbyte.losses import noise_to_signal
from halfbyte.mixed import Tradeoff, swept
from halfbyte.model import QModel
from halfbyte.steps import PYTHON_NAMES, STEPS, Context, better, candidates, place_step

VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """A named list of steps; each is a mapping with the key ``step`` and the step's options."""

    name: str
    description: str
    steps: tuple[Mapping[str, Any], ...]
    version: int = VERSION
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "steps": [dict(s) for s in self.steps]}

    def changed(self, step: str, **options: Any) -> "Recipe":
        """The same recipe with options of one step set where they are not None."""
        given = {k: v for k, v in options.items() if v is not None}
        if given and step not in STEPS:
            raise UsageError(f"there is no step '{step}': choose one of {', '.join(STEPS)}")
        return replace(self, steps=tuple({**s, **given} if s["step"] == step else s for s in self.steps))

    def without(self, step: str) -> "Recipe":
        """The same recipe without the steps of this name."""
        return replace(self, steps=tuple(s for s in self.steps if s["step"] != step))

    def has(self, step: str) -> bool:
        """Whether one of the steps has this name."""
        return any(s["step"] == step for s in self.steps)


def front_of(
    recipe: Recipe, m: QModel, c: Context, *, name: str = "", by: str = "logical_size", points: int = 10
) -> Tradeoff:
    """The front of sizes and losses over ``c.widths``, after the steps of the recipe that stand before the choice."""
    for step in _choosing(recipe):
        options = {PYTHON_NAMES.get(k, k): v for k, v in step.items() if k not in ("step", "guard")}
        if step["step"] == "allocate":
            method, metric = options.pop("method", "nearest"), options.pop("metric", "auto")
            return swept(candidates(m, c, method, metric, options), c.held_out(m), name=name, by=by, points=points)
        m = STEPS[step["step"]](m, c, **options)
    raise UsageError(f"recipe '{recipe.name}' places nothing: it needs the steps place and calibrate, or allocate")


def names() -> list[str]:
    """The recipes that come with Halfbyte."""
    return sorted(p.name.removesuffix(".toml") for p in _folder().iterdir() if p.name.endswith(".toml"))


def _folder() -> Any:
    return resources.files("halfbyte") / "recipes"


def text(name: str) -> str:
    """A recipe's TOML, by name or from a file. Raises :class:`UsageError`."""
    if name in names():
        return str((_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean '{near[0]}'?" if near else "recipes are " + ", ".join(names())
        raise UsageError(f"there is no recipe '{name}': {hint} (or give a .toml file)")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe '{name}' cannot be read: {getattr(error, 'strerror', None) or error}") from error


def load_recipe(name: str) -> Recipe:
    """A recipe by name or from a ``.toml`` file, checked. Raises :class:`UsageError` that names what is wrong."""
    try:
        values = tomllib.loads(text(name))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the recipe '{name}' is not valid TOML: {error}") from error
    return parse(values, name)


def parse(values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from the values of its file."""
    _check_keys(values, ["name", "version", "description", "source", "steps"], f"recipe '{where}'")
    if values.get("version") != VERSION:
        raise UsageError(
            f"recipe '{where}' has version {values.get('version')!r}: this Halfbyte reads version {VERSION}"
        )
    steps = values.get("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, Mapping) and "step" in s for s in steps):
        raise UsageError(f"recipe '{where}' needs [[steps]], each with step = one of {', '.join(STEPS)}")
    for i, step in enumerate(steps, 1):
        _check_step(step, f"recipe '{where}', step {i}")
    described = {k: str(values.get(k, "")) for k in ("description", "source")}
    return Recipe(str(values.get("name", where)), steps=tuple(dict(s) for s in steps), version=VERSION, **described)


def _check_keys(values: Mapping[str, Any], valid: list[str], where: str) -> None:
    for key in values:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, 1, 0.0)[0]
            raise UsageError(f"{where}: unknown key '{key}'; did you mean '{near}'? (valid: {', '.join(valid)})")


def _options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a step as its TOML has them."""
    parameters = inspect.signature(STEPS[name]).parameters.values()
    python = {v: k for k, v in PYTHON_NAMES.items()}
    return {python.get(p.name, p.name): p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _check_step(step: Mapping[str, Any], where: str) -> None:
    name = step["step"]
    if name not in STEPS:
        near = difflib.get_close_matches(str(name), list(STEPS), 1, 0.0)[0]
        raise UsageError(f"{where}: there is no step '{name}'; did you mean '{near}'? (valid: {', '.join(STEPS)})")
    options = _options(name)
    _check_keys(step, ["step", "guard", *options], f"{where} ({name})")
    for key, value in step.items():
        if key == "step":
            continue
        kind = bool if key == "guard" else options[key].annotation
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise UsageError(
                f"{where} ({name}): {key} = {value!r} is not one of {', '.join(map(repr, get_args(kind)))}"
            )
        if kind is bool and not isinstance(value, bool):
            raise UsageError(f"{where} ({name}): {key} = {value!r} is not true or false")
        if kind is int and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise UsageError(f"{where} ({name}): {key} = {value!r} is not a whole number of at least 0")
        if kind is float and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1):
            raise UsageError(f"{where} ({name}): {key} = {value!r} is not a number from 0 to 1")


def check(recipe: Recipe) -> None:
    """Check the options of every step. Raises :class:`UsageError`."""
    for i, step in enumerate(recipe.steps, 1):
        _check_step(step, f"recipe '{recipe.name}', step {i}")


def follow(recipe: Recipe, m: QModel, c: Context) -> QModel:
    """Run the steps. A guarded step is undone if a held-out part of the data says that it made the model worse."""
    placed = False
    for step in recipe.steps if c.widths is None else _choosing(recipe):
        name = step["step"]
        placed = placed or name in ("place", "allocate")
        options = {PYTHON_NAMES.get(k, k): v for k, v in step.items() if k not in ("step", "guard")}
        after = STEPS[name](m, c, **options)
        m = _guarded(name, m, after, c, placed) if step.get("guard") and c.source is not None else after
    if not m.grids:
        raise UsageError(
            f"recipe '{recipe.name}' leaves the model without grids: it needs the steps place and calibrate"
        )
    return m


def _choosing(recipe: Recipe) -> tuple[Mapping[str, Any], ...]:
    """The steps where widths are to be chosen: what places and calibrates does so for each width, with the recipe's own rounding."""
    if recipe.has("allocate"):
        return recipe.steps
    rounding = next((s.get("method", "descent") for s in recipe.steps if s["step"] == "reconstruct"), "nearest")
    method = {"adaround": "descent", "blocks": "descent"}.get(rounding, rounding)
    steps: list[Mapping[str, Any]] = []
    for step in recipe.steps:
        if step["step"] == "calibrate":
            steps.append({**step, "step": "allocate", "method": method})
        elif step["step"] != "place":
            steps.append(step)
    return tuple(steps)


def _guarded(name: str, before: QModel, after: QModel, c: Context, placed: bool) -> QModel:
    held_out = c.held_out(before)
    figures = [noise_to_signal(v if placed else _finished(v, c), held_out, before.as_float()) for v in (before, after)]
    return better(name, before, after, figures)


def _finished(m: QModel, c: Context) -> QModel:
    """A quick quantization, to judge float transforms by."""
    return calibrate(place_step(m, c), c.few(m), overrides={})
