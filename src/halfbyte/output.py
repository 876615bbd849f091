"""The folder that ``halfbyte quantize`` leaves: what lies where, and how it is opened, described and replaced."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from halfbyte.encodings import ENCODINGS, FLOAT_FILE
from halfbyte.errors import StoreError, UsageError
from halfbyte.model import QModel
from halfbyte.preprocess import Preprocess
from halfbyte.prove import MODEL, PROOF
from halfbyte.report import write
from halfbyte.shown import Shown
from halfbyte.store import CHECKPOINT, load, write_whole

SUMMARY, REPORT = "summary.json", "report.html"
UNPROVEN = "model.unproven.onnx"
STATE, LAYERS = "state.json", "layers"  # in the checkpoint: what was asked for, and layers solved so far
SCHEMA = 1  # of the summary
Result = QModel | str | PathLike[str]


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


def read_state(out: Path) -> dict[str, Any]:
    """What an earlier run was asked for, and its stages; empty where there was none."""
    try:
        state = json.loads((out / CHECKPOINT / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_summary(out: Path, described: Mapping[str, Any]) -> None:
    """``summary.json`` and the report made from it."""
    write_whole(out / SUMMARY, json.dumps(described, indent=1, allow_nan=False))
    write(described, out / REPORT)


def read_summary(out: Path) -> dict[str, Any]:
    """``summary.json`` of an output folder. Raises :class:`StoreError` if there is none."""
    try:
        found = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"'{out}' is not an output folder of 'halfbyte quantize': it has no {SUMMARY}") from error
    except ValueError as error:
        raise StoreError(f"'{out / SUMMARY}' is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise StoreError(f"'{out / SUMMARY}' has another schema than {SCHEMA}: quantize again with this version")
    return found


def open_output(out: Path) -> tuple[QModel, Path | None, Preprocess | None, dict[str, Any]]:
    """An output folder's model, exported file (if proven), pre-processing and summary."""
    described = read_summary(out)
    file = out / MODEL
    preprocess = None if described.get("preprocess") is None else Preprocess.from_dict(described["preprocess"])
    return load(out / CHECKPOINT), file if file.exists() else None, preprocess, described


def opened(result: Result) -> tuple[QModel, Path | None, Preprocess | None, dict[str, Any]]:
    """As :func:`open_output`; of a model that is in no folder nothing else is known."""
    return (result, None, None, {}) if isinstance(result, QModel) else open_output(Path(result))


def folder_of(result: Result, why: str) -> Path:
    """The output folder, where nothing else will do. Raises :class:`UsageError` for a model that is in none."""
    if isinstance(result, QModel):
        raise UsageError(f"{why}: write it with hb.export(model, 'out'), and give 'out'")
    return Path(result)


def keep(result: Result, described: dict[str, Any], **found: Shown) -> None:
    """Add to the summary of an output folder, and to its report, what was found out about it; of a model nothing is kept."""
    if not isinstance(result, QModel):
        write_summary(Path(result), {**described, **{name: value.to_dict() for name, value in found.items()}})


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """Where the page is."""

    report: str

    def __str__(self) -> str:
        return self.report


def report(output: Result) -> Report:
    """(Re)write ``report.html`` of an output folder from its ``summary.json``. Raises :class:`StoreError` where there is none."""
    folder = folder_of(output, "a report is written of an output folder")
    write(read_summary(folder), folder / REPORT)
    return Report(str(folder / REPORT))
