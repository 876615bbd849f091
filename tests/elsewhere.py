"""A device that is not the CPU, without one: its tensors mix with those of the CPU as little as CUDA's do.

The numbers lie in the CPU's memory and the CPU computes with them; what is checked is where tensors are said to lie.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
# By indices of the CPU, too.
_INDEXED = ("aten::index", "aten::_unsafe_index", "aten::index_put_", "aten::_index_put_impl_")
_FAKE = torch._C._TorchDispatchModeKey.FAKE


class Elsewhere(Tensor):
    """A tensor of the CPU under another device's name."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(raw: Tensor) -> "Elsewhere":
        """The same memory, elsewhere."""
        how: dict[str, Any] = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        with torch.inference_mode(False):
            t = Tensor._make_wrapper_subclass(Elsewhere, raw.shape, device=torch.device(NAME, 0), **how)
        t.raw = raw
        return t

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(op, args, kwargs or {})

    def tolist(self) -> Any:  # torch refuses these two for subclasses, not for devices
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else str(self), spec)


class _MakesTensors(TorchDispatchMode):
    """Sees operations that are given no tensor, too."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._get_dispatch_mode(_FAKE) is not None:  # torch.export asks for shapes alone
            return op(*args, **(kwargs or {}))
        return _computed(op, args, kwargs or {})


def _computed(op: Any, args: Any, kwargs: Any) -> Any:
    name, given, strangers = op._schema.name, {}, []

    def raw(x: Any) -> Any:
        if isinstance(x, Elsewhere):
            given[id(x.raw)] = x
            return x.raw
        if isinstance(x, Tensor):
            if x.ndim:  # scalars of the CPU mix with everything
                strangers.append(x)
        elif isinstance(x, list | tuple):
            return type(x)([raw(y) for y in x])
        return x

    first = args[0] if args else None
    args, kwargs = [raw(x) for x in args], {k: raw(x) for k, x in kwargs.items()}
    if name in _INDEXED:
        strangers = [first] if not isinstance(first, Elsewhere) else []
    if given and strangers and name != "aten::copy_":
        raise RuntimeError(f"{name} is given a tensor {list(strangers[0].shape)} of the CPU beside others")
    away = bool(given)
    if kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]).type == NAME
        kwargs["device"] = torch.device("cpu")
    found = op(*args, **kwargs)
    if name == "aten::copy_":
        return given.get(id(args[0]), args[0])

    def where(y: Any) -> Any:
        if isinstance(y, list | tuple):
            return type(y)([where(z) for z in y])
        if not isinstance(y, Tensor) or not away:
            return y
        return given[id(y)] if id(y) in given else Elsewhere.of(y)

    return where(found)


@cache
def register() -> torch.library.Library:
    """Make the device known to torch: before the first backward pass, for which torch counts devices.

    Two kernels, because ``torch.tensor`` asks the device itself, not modes.
    """
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
        return Elsewhere.of(torch.empty_strided(size, stride, dtype=dtype))

    def copied(source: Tensor, to: Any, non_blocking: bool = False) -> Tensor:
        to.raw.copy_(source)
        return to

    library.impl("empty_strided", empty, "PrivateUse1")
    library.impl("_copy_from", copied, "PrivateUse1")
    return library


@contextmanager
def another_device() -> Iterator[str]:
    """The name of a device for ``tensor.to``, while inside."""
    register()
    with _MakesTensors():
        yield NAME
