"""The commands of daily use: hold a result to limits, compare results, prove one elsewhere, see what a machine can do."""

from pathlib import Path
from typing import Any

import click

from halfbyte.console import (
    Progress,
    friendly_warnings,
    output_options,
    preprocess_from,
    preprocess_options,
    show,
    use_threads,
)
from halfbyte.errors import HalfbyteError, LimitError, ParityError

_LABELLED = "Labelled data: a folder for each class, .npz with 'target', or file.py:callable."
_UNLABELLED = "Data without labels: decisions that differ from the float network's are counted."


@click.command()
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--max-drop", type=click.FloatRange(0), metavar="POINTS", help="Points that may be lost against float.")
@click.option("--max-size", metavar="SIZE", help="Of model.onnx, such as 5MB, 500kB or 4.5MiB.")
@click.option(
    "--min-speedup", type=click.FloatRange(0), metavar="X", help="Times as fast as float, in the same engine."
)
@click.option("--data", metavar="DATA", help=_LABELLED)
@click.option("--unlabelled", metavar="DATA", help=_UNLABELLED)
@click.option("--limit", type=click.IntRange(1), help="Use only so many samples.")
@click.option("--batch", default=50, help="Samples at a time.")
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@preprocess_options
@output_options
def check(output: Path, threads: int | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Hold OUT to limits: a line for each with the measured number, and exit status 3 if one is missed."""
    from halfbyte.check import check as judge

    preprocess = preprocess_from(options)
    with Progress(quiet or as_json) as progress, friendly_warnings(quiet):
        found = judge(output, preprocess=preprocess, threads=use_threads(threads), progress=progress, **options)
    show(as_json, quiet, found.to_dict(), str(found))
    missed = [limit for limit in found.limits if not limit.held]
    if missed:
        raise LimitError(f"{len(missed)} of {len(found.limits)} limits missed: {'; '.join(m.text for m in missed)}")


@click.command()
@click.argument("outputs", metavar="OUT...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--data", metavar="DATA", help=_LABELLED)
@click.option("--unlabelled", metavar="DATA", help=_UNLABELLED)
@click.option("--benchmark", is_flag=True, help="Time every file against float now.")
@click.option("--rounds", default=30, help="Of --benchmark.")
@click.option("--limit", type=click.IntRange(1), help="Use only so many samples.")
@click.option("--batch", default=50, help="Samples at a time.")
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write the comparison as a page, too.")
@preprocess_options
@output_options
def compare(
    outputs: tuple[Path, ...], threads: int | None, html: Path | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Put results side by side: accuracy with paired intervals, size, speed, proof, and the layers that differ."""
    from halfbyte.compare import compare as put

    preprocess = preprocess_from(options)
    with Progress(quiet or as_json) as progress, friendly_warnings(quiet):
        found = put(outputs, preprocess=preprocess, threads=use_threads(threads), progress=progress, **options)
    if html is not None:
        from halfbyte.store import write_whole

        write_whole(html, found.to_html())
    show(as_json, quiet, found.to_dict(), str(found))


@click.command()
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@output_options
def prove(output: Path, as_json: bool, quiet: bool) -> None:
    """Repeat the proof of OUT/model.onnx on this machine, from OUT/proof.npz; needs numpy and ONNX Runtime only."""
    from halfbyte.prove import prove as repeat

    found = repeat(output)
    show(as_json, quiet or not found.equal, found.to_dict(), str(found))
    if not found.equal:
        raise ParityError(str(found))


@click.command()
@output_options
def doctor(as_json: bool, quiet: bool) -> None:
    """Show versions, instruction set, threads, memory and cache of this machine, and what is missing for what."""
    from halfbyte.doctor import doctor as examine

    found = examine()
    show(as_json, quiet, found.to_dict(), str(found))
    if found.broken:
        raise HalfbyteError(
            f"{', '.join(found.broken)} missing or unusable: install halfbyte again with its dependencies"
        )


@click.command()
@click.argument("target", required=False)
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@output_options
def targets(target: str | None, threads: int | None, as_json: bool, quiet: bool) -> None:
    """List the targets; for TARGET, what each operation and width is worth, measured here once and remembered."""
    from halfbyte.capabilities import targets as known

    with Progress(quiet or as_json) as progress, friendly_warnings(quiet):
        found = known(target, threads=use_threads(threads), progress=progress)
    show(as_json, quiet, found.to_dict(), str(found))


COMMANDS = (check, compare, doctor, prove, targets)
