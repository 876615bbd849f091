"""``halfbyte tradeoff``."""

from typing import Any

import click

from halfbyte.console import (
    Progress,
    friendly_warnings,
    network_options,
    output_options,
    preprocess_from,
    preprocess_options,
    show,
    use_threads,
)


@click.command()
@click.argument("network")
@click.option("--calibration", metavar="DATA", required=True, help="Unlabelled data, as for quantize.")
@click.option("-o", "--output", default="tradeoff", help="Folder for tradeoff.json and tradeoff.html.")
@click.option("--target", default="onnxruntime", metavar="NAME", help="Engine to quantize for.")
@click.option("--weight-bits", default="2,3,4,6,8", metavar="N,N", help="Widths of weights to choose among.")
@click.option("--activation-bits", default="8", metavar="N,N", help="Widths of activations to choose among.")
@click.option("--recipe", metavar="NAME|FILE", help="Steps to follow, see 'halfbyte recipes' [default: low-bit].")
@click.option(
    "--by", type=click.Choice(["size", "logical-size", "bops"]), default="logical-size", help="The cost to sweep over."
)
@click.option("--points", type=click.IntRange(2), default=10, help="Budgets to try.")
@click.option("--uniform", is_flag=True, help="The first and the last layer have no 8 bits of their own.")
@click.option("--samples", type=click.IntRange(1), default=256, help="Calibration samples to use.")
@click.option("--batch", type=click.IntRange(1), default=32, help="Samples at a time.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Chooses the samples.")
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@network_options
@preprocess_options
@output_options
def tradeoff(
    network: str,
    output: str,
    weight_bits: str,
    activation_bits: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """The accuracy-size front of NETWORK: networks of chosen widths and uniform ones, as a table and as a page."""
    from halfbyte.formats import parse_widths

    weights, activations = parse_widths(f"W{weight_bits}A{activation_bits}")
    preprocess = preprocess_from(options)
    from halfbyte.tradeoff import tradeoff as sweep

    use_threads(threads)
    with Progress(quiet or as_json) as progress, friendly_warnings(quiet):
        found = sweep(
            network,
            weight_bits=weights,
            activation_bits=activations,
            preprocess=preprocess,
            output=output,
            progress=progress,
            **options,
        )
    show(as_json, quiet, found.to_dict(), f"{found}\n{output}/tradeoff.html draws it")
