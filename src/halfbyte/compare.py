"""Results of several runs side by side: accuracy with paired intervals, size, speed, proof, and the layers that differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch

from halfbyte.benchmark import against_float
from halfbyte.calibrate import Progress, silent
from halfbyte.data import Source
from halfbyte.errors import UsageError
from halfbyte.evaluate import Interval, paired
from halfbyte.output import Result as Output
from halfbyte.output import folder_of, open_output
from halfbyte.preprocess import Preprocess
from halfbyte.scoring import Decisions, decisions, open_data
from halfbyte.shown import Shown, aligned, scaled

_NOISE = 1.0  # dB: layers whose signal-to-noise differs by less are not listed


@dataclass(frozen=True)
class Result:
    """One output folder.

    score: share of right decisions of the file, with its ``metric`` and ``samples``. difference: from the float network, in
    points. against_first: from the first folder's file on the same samples. agreement: share of decisions that are float's.
    speedup: times as fast as float, with the 90 % spread over rounds. What is not known is None.
    """

    name: str
    bits: str
    target: str
    file_bytes: int
    logical_bytes: int
    float_bytes: int
    proven: bool
    proof: str
    metric: str | None = None
    samples: int | None = None
    score: float | None = None
    difference: Interval | None = None
    against_first: Interval | None = None
    agreement: float | None = None
    speedup: tuple[float, float, float] | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class LayerChange:
    """A layer that is not the same everywhere: its format and signal-to-noise at its output (dB) in each folder."""

    name: str
    formats: tuple[str, ...]
    noise: tuple[float | None, ...]


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """The folders in the order given, the layers that differ between them, and what a reader should know."""

    results: tuple[Result, ...]
    layers: tuple[LayerChange, ...]
    notes: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, ...]]:
        """The table of results as text; columns of which nothing is known are left out."""
        head = ("", "bits", "score", "from float", "from first", "agrees", "file", "logical", "speed", "proof")
        table = [head, *(_row(r) for r in self.results)]
        kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in table[1:])]
        return [tuple(row[i] for i in kept) for row in table]

    def layer_rows(self) -> list[tuple[str, ...]]:
        """The table of layers as text."""
        head = ("layer", *(r.name for r in self.results))
        return [head, *((c.name, *map(_layer_cell, c.formats, c.noise)) for c in self.layers)]

    def __str__(self) -> str:
        parts = [aligned(self.rows())]
        if self.layers:
            parts.append(f"{len(self.layers)} layers differ (signal-to-noise at the output):")
            parts.append(aligned(self.layer_rows()))
        return "\n".join([*parts, *self.notes])

    def facts(self) -> dict[str, Any]:
        """The tables as text."""
        results, layers = (
            [dict(zip(t[0], row, strict=True)) for row in t[1:]] for t in (self.rows(), self.layer_rows())
        )
        return {
            "results": results,
            **({"layers that differ": layers} if layers else {}),
            "notes": "; ".join(self.notes),
        }

    def to_html(self) -> str:
        """One page without outside resources."""
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        template = (resources.files("halfbyte") / "compare.html.j2").read_text(encoding="utf-8")
        return environment.from_string(template).render(
            rows=self.rows(), layers=self.layer_rows(), notes=self.notes, metric=self.results[0].metric
        )


def _row(r: Result) -> tuple[str, ...]:
    speed = "" if r.speedup is None else f"{r.speedup[0]:.2f}x"
    return (
        r.name,
        r.bits,
        "" if r.score is None else f"{r.score:.2%}",
        _interval(r.difference),
        _interval(r.against_first),
        "" if r.agreement is None else f"{r.agreement:.2%}",
        scaled(r.file_bytes, "B"),
        scaled(r.logical_bytes, "B"),
        speed if r.milliseconds is None else f"{speed} ({r.milliseconds:.2f} ms)",
        r.proof,
    )


def _interval(i: Interval | None) -> str:
    return "" if i is None else f"{i.points:+.2f} ({i.low:+.2f} to {i.high:+.2f})"


def _layer_cell(form: str, noise: float | None) -> str:
    return form if noise is None else f"{form} {noise:.1f} dB"


def compare(
    outputs: Sequence[Output],
    *,
    data: Source | None = None,
    unlabelled: Source | None = None,
    benchmark: bool = False,
    preprocess: Preprocess | None = None,
    limit: int | None = None,
    batch: int = 50,
    rounds: int = 30,
    threads: int | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Put results of ``halfbyte quantize`` for one network side by side; nothing in the folders is changed.

    data: labelled samples, all files run on them. unlabelled: samples without labels; the float network's decisions count as
    right. Without either, what ``halfbyte evaluate`` has stored, which is not paired between folders. benchmark: time every file
    against float now, ``rounds`` times; else what is stored. limit, batch: how many samples, in what portions. Raises
    :class:`UsageError` for fewer than two folders, networks of different inputs, or a folder without proven file.
    """
    folders = [folder_of(o, "results are compared with their files") for o in outputs]
    if len(folders) < 2:
        raise UsageError("there is nothing to compare: give at least two output folders")
    opened = {folder: open_output(folder) for folder in folders}
    if len(opened) < len(folders):
        raise UsageError("the same output folder was given twice")
    _check_same(opened)
    names, results, notes = _short_names(folders), [], []
    first: Decisions | None = None
    for folder, name in zip(folders, names, strict=True):
        m, file, kept, described = opened[folder]
        assert file is not None  # checked
        facts = _stored(name, file, described)
        source = open_data(m, data, unlabelled, preprocess=preprocess or kept, limit=limit, batch=batch)
        if source is not None:
            found = decisions(m, file, source, threads=threads, progress=progress)
            notes += _unlike(first, found, names[0], name)
            facts |= _scored(found, first)
            first = first or found
        if benchmark:
            b = against_float(m, file, rounds=rounds, threads=threads or torch.get_num_threads(), progress=progress)
            facts |= _timed(vars(b))
        results.append(Result(**facts))
    if data is None and unlabelled is None:
        notes.append(_about_stored(results))
    return Comparison(tuple(results), tuple(_changes([opened[f][3] for f in folders])), tuple(n for n in notes if n))


