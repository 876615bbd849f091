"""A network from the command line: ``file.py:callable``, ``package.module:callable`` or ``net.pt2``, with a checkpoint."""

import inspect
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from halfbyte.errors import CaptureError, HalfbyteError, UsageError
from halfbyte.loading import blame, load_callable
from halfbyte.model import Example

Network = nn.Module | ExportedProgram
_PICKLED = "'{}' holds pickled objects that could run code: use --trust if you know where it comes from"
SCRIPTED = "a scripted or traced module cannot be captured: give the torch.nn.Module that it was made of"
_PARALLEL = "module."  # what DataParallel puts before every name
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_SIGNS = re.compile(r"[\w\s,.+\-*/()<>=!&|~]*")
_NAME = re.compile(r"[A-Z][A-Za-z]*|[a-z]+\d+|\d+(\.\d+)?")  # s0, Max, 2, 0.5: no names that Python knows


def open_network(
    spec: str, *, checkpoint: str | Path | None = None, trust: bool = False
) -> tuple[Network, Example | None]:
    """The network, and its example inputs if it brings some.

    spec: a callable that returns a module, or ``(module, example inputs)``; or a ``.pt2`` exported program. checkpoint:
    ``.safetensors`` or ``.pt`` with the module's parameters, all of them and no others. trust: open files that need pickle,
    which can run any code. Raises :class:`UsageError`, :class:`CaptureError`.
    """
    if spec.endswith(".pt2"):
        if checkpoint is not None:
            raise UsageError("a .pt2 file brings its own weights: leave out --checkpoint")
        return _open_program(Path(spec), trust)
    if spec.endswith((".pt", ".pth", ".safetensors")):
        raise UsageError(
            f"'{spec}' holds weights, not a network: give the network as file.py:callable and these as --checkpoint"
        )
    found = load_callable(spec)
    made = found if isinstance(found, nn.Module) else _called(found, spec)
    net, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(net, nn.Module):
        raise CaptureError(
            f"'{spec}' returned {type(net).__name__}, not a torch.nn.Module (or a pair of module and example inputs)"
            f"{_hint(net)}"
        )
    if isinstance(example, Tensor):
        example = (example,)
    held = list(example.values()) if isinstance(example, Mapping) else example
    if held is not None and not (isinstance(held, tuple | list) and all(isinstance(t, Tensor) for t in held)):
        raise CaptureError(f"the example inputs from '{spec}' must be tensors, such as torch.zeros(1, 3, 224, 224)")
    if checkpoint is not None:
        _load_checkpoint(net, Path(checkpoint), trust)
    return net.eval(), example


def _called(function: Callable[..., Any], spec: str) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise CaptureError(f"'{spec}' cannot be called: {error}; name a function that needs no arguments") from error
    except ValueError:  # written in C: it shows when it is called
        pass
    try:
        return function()
    except HalfbyteError:
        raise
    except Exception as error:
        code = getattr(function, "__code__", None)
        raise CaptureError(f"'{spec}' fails with {blame(error, code.co_filename if code else None)}") from error


def _hint(made: object) -> str:
    """What to do about something that is no module."""
    if made is None:
        return ": does it end without 'return'?"
    if isinstance(made, Mapping):
        return ": return the module, and give saved parameters as --checkpoint"
    return ""


def _load_checkpoint(net: nn.Module, path: Path, trust: bool) -> None:
    state = _read_state(path, trust)
    expected = net.state_dict()
    if all(k.startswith(_PARALLEL) for k in state) and not any(k.startswith(_PARALLEL) for k in expected):
        state = {k.removeprefix(_PARALLEL): t for k, t in state.items()}
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} {what}, such as '{names[0]}'"
            for names, what in ((missing, "missing"), (unexpected, "unexpected"))
            if names
        ]
        raise UsageError(f"checkpoint '{path}' does not fit the network: keys {' and '.join(parts)}")
    wrong = [k for k, t in state.items() if t.shape != expected[k].shape]
    if wrong:
        shapes = f"{list(state[wrong[0]].shape)} instead of {list(expected[wrong[0]].shape)}"
        raise UsageError(f"checkpoint '{path}' does not fit the network: '{wrong[0]}' has shape {shapes}")
    net.load_state_dict({k: t.to(expected[k].dtype) for k, t in state.items()})


