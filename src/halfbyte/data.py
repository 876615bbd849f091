"""Calibration and labelled batches from folders, NumPy files, user code and Python objects."""

import difflib
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from halfbyte.errors import DataError, HalfbyteError, UsageError
from halfbyte.preprocess import Preprocess, find_pictures, read_picture

Batch = tuple[torch.Tensor, ...]
Source = (
    str
    | os.PathLike[str]
    | torch.Tensor
    | npt.NDArray[Any]
    | Mapping[str, Any]
    | Iterable[Any]
    | Callable[[], Iterable[Any]]
)
_Pass = Callable[[], Iterator[Batch]]
_Rows = npt.NDArray[np.int64]
_SPEC = re.compile(r".+:[^\W\d]\w*")
_FORMS = "give a folder of pictures, an .npy or .npz file, 'file.py:function' or 'package.module:function'"


@dataclass(frozen=True)
class Samples:
    """Unlabelled batches, the same in the same order on every pass; ``count`` is the samples of a pass, if known."""

    description: str
    count: int | None
    _start: _Pass = field(repr=False)

    def __iter__(self) -> Iterator[Batch]:
        return self._start()


@dataclass(frozen=True)
class Labelled:
    """Batches ``(inputs, target)``, ``target`` int64 ``[N]``, the same on every pass; ``count`` as in Samples."""

    description: str
    count: int | None
    _start: _Pass = field(repr=False)

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        return ((flat[:-1], flat[-1]) for flat in self._start())


@dataclass(frozen=True)
class _Table:
    """Samples that can be read in any order: ``read(rows)`` gives the batch of these rows."""

    name: str
    total: int
    read: Callable[[_Rows], Batch]

    def passes(self, rows: _Rows, batch: int, check: Callable[[Batch, str], Batch]) -> _Pass:
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
    float64 becomes float32, other types stay. Raises DataError, also while iterating, or UsageError.
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
        passes = _stream(found, _name(source), samples, lambda item, where: check(_batch(item, names, where), where))
        return Samples(f"the first {samples} samples of {_name(source)}", None, passes)
    count = min(samples, table.total)
    rows = np.sort(np.random.default_rng(seed).choice(table.total, size=count, replace=False))
    return Samples(f"{count} of {table.total} samples of {table.name}", count, table.passes(rows, batch, check))


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

    A folder has a sub-folder for each class, an .npz file or mapping an array ``target`` ``[N]``, and code or an
    iterable yields ``(inputs, target)``. ``outputs`` is the number of classes of the network. ``limit`` takes samples
    spread evenly over a folder or file (which is often sorted by class) but the first of a stream. ``classes`` gives
    the index of each class folder: a text file with one name per line or a JSON object ``{name: index}``; without it
    numbers are indices, and other names count in sorted order if there are ``outputs`` of them. Errors as there.
    """
    _positive(batch=batch, **({} if limit is None else {"limit": limit}))
    found, names = _locate(source), tuple(input_names)
    if classes is not None and not (isinstance(found, Path) and found.is_dir()):
        raise UsageError(f"the class file {classes} applies to a folder of pictures only, not to {_name(source)}")

    def check(flat: Batch, where: str) -> Batch:
        return (*_checked(flat[:-1], names, where), _checked_target(flat[-1], len(flat[0]), outputs, where))

    if isinstance(found, Path) and found.is_dir():
        table = _class_folders(found, preprocess, names, outputs, classes)
    elif _holds_arrays(found):
        plain, target = _arrays(found, _name(source), names)
        if target is None:
            raise DataError(f"{plain.name} holds no array 'target'; add one with the class index of each sample")
        _checked_target(target, plain.total, outputs, plain.name)  # at once, not after an hour
        table = _Table(plain.name, plain.total, lambda rows: (*plain.read(rows), target[torch.from_numpy(rows)]))
    else:

        def convert(item: object, where: str) -> Batch:
            if not isinstance(item, list | tuple) or len(item) != 2:
                raise DataError(f"{where} is not a pair (inputs, target); yield both")
            return check((*_batch(item[0], names, where), _tensor(item[1], f"the target of {where}")), where)

        return Labelled(_name(source), None, _stream(found, _name(source), limit, convert))
    count = min(limit or table.total, table.total)
    rows = np.arange(count, dtype=np.int64) * table.total // count
    return Labelled(f"{count} of {table.total} samples of {table.name}", count, table.passes(rows, batch, check))


def load_callable(spec: str) -> Callable[..., Any]:
    """The function or class that "path/file.py:name" or "package.module:name" names.

    The same file always gives the same module. The folder of a file goes to the front of ``sys.path``, as when Python
    runs it, and stays there, since the callable may import its neighbours only when it is called.
    Raises UsageError for a missing file, module or name, for code that raises, and for what is not callable.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(f"{spec!r} names no function; write 'path/file.py:function' or 'package.module:function'")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_of_name(place)
    if not hasattr(module, name):
        valid = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, valid, n=3, cutoff=0.3) or sorted(valid)[:3]
        raise UsageError(
            f"{place} has no {name!r}; " + (f"near are {', '.join(near)}" if near else "it has no functions")
        )
    found: object = getattr(module, name)
    if not callable(found):
        raise UsageError(f"{spec} is a {type(found).__name__}, which cannot be called; name a function")
    return found