def _check_same(opened: Mapping[Path, tuple[Any, Path | None, Any, dict[str, Any]]]) -> None:
    first: tuple[Any, Any] | None = None
    for folder, (_, file, _, described) in opened.items():
        if file is None:
            raise UsageError(f"'{folder}' has no proven model.onnx to compare")
        ports = described["inputs"], [o["shape"] for o in described["outputs"]]
        if first is not None and ports != first:
            raise UsageError(f"'{folder}' is of a network with other inputs or outputs than '{next(iter(opened))}'")
        first = ports


def _short_names(folders: list[Path]) -> list[str]:
    """The last part of each path if that tells them apart."""
    short = [f.resolve().name for f in folders]
    return short if len(set(short)) == len(short) else [str(f) for f in folders]


def _stored(name: str, file: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    size, parity = described["size"], described["parity"]
    proven = bool(parity and parity["proven"])
    facts: dict[str, Any] = {
        "name": name,
        "bits": described["bits"] or "",
        "target": described["target"] or "",
        "file_bytes": file.stat().st_size,
        "logical_bytes": size["logical_bits"] // 8,
        "float_bytes": size["float_bytes"],
        "proven": proven,
        "proof": f"proven on {parity['integer_values']} integer values" if proven else "not proven",
    }
    evaluation, timed = described.get("evaluation"), described.get("benchmark")
    if evaluation and "file" in evaluation:
        d = evaluation["difference"]
        facts |= {
            "metric": evaluation["metric"],
            "samples": evaluation["samples"],
            "score": evaluation["file"],
            "difference": None if not d or d["low"] is None else Interval(**d),
            "agreement": evaluation["agreement"].get("file_float"),
        }
    return facts | (_timed(timed) if timed else {})


def _timed(b: Mapping[str, Any]) -> dict[str, Any]:
    return {"speedup": (b["ratio"], b["ratio_low"], b["ratio_high"]), "milliseconds": b["quantized_ms"]}


def _scored(found: Decisions, first: Decisions | None) -> dict[str, Any]:
    return {
        "metric": found.metric,
        "samples": len(found.file),
        "score": float(found.file.mean()),
        "difference": paired(found.float, found.file),
        "against_first": None if first is None else paired(first.file, found.file),
        "agreement": float(found.agreement.mean()),
    }


def _unlike(first: Decisions | None, found: Decisions, a: str, b: str) -> list[str]:
    """Results are compared sample by sample: that needs the same samples, and should be one network."""
    if first is None:
        return []
    if len(first.file) != len(found.file):
        raise UsageError(f"the data give {len(first.file)} samples for '{a}' and {len(found.file)} for '{b}'")
    odd = int((first.float != found.float).sum())
    return [f"the float networks of {a} and {b} score differently on {odd} samples: are they one?"] if odd else []


def _about_stored(results: Sequence[Result]) -> str:
    known = {(r.metric, r.samples) for r in results if r.score is not None}
    if not known:
        return "accuracy is not known: give --data with labelled samples, or --unlabelled with others"
    if len(known) > 1 or any(r.score is None for r in results):
        return "scores are from different evaluations, or missing: give --data to measure all on the same samples"
    return ""


def _changes(described: Sequence[Mapping[str, Any]]) -> list[LayerChange]:
    tables = [{row["name"]: row for row in d["layers"]} for d in described]
    changes = []
    for name in dict.fromkeys(n for table in tables for n in table):
        rows = [table.get(name) for table in tables]
        formats = tuple(_form(row) for row in rows)
        noise = tuple(None if row is None else row["sqnr_output"] for row in rows)
        known = [x for x in noise if x is not None]
        if len(set(formats)) > 1 or (known and max(known) - min(known) >= _NOISE):
            changes.append(LayerChange(name, formats, noise))
    return changes


def _form(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "absent"
    widths = tuple("float" if b == 32 else str(b) for b in (row["weight_bits"], row["activation_bits"]))
    return "float" if widths == ("float", "float") else f"W{widths[0]}A{widths[1]}"
