"""A quantized model as an output folder; and another file from an earlier result, of the same integers."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from halfbyte import engine
from halfbyte.calibrate import Progress, silent
from halfbyte.errors import UsageError
from halfbyte.export_onnx import Container
from halfbyte.job import Exported, Stages, finish, save_progress
from halfbyte.lower import weight_formats
from halfbyte.model import LogEntry, QModel, Target
from halfbyte.ops import kind
from halfbyte.output import Result, check_output, clear, open_output
from halfbyte.ports import InputType
from halfbyte.preprocess import Preprocess
from halfbyte.settings import Settings, earlier_settings
from halfbyte.targets import find


def export(
    source: Result,
    output: str | PathLike[str],
    *,
    target: str | None = None,
    container: Container | None = None,
    static_batch: int | None = None,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    input_type: InputType | None = None,
    encodings: bool = False,
    preprocess: Preprocess | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write a quantized model as ``halfbyte quantize`` does: the proven file, its proof, summary, report and checkpoint.

    source: a model that :func:`quantize` returned; or an output folder, to write its integers once more: nothing is calibrated
    again. output: the folder for the result. target: another one that runs the same integers. container: how weights of 4 and
    fewer bits are stored, ``packed`` or ``int8``. static_batch, input_names, output_names, input_type: of the file. encodings:
    AIMET's, too. preprocess: what a model's samples went through, so that ``evaluate`` does the same. What is not given is as
    before, or as :func:`export_onnx` does it. Raises :class:`UsageError` where the target would run other integers or the
    output exists, :class:`ParityError` where the file is not proven.
    """
    out = Path(output)
    given = {"target": target, "container": container, "static_batch": static_batch, "encodings": encodings,
             "input_names": tuple(input_names), "output_names": tuple(output_names), "input_type": input_type,
             "preprocess": None if preprocess is None else preprocess.to_dict()}  # fmt: skip
    if isinstance(source, QModel):
        m, settings, command, recipe = source, _settings_of(source), "", _recipe_of(source)
    else:
        m, _, _, described = open_output(Path(source))
        settings, recipe = earlier_settings(Path(source)), described["configuration"]["recipe"]
    changed: dict[str, Any] = {k: v for k, v in given.items() if v}
    settings = replace(settings, **changed, output=str(out))
    assert m.target is not None  # quantized models have one
    where = (
        m.target
        if isinstance(source, QModel) and target is None
        else find(settings.target, saturates=engine.saturates())
    )
    _check_target(source, m, where, settings)
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"the output folder '{out}' exists: use --overwrite to replace it, or another -o")
    check_output(out, resume=False, overwrite=overwrite, source="" if isinstance(source, QModel) else str(source))
    if overwrite and out.exists():
        clear(out)
    stages = Stages(progress)
    if not isinstance(source, QModel):
        entry = f"for {where.name}, weights {settings.container}: from an earlier result, not calibrated again"
        m = m.logged(LogEntry("export", None, entry))
        # the last option counts, so that this quantizes to the same
        options = ["--target", settings.target, "--container", settings.container, "-o", str(out)]
        command = f"{described['command']} {shlex.join(options)}".strip()
    m = replace(m, target=where)
    save_progress(out, settings, m, stages)
    return finish(out, settings, m, stages, command, recipe)


def _settings_of(m: QModel) -> Settings:
    """What a model says about how it was made."""
    if m.target is None or not m.grids:
        raise UsageError("the model has no grids yet, so that there are no integers to export: call hb.quantize first")
    weights = {str(n.meta["value"]) for n in m.graph.nodes if n.op == "get_attr" and "value" in n.meta}
    widths = [
        sorted({f.bits for v, f in m.plan.items() if f is not None and (v in weights) is w}) for w in (True, False)
    ]
    w, a = (",".join(map(str, bits)) or "8" for bits in widths)
    return Settings(network="", calibration=None, output="", target=m.target.name, bits=f"W{w}A{a}")


def _recipe_of(m: QModel) -> dict[str, Any]:
    """The recipe that made a model, from its log; nothing where it was made step by step."""
    return next((dict(e.figures["recipe"]) for e in reversed(m.log) if "recipe" in e.figures), {})


def _check_target(source: Result, m: QModel, where: Target, settings: Settings) -> None:
    found = differences(m, where)
    if not found:
        return
    if isinstance(source, QModel):
        again = f"hb.quantize(..., target='{settings.target}')"
    else:
        again = "halfbyte " + shlex.join(["quantize", str(source), "--target", settings.target, "-o", settings.output])
    name = "the model" if isinstance(source, QModel) else f"'{source}'"
    raise UsageError(f"{name} cannot be written for {where.name}: {'; '.join(found)}: quantize again: {again}")


def differences(m: QModel, target: Target) -> list[str]:
    """Why a model's plan and grids are not what they would be for another target; empty where they would."""
    before = m.target
    assert before is not None  # only quantized models have checkpoints
    used = {kind(n).value for n in m.graph.nodes}
    found = []
    for mine, others, what in (
        (before.integer, target.integer, "runs"),
        (before.float_output, target.float_output, "may write floats from"),
    ):
        for owner, names in ((before, mine - others), (target, others - mine)):
            if names & used:
                other = target if owner is before else before
                found.append(
                    f"{owner.name} {what} {_listed(names & used)}{' in integers' * (what == 'runs')}, {other.name} does not"
                )
    if before.per_channel != target.per_channel:
        wide, narrow = (before, target) if before.per_channel else (target, before)
        found.append(f"{wide.name} has a weight scale for each channel, {narrow.name} one for a whole tensor")
    if not target.asymmetric_weights and not all(f.symmetric for f in weight_formats(m).values()):
        found.append(f"{target.name} has no weights with zero-points")
    if target.narrow_products and not before.narrow_products:
        found.append(f"{target.name} needs weights so small that no pair of 8-bit products saturates")
    if before.signed_activations != target.signed_activations:
        found.append("one of them has signed running values, the other has not")
    if before.bias_bits != target.bias_bits:
        found.append(f"biases have {before.bias_bits} bits, not {target.bias_bits}")
    widths = {f.bits for f in m.plan.values() if f is not None} - set(target.widths)
    if widths:
        found.append(f"{target.name} has no {_listed(map(str, widths))} bits")
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