def _read_state(path: Path, trust: bool) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"there is no checkpoint '{path}': check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise UsageError(_PICKLED.format(path)) from error
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UsageError(f"'{path}' cannot be read as a checkpoint ({reason}): save or copy it again") from error
    for key in ("state_dict", "model_state_dict", "model"):  # what training scripts wrap it in
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UsageError(f"'{path}' is not a dictionary of parameters: save the network's state_dict()")
    return {str(k): t for k, t in state.items()}


def _open_program(path: Path, trust: bool) -> tuple[ExportedProgram, Example | None]:
    if not path.is_file():
        raise UsageError(f"there is no file '{path}'")
    if not trust:
        _check_without_pickle(path)
    try:
        with _tensors_only(not trust):
            program = torch.export.load(path)
    except pickle.UnpicklingError as error:
        raise CaptureError(_PICKLED.format(path)) from error
    except Exception as error:
        raise CaptureError(f"'{path}' cannot be read as an exported program: {str(error).splitlines()[0]}") from error
    return program, example_of(program)


def example_of(program: ExportedProgram) -> Example | None:
    """The inputs that a program was exported on, in order or by name, if it has kept them."""
    ordered, named = program.example_inputs or ((), {})
    if named and not ordered and all(isinstance(t, Tensor) for t in named.values()):
        return dict(named)
    return tuple(ordered) if ordered and not named and all(isinstance(t, Tensor) for t in ordered) else None


@contextmanager
def _tensors_only(wanted: bool) -> Iterator[None]:
    """Inside, torch unpickles nothing but tensors, whatever its own code asks for (it falls back to plain pickle)."""
    before = os.environ.get(_FORCE)
    if wanted:
        os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ[_FORCE]
        elif before is not None:
            os.environ[_FORCE] = before


def _is_formula(text: str) -> bool:
    text = re.sub(r"Symbol\('[a-z]+\d+'", "Symbol(", text)
    text = re.sub(r"\b[a-z]+=", "", text)  # Symbol(..., positive=True)
    words = re.findall(r"[\w.]+", text)
    return _SIGNS.fullmatch(text) is not None and all(_NAME.fullmatch(word) for word in words)


def _check_expressions(value: Any) -> None:
    """Sizes are stored as formulas, which sympy evaluates as Python: refuse what is no formula."""
    if isinstance(value, dict):
        text = value.get("expr_str", "")
        if not isinstance(text, str) or not _is_formula(text):
            raise pickle.UnpicklingError(f"{text!r} is no formula")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_expressions(part)


def _check_without_pickle(path: Path) -> None:
    """Refuse an archive with pickled objects beyond plain tensors.

    torch's own loader unpickles some members without restriction; every member that is a pickle must therefore first pass
    the loader that builds tensors only.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = _pickled_members(archive)
            for name in archive.namelist():
                data = archive.read(name)
                if name.endswith(".json"):
                    _check_expressions(json.loads(data))
                if name.endswith(".json") or not (
                    name in pickled or data[:2] == b"PK" or name.endswith((".pt", ".pkl"))
                ):
                    continue
                torch.load(BytesIO(data), weights_only=True)
    except pickle.UnpicklingError as error:
        raise CaptureError(_PICKLED.format(path)) from error
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise CaptureError(
            f"'{path}' is not an exported program, or is damaged: {str(error).splitlines()[0]}"
        ) from error


def _pickled_members(archive: zipfile.ZipFile) -> set[str]:
    """Members that the archive's own tables declare as pickled, and all custom objects."""
    found = set()
    for name in archive.namelist():
        if "custom_obj" in name or name.endswith((".pt", ".pkl")):
            found.add(name)
        if name.endswith("config.json"):
            for entry in json.loads(archive.read(name)).get("config", {}).values():
                if entry.get("use_pickle"):
                    found |= {n for n in archive.namelist() if n.endswith(str(entry.get("path_name")))}
    return found
