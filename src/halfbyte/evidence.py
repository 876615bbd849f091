"""What a diagnosis has measured, and what its rules ask of it: how much of the noise goes when something is put right."""

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from halfbyte.affine import Grid
from halfbyte.correct import ChannelMoments, correct_expected
from halfbyte.diagnosis import Cause, Repair
from halfbyte.graph import input_axis, layers, weight_of
from halfbyte.matching import Match
from halfbyte.model import QModel, value_name
from halfbyte.parity import Parity
from halfbyte.probes import Bench, LayerError, Score, Seen

WORTH = 0.01  # of noise (20 dB), or of the work: below, there is nothing to look for
FINE = 0.05  # noise-to-signal at the outputs (13 dB): on trained classifiers about a point of decisions flips from there on
POINTS = 1.0  # of accuracy: the white paper's threshold for its second box
GAIN = 0.3  # of the output's noise: what explains less is not what to begin with


def lies_in(command: str, folder: Path) -> str:
    """The command that made a result, as if it had been written where it lies now."""
    words = shlex.split(command)
    at = next((i for i, w in enumerate(words) if w in ("-o", "--output")), len(words))
    return shlex.join([*words[:at], "-o", str(folder), *words[at + 2 :]]) if words else ""


@dataclass(frozen=True)
class Evidence:
    """All that was measured. data: the samples are others than those that the ranges were chosen on."""

    m: QModel
    bench: Bench
    whole: Score
    floats: Score
    weights: Score
    values: Score
    seen: Mapping[str, Seen] = field(default_factory=dict)
    chosen_on: Mapping[str, Seen] = field(default_factory=dict)
    errors: Mapping[str, LayerError] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)
    calibration: Match | None = None
    data: Match | None = None
    separate: bool = False
    parity: Parity | None = None
    unusable: str = ""  # why the engine does not run the file
    training: float | None = None  # noise between the module as it was given and the graph
    reference: float | None = None  # noise between the module in eval mode and the graph, quantizers bypassed
    repairs: tuple[Repair, ...] = ()
    command: str = ""

    @property
    def fine(self) -> bool:
        """Nothing is lost that anybody would notice."""
        return self.whole.noise <= FINE and (self.whole.sure is None or 100 * self.whole.sure <= POINTS)

    @property
    def faultless(self) -> bool:
        """Not even a fault that costs no decision yet would be worth naming."""
        return self.fine and self.whole.noise <= WORTH

    @property
    def points(self) -> float | None:
        """Points of accuracy lost, expected ones where there are no labels; None without classes."""
        return None if self.whole.lost is None else 100 * self.whole.lost

    def gain(self, grids: Mapping[str, Grid] | None = None, shifts: Mapping[str, Tensor] | None = None) -> float:
        """The share of the output's noise that goes when these grids take the place of the model's, or these shifts are undone.

        A layer whose weight gets another grid gets the bias that goes with it. Where nothing is left of the signal, noise adds
        up no longer and taking one cause away changes nothing: then it counts what the cause does alone.
        """
        if self.whole.noise <= 0:
            return 0.0
        now = replace(self.m, grids={**self.m.grids, **(grids or {})})
        inputs: dict[tuple[str, int], ChannelMoments] = {}
        names = set(grids or {})
        for layer in layers(self.m.graph):
            weight, name = weight_of(layer), value_name(layer)
            if weight is not None and value_name(weight) in (grids or {}) and name in self.errors:
                inputs[value_name(layer.args[0]), input_axis(layer)] = self.errors[name].inputs  # type: ignore[arg-type]
            if weight is not None and name in (shifts or {}):
                names.add(value_name(weight))
        now = correct_expected(now, inputs) if inputs else now
        gain = 1 - self.bench.quantized(now, shifts=shifts).noise / self.whole.noise
        if gain < GAIN:
            before, after = self.bench.alone(self.m, names).noise, self.bench.alone(now, names, shifts).noise
            gain = max(gain, (min(before, 1.0) - min(after, 1.0)) / min(self.whole.noise, 1.0))
        return max(0.0, gain)

    def again(self, *options: str) -> str:
        """The command that made the model, with other options."""
        words = shlex.split(self.command) or ["halfbyte", "quantize", "NETWORK", "--calibration", "DATA"]
        changed = {o.split()[0] for o in options} | {"-o", "--output"}
        if "--data-free" in words and "--calibration" in changed:
            words.remove("--data-free")
        kept: list[str] = []
        skip = False
        for word in words:
            if skip:
                skip = False
            elif word in changed and word != "--keep-float":
                skip = True
            elif word.split("=")[0] not in changed - {"--keep-float"} and word not in ("--resume", "--overwrite"):
                kept.append(word)
        return " ".join([shlex.join(kept), *options, "-o out-2"])


Rule = Callable[[Evidence], Iterable[Cause]]
