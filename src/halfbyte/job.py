"""The command ``quantize`` from start to end: stages with time and memory, an output folder that can be resumed, a report."""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from halfbyte import engine, engines, report, summary
from halfbyte.calibrate import Progress, silent
from halfbyte.capture import capture
from halfbyte.data import Samples, labelled
from halfbyte.encodings import ENCODINGS, FLOAT_FILE, export_encodings
from halfbyte.errors import ParityError, StoreError, UsageError
from halfbyte.export_onnx import Container, export_onnx
from halfbyte.formats import Bits, parse_widths
from halfbyte.graph import by_value, output_values
from halfbyte.model import QModel, Target
from halfbyte.opening import open_network
from halfbyte.overrides import Overrides, parse_overrides
from halfbyte.parity import Parity
from halfbyte.parts import RESIDUAL, SECOND
from halfbyte.place import place, unplaced
from halfbyte.ports import InputType, pixel_grid, pixel_range, takes_pixels
from halfbyte.preprocess import Preprocess
from halfbyte.proof import write_proof
from halfbyte.prove import MODEL, PROOF
from halfbyte.provenance import Hashed, metadata, note_data, note_proof, note_weights, only_weights
from halfbyte.quantize import choice_of, default_recipe, load_samples, quantize
from halfbyte.recipe import Recipe, check, load_recipe
from halfbyte.search import search
from halfbyte.sizes import sizes
from halfbyte.store import load, save, write_whole
from halfbyte.targets import find
from halfbyte.transforms.fold_batchnorm import fold_batchnorm

_log = logging.getLogger("halfbyte")
CHECKPOINT, SUMMARY, REPORT = "checkpoint", "summary.json", "report.html"
UNPROVEN = "model.unproven.onnx"
STATE, LAYERS = "state.json", "layers"  # in the checkpoint: what was asked for, and layers solved so far
Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """What ``halfbyte quantize`` was asked to do; it is stored in ``summary.json`` and must be the same to resume."""

    network: str
    calibration: str | None  # None: no data at all
    output: str
    checkpoint: str | None = None
    target: str = "onnxruntime"
    bits: str = "W8A8"  # or W2,4,8A8: one of several for each layer
    budget: str | None = None  # what the choice may cost
    samples: int = 256
    batch: int = 32
    seed: int = 0
    recipe: str | None = None  # default: with data "default", without "dfq"
    activation_range: str | None = None  # in place of the recipe's
    weight_range: str | None = None
    logit_range: str | None = None
    rounding: str | None = None  # how weights are rounded, in place of the recipe's
    iterations: int | None = None
    time_limit: float | None = None  # seconds
    uniform: bool = False
    keep_float: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()  # exceptions, GLOB=W8A16
    ranges: tuple[str, ...] = ()
    container: Container = "packed"
    preprocess: Mapping[str, Any] | None = None
    trust: bool = False
    max_drop: float | None = None  # points: the automatic recipe
    validation: str | None = None
    static_batch: int | None = None
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    input_type: InputType = "float32"
    encodings: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON, without the output folder: a moved folder can still be resumed."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if k != "output"}

    @property
    def narrowest(self) -> Bits:
        """The narrowest widths that weights and activations may get."""
        weights, activations = parse_widths(self.bits)
        return Bits(weights[0], activations[0])

    @property
    def overrides(self) -> Overrides:
        """What is kept in float or has other widths. Raises :class:`UsageError` for what makes no sense."""
        return parse_overrides(self.keep_float, self.sets)

    def without_folders(self) -> dict[str, Any]:
        """What a file for others may say: names without the folders they lie in."""
        named = {
            k: Path(v).name
            for k, v in self.to_dict().items()
            if k in ("network", "calibration", "checkpoint", "recipe") and v
        }
        return {**self.to_dict(), **named}


