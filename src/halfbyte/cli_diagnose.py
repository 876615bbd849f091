"""The command ``diagnose``, and what ``quantize --max-drop`` asks and answers."""

from pathlib import Path
from typing import Any

import click

from halfbyte.console import (
    Progress,
    friendly_warnings,
    output_options,
    preprocess_from,
    preprocess_options,
    say,
    show,
    use_threads,
)
from halfbyte.errors import LimitError


def check_limit(described: dict[str, Any], quiet: bool) -> None:
    """The search's verdict on stderr; exit status 3 where the limit is missed."""
    told = [e for e in described["log"] if e["stage"] == "search"]
    if not told:
        return
    for entry in told:
        say(quiet, entry["message"])
    if not told[-1]["figures"]["reached"]:
        raise SystemExit(LimitError.exit_code)


@click.command()
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--data", metavar="DATA", help="Samples to judge by, labelled or not [default: what the checkpoint holds]."
)
@click.option(
    "--classes", metavar="FILE", type=click.Path(path_type=Path), help="Class names in the order of the outputs."
)
@click.option("--samples", default=32, type=click.IntRange(1), help="How many of them.")
@click.option("--no-repairs", is_flag=True, help="Do not try repairs, which takes longest.")
@click.option("--threads", type=int, help="[default: all cores]")
@preprocess_options
@output_options
def diagnose(
    output: Path,
    data: str | None,
    classes: Path | None,
    samples: int,
    no_repairs: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run the debugging chart on OUT: one named cause of what quantization has lost, and one command to try next."""
    from halfbyte.diagnose import diagnose as run
    from halfbyte.output import UNPROVEN, open_output, write_summary
    from halfbyte.prove import MODEL

    m, file, kept, described = open_output(output)
    preprocess = preprocess_from(options, kept)
    if file is None and (output / UNPROVEN).exists():
        file = output / UNPROVEN
    source = None if data is None else _samples(m, data, preprocess, classes, samples, described)
    use_threads(threads)
    with Progress(quiet or as_json) as progress, friendly_warnings(quiet):
        found = run(
            m,
            source,
            file=file,
            samples=samples,
            repairs=not no_repairs,
            command=described.get("command") or "",
            progress=progress,
        )
    described["diagnosis"] = found.to_dict()
    if not (output / MODEL).exists() and file is None:
        described["diagnosis"]["file"] = None
    write_summary(output, described)
    show(as_json, quiet, described["diagnosis"], str(found))


def _samples(m: Any, data: str, preprocess: Any, classes: Path | None, samples: int, described: dict[str, Any]) -> Any:
    """Labelled data, or the same without labels where it has none."""
    from halfbyte.data import calibration, labelled
    from halfbyte.errors import DataError

    names = [str(n.target) for n in m.inputs]
    shape = described["outputs"][0]["shape"]
    outputs = shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None
    try:
        source = labelled(
            data,
            preprocess=preprocess,
            input_names=names,
            outputs=outputs,
            batch=samples,
            limit=samples,
            classes=classes,
        )
        return list(source)
    except DataError:
        if classes is not None:
            raise
        return list(calibration(data, preprocess=preprocess, input_names=names, samples=samples, batch=samples))
