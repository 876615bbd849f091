"""Calibration and labelled batches from folders, NumPy files, user code and Python objects."""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from halfbyte.errors import DataError, HalfbyteError, UsageError
from halfbyte.loading import Batch, Pass, items, load_callable, stream
from halfbyte.pictures import Rows, class_indices, fits, layout_hint, reader
from halfbyte.preprocess import Preprocess, find_pictures

__all__ = ["Batch", "Labelled", "Samples", "Source", "calibration", "check_inputs", "example", "labelled"]

Source = (
    str
    | os.PathLike[str]
    | torch.Tensor
    | npt.NDArray[Any]
    | Mapping[str, Any]
    | Iterable[Any]
    | Callable[[], Iterable[Any]]
)
_LABELS = ("target", "targets", "label", "labels")  # what data, and networks that compute their own loss, call them
_SPEC = re.compile(r".+:[^\W\d]\w*")
_FORMS = "give a folder of pictures, an .npy or .npz file, 'file.py:function' or 'package.module:function'"


@dataclass(frozen=True)
class Samples:
    """Unlabelled batches, the same in the same order on every pass; ``count`` is the samples of a pass, if known."""

    description: str
    count: int | None
    _start: Pass = field(repr=False)

    def __iter__(self) -> Iterator[Batch]:
        return self._start()


@dataclass(frozen=True)
class Labelled:
    """Batches ``(inputs, target)``, ``target`` int64 ``[N]``, the same on every pass; ``count`` as in Samples."""

    description: str
    count: int | None
    _start: Pass = field(repr=False)

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        return ((flat[:-1], flat[-1]) for flat in self._start())


@dataclass(frozen=True)
class _Table:
    """Samples that can be read in any order: ``read(rows)`` gives the batch of these rows."""

    name: str
    total: int
    read: Callable[[Rows], Batch]

    def passes(self, rows: Rows, batch: int, check: Callable[[Batch, str], Batch]) -> Pass:
        parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        return lambda: (check(self.read(part), f"batch {i} of {self.name}") for i, part in enumerate(parts))


def calibration(
    source: Source,
    *,
    preprocess: Preprocess | None,
    input_names: Sequence[str],
    samples: int = 256,
    batch: int = 32,
    seed: int = 0,
) -> Samples:
    """At most ``samples`` unlabelled samples of ``source``.

    Of a folder of pictures (searched recursively; ``preprocess`` applies to these only), an .npy or .npz file, a
    tensor, an array or a mapping of arrays, ``seed`` chooses without replacement and the order is kept; batches hold
    ``batch`` samples. Of "file.py:function", "package.module:function" or an iterable of batches (tensor, array,
    tuple, list, or mapping by input name), the first samples are taken in the batches they come in. A one-shot
    iterator is kept in memory; anything else is started again for each pass and must then give the same batches.
    float64, float16 and bfloat16 become float32, other types stay. Raises DataError, also while iterating, or UsageError.
    """
    _positive(samples=samples, batch=batch)
    found, names = _locate(source), tuple(input_names)

    def check(flat: Batch, where: str) -> Batch:
        return _checked(flat, names, where)

    if isinstance(found, Path) and found.is_dir():
        table = _pictures(found, find_pictures(found), preprocess, names)
    elif _holds_arrays(found):
        table, _ = _arrays(found, _name(source), names)
    else:
        passes = stream(found, _name(source), samples, lambda item, where: check(_batch(item, names, where), where))
        return Samples(f"the first {samples} samples of {_name(source)}", None, passes)
    count = min(samples, table.total)
    rows = np.sort(np.random.default_rng(seed).choice(table.total, size=count, replace=False))
    return Samples(f"{count} of {table.total} samples of {table.name}", count, table.passes(rows, batch, check))


def example(forward: Callable[..., Any], source: Source) -> Batch | dict[str, torch.Tensor]:
    """Samples to capture a network on: by name where the source has names, else in order.

    forward: what the network computes. Its inputs are the parameters without a default, and of the optional ones those that the
    source has by these names; where all are optional, the first so many as a sample has tensors. Raises DataError.
    """
    found = _locate(source)
    first = _first(found, _name(source))
    parameters = inspect.signature(forward).parameters.values()
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = tuple(p.name for p in plain if p.default is p.empty)
    optional = [p.name for p in plain if p.default is None]
    if isinstance(first, Mapping):
        names = (*required, *(n for n in optional if n in first and n not in _LABELS))
    elif required:
        names = required
    else:
        count = len(first) if isinstance(first, list | tuple) else 1
        several = (f"{p.name}_{i}" for p in parameters if p.kind is p.VAR_POSITIONAL for i in range(count))
        names = tuple(islice(takewhile(lambda n: n not in _LABELS, chain(optional, several)), count))
    if not names:
        known = ", ".join(n for n in optional if n not in _LABELS) or "no names"
        raise DataError(f"{_name(source)} holds none of the inputs that the network takes ({known}); name them so")
    (batch,) = islice(calibration(source, preprocess=None, input_names=names, samples=2, batch=2), 1)
    return dict(zip(names, batch, strict=True)) if isinstance(first, Mapping) else batch


