"""Another file from an earlier result: in another container, or for another target that runs the same integers."""

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte import engine
from halfbyte.calibrate import Progress, silent
from halfbyte.errors import UsageError
from halfbyte.export_onnx import Container
from halfbyte.job import Stages, finish, save_progress
from halfbyte.model import LogEntry, QModel, Target
from halfbyte.ops import kind
from halfbyte.output import check_output, clear, open_output
from halfbyte.settings import earlier_settings
from halfbyte.targets import find


def export_job(
    source: Path,
    out: Path,
    *,
    target: str | None = None,
    container: Container | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write and prove another file from the quantized model in ``source``; nothing is calibrated, no integer changes.

    source: an output folder. out: the folder for the new result, as ``quantize`` makes it. target, container: default to the
    earlier ones. Returns the summary. Raises :class:`UsageError` where the target would run other integers, and what
    :func:`quantize_job` raises.
    """
    m, _, _, described = open_output(source)
    settings = earlier_settings(source)
    where = find(target or settings.target, saturates=engine.saturates())
    found = differences(m, where)
    if found:
        raise UsageError(
            f"'{source}' cannot be written for {where.name}: {'; '.join(found)}: quantize again: halfbyte "
            + shlex.join(["quantize", str(source), "--target", target or settings.target, "-o", str(out)])
        )
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"the output folder '{out}' exists: use --overwrite to replace it, or another -o")
    check_output(out, resume=False, overwrite=overwrite, source=str(source))
    if overwrite and out.exists():
        clear(out)
    changed = {"target": target or settings.target, "container": container or settings.container, "output": str(out)}
    settings = replace(settings, **changed)  # type: ignore[arg-type]
    entry = f"for {where.name}, weights {settings.container}: from an earlier result, not calibrated again"
    m = replace(m, target=where).logged(LogEntry("export", None, entry))
    stages = Stages(progress)
    save_progress(out, settings, m, stages)
    # the last option counts, so that this quantizes to the same
    options = ["--target", settings.target, "--container", settings.container, "-o", str(out)]
    command = f"{described['command']} {shlex.join(options)}"
    return finish(out, settings, m, stages, command, described["configuration"]["recipe"])


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
