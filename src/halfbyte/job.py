"""The command ``quantize`` from start to end: stages with time and memory, an output folder that can be resumed, a report."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from halfbyte import engine, engines, summary
from halfbyte.calibrate import Progress, silent
from halfbyte.encodings import export_encodings
from halfbyte.errors import ParityError, StoreError, UsageError
from halfbyte.export_onnx import export_onnx
from halfbyte.formats import parse_widths
from halfbyte.model import QModel, Target
from halfbyte.output import LAYERS, REPORT, STATE, UNPROVEN, check_output, clear, read_state, write_summary
from halfbyte.parity import Parity
from halfbyte.pipeline import choice_of, recipe_for
from halfbyte.place import place
from halfbyte.ports import Ports, pixel_grid
from halfbyte.preprocess import Preprocess
from halfbyte.proof import write_proof
from halfbyte.prove import MODEL, PROOF
from halfbyte.provenance import metadata, note_proof, note_weights
from halfbyte.quantize import known_pixels, quantize
from halfbyte.recipe import Recipe
from halfbyte.settings import Settings, network_of, parse_ranges
from halfbyte.shown import Shown, scaled
from halfbyte.sizes import sizes
from halfbyte.store import CHECKPOINT, load, save, write_whole
from halfbyte.targets import find
from halfbyte.transforms.fold_batchnorm import fold_batchnorm

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Exported(Shown):
    """An output folder that was written: where it lies, and everything that its ``summary.json`` says."""

    output: str
    summary: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The summary."""
        return dict(self.summary)

    def facts(self) -> dict[str, Any]:
        """The verdict, and a row for each layer."""
        shown = ("name", "op", "shape", "weight_bits", "activation_bits", "macs", "bytes", "sqnr_output", "reason")
        layers = [{k: row[k] for k in shown} for row in self.summary["layers"]]
        return {**dict(zip(("file", "layers", "more"), self._lines(), strict=True)), "by layer": layers}

    def __str__(self) -> str:
        changed = [e for e in self.summary["log"] if e["stage"] == "override"]
        split = [e for e in self.summary["log"] if e["stage"] == "split_tensor" and e["figures"].get("values")]
        first = [f"override: {e['value'] or 'none'}: {e['message']}" for e in changed] + [e["message"] for e in split]
        return "\n".join([*first, *self._lines()])

    def _lines(self) -> list[str]:
        s = self.summary
        layers, size = s["layers"], s["size"]
        integer, seconds = sum(row["integer"] for row in layers), sum(row["seconds"] for row in s["stages"])
        sizes = f"{scaled(size['file_bytes'], 'B')} instead of {scaled(size['float_bytes'], 'B')}"
        return [
            f"{self.output}/{MODEL}: {sizes}, {_verdict(s['parity'])}",
            f"{integer} of {len(layers)} layers in integers; {len(s['float_left'])} operations in float; {seconds:.0f} s",
            f"{self.output}/{REPORT} has the details",
        ]


def _verdict(p: Mapping[str, Any] | None) -> str:
    if p is None:
        return "not proven"
    extent = "equal" if not p["integer_mismatches"] else f"within {p['integer_max_steps']} step"
    return f"proven {extent} on {p['engine']} {p['engine_version']} ({p['instruction_set']})"


@dataclass
class Stages:
    """Seconds and peak memory of each stage, as they go."""

    progress: Progress = silent
    rows: list[dict[str, Any]] = field(default_factory=list)

    def run(self, name: str, work: Callable[[], T]) -> T:
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


