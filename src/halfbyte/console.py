"""What all commands share: options, progress, and how results and errors are shown."""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import click

from halfbyte.errors import HalfbyteWarning, UsageError


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and the end."""
    click.echo(f"halfbyte: {' '.join(message.split())}", err=True)
    raise SystemExit(code)


def context_settings() -> dict[str, Any]:
    """How help looks."""
    return {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json`` and ``--quiet``."""
    command = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(command)
    return click.option("--quiet", "-q", is_flag=True, help="No progress, no summary.")(command)


def network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a network is opened."""
    options = [
        click.option("--checkpoint", metavar="FILE", help="Parameters for the network: .safetensors or .pt."),
        click.option("--trust", is_flag=True, help="Open files that need pickle, which can run any code."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def preprocess_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What happens to pictures before the network."""
    options = [
        click.option("--size", metavar="N|HxW", help="Height and width that the network takes."),
        click.option("--resize", type=int, metavar="N", help="Short side before the crop [default: size * 256 / 224]."),
        click.option(
            "--crop", type=click.Choice(["center", "none"]), help="How the size is reached [default: center]."
        ),
        click.option(
            "--interpolation", type=click.Choice(["bilinear", "bicubic", "nearest"]), help="[default: bilinear]"
        ),
        click.option(
            "--color", type=click.Choice(["rgb", "bgr", "gray"]), help="Order of the channels [default: rgb]."
        ),
        click.option("--mean", metavar="X|R,G,B", help="Subtracted from pixels of 0..255."),
        click.option("--std", metavar="X|R,G,B", help="Divides what is left."),
        click.option(
            "--preprocess", "preprocess_file", metavar="FILE", help="All of these from a .json or .toml file."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def preprocess_from(options: dict[str, Any], fallback: Any = None) -> Any:
    """The pre-processing that the options describe; ``fallback`` if none is given."""
    from halfbyte.preprocess import Preprocess, parse_size, parse_triple

    file = options.pop("preprocess_file")
    given = {k: options.pop(k) for k in ("size", "resize", "crop", "interpolation", "color", "mean", "std")}
    given = {k: v for k, v in given.items() if v is not None}
    if file is not None:
        if given:
            raise UsageError(
                f"--preprocess and --{next(iter(given))} were both given: put everything in the file or in the options"
            )
        return Preprocess.from_file(file)
    if not given:
        return fallback
    if "size" in given:
        given["size"] = parse_size(given["size"])
    for key in ("mean", "std"):
        if key in given:
            given[key] = parse_triple(given[key])
    return Preprocess(**given)


class Progress:
    """Stages and counts on stderr: a bar with the time left on a terminal, nothing elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.shown = not quiet and sys.stderr.isatty()
        self.bar: Any = None
        self.task: Any = None
        self.stage = ""

    def __enter__(self) -> "Progress":
        if self.shown:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if self.bar is None:
            return
        if stage != self.stage:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task, self.stage = self.bar.add_task(stage, total=total), stage
        self.bar.update(self.task, completed=done, total=total)


def say(quiet: bool, text: str) -> None:
    """A line on stderr."""
    if not quiet:
        click.echo(text, err=True)


def show(as_json: bool, quiet: bool, data: Any, text: str) -> None:
    """The result on stdout: as JSON, as text, or not at all."""
    if as_json:
        click.echo(json.dumps(data, indent=1))
    elif not quiet:
        click.echo(text)


def use_threads(threads: int | None) -> int:
    """Set the number of threads, if one is given; returns how many there are."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def friendly_warnings(quiet: bool) -> Any:
    """Warnings of Halfbyte as one line on stderr; those of libraries stay out of the way."""
    from contextlib import contextmanager

    @contextmanager
    def redirected() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", HalfbyteWarning)
            warnings.showwarning = lambda message, *_: say(quiet, f"warning: {message}")
            logging.getLogger("torch").setLevel(logging.ERROR)
            yield

    return redirected()
