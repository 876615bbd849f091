"""Number formats: which integers stand for a tensor's values.

A :class:`Format` says how many bits there are and how they are used; it says nothing about scales. Source of the family:
arXiv 2106.08295, sections 2.2 to 2.4 (affine, symmetric signed and unsigned, power of two; per tensor, channel, group).
"""

import re
from dataclasses import dataclass

from halfbyte.errors import FormatError

SMALLEST_BITS, LARGEST_BITS = 2, 16


@dataclass(frozen=True)
class Format:
    """How integer codes represent a tensor.

    bits: width, 2 to 16. signed: codes are centred on zero (two's complement) instead of starting at zero.
    symmetric: the zero-point is fixed (0 if signed, 0 if unsigned); otherwise it is chosen with the scale.
    axis: the dimension with one scale for each index, None for one scale for the tensor. group: with ``axis``, each index
    is cut along the remaining dimensions, flattened, into runs of this many values with a scale each.
    power_of_two: scales are 2 to an integer. narrow: the most negative code of a signed format is left out.
    """

    bits: int
    signed: bool = False
    symmetric: bool = False
    axis: int | None = None
    group: int | None = None
    power_of_two: bool = False
    narrow: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not hasattr(self.bits, "__index__"):
            raise FormatError(f"a width is {self.bits!r}: give a whole number of bits")
        if not SMALLEST_BITS <= self.bits <= LARGEST_BITS:
            raise FormatError(
                f"{self.bits} bits are not supported: choose a width from {SMALLEST_BITS} to {LARGEST_BITS}"
            )
        if self.group is not None and (self.axis != 0 or self.group < 1):
            raise FormatError("a group size needs axis=0 and must be at least 1")

    @property
    def lo(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def hi(self) -> int:
        """Largest code."""
        return (1 << (self.bits - (1 if self.signed else 0))) - 1

    @property
    def granularity(self) -> str:
        """``per tensor``, ``per channel`` or ``per group of N``."""
        if self.axis is None:
            return "per tensor"
        return "per channel" if self.group is None else f"per group of {self.group}"

    def __str__(self) -> str:
        kind = ("symmetric" if self.symmetric else "asymmetric") + (" power-of-two" if self.power_of_two else "")
        return f"{'int' if self.signed else 'uint'}{self.bits} {kind} {self.granularity}"


def container_bits(bits: int) -> int:
    """Width of the integer type that holds codes of ``bits`` bits in the simulation and between operations: 8 or 16."""
    return 8 if bits <= 8 else 16


@dataclass(frozen=True, order=True)
class Bits:
    """A pair of widths: of weights, and of the running values that layers read."""

    weights: int
    activations: int

    def __post_init__(self) -> None:
        for width in (self.weights, self.activations):
            Format(width)  # refuses widths that do not exist

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"


def bits(weights: int | str, activations: int | None = None) -> Bits:
    """``bits(4, 8)`` or ``bits("W4A8")``: weights of 4 bits, running values of 8. Raises :class:`FormatError`."""
    if isinstance(weights, str):
        if activations is not None:
            raise FormatError(f"'{weights}' names both widths already: leave {activations} out")
        return Bits(*parse_bits(weights))
    if activations is None:
        raise FormatError(
            f"{weights} is one width: give two, as in bits({weights}, 8), or a text, as in bits('W{weights}A8')"
        )
    return Bits(weights, activations)


def parse_bits(text: str) -> tuple[int, int]:
    """``"W4A8"`` -> (4, 8): weight and activation width. Raises :class:`FormatError`."""
    match = re.fullmatch(r"[Ww](\d+)[Aa](\d+)", text.strip())
    if not match:
        raise FormatError(f"'{text}' is not a pair of widths: write it as W8A8 (weights 8 bits, activations 8 bits)")
    weight, activation = int(match[1]), int(match[2])
    for bits in (weight, activation):
        Format(bits)
    return weight, activation


def parse_widths(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``"W4A8"`` -> ((4,), (8,)) and ``"W2,4,8A8"`` -> ((2, 4, 8), (8,)), ascending. Raises :class:`FormatError`."""
    match = re.fullmatch(r"[Ww](\d+(?:,\d+)*)[Aa](\d+(?:,\d+)*)", text.replace(" ", ""))
    if not match:
        raise FormatError(f"'{text}' does not name widths: write them as W8A8, or as W2,4,8A8 to choose among several")
    weights, activations = (tuple(sorted({int(n) for n in part.split(",")})) for part in match.groups())
    for width in (*weights, *activations):
        Format(width)
    return weights, activations
