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
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@preprocess_options
@output_options
def diagnose(output: Path, no_repairs: bool, threads: int | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Run the debugging chart on OUT: one named cause of what quantization has lost, and one command to try next."""
    from halfbyte.diagnose import diagnose as run

    preprocess = preprocess_from(options)
    use_threads(threads)
    with Progress(quiet or as_json) as progress, friendly_warnings(quiet):
        found = run(output, preprocess=preprocess, repairs=not no_repairs, progress=progress, **options)
    show(as_json, quiet, found.to_dict(), str(found))