@dataclass
class Stages:
    """Seconds and peak memory of each stage, as they go."""

    progress: Progress = silent
    rows: list[dict[str, Any]] = field(default_factory=list)

    def run(self, name: str, work: Callable[[], Result]) -> Result:
        """Do one stage and note what it cost."""
        self.progress(name, 0, None)
        start = time.perf_counter()
        with _peak_memory() as peak:
            result = work()
        self.rows.append({"name": name, "seconds": round(time.perf_counter() - start, 3), "peak_memory_bytes": peak[0]})
        return result


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """The largest resident size of this process while the block runs, sampled 50 times a second."""
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    peak[0] = process.memory_info().rss
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def parse_ranges(texts: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """``input=0..1`` -> {"input": (0.0, 1.0)}."""
    found = {}
    for text in texts:
        name, _, span = text.rpartition("=")
        low, dots, high = span.partition("..")
        try:
            found[name] = (float(low), float(high))
        except ValueError:
            dots = ""
        if not dots or not name or found[name][0] > found[name][1]:
            raise UsageError(f"'{text}' is not a range: write it as VALUE=LOWEST..HIGHEST, such as input=0..1")
    return found


def check_output(folder: Path, *, resume: bool, overwrite: bool, source: str = "") -> None:
    """An existing folder is nobody's to overwrite unasked, least of all the one that the work starts from."""
    if folder.is_dir() and Path(source).is_dir() and folder.samefile(source or "."):
        raise UsageError(f"the output '{folder}' is the result that this starts from: name another folder with -o")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"the output '{folder}' is a file: name a folder")
    ours = (folder / SUMMARY).is_file() or (folder / CHECKPOINT / STATE).is_file()
    if any(folder.iterdir()) and not ours:
        refused = "and is not empty"
        if resume or overwrite:
            refused = "so --overwrite would delete something else" if overwrite else "so there is nothing to --resume"
        raise UsageError(f"'{folder}' holds no earlier result of halfbyte, {refused}: name another folder with -o")
    if any(folder.iterdir()) and not (resume or overwrite):
        raise UsageError(
            f"the output folder '{folder}' exists: use --resume to go on, --overwrite to start again, or another -o"
        )


def clear(folder: Path) -> None:
    """Remove an earlier result, and nothing that somebody else has put beside it."""
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    for name in (MODEL, PROOF, UNPROVEN, SUMMARY, REPORT, ENCODINGS, FLOAT_FILE):
        (folder / name).unlink(missing_ok=True)


