"""Folders of pictures: pictures by number as one tensor, class indices by folder, and what a wrong shape hints at."""

import difflib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from halfbyte.errors import DataError, UsageError
from halfbyte.preprocess import Preprocess, read_picture

Rows = npt.NDArray[np.int64]


def reader(
    folder: Path, paths: Sequence[Path], preprocess: Preprocess | None, names: Sequence[str]
) -> Callable[[Rows], torch.Tensor]:
    """What turns numbers of pictures in ``paths`` into a tensor ``[N, C, H, W]``; it decodes them when it is called.

    names: the inputs of the network. Raises UsageError without ``preprocess`` and DataError for more than one input;
    the function raises DataError for a picture that cannot be used.
    """
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

    return lambda rows: torch.stack([load(paths[row]) for row in rows])


def class_indices(
    folder: Path, paths: Sequence[Path], outputs: int | None, classes: str | os.PathLike[str] | None
) -> torch.Tensor:
    """Int64 ``[N]``: the class index of each of ``paths``, by the sub-folder of ``folder`` that it lies in.

    The index of a sub-folder comes from the file ``classes`` (one name per line, or a JSON object), else from its name
    if all names are numbers, else from its place in sorted order if there are ``outputs`` of them. Raises DataError.
    """
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
            raise DataError(
                f"{folder / name} is class {index[name]} but the network has {outputs} outputs; give a class file"
            )
    return torch.tensor([index[part[0]] for part in parts], dtype=torch.int64)


def fits(given: Sequence[int], expected: Sequence[int | str]) -> bool:
    """Whether a shape is the expected one, in which text is a free dimension."""
    return len(given) == len(expected) and all(
        isinstance(e, str) or g == e for g, e in zip(given, expected, strict=True)
    )


def layout_hint(given: Sequence[int], expected: Sequence[int | str]) -> str | None:
    """What to do where a shape of pictures, four numbers, does not fit: layout, size or colour; None for all else."""
    n, a, b, c = given
    high, wide = expected[2:]
    if fits([n, c, a, b], expected):
        return "the data is NHWC and the network takes NCHW; move the channels to axis 1 (transpose 0, 3, 1, 2)"
    if fits([n, b, c, a], expected):
        return "the data is NCHW and the network takes NHWC; move the channels last (transpose 0, 2, 3, 1)"
    if fits([n, a], expected[:2]) and isinstance(high, int) and isinstance(wide, int):
        return f"set --size {high if high == wide else f'{high}x{wide}'}"
    if a in (1, 3) and expected[1] in (1, 3) and fits([n, b, c], [expected[0], high, wide]):
        return f"set --color {'gray' if expected[1] == 1 else 'rgb'}"
    return None


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