def _first(found: object, name: str) -> object:
    """What a source holds, or gives first: how many tensors that are, or which names."""
    if isinstance(found, Path):
        if found.suffix.lower() != ".npz":
            return None
        # What is wrong with a file is said when it is read.
        with suppress(Exception), np.load(found, allow_pickle=False) as held:
            return dict.fromkeys(held.files)
        return None
    return found if _holds_arrays(found) else next(iter(items(found, name)), None)


def labelled(
    source: Source,
    *,
    preprocess: Preprocess | None,
    input_names: Sequence[str],
    outputs: int | None,
    batch: int = 50,
    limit: int | None = None,
    classes: str | os.PathLike[str] | None = None,
) -> Labelled:
    """Samples with the class index of each, from the sources of ``calibration``.

    A folder has a sub-folder for each class, an .npz file or mapping an array ``target`` ``[N]`` (or ``targets``,
    ``label``, ``labels``), and code or an iterable yields ``(inputs, target)`` or such mappings. ``outputs`` is the
    number of classes of the network. ``limit`` takes samples spread evenly over a folder or file (which is often sorted
    by class) but the first of a stream. ``classes`` gives the index of each class folder: a text file with one name per
    line or a JSON object ``{name: index}``; without it numbers are indices, and other names count in sorted order if
    there are ``outputs`` of them. Errors as there.
    """
    _positive(batch=batch, **({} if limit is None else {"limit": limit}))
    found, names = _locate(source), tuple(input_names)
    if classes is not None and not (isinstance(found, Path) and found.is_dir()):
        raise UsageError(f"the class file {classes} applies to a folder of pictures only, not to {_name(source)}")

    def check(flat: Batch, where: str) -> Batch:
        return (*_checked(flat[:-1], names, where), _checked_target(flat[-1], len(flat[0]), outputs, where))

    if isinstance(found, Path) and found.is_dir():
        paths = find_pictures(found)
        target = class_indices(found, paths, outputs, classes)
        table = _pictures(found, paths, preprocess, names)
    elif _holds_arrays(found):
        table, given = _arrays(found, _name(source), names)
        if given is None:
            raise DataError(f"{table.name} holds no array 'target'; add one with the class index of each sample")
        target = _checked_target(given, table.total, outputs, table.name)  # at once, not after an hour
    else:

        def convert(item: object, where: str) -> Batch:
            if isinstance(item, Mapping):
                label = _label(item, names)
                item = item if label is None else (item, item[label])
            if not isinstance(item, list | tuple) or len(item) != 2:
                raise DataError(f"{where} is not a pair (inputs, target); yield both")
            return check((*_batch(item[0], names, where), _tensor(item[1], f"the target of {where}")), where)

        return Labelled(_name(source), None, stream(found, _name(source), limit, convert))
    count = min(limit or table.total, table.total)
    rows = np.arange(count, dtype=np.int64) * table.total // count
    both = _Table(table.name, table.total, lambda rows: (*table.read(rows), target[torch.from_numpy(rows)]))
    return Labelled(f"{count} of {table.total} samples of {table.name}", count, both.passes(rows, batch, check))


def check_inputs(batch: Batch, expected: Sequence[tuple[str, Sequence[int | str], torch.dtype]], where: str) -> None:
    """Compares a batch with the inputs of the network: name, shape (text is a free dimension) and dtype of each.

    ``where`` names the batch in the message, such as "calibration batch 0". Raises DataError for the first difference.
    """
    if len(batch) != len(expected):
        names = ", ".join(repr(name) for name, _, _ in expected)
        raise DataError(f"{where} has {len(batch)} tensors but the network takes {len(expected)} inputs: {names}")
    for tensor, (name, shape, dtype) in zip(batch, expected, strict=True):
        if not fits(tensor.shape, shape):
            takes = ", ".join(str(d) for d in shape)
            hint = _shape_hint(list(tensor.shape), list(shape))
            raise DataError(
                f"input {name!r} of {where} has shape {list(tensor.shape)} but the network takes [{takes}]: {hint}"
            )
        if tensor.dtype != dtype:
            given, wanted = (str(d).removeprefix("torch.") for d in (tensor.dtype, dtype))
            hint = f"convert the data to {wanted}"
            if tensor.is_floating_point() and not dtype.is_floating_point:
                hint = f"give the ids as {wanted}, without scaling them"
            elif dtype.is_floating_point and not tensor.is_floating_point():
                hint = f"convert to {wanted} and apply the mean and standard deviation of the training"
            raise DataError(f"input {name!r} of {where} is {given} but the network takes {wanted}: {hint}")


def _shape_hint(given: list[int], expected: list[int | str]) -> str:
    if len(given) != len(expected):
        lacks_batch = fits(given, expected[1:])
        return "add the batch axis in front" if lacks_batch else f"give {len(expected)} axes instead of {len(given)}"
    picture = layout_hint(given, expected) if len(given) == 4 else None
    if picture is not None:
        return picture
    if fits(given[1:], expected[1:]):
        return f"set --batch {expected[0]} and a number of samples it divides"
    axis = next(i for i, (g, e) in enumerate(zip(given, expected, strict=True)) if not fits([g], [e]))
    return f"give {expected[axis]} instead of {given[axis]} along axis {axis}"