def quantize_job(
    settings: Settings,
    *,
    command: str,
    resume: bool,
    overwrite: bool,
    progress: Progress = silent,
    notice: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Capture, quantize, export, prove, report; raises what the command line turns into exit codes.

    notice: is told what is known before the long part of the work begins.
    """
    out = Path(settings.output)
    check_output(out, resume=resume, overwrite=overwrite, source=settings.network)
    preprocess = None if settings.preprocess is None else Preprocess.from_dict(settings.preprocess)
    ranges = parse_ranges(settings.ranges)
    if settings.input_type == "uint8":
        pixel_grid(known_pixels(preprocess))
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
    if m is None:
        if overwrite and out.exists():
            clear(out)
        if recipe.has("reconstruct"):
            _begin(out, settings)
        made = stages.run("capture", lambda: note_weights(network_of(settings)))
        if min(*weight_bits, *activation_bits) < 8 and settings.budget is None:
            notice(_size_notice(settings, made, target))
        m = stages.run(
            "quantize",
            lambda: quantize(
                made,
                settings.calibration,
                target=target,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                recipe=None if settings.max_drop is not None else recipe,
                overrides=settings.overrides,
                ranges=ranges,
                preprocess=preprocess,
                input_type=settings.input_type,
                samples=settings.samples,
                batch=settings.batch,
                seed=settings.seed,
                budget=settings.budget,
                uniform=settings.uniform,
                time_limit=settings.time_limit,
                max_drop=settings.max_drop,
                validation=settings.validation,
                kept=out / CHECKPOINT / LAYERS,
                progress=progress,
            ),
        )
        save_progress(out, settings, m, stages)
    else:
        stages.rows = list(read_state(out).get("stages", []))
    return m, stages


def _size_notice(settings: Settings, made: QModel, target: Target) -> str:
    placed = place(
        fold_batchnorm(made), target, weight_bits=settings.narrowest.weights, activation_bits=settings.narrowest.activations,
        uniform=settings.uniform, overrides=settings.overrides,
    )  # fmt: skip
    found = sizes(placed, settings.container)
    return f"weights {scaled(found.logical_bytes, 'B')} logical, about {scaled(found.file_bytes, 'B')} in the file"


def chosen_recipe(settings: Settings) -> Recipe:
    """The recipe that the settings name, with their range rules in it."""
    weight_bits, activation_bits = parse_widths(settings.bits)
    return recipe_for(
        settings.recipe,
        data=settings.calibration is not None,
        choice=choice_of(weight_bits, activation_bits, settings.budget)[0],
        activation_range=settings.activation_range,
        weight_range=settings.weight_range,
        logit_range=settings.logit_range,
        rounding=settings.rounding,
        iterations=settings.iterations,
        time_limit=settings.time_limit,
    )


def finish(
    out: Path, settings: Settings, m: QModel, stages: Stages, command: str, recipe: Mapping[str, Any]
) -> Exported:
    """Write the file, prove it, and describe all in ``summary.json`` and the report. Raises :class:`ParityError`."""
    ports = Ports(
        settings.static_batch, settings.input_names or None, settings.output_names or None, settings.input_type
    )
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
                **vars(ports),
            ),
        )
    except ParityError as error:
        failure = error
    except BaseException:  # only a file that was found to differ stays for inspection
        (out / UNPROVEN).unlink(missing_ok=True)
        raise
    if parity is not None:
        note_proof(out / MODEL, parity)
        if m.target is not None and m.target.engine == "onnxruntime":
            stages.run("store the proof", lambda: write_proof(m, out / MODEL, out / PROOF, ports))
    if settings.encodings and failure is None:
        stages.run("encodings", lambda: export_encodings(m, out))
    described = stages.run("describe", lambda: _describe(out, settings, m, parity, stages, command, recipe))
    described["stages"] = stages.rows
    write_summary(out, described)
    if failure is not None:
        raise failure
    return Exported(str(out), described)


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


def _resumed(out: Path, settings: Settings) -> QModel | None:
    """The model of an interrupted run; None if it had not come that far."""
    state = read_state(out)
    if not isinstance(state.get("configuration"), dict):
        return None
    before, now = state["configuration"], json.loads(json.dumps(settings.to_dict()))
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if changed:
        raise UsageError(f"--resume needs the same configuration as before; different: {', '.join(changed)}")
    return load(out / CHECKPOINT) if (out / CHECKPOINT / "graph.json").is_file() else None
