"""The code of the user: found by name, started for each pass, and held to giving the same batches each time."""

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from halfbyte.errors import DataError, HalfbyteError, UsageError

Batch = tuple[torch.Tensor, ...]
Pass = Callable[[], Iterator[Batch]]
_AT_ONCE = 32  # samples of a dataset
_COMPARED = 4096  # values of each tensor of the first batch that two passes are compared by


def load_callable(spec: str) -> Callable[..., Any]:
    """The function or class that "path/file.py:name" or "package.module:name" names.

    The same file always gives the same module. The folder of a file goes to the front of ``sys.path``, as when Python
    runs it, and stays there, since the callable may import its neighbours only when it is called.
    Raises UsageError for a missing file, module or name, for code that raises, and for what is not callable. A module
    of torch that is no class is callable, too: with a batch.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        absent = "" if Path(spec).exists() else ", and there is no file or folder of that name"
        raise UsageError(
            f"{spec!r} names no function{absent}; write 'path/file.py:function' or 'package.module:function'"
        )
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


def stream(source: Any, name: str, limit: int | None, convert: Callable[[object, str], Batch]) -> Pass:
    """Passes over the batches of user code or an iterable, converted, up to ``limit`` samples.

    convert: what the source yields, and a name for it -> a batch. A one-shot iterator is kept in memory; anything else
    is started again for each pass. Raises DataError, while iterating, where a pass differs from an earlier one: in the
    number or the shapes of its batches, or in the values of the first (to compare all values would cost as much again).
    """

    def one_pass() -> Iterator[Batch]:
        taken = 0
        for index, item in enumerate(items(source, name)):
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
            digest = [_digest(t, values=index == 0) for t in flat]
            if index == len(seen):
                seen.append(digest)
            elif seen[index] != digest:
                raise DataError(
                    f"batch {index} of {name} differs from the one of an earlier pass; turn off shuffling and random "
                    "augmentation, seed what draws random numbers, or give a list of the batches that stays the same"
                )
            if flat:
                yield flat

    if isinstance(source, Iterator):
        kept = list(one_pass())
        return lambda: iter(kept)
    seen: list[list[tuple[int, ...]]] = []
    return checked_pass


def _digest(tensor: torch.Tensor, *, values: bool) -> tuple[int, ...]:
    """The shape of a tensor and, with ``values``, a checksum of some of them.

    They are spread over all of it, since the first ones of many pictures are the same empty border.
    """
    if not values:
        return tuple(tensor.shape)
    some = tensor.flatten()[:: -(-tensor.numel() // _COMPARED)].contiguous()
    return (*tensor.shape, zlib.crc32(some.view(torch.uint8).numpy().data))


def items(source: Any, name: str) -> Iterator[object]:
    """What user code or an iterable gives, as it comes. Raises DataError where it fails."""
    try:
        made = source() if callable(source) and not isinstance(source, Iterable) else source
        # An array is one batch; iterating over it would give its rows.
        yield from [made] if isinstance(made, torch.Tensor | np.ndarray | Mapping) else _started(made)
    except HalfbyteError:
        raise
    except Exception as error:  # whatever the code of the user raises
        code = getattr(source, "__code__", None)
        raise DataError(f"{name} fails with {blame(error, code.co_filename if code else None)}") from error


def dataset_of(source: Any) -> Any:
    """A dataset, which gives single samples, those of Hugging Face as tensors; None for anything else."""
    by_columns = hasattr(source, "with_format")
    many = hasattr(source, "__getitems__") or (isinstance(source, Dataset) and not isinstance(source, IterableDataset))
    if not (many or by_columns):
        return None
    plain = by_columns and (getattr(source, "format", None) or {}).get("type") is None
    return source.with_format("torch") if plain else source


def _started(source: Any) -> Iterable[object]:
    """The batches of a source."""
    dataset = dataset_of(source)
    if dataset is not None:
        source = DataLoader(dataset, batch_size=_AT_ONCE)
    return _seeded(source) if isinstance(source, DataLoader) else source


def _seeded(loader: DataLoader[Any]) -> Iterator[object]:
    """A pass that shuffles and augments as every other does: by torch's random numbers from one seed, which nobody else sees."""
    own, batches = torch.Generator().manual_seed(0).get_state(), None
    while True:
        before = torch.get_rng_state()
        torch.set_rng_state(own)
        try:
            batches = iter(loader) if batches is None else batches
            item = next(batches)
        except StopIteration:
            return
        finally:
            own = torch.get_rng_state()
            torch.set_rng_state(before)
        yield item


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
        raise UsageError(f"{path} cannot be imported: {blame(error, str(path))}") from error
    return module


def _module_of_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{name}.".startswith(f"{absent}."):
            raise UsageError(f"there is no module {name!r}; install it or write 'path/file.py:function'") from error
        raise UsageError(f"{name} cannot be imported: {blame(error, None)}") from error


def blame(error: BaseException, file: str | None) -> str:
    """The exception in one line, with the last line of ``file`` that took part, or the place where it was raised."""
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename == file), frames[-1])
    place, line = (frame.filename, frame.lineno)
    if isinstance(error, SyntaxError):
        place, line = error.filename or place, error.lineno
    return f"{type(error).__name__}{': ' * bool(text)}{text} ({Path(place).name}, line {line})"