def _positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; give at least 1")


def _name(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return str(source)
    return f"the {getattr(source, '__name__', type(source).__name__)} given"


def _locate(source: Source) -> object:
    """Text as a Path that exists, or as the callable it names; anything else as it is."""
    if not isinstance(source, str | os.PathLike):
        return source
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix.lower() in (".npy", ".npz")):
        return path
    if path.exists():
        more = f" (name its function: {path}:function)" if path.suffix == ".py" else ""
        raise DataError(f"{path} is no source of data{more}; {_FORMS}")
    # After the look on the disk, since a drive letter has a colon too.
    if _SPEC.fullmatch(str(source)):
        return load_callable(str(source))
    raise DataError(f"there is no file or folder {path}; {_FORMS}")


def _tensor(value: object, where: str) -> torch.Tensor:
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


def _tensors(values: Sequence[object], names: tuple[str, ...], where: str) -> Batch:
    return tuple(_tensor(v, f"input {n!r} of {where}") for n, v in zip(names, values, strict=True))


def _batch(item: object, names: tuple[str, ...], where: str) -> Batch:
    if isinstance(item, Mapping):
        return _tensors(_pick(item, names, where), names, where)
    given = tuple(item) if isinstance(item, list | tuple) else (item,)
    if len(given) != len(names):
        hint = "; yield the inputs without labels" if len(given) == len(names) + 1 else ""
        raise DataError(
            f"{where} has {len(given)} tensors but the network takes {len(names)} ({', '.join(names)}){hint}"
        )
    return _tensors(given, names, where)


def _pick(arrays: Mapping[str, Any], names: tuple[str, ...], where: str) -> list[Any]:
    """The arrays of the inputs in the order of the network; a single array serves a single input by any name."""
    held = [key for key in arrays if key not in _LABELS or key in names]
    if len(names) == len(held) == 1:
        return [arrays[held[0]]]
    missing = [name for name in names if name not in held]
    if missing:
        raise DataError(
            f"{where} holds no array for the input{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))} "
            f"(it holds {', '.join(map(repr, held)) or 'none'}); name each array as the input of the network"
        )
    return [arrays[name] for name in names]


def _label(held: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """What the classes of samples are called, where they lie beside the inputs."""
    return next((key for key in _LABELS if key in held and key not in names), None)


def _samples(arrays: Sequence[Any], names: tuple[str, ...], where: str) -> int:
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


def _checked(flat: Batch, names: tuple[str, ...], where: str) -> Batch:
    _samples(flat, names, where)
    for name, tensor in zip(names, flat, strict=True):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            raise DataError(f"input {name!r} of {where} holds {kind}; repair the data or leave the sample out")
    return flat


def _checked_target(target: torch.Tensor, samples: int, outputs: int | None, where: str) -> torch.Tensor:
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


def _pictures(folder: Path, paths: Sequence[Path], preprocess: Preprocess | None, names: tuple[str, ...]) -> _Table:
    read = reader(folder, paths, preprocess, names)
    return _Table(str(folder), len(paths), lambda rows: (read(rows),))


def _holds_arrays(source: object) -> bool:
    return isinstance(source, Path | torch.Tensor | np.ndarray | Mapping)


def _arrays(source: object, name: str, names: tuple[str, ...]) -> tuple[_Table, torch.Tensor | None]:
    """The arrays of a file, a mapping, an array or a tensor, and its target if it has one."""
    target: Any = None
    try:
        with ExitStack() as stack:
            opened = source
            if isinstance(source, Path):
                # An .npy file stays on disk, mapped. The members of an .npz archive cannot be mapped and are read at
                # once; NumPy leaves a damaged archive open when it is given the path.
                mapped = source.suffix.lower() == ".npy"
                file = source if mapped else stack.enter_context(source.open("rb"))
                opened = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
            held = opened if isinstance(opened, Mapping) else {"the array": opened}
            arrays = _pick(held, names, name)
            label = _label(held, names)
            if label is not None:
                target = held[label]
    except HalfbyteError:
        raise
    except Exception as error:  # of zipfile, zlib, tokenize or NumPy, by the place of the damage
        raise DataError(
            f"{name} cannot be read ({type(error).__name__}): it is damaged, not a NumPy file, or holds Python "
            "objects, which are never loaded; write it again with numpy.save or numpy.savez"
        ) from error
    for key, array in zip(names, arrays, strict=True):
        if not isinstance(array, np.ndarray | torch.Tensor):
            raise DataError(f"input {key!r} of {name} is a {type(array).__name__}; give a tensor or a NumPy array")
    total = _samples(arrays, names, name)

    def read(rows: Rows) -> Batch:
        taken = [array[rows if isinstance(array, np.ndarray) else torch.from_numpy(rows)] for array in arrays]
        return _tensors(taken, names, name)

    return _Table(name, total, read), None if target is None else _tensor(target, f"the target of {name}")
