"""Limits on a result, each with the number that was measured: for a pipeline that must not ship what misses one."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.benchmark import against_float
from halfbyte.budgets import BYTES
from halfbyte.calibrate import Progress, silent
from halfbyte.data import Source
from halfbyte.errors import ParityError, UsageError
from halfbyte.evaluate import paired
from halfbyte.model import QModel
from halfbyte.output import Result, folder_of, open_output
from halfbyte.preprocess import Preprocess
from halfbyte.prove import is_proven_file
from halfbyte.scoring import decisions, open_data
from halfbyte.shown import Shown

_UNITS = {"": 1.0, **{unit.lower(): size for unit, size in BYTES.items()}}
_ROUNDS = 30


@dataclass(frozen=True)
class Limit:
    """One limit: its name, what was asked for and what was measured (points, bytes or times), and where the number is from."""

    name: str
    limit: float
    measured: float
    held: bool
    text: str

    def __str__(self) -> str:
        return f"{'held  ' if self.held else 'MISSED'} {self.text}"


@dataclass(frozen=True, repr=False)
class Check(Shown):
    """All limits that were asked for."""

    output: str
    proof: str
    limits: tuple[Limit, ...]

    @property
    def held(self) -> bool:
        """Whether no limit is missed."""
        return all(limit.held for limit in self.limits)

    def __str__(self) -> str:
        return "\n".join([f"held   {self.proof}", *map(str, self.limits)])

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"held": self.held, **super().to_dict()}


def parse_size(text: str | float) -> int:
    """``5MB`` (10^6), ``5MiB`` (2^20), ``500 kB`` or a number of bytes -> bytes. Raises :class:`UsageError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"'{text}' is not a size: write it as 5MB, 500kB, 4.5MiB or as a number of bytes")
    return round(float(match[1]) * unit)


def check(
    output: Result,
    *,
    max_drop: float | None = None,
    max_size: str | float | None = None,
    min_speedup: float | None = None,
    data: Source | None = None,
    unlabelled: Source | None = None,
    preprocess: Preprocess | None = None,
    limit: int | None = None,
    batch: int = 50,
    threads: int | None = None,
    progress: Progress = silent,
) -> Check:
    """Hold a result of ``halfbyte quantize`` to limits; nothing in the folder is changed.

    max_drop: points (hundredths) that the file may lose against the float network: right decisions on ``data`` (labelled), or
    decisions that differ from float's on ``unlabelled``; without either, what ``halfbyte evaluate`` has stored. max_size:
    bytes of ``model.onnx``, or a text such as ``5MB``. min_speedup: times as fast as the float network in the same engine, as
    ``halfbyte benchmark`` has stored it, or measured now. limit: use so many samples. Raises :class:`UsageError` where no limit
    is given or one cannot be measured, :class:`ParityError` where there is no proven file.
    """
    if max_drop is None and max_size is None and min_speedup is None:
        raise UsageError("there is no limit to check: give --max-drop, --max-size or --min-speedup")
    for name, asked in (("max_drop", max_drop), ("min_speedup", min_speedup)):
        if asked is not None and not 0 <= asked < math.inf:
            raise UsageError(f"{name} is {asked:g}: give a number that is not negative")
    size = None if max_size is None else parse_size(max_size)
    folder = folder_of(output, "limits are held by a result with its file")
    m, file, kept, described = open_output(folder)
    parity = described.get("parity")
    if file is None or not parity or not parity["proven"]:
        raise ParityError(f"'{folder}' has no proven model.onnx: there is nothing that may be used")
    if not is_proven_file(file):
        raise ParityError(
            f"'{file}' is not the file that was proven: it was damaged or replaced, so quantize again or copy it anew"
        )
    source = open_data(m, data, unlabelled, preprocess=preprocess or kept, limit=limit, batch=batch)
    limits = []
    if size is not None:
        actual = file.stat().st_size
        limits.append(Limit("max_size", size, actual, actual <= size, f"size {actual:,} bytes, at most {size:,}"))
    if max_drop is not None:
        limits.append(_drop(max_drop, m, file, source, described, threads, progress))
    if min_speedup is not None:
        limits.append(_speed(min_speedup, m, file, described, threads, progress))
    proof = f"proven equal on {parity['engine']} {parity['engine_version']} ({parity['instruction_set']})"
    return Check(str(folder), proof, tuple(limits))


def _drop(
    most: float, m: QModel, file: Path, source: Any, described: dict[str, Any], threads: int | None, progress: Progress
) -> Limit:
    stored = described.get("evaluation")
    if source is not None:
        found = decisions(m, file, source, threads=threads, progress=progress)
        span = paired(found.float, found.file)
        points, low, high, samples, metric = span.points, span.low, span.high, len(found.file), found.metric
    elif stored and stored.get("difference") and "file" in stored:
        difference = stored["difference"]
        points, low, high = difference["points"], difference["low"], difference["high"]
        samples, metric = stored["samples"], f"{stored['metric']}, as evaluated before"
    else:
        raise UsageError(
            "the drop is not known: give --data with labelled samples, --unlabelled with others, or run 'halfbyte evaluate' first"
        )
    interval = "" if low is None else f" (95 % interval {low:+.2f} to {high:+.2f})"
    text = f"{metric} {points:+.2f} points{interval} on {samples} samples, at most {-most:+.2f}"
    return Limit("max_drop", most, -points, -points <= most, text)


def _speed(
    least: float, m: QModel, file: Path, described: dict[str, Any], threads: int | None, progress: Progress
) -> Limit:
    stored = described.get("benchmark")
    if stored is None:
        stored = vars(
            against_float(
                m,
                file,
                rounds=_ROUNDS,
                threads=torch.get_num_threads() if threads is None else threads,
                progress=progress,
            )
        )
        when = "measured now"
    else:
        when = "as measured before"
    ratio = stored["ratio"]
    span = (
        f"(90 % of rounds {stored['ratio_low']:.2f} to {stored['ratio_high']:.2f}, {stored['threads']} threads, {when})"
    )
    return Limit(
        "min_speedup", least, ratio, ratio >= least, f"{ratio:.2f} times as fast as float {span}, at least {least:.2f}"
    )