def check_inputs(batch: Batch, expected: Sequence[tuple[str, Sequence[int | str], torch.dtype]], where: str) -> None:
    """Compares a batch with the inputs of the network: name, shape (text is a free dimension) and dtype of each.

    ``where`` names the batch in the message, such as "calibration batch 0". Raises DataError for the first difference.
    """
    if len(batch) != len(expected):
        names = ", ".join(repr(name) for name, _, _ in expected)
        raise DataError(f"{where} has {len(batch)} tensors but the network takes {len(expected)} inputs: {names}")
    for tensor, (name, shape, dtype) in zip(batch, expected, strict=True):
        if not _fits(tensor.shape, shape):
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


def _fits(given: Sequence[int], expected: Sequence[int | str]) -> bool:
    return len(given) == len(expected) and all(
        isinstance(e, str) or g == e for g, e in zip(given, expected, strict=True)
    )


def _shape_hint(given: list[int], expected: list[int | str]) -> str:
    if len(given) != len(expected):
        lacks_batch = _fits(given, expected[1:])
        return "add the batch axis in front" if lacks_batch else f"give {len(expected)} axes instead of {len(given)}"
    picture = _picture_hint(given, expected) if len(given) == 4 else None
    if picture is not None:
        return picture
    if _fits(given[1:], expected[1:]):
        return f"set --batch {expected[0]} and a number of samples it divides"
    axis = next(i for i, (g, e) in enumerate(zip(given, expected, strict=True)) if not _fits([g], [e]))
    return f"give {expected[axis]} instead of {given[axis]} along axis {axis}"


def _picture_hint(given: list[int], expected: list[int | str]) -> str | None:
    n, a, b, c = given
    high, wide = expected[2:]
    if _fits([n, c, a, b], expected):
        return "the data is NHWC and the network takes NCHW; move the channels to axis 1 (transpose 0, 3, 1, 2)"
    if _fits([n, b, c, a], expected):
        return "the data is NCHW and the network takes NHWC; move the channels last (transpose 0, 2, 3, 1)"
    if _fits([n, a], expected[:2]) and isinstance(high, int) and isinstance(wide, int):
        return f"set --size {high if high == wide else f'{high}x{wide}'}"
    if a in (1, 3) and expected[1] in (1, 3) and _fits([n, b, c], [expected[0], high, wide]):
        return f"set --color {'gray' if expected[1] == 1 else 'rgb'}"
    return None


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
    return value.float() if value.dtype == torch.float64 else value