def quantize_job(
    settings: Settings,
    *,
    command: str,
    resume: bool,
    overwrite: bool,
    progress: Progress = silent,
    notice: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Capture, quantize, export, prove, report. Returns the summary; raises what the command line turns into exit codes.

    notice: is told what is known before the long part of the work begins.
    """
    out = Path(settings.output)
    check_output(out, resume=resume, overwrite=overwrite, source=settings.network)
    preprocess = None if settings.preprocess is None else Preprocess.from_dict(settings.preprocess)
    ranges = parse_ranges(settings.ranges)
    if settings.input_type == "uint8":
        pixel_grid(_preprocess(settings))
    target = find(settings.target, saturates=engine.saturates())
    engines.require(target.engine)
    recipe = chosen_recipe(settings)
    stages = Stages(progress)
    m = _resumed(out, settings) if resume else None
    new = not out.exists()
    try:
        m, stages = _quantized(
            out, settings, m, stages, target, recipe, preprocess, ranges, overwrite, progress, notice
        )
    except BaseException as error:
        resumable = (out / CHECKPOINT / LAYERS).exists() or (out / CHECKPOINT / "graph.json").exists()
        if new and (isinstance(error, UsageError) or not resumable):
            shutil.rmtree(out, ignore_errors=True)  # nothing in it would help a second run, which has to ask for less
        raise
    return finish(out, settings, m, stages, command, recipe.to_dict())


def _quantized(
    out: Path, settings: Settings, m: QModel | None, stages: Stages, target: Target, recipe: Recipe,
    preprocess: Preprocess | None, ranges: Mapping[str, tuple[float, float]], overwrite: bool, progress: Progress,
    notice: Callable[[str], None],
) -> tuple[QModel, Stages]:  # fmt: skip
    """The quantized model: captured and quantized, or as an interrupted run has left it."""
    weight_bits, activation_bits = parse_widths(settings.bits)
    pixels = settings.input_type == "uint8"
    if m is None:
        if overwrite and out.exists():
            clear(out)
        if recipe.has("reconstruct"):
            _begin(out, settings)
        made = stages.run("capture", lambda: note_weights(network_of(settings)))
        if min(*weight_bits, *activation_bits) < 8 and settings.budget is None:
            notice(_size_notice(settings, made, target))
        data = None
        if settings.calibration is not None and settings.max_drop is None:  # the search reads more, and holds some out
            options = {"samples": settings.samples, "batch": settings.batch, "seed": settings.seed}
            data = Hashed(load_samples(made, settings.calibration, preprocess=preprocess, **options))
        m = stages.run(
            "quantize",
            lambda: _chosen(
                made,
                settings,
                None if data is None else data.samples(),
                target=target,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                recipe=recipe,
                overrides=settings.overrides,
                ranges={**(pixel_range(made, _preprocess(settings)) if pixels else {}), **ranges},
                preprocess=preprocess,
                samples=settings.samples,
                batch=settings.batch,
                seed=settings.seed,
                budget=settings.budget,
                uniform=settings.uniform,
                time_limit=settings.time_limit,
                kept=out / CHECKPOINT / LAYERS,
                progress=progress,
            ),
        )
        m = takes_pixels(note_data(m, data), _preprocess(settings)) if pixels else note_data(m, data)
        save_progress(out, settings, m, stages)
    else:
        stages.rows = list(_read_state(out).get("stages", []))
    return m, stages


def _chosen(made: QModel, settings: Settings, data: Samples | None, **options: Any) -> QModel:
    """Quantized by the recipe, or by the cheapest one that holds the limit."""
    if settings.max_drop is None or settings.calibration is None:
        return quantize(made, data, **options)
    options = {k: v for k, v in options.items() if k not in ("recipe", "kept", "budget")}
    (weight_bits,), (activation_bits,) = options.pop("weight_bits"), options.pop("activation_bits")
    validation = None
    if settings.validation is not None:
        shape = output_values(made.graph)[0].meta["shape"]
        classes = shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None
        names = [str(n.target) for n in made.inputs]
        validation = labelled(
            settings.validation,
            preprocess=options["preprocess"],
            input_names=names,
            outputs=classes,
            batch=settings.batch,
        )
    return search(
        made,
        settings.calibration,
        max_drop=settings.max_drop,
        validation=validation,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        **options,
    ).model


def _size_notice(settings: Settings, made: QModel, target: Target) -> str:
    placed = place(
        fold_batchnorm(made), target, weight_bits=settings.narrowest.weights, activation_bits=settings.narrowest.activations,
        uniform=settings.uniform, overrides=settings.overrides,
    )  # fmt: skip
    found = sizes(placed, settings.container)
    return f"weights {found.logical_bytes / 1e6:.3g} MB logical, about {found.file_bytes / 1e6:.3g} MB in the file"


def _preprocess(settings: Settings) -> Preprocess:
    """The pre-processing, where something cannot do without. Raises :class:`UsageError`."""
    if settings.preprocess is None:
        raise UsageError("--input uint8 needs to know what becomes of a pixel: give --size, --mean and --std")
    return Preprocess.from_dict(settings.preprocess)


def chosen_recipe(settings: Settings) -> Recipe:
    """The recipe that the settings name, with their range rules in it."""
    choice_of(*parse_widths(settings.bits), settings.budget)
    narrowest = min(settings.narrowest.weights, settings.narrowest.activations)
    recipe = load_recipe(settings.recipe or default_recipe(settings.calibration is not None, narrowest))
    rules = {
        "activations": settings.activation_range,
        "weights": settings.weight_range,
        "logits": settings.logit_range,
    }
    recipe = recipe.changed("calibrate", **rules)
    learned = {"method": settings.rounding, "iterations": settings.iterations}
    asked = {"--rounding": settings.rounding, "--iterations": settings.iterations, "--time-limit": settings.time_limit}
    given = [option for option, value in asked.items() if value is not None]
    if given and not recipe.has("reconstruct"):
        what = given[0]
        raise UsageError(
            f"recipe '{recipe.name}' has no step reconstruct, which {what} is for: choose --recipe low-bit"
        )
    recipe = recipe.changed("reconstruct", **learned)
    check(recipe)
    return recipe


def network_of(settings: Settings) -> QModel:
    """The captured network that the settings name."""
    preprocess = None if settings.preprocess is None else Preprocess.from_dict(settings.preprocess)
    return capture_network(settings.network, settings.checkpoint, settings.trust, preprocess)


def capture_network(network: str, checkpoint: str | None, trust: bool, preprocess: Preprocess | None) -> QModel:
    """Open and capture a network; its example inputs come with it, or follow from the pre-processing.

    network: as for ``open_network``, or the folder of an earlier result, which holds its float network.
    """
    if Path(network).is_dir():
        if checkpoint is not None:
            raise UsageError(f"'{network}' holds the weights of its network: leave out --checkpoint")
        earlier_settings(Path(network))  # raises for other folders
        m = load(Path(network) / CHECKPOINT)
        if any(SECOND in name or RESIDUAL in name for name in by_value(m.graph)):
            raise UsageError(
                f"layers of '{network}' were split into several tensors: quantize the network itself again"
            )
        return replace(only_weights(unplaced(m)), samples=(), calibrated=0)
    net, example = open_network(network, checkpoint=checkpoint, trust=trust)
    if example is None and preprocess is not None:
        example = (torch.zeros(2, preprocess.channels, *preprocess.shape),)
    if example is None:
        raise UsageError(
            f"'{network}' brings no example inputs: return (module, example inputs), or give --size for images"
        )
    return capture(net, example)


def finish(
    out: Path, settings: Settings, m: QModel, stages: Stages, command: str, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the file, prove it, and describe all in ``summary.json`` and the report. Raises :class:`ParityError`."""
    told = metadata(m, settings.without_folders(), recipe)
    parity: Parity | None = None
    failure: ParityError | None = None
    try:
        parity = stages.run(
            "export and prove",
            lambda: export_onnx(
                m,
                out / MODEL,
                metadata=told,
                container=settings.container,
                static_batch=settings.static_batch,
                input_names=settings.input_names or None,
                output_names=settings.output_names or None,
                input_type=settings.input_type,
            ),
        )
    except ParityError as error:
        failure = error
    except BaseException:  # only a file that was found to differ stays for inspection
        (out / UNPROVEN).unlink(missing_ok=True)
        raise
    if parity is not None:
        note_proof(out / MODEL, parity)
        if _portable(settings, m):
            stages.run("store the proof", lambda: write_proof(m, out / MODEL, out / PROOF))
    if settings.encodings and failure is None:
        stages.run("encodings", lambda: export_encodings(m, out))
    described = stages.run("describe", lambda: _describe(out, settings, m, parity, stages, command, recipe))
    described["stages"] = stages.rows
    write_summary(out, described)
    if failure is not None:
        raise failure
    return described


def _portable(settings: Settings, m: QModel) -> bool:
    """Whether the file takes what the simulation takes, in ONNX Runtime, so that numpy and that engine can repeat the proof."""
    ports = settings.static_batch, settings.input_names, settings.output_names
    plain = settings.input_type == "float32" and not any(ports)
    return plain and m.target is not None and m.target.engine == "onnxruntime"


def _describe(
    out: Path, settings: Settings, m: QModel, parity: Parity | None, stages: Stages, command: str,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    return summary.describe(
        m,
        network=settings.network,
        command=command,
        configuration={
            **settings.to_dict(),
            "calibration_samples": m.calibrated,
            "recipe": dict(recipe),
        },
        seed=settings.seed,
        file=out / MODEL if parity is not None else None,
        parity=parity,
        stages=stages.rows,
        preprocess=settings.preprocess,
    )


def _begin(out: Path, settings: Settings) -> None:
    """Note what is being made, so that layers solved before an interruption can be used again."""
    try:
        (out / CHECKPOINT).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write to '{out}': {error.strerror or error}") from error
    write_whole(out / CHECKPOINT / STATE, json.dumps({"configuration": settings.to_dict(), "stages": []}))


def save_progress(out: Path, settings: Settings, m: QModel, stages: Stages) -> None:
    """Store the quantized model, so that nothing but the file and its proof is left to do. Raises :class:`StoreError`."""
    found = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        save(m, out / CHECKPOINT)
        write_whole(out / CHECKPOINT / STATE, json.dumps({"configuration": settings.to_dict(), "stages": stages.rows}))
        shutil.rmtree(out / CHECKPOINT / LAYERS, ignore_errors=True)
    except BaseException as error:  # an interruption too: half a checkpoint is none
        if found:
            (out / CHECKPOINT / "graph.json").unlink(missing_ok=True)  # solved layers stay
        else:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            raise StoreError(f"cannot write to '{out}': {error.strerror or error}") from error
        raise


def _read_state(out: Path) -> dict[str, Any]:
    try:
        state = json.loads((out / CHECKPOINT / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def earlier_settings(out: Path) -> Settings:
    """What an earlier result was made with. Raises :class:`StoreError` if the folder holds none."""
    found = _read_state(out).get("configuration")
    if not isinstance(found, dict) or not (out / CHECKPOINT / "graph.json").is_file():
        raise StoreError(f"'{out}' holds no finished result of 'halfbyte quantize', nor a network")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    try:
        return Settings(output=str(out), **given)
    except TypeError as error:
        raise StoreError(f"'{out}' was written by another version of halfbyte: quantize again") from error


def _resumed(out: Path, settings: Settings) -> QModel | None:
    """The model of an interrupted run; None if it had not come that far."""
    state = _read_state(out)
    if not isinstance(state.get("configuration"), dict):
        return None
    before, now = state["configuration"], json.loads(json.dumps(settings.to_dict()))
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if changed:
        raise UsageError(f"--resume needs the same configuration as before; different: {', '.join(changed)}")
    return load(out / CHECKPOINT) if (out / CHECKPOINT / "graph.json").is_file() else None


def write_summary(out: Path, described: Mapping[str, Any]) -> None:
    """``summary.json`` and the report made from it."""
    write_whole(out / SUMMARY, json.dumps(described, indent=1, allow_nan=False))
    report.write(described, out / REPORT)


def read_summary(out: Path) -> dict[str, Any]:
    """``summary.json`` of an output folder. Raises :class:`StoreError` if there is none."""
    try:
        found = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"'{out}' is not an output folder of 'halfbyte quantize': it has no {SUMMARY}") from error
    except ValueError as error:
        raise StoreError(f"'{out / SUMMARY}' is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != summary.SCHEMA:
        raise StoreError(
            f"'{out / SUMMARY}' has another schema than {summary.SCHEMA}: quantize again with this version"
        )
    return found


def open_output(out: Path) -> tuple[QModel, Path | None, Preprocess | None, dict[str, Any]]:
    """An output folder's model, exported file (if proven), pre-processing and summary."""
    described = read_summary(out)
    file = out / MODEL
    preprocess = None if described.get("preprocess") is None else Preprocess.from_dict(described["preprocess"])
    return load(out / CHECKPOINT), file if file.exists() else None, preprocess, described
