"""What user code yields, as batches of tensors: inputs by order or by name, and a target beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from halfbyte.errors import DataError
from halfbyte.loading import Batch

LABELS = ("target", "targets", "label", "labels")  # what data, and networks that compute their own loss, call them


def as_tensor(value: object, where: str) -> torch.Tensor:
    """A copy on the CPU, since user code may fill the same buffer again for its next batch."""
    if isinstance(value, np.ndarray):
        try:  # PyTorch takes the byte order of the machine only
            value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        except (TypeError, ValueError) as error:
            raise DataError(f"{where} has the type {value.dtype}, which is no number PyTorch can hold") from error
    elif isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", copy=True)
    if not isinstance(value, torch.Tensor):
        raise DataError(f"{where} is a {type(value).__name__}; give a tensor or a NumPy array")
    return value.float() if value.is_floating_point() else value


def as_tensors(values: Sequence[object], names: tuple[str, ...], where: str) -> Batch:
    """Copies of all inputs."""
    return tuple(as_tensor(v, f"input {n!r} of {where}") for n, v in zip(names, values, strict=True))


def parted(item: object, names: tuple[str, ...]) -> tuple[object, object]:
    """The inputs of a batch, and the target that may lie beside them, or None.

    A target is what a mapping calls so, the second of a pair whose first holds several inputs, or one tensor more than there are
    inputs.
    """
    if isinstance(item, Mapping):
        found = label_of(item, names)
        return item, None if found is None else item[found]
    if isinstance(item, list | tuple):
        if len(item) == 2 and isinstance(item[0], Mapping | list | tuple):
            return item[0], item[1]
        if len(item) == len(names) + 1:
            return item[:-1], item[-1]
    return item, None


def ordered(item: object) -> int:
    """How many inputs the first batch of some data seems to hold in order: a last tensor of class indices [N] is none."""
    if not isinstance(item, list | tuple):
        return 1
    if len(item) == 2 and isinstance(item[0], list | tuple):
        return len(item[0])
    last: Any = item[-1] if item else None
    indices = (
        isinstance(last, torch.Tensor | np.ndarray) and last.ndim == 1 and not torch.as_tensor(last).is_floating_point()
    )
    return len(item) - (indices and len(item) > 1)


def inputs_of(item: object, names: tuple[str, ...], where: str) -> Batch:
    """The inputs of a batch as tensors; a target beside them is left alone. Raises :class:`DataError`."""
    item, _ = parted(item, names)
    if isinstance(item, Mapping):
        return as_tensors(picked(item, names, where), names, where)
    given = tuple(item) if isinstance(item, list | tuple) else (item,)
    if len(given) != len(names):
        raise DataError(f"{where} has {len(given)} tensors but the network takes {len(names)} ({', '.join(names)})")
    return as_tensors(given, names, where)


def picked(arrays: Mapping[str, Any], names: tuple[str, ...], where: str) -> list[Any]:
    """The arrays of the inputs in the order of the network; a single array serves a single input by any name."""
    held = [key for key in arrays if key not in LABELS or key in names]
    if len(names) == len(held) == 1:
        return [arrays[held[0]]]
    missing = [name for name in names if name not in held]
    if missing:
        raise DataError(
            f"{where} holds no array for the input{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))} "
            f"(it holds {', '.join(map(repr, held)) or 'none'}); name each array as the input of the network"
        )
    return [arrays[name] for name in names]


def label_of(held: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """What the classes of samples are called, where they lie beside the inputs."""
    return next((key for key in LABELS if key in held and key not in names), None)


def count_samples(arrays: Sequence[Any], names: tuple[str, ...], where: str) -> int:
    """The number of samples, the first axis of all arrays or tensors."""
    for name, array in zip(names, arrays, strict=True):
        if array.ndim == 0:
            raise DataError(f"input {name!r} of {where} is a single number; the first axis has to be the samples")
        if len(array) != len(arrays[0]):
            raise DataError(
                f"input {name!r} of {where} has {len(array)} samples but {names[0]!r} has {len(arrays[0])}; "
                "give as many of each"
            )
        if 0 in array.shape:
            raise DataError(f"input {name!r} of {where} is empty (shape {list(array.shape)}); leave it out")
    return len(arrays[0])


def checked(flat: Batch, names: tuple[str, ...], where: str) -> Batch:
    """The same batch, if its inputs have as many samples each, and finite numbers. Raises :class:`DataError`."""
    count_samples(flat, names, where)
    for name, x in zip(names, flat, strict=True):
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            kind = "NaN" if bool(torch.isnan(x).any()) else "infinity"
            raise DataError(f"input {name!r} of {where} holds {kind}; repair the data or leave the sample out")
    return flat


def checked_target(target: torch.Tensor, samples: int, outputs: int | None, where: str) -> torch.Tensor:
    """The same as int64, if they are class indices, one for each sample. Raises :class:`DataError`."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise DataError(f"the target of {where} is {target.dtype}; give class indices as integers")
    if list(target.shape) != [samples]:
        raise DataError(
            f"the target of {where} has shape {list(target.shape)}; give one class index a sample: [{samples}]"
        )
    target = target.to(torch.int64)
    low, high = int(target.min()), int(target.max())
    if low < 0 or (outputs is not None and high >= outputs):
        valid = "0 or more" if outputs is None else f"0 to {outputs - 1}, the outputs of the network"
        raise DataError(f"the target of {where} holds the class index {low if low < 0 else high}; valid are {valid}")
    return target