def _batch(item: object, names: tuple[str, ...], where: str) -> Batch:
    if isinstance(item, Mapping):
        return tuple(
            _tensor(v, f"input {n!r} of {where}") for n, v in zip(names, _pick(item, names, where), strict=True)
        )
    given = tuple(item) if isinstance(item, list | tuple) else (item,)
    if len(given) != len(names):
        hint = "; yield the inputs without labels" if len(given) == len(names) + 1 else ""
        raise DataError(
            f"{where} has {len(given)} tensors but the network takes {len(names)} ({', '.join(names)}){hint}"
        )
    return tuple(_tensor(v, f"input {n!r} of {where}") for n, v in zip(names, given, strict=True))


def _pick(arrays: Mapping[str, Any], names: tuple[str, ...], where: str) -> list[Any]:
    """The arrays of the inputs in the order of the network; a single array serves a single input by any name."""
    held = [key for key in arrays if key != "target" or key in names]
    if len(names) == len(held) == 1:
        return [arrays[held[0]]]
    missing = [name for name in names if name not in held]
    if missing:
        raise DataError(
            f"{where} holds no array for the input{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))} "
            f"(it holds {', '.join(map(repr, held)) or 'none'}); name each array as the input of the network"
        )
    return [arrays[name] for name in names]


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


def _pictures(folder: Path, paths: list[Path], preprocess: Preprocess | None, names: tuple[str, ...]) -> _Table:
    if preprocess is None:
        raise UsageError(f"{folder} holds pictures, which need a preprocessing; set --size, --mean and --std")
    if len(names) != 1:
        raise DataError(
            f"{folder} holds pictures for one input but the network takes {len(names)} ({', '.join(names)}); "
            "give an .npz file with one array for each"
        )

    def load(path: Path) -> torch.Tensor:
        image = read_picture(path)
        try:
            return preprocess(image)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    return _Table(str(folder), len(paths), lambda rows: (torch.stack([load(paths[row]) for row in rows]),))


def _class_folders(
    folder: Path,
    preprocess: Preprocess | None,
    names: tuple[str, ...],
    outputs: int | None,
    classes: str | os.PathLike[str] | None,
) -> _Table:
    paths = find_pictures(folder)
    parts = [path.relative_to(folder).parts for path in paths]
    loose = next((path for path, part in zip(paths, parts, strict=True) if len(part) == 1), None)
    if loose is not None:
        raise DataError(f"{loose} lies in no class folder; labelled pictures need one sub-folder for each class")
    # Empty folders count as classes, so that the position of the others stays right.
    held = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if classes is not None:
        index = _class_file(Path(classes), held)
    elif all(name.isascii() and name.isdecimal() for name in held):
        index = {name: int(name) for name in held}
    elif len(held) == outputs:
        index = {name: i for i, name in enumerate(held)}
    else:
        raise DataError(
            f"{folder} holds {len(held)} class folders ({held[0]}, ...) but the network has "
            f"{'an unknown number of' if outputs is None else outputs} outputs; give a class file with their indices"
        )
    for name in sorted({part[0] for part in parts}):
        if index[name] < 0 or (outputs is not None and index[name] >= outputs):
            raise DataError(f"{folder / name} is class {index[name]} but the network has {outputs} outputs")
    table = _pictures(folder, paths, preprocess, names)
    target = torch.tensor([index[part[0]] for part in parts], dtype=torch.int64)
    return _Table(table.name, table.total, lambda rows: (*table.read(rows), target[torch.from_numpy(rows)]))


