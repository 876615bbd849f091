"""The command line. torch is imported when a command starts its work, so that ``--help`` answers at once."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from halfbyte import __version__
from halfbyte import cli_daily as daily
from halfbyte.cli_again import earlier, export
from halfbyte.cli_config import Configured
from halfbyte.cli_diagnose import check_limit, diagnose
from halfbyte.cli_tradeoff import tradeoff
from halfbyte.console import (
    Progress,
    context_settings,
    fail,
    friendly_warnings,
    network_options,
    output_options,
    preprocess_from,
    preprocess_options,
    say,
    show,
    use_threads,
)
from halfbyte.errors import HalfbyteError, UsageError

_TARGETS = ("onnxruntime", "openvino", "onnxruntime-per-tensor", "onnxruntime-vnni", "onnxruntime-avx2", "generic")
_INTERRUPTED = 130


class _Commands(click.Group):
    """Every deliberate error becomes one readable line on stderr and its exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HalfbyteError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            hint = "; what was finished is kept: run the same command with --resume to go on"
            fail("interrupted" + (hint if ctx.invoked_subcommand == "quantize" else ""), _INTERRUPTED)
        except MemoryError:
            fail("out of memory: use a smaller --batch", 1)
        except OSError as error:
            where = f" '{error.filename}'" if error.filename else ""
            fail(f"{error.strerror or error}{where}", 2)


@click.group(cls=_Commands, context_settings=context_settings())
@click.version_option(__version__, prog_name="halfbyte")
def main() -> None:
    """Turn a trained PyTorch network into one that runs on integers, with a file proven equal to the simulation.

    Exit status: 0 done, 2 bad usage or input, 3 a limit is missed, 4 the exported file is not proven, 130 interrupted.
    """


def _no_weights(_: click.Context, __: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise UsageError(
            "--weights is not an option: use --weight-bits for widths, or --checkpoint for a file with parameters"
        )


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",")) if value else ()


