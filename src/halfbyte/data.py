"""Calibration and labelled batches from folders, NumPy files, user code and Python objects."""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Subset

from halfbyte.batches import (
    LABELS,
    as_tensor,
    as_tensors,
    checked,
    checked_target,
    count_samples,
    inputs_of,
    label_of,
    ordered,
    parted,
    picked,
)
from halfbyte.errors import CaptureError, DataError, HalfbyteError, UsageError
from halfbyte.loading import Batch, Pass, dataset_of, items, load_callable, stream
from halfbyte.opening import SCRIPTED
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
    ``batch`` samples; so it does of a ``torch.utils.data.Dataset`` and of one of Hugging Face, which give samples one by one. Of
    "file.py:function", "package.module:function" or an iterable of batches (tensor, array, tuple, list, or mapping by input
    name), the first samples are taken in the batches they come in. A target beside the inputs is left alone. A one-shot
    iterator is kept in memory; anything else is started again for each pass and must then give the same batches (a DataLoader
    that shuffles does). float64, float16 and bfloat16 become float32, other types stay. Raises DataError, also while iterating,
    or UsageError.
    """
    _positive(samples=samples, batch=batch)
    found, names = _locate(source), tuple(input_names)

    def check(flat: Batch, where: str) -> Batch:
        return checked(flat, names, where)

    if isinstance(found, Path) and found.is_dir():
        table = _pictures(found, find_pictures(found), preprocess, names)
    elif _holds_arrays(found):
        table, _ = _arrays(found, _name(source), names)
    else:
        name = _name(source)
        told = f"the first {samples} samples of {name}"
        found, told, known = _subset(found, lambda total: _chosen(total, samples, seed), batch, name, told)
        passes = stream(found, name, samples, lambda item, where: check(inputs_of(item, names, where), where))
        return Samples(told, known, passes)
    rows = _chosen(table.total, samples, seed)
    count = len(rows)
    return Samples(f"{count} of {table.total} samples of {table.name}", count, table.passes(rows, batch, check))


def _subset(
    source: object, choose: Callable[[int], Rows], batch: int, name: str, told: str
) -> tuple[object, str, int | None]:
    """Of a dataset the chosen samples in batches, what they are called, and how many they are; anything else as it is."""
    dataset = dataset_of(source)
    if not isinstance(dataset, Sized):
        return source, told, None
    rows = choose(len(dataset))
    batches: DataLoader[Any] = DataLoader(Subset(dataset, rows.tolist()), batch_size=batch)  # type: ignore[arg-type]
    return batches, f"{len(rows)} of {len(dataset)} samples of {name}", len(rows)


def _chosen(total: int, samples: int, seed: int) -> Rows:
    """Which samples: drawn without replacement, in their order."""
    return np.sort(np.random.default_rng(seed).choice(total, size=min(samples, total), replace=False))


def _spread(total: int, limit: int | None) -> Rows:
    """Which samples: spread evenly, because files and folders are often sorted by class."""
    count = min(limit or total, total)
    return np.arange(count, dtype=np.int64) * total // count


def example(forward: Callable[..., Any], source: Source) -> Batch | dict[str, torch.Tensor]:
    """Samples to capture a network on: by name where the source has names, else in order.

    forward: what the network computes. Its inputs are the parameters without a default, and of the optional ones those that the
    source has by these names or, in order, the first so many as a batch has tensors; class indices at the end of a batch are no
    input. Raises DataError.
    """
    found = _locate(source)
    first = _first(found, _name(source))
    if isinstance(first, list | tuple) and len(first) == 2 and isinstance(first[0], Mapping):  # beside a target
        first = first[0]
    try:
        parameters = inspect.signature(forward).parameters.values()
    except ValueError as error:  # it is not Python's
        raise CaptureError(SCRIPTED) from error
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = tuple(p.name for p in plain if p.default is p.empty)
    optional = [p.name for p in plain if p.default is None]
    if isinstance(first, Mapping):
        names = (*required, *(n for n in optional if n in first and n not in LABELS))
    else:
        count = ordered(first)
        several = (f"{p.name}_{i}" for p in parameters if p.kind is p.VAR_POSITIONAL for i in range(count))
        more = takewhile(lambda n: n not in LABELS, chain(optional, several))
        names = (*required, *islice(more, max(0, count - len(required))))
    if not names:
        known = ", ".join(n for n in optional if n not in LABELS) or "no names"
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
    ``label``, ``labels``), and code, an iterable or a dataset yields ``(inputs, target)`` or such mappings. ``outputs`` is the
    number of classes of the network. ``limit`` takes samples spread evenly over a folder, file or dataset (often sorted
    by class) but the first of a stream. ``classes`` gives the index of each class folder: a text file with one name per
    line or a JSON object ``{name: index}``; without it numbers are indices, and other names count in sorted order if
    there are ``outputs`` of them. Errors as there.
    """
    _positive(batch=batch, **({} if limit is None else {"limit": limit}))
    found, names = _locate(source), tuple(input_names)
    if classes is not None and not (isinstance(found, Path) and found.is_dir()):
        raise UsageError(f"the class file {classes} applies to a folder of pictures only, not to {_name(source)}")

    def check(flat: Batch, where: str) -> Batch:
        return (*checked(flat[:-1], names, where), checked_target(flat[-1], len(flat[0]), outputs, where))

    if isinstance(found, Path) and found.is_dir():
        paths = find_pictures(found)
        target = class_indices(found, paths, outputs, classes)
        table = _pictures(found, paths, preprocess, names)
    elif _holds_arrays(found):
        table, given = _arrays(found, _name(source), names)
        if given is None:
            raise DataError(f"{table.name} holds no array 'target'; add one with the class index of each sample")
        target = checked_target(given, table.total, outputs, table.name)  # at once, not after an hour
    else:

        def convert(item: object, where: str) -> Batch:
            _, beside = parted(item, names)
            if beside is None:
                raise DataError(f"{where} is not (inputs, target), with inputs {', '.join(names)}; yield both")
            return check((*inputs_of(item, names, where), as_tensor(beside, f"the target of {where}")), where)

        name = _name(source)
        found, told, known = _subset(found, lambda total: _spread(total, limit), batch, name, name)
        return Labelled(told, known, stream(found, name, limit, convert))
    rows = _spread(table.total, limit)
    count = len(rows)
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
            tokens = not tensor.is_floating_point() and len(shape) == tensor.ndim == 2
            if tokens and not fits(tensor.shape[1:], shape[1:]):
                hint = f"pad or cut every sample to {shape[1]}, as the network was captured"
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
            arrays = picked(held, names, name)
            label = label_of(held, names)
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
    total = count_samples(arrays, names, name)

    def read(rows: Rows) -> Batch:
        taken = [array[rows if isinstance(array, np.ndarray) else torch.from_numpy(rows)] for array in arrays]
        return as_tensors(taken, names, name)

    return _Table(name, total, read), None if target is None else as_tensor(target, f"the target of {name}")
