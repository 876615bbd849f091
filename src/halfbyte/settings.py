"""What ``halfbyte quantize`` is asked to do, as data; and the network that this names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.capture import capture
from halfbyte.data import Samples, Source, example
from halfbyte.errors import StoreError, UsageError
from halfbyte.export_onnx import Container
from halfbyte.formats import Bits, parse_widths
from halfbyte.graph import by_value
from halfbyte.model import QModel
from halfbyte.opening import open_network
from halfbyte.output import read_state
from halfbyte.overrides import Overrides, parse_overrides
from halfbyte.parts import SECOND
from halfbyte.place import unplaced
from halfbyte.ports import InputType
from halfbyte.preprocess import Preprocess
from halfbyte.provenance import only_weights
from halfbyte.store import CHECKPOINT, load


@dataclass(frozen=True)
class Settings:
    """What ``halfbyte quantize`` was asked to do; it is stored in ``summary.json`` and must be the same to resume."""

    network: str
    calibration: str | None  # None: no data at all
    output: str
    checkpoint: str | None = None
    target: str = "onnxruntime"
    bits: str = "W8A8"  # or W2,4,8A8: one of several for each layer
    budget: str | None = None  # what the choice may cost
    samples: int = 256
    batch: int = 32
    seed: int = 0
    recipe: str | None = None  # default: with data "default", without "dfq"
    activation_range: str | None = None  # in place of the recipe's
    weight_range: str | None = None
    logit_range: str | None = None
    rounding: str | None = None  # how weights are rounded, in place of the recipe's
    iterations: int | None = None
    time_limit: float | None = None  # seconds
    uniform: bool = False
    keep_float: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()  # exceptions, GLOB=W8A16
    ranges: tuple[str, ...] = ()
    container: Container = "packed"
    preprocess: Mapping[str, Any] | None = None
    trust: bool = False
    max_drop: float | None = None  # points: the automatic recipe
    validation: str | None = None
    static_batch: int | None = None
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    input_type: InputType = "float32"
    encodings: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON, without the output folder: a moved folder can still be resumed."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if k != "output"}

    @property
    def narrowest(self) -> Bits:
        """The narrowest widths that weights and activations may get."""
        weights, activations = parse_widths(self.bits)
        return Bits(weights[0], activations[0])

    @property
    def overrides(self) -> Overrides:
        """What is kept in float or has other widths. Raises :class:`UsageError` for what makes no sense."""
        return parse_overrides(self.keep_float, self.sets)

    def without_folders(self) -> dict[str, Any]:
        """What a file for others may say: names without the folders they lie in."""
        named = {
            k: Path(v).name
            for k, v in self.to_dict().items()
            if k in ("network", "calibration", "checkpoint", "recipe") and v
        }
        return {**self.to_dict(), **named}


def seconds(text: float | str | None) -> float | None:
    """``20m``, ``1.5h``, ``90s`` or ``90`` as seconds. Raises :class:`UsageError`."""
    if text is None:
        return None
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    written = str(text)
    number, unit = (written[:-1], units[written[-1]]) if written[-1:] in units else (written, 1.0)
    try:
        found = float(number) * unit
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise UsageError(f"--time-limit '{text}' is not a time: write it as 90s, 20m or 1.5h")
    return found


def parse_ranges(texts: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """``input=0..1`` -> {"input": (0.0, 1.0)}."""
    found = {}
    for text in texts:
        name, _, span = text.rpartition("=")
        low, dots, high = span.partition("..")
        try:
            found[name] = (float(low), float(high))
        except ValueError:
            dots = ""
        if not dots or not name or found[name][0] > found[name][1]:
            raise UsageError(f"'{text}' is not a range: write it as VALUE=LOWEST..HIGHEST, such as input=0..1")
    return found


def network_of(settings: Settings) -> QModel:
    """The captured network that the settings name."""
    preprocess = None if settings.preprocess is None else Preprocess.from_dict(settings.preprocess)
    return capture_network(settings.network, settings.checkpoint, settings.trust, preprocess, settings.calibration)


def capture_network(
    network: str, checkpoint: str | None, trust: bool, preprocess: Preprocess | None, data: Source | None = None
) -> QModel:
    """Open and capture a network; its example inputs come with it, or follow from the pre-processing, or are samples.

    network: as for ``open_network``, or the folder of an earlier result, which holds its float network.
    """
    if Path(network).is_dir():
        if checkpoint is not None:
            raise UsageError(f"'{network}' holds the weights of its network: leave out --checkpoint")
        earlier_settings(Path(network))  # raises for other folders
        m = load(Path(network) / CHECKPOINT)
        if any(SECOND in name for name in by_value(m.graph)):
            raise UsageError(
                f"layers of '{network}' were split into several tensors: quantize the network itself again"
            )
        return replace(only_weights(unplaced(m)), samples=(), calibrated=0)
    net, given = open_network(network, checkpoint=checkpoint, trust=trust)
    if given is None and preprocess is not None:
        given = (torch.zeros(2, preprocess.channels, *preprocess.shape),)
    if given is None and isinstance(net, nn.Module) and not isinstance(data, Iterator | Samples | None):
        given = example(net.forward, data)
    if given is None:
        raise UsageError(
            f"'{network}' brings no example inputs: return (module, example inputs), or give --size for images"
        )
    return capture(net, given)


def earlier_settings(out: Path) -> Settings:
    """What an earlier result was made with. Raises :class:`StoreError` if the folder holds none."""
    found = read_state(out).get("configuration")
    if not isinstance(found, dict) or not (out / CHECKPOINT / "graph.json").is_file():
        raise StoreError(f"'{out}' holds no finished result of 'halfbyte quantize', nor a network")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    try:
        return Settings(output=str(out), **given)
    except TypeError as error:
        raise StoreError(f"'{out}' was written by another version of halfbyte: quantize again") from error