@main.command(cls=Configured)
@click.argument("network")
@click.option(
    "--calibration", metavar="DATA", help="Unlabelled data: a folder of pictures, .npy, .npz or file.py:callable."
)
@click.option("-o", "--output", default="out", help="Folder for the result.")
@click.option(
    "--target",
    default="onnxruntime",
    metavar="NAME|FILE",
    help="Engine to quantize for: " + ", ".join(_TARGETS) + ", or a .toml file that describes one.",
)
@click.option("--bits", metavar="WxAy", help="Widths of weights and activations [default: W8A8].")
@click.option(
    "--weight-bits", metavar="N|N,N", help="Width of weights alone; of several, one is chosen for each layer."
)
@click.option("--activation-bits", metavar="N|N,N", help="Width of activations alone; of several, one is chosen.")
@click.option(
    "--budget",
    metavar="KIND=AMOUNT",
    help="What several widths may cost: size=14%, size=1.2MB, logical-size=, bops=10%, latency=4ms, drop=0.5; more with commas.",
)
@click.option("--samples", default=256, help="Calibration samples to use.")
@click.option("--batch", default=32, help="Samples at a time.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Chooses the samples.")
@click.option("--data-free", is_flag=True, help="Use no data: batch norms tell the ranges.")
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="Steps to follow, see 'halfbyte recipes' [default: default; without data: dfq].",
)
@click.option(
    "--activation-range",
    type=click.Choice(["mse", "min-max", "percentile"]),
    help="Range rule [default: the recipe's].",
)
@click.option(
    "--weight-range", type=click.Choice(["mse", "min-max", "percentile"]), help="Range rule [default: the recipe's]."
)
@click.option(
    "--logit-range",
    type=click.Choice(["same", "cross-entropy"]),
    help="Range rule of a classifier's quantized outputs [default: the recipe's].",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "descent", "adaround", "adaquant", "blocks"]),
    help="How weights are rounded [default: the recipe's; below 8 bits: descent].",
)
@click.option(
    "--iterations",
    type=click.IntRange(1),
    metavar="N",
    help="Of learned rounding, or of tuning [default: the recipe's].",
)
@click.option("--time-limit", metavar="TIME", help="For learned rounding and tuning, such as 20m: fewer steps.")
@click.option("--max-drop", type=float, metavar="POINTS", help="Search the cheapest recipe that loses no more.")
@click.option("--validation", metavar="DATA", help="Labelled data for --max-drop [default: agreement with float].")
@click.option("--uniform", is_flag=True, help="Below 8 bits: the first and the last layer, too.")
@click.option("--range", "ranges", multiple=True, metavar="VALUE=LOW..HIGH", help="A range by hand; may be repeated.")
@click.option(
    "--keep-float",
    multiple=True,
    metavar="GLOB",
    help="Layers to leave in float, by name, module or type:conv; repeatable.",
)
@click.option(
    "--set", "sets", multiple=True, metavar="GLOB=WxAy", help="Other widths for some layers, such as 'stem.*=W8A16'."
)
@click.option("--dry-run", is_flag=True, help="Show the plan, sizes and what it will take; run and write nothing.")
@click.option(
    "--container",
    type=click.Choice(["packed", "int8"]),
    default="packed",
    help="How weights of 4 and fewer bits are stored.",
)
@click.option(
    "--static-batch",
    type=click.IntRange(1),
    metavar="N",
    help="Fixed batch of the file (--batch is the calibration's).",
)
@click.option(
    "--input-names", callback=_names, metavar="A,B", help="Names of the file's inputs [default: the network's]."
)
@click.option("--output-names", callback=_names, metavar="A,B", help="Names of its outputs [default: the network's].")
@click.option(
    "--input",
    "input_type",
    type=click.Choice(["float32", "uint8"]),
    default="float32",
    help="uint8: the file takes raw pixels, where one whole mean and one std make them codes.",
)
@click.option("--encodings", is_flag=True, help="AIMET encodings and a float ONNX file too, for Qualcomm's tools.")
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@click.option("--resume", is_flag=True, help="Go on where the same command was interrupted.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier result.")
@click.option("--weights", hidden=True, expose_value=False, callback=_no_weights, is_eager=True)
@network_options
@preprocess_options
@output_options
def quantize(
    network: str,
    calibration: str | None,
    data_free: bool,
    output: str,
    bits: str | None,
    weight_bits: str | None,
    activation_bits: str | None,
    keep_float: tuple[str, ...],
    sets: tuple[str, ...],
    dry_run: bool,
    ranges: tuple[str, ...],
    threads: int | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Quantize NETWORK, export it to ONNX and prove the file.

    NETWORK is file.py:callable, package.module:callable, net.pt2, or an earlier result, whose float network is quantized again;
    its data and pre-processing are used again, too, unless others are given.
    """
    if calibration is not None and data_free:
        raise UsageError("--calibration and --data-free contradict each other: choose one")
    if bits is not None and (weight_bits is not None or activation_bits is not None):
        raise UsageError("--bits and --weight-bits or --activation-bits were both given: use one form")
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other: choose one")
    if options["samples"] < 1 or options["batch"] < 1:
        raise UsageError("--samples and --batch must be at least 1")
    calibration, data_free, before = earlier(network, calibration, data_free, options)
    from halfbyte.formats import parse_widths
    from halfbyte.job import chosen_recipe, quantize_job
    from halfbyte.output import check_output
    from halfbyte.quantize import check_search
    from halfbyte.settings import Settings, seconds

    check_search(calibration, options["max_drop"], options["validation"], options)

    bits = bits or f"W{weight_bits or 8}A{activation_bits or 8}"
    parse_widths(bits)
    preprocess = preprocess_from(options, before)
    options["time_limit"] = seconds(options["time_limit"])
    if not dry_run:
        check_output(Path(output), resume=resume, overwrite=overwrite, source=network)
    use_threads(threads)
    settings = Settings(
        network=network,
        calibration=calibration,
        output=output,
        bits=bits.upper(),
        keep_float=keep_float,
        sets=sets,
        ranges=ranges,
        preprocess=None if preprocess is None else preprocess.to_dict(),
        **options,
    )
    chosen_recipe(settings)
    _ = settings.overrides  # refuses what makes no sense before the work starts
    if calibration is None and not data_free:
        from halfbyte.pipeline import NO_DATA

        say(quiet, f"no calibration data: {NO_DATA}")
    _announce(settings, quiet)
    if dry_run:
        from halfbyte.plan import plan_job

        with friendly_warnings(quiet):
            planned = plan_job(settings)
        if settings.budget is not None:
            say(quiet, "the plan shows every layer at its narrowest widths; which it gets is chosen on data")
        show(as_json, quiet, planned.to_dict(), str(planned))
        return
    with Progress(quiet or as_json) as progress, friendly_warnings(quiet):
        done = quantize_job(
            settings,
            command=_command(),
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            notice=partial(say, quiet),
        )
    show(as_json, quiet, done.to_dict(), str(done))
    check_limit(done.to_dict(), quiet)


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes, or write the recipe NAME as TOML: redirect it to a file, edit it, give it to --recipe."""
    from halfbyte import recipe

    if name is not None:
        found = recipe.load_recipe(name)
        click.echo(json.dumps(found.to_dict(), indent=1) if as_json else recipe.text(name).rstrip())
        return
    every = [recipe.load_recipe(n) for n in recipe.names()]
    if as_json:
        click.echo(json.dumps([r.to_dict() for r in every], indent=1))
        return
    width = max(len(r.name) for r in every)
    for r in every:
        click.echo(f"{r.name:{width}}  {r.description}")


def _announce(settings: Any, quiet: bool) -> None:
    """The first line: for which engine, and what its variant means on this machine."""
    from halfbyte import engine
    from halfbyte.formats import parse_widths
    from halfbyte.targets import find

    target = find(settings.target, saturates=engine.saturates())
    weights, activations = parse_widths(settings.bits)
    if min(*weights, *activations) < 8:
        from halfbyte.capabilities import consequence

        say(quiet, consequence(target, settings.narrowest, use_threads(None)))
    note = ""
    if target.narrow_products:
        note = " (this CPU adds pairs of 8-bit products in 16 bits: weights are held to what cannot saturate; exact on every CPU)"
    data = "no data" if settings.calibration is None else f"up to {settings.samples} samples, seed {settings.seed}"
    say(quiet, f"{settings.bits} for {target.name}{note}, {data}")
    if settings.budget is not None:
        say(quiet, f"each layer gets one of these widths, so that it loses least under {settings.budget}")
    elif min(*weights, *activations) < 8:
        ends = "have them, too" if settings.uniform else "keep 8 bits (--uniform gives them fewer, too)"
        say(quiet, f"{settings.bits} in every convolution and linear layer; the first and the last {ends}")


def _command() -> str:
    import shlex

    return shlex.join(["halfbyte", *sys.argv[1:]])


@main.command()
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--data", metavar="DATA", help="Labelled data: a folder for each class, .npz with 'target', or file.py:callable."
)
@click.option(
    "--metric", metavar="FILE:CALLABLE", help="Another task: a function (forward, data) or (forward) that scores."
)
@click.option(
    "--classes", metavar="FILE", type=click.Path(path_type=Path), help="Class names in the order of the outputs."
)
@click.option("--limit", type=int, help="Use only so many samples.")
@click.option("--batch", default=50, help="Samples at a time.")
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@preprocess_options
@output_options
def evaluate(output: Path, threads: int | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Score the float network, the simulation and the exported file of OUT side by side."""
    from halfbyte.evaluate import evaluate as score

    preprocess = preprocess_from(options)
    with Progress(quiet or as_json) as progress, friendly_warnings(quiet):
        result = score(output, preprocess=preprocess, threads=use_threads(threads), progress=progress, **options)
    show(as_json, quiet, result.to_dict(), str(result))


@main.command()
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--rounds", default=50, help="Interleaved rounds.")
@click.option("--batch", default=1, help="Samples at a time.")
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@output_options
def benchmark(output: Path, threads: int | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Time the exported file of OUT against the float network, in the same engine and process."""
    from halfbyte.benchmark import benchmark as time

    with Progress(quiet or as_json) as progress:
        result = time(output, threads=use_threads(threads), progress=progress, **options)
    show(as_json, quiet, result.to_dict(), str(result))


@main.command()
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@output_options
def report(output: Path, as_json: bool, quiet: bool) -> None:
    """(Re)write OUT/report.html from OUT/summary.json."""
    from halfbyte.output import report as write

    found = write(output)
    show(as_json, quiet, found.to_dict(), str(found))


@main.command()
@click.argument("thing", metavar="NETWORK|OUT|MODEL.ONNX")
@network_options
@preprocess_options
@output_options
def inspect(thing: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Look at a network, a result or an ONNX file: layers, names, shapes, MACs, ranges, formats. Changes nothing."""
    from halfbyte.inspection import inspect as look

    preprocess = preprocess_from(options)
    with friendly_warnings(quiet):
        found = look(thing, preprocess=preprocess, **options)
    show(as_json, quiet, found.to_dict(), str(found))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes halfbyte's commands and options in SHELL."""
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    if completer is None:
        raise UsageError(f"there is no completion for {shell}")
    click.echo(completer(main, {}, "halfbyte", "_HALFBYTE_COMPLETE").source())


main.add_command(tradeoff)
main.add_command(diagnose)
main.add_command(export)
for _command_of_daily_use in daily.COMMANDS:
    main.add_command(_command_of_daily_use)

if __name__ == "__main__":
    main()
