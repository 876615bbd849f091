"""Everything Halfbyte raises on purpose.

The tree, with the exit status of the command line::

    HalfbyteError
    |-- UsageError          2   an option or argument that makes no sense
    |   |-- CaptureError    2   the network cannot be captured
    |   |-- DataError       2   calibration or evaluation data that cannot be used
    |   |-- FormatError     2   a number format that does not exist
    |   `-- PlacementError  2   nothing to quantize, or a plan the target cannot run
    |-- StoreError          2   a checkpoint or output folder that cannot be read or written
    |-- VerifyError         1   an invariant between two stages is broken (a defect of Halfbyte)
    |-- LimitError          3   a result is proven, but misses a limit that was asked for
    `-- ParityError         4   the exported file does not compute what the simulation computes

A message names what was wrong, where (value, layer, file) and what to do about it, in one sentence or two.
"""

import difflib
from typing import Any, get_args


class HalfbyteError(Exception):
    """Base of every deliberate error; ``exit_code`` is the status of the command line."""

    exit_code: int = 1


class HalfbyteWarning(UserWarning):
    """What a user should know before the result is there: it probably is not what was meant."""


class UsageError(HalfbyteError):
    """An option or argument that makes no sense."""

    exit_code = 2


class CaptureError(UsageError):
    """The network cannot be captured as a graph."""


class DataError(UsageError):
    """Calibration or evaluation data that cannot be used."""


class FormatError(UsageError):
    """A number format that does not exist."""


class PlacementError(UsageError):
    """The plan would quantize nothing, or the target cannot run it."""


class StoreError(HalfbyteError):
    """A checkpoint or output folder that cannot be read or written."""

    exit_code = 2


class VerifyError(HalfbyteError):
    """An invariant between two stages does not hold; a defect of Halfbyte or of a method built on it."""


class LimitError(HalfbyteError):
    """A sound result that misses a limit on accuracy, size or speed."""

    exit_code = 3


class ParityError(HalfbyteError):
    """The exported file computes something else than the simulation; carries the first differing value."""

    exit_code = 4

    def __init__(self, message: str, *, value: str | None = None) -> None:
        super().__init__(message)
        self.value = value


def check_choice(what: str, given: object, choices: Any) -> None:
    """Raise :class:`UsageError` for a word that is none of a ``Literal``'s."""
    words = get_args(choices)
    if given not in words:
        near = difflib.get_close_matches(str(given), words, 1)
        raise UsageError(
            f"{what} is {given!r}: " + (f"did you mean {near[0]!r}?" if near else f"choose {' or '.join(words)}")
        )
