"""Earlier results used again: the command ``export``, and ``quantize`` with a result in the place of a network."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from halfbyte.console import Progress, friendly_warnings, output_options, show, use_threads


def earlier(
    network: str, calibration: str | None, data_free: bool, options: dict[str, Any]
) -> tuple[str | None, bool, Any]:
    """Calibration data, whether there are none, and the pre-processing to fall back on.

    Where ``network`` is an earlier result, they are its own unless others were given, and so are ``samples`` and ``seed``.
    """
    if not Path(network).is_dir():
        return calibration, data_free, None
    from halfbyte.preprocess import Preprocess
    from halfbyte.settings import earlier_settings

    before = earlier_settings(Path(network))
    if calibration is None and not data_free:
        calibration, data_free = before.calibration, before.calibration is None
        for name in ("samples", "seed"):
            if click.get_current_context().get_parameter_source(name) is ParameterSource.DEFAULT:
                options[name] = getattr(before, name)
    return calibration, data_free, None if before.preprocess is None else Preprocess.from_dict(before.preprocess)


@click.command()
@click.argument("source", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder for the result."
)
@click.option("--target", metavar="NAME", help="One that runs the same integers [default: as before].")
@click.option(
    "--container",
    type=click.Choice(["packed", "int8"]),
    help="How weights of 4 and fewer bits are stored [default: as before].",
)
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier result.")
@output_options
def export(source: Path, output: Path, threads: int | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write and prove another file from OUT, in another container or for another target, without calibrating again."""
    from halfbyte.reexport import export as write

    use_threads(threads)
    with Progress(quiet or as_json) as progress, friendly_warnings(quiet):
        done = write(source, output, progress=progress, **options)
    show(as_json, quiet, done.to_dict(), str(done))