def _class_file(path: Path, held: list[str]) -> dict[str, int]:
    """The index of each class folder in ``held`` by a class file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.suffix.lower() == ".json" else None
    except OSError as error:
        raise DataError(f"the class file {path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # of JSON and UTF-8
        raise DataError(f"the class file {path} is not valid ({error})") from error
    if path.suffix.lower() != ".json":
        lines = [line.strip() for line in text.rstrip().splitlines()]
        twice = next((line for i, line in enumerate(lines) if line in lines[:i]), None)
        if twice is not None:
            raise DataError(f"the class file {path} holds {twice!r} twice; each name needs one index")
        found = {line: i for i, line in enumerate(lines)}
    if not isinstance(found, dict) or not all(type(v) is int for v in found.values()):
        raise DataError(
            f'the class file {path} must be one object of names and indices, such as {{"cat": 0, "dog": 1}}'
        )
    for name in held:
        if name not in found:
            near = difflib.get_close_matches(name, found, n=3)
            more = f" (near are {', '.join(near)})" if near else ""
            raise DataError(f"the class folder {name!r} is not in the class file {path}{more}; add it or rename it")
    return found


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
            if "target" in held and "target" not in names:
                target = held["target"]
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

    def read(rows: _Rows) -> Batch:
        taken = [array[rows if isinstance(array, np.ndarray) else torch.from_numpy(rows)] for array in arrays]
        return tuple(_tensor(t, f"input {key!r} of {name}") for key, t in zip(names, taken, strict=True))

    return _Table(name, total, read), None if target is None else _tensor(target, f"the target of {name}")


def _stream(source: Any, name: str, limit: int | None, convert: Callable[[object, str], Batch]) -> _Pass:
    """Passes over the batches of user code or an iterable, converted, up to ``limit`` samples."""

    def one_pass() -> Iterator[Batch]:
        taken = 0
        for index, item in enumerate(_items(source, name)):
            flat = convert(item, f"batch {index} of {name}")
            rows = len(flat[0]) if limit is None else min(len(flat[0]), limit - taken)
            yield tuple(tensor[:rows] for tensor in flat)
            taken += rows
            if taken == limit:  # before the source computes a batch for nothing
                return
        if not taken:
            raise DataError(f"{name} gives no batches; a source has to give them again each time it is started")

    def checked_pass() -> Iterator[Batch]:
        # Statistics of one pass are used in the next, so data that changes (shuffled, augmented) would go unnoticed
        # and spoil the result. The empty batch stands for the end.
        for index, flat in enumerate(chain(one_pass(), [()])):
            digest = [zlib.crc32(t.contiguous().view(torch.uint8).numpy().data) for t in flat]
            if index == len(seen):
                seen.append(digest)
            elif seen[index] != digest:
                raise DataError(
                    f"batch {index} of {name} differs from the one of an earlier pass; turn off shuffling and random "
                    "augmentation, or give a list of the batches"
                )
            if flat:
                yield flat

    if isinstance(source, Iterator):
        kept = list(one_pass())
        return lambda: iter(kept)
    seen: list[list[int]] = []
    return checked_pass


def _items(source: Any, name: str) -> Iterator[object]:
    try:
        made = source() if callable(source) and not isinstance(source, Iterable) else source
        # An array is one batch; iterating over it would give its rows.
        yield from [made] if isinstance(made, torch.Tensor | np.ndarray | Mapping) else made
    except HalfbyteError:
        raise
    except Exception as error:  # whatever the code of the user raises
        code = getattr(source, "__code__", None)
        raise DataError(f"{name} fails with {_blame(error, code.co_filename if code else None)}") from error


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {path}; write 'path/file.py:function'")
    path = path.resolve()
    # Two files of the same name in different folders are two modules.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"halfbyte_file_{re.sub(r'[^0-9a-zA-Z]', '_', path.stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported; give a Python file")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{path} cannot be imported: {_blame(error, str(path))}") from error
    return module


def _module_of_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{name}.".startswith(f"{absent}."):
            raise UsageError(f"there is no module {name!r}; install it or write 'path/file.py:function'") from error
        raise UsageError(f"{name} cannot be imported: {_blame(error, None)}") from error


def _blame(error: BaseException, file: str | None) -> str:
    """The exception in one line, with the last line of ``file`` that took part, or the place where it was raised."""
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename == file), frames[-1])
    place, line = (frame.filename, frame.lineno)
    if isinstance(error, SyntaxError):
        place, line = error.filename or place, error.lineno
    return f"{type(error).__name__}{': ' * bool(text)}{text} ({Path(place).name}, line {line})"
